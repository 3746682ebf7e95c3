"""Metrics of translations: exact match, and chrF, which compares n-grams of characters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

ORDER = 6  # length of the longest character n-grams
BETA = 2  # weight of recall relative to precision


@dataclass(frozen=True)
class Scores:
    exact_match: float  # share of texts, 0 to 1
    chrf: float  # 0 to 100
    texts: int


def scores_of(found: Sequence[str], wanted: Sequence[str]) -> Scores:
    exact = sum(one == other for one, other in zip(found, wanted, strict=True)) / max(1, len(wanted))
    return Scores(exact, chrf(found, wanted), len(wanted))


def chrf(found: Iterable[str], wanted: Iterable[str]) -> float:
    """The character n-gram F-score of a whole corpus, 0 to 100 (Popovic 2015, "chrF: character n-gram F-score for
    automatic MT evaluation"), as in sacrebleu (chrF2): n-grams of 1 to 6 characters without white space; precision and
    recall are the means over the orders that both sides have, and F weighs recall BETA^2 times.

        F = (1 + BETA^2) precision recall / (BETA^2 precision + recall)
    """
    counts = [[0, 0, 0] for _ in range(ORDER)]  # n-grams in the hypotheses, in the references, and in both
    for one, other in zip(found, wanted, strict=True):
        texts = "".join(one.split()), "".join(other.split())
        for order, totals in enumerate(counts, 1):
            hypothesis, reference = (_ngrams(text, order) for text in texts)
            totals[0] += hypothesis.total() if reference else 0  # as sacrebleu does for references without n-grams
            totals[1] += reference.total()
            totals[2] += (hypothesis & reference).total()
    both = [(match / found, match / wanted) for found, wanted, match in counts if found and wanted]
    if not both:
        return 0.0
    precision, recall = (sum(values) / len(both) for values in zip(*both, strict=True))
    weighed = BETA**2 * precision + recall
    return 100 * (1 + BETA**2) * precision * recall / weighed if weighed else 0.0


def _ngrams(text: str, order: int) -> Counter[str]:
    return Counter(text[place : place + order] for place in range(len(text) - order + 1))
