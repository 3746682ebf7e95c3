"""The matrix product, where nearly all the work of a transformer is."""

from __future__ import annotations

import torch
from torch import Tensor

from .numerics import rows

LinearCache = tuple[Tensor, Tensor]


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LinearCache]:
    """y = x W^T + b, for every row of x.

    x (..., I), weight (O, I), bias (O) -> y (..., O). The product runs in the dtype of x: a weight in a wider dtype
    (bf16_mixed) is rounded first.

    In indices, y_no = sum_i x_ni W_oi + b_o. The gradient of a factor is dy times the other factor, summed over the
    index that they share:
        dx_ni = sum_o dy_no W_oi      dx = dy W
        dW_oi = sum_n dy_no x_ni      dW = dy^T x
        db_o  = sum_n dy_no           db = column sums of dy

    >>> x, weight, bias = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])
    >>> y, cache = linear_forward(x, weight, bias)
    >>> dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    >>> dx = linear_backward(torch.ones_like(y), cache, dweight, dbias)
    >>> y, dx, dweight, dbias
    (tensor([[16.]]), tensor([[3., 4.]]), tensor([[1., 2.]]), tensor([1.]))
    """
    transposed = weight.to(x.dtype).T
    # addmm: product and sum in one pass
    y = rows(x) @ transposed if bias is None else torch.addmm(bias.to(x.dtype), rows(x), transposed)
    return y.view(*x.shape[:-1], weight.shape[0]), (x, weight)


def linear_backward(
    dy: Tensor,
    cache: LinearCache,
    dweight: Tensor,
    dbias: Tensor | None = None,
    feedback: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """dy (..., O) -> dx (..., I); adds to dweight (O, I) and, where the forward had a bias, to dbias (O).

    `feedback` (O, I) is the weight that dx goes through: by default the forward's weight; a learning rule passes
    another one (feedback alignment, Lillicrap et al. 2016: a fixed random matrix). `dx` (..., I) is given where other
    products read x too: it holds the sum of their gradients; this gradient is added to it, and it is returned.
    """
    x, weight = cache
    back = weight if feedback is None else feedback
    dy_rows = rows(dy)
    # y = x W^T + b
    if dbias is not None:
        dbias += dy_rows.sum(0, dtype=dbias.dtype)
    dweight += dy_rows.T @ rows(x)
    part = (dy_rows @ back.to(dy.dtype)).view(x.shape)
    if dx is None:
        return part
    dx += part
    return dx
