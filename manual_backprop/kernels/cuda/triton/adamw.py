"""AdamW in one launch over the flat buffers. `optim.AdamW` explains the symbols.

Every number is read once and written once. The rounded weights that products read are written in the same pass, so a
step makes no copies of them. Parameters with weight decay come first in the buffers. Whatever changes from step to step
is on the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from .launching import launch, operator, wide

BLOCK = 1024


@operator("parameters", "first_moment", "second_moment", "narrow")
def adamw_(
    parameters: Tensor,
    gradients: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    narrow: Tensor | None,
    numbers: Tensor,
    decayed_size: int,
    beta1: float,
    beta2: float,
    epsilon: float,
    weight_decay: float,
) -> None:
    """Updates parameters and both moments (P) with gradients (P), and writes `narrow` (P), the rounded parameters.

    numbers (5): whether the step counts (1, or 0: then nothing changes, whatever the gradients are), the clipping
    factor, the learning rate, 1 - beta1^t and sqrt(1 - beta2^t).
    """
    size = parameters.numel()
    launch(
        *(adamw_kernel, (triton.cdiv(size, BLOCK),), parameters, first_moment, second_moment, narrow, gradients),
        *(numbers, size, decayed_size),
        BETA1=beta1,
        BETA2=beta2,
        EPSILON=epsilon,
        DECAY=weight_decay,
        BLOCK=BLOCK,
        num_warps=4,
    )


@triton.jit
def adamw_kernel(
    parameters_ptr, first_ptr, second_ptr, narrow_ptr, gradients_ptr, numbers_ptr, P, decayed_size,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr, DECAY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < P
    counts, clip, rate = tl.load(numbers_ptr) != 0, tl.load(numbers_ptr + 1), tl.load(numbers_ptr + 2)
    first_correction, root_of_second_correction = tl.load(numbers_ptr + 3), tl.load(numbers_ptr + 4)
    p = wide(tl.load(parameters_ptr + at, mask=inside, other=0.0))
    first_before = tl.load(first_ptr + at, mask=inside, other=0.0)
    second_before = tl.load(second_ptr + at, mask=inside, other=0.0)
    gradient = clip * wide(tl.load(gradients_ptr + at, mask=inside, other=0.0))
    # m = beta1 m + (1 - beta1) g, v = beta2 v + (1 - beta2) g^2
    first = BETA1 * first_before + (1 - BETA1) * gradient
    second = BETA2 * second_before + (1 - BETA2) * gradient * gradient
    # p = p - rate (decay p + m_corrected / (sqrt(v_corrected) + epsilon))
    denominator = tl.sqrt(second) / root_of_second_correction + EPSILON
    change = first / denominator * (rate / first_correction)
    decay = tl.where(at < decayed_size, rate * DECAY, 0.0)
    new = p * (1 - decay) - change
    # a step that does not count keeps every bit
    new = tl.where(counts, new, p)
    tl.store(parameters_ptr + at, new.to(parameters_ptr.dtype.element_ty), mask=inside)
    tl.store(first_ptr + at, tl.where(counts, first, first_before), mask=inside)
    tl.store(second_ptr + at, tl.where(counts, second, second_before), mask=inside)
    if narrow_ptr is not None:
        tl.store(narrow_ptr + at, new.to(narrow_ptr.dtype.element_ty), mask=inside)
