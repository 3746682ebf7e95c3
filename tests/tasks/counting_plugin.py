"""A task of one's own, from outside of the package, with an objective and an activation of its own: to count modulo a
number. CONTRIBUTING.md tells how one is made; test_plugins.py trains it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from manual_backprop import register_activation, register_objective, register_task
from manual_backprop.common.batch import IGNORED, Batch
from manual_backprop.config.rules import Whole
from manual_backprop.config.schema import CustomTransformerConfig, RunConfig
from manual_backprop.data.tokens.order import Order
from manual_backprop.tasks import Evaluated, Task

ROWS = 8


def squared_relu_forward(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.clamp(min=0).square(), x


def squared_relu_backward(dy: Tensor, x: Tensor) -> Tensor:
    return dy * 2 * x.clamp(min=0)


def brier_forward(logits: Tensor, targets: Tensor, denominator: Any) -> tuple[Tensor, tuple]:
    """The squared distance of the probabilities from the truth (Brier 1950)."""
    p, y = logits.softmax(-1), one_hot(targets.clamp(min=0), logits.shape[-1])
    counts = (targets != IGNORED)[..., None]
    return torch.where(counts, (p - y).square(), 0).sum() / denominator, (p, y, counts, denominator)


def brier_backward(dloss: float, cache: tuple) -> Tensor:
    p, y, counts, denominator = cache
    dp = torch.where(counts, 2 * (p - y), 0) * (dloss / denominator)
    return p * (dp - (dp * p).sum(-1, keepdim=True))


class Rows(Order):
    """Numbers that count up, each row from its own."""

    def __init__(self, modulus: int, length: int):
        self.modulus, self.length, self.tokens_per_step = modulus, length, ROWS * length

    def steps(self, epochs: float) -> float:
        return 10 * epochs

    def tokens_before(self, step: int) -> int:
        return step * self.tokens_per_step

    def rows(self, first: int, count: int, device: torch.device | str) -> Batch:
        numbers = (torch.arange(first, first + count)[:, None] + torch.arange(self.length + 1)) % self.modulus
        return Batch(numbers[:, :-1].contiguous().to(device), numbers[:, 1:].contiguous().to(device))

    def batches(self, step: int, device: torch.device | str = "cpu") -> tuple[int, Iterator[Batch]]:
        return self.tokens_per_step, iter([self.rows(ROWS * step, ROWS, device)])


class Counting(Task):
    best_metric = "validation/error"

    def __init__(self, config: RunConfig):
        self.config, self.modulus = config, config.task.modulus  # type: ignore[attr-defined]
        self.digests = {"dataset_digest": f"counting modulo {self.modulus}"}

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config)

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.config.network_config(self.modulus, head_loss="brier")

    def order(self, repeat: int | None = None) -> Rows:
        return Rows(self.modulus, self.config.model.max_seq_len)

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        batch = self.example(model.network.device)
        error = 1 - (model.network.predict(batch).argmax(-1) == batch.targets).double().mean().item()
        return Evaluated({"validation/error": error}, f"{error:.0%} wrong", (("wrong", f"{error:.0%}"),))

    def predictions(self, model: Any) -> list[str]:
        return [self.text(self.example(model.network.device), 5)]

    def example(self, device: torch.device) -> Batch:
        return self.order().rows(3, 1, device)

    def text(self, batch: Any, positions: int) -> str:
        return " ".join(map(str, batch.tokens[0, :positions].tolist()))

    @property
    def about(self) -> str:
        return f"numbers modulo {self.modulus}"


register_activation("squared_relu", squared_relu_forward, squared_relu_backward, lambda x: x.clamp(min=0).square())
register_objective("brier", brier_forward, brier_backward, lambda z, t, n: brier_forward(z, t, n)[0])
register_task("counting", Counting, settings={"modulus": (Whole(2, 100), 11, "what numbers are counted modulo")})
