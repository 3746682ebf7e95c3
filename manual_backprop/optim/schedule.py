"""The learning rate as a function of the step, and how many steps a run has.

A schedule is a linear warm-up, then one of SHAPES down to a floor. For plateau, evaluations decide when the rate falls
(`improvement.py`).
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
    """Proportional to 1 / sqrt(step) (Vaswani et al. 2017, equation 3, scaled so that its highest rate is `peak`)."""
    return peak / math.sqrt(1 + progress * warmups)


# The arguments are progress in [0, 1] after warm-up, peak, floor, and the length of the rest in units of the warm-up.
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
    """The learning rate of optimizer step number `step`, from 1. Raises KeyError for a name that is not in SHAPES.

    It rises in `warmup_steps` equal parts to `peak`, then follows the shape. cosine and linear reach `floor` in the
    last step.
    """
    shape = SHAPES[name]
    if step <= warmup_steps:
        return peak * step / warmup_steps
    left = max(1, max_steps - warmup_steps)
    return shape(min(1.0, (step - warmup_steps) / left), peak, floor, left / max(1, warmup_steps))


def build_schedule(config: RunConfig, max_steps: int, improvement: Improvement | None = None) -> Callable[[int], float]:
    """A function from the number of an optimizer step, from 1, to its learning rate. With schedule=plateau the rate
    also depends on `improvement`. Raises ConfigError for a warm-up longer than the run."""
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
    """The number of warm-up steps: as given, or as a share of all steps."""
    schedule = config.schedule
    return schedule.warmup_steps if schedule.warmup_steps is not None else round(schedule.warmup_ratio * max_steps)


class Paced(Protocol):
    """Knows the length of an epoch: a data order, or an estimate of one."""

    def steps(self, epochs: float) -> float: ...


def max_steps(training: TrainingConfig, order: Paced) -> int:
    """The number of optimizer steps of a run: as given, or those of `training.num_epochs` epochs."""
    if training.max_steps is not None:
        return training.max_steps
    assert training.num_epochs is not None
    return max(1, math.ceil(order.steps(training.num_epochs)))
