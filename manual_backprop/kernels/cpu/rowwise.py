"""Functions that read a row twice, first for its sums, then to compute with them: two or three passes when compiled.

They are called only where they are compiled: in Python they take more passes than PyTorch's kernels. Sums are in
float32 or wider.
"""

import torch
from torch import Tensor

from ...common.batch import IGNORED
from ...ops.numerics import one_number, wide
from .compiled import compiled


@compiled("R V", "R: float32", "R: float32", "R: int64", "float", "float", "float")
def cross_entropy_of_rows(
    logits: Tensor,
    loss: Tensor,
    scale: Tensor,
    target: Tensor,
    denominator: float | Tensor,
    dloss: float | Tensor,
    label_smoothing: float,
) -> None:
    """logits z (R, V) become total (softmax(z) - q), where total = sum(exp(z - max(z))) and q is label_smoothing / V
    everywhere, and 1 - label_smoothing more at the target.

    loss (R) = (logsumexp(z) - sum_v q_v z_v) / denominator, which is at least 1, computed from z - max(z), since a
    constant added to z changes nothing. scale (R) = dloss / total / denominator: scale times the new logits is their
    gradient. Where the target (R) is IGNORED, all results are 0 whatever the row contains.
    """
    counts, row = target != IGNORED, torch.arange(len(target), device=target.device)
    share = one_number(denominator, loss).clamp(min=1).reciprocal()
    z, t = wide(logits), target.where(counts, 0)
    z = z - z.amax(dim=1, keepdim=True)
    e = torch.exp(z)
    total, z_target, everywhere = e.sum(dim=1), z[row, t], label_smoothing / z.shape[1]
    at_target = z_target.exp() - (1 - label_smoothing + everywhere) * total
    gradient = e.to(logits.dtype) - everywhere * total[:, None] if label_smoothing else e
    logits.copy_(torch.where(counts[:, None], gradient.index_put((row, t), at_target), 0))
    # the average is -inf if a logit is, and 0 times -inf is NaN
    expected = (1 - label_smoothing) * z_target + (label_smoothing * z.mean(dim=1) if label_smoothing else 0)
    loss.copy_(torch.where(counts, (total.log() - expected) * share, 0))
    scale.copy_(torch.where(counts, dloss * share / total, 0))


@compiled("R D", "R D", "R: float32", by_rows=True)
def scale_rows(y: Tensor, x: Tensor, scale: Tensor) -> None:
    """y (R, D), which may be x, = each row of x times its number in scale (R)."""
    torch.mul(x, scale[:, None], out=y) if x.dtype == scale.dtype else y.copy_(x * scale[:, None])


@compiled(": float32", "N: float32")
def sum_of_numbers(total: Tensor, x: Tensor) -> None:
    """total, one number, = the sum of x (N)."""
    total.copy_(x.sum())


STREAM, WEIGHT, OF_ROW = "N D: parameter", "D: parameter", "N: float32"  # the residual stream has their dtype


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
    """total (N, D) = x + branch, which may share the memory of branch; y = layer_norm(total); mean, rstd (N), wide.

    `ops.residual_layer_norm_forward`.
    """
    summed = (wide(x) + wide(branch)).to(total.dtype)  # rounded before it is normalized, as backward reads it
    total.copy_(summed)
    _normalize(y, mean, rstd, summed, weight, bias, epsilon)


@compiled("N D", OF_ROW, OF_ROW, STREAM, WEIGHT, WEIGHT, "float")
def normalize_rows(
    y: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> None:
    """y = layer_norm(x): the same bits as `add_and_normalize` with x as the sum."""
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
    """Recomputes y = layer_norm(total) from its statistics."""
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
    """dtotal (N, D) += the gradient of `total` through y = layer_norm(total), from dy (N, D). If `adds` is 0, dtotal =
    that gradient, and may share the memory of total. dweight, dbias (D) += their gradients.
    `ops.residual_layer_norm_backward`.
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
    """total += part, or if `adds` is 0, total = part, whatever total contained."""
    before = torch.where(torch.as_tensor(adds, device=total.device) > 0, wide(total), 0)
    total.copy_(before + part)


@compiled("N D", STREAM, OF_ROW, STREAM, "N D", WEIGHT, "float")
def add_and_rms_normalize(
    y: Tensor, total: Tensor, rrms: Tensor, x: Tensor, branch: Tensor, weight: Tensor, epsilon: float
) -> None:
    """total = x + branch, y = rms_norm(total); rrms (N), wide: `ops.residual_rms_norm_forward`."""
    summed = (wide(x) + wide(branch)).to(total.dtype)
    total.copy_(summed)
    _rms_normalize(y, rrms, summed, weight, epsilon)


@compiled("N D", OF_ROW, STREAM, WEIGHT, "float")
def rms_normalize_rows(y: Tensor, rrms: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """y = rms_norm(x)."""
    _rms_normalize(y, rrms, x, weight, epsilon)


def _rms_normalize(y: Tensor, rrms: Tensor, x: Tensor, weight: Tensor, epsilon: float) -> None:
    """y = x rrms weight."""
    scale = torch.rsqrt(wide(x).square().mean(dim=1, keepdim=True) + epsilon)
    rrms.copy_(scale[:, 0])
    y.copy_(wide(x) * scale * wide(weight))


@compiled("N D", STREAM, OF_ROW, WEIGHT)
def rms_normalize(y: Tensor, total: Tensor, rrms: Tensor, weight: Tensor) -> None:
    """Recomputes y = rms_norm(total)."""
    y.copy_(wide(total) * rrms[:, None] * wide(weight))


@compiled(STREAM, WEIGHT, "N D", STREAM, OF_ROW, WEIGHT, "float")
def add_rms_normalization_gradient(
    dtotal: Tensor, dweight: Tensor, dy: Tensor, total: Tensor, rrms: Tensor, weight: Tensor, adds: float
) -> None:
    """`add_normalization_gradient` for an RMS norm: `ops.residual_rms_norm_backward`."""
    scale = rrms[:, None]
    normalized = wide(total) * scale
    dnormalized = wide(dy) * wide(weight)
    along_normalized = (dnormalized * normalized).mean(dim=1, keepdim=True)
    through = (dnormalized - normalized * along_normalized) * scale
    dweight += (wide(dy) * normalized).sum(dim=0).to(dweight.dtype)
    _add_or_write(dtotal, through, adds)
