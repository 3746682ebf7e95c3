"""Reports of datasets as tables of text, side by side where there are several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .analysis import CLASSES, COVERAGES, D_MODEL, GPT2_VOCAB_SIZE, RARE

if TYPE_CHECKING:
    from .analysis import Report

QUANTILES = {"shortest": 0.0, "half are shorter than": 0.5, "90 %": 0.9, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}


def summary(reports: Sequence[Report]) -> str:
    """Sizes of each dataset, then all of them at their recommended size, then what to take."""
    blocks = [_sizes(report) for report in reports]
    blocks += [_details(reports), _frequent(reports), _recommended(reports)]
    notes = [f"{report.title}: {note}" for report in reports for note in report.notes]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _sizes(report: Report) -> str:
    """A line for each size of the vocabulary."""
    learned = "byte-pair encodings learned from it" if report.tokenizer == "bpe" else f"tokenizer {report.tokenizer}"
    head = f"{report.title}: {report.documents:,} training documents, {report.text_bytes:,} bytes; {learned}"
    rows = [["vocabulary", "tokens", "bytes/token", "used", *(f"{share:.1%} cover" for share in COVERAGES), "rare"]]
    for one in report.vocabularies:
        covering = [f"{one.covering(share):,}" for share in COVERAGES]
        row = [f"{one.vocab_size:,}", f"{one.tokens:,}", f"{one.bytes_per_token:.2f}", f"{one.used:.1%}", *covering]
        rows.append([*row, f"{one.rare[0] / one.vocab_size:.1%}"])
    return "\n".join([head, *_table(rows)])


def _details(reports: Sequence[Report]) -> str:
    """A column for each dataset."""
    chosen = [report.recommended for report in reports]
    rows = [["", *(f"{report.title}, V={one.vocab_size}" for report, one in zip(reports, chosen, strict=True))]]
    for name in CLASSES:
        rows.append([f"{name} (tokens, of the text)", *(_share(*one.classes[name]) for one in chosen)])
    rows.append([f"rare: less than {RARE} times", *(_share(*one.rare) for one in chosen)])
    rows.append(["never", *(f"{one.vocab_size - np.count_nonzero(one.counts):,}" for one in chosen)])
    for name, place in QUANTILES.items():
        label = f"document length, {name} [tokens]"
        rows.append([label, *(f"{np.quantile(one.lengths, place, method='lower'):,}" for one in chosen)])
    rows.append(["document length, mean [tokens]", *(f"{one.lengths.mean():,.1f}" for one in chosen)])
    return "\n".join(_table(rows))


def _frequent(reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        one = report.recommended
        tokens = ", ".join(f"{text!r} {count / one.tokens:.1%}" for text, count in one.most_frequent)
        lines.append(f"{report.title}, the most frequent: {tokens}")
    return "\n".join(lines)


def _recommended(reports: Sequence[Report]) -> str:
    lines = []
    for report in reports:
        found = report.recommendations
        lines += [
            f"{report.title}: recommended",
            f"  vocab_size   {found.vocab_size:<6} {found.reasons[0]}",
            f"  max_seq_len  {found.max_seq_len:<6} {found.reasons[1]}",
            f"  embedding    {found.embedding_parameters_saved:,} parameters fewer than with GPT-2's "
            f"{GPT2_VOCAB_SIZE:,} tokens, at d_model {D_MODEL}",
        ]
    return "\n".join(lines)


def _share(count: int, share: float) -> str:
    return f"{count:,}  {share:.1%}"


def _table(rows: list[list[str]]) -> list[str]:
    """The first column to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number == 0 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
