"""Tasks: the examples, batches, loss, metrics and predictions of each.

    task.py             the interface between a task and a run
    inference.py        the interfaces of a trained model: predictors and writers
    preview.py          estimates about a run before its examples are prepared
    language_model.py   task=language_model: predict the next token of a text
    forecasting/        task=forecasting: predict the next steps of a time series
    classification/     task=classification: predict the label of a text
    pairs.py            what tasks have in common whose model generates the target of a source
    sequences.py        task=reversal, copy, sort: transform a sequence of symbols
    sequence_rows.py    their examples: drawn from the seed, split by a hash, as batches
    sequence_pictures.py  their cross-attention, as a number and as a picture
    translation/        task=translation: translate a source text into a target text
    evaluation.py       loss and accuracy on a split, and those of unigram and bigram models
    samples.py          text that a model generates during its training

A task reads data and builds a model. Not here: runs, their directories and their tracking (`training`, `tracking`).
May import: data and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..config.rules import Rule
from ..config.schema import SEQUENCES, RunConfig
from ..config.task_registration import add_task
from .classification import ClassificationTask
from .forecasting import ForecastingTask
from .inference import Predictor, Reading, Writer
from .language_model import LanguageModelTask
from .preview import Preview
from .sequences import SequenceTask
from .task import Evaluated, Final, Measured, Task
from .translation import TranslationTask

TASKS: dict[str, type[Task]] = {
    "language_model": LanguageModelTask,
    **dict.fromkeys(SEQUENCES, SequenceTask),
    "translation": TranslationTask,
    "forecasting": ForecastingTask,
    "classification": ClassificationTask,
}


def register_task(
    name: str,
    task: type[Task],
    *,
    network: str = "decoder",
    datasets: Sequence[str] = ("none",),
    tokenizer: str | None = None,
    settings: Mapping[str, tuple[Rule, Any, str]] | None = None,
) -> None:
    """Add task=NAME from outside the package.

    network: the one that it usually has. datasets: what it learns from; ("none",): it makes its own examples.
    tokenizer: its usual one; None: it reads no text. settings: keys of its own, as in {"modulus": (Whole(2, 100), 11,
    "what numbers are counted modulo")}: rule, value, what it means. Raises ConfigError if a name is taken.

    >>> from manual_backprop.config.rules import Whole
    >>> from manual_backprop.tasks.task import Task
    >>> class Counting(Task):  # CONTRIBUTING.md says which methods it fills in
    ...     pass
    >>> modulus = (Whole(2, 100), 11, "what numbers are counted modulo")
    >>> register_task("counting", Counting, settings={"modulus": modulus})
    >>> from manual_backprop.tasks import task_named
    >>> task_named("counting") is Counting
    True
    """
    add_task(name, network, datasets, tokenizer, settings or {})
    TASKS[name] = task


def task_named(name: str) -> type[Task]:
    """The class of a task. Raises InputError if there is none, as for a run of another version or with a plugin."""
    if name not in TASKS:
        raise InputError(f"task={name}: there is no such task here; there are {', '.join(TASKS)}")
    return TASKS[name]


def open_task(config: RunConfig, cache: Path) -> Task:
    """The task of a config. Its examples come from `cache`, or are prepared and stored there.

    Raises InputError for data that cannot be used, and StorageError.
    """
    return task_named(config.task.name).open(config, cache)


def preview_task(config: RunConfig, cache: Path) -> Preview:
    """Estimates about a run before its examples are prepared. Writes nothing. Raises InputError."""
    return task_named(config.task.name).preview(config, cache)


__all__ = [
    "TASKS",
    "ClassificationTask",
    "Evaluated",
    "Final",
    "ForecastingTask",
    "LanguageModelTask",
    "Measured",
    "Predictor",
    "Preview",
    "Reading",
    "SequenceTask",
    "Task",
    "TranslationTask",
    "Writer",
    "open_task",
    "preview_task",
    "register_task",
    "task_named",
]
