"""The results of an analysis, and their text: tables with the reports on several datasets side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...common.columns import columns

GPT2_VOCAB_SIZE = 50257
COVERAGES = (0.9, 0.95, 0.99, 0.999)
CLASSES = ("letters", "numbers", "punctuation", "space", "other")
RARE = 100  # occurrences; the embedding of a token with fewer is hardly trained
D_MODEL = 256  # for which the number of saved parameters is reported
QUANTILES = {"shortest": 0.0, "half are shorter than": 0.5, "90 %": 0.9, "95 %": 0.95, "99 %": 0.99, "longest": 1.0}


@dataclass(frozen=True)
class Vocabulary:
    """The statistics of one tokenizer on one text."""

    vocab_size: int  # V
    tokens: int  # in the text, without end tokens
    text_bytes: int
    counts: np.ndarray  # (V,) how often each token occurs
    ranked: np.ndarray  # counts, the largest first
    classes: dict[str, tuple[int, float]]  # class: number of tokens in the vocabulary, share of the text's tokens
    rare: tuple[int, float]  # the same for the tokens that occur, but less than RARE times
    rare_learned: float  # share of the tokens beyond bytes and special ones that occur less than RARE times
    most_frequent: list[tuple[str, int]]
    lengths: np.ndarray  # (documents,) [tokens] with the end token

    @property
    def bytes_per_token(self) -> float:
        return self.text_bytes / max(1, self.tokens)

    @property
    def used(self) -> float:
        """The share of the vocabulary that occurs in the text."""
        return float(np.count_nonzero(self.counts) / self.vocab_size)

    def covering(self, share: float) -> int:
        """The number of most frequent tokens that make up this share of the text's tokens."""
        sums = np.cumsum(self.ranked)
        return int(np.searchsorted(sums, share * sums[-1] * (1 - 1e-12))) + 1


@dataclass(frozen=True)
class Recommendations:
    """Recommended sizes for a dataset [tokens], and why."""

    vocab_size: int
    max_seq_len: int
    embedding_parameters_saved: int  # compared to GPT-2's vocabulary, with D = D_MODEL and a tied head
    reasons: tuple[str, str]  # why this vocab_size, why this max_seq_len


@dataclass(frozen=True)
class Report:
    """The results of the analysis of a dataset."""

    title: str
    documents: int
    text_bytes: int  # [bytes] of UTF-8
    tokenizer: str  # "bpe" if learned from the dataset, else the name of the given one
    vocabularies: list[Vocabulary]  # smallest first
    recommendations: Recommendations
    notes: tuple[str, ...]

    @property
    def recommended(self) -> Vocabulary:
        """The vocabulary of the recommended size; for a given tokenizer, its own."""
        sizes = [vocabulary.vocab_size for vocabulary in self.vocabularies]
        wanted = self.recommendations.vocab_size
        return self.vocabularies[sizes.index(wanted) if wanted in sizes else 0]

    def summary(self) -> str:
        """Tables for a terminal."""
        return summary([self])


def summary(reports: Sequence[Report]) -> str:
    """The text of reports: the sizes of each dataset, then all at their recommended size, then the recommendations."""
    blocks = [_sizes(report) for report in reports]
    blocks += [_details(reports), _frequent(reports), _recommended(reports)]
    notes = [f"{report.title}: {note}" for report in reports for note in report.notes]
    return "\n\n".join([*blocks, *(["\n".join(notes)] if notes else [])])


def _sizes(report: Report) -> str:
    """A table with one line for each vocabulary size."""
    learned = "byte-pair encodings learned from it" if report.tokenizer == "bpe" else f"tokenizer {report.tokenizer}"
    head = f"{report.title}: {report.documents:,} training documents, {report.text_bytes:,} bytes; {learned}"
    rows = [["vocabulary", "tokens", "bytes/token", "used", *(f"{share:.1%} cover" for share in COVERAGES), "rare"]]
    for one in report.vocabularies:
        covering = [f"{one.covering(share):,}" for share in COVERAGES]
        row = [f"{one.vocab_size:,}", f"{one.tokens:,}", f"{one.bytes_per_token:.2f}", f"{one.used:.1%}", *covering]
        rows.append([*row, f"{one.rare[0] / one.vocab_size:.1%}"])
    return "\n".join([head, *columns(rows, right=range(1, len(rows[0])))])


def _details(reports: Sequence[Report]) -> str:
    """A table with one column for each dataset."""
    chosen = [report.recommended for report in reports]
    rows = [["", *(f"{report.title}, V={one.vocab_size}" for report, one in zip(reports, chosen, strict=True))]]
    for name in CLASSES:
        rows.append([f"{name} (tokens, share of the text)", *(_share(*one.classes[name]) for one in chosen)])
    rows.append([f"rare: less than {RARE} times", *(_share(*one.rare) for one in chosen)])
    rows.append(["never", *(f"{one.vocab_size - np.count_nonzero(one.counts):,}" for one in chosen)])
    for name, place in QUANTILES.items():
        label = f"document length, {name} [tokens]"
        rows.append([label, *(f"{np.quantile(one.lengths, place, method='lower'):,}" for one in chosen)])
    rows.append(["document length, mean [tokens]", *(f"{one.lengths.mean():,.1f}" for one in chosen)])
    return "\n".join(columns(rows, right=range(1, len(rows[0]))))


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
