"""The statements of two functions side by side, and a backward function beside what autograd differentiates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest

from .statements import Statement

LIKE = 0.55  # two statements of at least this likeness correspond
SAME_END = 0.3  # added if both assign the same name first, or return names
ASIDE = re.compile(r"self\.|\bops\.|, \w*cache\b|\.to\(self\.compute_dtype\)")  # ignored when statements are compared


@dataclass(frozen=True)
class Row:
    """A statement by hand beside that under autograd. For a statement of a backward, `autograd` is None and `of` is the
    mirror's statement whose derivative it computes."""

    hand: Statement | None
    autograd: Statement | None
    of: Statement | None = None

    @property
    def same(self) -> bool:
        return self.hand is not None and self.autograd is not None and self.hand.text == self.autograd.text


def likeness(left: Statement, right: Statement) -> float:
    """0 to 1, plus SAME_END if both assign or return the same; 0 if they are nested differently."""
    if left.depth != right.depth:
        return 0.0
    one, other = (ASIDE.sub("", statement.text) for statement in (left, right))
    same = left.targets[:1] == right.targets[:1] if left.targets else _returns_names(left) and _returns_names(right)
    return SequenceMatcher(None, one, other, autojunk=False).ratio() + SAME_END * same


def _returns_names(statement: Statement) -> bool:
    return statement.text.startswith("return ") and not re.search(r"\w\(", ASIDE.sub("", statement.text))


def aligned(left: Sequence[Statement], right: Sequence[Statement]) -> list[Row]:
    """Both lists in their order, corresponding statements side by side, so that the sum of likenesses is largest."""
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]  # of the first i and the first j
    like = [[likeness(a, b) for b in right] for a in left]
    for i in range(1, len(left) + 1):
        for j in range(1, len(right) + 1):
            both = like[i - 1][j - 1]
            together = best[i - 1][j - 1] + both if both >= LIKE else 0.0
            best[i][j] = max(best[i - 1][j], best[i][j - 1], together)
    rows: list[Row] = []
    i, j = len(left), len(right)
    while i or j:
        both = like[i - 1][j - 1] if i and j else 0.0
        if both >= LIKE and best[i][j] == best[i - 1][j - 1] + both:
            i, j = i - 1, j - 1
            rows.append(Row(left[i], right[j]))
        elif j and (not i or best[i][j] == best[i][j - 1]):
            j -= 1
            rows.append(Row(None, right[j]))
        else:
            i -= 1
            rows.append(Row(left[i], None))
    return rows[::-1]


def beside(left: Sequence[Statement], right: Sequence[Statement]) -> list[Row]:
    """Both lists in their order, row by row, for functions whose statements do not correspond."""
    return [Row(a, b) for a, b in zip_longest(left, right)]


def backward_rows(backward: Sequence[Statement], forward: Sequence[Row]) -> list[Row]:
    """Each statement of a backward function with the mirror's statement that it differentiates.

    The cache determines it: the forward statement that makes the cache is beside the mirror's in `forward`.
    """
    made: dict[str, list[Row]] = {}
    for row in forward:
        for name in row.hand.targets if row.hand is not None else ():
            made.setdefault(name, []).append(row)
    rows = []
    for statement in backward:
        unpacks = re.search(r" = \w*cache$", statement.text) is not None
        names = [] if unpacks else re.findall(r"\w+_cache\b", statement.text)
        makers = [_the_one(made.get(name, []), statement) for name in names]
        of = next((maker.autograd for maker in makers if maker is not None), None)
        rows.append(Row(statement, None, of))
    return rows


def _the_one(rows: Sequence[Row], statement: Statement) -> Row | None:
    """Of the rows that make a cache, the one in the same branch. If there is none (a backward may return in the first
    of two branches), the last row that has a statement of the mirror."""
    there = [row for row in rows if row.autograd is not None]
    branch = [row for row in there if row.hand is not None and row.hand.within == statement.within]
    return next(iter(branch or there[::-1]), None)
