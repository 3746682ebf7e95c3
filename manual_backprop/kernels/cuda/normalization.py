"""Norms by PyTorch's own kernels, with the statistics as cache: `native_layer_norm` and `_fused_rms_norm`.

A norm without bias is one without mean: the same functions serve both.
"""

import torch
from torch import Tensor

from ...ops.normalization import EPSILON
from ...ops.rms_normalization import RMS_EPSILON

NormCache = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None]  # x, mean, 1 / standard deviation, parameters

aten = torch.ops.aten


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, NormCache]:
    """`ops.layer_norm_forward` in one call."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return y, (x, mean, rstd, weight, bias)


def layer_norm_backward(dy: Tensor, cache: NormCache, dweight: Tensor, dbias: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D) and dbias (D): `ops.layer_norm_backward`."""
    x, mean, rstd, weight, bias = cache
    dx, dgain, dshift = aten.native_layer_norm_backward(
        dy.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    dweight += dgain
    dbias += dshift
    return dx


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float = RMS_EPSILON) -> tuple[Tensor, NormCache]:
    """`ops.rms_norm_forward` in one call."""
    weight = weight.to(x.dtype)
    y, rrms = aten._fused_rms_norm(x, x.shape[-1:], weight, epsilon)
    return y, (x, None, rrms, weight, None)


def rms_norm_backward(dy: Tensor, cache: NormCache, dweight: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D): `ops.rms_norm_backward`."""
    x, _, rrms, weight, _ = cache
    dx, dgain = aten._fused_rms_norm_backward(dy.to(x.dtype), x, x.shape[-1:], rrms, weight, [True, True])
    dweight += dgain
    return dx


def residual_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor | None = None,
    epsilon: float = EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    """total = x + branch, in the format of x, and y = norm(total), in `dtype` or as x: what reads y need not round it.

    x, branch (..., D) -> total, y (..., D). Backward is that of the norm's own pair.
    """
    total = x if branch is None else torch.add(x, branch)
    if bias is None:
        y, cache = rms_norm_forward(total, weight, epsilon)
    else:
        y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y.to(dtype or x.dtype)), cache


def residual_layer_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    """`ops.residual_layer_norm_forward`."""
    return residual_norm_forward(x, branch, weight, bias, epsilon)


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: NormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> the gradient of x and of branch alike: `ops.residual_layer_norm_backward`."""
    dsum = layer_norm_backward(dy, cache, dweight, dbias)
    return dsum if dtotal is None else dsum.add_(dtotal)


def residual_rms_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, epsilon: float = RMS_EPSILON
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    """`ops.residual_rms_norm_forward`."""
    return residual_norm_forward(x, branch, weight, None, epsilon)


def residual_rms_norm_backward(dtotal: Tensor | None, dy: Tensor, cache: NormCache, dweight: Tensor) -> Tensor:
    """dtotal, dy (..., D) -> the gradient of x and of branch alike: `ops.residual_rms_norm_backward`."""
    dsum = rms_norm_backward(dy, cache, dweight)
    return dsum if dtotal is None else dsum.add_(dtotal)
