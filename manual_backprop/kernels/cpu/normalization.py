"""Layer norm and RMS norm over rows, one call forward and one backward. They keep only the input and its statistics."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...ops.normalization import EPSILON
from ...ops.numerics import rows, wide
from ...ops.rms_normalization import RMS_EPSILON
from ..arena import give_back, in_place_of, is_small, kept, ping_pong, recomputable
from . import rowwise
from .compiled import CompiledFunction

LayerNormCache = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
RmsNormCache = tuple[Tensor, Tensor, Tensor]

aten = torch.ops.aten


class _Norm(NamedTuple):
    """The kernels of a norm. A layer norm has two statistics and two weights, an RMS norm one of each."""

    statistics: int
    of_sum: CompiledFunction
    of_rows: CompiledFunction
    once_more: CompiledFunction
    gradient: CompiledFunction


LAYER = _Norm(
    2, rowwise.add_and_normalize, rowwise.normalize_rows, rowwise.normalize, rowwise.add_normalization_gradient
)
RMS = _Norm(
    1,
    rowwise.add_and_rms_normalize,
    rowwise.rms_normalize_rows,
    rowwise.rms_normalize,
    rowwise.add_rms_normalization_gradient,
)


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[Tensor, LayerNormCache]:
    """`ops.layer_norm_forward` by PyTorch's kernel: it computes a row's statistics and output while it is in the
    cache."""
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

    Nothing reads the branch again, so inside a step the total overwrites it. If the branch is in a narrower dtype, its
    memory is given back.
    """
    found = _forward(LAYER, x, branch, (weight, bias), epsilon, dtype)
    if found is not None:
        outputs, (mean, rstd) = found
        return outputs, (outputs[0], mean, rstd, weight, bias)
    total = x if branch is None else _sum(x, branch)
    y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y if dtype is None else y.to(dtype)), cache


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D): `ops.residual_layer_norm_backward`."""
    total, mean, rstd, weight, _ = cache
    if mean.dim() > 1:  # PyTorch's
        dsum = layer_norm_backward(dy.to(total.dtype), cache, dweight, dbias)
        return dsum if dtotal is None else dsum.add_(dtotal)
    return _backward(LAYER, dtotal, dy, total, (mean, rstd), weight, (dweight, dbias))


def residual_rms_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float = RMS_EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], RmsNormCache]:
    """total = x + branch, y = rms_norm(total): `ops.residual_rms_norm_forward`, in the memory of the branch."""
    found = _forward(RMS, x, branch, (weight,), epsilon, dtype)
    if found is None:
        total = x if branch is None else _sum(x, branch)
        return ops.residual_rms_norm_forward(total, None, weight, epsilon, dtype)
    outputs, (rrms,) = found
    return outputs, (outputs[0], rrms, weight)


def residual_rms_norm_backward(dtotal: Tensor | None, dy: Tensor, cache: RmsNormCache, dweight: Tensor) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D): `ops.residual_rms_norm_backward`."""
    total, rrms, weight = cache
    if rrms.dim() > 1:
        return ops.residual_rms_norm_backward(dtotal, dy, cache, dweight)
    return _backward(RMS, dtotal, dy, total, (rrms,), weight, (dweight,))


def _forward(
    norm: _Norm, x: Tensor, branch: Tensor | None, weights: Sequence[Tensor], epsilon: float, dtype: torch.dtype | None
) -> tuple[tuple[Tensor, Tensor], Sequence[Tensor]] | None:
    """(total, y), and the statistics; None if the library does not support these arguments."""
    dtype = dtype or x.dtype
    if x.dtype == dtype:
        like = x
    else:
        like = branch if branch is not None and branch.dtype == dtype else x.new_empty(x.shape, dtype=dtype)
    statistics = torch.empty(
        norm.statistics, x.numel() // x.shape[-1], dtype=wide(x[:0]).dtype, device=x.device
    ).unbind()
    if not norm.of_rows.compiles(rows(like), *statistics, rows(x), *weights, epsilon):  # `like` stands for y
        return None
    if branch is not None and branch.dtype != dtype:
        x, branch = _sum(x, branch), None
    shape = tuple(x.shape)
    y = (kept if is_small(x.numel(), x) else ping_pong)(shape, like)
    total = x
    if branch is None:
        norm.of_rows(rows(y), *statistics, rows(x), *weights, epsilon)
    else:
        total = in_place_of(branch) if branch.dtype == x.dtype else kept(shape, x)
        norm.of_sum(rows(y), rows(total), *statistics, rows(x), rows(branch), *weights, epsilon)
        if total.dtype != branch.dtype:
            give_back(branch)

    def recompute() -> Tensor:
        norm.once_more(rows(again := ping_pong(shape, like)), rows(total), *statistics, *weights)
        return again

    return (total, y if is_small(x.numel(), x) else recomputable(y, recompute)), statistics


def _sum(x: Tensor, branch: Tensor) -> Tensor:
    """x + branch in the memory of the branch, or if that is narrower, in new memory: then it is given back."""
    if x.dtype == branch.dtype:
        return torch.add(x, branch, out=in_place_of(branch))
    total = x + branch
    give_back(branch)
    return total


def _backward(
    norm: _Norm,
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    statistics: Sequence[Tensor],
    weight: Tensor,
    dweights: Sequence[Tensor],
) -> Tensor:
    """The gradient of the sum. It overwrites dtotal, or if that is None, total."""
    if dtotal is None:
        dsum = in_place_of(total)
    else:
        dsum = in_place_of(dtotal)
        if dsum is not dtotal:
            dsum.copy_(dtotal)
    adds = float(dtotal is not None)
    norm.gradient(rows(dsum), *dweights, rows(dy), rows(total), *statistics, weight, adds)
    return dsum
