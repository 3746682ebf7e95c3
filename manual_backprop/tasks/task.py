"""The seam between a run and what it learns: the runner, its report, its state and its summary know a task by this
class alone.

A batch says by its type what it holds, and the network's `loss_and_gradients` takes it as it is: the loss of training
is that of the network's head, which the task chooses with the model that it builds. What a task measures of a model
afterwards is its own business, and so is what of it a reader gets to see.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch

from ..common.batch import AnyBatch
from ..common.errors import ConfigError, InputError
from ..config.schema import CustomTransformerConfig, RunConfig
from ..data.tokens.order import Order
from ..models.wrappers.wrapper import NetworkWrapper
from .asking import Predictor, Reading, Writer
from .evaluation import Evaluator, ShownToken
from .preview import Preview


@dataclass(frozen=True)
class Evaluated:
    """What a task has measured of a model on the validation split."""

    metrics: Mapping[str, float]  # by the names that a run tracks: validation/loss, and what else the task measures
    sentence: str  # the same for a reader, in one line
    summary: tuple[tuple[str, str], ...]  # and in rows, title and text, on the page at the end of a run
    short: str = ""  # and in a few words, beside the losses of an epoch


@dataclass(frozen=True)
class Final:
    """What a task adds at the end of a run that has come to it."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: tuple[tuple[str, str], ...] = ()  # further rows of the page
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Measured:
    """A trained model on one split, as `evaluate` shows and logs it."""

    title: str  # which split, and how many of what
    headings: tuple[str, ...]  # of the table's columns; none where its rows say it themselves
    rows: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, float]  # by plain names: loss is logged as evaluation/SPLIT_loss
    whole: bool = True  # or the first batches of the split
    notes: tuple[str, ...] = ()  # what a reader of the numbers must know
    predictions: tuple[str, ...] = ()  # a line each


class Task(ABC):
    """What a run learns, opened for the config of one run. Nothing of it changes while the run goes on."""

    evaluate_options: tuple[str, ...] = ("--predictions",)  # of `evaluate`, those that this task can follow
    asked_with = ("generate", "--prompt", "Return the")  # how a trained model is asked: command, option, an example
    signature: Mapping[str, Any] | None = None  # of MLflow's model: inputs, outputs, params; None: a text and more text
    best_metric = "validation/loss"  # of its metrics, the one that chooses the best checkpoint
    best_is_highest = False  # and whether its highest value is the best, or its lowest
    predictions_title = "a sample"
    files: tuple[str, ...] = ()  # what `save` writes; every checkpoint has a copy

    config: RunConfig
    digests: Mapping[str, str]  # SHA-256 of what its examples depend on, as checkpoints and tags name them

    @classmethod
    @abstractmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        """With its examples out of `cache`; what is not there is prepared. Raises InputError and StorageError."""

    @classmethod
    def restored(cls, config: RunConfig, directory: Path, cache: Path) -> Self:
        """To ask a trained model without its examples, which may be gone: with what `save` wrote into the checkpoint
        `directory`; here of a task that needs nothing to be written. Raises InputError and CheckpointError."""
        return cls.open(config, cache)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """What is known of the examples without preparing them; here of a task that opens in no time. Raises
        InputError for what cannot be used."""
        task = cls.open(config, cache)
        order = task.order()
        return Preview(
            config=config,
            vocab_size=task.network_config.vocab_size,
            network=task.network_config,
            prepared=True,
            examples=("examples", task.about),
            order=order,
            step=f"{order.tokens_per_step:,} tokens",
            evaluated_tokens=0,
            written_tokens=0,
        )

    # What a run is made of

    @classmethod
    def network_before_examples(cls, config: RunConfig) -> CustomTransformerConfig | None:
        """The network of a run, where its config alone says it; None where its examples add to it."""
        return None

    @property
    @abstractmethod
    def network_config(self) -> CustomTransformerConfig:
        """The network that the config and the examples ask for. Raises ConfigError where they do not fit."""

    @abstractmethod
    def build_model(self) -> NetworkWrapper:
        """A new model with that network: its head and its loss are those that this task's batches want."""

    @abstractmethod
    def order(self, repeat: int | None = None) -> Order:
        """In which order a run meets the training examples; `repeat`: only the first so many steps, again and again.

        Raises InputError where there are too few.
        """

    def check(self) -> None:  # noqa: B027  examples that are made here are as they should be
        """Before a run starts: InputError where the validation split cannot be used."""

    # What it measures and predicts

    @abstractmethod
    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        """Over the validation split; with `limit`, over its first so many batches."""

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """A trained model on the split train, validation or test; with `limit`, on its first so many batches, and with
        so many `predictions`. Here, what a run measures itself. Raises InputError where there is no such split."""
        if split != "validation":
            raise InputError(f"task={self.config.task.name} measures its validation split alone")
        evaluated = self.evaluate(model, limit)
        metrics = {name.removeprefix("validation/"): value for name, value in evaluated.metrics.items()}
        shown = tuple(self.predictions(model)[:predictions])
        return Measured(split, (), evaluated.summary, metrics, limit is None, predictions=shown)

    def token_by_token(self, model: Any, split: str, count: int, likeliest: int) -> Iterator[ShownToken]:
        """The first `count` targets of a split, as they are evaluated: for a task with `--tokens` among its options."""
        raise NotImplementedError

    def predictor(self, model: Any) -> Predictor:
        """What answers `predict`: of a task that says in `asked_with` that it is asked by that."""
        raise NotImplementedError

    def writer(self, model: Any) -> Writer:
        """What answers `generate --source`, likewise."""
        raise NotImplementedError

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """How a model reads a text that somebody typed, the first `most` places of it. Raises InputError where a task
        reads none."""
        raise InputError(f"a model of task={self.config.task.name} reads no text that could be typed")

    def unsmoothed_loss(self, model: NetworkWrapper, batches: Iterable[AnyBatch]) -> float:
        """Of a training step's batches, without label smoothing and dropout: what can be compared with validation."""
        return Evaluator(model).evaluate(batches).loss

    @abstractmethod
    def predictions(self, model: Any) -> list[str]:
        """What the model makes of some examples, as texts for a reader. The same model, the same texts."""

    def in_one_line(self, prediction: str) -> str:
        """Of a prediction what is shown while a run goes on."""
        return " ".join(prediction.split())

    def final(self, model: Any, directory: Path) -> Final:
        """At the end of a run, once: what else is measured, and pictures, which are written into `directory`."""
        return Final()

    @abstractmethod
    def example(self, device: torch.device) -> AnyBatch:
        """A batch of one validation row, always the same, at which a network is looked at."""

    @abstractmethod
    def text(self, batch: AnyBatch, positions: int) -> str:
        """The first so many positions of a batch's first row, as a reader sees them."""

    # What is said and saved of it

    @property
    @abstractmethod
    def about(self) -> str:
        """The examples in one line."""

    @property
    def baselines(self) -> str:
        """What simple methods reach on the same examples, in one line; empty where nobody has measured it."""
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads a run's results must know of the examples."""
        return ()

    @property
    def profile(self) -> Mapping[str, int]:
        """Numbers that depend on nothing but the data."""
        return {}

    @property
    def data_tags(self) -> Mapping[str, str]:
        """What depends on the run's config too."""
        return {}

    @property
    def source(self) -> tuple[str, str | None]:
        """What the examples are called, and where they lie, if they are the user's own."""
        return self.config.task.name, None

    def save(self, directory: Path) -> None:  # noqa: B027  a task without files has nothing to write
        """Writes `files`: what a model needs beside its parameters."""

    def refuse_other_examples(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """ConfigError where a checkpoint with this state was made with other examples than these."""
        differing = [name.removesuffix("_digest") for name, digest in self.digests.items() if state.get(name) != digest]
        if differing:
            way_out = f"bring back that of {checkpoint}, or start a new run"
            raise ConfigError([f"{name}: what this task learns from is another one; {way_out}" for name in differing])
