"""Turns functions that launch kernels into operators of PyTorch; and what several kernels share."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

SUMMED_ROWS, SUMMED_COLUMNS = 64, 32  # the tile of the kernel that adds partial sums


def operator(*changes: str) -> Callable[[Callable[..., Any]], Any]:
    """Makes a function the operator `manual_backprop::<its name>`, which changes the arguments named in `changes`.

    With fake tensors, which have no memory, the same function runs without its launches.
    """

    def register(function: Callable[..., Any]) -> Any:
        made = torch.library.custom_op(f"manual_backprop::{function.__name__}", function, mutates_args=changes)
        made.register_fake(function)
        return made

    return register


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """kernel[grid](*arguments, **constants) on the device of the tensors; does nothing for fake tensors."""
    like = next(argument for argument in arguments if isinstance(argument, Tensor))
    if isinstance(like, FakeTensor) or like.is_meta:
        return
    with torch.cuda.device(like.device) if like.is_cuda else nullcontext():
        kernel[grid](*arguments, **constants)


def warps_of(block: int) -> int:
    """The number of warps: each thread has about 8 numbers of a block; at most 16 warps."""
    return min(max(block // 256, 1), 16)


def add_partial_sums(partial: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    """first (C) += the sum over G of partial[0], second (C) += that of partial[1]; partial (1 or 2, G, C)."""
    both, groups, width = partial.shape
    grid = triton.cdiv(width, SUMMED_COLUMNS), both
    tile = {"ROWS": SUMMED_ROWS, "COLUMNS": SUMMED_COLUMNS}
    launch(add_partial_sums_kernel, grid, first, second, partial, groups, width, **tile, num_warps=4)


@triton.jit
def wide(x):
    """x in the dtype of statistics and sums: float32, or float64 if x is float64."""
    return x if x.dtype == tl.float64 else x.to(tl.float32)


@triton.jit
def add_partial_sums_kernel(first_ptr, second_ptr, partial_ptr, G, C, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program sums some columns, from the first group to the last: always in the same order."""
    which = tl.program_id(1)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < C
    parts = tl.zeros((ROWS, COLUMNS), partial_ptr.dtype.element_ty)
    start = tl.full((), 0, tl.int32)
    while start < G:
        group = start + tl.arange(0, ROWS)
        at = (which * G + group)[:, None] * C + column[None, :]
        parts += tl.load(partial_ptr + at, mask=(group < G)[:, None] & inside[None, :], other=0.0)
        start += ROWS
    total = tl.sum(parts, 0)
    if second_ptr is None or which == 0:
        _add_to(first_ptr, column, total, inside)
    else:
        _add_to(second_ptr, column, total, inside)


@triton.jit
def _add_to(sums_ptr, at, values, mask):
    sums = wide(tl.load(sums_ptr + at, mask=mask, other=0.0))
    tl.store(sums_ptr + at, (sums + values).to(sums_ptr.dtype.element_ty), mask=mask)
