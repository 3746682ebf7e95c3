"""What is learned: the examples, batches, loss, metrics and predictions of each task.

    task.py             the seam: what a task owns, and all that a run knows of it
    asking.py           how a trained model is asked: predictors, and writers of what becomes of a source
    preview.py          what is known of a run before its examples are prepared
    language_model.py   task=language_model: at each position of a text, the token that comes next
    forecasting/        task=forecasting: the next steps of a series of numbers
    classification/     task=classification: which label a text has
    sequences.py        task=reversal, copy, sort: a row of symbols, and what becomes of it
    sequence_rows.py    their examples: drawn from the seed, split by a hash, as batches
    sequence_pictures.py  where a target looks at its source
    translation/        task=translation: texts and what becomes of them
    evaluation.py       how good a model is on text it has not seen, beside models that only count
    samples.py          text that a model writes during its training

A task reads data and builds a model. Not here: runs, their directories and their tracking (`training`, `tracking`).
May import: data and below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.errors import InputError
from ..config.own_tasks import add_task
from ..config.rules import Rule
from ..config.schema import SEQUENCES, RunConfig
from .asking import Predictor, Reading, Writer
from .classification import ClassificationTask
from .forecasting import ForecastingTask
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
    """Makes task=NAME, from outside of the package: in a module that is imported before a config is read, or that
    `--plugin` names.

    network: the one that it usually has. datasets: what it learns from; ("none",): it makes its own examples.
    tokenizer: its usual one; None: it reads no text. settings: keys of its own, as in {"modulus": (Whole(2, 100), 11,
    "what numbers are counted modulo")}: rule, value, what it means. Raises ConfigError where a name is taken.

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
    """Raises InputError where there is none: a run of another version, or with a task of its own, is looked at."""
    if name not in TASKS:
        raise InputError(f"task={name}: there is no such task here; there are {', '.join(TASKS)}")
    return TASKS[name]


def open_task(config: RunConfig, cache: Path) -> Task:
    """What a run of this config learns. Its examples come from `cache`, or are prepared and put there.

    Raises InputError for data that cannot be used, StorageError where the cache cannot be written.
    """
    return task_named(config.task.name).open(config, cache)


def preview_task(config: RunConfig, cache: Path) -> Preview:
    """What is known of a run's examples before they are prepared. Writes nothing. Raises InputError."""
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
