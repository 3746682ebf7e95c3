"""How a trained model is asked, by a task that is `restored` from its checkpoint: `predict`, `generate --source` and
MLflow call what is made here, a `Predictor` or a `Writer`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.batch import AnyBatch
from ..common.errors import InputError


@dataclass(frozen=True)
class Reading:
    """What a network reads, to be looked at meanwhile: a `batch` of one row. `source`: what stands at the places that
    an encoder reads, `target` at those that have an answer each; `word` is an answer's name. `said`: where answers are
    numbers and no words, what the outputs (O,) of the network say. `title` stands above the answers; `note` says what
    of the input is not read."""

    batch: AnyBatch
    target: Sequence[str]
    source: Sequence[str]
    word: Callable[[int], str]
    said: Callable[[np.ndarray], list[str]] | None = None
    title: str = "Likeliest next tokens"
    note: str = ""


class Predictor(ABC):
    """From inputs to predictions: `predict RUN --text ... | --file ...`."""

    @abstractmethod
    def read_text(self, text: str) -> Any:
        """What `--text` gives, as an input. Raises InputError."""

    @abstractmethod
    def read_lines(self, lines: Iterable[str], where: str) -> Iterator[Any]:
        """The inputs in a file's lines. `where` is its name, whose ending says of which kind it is, or stdin. Raises
        InputError with the file and the line."""

    @abstractmethod
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """For each input a mapping that JSON can hold. Raises InputError."""

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> Any:
        """What MLflow's model answers, of a task with a `signature`, which says what comes in and out."""
        raise NotImplementedError


class Writer(ABC):
    """From a source to what the model writes: `generate RUN --source ...`."""

    @abstractmethod
    def write(self, source: str, **drawing: Any) -> str:
        """A line with the source and what becomes of it. `drawing`: temperature, top_k, top_p, seed, beams and
        length_penalty, as the wrappers' `generate` has them. Raises InputError for what is no source."""

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> Any:
        """As `Predictor.serve`."""
        raise NotImplementedError


def texts_of(model_input: Any) -> list[str]:
    """A text, a list of them, an array, or a table of one column. Raises InputError for anything else."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns") and len(model_input.columns) != 1:
        raise InputError(f"the table has the columns {list(model_input.columns)}: expected one, of texts")
    values = getattr(model_input, "values", model_input)
    if hasattr(values, "ravel"):
        values = values.ravel().tolist()
    if not isinstance(values, Iterable):
        raise InputError(f"{model_input!r}: expected texts, as in ['Once upon']")
    texts = list(values)
    for text in texts:
        if not isinstance(text, str):
            raise InputError(f"{text!r} is no text: expected a list of texts, as in ['Once upon']")
    return texts
