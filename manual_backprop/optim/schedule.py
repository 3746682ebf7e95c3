"""The learning rate as a function of the step, and how many steps a run has.

A schedule is a linear rise, then one of SHAPES down to a floor. plateau does not know where it falls: evaluations say
it (`improvement.py`).
"""

import math
from collections.abc import Callable
from typing import Protocol

from ..common.errors import ConfigError
from ..config.schema import RunConfig, TrainingConfig
from .improvement import Improvement


def _cosine(progress: float, peak: float, floor: float, warmups: float) -> float:
    """Half a cosine (Loshchilov and Hutter 2017, equation 5)."""
    return floor + (peak - floor) * (0.5 * (1 + math.cos(math.pi * progress)))


def _linear(progress: float, peak: float, floor: float, warmups: float) -> float:
    return floor + (peak - floor) * (1 - progress)


def _constant(progress: float, peak: float, floor: float, warmups: float) -> float:
    return peak


def _noam(progress: float, peak: float, floor: float, warmups: float) -> float:
    """With one over the root of the step (Vaswani et al. 2017, equation 3, whose highest rate is `peak`)."""
    return peak / math.sqrt(1 + progress * warmups)


# Of progress in [0, 1] after warm-up, peak, floor, and how many times as long as the warm-up that is.
SHAPES: dict[str, Callable[[float, float, float, float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "constant": _constant,
    "noam": _noam,
    "plateau": _constant,
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
    left = max(1, max_steps - warmup_steps)
    return shape(min(1.0, (step - warmup_steps) / left), peak, floor, left / max(1, warmup_steps))


def build_schedule(config: RunConfig, max_steps: int, improvement: Improvement | None = None) -> Callable[[int], float]:
    """The learning rate of each optimizer step, by its number from 1. For schedule=plateau it depends on what the
    evaluations so far have shown too. Raises ConfigError for a warm-up longer than the run."""
    schedule, seen = config.schedule, improvement or Improvement()
    warmup = warmup_steps(config, max_steps)
    if warmup >= max_steps:
        raise ConfigError(
            [f"schedule.warmup_steps={warmup}: the run has {max_steps} steps, of which at least one must be left"]
        )
    peak = config.peak_learning_rate
    if schedule.name == "noam":
        peak = schedule.peak or (config.model.d_model * max(warmup, 1)) ** -0.5
    floor = peak / 10 if schedule.min_learning_rate is None else schedule.min_learning_rate

    def rate(step: int) -> float:
        highest = peak
        if schedule.name == "plateau" and schedule.factor is not None:
            highest = max(peak * schedule.factor**seen.lowered, floor)
        return learning_rate(schedule.name, step, max_steps=max_steps, peak=highest, floor=floor, warmup_steps=warmup)

    return rate


def warmup_steps(config: RunConfig, max_steps: int) -> int:
    """As given, or the share of all steps."""
    schedule = config.schedule
    return schedule.warmup_steps if schedule.warmup_steps is not None else round(schedule.warmup_ratio * max_steps)


class Paced(Protocol):
    """What knows how long an epoch is: an order, or an estimate of one."""

    def steps(self, epochs: float) -> float: ...


def max_steps(training: TrainingConfig, order: Paced) -> int:
    """Optimizer steps of a whole run: as given, or those of `training.num_epochs` times through the text."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None
    return max(1, math.ceil(order.steps(training.num_epochs)))
