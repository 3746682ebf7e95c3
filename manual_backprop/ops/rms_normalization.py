"""RMS normalization, alone and after a residual sum (Zhang and Sennrich 2019): layer norm without mean and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import rows, wide

RMS_EPSILON = 1e-6  # as in the first Llama and in transformers; Llama 2 and later have 1e-5

RmsNormCache = tuple[Tensor, Tensor, Tensor]


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float = RMS_EPSILON) -> tuple[Tensor, RmsNormCache]:
    """y = normalized * weight, with normalized = x * rrms over the last dimension.

    x (..., D), weight (D) -> y (..., D). rrms = 1 / sqrt(sum(x^2) / D + epsilon), one over the root of the mean
    square. The cache keeps x and one number a row; backward recomputes `normalized`.

    Write n for a row of `normalized` and dn = dy * weight. Then dweight = sum over rows of dy * n.
    For dx, n depends on x directly and through rrms:
        d(n_i)/dx_j = rrms (delta_ij - n_i n_j / D)
    since d(rrms)/dx_j = -rrms^3 x_j / D = -rrms^2 n_j / D. Summed against dn:
        dx = rrms (dn - n mean(dn * n))
    that is, dn minus its component along n, the direction that normalization removes; layer norm removes one more,
    the mean.

    >>> y, cache = rms_norm_forward(torch.tensor([[2.0, -2.0]]), torch.ones(2), epsilon=0.0)
    >>> dweight = torch.zeros(2)
    >>> dx = rms_norm_backward(torch.ones(1, 2), cache, dweight)
    >>> y, dx, dweight
    (tensor([[ 1., -1.]]), tensor([[0.5000, 0.5000]]), tensor([ 1., -1.]))
    """
    x_wide = wide(x)
    rrms = torch.rsqrt(x_wide.square().mean(-1, keepdim=True) + epsilon)  # (..., 1)
    normalized = x_wide * rrms
    y = normalized * wide(weight)
    return y.to(x.dtype), (x, rrms, weight)


def rms_norm_backward(dy: Tensor, cache: RmsNormCache, dweight: Tensor) -> Tensor:
    """dy (..., D) -> dx (..., D); adds to dweight (D)."""
    x, rrms, weight = cache
    dy_wide = wide(dy)
    normalized = wide(x) * rrms
    # y = normalized * weight
    dweight += rows(dy_wide * normalized).sum(0)
    dnormalized = dy_wide * wide(weight)
    # normalized = x * rrms
    along_normalized = (dnormalized * normalized).mean(-1, keepdim=True)
    dx = (dnormalized - normalized * along_normalized) * rrms
    return dx.to(x.dtype)


def residual_rms_norm_forward(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    epsilon: float = RMS_EPSILON,
    dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], RmsNormCache]:
    """total = x + branch, y = rms_norm(total): the end of one sublayer and the start of the next.

    x, branch (..., D), weight (D) -> (total, y), both (..., D). The first norm of a network has no branch yet: None,
    and total is x. `dtype` is that of y, where the products that read y are narrower than the residual stream
    (bf16_mixed). total reaches the loss directly and through y, so dtotal is the sum of both gradients, and
    dx = dbranch = dtotal.

    >>> x, branch = torch.ones(1, 2), torch.tensor([[1.0, -3.0]])
    >>> (total, y), cache = residual_rms_norm_forward(x, branch, torch.ones(2), epsilon=0.0)
    >>> total, y, residual_rms_norm_backward(torch.ones(1, 2), torch.ones(1, 2), cache, torch.zeros(2))
    (tensor([[ 2., -2.]]), tensor([[ 1., -1.]]), tensor([[1.5000, 1.5000]]))
    """
    total = x if branch is None else x + branch
    y, cache = rms_norm_forward(total, weight, epsilon)
    return (total, y if dtype is None else y.to(dtype)), cache


def residual_rms_norm_backward(dtotal: Tensor | None, dy: Tensor, cache: RmsNormCache, dweight: Tensor) -> Tensor:
    """dtotal, dy (..., D) -> dx = dbranch (..., D); adds to dweight (D).

    `dtotal` is the gradient that reaches the sum without passing the norm; None if the forward's total was not used.
    """
    # y = rms_norm(total)
    dsum = rms_norm_backward(dy, cache, dweight)
    # total = x + branch
    return dsum if dtotal is None else dsum + dtotal
