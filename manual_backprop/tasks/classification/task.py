"""task=classification: predict the label of a text.

An encoder reads the text, the mean over its positions without padding goes through the head, and the loss is
cross-entropy over the labels. Two simple methods on the same texts are the baselines. The best checkpoint has the
highest accuracy on the validation texts.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any, Self

import numpy as np
import torch

from ...common.batch import IGNORED, AnyBatch, EncoderBatch
from ...common.errors import CheckpointError, InputError
from ...common.json_files import read_object
from ...common.processes import processes
from ...config.schema import CustomTransformerConfig, RunConfig
from ...data.tokens.labelled_corpus import (
    LabelledCorpus,
    LabelledSplit,
    encoded,
    open_test_split,
    prepare_labelled,
    preview_labelled,
)
from ...data.tokens.order import Order, Repeated
from ...data.tokens.text_size import VOCABULARIES
from ...data.tokens.tokenizer import load_tokenizer
from ...ops import cross_entropy_forward
from ..inference import TEXT, Predictor, Reading
from ..preview import Preview, most_tokens, rows_of_a_step
from ..task import TOKENIZER_REFUSAL, Evaluated, Final, Measured, Task
from .baselines import TfIdf, majority
from .classifier import Classifier
from .measures import CONFUSION, Measures, draw_confusion
from .rows import LabelledOrder, TextRows, batch_of, text_of

UNKNOWN_VOCABULARY = 50257  # a guess, if the tokenizer is not read yet
LONGEST_TAG = 250  # [characters], MLflow's limit
LABELS = "labels.json"  # in a checkpoint
SHOWN = 10  # predictions
WIDTH = 90  # [characters] of a text in a line of predictions
NO_TFIDF = "TF-IDF with logistic regression needs scikit-learn, which is not installed (pip install scikit-learn)"


class ClassificationTask(Task):
    """Classification of the labelled texts of a run's config."""

    evaluate_options = ("--test", "--predictions")
    inference_command = ("predict", "--text", "Return the next event.")
    signature: Mapping[str, Any] = {"inputs": TEXT, "outputs": TEXT, "params": []}
    refusals: Mapping[str, str] = {
        "dataset_digest": "dataset: the texts or their labels have changed; bring back that of {}, or start a new run",
        "tokenizer_digest": TOKENIZER_REFUSAL,
    }
    best_metric = "validation/accuracy"
    best_is_highest = True
    predictions_title = "predictions on validation texts"

    def __init__(self, config: RunConfig, corpus: LabelledCorpus):
        self.config, self.corpus = config, corpus
        self.tokenizer, self.labels = corpus.tokenizer, corpus.labels
        self.digests = {"dataset_digest": corpus.dataset_digest, "tokenizer_digest": corpus.tokenizer.digest}
        self.files = (*corpus.tokenizer.files, LABELS)

    @classmethod
    def open(cls, config: RunConfig, cache: Path) -> Self:
        return cls(config, prepare_labelled(config.dataset, config.tokenizer, cache))

    @classmethod
    def restored(cls, config: RunConfig, directory: Path, cache: Path) -> Self:
        labels = read_object(directory / LABELS, kind=CheckpointError).get("labels")
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(f"{directory / LABELS} does not hold the labels: it is not a file of this version")
        return cls(config, LabelledCorpus(load_tokenizer(directory), tuple(labels), {}, ""))

    @classmethod
    def preview(cls, config: RunConfig, cache: Path) -> Preview:
        """Exact numbers; texts that are not in the cache are tokenized for this call only. Unknown ones on the hub."""
        corpus, prepared = preview_labelled(config.dataset, config.tokenizer, cache)
        if corpus is None:
            return cls._unknown(config)
        validation, longest = corpus.splits["validation"], config.model.max_seq_len
        evaluated = int(np.minimum(np.diff(validation.offsets), longest).sum())
        rows = f"texts of at most {longest}"
        return cls(config, corpus).previewed("texts", rows, prepared=prepared, evaluated_tokens=evaluated)

    @staticmethod
    def _unknown(config: RunConfig) -> Preview:
        """The preview of texts that are still on the hub: their number is unknown, and that of labels at least two."""
        vocab_size = config.tokenizer.vocab_size or VOCABULARIES.get(config.tokenizer.name, UNKNOWN_VOCABULARY)
        network = config.network_config(vocab_size, n_outputs=2)
        step = f"at most {most_tokens(config):,} tokens: {rows_of_a_step(config)} texts"
        return Preview(config, network, ("texts", "unknown until they are downloaded"), None, step, prepared=False)

    # The parts of a run

    @property
    def network_config(self) -> CustomTransformerConfig:
        return self.network_of_tokenizer(self.tokenizer.vocab_size, n_outputs=len(self.labels))

    @cached_property
    def training(self) -> TextRows:
        return self.rows_of(self.corpus.splits["train"], self.config.dataset.max_length)

    @cached_property
    def validation(self) -> TextRows:
        return self.rows_of(self.corpus.splits["validation"])

    def rows_of(self, split: LabelledSplit, longest: int | None = None) -> TextRows:
        """The rows of a split, cut at the network's length, or at `longest` if that is shorter."""
        length = self.config.model.max_seq_len
        return TextRows(split, min(length, longest or length))

    def order(self, repeat: int | None = None) -> Order:
        config, training = self.config, self.config.training
        order: Order = LabelledOrder(
            self.training,
            self.tokenizer,
            config.dataset.augment or (),
            config.seed,
            training.batch_size,
            training.gradient_accumulation_steps,
        )
        return order if repeat is None else Repeated(order, repeat)

    # Metrics and predictions

    def measure(self, model: Any, rows: TextRows, count: int | None = None) -> Measures:
        """The metrics of a model on the first `count` rows (None: all)."""
        network = model.network

        @torch.no_grad()
        def measured(batch: EncoderBatch) -> tuple[float, list[int]]:
            logits = network.predict(batch)
            loss, _ = cross_entropy_forward(logits, batch.targets, denominator=1)
            return float(loss), logits.argmax(-1).tolist()

        parts = processes().mapped(measured, list(rows.batches(network.device, count)))
        wanted = np.asarray(rows.split.labels[:count])
        found = np.asarray([label for _, labels in parts for label in labels])
        return Measures(wanted, found, sum(loss for loss, _ in parts) / len(wanted))

    def evaluate(self, model: Any, limit: int | None = None) -> Evaluated:
        count = None if limit is None else limit * self.config.training.batch_size
        measures = self.measure(model, self.validation, count)
        return Evaluated(
            metrics=by_name(measures, self.simple_methods, "validation/"),
            sentence=f"validation loss {measures.loss:.4f}, accuracy {measures.accuracy:.4f}, macro F1 "
            f"{measures.f1:.4f} of {len(measures.wanted):,} texts",
            summary=(
                (
                    "accuracy",
                    f"{measures.accuracy:.2%} of {len(measures.wanted):,} validation texts; macro F1 {measures.f1:.3f}",
                ),
                ("", f"on the same texts: {self._compared(self.simple_methods)}"),
            ),
            short=f"accuracy {measures.accuracy:.1%}",
        )

    @cached_property
    def tfidf(self) -> TfIdf | str:
        """The baseline TF-IDF with logistic regression, or a sentence why there is none."""
        training, validation = (self.corpus.splits[name] for name in ("train", "validation"))
        try:
            return TfIdf(self.texts(training), training.labels, self.texts(validation), validation.labels)
        except ImportError:
            return NO_TFIDF
        except ValueError as error:
            return f"TF-IDF with logistic regression learns nothing here ({' '.join(str(error).split())[:120]})"

    @cached_property
    def simple_methods(self) -> dict[str, Measures]:
        """The baselines on the validation texts."""
        return self.compared(self.corpus.splits["validation"])

    def compared(self, split: LabelledSplit, count: int | None = None) -> dict[str, Measures]:
        """The metrics of the baselines on the first `count` texts of a split."""
        wanted = np.asarray(split.labels[:count])
        found = {"majority": majority(np.asarray(self.corpus.splits["train"].labels), wanted)}
        if isinstance(self.tfidf, TfIdf):
            found["tfidf"] = self.tfidf.measure(self.texts(split, count), wanted)
        return found

    def _compared(self, methods: Mapping[str, Measures]) -> str:
        words = {"majority": "the most frequent label", "tfidf": "TF-IDF with logistic regression"}
        named = ", ".join(f"{words[name]} {one.accuracy:.2%} (F1 {one.f1:.3f})" for name, one in methods.items())
        return named if isinstance(self.tfidf, TfIdf) else f"{named}; {self.tfidf}"

    def texts(self, split: LabelledSplit, count: int | None = None) -> list[str]:
        return [text_of(self.tokenizer, split.ids(number)) for number in range(len(split))[:count]]

    def measure_split(self, model: Any, split: str, limit: int | None = None, predictions: int = 0) -> Measured:
        """The model beside the baselines on the same texts."""
        opened, notes = self.opened(split)
        count = len(opened) if limit is None else min(len(opened), limit * self.config.training.batch_size)
        rows = self.rows_of(opened)
        measures, compared = self.measure(model, rows, count), self.compared(opened, count)
        shown = {"model": measures, **compared}
        return Measured(
            title=f"{split}: {count:,} texts" + (f" of {len(opened):,}" if count < len(opened) else ""),
            headings=("", "loss", "accuracy", "macro F1"),
            rows=tuple(
                (name, "" if one.loss is None else f"{one.loss:.4f}", f"{one.accuracy:.2%}", f"{one.f1:.3f}")
                for name, one in shown.items()
            ),
            metrics=by_name(measures, compared) | {"texts": float(count)},
            whole=count == len(opened),
            notes=(*notes, *([] if isinstance(self.tfidf, TfIdf) else [self.tfidf])),
            predictions=tuple(self.shown_rows(model, opened, range(min(predictions, len(opened))))),
        )

    def opened(self, split: str) -> tuple[LabelledSplit, tuple[str, ...]]:
        """The split train, validation or test, and notes about it."""
        if split == "test":
            return open_test_split(self.config.dataset, self.corpus)
        return self.corpus.splits[split], ()

    def predictor(self, model: Any) -> Predictor:
        if len(self.labels) != model.config.n_outputs:
            raise CheckpointError(
                f"{LABELS} has {len(self.labels)} labels, but the network has {model.config.n_outputs} outputs"
            )
        return Classifier(model, self.tokenizer, self.labels, self.config.dataset.text_column or "text")

    def reading(self, model: Any, text: str, most: int) -> Reading:
        """The text, with its label as the only output."""
        (ids,) = encoded(self.tokenizer, [text])
        if not len(ids):
            raise InputError("an empty text: there is nothing to classify")
        batch = batch_of([ids], np.full(1, IGNORED), most)
        words = [self.tokenizer.decode([token]) for token in ids[:most].tolist()]
        note = f"The first {most} of {len(ids)} tokens." if len(ids) > most else ""
        return Reading(
            batch, ["the text"], words, lambda number: self.labels[number], title="Likeliest labels", note=note
        )

    def shown_rows(self, model: Any, split: LabelledSplit, numbers: Iterable[int]) -> list[str]:
        """One line for each text: the predicted label, its probability, and whether it is right."""
        numbers = list(numbers)
        answers = self.predictor(model).predict([text_of(self.tokenizer, split.ids(number)) for number in numbers])
        return list(map(self._shown, answers, (self.labels[split.labels[number]] for number in numbers)))

    def _shown(self, answer: Mapping[str, Any], wanted: str) -> str:
        found, text = answer["label"], " ".join(answer["text"].split())
        verdict = "\u2713" if found == wanted else f"\u2717 expected {wanted}"
        short = text if len(text) <= WIDTH else f"{text[: WIDTH - 3]}..."
        return f"{found} {answer['probabilities'][found]:.0%} {verdict}  {short}"

    def predictions(self, model: Any) -> list[str]:
        """Ten validation texts, evenly spread, as one text."""
        split = self.corpus.splits["validation"]
        numbers = range(0, len(split), -(-len(split) // SHOWN))
        return ["\n".join(self.shown_rows(model, split, numbers))]

    def in_one_line(self, prediction: str) -> str:
        return prediction.partition("\n")[0]

    def final(self, model: Any, directory: Path) -> Final:
        """The metrics of the test texts, if there are any, and the confusion matrix as a picture."""
        name = "test" if "test" in self.corpus.splits else "validation"
        split = self.corpus.splits[name]
        measures = self.measure(model, self.rows_of(split))
        metrics: dict[str, float] = {}
        summary: list[tuple[str, str]] = []
        if name == "test":
            compared = self.compared(split)
            metrics = by_name(measures, compared, "test/")
            summary = [
                ("test texts", f"accuracy {measures.accuracy:.2%} of {len(split):,}, macro F1 {measures.f1:.3f}"),
                ("", f"on the same texts: {self._compared(compared)}"),
            ]
        path = directory / CONFUSION
        title = f"{len(split):,} {name} texts: accuracy {measures.accuracy:.1%}"
        pictures = (path,) if draw_confusion(measures, self.labels, path, title) else ()
        return Final(metrics, tuple(summary), pictures)

    def example(self, device: torch.device) -> EncoderBatch:
        """The first validation text."""
        return self.validation.batch(np.arange(1), device=device)

    def text(self, batch: AnyBatch, positions: int) -> str:
        assert isinstance(batch, EncoderBatch)
        return self.tokenizer.decode(batch.inputs[0, :positions].tolist())

    # Descriptions and files

    @property
    def about(self) -> str:
        sizes = {name: len(split) for name, split in self.corpus.splits.items()}
        test = f", {sizes['test']:,} for the test" if "test" in sizes else ""
        return (
            f"{self.config.dataset.name}: {sizes['train']:,} texts of {len(self.labels)} labels for training, "
            f"{sizes['validation']:,} for validation{test}, vocabulary {self.tokenizer.vocab_size:,} "
            f"({self.tokenizer.name})"
        )

    @property
    def baselines(self) -> str:
        return f"simple methods on the validation texts: {self._compared(self.simple_methods)}"

    @property
    def notes(self) -> tuple[str, ...]:
        return self.corpus.notes

    @property
    def profile(self) -> Mapping[str, int]:
        return {"labels": len(self.labels), **{f"{name}_texts": len(one) for name, one in self.corpus.splits.items()}}

    @property
    def data_tags(self) -> Mapping[str, str]:
        return {
            "labels": shorten(", ".join(self.labels), LONGEST_TAG, placeholder=" ..."),
            "tokenizer": self.tokenizer.name,
            "vocab_size": str(self.tokenizer.vocab_size),
        }

    @property
    def source(self) -> tuple[str, str | None]:
        dataset = self.config.dataset
        if dataset.format == "hub":
            return str(dataset.path), None
        return dataset.name, dataset.path

    def save(self, directory: Path) -> None:
        """Write the tokenizer's files, and labels.json: the labels in the order of the head's outputs."""
        self.tokenizer.save(directory)
        (directory / LABELS).write_text(
            json.dumps({"labels": list(self.labels)}, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )


def by_name(measures: Measures, compared: Mapping[str, Measures], prefix: str = "") -> dict[str, float]:
    """The metrics by name: loss, accuracy and F1 of the model, accuracy and F1 of each baseline."""
    values = {"loss": measures.loss or 0.0, "accuracy": measures.accuracy, "f1": measures.f1}
    for name, one in compared.items():
        values |= {f"{name}_accuracy": one.accuracy, f"{name}_f1": one.f1}
    return {f"{prefix}{name}": value for name, value in values.items()}
