"""A bias and an activation, one launch forward and two backward: `bias_gelu`, and the ReLU of a sum.

Backward needs the product before its bias. It also recomputes the activated values, which the gradient of the next
weight reads. So a block keeps only one of the wide tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....ops.activations import GATE_CUBIC, GATE_LINEAR
from .launching import add_partial_sums, launch, operator, wide
from .normalization import statistics_of

ROWS, COLUMNS = 8, 256  # of a tile
GROUPS = 64  # most groups of rows in backward
ACTIVATIONS = ("gelu_tanh", "gelu", "relu")

LINEAR, CUBIC = tl.constexpr(GATE_LINEAR), tl.constexpr(GATE_CUBIC)
ROOT_OF_HALF, DENSITY_AT_0 = tl.constexpr(0.5**0.5), tl.constexpr((2 * torch.pi) ** -0.5)


@operator()
def bias_activation(x: Tensor, bias: Tensor, activation: str) -> Tensor:
    """y = activation(x + bias): x (N, F), bias (F) -> y (N, F)."""
    assert activation in ACTIVATIONS
    assert x.is_contiguous()
    rows, width = x.shape
    y = torch.empty_like(x)
    grid = triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS)
    tile = {"ROWS": ROWS, "COLUMNS": COLUMNS, "num_warps": 4}
    launch(bias_activation_kernel, grid, y, x, bias, rows, width, ACTIVATION=activation, **tile)
    return y


@operator("dbias")
def bias_activation_backward(
    dy: Tensor, x: Tensor, bias: Tensor, activation: str, dbias: Tensor
) -> tuple[Tensor, Tensor]:
    """dy (N, F) -> y, recomputed, and dx (N, F); adds to dbias (F)."""
    assert activation in ACTIVATIONS
    assert x.is_contiguous()
    assert dy.is_contiguous()
    rows, width = x.shape
    y, dx = torch.empty_like(x), torch.empty_like(x)
    groups = min(triton.cdiv(rows, ROWS), GROUPS)
    partial = x.new_empty(1, groups, width, dtype=statistics_of(x))
    launch(
        *(bias_activation_backward_kernel, (groups, triton.cdiv(width, COLUMNS)), y, dx, partial, dy, x, bias),
        *(rows, width),
        ACTIVATION=activation,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=4,
    )
    add_partial_sums(partial, dbias)
    return y, dx


@triton.jit
def bias_activation_kernel(
    y_ptr, x_ptr, bias_ptr, N, F, ACTIVATION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < N)[:, None] & (column < F)[None, :]
    at = row.to(tl.int64)[:, None] * F + column[None, :]
    bias = wide(tl.load(bias_ptr + column, mask=column < F, other=0.0))
    x = wide(tl.load(x_ptr + at, mask=inside, other=0.0)) + bias[None, :]
    tl.store(y_ptr + at, activated(x, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def bias_activation_backward_kernel(
    y_ptr, dx_ptr, partial_ptr, dy_ptr, x_ptr, bias_ptr, N, F, ACTIVATION: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(0), tl.num_programs(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    bias = wide(tl.load(bias_ptr + column, mask=column < F, other=0.0))
    dbias = tl.zeros((ROWS, COLUMNS), bias.dtype)
    start = group * ROWS
    while start < N:
        row = start + tl.arange(0, ROWS)
        inside = (row < N)[:, None] & (column < F)[None, :]
        at = row.to(tl.int64)[:, None] * F + column[None, :]
        x = wide(tl.load(x_ptr + at, mask=inside, other=0.0)) + bias[None, :]
        dy = wide(tl.load(dy_ptr + at, mask=inside, other=0.0))
        # y = activation(x + bias)
        dx = dy * slope(x, ACTIVATION)
        dbias += dx
        tl.store(y_ptr + at, activated(x, ACTIVATION).to(y_ptr.dtype.element_ty), mask=inside)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)
        start += groups * ROWS
    tl.store(partial_ptr + group * F + column, tl.sum(dbias, 0), mask=column < F)


@triton.jit
def activated(x, ACTIVATION: tl.constexpr):
    """`gelu_tanh_forward`, `gelu_forward`, `relu_forward`."""
    if ACTIVATION == "gelu_tanh":
        # gate = (1 + tanh u) / 2 = sigmoid(2u), 2u = x (linear + cubic x^2)
        y = x * tl.sigmoid(x * (LINEAR + CUBIC * x * x))
    elif ACTIVATION == "gelu":
        # cumulative = (1 + erf(x / sqrt(2))) / 2
        y = x * (0.5 + 0.5 * tl.erf(x * ROOT_OF_HALF))
    else:
        y = tl.where(x < 0, 0.0, x)  # not a maximum, which would lose a NaN
    return y


@triton.jit
def slope(x, ACTIVATION: tl.constexpr):
    """dy/dx."""
    if ACTIVATION == "gelu_tanh":
        # y = x gate; 1 - gate = sigmoid(-2u), without cancellation; d(2u)/dx = linear + 3 cubic x^2
        twice_u = x * (LINEAR + CUBIC * x * x)
        dy = tl.sigmoid(twice_u) * (1 + x * tl.sigmoid(-twice_u) * (LINEAR + 3 * CUBIC * x * x))
    elif ACTIVATION == "gelu":
        # y = x Phi(x): Phi(x) + x phi(x)
        dy = 0.5 + 0.5 * tl.erf(x * ROOT_OF_HALF) + x * tl.exp(-0.5 * x * x) * DENSITY_AT_0
    else:
        dy = tl.where(x > 0, 1.0, 0.0)
    return dy
