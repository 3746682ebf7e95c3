"""The optimizer that a run's config asks for, over a network's parameters."""

from __future__ import annotations

from ..config.schema import RunConfig
from ..optim.optimizers import Optimizer
from .network import Network


def build_optimizer(config: RunConfig, network: Network) -> Optimizer:
    settings = config.optimizer
    if settings.name == "sgd":
        return network.sgd(settings.weight_decay, settings.momentum or 0.0)
    if settings.name != "adamw":
        raise NotImplementedError(f"optimizer.name={settings.name}: no network has it")
    assert settings.betas is not None
    assert settings.epsilon is not None
    return network.adamw(settings.weight_decay, settings.betas, settings.epsilon)
