"""What simple methods reach on the same texts: always the most frequent label, and TF-IDF with logistic regression.

scikit-learn calculates the second; it comes with mlflow, and where it is not installed a sentence stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .measures import Measures

REGULARIZATION = (1.0, 10.0, 100.0)  # C of logistic regression: the one that does best on the validation texts
MOST_LEARNED = 10_000  # training texts, evenly spread
WORDS = r"(?u)\b\w+\b|[^\w\s]"  # signs are words too: they tell code from prose


def majority(training: np.ndarray, wanted: np.ndarray) -> Measures:
    """Of labels alone."""
    return Measures(wanted, np.full_like(wanted, np.bincount(training).argmax()))


class TfIdf:
    """Words and pairs of words, weighted by how few texts have them (Salton & Buckley 1988), and logistic regression:
    learned from the training texts, as hard to beat as the validation texts can make it."""

    def __init__(self, texts: Sequence[str], labels: np.ndarray, validation: Sequence[str], wanted: np.ndarray):
        """Raises ImportError where there is no scikit-learn, ValueError for texts that it can learn nothing from."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression

        step = -(-len(texts) // MOST_LEARNED)
        self.vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), token_pattern=WORDS)
        learned, seen = self.vectorizer.fit_transform(texts[::step]), self.vectorizer.transform(validation)
        fitted = [LogisticRegression(C=c, max_iter=1000).fit(learned, labels[::step]) for c in REGULARIZATION]
        self.model: Any = max(fitted, key=lambda one: float((one.predict(seen) == wanted).mean()))

    def measure(self, texts: Sequence[str], wanted: np.ndarray) -> Measures:
        return Measures(wanted, np.asarray(self.model.predict(self.vectorizer.transform(texts))))
