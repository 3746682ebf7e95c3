"""`linear` whose product adds directly into dweight, and whose dx overwrites x.

An output that is wider than the input (query, key and value) is recomputed in backward: the input is kept anyway, one
more product costs a twelfth of a block's products, and it saves a third of the memory that a block would keep. An
output that is small compared with its weight is kept.
"""

from collections.abc import Callable

from torch import Tensor

from ...ops.numerics import rows
from ..arena import Recomputable, in_place_of, is_small, kept, ping_pong, recomputable, recomputed, saved
from .products import add_product, add_sum_of_rows, for_products, product

LinearCache = tuple[Recomputable, Tensor]


def linear_forward(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, LinearCache]:
    """y = x W^T + b: `ops.linear_forward`. The cache keeps the weight that the product read."""
    weight = for_products(weight, x.dtype)
    saved_x = saved(x)
    outputs, inputs = weight.shape
    if outputs <= inputs or is_small(x.numel() // inputs * outputs, x, weight.numel()):
        return _product(x, weight, bias, kept), (saved_x, weight)
    y = _product(x, weight, bias, ping_pong)
    return recomputable(y, lambda: _product(recomputed(saved_x), weight, bias, ping_pong)), (saved_x, weight)


def linear_backward(
    dy: Tensor,
    cache: LinearCache,
    dweight: Tensor,
    dbias: Tensor | None = None,
    feedback: Tensor | None = None,
    dx: Tensor | None = None,
) -> Tensor:
    """dy (..., O) -> dx (..., I); adds to dweight (O, I) and dbias (O): `ops.linear_backward`.

    The product adds into dweight itself, which saves a tensor of the weight's size and two passes over it. dx
    overwrites x, which saves a tensor of the input's size; not if it is added to a given `dx`, since other products
    read x too.
    """
    x, back = recomputed(cache[0]), cache[1] if feedback is None else for_products(feedback, dy.dtype)
    dy_rows = rows(dy)
    # y = x W^T + b
    if dbias is not None:
        add_sum_of_rows(dbias, dy_rows)
    add_product(dweight, dy_rows.T, rows(x))
    if dx is not None:
        add_product(rows(dx), dy_rows, back)
        return dx
    dx = in_place_of(x)
    product(rows(dx), dy_rows, back)
    return dx


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, memory: Callable[..., Tensor]) -> Tensor:
    """y = x W^T + b."""
    x_rows = rows(x)
    y = memory((x_rows.shape[0], weight.shape[0]), x)
    product(y, x_rows, weight.T, bias)
    return y.view(*x.shape[:-1], weight.shape[0])
