"""`linear` with the gradient's product added where it belongs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ops.numerics import rows
from .products import add_product

LinearCache = tuple[Tensor, Tensor]


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LinearCache]:
    """y = x W^T + b: `ops.linear_forward`. The cache keeps the weight as the product read it, rounded once a step."""
    weight = weight.to(x.dtype)
    y = torch.nn.functional.linear(rows(x), weight, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0]), (x, weight)


def linear_backward(dy: Tensor, cache: LinearCache, dweight: Tensor, dbias: Tensor | None = None) -> Tensor:
    """dy (..., O) -> dx (..., I); adds to dweight (O, I) and dbias (O): `ops.linear_backward`.

    Saves a tensor of the weight's size and two passes over it: the product adds into the buffer itself.
    """
    x, weight = cache
    dy_rows = rows(dy)
    # y = x W^T + b
    if dbias is not None:
        dbias += dy_rows.sum(0, dtype=dbias.dtype)
    add_product(dweight, dy_rows.T, rows(x))
    dx = dy_rows @ weight
    return dx.view(x.shape)
