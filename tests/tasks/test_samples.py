"""How varied a sample is."""

from __future__ import annotations

import pytest

from manual_backprop.tasks.samples import WordCounts, count_words


@pytest.mark.parametrize(
    ("text", "words", "distinct", "repeated"),
    [
        ("", 0, 0, 0),
        ("one", 1, 1, 0),
        ("a b a b", 4, 2, 1),
        ("a a a a", 4, 1, 2),
        ("the cat\nsaw  the\tcat.", 5, 4, 0),
    ],
)
def test_counts(text: str, words: int, distinct: int, repeated: int) -> None:
    assert count_words(text) == WordCounts(words, distinct, repeated)


def test_in_words() -> None:
    assert str(count_words("a b a b")) == "4 words, 2 distinct; 1 of 3 bigrams repeated"
    assert str(count_words("")) == "0 words, 0 distinct; 0 of 0 bigrams repeated"
