"""`linear` whose product adds directly into dweight: one launch, with sums in the dtype of dweight."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ...ops.linear import LinearCache
from ...ops.linear import linear_forward as textbook_forward
from ...ops.numerics import rows

aten = torch.ops.aten


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LinearCache]:
    """y = x W^T + b: `ops.linear_forward`. The cache keeps the weight that the product read, rounded once per step."""
    return textbook_forward(x, weight.to(x.dtype), bias)


def linear_backward(
    dy: Tensor,
    cache: LinearCache,
    dweight: Tensor,
    dbias: Tensor | None = None,
    feedback: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """dy (..., O) -> dx (..., I); adds to dweight (O, I) and dbias (O): `ops.linear_backward`."""
    x, weight = cache
    back = weight if feedback is None else feedback.to(dy.dtype)
    dy_rows = rows(dy)
    # y = x W^T + b
    if dbias is not None:
        dbias += dy_rows.sum(0, dtype=dbias.dtype)
    add_product(dweight, dy_rows.T, rows(x))
    if dx is not None:
        add_product(rows(dx), dy_rows, back)
        return dx
    return (dy_rows @ back).view(x.shape)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left right. left (O, N), right (N, I) -> total (O, I), which may have a wider dtype: a product of 16-bit
    numbers is summed in float32, and added to a float32 total without rounding."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    elif isinstance(total, FakeTensor):
        add_wide_product(total, left, right)
    else:
        aten.addmm.dtype_out(total, left, right, total.dtype, out=total)


@torch.library.custom_op("manual_backprop::add_wide_product", mutates_args=("total",))
def add_wide_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """In place of `addmm.dtype_out` where a step is only traced: PyTorch 2.11 cannot trace that."""
    raise NotImplementedError("this stands for a product of tensors that have no numbers")


@add_wide_product.register_fake
def _(total: Tensor, left: Tensor, right: Tensor) -> None:
    assert total.shape == (left.shape[0], right.shape[1])
    assert left.shape[1] == right.shape[0]
    assert left.dtype == right.dtype
