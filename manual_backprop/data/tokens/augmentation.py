"""Text augmentation: words are swapped, deleted or inserted, differently in each epoch (Wei & Zou 2019, "EDA"). For
training texts only; the change of a text is a function of (seed, epoch, row)."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

SHARE = 0.1  # of a text's words that change, but at least one word
_WORDS = re.compile(r"\S+")


def augmented(text: str, kinds: Sequence[str], seed: int, epoch: int, row: int) -> str:
    """The text after a random change, one of `kinds`. White space after a word stays at its place. A text of one word
    is returned unchanged."""
    places = [match.start() for match in _WORDS.finditer(text)]
    if not kinds or len(places) < 2:
        return text
    pieces = [text[begin:end] for begin, end in zip(places, [*places[1:], len(text)], strict=True)]
    words = [piece.rstrip() for piece in pieces]
    gaps = [piece[len(word) :] for piece, word in zip(pieces, words, strict=True)]
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    counter = np.array([0, 0, row, 1], dtype=np.uint64)  # disjoint from the counters of `epoch_order` with this key
    count = max(1, round(SHARE * len(words)))
    draws = np.random.Philox(counter=counter, key=key).random_raw(1 + 2 * count + len(words))
    change = CHANGES[kinds[int(draws[0] % np.uint64(len(kinds)))]]
    changed, between = change(words, gaps, draws[1:], count)
    return text[: places[0]] + "".join(word + gap for word, gap in zip(changed, between, strict=True))


Changed = tuple[list[str], list[str]]


def _swapped(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """Swap two random words, `count` times."""
    words = list(words)
    for one, other in (draws[: 2 * count] % np.uint64(len(words))).reshape(count, 2).tolist():
        words[one], words[other] = words[other], words[one]
    return words, gaps


def _deleted(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """Delete each word with probability SHARE, but never all."""
    kept = [place for place, draw in enumerate(draws[2 * count :].tolist()) if draw / 2**64 >= SHARE]
    kept = kept or [int(draws[0] % np.uint64(len(words)))]
    return [words[place] for place in kept], [gaps[place] for place in kept]


def _inserted(words: list[str], gaps: list[str], draws: np.ndarray, count: int) -> Changed:
    """Insert a copy of a random word of the text before another word, `count` times."""
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
