"""Layer norm in one pass over its rows, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.normalization import EPSILON

LayerNormCache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

aten = torch.ops.aten


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[Tensor, LayerNormCache]:
    """`ops.layer_norm_forward` by PyTorch's own kernel: statistics and output of a row while it is in the cache."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    y, mean, rstd = aten.native_layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    return y, (x, mean, rstd, weight, bias)


def layer_norm_backward(dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D) and dbias (D): `ops.layer_norm_backward`."""
    x, mean, rstd, weight, bias = cache
    dx, dgain, dshift = aten.native_layer_norm_backward(
        dy, x, x.shape[-1:], mean, rstd, weight, bias, [True, True, True]
    )
    dweight += dgain
    dbias += dshift
    return dx


def residual_layer_norm_forward(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[tuple[Tensor, Tensor], LayerNormCache]:
    """total = x + branch, y = layer_norm(total): `ops.residual_layer_norm_forward`."""
    total = x if branch is None else x + branch
    y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y), cache


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> the gradient of x and of branch alike: `ops.residual_layer_norm_backward`."""
    dsum = layer_norm_backward(dy.to(cache[0].dtype), cache, dweight, dbias)
    return dsum if dtotal is None else dsum.add_(dtotal)
