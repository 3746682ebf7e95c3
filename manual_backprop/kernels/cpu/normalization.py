"""Layer norm over rows, one call forward and two backward, of which only the input and its statistics are kept."""

from functools import partial

import torch
from torch import Tensor

from ...ops.normalization import EPSILON
from ...ops.numerics import rows, wide
from ..arena import in_place_of, is_small, kept, ping_pong, recomputable
from ..pieces import pieces
from ..sizes import sizes_of
from .rowwise import (
    add_and_normalize,
    add_normalization_gradient,
    add_normalization_weights_gradient,
    normalize,
    normalize_rows,
)

LayerNormCache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

aten = torch.ops.aten


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[Tensor, LayerNormCache]:
    """`ops.layer_norm_forward` by PyTorch's own kernel: statistics and output of a row while it is in the cache."""
    weight, bias = weight.to(x.dtype), bias.to(x.dtype)
    normalize = partial(aten.native_layer_norm, x, x.shape[-1:], weight, bias, epsilon)
    y, mean, rstd = normalize()
    return recomputable(y, lambda: normalize()[0]), (x, mean, rstd, weight, bias)


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
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], LayerNormCache]:
    """total = x + branch, y = layer_norm(total): `ops.residual_layer_norm_forward`.

    Nothing reads the branch again, so inside a step the total takes its place.
    """
    if branch is not None and x.dtype != branch.dtype:
        x, branch = x + branch, None  # as wide as x
    total = x
    mean, rstd = torch.empty(2, x.numel() // x.shape[-1], dtype=wide(x[:0]).dtype, device=x.device)
    of_rows = mean, rstd, rows(x), weight, bias, epsilon
    if normalize_rows.compiles(rows(x), *of_rows):  # y is as x; where this is compiled, so are the others
        y = (kept if is_small(x.numel(), x) else ping_pong)(tuple(x.shape), x)
        if branch is None:
            normalize_rows(rows(y), *of_rows)
        else:
            total = _copy_in_place_of(branch)
            add_and_normalize(rows(y), rows(total), *of_rows)

        def recompute() -> Tensor:
            normalize(rows(y := ping_pong(tuple(total.shape), total)), rows(total), mean, rstd, weight, bias)
            return y

        return (total, y if is_small(x.numel(), x) else recomputable(y, recompute)), (total, mean, rstd, weight, bias)
    if branch is not None:
        total = torch.add(x, branch, out=in_place_of(branch))
    y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y if dtype is None else y.to(dtype)), cache


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> the gradient of x and of branch alike: `ops.residual_layer_norm_backward`."""
    total, mean, rstd, weight, _ = cache
    dy = dy.to(total.dtype)
    if mean.dim() > 1:  # PyTorch's
        dsum = layer_norm_backward(dy, cache, dweight, dbias)
        return dsum if dtotal is None else dsum.add_(dtotal)
    dsum = torch.zeros_like(total) if dtotal is None else _copy_in_place_of(dtotal)
    dy_rows, total_rows, dsum_rows = rows(dy), rows(total), rows(dsum)
    # some rows at a time: their sums lose fewer digits, and the second call finds them in the cache
    dgain, dshift = mean.new_zeros(2, weight.shape[0])
    sizes = sizes_of(total)
    for part in pieces(len(mean), max(1, min(sizes.norm_rows, sizes.norm_piece // weight.shape[0])), total):
        of_rows = dy_rows[part], total_rows[part], mean[part], rstd[part]
        add_normalization_weights_gradient(dgain, dshift, *of_rows)
        add_normalization_gradient(dsum_rows[part], *of_rows, weight)
    dweight += dgain
    dbias += dshift
    return dsum


def _copy_in_place_of(x: Tensor) -> Tensor:
    copy = in_place_of(x)
    return copy if copy is x else copy.copy_(x)
