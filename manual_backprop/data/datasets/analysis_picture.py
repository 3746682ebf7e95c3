"""The picture of reports on datasets, one column for each: coverage, bytes per token, token classes and lengths."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from ...common.pictures import new_figure, picture, save_figure, with_grid
from .analysis_text import CLASSES, COVERAGES, Report

BINS = 40
MOST_POINTS = 400  # of the curve of coverage


@picture
def draw_analysis(reports: Sequence[Report], path: Path) -> None:
    """Write the picture as a PNG. Raises StorageError."""
    figure = new_figure(5.2 * len(reports), 13)
    axes = figure.subplots(4, len(reports), squeeze=False)
    for column, report in enumerate(reports):
        _coverage(axes[0][column], report)
        _bytes_per_token(axes[1][column], report)
        _classes(axes[2][column], report)
        _lengths(axes[3][column], report)
        axes[0][column].set_title(f"{report.title}: {report.text_bytes / 1e6:,.1f} MB, {report.documents:,} documents")
    for one in axes.flat:
        with_grid(one)
    save_figure(figure, path)


def _coverage(axes: Axes, report: Report) -> None:
    for one in report.vocabularies:
        sums = np.cumsum(one.ranked) / one.tokens
        ranks = np.unique(np.geomspace(1, len(sums), MOST_POINTS).astype(int))
        axes.plot(ranks, 100 * sums[ranks - 1], linewidth=1.2, label=f"V = {one.vocab_size:,}")
    for share in COVERAGES[:2]:
        axes.axhline(100 * share, color="gray", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.set_xlabel("most frequent tokens")
    axes.set_ylabel("share of the text [%]")
    axes.legend(frameon=False, fontsize=8)


def _bytes_per_token(axes: Axes, report: Report) -> None:
    sizes = [one.vocab_size for one in report.vocabularies]
    axes.plot(sizes, [one.bytes_per_token for one in report.vocabularies], marker="o", markersize=4)
    axes.axvline(report.recommended.vocab_size, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], fontsize=8)
    axes.minorticks_off()
    axes.set_xlabel("vocabulary [tokens]; dashed: recommended" if len(sizes) > 1 else "vocabulary [tokens]")
    axes.set_ylabel("bytes per token")


def _classes(axes: Axes, report: Report) -> None:
    one = report.recommended
    names = [*CLASSES, "rare"]
    found = [*(one.classes[name] for name in CLASSES), one.rare]
    places = np.arange(len(names))
    axes.barh(places - 0.2, [100 * count / one.vocab_size for count, _ in found], 0.4, label="of the vocabulary")
    axes.barh(places + 0.2, [100 * share for _, share in found], 0.4, label="of the text")
    axes.set_yticks(places, names)
    axes.invert_yaxis()
    axes.set_xlabel(f"share at V = {one.vocab_size:,} [%]; rare tokens also count in their class")
    axes.legend(frameon=False, fontsize=8)


def _lengths(axes: Axes, report: Report) -> None:
    lengths = report.recommended.lengths
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, BINS))
    axes.hist(lengths, bins=edges.tolist() if len(edges) > 1 else 1)
    axes.axvline(report.recommendations.max_seq_len, color="gray", linewidth=0.8, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel(f"document length [tokens, V = {report.recommended.vocab_size:,}]; dashed: max_seq_len")
    axes.set_ylabel("documents")
