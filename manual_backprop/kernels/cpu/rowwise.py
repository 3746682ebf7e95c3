"""Functions that read a row for its sums, and again for what these make of it, compiled to two or three passes.

Only for where they are compiled: as they are written they take more passes than PyTorch's own. Sums in the wide format.
Layer norm's backward gains in bfloat16; in float32 it takes as long as PyTorch's.
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


@compiled("N D", "N D", "N: float32", "N: float32", "N D", "D", "D", "float")
def add_and_normalize(
    y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> None:
    """total (N, D), which holds the branch, becomes x + branch, and y = layer_norm(total); mean, rstd (N), wide.

    `ops.residual_layer_norm_forward`.
    """
    summed = (wide(x) + wide(total)).to(total.dtype)  # rounded: what is kept of it is what is normalized
    total.copy_(summed)
    _normalize(y, mean, rstd, summed, weight, bias, epsilon)


@compiled("N D", "N: float32", "N: float32", "N D", "D", "D", "float")
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


@compiled("N D", "N D", "N: float32", "N: float32", "D", "D")
def normalize(y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> None:
    """y = layer_norm(total) once more, from its statistics."""
    y.copy_((wide(total) - mean[:, None]) * rstd[:, None] * wide(weight) + wide(bias))


@compiled("N D", "N D", "N D", "N: float32", "N: float32", "D")
def add_normalization_gradient(
    dtotal: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> None:
    """dtotal (N, D) += the gradient of `total` through y = layer_norm(total), from dy (N, D).

    `ops.residual_layer_norm_backward` without the gradients of weight and bias.
    """
    scale = rstd[:, None]
    normalized = (wide(total) - mean[:, None]) * scale
    dnormalized = wide(dy) * wide(weight)
    along_ones = dnormalized.mean(dim=1, keepdim=True)
    along_normalized = (dnormalized * normalized).mean(dim=1, keepdim=True)
    dtotal.copy_(wide(dtotal) + (dnormalized - along_ones - normalized * along_normalized) * scale)


@compiled("D: float32", "D: float32", "N D", "N D", "N: float32", "N: float32")
def add_normalization_weights_gradient(
    dweight: Tensor, dbias: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """dweight, dbias (D), wide, += their gradients from dy (N, D), where y = layer_norm(total)."""
    normalized = (wide(total) - mean[:, None]) * rstd[:, None]
    dweight.copy_(dweight + (wide(dy) * normalized).sum(dim=0))
    dbias.copy_(dbias + wide(dy).sum(dim=0))
