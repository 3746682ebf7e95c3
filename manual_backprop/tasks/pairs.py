"""What tasks have in common whose model reads a source and generates its target: reversal, copy, sort and translation.

The loss is cross-entropy over the target and its end, with teacher forcing: each token is predicted from the true ones
before it. The main metrics are those of the targets that the model generates by itself, each token from its own ones
before it (free-running).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from ..common.processes import processes
from ..data.tokens.order import Order
from .evaluation import Evaluation, Evaluator
from .preview import Preview
from .task import Task

MEASURED_ROWS = 500  # at most, in one batch
SHOWN = 10  # predictions

T = TypeVar("T")


@dataclass(frozen=True)
class SpecialIds:
    """The ids of the special tokens of targets, after those of texts or symbols."""

    padding: int

    @property
    def beginning(self) -> int:
        return self.padding + 1

    @property
    def end(self) -> int:
        return self.padding + 2

    def generated(self, tokens: Sequence[int]) -> list[int]:
        """The tokens before the first end token; all of them if there is none."""
        tokens = list(tokens)
        return tokens[: tokens.index(self.end)] if self.end in tokens else tokens


class PairTask(Task):
    """A task whose examples are rows with a source and a target, both of tokens."""

    best_is_highest = True
    predictions_title = "predictions on validation rows"

    @abstractmethod
    def rows(self, split: str) -> Any:
        """The rows of train, validation or test. Raises InputError if there is no such split."""

    @abstractmethod
    def shown_rows(self, model: Any, rows: Any, count: int) -> list[str]:
        """One line for each of the first `count` rows: what the model generates, and whether it is right."""

    @property
    def at_once(self) -> int:
        """How many rows a batch of an evaluation has at most."""
        return MEASURED_ROWS

    def previewed_pairs(self, examples: str, rows: str, longest: int) -> Preview:
        """`previewed`, with the tokens of an evaluation: read once, and generated once. `longest`: of a target."""
        preview, evaluated = self.previewed(examples, rows), self.rows("validation")
        tokens, batches = int(evaluated.lengths.sum() - len(evaluated)), -(-len(evaluated) // MEASURED_ROWS)
        return replace(preview, evaluated_tokens=2 * tokens, generated_tokens=batches * longest)

    def order(self, repeat: int | None = None) -> Order:
        rows = self.rows("train")
        return self.every_row(rows, int(rows.lengths.max()), repeat)

    def check(self) -> None:
        self.rows("validation")

    def batches(self, rows: Any, device: torch.device | str, count: int | None = None) -> Iterator[Any]:
        """The batches of the first `count` rows in order (None: all)."""
        numbers = np.arange(len(rows))[:count]
        for part in np.split(numbers, range(self.at_once, len(numbers), self.at_once)):
            yield rows.batch(part, rows.lengths[part] - 1, device=device)

    def in_parts(self, generate: Callable[[Sequence[Any]], Sequence[T]], sources: Sequence[Any]) -> list[T]:
        """`generate(sources)`, some sources at a time; of several processes, each generates its part."""
        at_once = min(self.at_once, -(-len(sources) // processes().size) or 1)
        parts = [sources[first : first + at_once] for first in range(0, len(sources), at_once)]
        return [target for part in processes().mapped(generate, parts) for target in part]

    def teacher_forced(self, model: Any, rows: Any, count: int | None = None) -> Evaluation:
        """Loss and accuracy with teacher forcing, on the first `count` rows (None: all)."""
        return Evaluator(model).evaluate(processes().part_of(self.batches(rows, model.network.device, count)))

    def predictions(self, model: Any) -> list[str]:
        """Ten validation rows as one text: what the model generates, and whether it is right."""
        return ["\n".join(self.shown_rows(model, self.rows("validation"), SHOWN))]

    def in_one_line(self, prediction: str) -> str:
        return prediction.partition("\n")[0]

    def example(self, device: torch.device) -> Any:
        """The first validation row."""
        return next(self.batches(self.rows("validation"), device, count=1))


def metrics_of(evaluation: Evaluation) -> dict[str, float]:
    """Loss and accuracy by the names of a run's metrics."""
    return {"validation/loss": evaluation.loss, "validation/accuracy": evaluation.accuracy}


def teacher_forced_rows(evaluation: Evaluation) -> tuple[tuple[str, str], tuple[str, str]]:
    """The rows of `evaluate` about loss and accuracy."""
    accuracy = f"{evaluation.accuracy:.2%} of {evaluation.tokens:,} tokens, each after the true ones (teacher forcing)"
    return ("accuracy", accuracy), ("loss", f"{evaluation.loss:.4f} nats per token, with teacher forcing")


def teacher_forced_line(evaluation: Evaluation) -> tuple[str, str]:
    """The same as a row of the page at the end of a run."""
    return "", f"with teacher forcing: accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f}"


def shown(source: str, wanted: str, found: str) -> str:
    verdict = "\u2713" if found == wanted else f"\u2717  expected {wanted}"
    return f"{source} -> {found}  {verdict}"
