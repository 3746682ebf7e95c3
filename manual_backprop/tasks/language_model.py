"""task=language_model: predict the next token at each position of a text.

Examples are windows or documents of a corpus; the loss is cross-entropy over the vocabulary; the baselines are a
unigram and a bigram model. Predictions are continuations of the run's prompts.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch

from ..common.batch import AnyBatch, Batch
from ..common.processes import processes
from ..config.schema import CustomTransformerConfig, RunConfig
from ..config.validation import FIXED_VOCABULARIES
from ..data.tokens.corpus import Corpus, prepare_corpus
from ..data.tokens.order import Order, evaluation_batches, evaluation_targets, open_order
from ..data.tokens.text_size import TextSize, text_size
from ..data.tokens.token_cache import Split
from ..models.wrappers.language_model import LanguageModel
from .evaluation import Evaluation, Evaluator, ShownToken, shown_tokens, unigram_and_bigram_loss
from .preview import EstimatedOrder, Preview, most_tokens, rows_of_a_step
from .samples import draw_samples, encode_prompts
from .task import TOKENIZER_REFUSAL, Evaluated, Measured, Task

NGRAM_ROWS = 256  # sequences in a batch for the unigram and bigram models


class LanguageModelTask(Task):
    """Language modelling on the text of a run's config."""

    evaluate_options = ("--test", "--tokens", "--generate")
    refusals: Mapping[str, str] = {
        "dataset_digest": "dataset: this text, or the name of a file in it, has changed; bring back that of {}, or "
        "start a new run",
        "tokenizer_digest": TOKENIZER_REFUSAL,
    }

    def __init__(self, config: RunConfig, corpus: Corpus, cache: Path):
        self.config, self.corpus, self.cache = config, corpus, cache
        self.digests = {"dataset_digest": corpus.dataset_digest, "tokenizer_digest": corpus.tokenizer_digest}
        self.files = tuple(corpus.tokenizer.files)

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config, prepare_corpus(config.dataset, config.tokenizer, cache), cache)

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        text = text_size(config.dataset, config.tokenizer, cache)
        if text.train_tokens is None:
            known = f"unknown until it is prepared; vocabulary {text.vocab_size:,}"
        else:
            about, missing = ("", "") if text.prepared else ("about ", " (not prepared yet)")
            known = f"{about}{text.train_tokens:,} tokens for training, {text.validation_tokens:,} for validation, "
            known += f"vocabulary {text.vocab_size:,}{missing}"
        order = cls(config, text.corpus, cache).order() if text.corpus is not None else _estimated_order(config, text)
        tokens = most_tokens(config) if order is None else order.tokens_per_step
        step = f"{tokens:,} tokens: {rows_of_a_step(config)} sequences of {config.model.max_seq_len}"
        if config.batching.name == "padded":
            longest = _longest_document(config)
            step = f"{tokens:,} tokens: {rows_of_a_step(config)} documents, none longer than {longest}"
            step = f"{'at most' if order is None else 'about'} {step}"
        return Preview(
            config=config,
            network_config=config.network_config(text.vocab_size),
            prepared=text.prepared,
            examples=("text", known),
            order=order,
            step=step,
            evaluated_tokens=text.validation_tokens,
            generated_tokens=len(config.training.sample_prompts) * config.training.sample_length,
        )

    # The parts of a run

    @classmethod
    def network_before_examples(cls, config: RunConfig) -> CustomTransformerConfig | None:
        """The network's config; None unless the config names the vocabulary size or a tokenizer with a fixed one."""
        vocab_size = config.model.vocab_size or FIXED_VOCABULARIES.get(config.tokenizer.name)
        return None if vocab_size is None else config.network_config(vocab_size)

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.network_of_tokenizer(self.corpus.tokenizer.vocab_size)

    def order(self, repeat: int | None = None) -> Order:
        config = self.config
        return open_order(
            self.corpus,
            config.batching,
            config.dataset,
            sequence_length=config.model.max_seq_len,
            batch_size=config.training.batch_size,
            accumulation_steps=config.training.gradient_accumulation_steps,
            seed=config.seed,
            repeat=repeat,
        )

    def check(self) -> None:
        self.evaluation_batches(self.corpus.split("validation"), "cpu")
        _ = self.prompts  # warns about prompts that the tokenizer cannot encode

    def evaluation_batches(
        self, split: Split, device: torch.device | str, limit: int | None = None, rows: int | None = None
    ) -> Iterator[Batch]:
        """The batches of a split, packed or padded as in training, once and in order, with `rows` sequences in each
        (None: training.batch_size): the first `limit`, or all (None).

        Raises InputError, already when it is called, for a split that is too short.
        """
        config = self.config
        length, rows = config.model.max_seq_len, rows or config.training.batch_size
        return evaluation_batches(split.tokens, split.offsets, config.batching, length, rows, limit, device)

    def targets(self, split: Split) -> int:
        """The number of predicted tokens in a whole split."""
        return evaluation_targets(split.offsets, self.config.batching)

    # Metrics and predictions

    def measure(self, model: LanguageModel, split: Split, limit: int | None = None) -> Evaluation:
        """Evaluate a model on a split or its first `limit` batches."""
        bytes_per_token = split.text_bytes / len(split.tokens)
        batches = self.evaluation_batches(split, model.network.device, limit)
        return Evaluator(model, bytes_per_token).evaluate(processes().part_of(batches))

    def ngram_losses(self, split: Split, limit: int | None = None) -> tuple[float, float]:
        """Unigram and bigram loss on the same tokens as `measure`."""
        batches = self.evaluation_batches(split, "cpu", limit, NGRAM_ROWS if limit is None else None)
        return unigram_and_bigram_loss(self.corpus.train, batches, self.corpus.tokenizer.vocab_size)

    @cached_property
    def validation_ngram_losses(self) -> tuple[float, float]:
        return self.ngram_losses(self.corpus.split("validation"))

    def evaluate(self, model: LanguageModel, limit: int | None = None) -> Evaluated:
        evaluation = self.measure(model, self.corpus.split("validation"), limit)
        unigram, bigram = self.validation_ngram_losses
        gain = bigram - evaluation.loss
        side = "below" if gain >= 0 else "above"
        details = f"perplexity {evaluation.perplexity:.1f}, {evaluation.bits_per_byte:.3f} bits per byte, accuracy"
        return Evaluated(
            metrics=evaluation.metrics() | {"validation/unigram_loss": unigram, "validation/bigram_loss": bigram},
            sentence=f"validation loss {evaluation.loss:.4f} (bigram {bigram:.3f}), "
            f"{details} {evaluation.accuracy:.3f}",
            summary=(
                (
                    "validation loss",
                    f"{evaluation.loss:.4f} nats per token, {abs(gain):.2f} {side} the bigram model's {bigram:.3f} "
                    f"(unigram {unigram:.3f})",
                ),
                ("", f"{details} {evaluation.accuracy:.1%} of {evaluation.tokens:,} tokens"),
            ),
            short=f"accuracy {evaluation.accuracy:.3f}",
        )

    def opened(self, split: str) -> tuple[Split, tuple[str, ...]]:
        """The split train, validation or test (which training never reads), and notes about it."""
        if split != "test":
            return self.corpus.split(split), ()
        from ..data.tokens.test_split import open_test_split

        return open_test_split(self.config.dataset, self.corpus, self.cache)

    def measure_split(
        self, model: LanguageModel, split: str, limit: int | None = None, predictions: int = 0
    ) -> Measured:
        """The model beside the unigram and bigram models on the same tokens; their accuracy is not measured."""
        text, notes = self.opened(split)
        evaluation = self.measure(model, text, limit)
        unigram, bigram = self.ngram_losses(text, limit)
        bytes_per_token = text.text_bytes / len(text.tokens)
        compared = [
            evaluation,
            *(Evaluation(loss, math.nan, 0, loss / math.log(2) / bytes_per_token) for loss in (bigram, unigram)),
        ]
        rows = [
            (name, f"{one.loss:.4f}", f"{one.perplexity:,.1f}", f"{one.bits_per_byte:.3f}")
            for name, one in zip(("model", "bigram", "unigram"), compared, strict=True)
        ]
        assert evaluation.bits_per_byte is not None
        values = {"loss": evaluation.loss, "perplexity": evaluation.perplexity}
        values |= {"bits_per_byte": evaluation.bits_per_byte, "accuracy": evaluation.accuracy}
        of = "" if limit is None else f" of {self.targets(text):,}"
        return Measured(
            title=f"{split}: {evaluation.tokens:,} tokens{of}",
            headings=("", "loss", "perplexity", "bits per byte", "accuracy"),
            rows=((*rows[0], f"{evaluation.accuracy:.1%}"), *((*row, "") for row in rows[1:])),
            metrics=values | {"tokens": evaluation.tokens, "bigram_loss": bigram, "unigram_loss": unigram},
            whole=limit is None,
            notes=notes,
        )

    def token_by_token(self, model: LanguageModel, split: str, count: int, likeliest: int) -> Iterator[ShownToken]:
        rows = self.evaluation_batches(self.opened(split)[0], model.network.device, rows=1)
        return shown_tokens(model.network, self.corpus.tokenizer, rows, count, likeliest)

    @cached_property
    def prompts(self) -> list[list[int]]:
        return encode_prompts(self.config.training.sample_prompts, self.corpus)

    def predictions(self, model: LanguageModel) -> list[str]:
        """Every prompt with its continuation."""
        length, seed = self.config.training.sample_length, self.config.seed
        return draw_samples(model, self.corpus.tokenizer, self.prompts, length, seed)

    def example(self, device: torch.device) -> Batch:
        """The first row of the validation split, as it is evaluated."""
        return next(self.evaluation_batches(self.corpus.split("validation"), device, rows=1))

    def text(self, batch: AnyBatch, positions: int) -> str:
        assert isinstance(batch, Batch)
        return self.corpus.tokenizer.decode(batch.tokens[0, :positions].tolist())

    # Descriptions and files

    @property
    def about(self) -> str:
        corpus, tokenizer = self.corpus, self.corpus.tokenizer
        return (
            f"{self.config.dataset.name}: {len(corpus.train):,} tokens for training, {len(corpus.validation):,} for "
            f"validation, vocabulary {tokenizer.vocab_size} ({tokenizer.name})"
        )

    @property
    def baselines(self) -> str:
        unigram, bigram = self.validation_ngram_losses
        return f"baselines on the same tokens: unigram loss {unigram:.3f}, bigram loss {bigram:.3f}"

    @property
    def notes(self) -> tuple[str, ...]:
        return self.corpus.notes

    @property
    def profile(self) -> Mapping[str, int]:
        corpus = self.corpus
        return {
            "train_documents": corpus.train_documents,
            "validation_documents": corpus.validation_documents,
            "train_bytes": corpus.train_bytes,
            "validation_bytes": corpus.validation_bytes,
            **corpus.counts,
        }

    @property
    def data_tags(self) -> Mapping[str, str]:
        corpus = self.corpus
        return {
            "tokenizer": corpus.tokenizer.name,
            "vocab_size": str(corpus.tokenizer.vocab_size),
            "train_tokens": str(len(corpus.train)),
            "validation_tokens": str(len(corpus.validation)),
            "sequence_length": str(self.config.model.max_seq_len),
        }

    @property
    def source(self) -> tuple[str, str | None]:
        dataset = self.config.dataset
        return dataset.repository or dataset.name, dataset.path

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and tokenizer_config.json if the tokenizer has one."""
        self.corpus.tokenizer.save(directory)

    def different_examples(self, state: Mapping[str, Any], checkpoint: Path) -> list[str]:
        before, now = state["network"].get("vocab_size"), self.network_config.vocab_size
        vocabulary = [f"model.vocab_size={now}: must stay {before}, as in {checkpoint}"] if before != now else []
        return super().different_examples(state, checkpoint) + vocabulary


def _longest_document(config: RunConfig) -> int:
    return min(config.dataset.max_length or config.model.max_seq_len, config.model.max_seq_len)


def _estimated_order(config: RunConfig, text: TextSize) -> EstimatedOrder | None:
    """The estimated length of an epoch: if packed, all windows of T tokens but one; if padded, one row for every
    document. None if the amount of text, or for padded batches the number of documents, is unknown yet."""
    if text.train_tokens is None:
        return None
    training, length = config.training, config.model.max_seq_len
    rows = training.batch_size * training.gradient_accumulation_steps
    if config.batching.name == "padded":
        if text.train_documents is None:
            return None
        tokens = min(text.train_tokens, text.train_documents * _longest_document(config))
        steps = math.ceil(text.train_documents / rows)
        return EstimatedOrder(steps, max(1, round(tokens / steps)))
    return EstimatedOrder(max(text.train_tokens // length - 1, 1) / rows, rows * length)
