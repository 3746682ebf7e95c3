"""Metrics of classification: loss, accuracy, macro F1, and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...common.pictures import new_figure, picture, save_figure

CONFUSION = "confusion.png"
MOST_LABELS = 40  # in a picture
LONGEST_NAME = 24  # [characters]


@dataclass(frozen=True)
class Measures:
    """The metrics of N texts. wanted, found (N,): indices of their true and of their predicted labels."""

    wanted: np.ndarray
    found: np.ndarray
    loss: float | None = None  # nats per text

    @property
    def accuracy(self) -> float:
        return float((self.wanted == self.found).mean()) if len(self.wanted) else 0.0

    @property
    def f1(self) -> float:
        """Macro F1: the mean over labels of 2 TP / (2 TP + FP + FN), without labels that are neither true nor predicted
        for any text."""
        right = self.wanted == self.found
        labels = np.union1d(self.wanted, self.found)
        if not len(labels):
            return 0.0
        scores = [
            2 * (right & (self.wanted == label)).sum() / ((self.wanted == label).sum() + (self.found == label).sum())
            for label in labels
        ]
        return float(np.mean(scores))

    def confusion(self, n_labels: int) -> np.ndarray:
        """(n_labels, n_labels): the number of texts with a row's true label and a column's predicted label."""
        pairs = self.wanted * n_labels + self.found
        return np.bincount(pairs, minlength=n_labels * n_labels).reshape(n_labels, n_labels)


@picture
def draw_confusion(measures: Measures, labels: Sequence[str], path: Path, title: str) -> bool:
    """Draw the confusion matrix: counts, colored by the share of each row. Of more than MOST_LABELS labels, those with
    the most texts. Without texts it returns False and writes no file."""
    counts = measures.confusion(len(labels))
    shown = np.sort(np.argsort(-counts.sum(1), kind="stable")[:MOST_LABELS])
    counts = counts[np.ix_(shown, shown)]
    if not counts.sum():
        return False
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    names = [labels[number][:LONGEST_NAME] for number in shown.tolist()]
    size = 3.2 + 0.45 * len(names)
    figure = new_figure(size + 1, size, dpi=110)
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set(xlabel="predicted label", ylabel="true label")
    for row, column in np.argwhere(counts):
        colour = "white" if shares[row, column] > 0.5 else "black"
        axes.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=colour)
    save_figure(figure, path)
    return True
