"""The norm of the whole gradient, one flat buffer: one launch sums the squares in parts, another one sums the parts."""

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch, operator, wide
from .normalization import statistics_of

BLOCK = 2048
PROGRAMS = 1024  # at most: several for each multiprocessor of a GPU, but few parts to sum


@operator()
def gradient_norm(gradient: Tensor) -> Tensor:
    """|gradient| (P) -> one number in float32."""
    assert gradient.is_contiguous()
    size = gradient.numel()
    programs = min(triton.cdiv(size, BLOCK), PROGRAMS)
    partial = gradient.new_empty(programs, dtype=statistics_of(gradient))
    norm = partial.new_empty(())
    launch(sums_of_squares_kernel, (programs,), partial, gradient, size, BLOCK=BLOCK, num_warps=8)
    launch(root_of_sum_kernel, (1,), norm, partial, programs, BLOCK=PROGRAMS, num_warps=4)
    return norm


@triton.jit
def sums_of_squares_kernel(partial_ptr, gradient_ptr, P, BLOCK: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    squares = tl.zeros((BLOCK,), partial_ptr.dtype.element_ty)
    block, blocks = program, tl.cdiv(P, BLOCK)
    while block < blocks:
        at = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        gradient = wide(tl.load(gradient_ptr + at, mask=at < P, other=0.0))
        squares += gradient * gradient
        block += programs
    tl.store(partial_ptr + program, tl.sum(squares, 0))


@triton.jit
def root_of_sum_kernel(norm_ptr, partial_ptr, programs, BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(partial_ptr + program, mask=program < programs, other=0.0), 0)
    tl.store(norm_ptr, tl.sqrt(total))
