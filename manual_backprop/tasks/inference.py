"""Inference with a trained model: the interfaces `Predictor` and `Writer`, which `predict`, `generate --source` and
MLflow's models use. A task `restored` from a checkpoint implements one of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..common.batch import AnyBatch
from ..common.errors import InputError

TEXT = [{"type": "string", "required": True}]  # texts as inputs or outputs, in a `signature`


@dataclass(frozen=True)
class Reading:
    """An input for the view of a model: a `batch` of one row. `source` names the positions that an encoder reads,
    `target` those that have a prediction each; `word` gives a prediction's name. `said`, if predictions are numbers,
    turns the network's outputs (O,) into text. `title` stands above the predictions; `note` says which part of the
    input is not read."""

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
        """The input for the text given as `--text`. Raises InputError."""

    @abstractmethod
    def read_lines(self, lines: Iterable[str], where: str) -> Iterator[Any]:
        """The inputs in a file's lines. `where` is the file's name, whose suffix gives the format, or stdin. Raises
        InputError with the file and the line."""

    @abstractmethod
    def predict(self, inputs: Sequence[Any]) -> list[dict[str, Any]]:
        """The prediction for each input, as a JSON object. Raises InputError."""

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> Any:
        """The output of MLflow's model; its task's `signature` describes inputs and outputs."""
        raise NotImplementedError


class Writer(ABC):
    """From a source to the text that the model generates: `generate RUN --source ...`."""

    @abstractmethod
    def write(self, source: str, **drawing: Any) -> str:
        """One line of output for a source. `drawing`: temperature, top_k, top_p, seed, beams and length_penalty, as in
        the wrappers' `generate`. Raises InputError for an invalid source."""

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> Any:
        """Like `Predictor.serve`."""
        raise NotImplementedError


def texts_of(model_input: Any) -> list[str]:
    """The texts in a text, a list, an array, or a table of one column. Raises InputError for anything else."""
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
            raise InputError(f"{text!r} is not a text: expected a list of texts, as in ['Once upon']")
    return texts
