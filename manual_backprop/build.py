"""From a run's config to the parts of a run that no task owns: the optimizer and the learning rate of its steps, how
many these are, the name, the written config."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Protocol

from .config import RunConfig, TrainingConfig
from .durable import write_atomically
from .models.network import Network
from .optim import Optimizer
from .origin import SOURCES
from .schedule import learning_rate


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


def default_run_name(config: RunConfig) -> str:
    """gpt2-4x128-python_docs, and whatever is not as usual behind it: gpt2-4x128-python_docs-bf16-torch."""
    model, usual = config.model, {"fp32", "custom", "adamw"}
    unusual = {config.precision.name, config.implementation.name, config.optimizer.name} - usual
    name = f"{config.architecture.name}-{model.n_blocks}x{model.d_model}-{config.dataset.name}"
    return "-".join((name, *sorted(unusual)))


def write_config(config: RunConfig, path: Path, sources: Mapping[str, str] | None = None) -> None:
    """config.yaml, and beside it where each of its values was set, where that is known."""
    from omegaconf import OmegaConf

    write_atomically(path, OmegaConf.to_yaml(OmegaConf.create(config.to_dict())).encode())
    if sources:
        write_atomically(path.with_name(SOURCES), (json.dumps(dict(sources), indent=1) + "\n").encode())
