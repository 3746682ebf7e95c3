"""task=translation: translate a source text into a target text, token by token.

The main metrics are those of the text that the model generates by itself: exact match, and chrF, which chooses the best
checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from ...common.batch import IGNORED, AnyBatch, PairBatch
from ...common.errors import ConfigError, InputError
from ...config.schema import CustomTransformerConfig, RunConfig
from ...data.tokens.pair_corpus import PairCorpus, Tokenizers, open_test_split, prepare_pairs, preview_pairs
from ..evaluation import Evaluation
from ..inference import Reading, Writer
from ..pairs import MEASURED_ROWS, PairTask, metrics_of, shown, teacher_forced_line, teacher_forced_rows
from ..preview import Preview
from ..sequence_pictures import CROSS_ATTENTION, CrossAttention, cross_attention_of, draw_cross_attention
from ..task import Evaluated, Final, Measured
from .rows import SPECIAL, PairRows, TargetIds
from .scores import Scores, scores_of
from .writer import SIGNATURE, Translator

MEASURED_LOGITS = 2**26  # at most, in one batch
COPIED = 2000  # validation rows on which the baseline is measured
LONGEST_SEEN = 32  # tokens of a row in a picture


class TranslationTask(PairTask):
    """Translation of the pairs of a run's config."""

    best_metric = "validation/chrf"
    evaluate_options = ("--test", "--predictions")
    inference_command = ("generate", "--source", "a text to translate")
    signature = SIGNATURE
    refusals: Mapping[str, str] = {
        "dataset_digest": "dataset: the pairs, or the name of a file with them, have changed; bring back those of {}, "
        "or start a new run",
        "tokenizer_digest": "tokenizer: the tokenizers have changed; bring back those of {}, or start a new run",
    }

    def __init__(self, config: RunConfig, tokenizers: Tokenizers, corpus: PairCorpus | None, cache: Path):
        """`corpus` is None for inference with a trained model, which needs no examples."""
        self.config, self.tokenizers, self._corpus, self.cache = config, tokenizers, corpus, cache
        self._rows: dict[str, PairRows] = {}
        self.files = tokenizers.files
        self.digests = {"tokenizer_digest": tokenizers.digest}
        if corpus is not None:
            self.digests = {"dataset_digest": corpus.dataset_digest, **self.digests}

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        corpus = prepare_pairs(config.dataset, config.tokenizer, bool(config.task.shared_tokenizer), cache)
        return cls(config, corpus.tokenizers, corpus, cache)

    @classmethod
    def restored(cls, config: RunConfig, directory: Path, cache: Path) -> Self:
        return cls(config, Tokenizers.load(directory, bool(config.task.shared_tokenizer)), None, cache)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Exact numbers; pairs that are not in the cache are tokenized for this call only."""
        corpus = preview_pairs(config.dataset, config.tokenizer, bool(config.task.shared_tokenizer), cache)
        most = config.model.max_seq_len
        task = cls(config, corpus.tokenizers, corpus, cache)
        return task.previewed_pairs("pairs", f"pairs, no side longer than {most}", most)

    # The parts of a run

    @property
    def corpus(self) -> PairCorpus:
        assert self._corpus is not None, "a task that was restored has no examples"
        return self._corpus

    @property
    def network_config(self) -> CustomTransformerConfig:
        wanted, tokens = self.config.model.vocab_size, self.tokenizers.target.vocab_size + SPECIAL
        source = self.tokenizers.source.vocab_size
        if wanted is not None and wanted < tokens:
            raise ConfigError(
                [
                    f"model.vocab_size={wanted}: the targets' tokenizer has {tokens - SPECIAL} tokens, and padding, "
                    f"beginning and end are added to them; give at least {tokens}, or null for exactly as many"
                ]
            )
        return self.config.network_config(
            tokens,
            padding_token_id=TargetIds.of(wanted or tokens).padding,
            source_vocab_size=None if self.tokenizers.shared else source,
        )

    @property
    def special(self) -> TargetIds:
        return TargetIds.of(self.network_config.vocab_size)

    def rows(self, split: str) -> PairRows:
        """The rows of train, validation or test. Raises InputError if there is no such split, or a pair is too long."""
        if split not in self._rows:
            pairs = self.corpus.splits.get(split)
            if pairs is None:
                pairs, _ = open_test_split(self.config.dataset, self.corpus, self.cache)
            skip = self.config.dataset.on_bad_row == "skip"
            self._rows[split] = PairRows(pairs, self.network_config, skip, split)
        return self._rows[split]

    # Metrics and predictions

    @property
    def at_once(self) -> int:
        config = self.network_config
        return max(1, min(MEASURED_ROWS, MEASURED_LOGITS // (config.max_seq_len * config.vocab_size)))

    def source_tokens(self, text: str) -> list[int]:
        """The token ids of a source text. Raises InputError for a text that the network cannot read."""
        if not text.strip():
            raise InputError("an empty source: give the text to translate")
        tokens, most = self.tokenizers.source.encode(text), self.network_config.source_length
        if len(tokens) > most:
            raise InputError(f"a source of {len(tokens)} tokens: this model reads at most {most}; give a shorter one")
        return tokens

    def generate_targets(self, model: Any, sources: Sequence[str], **options: Any) -> list[str]:
        """The model's generated target for each source. `options` are those of `generate`."""
        return self._generated(model, [self.source_tokens(source) for source in sources], **options)

    def _generated(self, model: Any, sources: list[list[int]], **options: Any) -> list[str]:
        def texts(part: Sequence[list[int]]) -> list[str]:
            return [self.text_of(row) for row in model.generate(part, **options).tolist()]

        return self.in_parts(texts, sources)

    def text_of(self, tokens: Sequence[int]) -> str:
        """The text of generated target ids, up to the end token."""
        return self.tokenizers.target.decode(self.special.generated(tokens))

    def generated(self, model: Any, rows: PairRows, count: int | None = None) -> tuple[list[str], list[str]]:
        """The model's generated targets for the first `count` rows, and the true targets."""
        numbers = np.arange(len(rows))[:count]
        wanted = [self.tokenizers.target.decode(target) for target in rows.targets(numbers)]
        return self._generated(model, rows.sources(numbers)), wanted

    def measure(self, model: Any, rows: PairRows, count: int | None = None) -> tuple[Evaluation, dict[str, Scores]]:
        """Teacher-forced loss and accuracy on the first `count` rows, and the scores of generated targets: those of all
        rows under the name "", and those of each kind under its name."""
        evaluation = self.teacher_forced(model, rows, count)
        found, wanted = self.generated(model, rows, count)
        scores, kinds = {"": scores_of(found, wanted)}, rows.kinds[: len(found)]
        for number, name in enumerate(rows.split.kind_names):
            if name and (kinds == number).any():
                of_kind = np.flatnonzero(kinds == number)
                scores[name] = scores_of([found[row] for row in of_kind], [wanted[row] for row in of_kind])
        return evaluation, scores

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        count = None if limit is None else limit * self.config.training.batch_size
        evaluation, scores = self.measure(model, self.rows("validation"), count)
        of_all, kinds = scores[""], _by_kind(scores)
        return Evaluated(
            metrics=metrics_of(evaluation) | by_name(scores, "validation/"),
            sentence=f"validation loss {evaluation.loss:.4f}, accuracy {evaluation.accuracy:.4f} with teacher forcing; "
            f"exact match {of_all.exact_match:.1%}, chrF {of_all.chrf:.2f} of {of_all.texts:,} pairs{kinds}",
            summary=(
                (
                    "exact match",
                    f"{of_all.exact_match:.2%} of {of_all.texts:,} validation pairs, generated token by token{kinds}",
                ),
                ("chrF", f"{of_all.chrf:.2f} of 100"),
                teacher_forced_line(evaluation),
            ),
            short=f"exact match {of_all.exact_match:.1%}, chrF {of_all.chrf:.1f}",
        )

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """Accuracy and loss with teacher forcing, and free-running exact match and chrF."""
        rows = self.rows(split)
        count = len(rows) if limit is None else min(len(rows), limit * self.config.training.batch_size)
        evaluation, scores = self.measure(model, rows, count)
        values = by_name(scores, "")
        kinds = tuple(
            (kind, f"{one.exact_match:.2%} of {one.texts:,}, chrF {one.chrf:.2f}")
            for kind, one in scores.items()
            if kind
        )
        return Measured(
            title=f"{split}: {count:,} pairs" + (f" of {len(rows):,}" if count < len(rows) else ""),
            headings=(),
            rows=(
                (
                    "exact match",
                    f"{values['exact_match']:.2%} of the targets, each token after the model's own (free-running)",
                ),
                *kinds,
                ("chrF", f"{values['chrf']:.2f} of 100, free-running"),
                *teacher_forced_rows(evaluation),
            ),
            metrics={"loss": evaluation.loss, "accuracy": evaluation.accuracy, "pairs": float(count)} | values,
            whole=count == len(rows),
            notes=self._left_out(split),
            predictions=tuple(self.shown_rows(model, rows, predictions)),
        )

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """A source, and what the model writes of it itself."""
        whole = self.source_tokens(text)
        source = whole[:most]
        (drawn,) = model.generate([source]).tolist()
        target = [self.special.beginning, *self.special.generated(drawn)][:most]
        tokens = torch.tensor([target])
        nothing = torch.full_like(tokens, IGNORED)
        batch = PairBatch(torch.tensor([source]), torch.tensor([len(source)]), tokens, nothing)
        sides = [self.token(token) for token in target], [self.token(token, "source") for token in source]
        note = f"The first {most} of {len(whole)} tokens of the source." if len(whole) > most else ""
        return Reading(batch, *sides, self.token, note=note)

    def writer(self, model: Any) -> Writer:
        return Translator(partial(self.generate_targets, model))

    def shown_rows(self, model: Any, rows: PairRows, count: int) -> list[str]:
        found, wanted = self.generated(model, rows, count)
        sources = [self.tokenizers.source.decode(source) for source in rows.sources(np.arange(len(found)))]
        return list(map(shown, sources, wanted, found))

    def final(self, model: Any, directory: Path) -> Final:
        """The scores on the data's own test pairs, if there are any, and the cross-attention of one pair as a
        picture."""
        metrics: dict[str, float] = {}
        summary: list[tuple[str, str]] = []
        rows = self.rows("test" if "test" in self.corpus.splits else "validation")
        if "test" in self.corpus.splits:
            _, scores = self.measure(model, rows)
            of_all = scores[""]
            metrics = by_name(scores, "test/")
            text = f"exact match {of_all.exact_match:.2%}, chrF {of_all.chrf:.2f} of {of_all.texts:,} pairs"
            summary.append(("test pairs", f"{text}, on which no run trains{_by_kind(scores)}"))
        path = directory / CROSS_ATTENTION
        seen = self._cross_attention(model.network, rows)
        drawn = seen is not None and draw_cross_attention(seen, path, self.config.dataset.name)
        return Final(metrics, tuple(summary), (path,) if drawn else ())

    def _cross_attention(self, network: Any, rows: PairRows) -> CrossAttention | None:
        """The cross-attention of the longest pair, among the first ones, that fits into a picture."""
        first = np.arange(min(MEASURED_ROWS, len(rows)))
        lengths = np.maximum(rows.source_lengths[first], rows.target_lengths[first])
        number = int(np.where(lengths <= LONGEST_SEEN, lengths, -1).argmax())
        chosen = np.array([number])
        blocks = cross_attention_of(network, rows.batch(chosen, rows.target_lengths[chosen] + 1, device=network.device))
        if blocks is None:
            return None
        (source,), (target,) = rows.sources(chosen), rows.targets(chosen)
        names = [self.token(token, "source") for token in source]
        predicted = [*(self.token(token) for token in target), "end"]
        return CrossAttention(blocks[:, 0, :, : len(predicted), : len(names)], names, predicted, None, "")

    def text(self, batch: AnyBatch, positions: int) -> str:
        assert isinstance(batch, PairBatch)
        return " ".join(self.token(token) for token in batch.tokens[0, :positions].tolist())

    def token(self, token: int, side: str = "target") -> str:
        """A token's text with visible white space, or the name of a special token."""
        special = self.special
        names = {special.padding: "<pad>", special.beginning: "<bos>", special.end: "<eos>"}
        if side == "target" and token in names:
            return names[token]
        text = getattr(self.tokenizers, side).decode([token])
        return text.replace(" ", "\u2423").replace("\n", "\u23ce").replace("\t", "\u21e5")

    # Descriptions and files

    @property
    def about(self) -> str:
        splits = self.corpus.splits
        tokens = f"{self.tokenizers.target.vocab_size:,} tokens ({self.tokenizers.target.name})"
        if not self.tokenizers.shared:
            source = self.tokenizers.source
            tokens = f"{source.vocab_size:,} tokens ({source.name}) for sources, {tokens} for targets"
        counts = f"{len(splits['train']):,} pairs for training, {len(splits['validation']):,} for validation"
        test = f", {len(splits['test']):,} for the test" if "test" in splits else ""
        return f"{counts}{test}, {tokens}"

    @cached_property
    def baselines(self) -> str:
        rows = self.rows("validation")
        numbers = np.arange(len(rows))[:COPIED]
        sources = [self.tokenizers.source.decode(ids) for ids in rows.sources(numbers)]
        targets = [self.tokenizers.target.decode(ids) for ids in rows.targets(numbers)]
        copied = scores_of(sources, targets)
        return f"copying the source: exact match {copied.exact_match:.1%}, chrF {copied.chrf:.1f}"

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.corpus.notes, *self._left_out("train"), *self._left_out("validation"))

    def _left_out(self, split: str) -> tuple[str, ...]:
        rows = self.rows(split)
        if not rows.left_out:
            return ()
        count = f"{rows.left_out:,} of {len(rows.split):,} pairs of the {split} split"
        return (f"{count} are left out: a side is longer than the network reads",)

    @property
    def profile(self) -> Mapping[str, int]:
        return {f"{name}_pairs": len(split) for name, split in self.corpus.splits.items()} | dict(self.corpus.counts)

    @property
    def data_tags(self) -> Mapping[str, str]:
        sizes = {side: getattr(self.tokenizers, side).vocab_size for side in ("source", "target")}
        return {
            "tokenizer": self.tokenizers.target.name,
            "shared_tokenizer": str(self.tokenizers.shared).lower(),
            **{f"{side}_vocab_size": str(size) for side, size in sizes.items()},
        }

    @property
    def source(self) -> tuple[str, str | None]:
        dataset = self.config.dataset
        return dataset.name, None if dataset.format == "hub" else dataset.path

    def save(self, directory: Path) -> None:
        """Write the tokenizers of both sides."""
        self.tokenizers.save(directory)


def by_name(scores: Mapping[str, Scores], prefix: str) -> dict[str, float]:
    """Metrics by name: exact_match and chrf of all texts, exact_match_KIND of each kind."""
    values = {"exact_match": scores[""].exact_match, "chrf": scores[""].chrf}
    values |= {f"exact_match_{kind}": one.exact_match for kind, one in scores.items() if kind}
    return {f"{prefix}{name}": value for name, value in values.items()}


def _by_kind(scores: Mapping[str, Scores]) -> str:
    kinds = [f"{kind} {one.exact_match:.2%}" for kind, one in scores.items() if kind]
    return f" ({', '.join(kinds)})" if kinds else ""
