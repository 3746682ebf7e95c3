"""The learning rate as a function of the step, and how many steps a run has.

A schedule is a linear rise, then one of SHAPES down to a floor.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..config.schema import RunConfig, TrainingConfig


def _cosine(progress: float, peak: float, floor: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return floor + (peak - floor) * (0.5 * (1 + math.cos(math.pi * progress)))


def _linear(progress: float, peak: float, floor: float) -> float:
    return floor + (peak - floor) * (1 - progress)


def _constant(progress: float, peak: float, floor: float) -> float:
    return peak


SHAPES: dict[str, Callable[[float, float, float], float]] = {  # of progress in [0, 1] after warm-up, peak and floor
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
}


def learning_rate(
    name: str, step: int, *, max_steps: int, peak: float, floor: float = 0.0, warmup_steps: int = 0
) -> float:
    """Of the optimizer step number `step`, counted from 1. KeyError for a name that is not in SHAPES.

    Rises in `warmup_steps` equal parts to `peak`, then follows the shape; cosine and linear reach `floor` in the last
    step.
    """
    shape = SHAPES[name]
    if step <= warmup_steps:
        return peak * step / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return shape(progress, peak, floor)


def build_schedule(config: RunConfig, max_steps: int) -> Callable[[int], float]:
    """The learning rate of each optimizer step, by its number from 1."""
    peak, floor = config.peak_learning_rate, config.schedule.min_learning_rate
    return partial(
        learning_rate,
        config.schedule.name,
        max_steps=max_steps,
        peak=peak,
        floor=peak / 10 if floor is None else floor,
        warmup_steps=round(config.schedule.warmup_ratio * max_steps),
    )


class Paced(Protocol):
    """What knows how long an epoch is: an order, or an estimate of one."""

    def steps(self, epochs: float) -> float: ...


def max_steps(training: TrainingConfig, order: Paced) -> int:
    """Optimizer steps of a whole run: as given, or those of `training.num_epochs` times through the text."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None
    return max(1, math.ceil(order.steps(training.num_epochs)))
