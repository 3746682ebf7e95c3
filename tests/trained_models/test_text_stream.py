"""Text while it is written: no half characters, and nothing of what ends it."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from manual_backprop.common.errors import InputError
from manual_backprop.data.tokens.tokenizer import BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer
from manual_backprop.trained_models.text_stream import UNREADABLE, UntilStop, WholeCharacters, prompt_tokens

TEXT = "naïve café ☕, 😀😀 and 🇩🇪; 漢字. " * 3


def byte_pairs() -> Tokenizer:
    return BpeTokenizer.train([TEXT * 5], 275)


def pieces_of(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    characters = WholeCharacters(tokenizer)
    return [*(characters.add(token) for token in tokens), characters.rest()]


@pytest.mark.parametrize("make", [ByteTokenizer, byte_pairs, lambda: CharTokenizer(TEXT)])
def test_no_piece_has_half_a_character(make: Callable[[], Tokenizer]) -> None:
    tokenizer = make()
    tokens = tokenizer.encode(TEXT)
    pieces = pieces_of(tokenizer, tokens)
    assert "".join(pieces) == TEXT
    assert not any(UNREADABLE in piece for piece in pieces)
    # as soon as it is whole: nothing waits for the token behind it
    for end in range(1, len(tokens)):
        text = tokenizer.decode(tokens[:end])
        assert "".join(pieces[:end]) == text.rstrip(UNREADABLE)


@pytest.mark.parametrize("make", [ByteTokenizer, byte_pairs])
def test_whatever_a_model_writes(make: Callable[[], Tokenizer]) -> None:
    """Bytes that are no text, end tokens in between, ids without a token: the pieces are what decoding all gives."""
    tokenizer, chance = make(), random.Random(0)
    for _ in range(300):
        tokens = [chance.randrange(tokenizer.vocab_size + 2) for _ in range(chance.randrange(1, 12))]
        assert "".join(pieces_of(tokenizer, tokens)) == tokenizer.decode(tokens)


def test_what_never_became_a_character_comes_at_the_end() -> None:
    assert pieces_of(ByteTokenizer(), list("é".encode())[:1]) == ["", UNREADABLE]


@pytest.mark.parametrize("stops", [[], ["b"], ["ab"], ["aab"], ["ba", "aa"], ["abab", "bb"]])
def test_until_a_stop(stops: list[str]) -> None:
    """Against the whole text, cut into pieces at random."""
    chance = random.Random(0)
    for _ in range(300):
        text = "".join(chance.choice("ab") for _ in range(chance.randrange(1, 12)))
        until, shown, rest = UntilStop(stops), "", text
        while rest and not until.stopped:
            size = chance.randrange(1, 4)
            shown += until.add(rest[:size])
            rest = rest[size:]
        shown += until.waiting
        first = min((place for stop in stops if (place := text.find(stop)) >= 0), default=None)
        assert until.stopped == (first is not None)
        assert shown == text[:first]


def test_nothing_waits_that_cannot_be_a_stop() -> None:
    until = UntilStop(["stop"])
    assert [until.add(piece) for piece in ("a s", "top", "x")][:1] == ["a "]
    until = UntilStop(["stop"])
    assert [until.add(piece) for piece in ("st", "ep", "s")] == ["", "step", ""]


def test_an_empty_prompt_starts_a_document() -> None:
    assert prompt_tokens(ByteTokenizer(), "") == [256]
    assert prompt_tokens(ByteTokenizer(), "a") == [97]
    with pytest.raises(InputError, match="The prompt is empty, and tokenizer=char has no end token"):
        prompt_tokens(CharTokenizer("ab"), "")
