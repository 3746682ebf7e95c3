"""The optimizer that a run's config asks for, the learning rate of each of its steps, and how many these are."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..config.schema import RunConfig, TrainingConfig
from ..optim.optimizers import Optimizer
from ..optim.schedule import learning_rate
from .network import Network


def build_optimizer(config: RunConfig, network: Network) -> Optimizer:
    settings = config.optimizer
    if settings.name == "sgd":
        return network.sgd(settings.weight_decay, settings.momentum or 0.0)
    assert settings.betas is not None
    assert settings.epsilon is not None
    return network.adamw(settings.weight_decay, settings.betas, settings.epsilon)


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
