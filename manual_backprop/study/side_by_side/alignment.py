"""Aligns the statements of two functions, and those of a backward function with what autograd differentiates."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import zip_longest

from .statements import Statement

MIN_SIMILARITY = 0.55  # two statements that are less similar never share a row
SAME_TARGET_BONUS = 0.3  # added if both assign to the same name, or both return names
NOT_COMPARED = re.compile(r"self\.|\bops\.|, \w*cache\b|\.to\(self\.compute_dtype\)")  # only one side has these


@dataclass(frozen=True)
class Row:
    """A statement of the hand-written network and its counterpart in the mirror; None if there is none.

    `of`, in a backward function: the mirror's statement whose derivative `hand` computes.
    """

    hand: Statement | None
    autograd: Statement | None
    of: Statement | None = None

    @property
    def same(self) -> bool:
        return self.hand is not None and self.autograd is not None and self.hand.text == self.autograd.text


def similarity(left: Statement, right: Statement) -> float:
    """The similarity of two statements, 0 to 1 + SAME_TARGET_BONUS; 0 if they are nested at different depths."""
    if left.depth != right.depth:
        return 0.0
    one, other = (NOT_COMPARED.sub("", statement.text) for statement in (left, right))
    same = left.targets[:1] == right.targets[:1] if left.targets else _returns_names(left) and _returns_names(right)
    return SequenceMatcher(None, one, other, autojunk=False).ratio() + SAME_TARGET_BONUS * same


def _returns_names(statement: Statement) -> bool:
    """Whether it returns names only, without a call."""
    return statement.text.startswith("return ") and not re.search(r"\w\(", NOT_COMPARED.sub("", statement.text))


def aligned(left: Sequence[Statement], right: Sequence[Statement]) -> list[Row]:
    """The alignment with the largest sum of similarities. Both functions keep the order of their statements."""
    best = [[0.0] * (len(right) + 1) for _ in range(len(left) + 1)]  # largest sum for the first i and the first j
    similar = [[similarity(a, b) for b in right] for a in left]
    for i in range(1, len(left) + 1):
        for j in range(1, len(right) + 1):
            both = similar[i - 1][j - 1]
            together = best[i - 1][j - 1] + both if both >= MIN_SIMILARITY else 0.0
            best[i][j] = max(best[i - 1][j], best[i][j - 1], together)
    rows: list[Row] = []
    i, j = len(left), len(right)
    while i or j:
        both = similar[i - 1][j - 1] if i and j else 0.0
        if both >= MIN_SIMILARITY and best[i][j] == best[i - 1][j - 1] + both:
            i, j = i - 1, j - 1
            rows.append(Row(left[i], right[j]))
        elif j and (not i or best[i][j] == best[i][j - 1]):
            j -= 1
            rows.append(Row(None, right[j]))
        else:
            i -= 1
            rows.append(Row(left[i], None))
    return rows[::-1]


def line_by_line(left: Sequence[Statement], right: Sequence[Statement]) -> list[Row]:
    """The first statement beside the first, and so on: for two functions that compute the same in different ways."""
    return [Row(a, b) for a, b in zip_longest(left, right)]


def backward_rows(backward: Sequence[Statement], forward: Sequence[Row]) -> list[Row]:
    """Each statement of a backward function with the mirror's statement that it differentiates.

    The cache that a backward statement reads leads to it: the row of `forward` that assigns this cache has the mirror's
    statement.
    """
    assigned: dict[str, list[Row]] = {}
    for row in forward:
        for name in row.hand.targets if row.hand is not None else ():
            assigned.setdefault(name, []).append(row)
    rows = []
    for statement in backward:
        unpacks = re.search(r" = \w*cache$", statement.text) is not None
        names = [] if unpacks else re.findall(r"\w+_cache\b", statement.text)
        sources = [_source_row(assigned.get(name, []), statement) for name in names]
        of = next((source.autograd for source in sources if source is not None), None)
        rows.append(Row(statement, None, of))
    return rows


def _source_row(rows: Sequence[Row], statement: Statement) -> Row | None:
    """The row, of those that assign a cache, that belongs to a backward statement: the one in the same branch. Without
    such a branch the last one that has a counterpart, since a backward may return early in the first of two."""
    known = [row for row in rows if row.autograd is not None]
    branch = [row for row in known if row.hand is not None and row.hand.within == statement.within]
    return next(iter(branch or known[::-1]), None)
