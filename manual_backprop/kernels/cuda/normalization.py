"""Norms whose cache is their statistics. A residual sum and its norm are one launch with Triton, or two with PyTorch's
`native_layer_norm` and `_fused_rms_norm`.

A norm without bias is an RMS norm: the same functions serve both.
"""

import torch
from torch import Tensor

from ...ops.normalization import EPSILON
from ...ops.numerics import rows
from ...ops.rms_normalization import RMS_EPSILON
from .chosen import triton_for

# x, mean, 1 / standard deviation, weight, bias, and the dtype of y
NormCache = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, torch.dtype]

aten = torch.ops.aten


def layer_norm_forward(x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON) -> tuple[Tensor, NormCache]:
    """`ops.layer_norm_forward` in one call."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return y, (x, mean, rstd, weight, bias, x.dtype)


def layer_norm_backward(dy: Tensor, cache: NormCache, dweight: Tensor, dbias: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D) and dbias (D): `ops.layer_norm_backward`."""
    x, mean, rstd, weight, bias, _ = cache
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
    return y, (x, None, rrms, weight, None, x.dtype)


def rms_norm_backward(dy: Tensor, cache: NormCache, dweight: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D): `ops.rms_norm_backward`."""
    x, _, rrms, weight, *_ = cache
    dx, dgain = aten._fused_rms_norm_backward(dy.to(x.dtype), x, x.shape[-1:], rrms, weight, [True, True])
    dweight += dgain
    return dx


def residual_layer_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    """`ops.residual_layer_norm_forward`."""
    return _forward(x, branch, weight, bias, epsilon, dtype or x.dtype)


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: NormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D): `ops.residual_layer_norm_backward`."""
    return _backward(dtotal, dy, cache, dweight, dbias)


def residual_rms_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float = RMS_EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    """`ops.residual_rms_norm_forward`."""
    return _forward(x, branch, weight, None, epsilon, dtype or x.dtype)


def residual_rms_norm_backward(dtotal: Tensor | None, dy: Tensor, cache: NormCache, dweight: Tensor) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D): `ops.residual_rms_norm_backward`."""
    return _backward(dtotal, dy, cache, dweight, None)


def _forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
) -> tuple[tuple[Tensor, Tensor], NormCache]:
    if (triton := triton_for(x)) is not None:
        added = None if branch is None else rows(branch).contiguous()
        made, y, mean, rstd = triton.residual_norm(rows(x).contiguous(), added, weight, bias, epsilon, dtype)
        total = x if branch is None else made.view(x.shape)
        return (total, y.view(x.shape)), (total, mean, rstd, weight, bias, dtype)
    total = x if branch is None else torch.add(x, branch)
    if bias is None:
        y, cache = rms_norm_forward(total, weight, epsilon)
    else:
        y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y.to(dtype)), cache


def _backward(dtotal: Tensor | None, dy: Tensor, cache: NormCache, dweight: Tensor, dbias: Tensor | None) -> Tensor:
    total, mean, rstd, weight, _, dtype = cache
    if rstd.dim() == 1 and (triton := triton_for(total)) is not None:  # the statistics of Triton's forward
        past = None if dtotal is None else rows(dtotal).contiguous()
        given = rows(dy).contiguous(), rows(total).contiguous(), weight, mean, rstd
        dsum, rounded = triton.residual_norm_backward(past, *given, dweight, dbias, dtype)
        dsum = dsum.view(total.shape)
        if dtype != total.dtype:  # the products of the branch read this dtype
            dsum.rounded = rounded.view(total.shape)
        return dsum
    of_norm = dy, cache, dweight
    dsum = rms_norm_backward(*of_norm) if dbias is None else layer_norm_backward(*of_norm, dbias)
    return dsum if dtotal is None else dsum.add_(dtotal)
