"""A residual sum and its norm, one launch forward and two backward: `residual_layer_norm` and, without mean and bias,
`residual_rms_norm`.

A program processes one row, in registers from its sum to its output, which is written in the dtype that is read next:
no cast follows. In backward a program has several rows and sums its part of dweight and dbias over them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import add_partial_sums, launch, operator, warps_of, wide

GROUPS = 512  # most programs of backward: several for each multiprocessor of a GPU, but few parts to sum


@operator()
def residual_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """total = x + branch, y = norm(total) -> total, y, mean, rstd.

    x (N, D), branch (N, D) or None, weight and bias (D): a layer norm, or without a bias an RMS norm. total has the
    dtype of x; without a branch it is empty, since x is the total. y (N, D) in `dtype`. mean, rstd (N) in float32; for
    an RMS norm mean is empty, and rstd is rrms.
    """
    assert x.is_contiguous()
    assert branch is None or branch.is_contiguous()
    rows, width = x.shape
    total = x.new_empty(0 if branch is None else (rows, width))
    y = torch.empty_like(x, dtype=dtype)
    mean, rstd = (x.new_empty(size, dtype=statistics_of(x)) for size in (0 if bias is None else rows, rows))
    block = triton.next_power_of_2(width)
    launch(
        *(residual_norm_kernel, (rows,), total, y, mean, rstd, x, branch, weight, bias, width),
        EPSILON=epsilon,
        BLOCK=block,
        num_warps=warps_of(block),
    )
    return total, y, mean, rstd


@operator("dweight", "dbias")
def residual_norm_backward(
    dtotal: Tensor | None,
    dy: Tensor,
    total: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dweight: Tensor,
    dbias: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """dtotal (N, D) or None, dy (N, D) in any dtype -> dx = dbranch (N, D) in the dtype of total, and a copy rounded to
    `dtype` for the branch; adds to dweight (D) and, for a layer norm, to dbias (D).

    The copy is empty if `dtype` is that of total: then the first is read."""
    assert dy.is_contiguous()
    assert total.is_contiguous()
    assert dtotal is None or dtotal.is_contiguous()
    rows, width = total.shape
    groups, block = min(rows, GROUPS), triton.next_power_of_2(width)
    dsum = torch.empty_like(total)
    rounded = total.new_empty(0 if dtype == total.dtype else (rows, width), dtype=dtype)
    partial = rstd.new_empty(1 if dbias is None else 2, groups, width)
    launch(
        *(
            residual_norm_backward_kernel,
            (groups,),
            dsum,
            rounded if rounded.numel() else None,
            partial,
            dtotal,
            dy,
            total,
            weight,
        ),
        *(None if dbias is None else mean, rstd, rows, width),
        BLOCK=block,
        num_warps=warps_of(block),
    )
    add_partial_sums(partial, dweight, dbias)
    return dsum, rounded


def statistics_of(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@triton.jit
def residual_norm_kernel(
    total_ptr, y_ptr, mean_ptr, rstd_ptr, x_ptr, branch_ptr, weight_ptr, bias_ptr, D, EPSILON: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < D
    at = row * D + column
    x = wide(tl.load(x_ptr + at, mask=inside, other=0.0))
    # total = x + branch
    if branch_ptr is not None:
        x += wide(tl.load(branch_ptr + at, mask=inside, other=0.0))
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + at, total, mask=inside)
        x = wide(total)  # rounded as it is stored, since backward reads that
    # mean = sum(x) / D, centered = x - mean
    if bias_ptr is not None:
        mean = tl.sum(x, 0) / D
        tl.store(mean_ptr + row, mean)
        x = tl.where(inside, x - mean, 0.0)
    # rstd = 1 / sqrt(sum(centered^2) / D + epsilon)
    rstd = 1 / tl.sqrt(tl.sum(x * x, 0) / D + EPSILON)
    tl.store(rstd_ptr + row, rstd)
    # y = centered * rstd * weight + bias
    y = x * rstd * wide(tl.load(weight_ptr + column, mask=inside, other=0.0))
    if bias_ptr is not None:
        y += wide(tl.load(bias_ptr + column, mask=inside, other=0.0))
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def residual_norm_backward_kernel(
    dsum_ptr, rounded_ptr, partial_ptr, dtotal_ptr, dy_ptr, total_ptr, weight_ptr, mean_ptr, rstd_ptr, N, D,
    BLOCK: tl.constexpr,
):  # fmt: skip
    group, groups = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    inside = column < D
    weight = wide(tl.load(weight_ptr + column, mask=inside, other=0.0))
    dweight, dbias = tl.zeros_like(weight), tl.zeros_like(weight)
    row = group
    while row < N:
        at = tl.cast(row, tl.int64) * D + column
        dy = wide(tl.load(dy_ptr + at, mask=inside, other=0.0))
        x = wide(tl.load(total_ptr + at, mask=inside, other=0.0))
        rstd = tl.load(rstd_ptr + row)
        if mean_ptr is not None:
            x = tl.where(inside, x - tl.load(mean_ptr + row), 0.0)
        normalized = x * rstd
        # y = normalized * weight + bias
        dbias += dy
        dweight += dy * normalized
        dnormalized = dy * weight
        # normalized = (x - mean) * rstd
        along_normalized = tl.sum(dnormalized * normalized, 0) / D
        dx = dnormalized - normalized * along_normalized
        if mean_ptr is not None:
            dx -= tl.sum(dnormalized, 0) / D  # the part along the all-ones vector
        dx *= rstd
        # total = x + branch
        if dtotal_ptr is not None:
            dx += wide(tl.load(dtotal_ptr + at, mask=inside, other=0.0))
        tl.store(dsum_ptr + at, dx.to(dsum_ptr.dtype.element_ty), mask=inside)
        if rounded_ptr is not None:
            tl.store(rounded_ptr + at, dx.to(rounded_ptr.dtype.element_ty), mask=inside)
        row += groups
    tl.store(partial_ptr + group * D + column, dweight, mask=inside)
    if mean_ptr is not None:
        tl.store(partial_ptr + (groups + group) * D + column, dbias, mask=inside)
