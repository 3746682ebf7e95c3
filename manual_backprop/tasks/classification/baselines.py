"""Baselines on the same texts: always the most frequent label, and TF-IDF with logistic regression.

The second uses scikit-learn, which MLflow installs. Without it the run reports a sentence instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .measures import Measures

REGULARIZATION = (1.0, 10.0, 100.0)  # candidates for C of logistic regression, chosen on the validation texts
MOST_LEARNED = 10_000  # training texts, evenly spread
WORDS = r"(?u)\b\w+\b|[^\w\s]"  # punctuation marks are words too: they distinguish code from prose


def majority(training: np.ndarray, wanted: np.ndarray) -> Measures:
    """The measures of always predicting the most frequent training label; arguments are label indices."""
    return Measures(wanted, np.full_like(wanted, np.bincount(training).argmax()))


class TfIdf:
    """Logistic regression on TF-IDF features of words and pairs of words (Salton & Buckley 1988). It learns from the
    training texts; the validation texts choose the regularization, which makes it as hard to beat as possible."""

    def __init__(self, texts: Sequence[str], labels: np.ndarray, validation: Sequence[str], wanted: np.ndarray):
        """Raises ImportError without scikit-learn, and ValueError for texts that it cannot learn from."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        step = -(-len(texts) // MOST_LEARNED)
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=WORDS)
        learned, seen = self.vectorizer.fit_transform(texts[::step]), self.vectorizer.transform(validation)
        fitted = [LogisticRegression(C=c, max_iter=1000).fit(learned, labels[::step]) for c in REGULARIZATION]
        self.model: Any = max(fitted, key=lambda one: float((one.predict(seen) == wanted).mean()))

    def measure(self, texts: Sequence[str], wanted: np.ndarray) -> Measures:
        return Measures(wanted, np.asarray(self.model.predict(self.vectorizer.transform(texts))))
