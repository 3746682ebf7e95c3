"""Estimates about a run before its examples are prepared: its length in steps, epochs and tokens. They are exact if the
examples are in the cache. Plans and summaries learn about a task only from a Preview.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import CustomTransformerConfig, RunConfig
from ..data.tokens.order import Order
from ..optim.schedule import max_steps


@dataclass(frozen=True)
class EstimatedOrder:
    """The estimated length of an Order."""

    steps_per_epoch: float
    tokens_per_step: int  # counted targets; the mean if padded

    def steps(self, epochs: float) -> float:
        return epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Preview:
    """The number of steps and tokens of a run, from its config; estimates unless `prepared`."""

    config: RunConfig
    network_config: CustomTransformerConfig  # of the network that the task will build
    examples: tuple[str, str]  # what they are called, and their description
    order: Order | EstimatedOrder | None  # None: the number of examples is not known yet
    step: str  # what a step holds, as in 2,048 tokens: 8 x 2 sequences of 128
    prepared: bool = True
    evaluated_tokens: int = 0  # in the whole validation split
    generated_tokens: int = 0  # in one evaluation, each from those before it

    @property
    def steps_per_epoch(self) -> float | None:
        return None if self.order is None else self.order.steps(1)

    @property
    def max_steps(self) -> int | None:
        if self.order is None:
            return self.config.training.max_steps
        return max_steps(self.config.training, self.order)

    @property
    def tokens_per_step(self) -> int:
        """Counted targets in a step; the mean if padded, and the maximum if nothing more is known."""
        return most_tokens(self.config) if self.order is None else self.order.tokens_per_step


def most_tokens(config: RunConfig) -> int:
    """The tokens of a step if no position is padding."""
    training = config.training
    return training.batch_size * training.gradient_accumulation_steps * config.model.max_seq_len


def rows_of_a_step(config: RunConfig) -> str:
    """The rows of a step as text: 8 x 2 for two batches of 8."""
    training = config.training
    batches = f" x {training.gradient_accumulation_steps}" if training.gradient_accumulation_steps > 1 else ""
    return f"{training.batch_size}{batches}"
