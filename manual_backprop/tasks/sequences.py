"""task=reversal, copy and sort: transform a sequence of symbols, learned from examples that the seed draws.

With an encoder-decoder the row is the source and the result the target; with network=decoder both are in one sequence,
with a separator between them. The loss is cross-entropy over the target and its end, with teacher forcing: each token
is predicted from the true ones before it. The main metric is exact match: the share of rows that the model generates
without a mistake, each token from its own ones before it (free-running).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..common.batch import IGNORED, AnyBatch, Batch, EncoderBatch, PairBatch
from ..common.errors import ConfigError, InputError
from ..common.processes import processes
from ..config.schema import CustomTransformerConfig, RunConfig
from ..data.tokens.order import Order, Padded, Repeated
from ..models.wrappers.building import build_wrapper
from .evaluation import Evaluation, Evaluator
from .inference import Reading, Writer
from .preview import Preview, rows_of_a_step
from .sequence_pictures import CROSS_ATTENTION, draw_cross_attention, measure_cross_attention
from .sequence_rows import TRANSFORMS, Rows, Vocabulary, draw_rows
from .task import Evaluated, Final, Measured, Task

MEASURED_ROWS = 500  # in one batch
SHOWN = 10  # predictions


class SequenceTask(Task):
    """The transformation of sequences that a run's config names."""

    inference_command = ("generate", "--source", "1 2 3 4")
    best_metric = "validation/exact_match"
    best_is_highest = True
    predictions_title = "predictions on validation rows"

    def __init__(self, config: RunConfig):
        task = config.task
        self.config, self.words = config, Vocabulary(task.symbols or 0, config.network_name)
        described = json.dumps(asdict(task) | {"seed": config.seed}, sort_keys=True)
        self.digests = {"dataset_digest": hashlib.sha256(described.encode()).hexdigest()}

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Exact numbers, since drawing rows is fast."""
        task = cls(config)
        order, rows = task.order(), task.validation
        longest = int(config.task.max_length or 0)
        return Preview(
            config=config,
            vocab_size=task.words.size,
            prepared=True,
            examples=("rows", task.about),
            order=order,
            step=f"about {order.tokens_per_step:,} tokens: {rows_of_a_step(config)} rows of at most {longest} symbols",
            evaluated_tokens=2 * int(rows.lengths.sum() - len(rows)),  # read once, and generated once
            generated_tokens=-(-len(rows) // MEASURED_ROWS) * (longest + 1),
        )

    # The parts of a run

    @classmethod
    def network_before_examples(cls, config: RunConfig) -> CustomTransformerConfig:
        return cls(config).network_config

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.config.network_config(self.words.size)

    def build_model(self) -> Any:
        return build_wrapper(self.config.implementation.name, self.network_config)

    @cached_property
    def training(self) -> Rows:
        return self._rows("training")

    @cached_property
    def validation(self) -> Rows:
        return self._rows("validation")

    @cached_property
    def test(self) -> Rows:
        return self._rows("test")

    def _rows(self, split: str) -> Rows:
        return draw_rows(self.config.task, split, self.config.seed, self.words.network)

    def split(self, name: str) -> Rows:
        return {"train": self.training, "validation": self.validation, "test": self.test}[name]

    def order(self, repeat: int | None = None) -> Order:
        training, rows = self.config.training, self.training
        # bucket=1: a step has rows of all lengths; with rows of one length in each step, training is slower
        order: Order = Padded(
            rows,
            int(rows.lengths.max()),
            self.config.seed,
            training.batch_size,
            training.gradient_accumulation_steps,
            bucket=1,
        )
        return order if repeat is None else Repeated(order, repeat)

    def check(self) -> None:
        """Nothing: the validation of the config has checked everything."""

    # Metrics and predictions

    def batches(
        self, rows: Rows, device: torch.device | str, count: int | None = None, size: int = MEASURED_ROWS
    ) -> Iterator[AnyBatch]:
        """The first `count` rows in order (None: all), in batches of `size`."""
        for numbers in np.split(np.arange(len(rows))[:count], range(size, min(count or len(rows), len(rows)), size)):
            yield rows.batch(numbers, rows.source_lengths[numbers] + 1, device=device)

    def generated(self, model: Any, rows: Rows, count: int, **options: Any) -> list[list[int]]:
        """The model's generated targets for the first `count` rows. `options` are those of `generate`."""
        sources = rows.sources(np.arange(min(count, len(rows))))
        at_once = min(MEASURED_ROWS, -(-len(sources) // processes().size) or 1)
        parts = [sources[first : first + at_once] for first in range(0, len(sources), at_once)]
        generated = processes().mapped(lambda part: self.generate_targets(model, part, **options), parts)
        return [row for part in generated for row in part]

    def symbols_of(self, text: str) -> list[int]:
        """The symbols of a typed row: numbers separated by spaces or commas. Raises InputError."""
        symbols = self.config.task.symbols or 0
        words = text.replace(",", " ").split()
        for word in words:
            if not word.isdecimal() or int(word) >= symbols:
                raise InputError(
                    f"{word!r}: is not a symbol of this run; a source consists of the numbers 0 to {symbols - 1}, "
                    'separated by spaces, as in "1 2 3 4"'
                )
        longest = self.config.task.max_length or 0
        if len(words) > longest:
            raise InputError(f"a source of {len(words)} symbols: this run was trained on rows of at most {longest}")
        if not words:
            raise InputError('an empty source: give the numbers of a row, as in "1 2 3 4"')
        return [int(word) for word in words]

    def target_of(self, source: Sequence[int]) -> list[int]:
        """The correct target of a source."""
        return TRANSFORMS[self.config.task.name](np.array([source]), np.array([len(source)]))[0].tolist()

    def generate_targets(self, model: Any, sources: Sequence[Sequence[int]], **options: Any) -> list[list[int]]:
        """The model's generated target for each source, up to its end token or the longest target of the task."""
        most, words = int(self.config.task.max_length or 0) + 1, self.words
        if words.network != "decoder":
            drawn = model.generate([list(source) for source in sources], max_new_tokens=most, **options)
            return [words.generated(row) for row in drawn.tolist()]
        found: dict[int, list[int]] = {}
        lengths = np.array([len(source) for source in sources])
        options = {"temperature": 0.0} | options
        for length in np.unique(lengths):  # a decoder needs prompts of equal length in a batch
            same = np.flatnonzero(lengths == length)
            prompts = torch.tensor(
                [[*sources[row], words.separator] for row in same.tolist()], device=model.network.device
            )
            drawn = model.generate(prompts, most, eos_token_id=words.end, **options)[:, length + 1 :]
            found |= {int(row): words.generated(tokens) for row, tokens in zip(same, drawn.tolist(), strict=True)}
        return [found[row] for row in range(len(sources))]

    def exact_match(self, model: Any, rows: Rows, count: int | None = None) -> float:
        """The share of rows that the model generates without a mistake."""
        generated = self.generated(model, rows, len(rows) if count is None else count)
        wanted = rows.targets(np.arange(len(generated)))
        return sum(map(list.__eq__, generated, wanted)) / max(1, len(wanted))

    def measure(self, model: Any, rows: Rows, count: int | None = None) -> tuple[Evaluation, float]:
        """Teacher-forced loss and accuracy, and free-running exact match, on the first `count` rows."""
        evaluation = Evaluator(model).evaluate(processes().part_of(self.batches(rows, model.network.device, count)))
        return evaluation, self.exact_match(model, rows, count)

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        count = None if limit is None else limit * self.config.training.batch_size
        evaluation, exact = self.measure(model, self.validation, count)
        rows = min(len(self.validation), count or len(self.validation))
        metrics = {name: value for name, value in evaluation.metrics().items() if not name.endswith("perplexity")}
        return Evaluated(
            metrics=metrics | {self.best_metric: exact},
            sentence=f"validation loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.4f} with teacher forcing, "
            f"exact match {exact:.1%} of {rows:,} rows",
            summary=(
                ("exact match", f"{exact:.2%} of {rows:,} validation rows, generated token by token without a mistake"),
                ("", f"with teacher forcing: accuracy {evaluation.accuracy:.2%}, loss {evaluation.loss:.4f}"),
            ),
            short=f"exact match {exact:.1%}",
        )

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """Accuracy and loss with teacher forcing, and free-running exact match."""
        rows = self.split(split)
        count = len(rows) if limit is None else min(len(rows), limit * self.config.training.batch_size)
        evaluation, exact = self.measure(model, rows, count)
        return Measured(
            title=f"{split}: {count:,} rows" + (f" of {len(rows):,}" if count < len(rows) else ""),
            headings=(),
            rows=(
                ("exact match", f"{exact:.2%} of the rows, each token after the model's own (free-running)"),
                (
                    "accuracy",
                    f"{evaluation.accuracy:.2%} of {evaluation.tokens:,} tokens, each after the true ones "
                    "(teacher forcing)",
                ),
                ("loss", f"{evaluation.loss:.4f} nats per token, with teacher forcing"),
            ),
            metrics={
                "exact_match": exact,
                "loss": evaluation.loss,
                "accuracy": evaluation.accuracy,
                "rows": float(count),
            },
            whole=count == len(rows),
            predictions=tuple(self.shown_rows(model, rows, predictions)),
        )

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """The numbers of a row, and the target that the model generates for them."""
        words, row = self.words, self.symbols_of(text)
        (generated,) = self.generate_targets(model, [row])

        def named(tokens: Sequence[int]) -> list[str]:
            return [words.words([token]) for token in tokens]

        decoder = words.network == "decoder"
        target = ([*row, words.separator, *generated] if decoder else [words.beginning, *generated])[:most]
        tokens = torch.tensor([target])
        nothing = torch.full_like(tokens, IGNORED)
        if decoder:
            return Reading(Batch(tokens, nothing), named(target), (), lambda token: words.words([token]))
        batch = PairBatch(torch.tensor([row]), torch.tensor([len(row)]), tokens, nothing)
        return Reading(batch, named(target), named(row), lambda token: words.words([token]))

    def writer(self, model: Any) -> Writer:
        return SequenceWriter(self, model)

    def predictions(self, model: Any) -> list[str]:
        """Ten validation rows as one text: what the model generates, and whether it is right."""
        return ["\n".join(self.shown_rows(model, self.validation, SHOWN))]

    def in_one_line(self, prediction: str) -> str:
        return prediction.partition("\n")[0]

    def shown_rows(self, model: Any, rows: Rows, count: int) -> list[str]:
        """One line for each of the first `count` rows."""
        generated = self.generated(model, rows, count)
        numbers = np.arange(len(generated))
        return list(map(self.shown, rows.sources(numbers), rows.targets(numbers), generated))

    def shown(self, source: Sequence[int], wanted: Sequence[int], found: Sequence[int]) -> str:
        words = self.words.words
        verdict = "\u2713" if list(found) == list(wanted) else f"\u2717  expected {words(wanted)}"
        return f"{words(source)} -> {words(found)}  {verdict}"

    def final(self, model: Any, directory: Path) -> Final:
        """Exact match on the test rows, and the cross-attention of one of them as a picture."""
        exact = self.exact_match(model, self.test)
        metrics = {"test/exact_match": exact}
        summary = [("test rows", f"exact match {exact:.2%} of {len(self.test):,}, on which no run trains")]
        pictures: list[Path] = []
        if (seen := measure_cross_attention(model.network, self.test)) is not None:
            if draw_cross_attention(seen, path := directory / CROSS_ATTENTION, self.config.task.name):
                pictures.append(path)
            if seen.best_share is not None:
                metrics["test/cross_attention_share"] = seen.best_share
                summary.append(("", seen.sentence))
        return Final(metrics, tuple(summary), tuple(pictures))

    def example(self, device: torch.device) -> AnyBatch:
        """The first validation row."""
        return next(self.batches(self.validation, device, count=1))

    def text(self, batch: AnyBatch, positions: int) -> str:
        assert not isinstance(batch, EncoderBatch)
        return self.words.words(batch.tokens[0, :positions].tolist())

    # Descriptions and files

    @property
    def about(self) -> str:
        task = self.config.task
        return (
            f"{task.name} of {task.min_length} to {task.max_length} of {task.symbols} symbols: {task.training_rows:,} "
            f"rows for training, {task.validation_rows:,} for validation, {task.test_rows:,} for the test"
        )

    @property
    def baselines(self) -> str:
        symbols = self.config.task.symbols or 0
        return f"guessing: loss {math.log(symbols + 1):.3f}, accuracy {1 / (symbols + 1):.3f}, exact match 0%"

    notes: tuple[str, ...] = ()

    @property
    def profile(self) -> Mapping[str, int]:
        return {
            "symbols": int(self.config.task.symbols or 0),
            "training_rows": int(self.config.task.training_rows or 0),
        }

    @property
    def data_tags(self) -> Mapping[str, str]:
        return {name: str(value) for name, value in asdict(self.config.task).items() if name != "name"}

    def save(self, directory: Path) -> None:
        """Nothing: the config says which symbols there are."""

    def refuse_other_examples(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        if state.get("dataset_digest") != self.digests["dataset_digest"]:
            raise ConfigError([f"task: its rows differ from those of {checkpoint}; start a new run"])


class SequenceWriter(Writer):
    """The answer of a trained model to a typed row of symbols."""

    def __init__(self, task: SequenceTask, model: Any):
        self.task, self.model = task, model

    def write(self, source: str, **drawing: Any) -> str:
        """The source, the generated target, and whether it is right."""
        symbols = self.task.symbols_of(source)
        (generated,) = self.task.generate_targets(self.model, [symbols], **drawing)
        return self.task.shown(symbols, self.task.target_of(symbols), generated)
