"""How varied a sample is."""

from __future__ import annotations

import pytest

from manual_backprop.tasks.samples import count_words


@pytest.mark.parametrize(
    ("text", "counts"),
    [
        ("", "0 words, 0 distinct; 0 of 0 bigrams repeated"),
        ("one", "1 words, 1 distinct; 0 of 0 bigrams repeated"),
        ("a b a b", "4 words, 2 distinct; 1 of 3 bigrams repeated"),
        ("a a a a", "4 words, 1 distinct; 2 of 3 bigrams repeated"),
        ("the cat\nsaw  the\tcat.", "5 words, 4 distinct; 0 of 4 bigrams repeated"),
    ],
)
def test_counts(text: str, counts: str) -> None:
    assert count_words(text) == counts
