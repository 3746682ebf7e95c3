"""Inference with a trained classifier: from texts to labels and their probabilities."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ...common.batch import IGNORED
from ...common.errors import InputError, NotFiniteError
from ...data.sources.labelled import texts_in_lines
from ...data.tokens.labelled_corpus import encoded
from ...data.tokens.tokenizer import Tokenizer
from ..inference import Predictor, texts_of
from .rows import MEASURED_ROWS, batch_of


class Classifier(Predictor):
    """A trained model with its tokenizer and its labels. `column` is the column of an input file that has the texts."""

    def __init__(self, model: Any, tokenizer: Tokenizer, labels: Sequence[str], column: str = "text"):
        self.model, self.tokenizer, self.labels, self.column = model, tokenizer, labels, column

    def read_text(self, text: str) -> str:
        return text

    def read_lines(self, lines: Iterable[str], where: str) -> Iterator[str]:
        return texts_in_lines(iter(lines), where, self.column)

    def predict(self, inputs: Sequence[str]) -> list[dict[str, Any]]:
        """A dict for each text: the text, its likeliest label, and each label's probability, the likeliest first."""
        found = []
        for text, probabilities in zip(inputs, self.probabilities(inputs), strict=True):
            order = np.argsort(-probabilities, kind="stable")
            shares = {self.labels[number]: float(probabilities[number]) for number in order.tolist()}
            found.append({"text": text, "label": self.labels[order[0]], "probabilities": shares})
        return found

    def probabilities(self, texts: Sequence[str]) -> np.ndarray:
        """The probabilities (texts, labels). Raises InputError for a text without tokens, and NotFiniteError if the
        model has diverged."""
        for text in texts:
            if not text.strip():
                raise InputError(f"{text!r} is empty: there is nothing to classify")
        found, network = [], self.model.network
        for first in range(0, len(texts), MEASURED_ROWS):
            rows = encoded(self.tokenizer, texts[first : first + MEASURED_ROWS])
            for text, ids in zip(texts[first:], rows, strict=False):
                if not len(ids):
                    raise InputError(f"{text[:40]!r} has no tokens: the tokenizer can encode none of its characters")
            targets = np.full(len(rows), IGNORED)
            batch = batch_of(rows, targets, network.config.max_seq_len, device=network.device)
            with torch.no_grad():
                found.append(network.predict(batch).double().softmax(-1).cpu().numpy())
        result = np.concatenate(found) if found else np.empty((0, len(self.labels)))
        if not np.isfinite(result).all():
            raise NotFiniteError("The model's logits are not finite: its parameters have diverged.")
        return result

    def serve(self, model_input: Any, params: Mapping[str, Any]) -> list[str]:
        """The likeliest label of each text, for MLflow. `params` must be empty. Raises InputError."""
        if params:
            raise InputError(f"there is no parameter {next(iter(params))!r}: a text has one label")
        return [answer["label"] for answer in self.predict(texts_of(model_input))]
