"""Functions that read a row for its sums, and again for what these make of it, compiled to two or three passes.

Only for where they are compiled: as they are written they take more passes than PyTorch's own. Sums in the wide format.
Layer norm's backward gains in bfloat16; in float32 it takes as long as PyTorch's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.loss import IGNORED
from ..ops.numerics import wide
from .compiled import compiled


@compiled("R V", "R: float32", "R: int64", "float")
def cross_entropy_of_rows(logits: Tensor, loss: Tensor, target: Tensor, label_smoothing: float) -> None:
    """logits (R, V) become their gradient softmax - q, and loss (R) that of each row; 0 where target (R) is IGNORED.

    `ops.cross_entropy_forward` and `_backward` but for the denominator. loss = logsumexp(z) - sum(q z), with q =
    (1 - label_smoothing) at the target + label_smoothing / V everywhere; a common summand of z changes nothing.
    """
    vocab_size = logits.shape[1]
    smoothed = torch.as_tensor(label_smoothing, device=logits.device)
    z = wide(logits)
    shifted = z - z.amax(dim=1, keepdim=True)
    counts = (target != IGNORED)[:, None]
    on_target = torch.arange(vocab_size, dtype=torch.int32, device=z.device) == target.int()[:, None]
    at_target = torch.where(on_target, shifted, 0).sum(dim=1, keepdim=True)
    logsumexp = torch.exp(shifted).sum(dim=1, keepdim=True).log()
    average = shifted.sum(dim=1, keepdim=True) / vocab_size  # -inf where a logit is, and 0 times that is NaN
    expected = (1 - label_smoothing) * at_target + torch.where(smoothed > 0, label_smoothing * average, 0)
    loss.copy_(torch.where(counts, logsumexp - expected, 0)[:, 0])
    dlogits = torch.exp(shifted - logsumexp) - label_smoothing / vocab_size
    dlogits = torch.where(on_target, dlogits - (1 - label_smoothing), dlogits)
    logits.copy_(torch.where(counts, dlogits, 0))  # not a product: a row that does not count may hold anything, NaN too


@compiled("N D", "N D", "N: float32", "N: float32", "N D", "D", "D", "float", group="layer_norm")
def add_and_normalize(
    y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float
) -> None:
    """total (N, D), which holds the branch, becomes x + branch, and y = layer_norm(total); mean, rstd (N), wide.

    `ops.residual_layer_norm_forward`.
    """
    summed = (wide(x) + wide(total)).to(total.dtype)  # rounded: what is kept of it is what is normalized
    total.copy_(summed)
    _normalize(y, mean, rstd, summed, weight, bias, epsilon)


@compiled("N D", "N: float32", "N: float32", "N D", "D", "D", "float", group="layer_norm")
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


@compiled("N D", "N D", "N: float32", "N: float32", "D", "D", group="layer_norm")
def normalize(y: Tensor, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor) -> None:
    """y = layer_norm(total) once more, from its statistics."""
    y.copy_((wide(total) - mean[:, None]) * rstd[:, None] * wide(weight) + wide(bias))


@compiled("N D", "N D", "N D", "N: float32", "N: float32", "D", group="layer_norm")
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


@compiled("D: parameter", "D: parameter", "N D", "N D", "N: float32", "N: float32", group="layer_norm")
def add_normalization_weights_gradient(
    dweight: Tensor, dbias: Tensor, dy: Tensor, total: Tensor, mean: Tensor, rstd: Tensor
) -> None:
    """dweight, dbias (D) += their gradients from dy (N, D), where y = layer_norm(total)."""
    normalized = (wide(total) - mean[:, None]) * rstd[:, None]
    dweight.copy_(wide(dweight) + (wide(dy) * normalized).sum(dim=0))
    dbias.copy_(wide(dbias) + wide(dy).sum(dim=0))
