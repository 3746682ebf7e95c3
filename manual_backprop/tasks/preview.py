"""What is known of a run before it starts, and before its examples are prepared: how long it is, in steps, epochs and
tokens; exactly where the examples are there, else about. For plans and summaries, which know a task by this alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config.schema import CustomTransformerConfig, RunConfig
from ..data.tokens.order import Order
from ..optim.schedule import max_steps


@dataclass(frozen=True)
class EstimatedOrder:
    """What an Order will say of its length."""

    steps_per_epoch: float
    tokens_per_step: int  # targets that count; padded, the mean

    def steps(self, epochs: float) -> float:
        return epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Preview:
    """Of a config's examples; of those that are not prepared, about."""

    config: RunConfig
    vocab_size: int
    prepared: bool
    examples: tuple[str, str]  # a word for them, and what is known of them
    order: Order | EstimatedOrder | None  # None: nobody knows yet how much there is
    step: str  # what a step is made of, as in 2,048 tokens: 8 x 2 sequences of 128
    evaluated_tokens: int  # of the whole validation split
    written_tokens: int  # one after the other, for the predictions of an evaluation
    network: CustomTransformerConfig | None = None  # where the config and the vocabulary alone do not say which

    @property
    def network_config(self) -> CustomTransformerConfig:
        """What the task will build."""
        return self.network or self.config.network_config(self.vocab_size)

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
        """Targets that count; padded, the mean, and the most that there may be where no more is known."""
        return most_tokens(self.config) if self.order is None else self.order.tokens_per_step


def most_tokens(config: RunConfig) -> int:
    """Of a step in which no row is padded."""
    training = config.training
    return training.batch_size * training.gradient_accumulation_steps * config.model.max_seq_len


def rows_of_a_step(config: RunConfig) -> str:
    """8 x 2, where a step takes two batches of 8."""
    training = config.training
    pieces = f" x {training.gradient_accumulation_steps}" if training.gradient_accumulation_steps > 1 else ""
    return f"{training.batch_size}{pieces}"
