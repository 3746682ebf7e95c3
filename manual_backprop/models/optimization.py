"""The optimizer that a run's config asks for, over a network's parameters."""

from __future__ import annotations

from ..common.processes import processes
from ..config.schema import RunConfig
from ..optim.optimizers import FlatOptimizer, Optimizer
from ..optim.sharding import ShardedOptimizer
from .network import FlatNetwork, Network


def build_optimizer(config: RunConfig, network: Network) -> Optimizer:
    """Sharded where several processes train (`common.processes`), the config leaves it so, and it is one of ours."""
    optimizer, group = _build(config, network), processes()
    if group.size == 1 or config.optimizer.sharded is False or not isinstance(optimizer, FlatOptimizer):
        return optimizer
    assert isinstance(network, FlatNetwork)
    return ShardedOptimizer(optimizer, network.layout, group)


def _build(config: RunConfig, network: Network) -> Optimizer:
    settings = config.optimizer
    if settings.name == "sgd":
        return network.sgd(settings.weight_decay, settings.momentum or 0.0)
    if settings.name != "adamw":
        raise NotImplementedError(f"optimizer.name={settings.name}: no network has it")
    assert settings.betas is not None
    assert settings.epsilon is not None
    return network.adamw(settings.weight_decay, settings.betas, settings.epsilon)
