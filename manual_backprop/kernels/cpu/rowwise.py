"""Functions that read a row for its sums, and again for what these make of it, compiled to two or three passes.

Only for where they are compiled: as they are written they take more passes than PyTorch's own. Sums in the wide format.
"""

import torch
from torch import Tensor

from ...ops.numerics import wide
from .compiled import compiled


@compiled("R V", "R", "R: float32", "R: float32", "R", "float")
def cross_entropy_of_rows(
    logits: Tensor, at_target: Tensor, loss: Tensor, total: Tensor, counts: Tensor, label_smoothing: float
) -> None:
    """logits z (R, V) become e = exp(z - max(z)), and total (R) their sums: softmax(z) = e / total.

    at_target (R), the logit of each row's target, becomes the gradient there, times total: e - total q, where q is 1 -
    label_smoothing + label_smoothing / V. loss (R) = logsumexp(z) - sum_v q_v z_v, from z - max(z), since a common
    summand of z changes nothing. All of them are 0 where counts (R) is 0, which else is 1, whatever the row held.

    One pass makes e, adds it up and writes it. Inductor (torch 2.13) takes 32 bfloat16 numbers at a time in it and not
    16, which is twice as fast, where sum and copy both read something in that format, `counts`, and each by itself: of
    what they share it makes a tensor.
    """
    smoothed = torch.as_tensor(label_smoothing, device=logits.device)
    z, count = wide(logits), counts > 0
    largest, average = z.amax(dim=1), z.mean(dim=1)
    e = torch.exp(z - largest[:, None])
    sums = torch.where(count[:, None], e, 0).sum(dim=1)
    total.copy_(sums)
    logits.copy_(torch.where((counts <= 0)[:, None], 0, e))
    z_target = wide(at_target) - largest
    # average: -inf where a logit is, and 0 times that is NaN
    expected = (1 - label_smoothing) * z_target + torch.where(smoothed > 0, label_smoothing * (average - largest), 0)
    loss.copy_(torch.where(count, sums.log() - expected, 0))
    q = 1 - label_smoothing + label_smoothing / logits.shape[1]
    at_target.copy_(torch.where(count, torch.exp(z_target) - q * sums, 0))


STREAM, WEIGHT, OF_ROW = "N D: parameter", "D: parameter", "N: float32"  # the residual stream is as wide as parameters


@compiled("N D", STREAM, OF_ROW, OF_ROW, STREAM, "N D", WEIGHT, WEIGHT, "float")
def add_and_normalize(
    y: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    epsilon: float,
) -> None:
    """total (N, D) = x + branch, in whose place it may be, and y = layer_norm(total); mean, rstd (N), wide.

    `ops.residual_layer_norm_forward`.
    """
    summed = (wide(x) + wide(branch)).to(total.dtype)  # rounded: what is kept of it is what is normalized
    total.copy_(summed)
    _normalize(y, mean, rstd, summed, weight, bias, epsilon)


@compiled("N D", OF_ROW, OF_ROW, STREAM, WEIGHT, WEIGHT, "float")
def normalize_rows(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> None:
    """y = layer_norm(x), where nothing is added: bit for bit `add_and_normalize` of a sum that was made before."""
    _normalize(y, mean, rstd, x, weight, bias, epsilon)


def _normalize(y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> None:
    """y = (x - mean) rstd weight + bias."""
    average = wide(x).mean(dim=1, keepdim=True)
    centered = wide(x) - average
    scale = torch.rsqrt(centered.square().mean(dim=1, keepdim=True) + epsilon)
    mean.copy_(average[:, 0])
    rstd.copy_(scale[:, 0])
    y.copy_(centered * scale * wide(weight) + wide(bias))


@compiled("N D", STREAM, OF_ROW, OF_ROW, WEIGHT, WEIGHT)
def normalize(y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> None:
    """y = layer_norm(total) once more, from its statistics."""
    y.copy_((wide(total) - mean[:, None]) * rstd[:, None] * wide(weight) + wide(bias))


@compiled(STREAM, WEIGHT, WEIGHT, "N D", STREAM, OF_ROW, OF_ROW, WEIGHT, "float")
def add_normalization_gradient(
    dtotal: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    dy: Tensor,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    adds: float,
) -> None:
    """dtotal (N, D) += the gradient of `total` through y = layer_norm(total), from dy (N, D); = where `adds` is 0, and
    then it may be in the place of total. dweight, dbias (D) += theirs. `ops.residual_layer_norm_backward`.
    """
    scale = rstd[:, None]
    normalized = (wide(total) - mean[:, None]) * scale
    dnormalized = wide(dy) * wide(weight)
    along_ones = dnormalized.mean(dim=1, keepdim=True)
    along_normalized = (dnormalized * normalized).mean(dim=1, keepdim=True)
    through = (dnormalized - along_ones - normalized * along_normalized) * scale
    dweight += (wide(dy) * normalized).sum(dim=0).to(dweight.dtype)
    dbias += wide(dy).sum(dim=0).to(dbias.dtype)
    _add_or_write(dtotal, through, adds)


def _add_or_write(total: Tensor, part: Tensor, adds: float) -> None:
    """total += part, or = part where `adds` is 0, and total may hold anything."""
    before = torch.where(torch.as_tensor(adds, device=total.device) > 0, wide(total), 0)
    total.copy_(before + part)


@compiled("N D", STREAM, OF_ROW, STREAM, "N D", WEIGHT, "float")
def add_and_rms_normalize(
    y: Tensor, total: Tensor, rrms: Tensor, x: Tensor, branch: Tensor, weight: Tensor, epsilon: float
) -> None:
    """total = x + branch, and y = rms_norm(total), likewise; rrms (N), wide: `ops.residual_rms_norm_forward`."""
    summed = (wide(x) + wide(branch)).to(total.dtype)
    total.copy_(summed)
    _rms_normalize(y, rrms, summed, weight, epsilon)


@compiled("N D", OF_ROW, STREAM, WEIGHT, "float")
def rms_normalize_rows(y: Tensor, rrms: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """y = rms_norm(x), where nothing is added."""
    _rms_normalize(y, rrms, x, weight, epsilon)


def _rms_normalize(y: Tensor, rrms: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """y = x rrms weight."""
    scale = torch.rsqrt(wide(x).square().mean(dim=1, keepdim=True) + epsilon)
    rrms.copy_(scale[:, 0])
    y.copy_(wide(x) * scale * wide(weight))


@compiled("N D", STREAM, OF_ROW, WEIGHT)
def rms_normalize(y: Tensor, total: Tensor, rrms: Tensor, weight: Tensor) -> None:
    """y = rms_norm(total) once more."""
    y.copy_(wide(total) * rrms[:, None] * wide(weight))


@compiled(STREAM, WEIGHT, "N D", STREAM, OF_ROW, WEIGHT, "float")
def add_rms_normalization_gradient(
    dtotal: Tensor, dweight: Tensor, dy: Tensor, total: Tensor, rrms: Tensor, weight: Tensor, adds: float
) -> None:
    """As `add_normalization_gradient`, of an RMS norm: `ops.residual_rms_norm_backward`."""
    scale = rrms[:, None]
    normalized = wide(total) * scale
    dnormalized = wide(dy) * wide(weight)
    along_normalized = (dnormalized * normalized).mean(dim=1, keepdim=True)
    through = (dnormalized - normalized * along_normalized) * scale
    dweight += (wide(dy) * normalized).sum(dim=0).to(dweight.dtype)
    _add_or_write(dtotal, through, adds)
