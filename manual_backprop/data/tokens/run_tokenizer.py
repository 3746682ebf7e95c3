"""The tokenizer of a run's config, existing or learned from the run's text, and which parts of a text it loses."""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from ...common.errors import InputError
from ...config.schema import TokenizerConfig
from ..sources.hub import is_commit
from ..sources.spool import SAMPLE
from .tokenizer import END_TOKENS, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

log = logging.getLogger(__name__)

MOST_DROPPED = 0.01  # largest share of a text's bytes without tokens; as for bad rows
CHARACTERS_TO_JUDGE = 100_000  # of a text, encoded and decoded as a check


def tokenizer_identity(config: TokenizerConfig) -> list[Any]:
    """A JSON value that, together with a text, identifies the tokenizer of a config. Raises InputError.

    A tokenizer of the hub is loaded to know its content, unless the config pins a commit.
    """
    if is_commit(config.revision):
        return [config.name, config.repository, config.revision, "with its settings"]
    complete = complete_tokenizer(config)
    if complete is not None:
        return [config.name, complete.digest]
    return [config.name, config.vocab_size] if config.name == BpeTokenizer.name else [config.name, None, None]


def make_tokenizer(config: TokenizerConfig, training: Iterable[str], everything: Iterable[str]) -> Tokenizer:
    """The tokenizer of a config, learned from texts if necessary: BPE learns from `training`, a character tokenizer has
    the characters of `everything`."""
    complete = complete_tokenizer(config)
    if complete is not None:
        return complete
    if config.name == CharTokenizer.name:
        return CharTokenizer.train(everything)
    assert config.vocab_size is not None
    return BpeTokenizer.train(training, config.vocab_size)


def learned_tokenizer(config: TokenizerConfig, training: Sequence[str], everything: Iterable[str]) -> Tokenizer:
    """`make_tokenizer` for texts in memory: BPE learns from an evenly spread sample if `training` is large."""
    sample = training[:: 1 + sum(map(len, training)) // SAMPLE]
    tokenizer = make_tokenizer(config, sample, everything)
    warn_of_small_text(config, tokenizer)
    return tokenizer


def warn_of_small_text(config: TokenizerConfig, tokenizer: Tokenizer) -> None:
    """Warns if BPE has learned fewer tokens than the config asks for."""
    if config.name == BpeTokenizer.name and tokenizer.vocab_size < (config.vocab_size or 0):
        log.warning(
            "The text is too small to learn tokenizer.vocab_size=%d tokens: the tokenizer has %d.",
            *(config.vocab_size, tokenizer.vocab_size),
        )


def complete_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer of a config; None if it must be learned from a text. Raises InputError for an unknown one."""
    if config.name == ByteTokenizer.name:
        return ByteTokenizer()
    if config.name == CharTokenizer.name:
        return None
    if config.name == BpeTokenizer.name:
        if config.vocab_size is None:
            raise InputError("tokenizer=bpe needs the number of tokens to learn: give tokenizer.vocab_size=NUMBER.")
        return None
    if config.repository is None and config.path is None:
        raise InputError(f"tokenizer={config.name}: there is no such tokenizer; use bpe, byte, char, file or gpt2.")
    from .pretrained import pretrained_tokenizer

    return pretrained_tokenizer(config)


def tokenizer_notes(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """Notes on what a pretrained tokenizer lacks: an end token, lossless decoding, or tokens for all of the text.

    Raises InputError if it would leave out more than MOST_DROPPED of the text.
    """
    notes = []
    if tokenizer.end_token_id is None and not isinstance(tokenizer, CharTokenizer):
        notes.append(f"the tokenizer has no end token ({', '.join(END_TOKENS)}): nothing separates documents")
    letters: Counter[str] = Counter()
    unknown = tokens = 0
    for number, text in enumerate(texts):
        if number == 0:
            notes += _decoding_notes(tokenizer, text[:CHARACTERS_TO_JUDGE])
        if tokenizer.knows_all:
            return notes
        letters.update(text)
        if tokenizer.unknown_token_id is not None:
            (ids,) = tokenizer.encode_many([text])
            unknown, tokens = unknown + int((ids == tokenizer.unknown_token_id).sum()), tokens + len(ids)
    dropped = {letter: count for letter, count in letters.items() if tokenizer.drops(letter)}
    if dropped:
        lost, size = (sum(len(letter.encode()) * n for letter, n in counts.items()) for counts in (dropped, letters))
        most = ", ".join(repr(letter) for letter, _ in Counter(dropped).most_common(5))
        note = f"the tokenizer has no token for {lost:,} of {size:,} bytes of the text ({lost / size:.2%}: {most})"
        if lost > MOST_DROPPED * size:
            raise InputError(
                f"{note} and leaves them out, which would make every loss too low: at most {MOST_DROPPED:.0%} may be "
                "left out. Use one that encodes these characters, as tokenizer=bpe or tokenizer=byte, or another "
                "text."
            )
        notes.append(f"{note} and leaves them out: bits per byte are too low by about that share")
    if unknown:
        notes.append(
            f"{unknown:,} of {tokens:,} tokens of the text ({unknown / tokens:.2%}) are the unknown token, which hides "
            "the text: bits per byte are too low"
        )
    return notes


def _decoding_notes(tokenizer: Tokenizer, text: str) -> list[str]:
    back = tokenizer.decode(tokenizer.encode(text))
    if back == text:
        return []
    place = next((place for place, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), 0)
    here = text[place : place + 20], back[place : place + 20]
    return [f"the tokenizer does not preserve the text: {here[0]!r} is decoded as {here[1]!r}"]
