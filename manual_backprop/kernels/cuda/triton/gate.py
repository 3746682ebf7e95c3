"""SwiGLU, one launch forward and one backward: `swiglu_forward` and `swiglu_backward`. Backward recomputes the
output."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import launch, operator, wide

ROWS, COLUMNS = 8, 256  # of a tile


@operator()
def swiglu(x: Tensor) -> Tensor:
    """y = silu(gate) * hidden: x (N, 2F), gate and hidden side by side, -> y (N, F)."""
    assert x.is_contiguous()
    rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(rows, width)
    launch(swiglu_kernel, _grid(y), y, x, rows, width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return y


@operator()
def swiglu_backward(dy: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """dy (N, F) -> y (N, F), recomputed, and dx (N, 2F)."""
    assert x.is_contiguous()
    assert dy.is_contiguous()
    rows, width = dy.shape
    y, dx = torch.empty_like(dy, dtype=x.dtype), torch.empty_like(x)
    launch(swiglu_backward_kernel, _grid(y), y, dx, dy, x, rows, width, ROWS=ROWS, COLUMNS=COLUMNS, num_warps=4)
    return y, dx


def _grid(y: Tensor) -> tuple[int, int]:
    return triton.cdiv(y.shape[0], ROWS), triton.cdiv(y.shape[1], COLUMNS)


@triton.jit
def swiglu_kernel(y_ptr, x_ptr, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < N) & (column < F)
    # gate, hidden = x.chunk(2)
    gate = wide(tl.load(x_ptr + row * 2 * F + column, mask=inside, other=0.0))
    hidden = wide(tl.load(x_ptr + row * 2 * F + F + column, mask=inside, other=0.0))
    # y = gate * sigmoid(gate) * hidden
    y = gate * tl.sigmoid(gate) * hidden
    tl.store(y_ptr + row * F + column, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_backward_kernel(y_ptr, dx_ptr, dy_ptr, x_ptr, N, F, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < N) & (column < F)
    at, at_gate = row * F + column, row * 2 * F + column
    dy = wide(tl.load(dy_ptr + at, mask=inside, other=0.0))
    gate = wide(tl.load(x_ptr + at_gate, mask=inside, other=0.0))
    hidden = wide(tl.load(x_ptr + at_gate + F, mask=inside, other=0.0))
    opening, rest = tl.sigmoid(gate), tl.sigmoid(-gate)  # s, and 1 - s without cancellation
    # y = silu(gate) * hidden
    dgate = dy * hidden * opening * (1 + gate * rest)
    dhidden = dy * gate * opening
    tl.store(y_ptr + at, (gate * opening * hidden).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at_gate, dgate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + at_gate + F, dhidden.to(dx_ptr.dtype.element_ty), mask=inside)
