"""A model's tokenizer as the files that `transformers` reads: tokenizer.json and tokenizer_config.json.

BPE uses the `tokenizers` library already. Byte and character tokenizers are rebuilt from its components, with the same
ids for every text. One thing differs in `transformers`: a text that spells the end token becomes that token.
"""

import itertools
import json
from pathlib import Path
from typing import Any

import tokenizers

from ..common.errors import InputError
from ..data.tokens.tokenizer import END_TOKEN, FILE_NAME, BpeTokenizer, ByteTokenizer, CharTokenizer, Tokenizer


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
        # Keep its special tokens and settings, but no remote code, and this network's sequence length.
        theirs = {key: value for key, value in tokenizer.settings.items() if key != "auto_map"}
        settings |= theirs | {"model_max_length": max_seq_len}
    end, begin = tokenizer.end_token_id, tokenizer.begin_token_ids
    if end is not None:
        written = tokenizers.Tokenizer.from_file(str(folder / FILE_NAME))
        named = {"bos_token": written.id_to_token(begin[0] if begin else end), "eos_token": written.id_to_token(end)}
        settings = named | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _of_bytes(tokenizer: ByteTokenizer) -> tokenizers.Tokenizer:
    """A byte tokenizer as BPE without merges."""
    level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    # the characters for bytes in GPT-2's vocabulary: themselves if printable, otherwise those from U+0100 on, in order
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    vocabulary = {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
    vocabulary[END_TOKEN] = tokenizer.end_token_id
    rebuilt = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    rebuilt.pre_tokenizer, rebuilt.decoder = level, tokenizers.decoders.ByteLevel()
    rebuilt.add_special_tokens([END_TOKEN])
    return rebuilt


def _of_characters(tokenizer: CharTokenizer) -> tokenizers.Tokenizer:
    """A character tokenizer as a list of words of one character. It refuses unknown characters too."""
    vocabulary = {character: token for token, character in enumerate(tokenizer.characters)}
    rebuilt = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=vocabulary, unk_token="<unknown>"))
    rebuilt.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex(r"[\s\S]"), "isolated")
    rebuilt.decoder = tokenizers.decoders.Fuse()
    return rebuilt
