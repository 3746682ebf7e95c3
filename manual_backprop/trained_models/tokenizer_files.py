"""The tokenizer of a model as the files that `transformers` reads: tokenizer.json and tokenizer_config.json.

BPE is the `tokenizers` library's already. Bytes and characters are made anew from its parts, with the same ids for
every text. One thing is different there, for all: a text that spells the end token becomes that token.
"""

import json
from pathlib import Path
from typing import Any

import tokenizers

from ..common.errors import InputError
from ..data.tokens.tokenizer import FILE_NAME, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer

END_TOKEN = "<eos>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, max_seq_len: int) -> None:
    if isinstance(tokenizer, BpeTokenizer):
        tokenizer.save(folder)
    elif isinstance(tokenizer, ByteTokenizer):
        _of_bytes(tokenizer).save(str(folder / FILE_NAME))
    elif isinstance(tokenizer, CharTokenizer):
        _of_characters(tokenizer).save(str(folder / FILE_NAME))
    else:
        raise InputError(f"a tokenizer of kind {tokenizer.name} has no counterpart in transformers")
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if isinstance(tokenizer, BpeTokenizer) and tokenizer.settings is not None:
        # Its own special tokens and ways; no code of others, and no longer texts than this network takes.
        theirs = {key: value for key, value in tokenizer.settings.items() if key != "auto_map"}
        settings |= theirs | {"model_max_length": max_seq_len}
    end, begin = tokenizer.end_token_id, tokenizer.begin_token_ids
    if end is not None:
        written = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
        named = {"bos_token": written.id_to_token(begin[0] if begin else end), "eos_token": written.id_to_token(end)}
        settings = named | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _of_bytes(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """A BPE that has learned no merge: every byte stays a token."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    vocabulary = {_letter_of(byte): byte for byte in range(256)} | {END_TOKEN: tokenizer.end_token_id}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    made.pre_tokenizer, made.decoder = level, tokenizers.decoders.ByteLevel()
    made.add_special_tokens([END_TOKEN])
    return made


def _letter_of(byte: int) -> str:
    """By which GPT-2 writes a byte: printable ones by themselves, the others by letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    if byte in printable:
        return chr(byte)
    return chr(0x100 + [other for other in range(256) if other not in printable].index(byte))


def _of_characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """A list of words, each of one character. An unknown one is refused there too."""
    vocabulary = {character: token for token, character in enumerate(tokenizer.characters)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="<unknown>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    made.decoder = tokenizers.decoders.Fuse()
    return made
