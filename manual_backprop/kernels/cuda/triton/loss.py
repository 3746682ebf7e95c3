"""Cross-entropy in place in one launch: logits become their gradient, `cross_entropy_forward` and `_backward` at once.

A program processes one row of any length, twice, in blocks. Offsets have 64 bits, since a large batch has more than
2^31 logits.
"""

import triton
import triton.language as tl
from torch import Tensor

from ....common.batch import IGNORED as OF_BATCHES
from .launching import launch, operator, warps_of, wide
from .normalization import statistics_of

BLOCK = 4096  # at most: a whole row of a large vocabulary does not fit into registers

IGNORED = tl.constexpr(OF_BATCHES)


@operator("logits")
def cross_entropy_(logits: Tensor, targets: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    """Overwrites logits (R, V), with any row stride, with scale * (softmax - q); with 0 in rows that do not count.

    targets (R), -100 where they do not count; scale, one number -> losses (R) = logsumexp(z) - sum_v q_v z_v, without
    the scale, 0 where they do not count. q is 1 - s on the target plus s / V on every token.
    """
    assert logits.stride(1) == 1
    rows, width = logits.shape
    losses = logits.new_empty(rows, dtype=statistics_of(logits))
    block = min(BLOCK, triton.next_power_of_2(width))
    launch(
        *(cross_entropy_kernel, (rows,), losses, logits, targets, scale, logits.stride(0), width),
        SMOOTHING=label_smoothing,
        BLOCK=block,
        num_warps=max(4, warps_of(block) // 2),
    )
    return losses


@triton.jit
def cross_entropy_kernel(
    losses_ptr, logits_ptr, targets_ptr, scale_ptr, row_stride, V, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    counts = target != IGNORED
    expected = wide(tl.load(logits_ptr + tl.maximum(target, 0)))  # read before it is overwritten
    # logsumexp = max(z) + log(sum(exp(z - max(z)))), of the blocks read so far
    largest = tl.full((), float("-inf"), losses_ptr.dtype.element_ty)
    total = tl.zeros_like(largest)
    sum_of_logits = tl.zeros_like(largest)
    start = tl.full((), 0, tl.int32)
    while start < V:
        column = start + tl.arange(0, BLOCK)
        z = wide(tl.load(logits_ptr + column, mask=column < V, other=float("-inf")))
        before, largest = largest, tl.maximum(largest, tl.max(z, 0))
        shift = tl.where(largest == float("-inf"), 0.0, largest)  # nothing but -inf so far: exp(-inf - 0) = 0
        total = total * tl.exp(before - shift) + tl.sum(tl.exp(z - shift), 0)
        if SMOOTHING != 0:
            sum_of_logits += tl.sum(tl.where(column < V, z, 0.0), 0)
        start += BLOCK
    # loss = logsumexp(z) - sum_v q_v z_v
    share = (tl.zeros_like(total) + SMOOTHING) / V  # s / V, the part of q on every token
    expected = (1 - SMOOTHING) * expected + share * sum_of_logits
    tl.store(losses_ptr + row, tl.where(counts, largest + tl.log(total) - expected, 0.0))
    scale = tl.load(scale_ptr)
    start = tl.full((), 0, tl.int32)
    while start < V:
        column = start + tl.arange(0, BLOCK)
        z = wide(tl.load(logits_ptr + column, mask=column < V, other=float("-inf")))
        # dz = scale (p - q), p = exp(z - logsumexp(z))
        p = tl.exp(z - largest) / total
        q = tl.where(column == target, 1 - SMOOTHING, tl.zeros_like(p))  # without the share
        # not a product with 0, which would keep the NaN that an ignored row may hold
        dz = tl.where(counts, scale * (p - q - share), 0.0)
        tl.store(logits_ptr + column, dz.to(logits_ptr.dtype.element_ty), mask=column < V)
        start += BLOCK
