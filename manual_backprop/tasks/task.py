"""The interface between a run and its task: the runner, its report, its state and its summary use only this class.

A batch's type says what it holds, and the network's `loss_and_gradients` takes it directly. The training loss is that
of the network's head, which the task chooses when it builds the model. Each task defines its own metrics and the texts
that a reader sees.
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
from ..data.tokens.order import Order, Padded, Repeated, RowsOfLengths
from ..models.wrappers.building import build_wrapper
from ..models.wrappers.wrapper import NetworkWrapper
from .evaluation import Evaluator, ShownToken
from .inference import Predictor, Reading, Writer
from .preview import Preview, rows_of_a_step

TOKENIZER_REFUSAL = "tokenizer: it has changed; bring back that of {}, or start a new run"


@dataclass(frozen=True)
class Evaluated:
    """The results of an evaluation on the validation split."""

    metrics: Mapping[str, float]  # by the names of a run's metrics: validation/loss, and the task's own
    sentence: str  # the same for a reader, in one line
    summary: tuple[tuple[str, str], ...]  # as rows of title and text, for the page at the end of a run
    short: str = ""  # in a few words, beside the losses of an epoch


@dataclass(frozen=True)
class Final:
    """What a task adds at the end of a completed run."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    summary: tuple[tuple[str, str], ...] = ()  # further rows of the page
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Measured:
    """The results of a trained model on one split, as `evaluate` shows and logs them."""

    title: str  # the split and its size
    headings: tuple[str, ...]  # of the table's columns; empty if the rows need none
    rows: tuple[tuple[str, ...], ...]
    metrics: Mapping[str, float]  # by names without a prefix: loss is logged as evaluation/SPLIT_loss
    whole: bool = True  # False: only the first batches of the split
    notes: tuple[str, ...] = ()  # about the split and the metrics, for a reader
    predictions: tuple[str, ...] = ()  # one line each


class Task(ABC):
    """A task, opened for the config of one run. It does not change during the run."""

    evaluate_options: tuple[str, ...] = ("--predictions",)  # options of `evaluate` that this task supports
    inference_command = ("generate", "--prompt", "Return the")  # for a trained model: command, option, an example
    signature: Mapping[str, Any] | None = None  # of MLflow's model: inputs, outputs, params; None: text to text
    best_metric = "validation/loss"  # the metric that chooses the best checkpoint
    best_is_highest = False  # whether the highest value of that metric is the best, or the lowest
    predictions_title = "a sample"
    files: tuple[str, ...] = ()  # the files that `save` writes; every checkpoint has a copy
    refusals: Mapping[str, str] = {}  # by names of `digests`: about a checkpoint {} with another one

    config: RunConfig
    digests: Mapping[str, str]  # SHA-256 of everything that determines the examples, by their names in checkpoints

    @classmethod
    @abstractmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        """The task with its examples from `cache`, prepared now if necessary. Raises InputError and StorageError."""

    @classmethod
    def restored(cls, config: RunConfig, directory: Path, cache: Path) -> Self:
        """The task without its examples, for inference with a trained model, from the files that `save` wrote into the
        checkpoint `directory`. The default is for a task without files. Raises InputError and CheckpointError."""
        return cls.open(config, cache)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Estimates about a run without preparing its examples. The default is for a task that opens quickly. Raises
        InputError for data that cannot be used."""
        task = cls.open(config, cache)
        order = task.order()
        step = f"{order.tokens_per_step:,} tokens"
        return Preview(config, task.network_config, ("examples", task.about), order, step)

    def previewed(self, examples: str, rows: str, unit: str = "tokens", **more: Any) -> Preview:
        """The preview of this task. `examples`: what they are called. `rows`: what the rows of a step hold. `more`:
        further fields of Preview."""
        order = self.order()
        step = f"about {order.tokens_per_step:,} {unit}: {rows_of_a_step(self.config)} {rows}"
        return Preview(self.config, self.network_config, (examples, self.about), order, step, **more)

    # The parts of a run

    @classmethod
    def network_before_examples(cls, config: RunConfig) -> CustomTransformerConfig | None:
        """The network of a run from its config alone; None if its examples add to it."""
        return None

    @property
    @abstractmethod
    def network_config(self) -> CustomTransformerConfig:
        """The network's config, from the run's config and the examples. Raises ConfigError if they do not fit."""

    def network_of_tokenizer(self, tokens: int, **fields: Any) -> CustomTransformerConfig:
        """The `network_config` for a tokenizer's number of tokens. `fields` are those of `RunConfig.network_config`."""
        wanted = self.config.model.vocab_size
        if wanted is not None and wanted < tokens:
            raise ConfigError(
                [
                    f"model.vocab_size={wanted}: the tokenizer has {tokens} tokens; give at least {tokens}, or "
                    "null for exactly as many"
                ]
            )
        return self.config.network_config(tokens, **fields)

    def build_model(self) -> Any:
        """A new model with `network_config`, whose head and loss fit this task's batches: a network in its wrapper."""
        return build_wrapper(self.config.implementation.name, self.network_config)

    @abstractmethod
    def order(self, repeat: int | None = None) -> Order:
        """The order of the training examples; `repeat`: use only the first `repeat` steps, repeatedly.

        Raises InputError if there are too few examples.
        """

    def every_row(self, rows: RowsOfLengths, longest: int, repeat: int | None) -> Order:
        """The `order` in which each epoch has every row once. A step has rows of all lengths (bucket=1): with rows of
        one length in each step, training is slower."""
        config, training = self.config, self.config.training
        sizes = training.batch_size, training.gradient_accumulation_steps
        order: Order = Padded(rows, longest, config.seed, *sizes, bucket=1)
        return order if repeat is None else Repeated(order, repeat)

    def check(self) -> None:  # noqa: B027  generated examples need no check
        """Called before a run starts. Raises InputError if the validation split cannot be used."""

    # Metrics and predictions

    @abstractmethod
    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        """Evaluate a model on the first `limit` batches of the validation split (None: on all)."""

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """Measure a trained model on the first `limit` batches (None: on all) of the split train, validation or test,
        and add `predictions` lines of predictions. The default measures the same as `evaluate`. Raises InputError if
        there is no such split."""
        if split != "validation":
            raise InputError(f"task={self.config.task.name} can only be measured on its validation split")
        evaluated = self.evaluate(model, limit)
        metrics = {name.removeprefix("validation/"): value for name, value in evaluated.metrics.items()}
        shown = tuple(self.predictions(model)[:predictions])
        return Measured(split, (), evaluated.summary, metrics, limit is None, predictions=shown)

    def token_by_token(self, model: Any, split: str, count: int, likeliest: int) -> Iterator[ShownToken]:
        """The first `count` targets of a split, for a task with `--tokens` in its `evaluate_options`."""
        raise NotImplementedError

    def predictor(self, model: Any) -> Predictor:
        """The predictor for `predict`, for a task whose `inference_command` is that."""
        raise NotImplementedError

    def writer(self, model: Any) -> Writer:
        """The writer for `generate --source`, for a task whose `inference_command` is that."""
        raise NotImplementedError

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """A typed text as the model reads it, up to `most` positions. Raises InputError if the task reads no text."""
        raise InputError(f"a model of task={self.config.task.name} reads no text")

    def unsmoothed_loss(self, model: NetworkWrapper, batches: Iterable[AnyBatch]) -> float:
        """The loss of a training step without label smoothing and dropout, comparable with the validation loss."""
        return Evaluator(model).evaluate(batches).loss

    @abstractmethod
    def predictions(self, model: Any) -> list[str]:
        """The model's predictions for some examples, as texts for a reader. They depend on the model alone."""

    def in_one_line(self, prediction: str) -> str:
        """A prediction in one line, as shown during a run."""
        return " ".join(prediction.split())

    def final(self, model: Any, directory: Path) -> Final:
        """Further metrics at the end of a run, and pictures, which are written into `directory`."""
        return Final()

    @abstractmethod
    def example(self, device: torch.device) -> AnyBatch:
        """A batch of one validation row, always the same, on which a network is inspected."""

    @abstractmethod
    def text(self, batch: AnyBatch, positions: int) -> str:
        """The first `positions` positions of a batch's first row, as text."""

    # Descriptions and files

    @property
    @abstractmethod
    def about(self) -> str:
        """The examples in one line."""

    @property
    def baselines(self) -> str:
        """The metrics of simple methods on the same examples, in one line; empty if not measured."""
        return ""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on the examples, for readers of a run's results."""
        return ()

    @property
    def profile(self) -> Mapping[str, int]:
        """Numbers that depend on the data alone, for MLflow."""
        return {}

    @property
    def data_tags(self) -> Mapping[str, str]:
        """Tags of the data that also depend on the run's config, for MLflow."""
        return {}

    @property
    def source(self) -> tuple[str, str | None]:
        """The name of the examples, and their path if they are the user's own."""
        return self.config.task.name, None

    def save(self, directory: Path) -> None:  # noqa: B027  a task without files has nothing to write
        """Write `files`: what a model needs in addition to its parameters."""

    def refuse_other_examples(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Raise ConfigError if a checkpoint with this state was trained on other examples."""
        if differing := self.different_examples(state, checkpoint):
            raise ConfigError(differing)

    def different_examples(self, state: Mapping[str, Any], checkpoint: Path) -> list[str]:
        """One sentence for each of the `digests` that is not the one of a checkpoint with this state."""
        usual = "{}: it is not the one of the checkpoint; bring back that of {{}}, or start a new run"
        return [
            self.refusals.get(name, usual.format(name.removesuffix("_digest"))).format(checkpoint)
            for name, digest in self.digests.items()
            if state.get(name) != digest
        ]
