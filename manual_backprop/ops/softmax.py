"""Softmax over the last dimension."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import wide

SoftmaxCache = tuple[Tensor]


def softmax_forward(x: Tensor) -> tuple[Tensor, SoftmaxCache]:
    """y_i = exp(x_i) / sum_j exp(x_j).

    x (..., S) -> y (..., S), rows that sum to 1. Entries of -inf get exactly 0; a row of nothing but -inf is all 0.
    The largest entry is subtracted first: it cancels in the quotient, and no exponential overflows. The sum is then at
    least exp(0) = 1, except in a row of nothing but -inf.

    d(y_i)/dx_j = y_i (delta_ij - y_j), so dx_j = y_j (dy_j - sum_i dy_i y_i): the cache needs the output alone.

    >>> y, cache = softmax_forward(torch.tensor([0.0, 0.0, -torch.inf]))
    >>> y, softmax_backward(torch.tensor([1.0, 0.0, 1.0]), cache)
    (tensor([0.5000, 0.5000, 0.0000]), tensor([ 0.2500, -0.2500,  0.0000]))
    """
    x_wide = wide(x)
    largest = x_wide.amax(-1, keepdim=True).clamp(min=torch.finfo(x_wide.dtype).min)  # -inf - -inf would be NaN
    exponential = (x_wide - largest).exp_()
    y = (exponential / exponential.sum(-1, keepdim=True).clamp(min=1)).to(x.dtype)
    return y, (y,)


def softmax_backward(dy: Tensor, cache: SoftmaxCache) -> Tensor:
    """dy (..., S) -> dx (..., S)."""
    (y,) = cache
    y_wide, dy_wide = wide(y), wide(dy)
    weighted_mean = (dy_wide * y_wide).sum(-1, keepdim=True)
    dx = y_wide * (dy_wide - weighted_mean)
    return dx.to(dy.dtype)
