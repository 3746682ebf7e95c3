"""The optimizer that a run's config asks for, and one step of it: the gradients of all batches, their norm, clipping,
the update.

On a GPU the whole step is one CUDA graph, if the kernels and the optimizer can be captured and neither a recorder nor a
watch is set. Otherwise its kernels are launched one by one. The step never waits for the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..common.batch import AnyBatch, moved
from ..common.processes import processes
from ..config.schema import RunConfig
from ..kernels.cuda.graph import Graphs
from ..ops import random_key
from ..ops.dropout import signed
from ..optim.optimizers import FlatOptimizer, Optimizer
from ..optim.sharding import ShardedOptimizer
from .network import FlatNetwork, Network, dropout_places
from .step import HandWrittenNetwork


def build_optimizer(config: RunConfig, network: Network) -> Optimizer:
    """The optimizer of a config, sharded over the processes unless the config says otherwise."""
    settings = config.optimizer
    if settings.name == "sgd":
        optimizer = network.sgd(settings.weight_decay, settings.momentum or 0.0)
    else:
        assert settings.betas is not None
        assert settings.epsilon is not None
        optimizer = network.adamw(settings.weight_decay, settings.betas, settings.epsilon)
    return optimizer if settings.sharded is False else sharded(optimizer, network)


def sharded(optimizer: Optimizer, network: Network) -> Optimizer:
    """`optimizer`, sharded if several processes train (`common.processes`) and it is not one of PyTorch's."""
    group = processes()
    if group.size == 1 or not isinstance(optimizer, FlatOptimizer):
        return optimizer
    assert isinstance(network, FlatNetwork)
    return ShardedOptimizer(optimizer, network.layout, group)


class Unwatched:
    """The default watch: an object that a step calls after each of its parts, here without effect."""

    def batch(self, batch: AnyBatch) -> None: ...

    def gradients(self) -> None: ...

    def update(self) -> None: ...


UNWATCHED = Unwatched()


class Reduction:
    """The gradient reduction of a single process: it does nothing. That of several is in `training.processes`."""

    shared = False

    def watched(self, batches: Iterable[AnyBatch]) -> Iterable[AnyBatch]:
        """The batches of an optimizer step; the backward pass of the last one completes the gradients."""
        return batches

    def finish(self, loss: Tensor) -> Tensor:
        """Called after the last backward pass: sums gradients and loss over all processes. Returns the loss."""
        return loss


ALONE = Reduction()


class TrainingStep:
    """Optimizer steps of a network. `graph`: whether they may be captured as CUDA graphs. Steps that sum gradients over
    several processes are never captured."""

    def __init__(
        self,
        network: Network,
        optimizer: Optimizer,
        max_grad_norm: float | None = None,
        graph: bool = True,
        reduction: Reduction = ALONE,
    ):
        self.network, self.optimizer, self.max_grad_norm = network, optimizer, max_grad_norm
        self.reduction = reduction
        self.graphs = Graphs() if graph and not reduction.shared else None

    def __call__(
        self,
        batches: Iterable[AnyBatch],
        denominator: int | Tensor,
        rate: float,
        number: int,
        watch: Unwatched = UNWATCHED,
    ) -> tuple[Tensor, Tensor]:
        """One step. Returns the loss and the gradient norm before clipping, on the device. `denominator` is the number
        of counted targets in all batches together, `rate` the learning rate, `number` the step's number, from 1.
        """
        network, denominator = self.network, self.network.on_device(denominator)  # once for all batches
        if (
            self.graphs is not None
            and watch is UNWATCHED
            and isinstance(network, HandWrittenNetwork)
            and isinstance(self.optimizer, FlatOptimizer)
            and network.can_be_captured
        ):
            if network.rounded is not None:
                network.rounded.refresh()  # a graph that is replayed does not refresh them
            recorded = OfTensors(self, list(batches), network)
            inputs = recorded.inputs(denominator, rate, number)
            loss, norm = self.graphs(recorded, inputs, (recorded.signature, self.max_grad_norm))
            return loss, norm
        return self.run(batches, denominator, rate, number, watch)

    def run(
        self,
        batches: Iterable[AnyBatch],
        denominator: Tensor,
        rate: float | Tensor,
        number: int,
        watch: Unwatched = UNWATCHED,
    ) -> tuple[Tensor, Tensor]:
        """The same step without a CUDA graph."""
        network = self.network
        network.zero_gradients()
        loss = torch.zeros((), device=network.device)
        for batch in self.reduction.watched(batches):
            watch.batch(batch)
            loss = loss + network.loss_and_gradients(batch, denominator=denominator, step=number)
        loss = self.reduction.finish(loss)
        watch.gradients()
        norm = self.optimizer.step(loss, rate, self.max_grad_norm)
        watch.update()
        return loss, norm


class OfTensors:
    """A step as a function of tensors, which a graph can replay. They hold everything that changes between steps."""

    def __init__(self, step: TrainingStep, batches: Sequence[AnyBatch], network: HandWrittenNetwork):
        self.step, self.batches, self.network = step, batches, network
        self.places = dropout_places(network.config)

    @property
    def signature(self) -> tuple[Any, ...]:
        """What determines the kernels of a step: the network's settings, and each batch without its tensors."""
        kinds = tuple(
            (type(batch), *[None if isinstance(value, Tensor) else value for value in _values(batch)])
            for batch in self.batches
        )
        return kinds, self.network.signature(), id(self.step.optimizer), torch.are_deterministic_algorithms_enabled()

    def inputs(self, denominator: Tensor, rate: float, number: int) -> list[Tensor]:
        """All tensors of the batches, then denominator, learning rate, and a 64-bit key for each place with dropout."""
        device = self.network.device
        tensors = [value for batch in self.batches for value in _values(batch) if isinstance(value, Tensor)]
        numbers = [denominator, torch.full((), rate, dtype=torch.float64, device=device)]
        if self.places:
            keys = [signed(random_key(self.network.config.seed, number, place), 64) for place in self.places]
            numbers.append(moved(torch.tensor(keys, dtype=torch.int64, device="cpu"), device))
        return tensors + numbers

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        given = iter(tensors)
        batches = []
        for batch in self.batches:
            kind: Any = type(batch)
            batches.append(kind(*[next(given) if isinstance(value, Tensor) else value for value in _values(batch)]))
        denominator, rate = next(given), next(given)
        network = self.network
        network.dropout_keys = dict(zip(self.places, next(given), strict=True)) if self.places else None
        try:
            return self.step.run(batches, denominator, rate, number=0)  # the dropout keys replace the step's number
        finally:
            network.dropout_keys = None


def _values(batch: AnyBatch) -> list[Any]:
    return [getattr(batch, field.name) for field in fields(batch)]
