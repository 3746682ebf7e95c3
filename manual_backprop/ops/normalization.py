"""Layer normalization, alone and after a residual sum (Ba et al. 2016, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import rows, wide

EPSILON = 1e-5  # GPT-2's

LayerNormCache = tuple[Tensor, Tensor, Tensor, Tensor]


def layer_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, epsilon: float = EPSILON
) -> tuple[Tensor, LayerNormCache]:
    """y = normalized * weight + bias, with normalized = (x - mean) * rstd over the last dimension.

    x (..., D), weight (D), bias (D) -> y (..., D). mean = sum(x) / D,
    rstd = 1 / sqrt(sum((x - mean)^2) / D + epsilon): epsilon keeps a row of equal numbers from a division by zero.
    The cache keeps x and two numbers a row; backward recomputes `normalized`.

    Write n for a row of `normalized` and dn = dy * weight. Then dweight = sum over rows of dy * n, dbias = sum of dy.
    For dx, n depends on x directly, through the mean and through rstd:
        d(n_i)/dx_j = rstd (delta_ij - 1/D - n_i n_j / D)
    since d(mean)/dx_j = 1/D and d(rstd)/dx_j = -rstd^3 (x_j - mean) / D = -rstd^2 n_j / D. Summed against dn:
        dx = rstd (dn - mean(dn) - n mean(dn * n))
    that is, dn minus its components along the all-ones vector and along n, the two that normalization removes.

    >>> y, cache = layer_norm_forward(torch.tensor([[1.0, 3.0]]), torch.ones(2), torch.zeros(2), epsilon=0.0)
    >>> dweight, dbias = torch.zeros(2), torch.zeros(2)
    >>> dx = layer_norm_backward(torch.ones(1, 2), cache, dweight, dbias)
    >>> y, dx, dweight, dbias
    (tensor([[-1.,  1.]]), tensor([[0., 0.]]), tensor([-1.,  1.]), tensor([1., 1.]))
    """
    x_wide = wide(x)
    mean = x_wide.mean(-1, keepdim=True)  # (..., 1)
    centered = x_wide - mean
    rstd = torch.rsqrt(centered.square().mean(-1, keepdim=True) + epsilon)  # (..., 1)
    normalized = centered * rstd
    y = torch.addcmul(wide(bias), normalized, wide(weight))  # normalized * weight + bias in one pass
    return y.to(x.dtype), (x, mean, rstd, weight)


def layer_norm_backward(dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D) and dbias (D)."""
    x, mean, rstd, weight = cache
    dy_wide = wide(dy)
    normalized = (wide(x) - mean).mul_(rstd)
    # y = normalized * weight + bias
    dbias += rows(dy_wide).sum(0)
    dweight += rows(dy_wide * normalized).sum(0)
    dnormalized = dy_wide * wide(weight)
    # normalized = (x - mean) * rstd
    along_ones = dnormalized.mean(-1, keepdim=True)
    along_normalized = (dnormalized * normalized).mean(-1, keepdim=True)
    dx = (dnormalized - along_ones - normalized * along_normalized) * rstd
    return dx.to(x.dtype)


def residual_layer_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    epsilon: float = EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], LayerNormCache]:
    """total = x + branch, y = layer_norm(total): the end of one sublayer and the start of the next.

    x, branch (..., D), weight (D), bias (D) -> (total, y), both (..., D). Pre-norm networks use both outputs,
    post-norm ones only y. The first norm of a pre-norm network has no branch yet: it is None, and total is x.

    `dtype` is that of y, where the products that read y are narrower than the residual stream (bf16_mixed).

    total reaches the loss directly and through y, so dtotal is the sum of both gradients. A sum passes its gradient to
    each of its terms: dx = dbranch = dtotal.

    >>> x, branch, weight, bias = torch.ones(1, 2), torch.tensor([[0.0, 2.0]]), torch.ones(2), torch.zeros(2)
    >>> (total, y), cache = residual_layer_norm_forward(x, branch, weight, bias, epsilon=0.0)
    >>> dtotal, dy, dweight, dbias = torch.full((1, 2), 5.0), torch.ones(1, 2), torch.zeros(2), torch.zeros(2)
    >>> total, y, residual_layer_norm_backward(dtotal, dy, cache, dweight, dbias)
    (tensor([[1., 3.]]), tensor([[-1.,  1.]]), tensor([[5., 5.]]))
    """
    total = x if branch is None else x + branch
    y, cache = layer_norm_forward(total, weight, bias, epsilon)
    return (total, y if dtype is None else y.to(dtype)), cache


def residual_layer_norm_backward(
    dtotal: Tensor | None, dy: Tensor, cache: LayerNormCache, dweight: Tensor, dbias: Tensor
) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D); adds to dweight (D) and dbias (D).

    `dtotal` is the gradient that reaches the sum without passing the norm; None if the forward's total was not used.
    """
    # y = layer_norm(total)
    dsum = layer_norm_backward(dy, cache, dweight, dbias)
    # total = x + branch
    return dsum if dtotal is None else dsum + dtotal
