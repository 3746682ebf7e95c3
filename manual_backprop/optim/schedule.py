"""The learning rate as a function of the step: a linear rise, then a shape down to a floor."""

from __future__ import annotations

import math


def learning_rate(
    name: str, step: int, *, max_steps: int, peak: float, floor: float = 0.0, warmup_steps: int = 0
) -> float:
    """Of the optimizer step number `step`, counted from 1.

    Rises in `warmup_steps` equal parts to `peak`, then follows half a cosine (Loshchilov and Hutter 2017, equation 5),
    a line, or stays (constant). cosine and linear reach `floor` in the last step.
    """
    if step <= warmup_steps:
        return peak * step / warmup_steps
    if name == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    share = 0.5 * (1 + math.cos(math.pi * progress)) if name == "cosine" else 1 - progress
    return floor + (peak - floor) * share
