"""How long a run is, in steps, epochs and tokens: exactly where its text is prepared, else about.

What an epoch is depends on the batching. Packed, it is all windows of T tokens but one; padded, it is every document
with something to predict, a row each, and the last step has what is left (`data.tokens.order`).
"""

import math
from dataclasses import dataclass

from ...config.schema import RunConfig
from ...data.tokens.order import Order
from ...data.tokens.text_size import TextSize
from ...optim.schedule import max_steps
from ...tasks import LanguageModelTask


@dataclass(frozen=True)
class EstimatedOrder:
    """What an Order will say of its length."""

    steps_per_epoch: float
    tokens_per_step: int  # targets that count; padded, the mean

    def steps(self, epochs: float) -> float:
        return epochs * self.steps_per_epoch


@dataclass(frozen=True)
class Length:
    """How long a run of a config is; of a text that is not prepared, about."""

    config: RunConfig
    order: Order | EstimatedOrder | None  # None: nobody knows yet how much text there is

    @property
    def steps_per_epoch(self) -> float | None:
        return None if self.order is None else self.order.steps(1)

    @property
    def max_steps(self) -> int | None:
        if self.order is None:
            return self.config.training.max_steps
        return max_steps(self.config.training, self.order)

    @property
    def rows_per_step(self) -> int:
        return self.config.training.batch_size * self.config.training.gradient_accumulation_steps

    @property
    def tokens_per_step(self) -> int:
        """Targets that count; padded, the mean, and the most that there may be where no more is known."""
        if self.order is None:
            return self.rows_per_step * self.config.model.max_seq_len
        return self.order.tokens_per_step

    @property
    def step(self) -> str:
        """What a step is made of: 2,048 tokens: 8 x 2 sequences of 128."""
        training, dataset, length = self.config.training, self.config.dataset, self.config.model.max_seq_len
        rows = f"{training.batch_size}"
        if training.gradient_accumulation_steps > 1:
            rows += f" x {training.gradient_accumulation_steps}"
        if self.config.batching.name == "padded":
            about = "at most" if self.order is None else "about"
            longest = min(dataset.max_length or length, length)
            return f"{about} {self.tokens_per_step:,} tokens: {rows} documents, none longer than {longest}"
        return f"{self.tokens_per_step:,} tokens: {rows} sequences of {length}"


def length_of(config: RunConfig, text: TextSize) -> Length:
    """Raises InputError for a prepared text that is too short."""
    return Length(config, _order_of(config, text))


def _order_of(config: RunConfig, text: TextSize) -> Order | EstimatedOrder | None:
    """None where nobody knows yet how much text there is, or, for padded batches, how many documents."""
    if text.corpus is not None:
        return LanguageModelTask(config, text.corpus).order()
    if text.train_tokens is None:
        return None
    training, length = config.training, config.model.max_seq_len
    rows = training.batch_size * training.gradient_accumulation_steps
    if config.batching.name == "padded":
        if text.train_documents is None:
            return None
        longest = min(config.dataset.max_length or length, length)
        tokens = min(text.train_tokens, text.train_documents * longest)
        steps = math.ceil(text.train_documents / rows)
        return EstimatedOrder(steps, max(1, round(tokens / steps)))
    return EstimatedOrder(max(text.train_tokens // length - 1, 1) / rows, rows * length)
