"""A text changed a little, so that an epoch never meets it as the last one did: words swapped, deleted or inserted
(Wei & Zou 2019, "EDA"). For training texts only; what is done to a text is a function of (seed, epoch, row)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

SHARE = 0.1  # of a text's words, but one at least
_WORDS = re.compile(r"\S+")


def augmented(text: str, kinds: Sequence[str], seed: int, epoch: int, row: int) -> str:
    """The text after one of the changes that `kinds` names, drawn like everything else of it. What stands between
    words stays with the word before it. A text of one word stays as it is."""
    places = [match.start() for match in _WORDS.finditer(text)]
    if not kinds or len(places) < 2:
        return text
    pieces = [text[begin:end] for begin, end in zip(places, [*places[1:], len(text)], strict=True)]
    words = [piece.rstrip() for piece in pieces]
    gaps = [piece[len(word) :] for piece, word in zip(pieces, words, strict=True)]
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, row, 1], dtype=np.uint64)  # apart from what the order of rows draws with the same key
    count = max(1, round(SHARE * len(words)))
    draws = np.random.Philox(counter=counter, key=key).random_raw(1 + 2 * count + len(words))
    change = CHANGES[kinds[int(draws[0] % np.uint64(len(kinds)))]]
    changed, between = change(words, gaps, draws[1:], count)
    return text[: places[0]] + "".join(word + gap for word, gap in zip(changed, between, strict=True))


Changed = tuple[list[str], list[str]]


def _swapped(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """Two words change their places, `count` times."""
    words = list(words)
    for one, other in (draws[: 2 * count] % np.uint64(len(words))).reshape(count, 2).tolist():
        words[one], words[other] = words[other], words[one]
    return words, gaps


def _deleted(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """Each word with the probability SHARE; never all."""
    kept = [place for place, draw in enumerate(draws[2 * count :].tolist()) if draw / 2**64 >= SHARE]
    kept = kept or [int(draws[0] % np.uint64(len(words)))]
    return [words[place] for place in kept], [gaps[place] for place in kept]


def _inserted(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """A word of the text once more, somewhere before another, `count` times."""
    words, gaps = list(words), list(gaps)
    for one, place in (draws[: 2 * count] % np.uint64(len(words))).reshape(count, 2).tolist():
        words.insert(place, words[one])
        gaps.insert(place, " ")
    return words, gaps


CHANGES: dict[str, Callable[[list[str], list[str], np.ndarray, int], Changed]] = {
    "swap": _swapped,
    "delete": _deleted,
    "insert": _inserted,
}
