"""The tokenizer that a run's config means: ready at once, or made of the run's text; and what it loses of a text."""

from typing import Any

import numpy as np

from ...common.errors import InputError
from ...config.schema import TokenizerConfig
from ..sources.hub import is_commit
from ..sources.spool import SpooledText
from .tokenizer import END_TOKENS, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

CHARACTERS_TO_JUDGE = 100_000  # of a text, that are encoded and decoded again


def tokenizer_identity(config: TokenizerConfig) -> list[Any]:
    """JSON that names the tokenizer which this config makes of a text. Raises InputError where it makes none.

    One of the hub is loaded where its content must be known; a commit of it is taken at its word.
    """
    if is_commit(config.revision):
        return [config.name, config.repository, config.revision]
    complete = complete_tokenizer(config)
    if complete is not None:
        return [config.name, complete.digest]
    return [config.name, config.vocab_size] if config.name == BpeTokenizer.name else [config.name, None, None]


def make_tokenizer(config: TokenizerConfig, text: SpooledText, parts: dict[str, np.ndarray]) -> Tokenizer:
    """`parts` (documents, 2) of the text are the splits: BPE learns from `train` alone, characters are those of all."""
    complete = complete_tokenizer(config)
    if complete is not None:
        return complete
    if config.name == CharTokenizer.name:
        return CharTokenizer.train(text.texts(np.concatenate([parts["train"], parts["validation"]])))
    assert config.vocab_size is not None
    return BpeTokenizer.train(text.sample(parts["train"]), config.vocab_size)


def complete_tokenizer(config: TokenizerConfig) -> Tokenizer | None:
    """The tokenizer, unless it is learned from a text. Raises InputError where there is none of that name."""
    if config.name == ByteTokenizer.name:
        return ByteTokenizer()
    if config.name == CharTokenizer.name:
        return None
    if config.name == BpeTokenizer.name:
        if config.vocab_size is None:
            raise InputError("tokenizer=bpe needs to know how many tokens to learn: give tokenizer.vocab_size=NUMBER.")
        return None
    if config.repository is None and config.path is None:
        raise InputError(f"tokenizer={config.name}: there is no such tokenizer; use bpe, byte, char, file or gpt2.")
    from .pretrained import pretrained_tokenizer

    return pretrained_tokenizer(config)


def what_is_lost(tokenizer: Tokenizer, text: str) -> list[str]:
    """What a tokenizer of others may lack: an end token, and giving back what it was given."""
    notes = []
    if tokenizer.end_token_id is None and not isinstance(tokenizer, CharTokenizer):
        notes.append(f"the tokenizer has no end token ({', '.join(END_TOKENS)}): nothing stands between documents")
    text = text[:CHARACTERS_TO_JUDGE]
    back = tokenizer.decode(tokenizer.encode(text))
    if back != text:
        place = next((place for place, pair in enumerate(zip(text, back, strict=False)) if pair[0] != pair[1]), 0)
        here = text[place : place + 20], back[place : place + 20]
        notes.append(f"the tokenizer does not give back the text: {here[0]!r} comes back as {here[1]!r}")
    return notes
