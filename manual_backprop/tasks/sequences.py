"""task=reversal, copy and sort: transform a sequence of symbols, learned from examples that the seed draws.

With an encoder-decoder the row is the source and the result the target; with network=decoder both are in one sequence,
with a separator between them. The main metric is exact match: the share of rows that the model generates without a
mistake.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ..common.batch import IGNORED, AnyBatch, Batch, EncoderBatch, PairBatch
from ..common.errors import InputError
from ..config.schema import CustomTransformerConfig, RunConfig
from .inference import Reading, Writer
from .pairs import PairTask, metrics_of, shown, teacher_forced_line, teacher_forced_rows
from .preview import Preview
from .sequence_pictures import CROSS_ATTENTION, draw_cross_attention, measure_cross_attention
from .sequence_rows import TRANSFORMS, Rows, Vocabulary, draw_rows
from .task import Evaluated, Final, Measured


class SequenceTask(PairTask):
    """The transformation of sequences that a run's config names."""

    inference_command = ("generate", "--source", "1 2 3 4")
    best_metric = "validation/exact_match"
    refusals: Mapping[str, str] = {"dataset_digest": "task: its rows differ from those of {}; start a new run"}

    def __init__(self, config: RunConfig):
        task = config.task
        self.config, self.words = config, Vocabulary(task.symbols or 0, config.network_name)
        self._rows: dict[str, Rows] = {}
        described = json.dumps(asdict(task) | {"seed": config.seed}, sort_keys=True)
        self.digests = {"dataset_digest": hashlib.sha256(described.encode()).hexdigest()}

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Exact numbers, since drawing rows is fast."""
        longest = int(config.task.max_length or 0)
        return cls(config).previewed_pairs("rows", f"rows of at most {longest} symbols", longest + 1)

    # The parts of a run

    @classmethod
    def network_before_examples(cls, config: RunConfig) -> CustomTransformerConfig:
        return cls(config).network_config

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.config.network_config(self.words.size)

    def rows(self, split: str) -> Rows:
        if split not in self._rows:
            name = "training" if split == "train" else split
            self._rows[split] = draw_rows(self.config.task, name, self.config.seed, self.words.network)
        return self._rows[split]

    # Metrics and predictions

    def generated(self, model: Any, rows: Rows, count: int | None = None) -> list[list[int]]:
        """The model's generated targets for the first `count` rows (None: all)."""
        sources = rows.sources(np.arange(len(rows))[:count])
        return self.in_parts(lambda part: self.generate_targets(model, part), sources)

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
        generated = self.generated(model, rows, count)
        wanted = rows.targets(np.arange(len(generated)))
        return sum(map(list.__eq__, generated, wanted)) / max(1, len(wanted))

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        count = None if limit is None else limit * self.config.training.batch_size
        rows = self.rows("validation")
        evaluation, exact = self.teacher_forced(model, rows, count), self.exact_match(model, rows, count)
        of = f"{min(len(rows), count or len(rows)):,}"
        return Evaluated(
            metrics=metrics_of(evaluation) | {self.best_metric: exact},
            sentence=f"validation loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.4f} with teacher forcing, "
            f"exact match {exact:.1%} of {of} rows",
            summary=(
                ("exact match", f"{exact:.2%} of {of} validation rows, generated token by token without a mistake"),
                teacher_forced_line(evaluation),
            ),
            short=f"exact match {exact:.1%}",
        )

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """Accuracy and loss with teacher forcing, and free-running exact match."""
        rows = self.rows(split)
        count = len(rows) if limit is None else min(len(rows), limit * self.config.training.batch_size)
        evaluation, exact = self.teacher_forced(model, rows, count), self.exact_match(model, rows, count)
        values = {"exact_match": exact, "loss": evaluation.loss, "accuracy": evaluation.accuracy}
        return Measured(
            title=f"{split}: {count:,} rows" + (f" of {len(rows):,}" if count < len(rows) else ""),
            headings=(),
            rows=(
                ("exact match", f"{exact:.2%} of the rows, each token after the model's own (free-running)"),
                *teacher_forced_rows(evaluation),
            ),
            metrics=values | {"rows": float(count)},
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

    def shown_rows(self, model: Any, rows: Rows, count: int) -> list[str]:
        generated = self.generated(model, rows, count)
        numbers = np.arange(len(generated))
        return list(map(self.shown, rows.sources(numbers), rows.targets(numbers), generated))

    def shown(self, source: Sequence[int], wanted: Sequence[int], found: Sequence[int]) -> str:
        return shown(*map(self.words.words, (source, wanted, found)))

    def final(self, model: Any, directory: Path) -> Final:
        """Exact match on the test rows, and the cross-attention of one of them as a picture."""
        rows, pictures = self.rows("test"), list[Path]()
        exact = self.exact_match(model, rows)
        metrics = {"test/exact_match": exact}
        summary = [("test rows", f"exact match {exact:.2%} of {len(rows):,}, on which no run trains")]
        if (seen := measure_cross_attention(model.network, rows)) is not None:
            if draw_cross_attention(seen, path := directory / CROSS_ATTENTION, self.config.task.name):
                pictures.append(path)
            if seen.best_share is not None:
                metrics["test/cross_attention_share"] = seen.best_share
                summary.append(("", seen.sentence))
        return Final(metrics, tuple(summary), tuple(pictures))

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

    @property
    def profile(self) -> Mapping[str, int]:
        return {name: int(getattr(self.config.task, name) or 0) for name in ("symbols", "training_rows")}

    @property
    def data_tags(self) -> Mapping[str, str]:
        return {name: str(value) for name, value in asdict(self.config.task).items() if name != "name"}


class SequenceWriter(Writer):
    """The answer of a trained model to a typed row of symbols."""

    def __init__(self, task: SequenceTask, model: Any):
        self.task, self.model = task, model

    def write(self, source: str, **drawing: Any) -> str:
        """The source, the generated target, and whether it is right."""
        symbols = self.task.symbols_of(source)
        (generated,) = self.task.generate_targets(self.model, [symbols], **drawing)
        return self.task.shown(symbols, self.task.target_of(symbols), generated)
