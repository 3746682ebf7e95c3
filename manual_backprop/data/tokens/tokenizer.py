"""Tokenizers: text to token ids and back, without loss.

Each is one file `tokenizer.json`, small enough to lie in every checkpoint, and its digest is the SHA-256 of that file.
For BPE the file and the work are the `tokenizers` library's; bytes and characters need nothing but this module.
Tokenizers take no part in batching: ids come out as they are, with an end token only where a document ends.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...common.errors import InputError

FILE_NAME = "tokenizer.json"
END_TOKEN = "<eos>"
# What other tokenizers call it; the first that one has is its end token.
END_TOKENS = (END_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
SMALLEST_BPE = 257  # 256 bytes and the end token

_LONGEST_WORD = 10_000  # [characters]; learning merges takes the square of a word's length

_FORMAT = "manual_backprop tokenizer 1"


class Tokenizer:
    """What all tokenizers share. `end_token_id` follows every document; None: this one has no such token.

    `encode` raises an InputError for text that has no ids. `decode` leaves the end token out, since it is no text, and
    shows as U+FFFD what has no text: bytes that are no UTF-8 (a sample may end inside a character), and ids beyond
    `vocab_size`, which a network with a larger vocabulary may produce.
    """

    name: str
    vocab_size: int  # V [tokens]
    end_token_id: int | None

    def __init__(self, file_content: str):
        self._file_content = file_content
        self.digest = hashlib.sha256(file_content.encode("utf-8")).hexdigest()

    @property
    def content(self) -> str:
        """Of tokenizer.json."""
        return self._file_content

    def encode(self, text: str) -> list[int]:
        raise NotImplementedError

    def decode(self, ids: Sequence[int]) -> str:
        runs = itertools.groupby(ids, lambda token: 0 <= token < self.vocab_size)
        return "".join(self._decode(list(run)) if known else "\ufffd" * len(list(run)) for known, run in runs)

    def encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        """The ids of each text, without end tokens."""
        return (np.array(self.encode(text), dtype=np.int64) for text in texts)

    @property
    def dtype(self) -> type[np.uint16] | type[np.uint32]:
        """The smallest number format that holds every id on disk."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    def save(self, directory: str | Path) -> Path:
        path = Path(directory) / FILE_NAME
        path.write_bytes(self._file_content.encode("utf-8"))
        return path

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """A token for each byte of UTF-8, and the end token 256: nothing to learn, no text that it does not know."""

    name = "byte"
    vocab_size = 257
    end_token_id = 256

    def __init__(self) -> None:
        super().__init__(json.dumps({"format": _FORMAT, "name": self.name}))

    def encode(self, text: str) -> list[int]:
        return list(_utf8(text))

    def _decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token != self.end_token_id).decode("utf-8", "replace")

    def encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        return (np.frombuffer(_utf8(text), dtype=np.uint8) for text in texts)


class CharTokenizer(Tokenizer):
    """A token for each character of a corpus, in the order of their code points, and nothing else: no end token."""

    name = "char"
    end_token_id = None

    def __init__(self, characters: Iterable[str]):
        self.characters = sorted(set(characters))
        if not self.characters:
            raise InputError("A character tokenizer needs text to take its characters from, and was given none.")
        self.vocab_size = len(self.characters)
        self._code_points = np.array([ord(character) for character in self.characters], dtype=np.uint32)
        super().__init__(json.dumps({"format": _FORMAT, "name": self.name, "characters": "".join(self.characters)}))

    @classmethod
    def train(cls, texts: Iterable[str]) -> CharTokenizer:
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return cls(characters)

    def encode(self, text: str) -> list[int]:
        return self._ids(text).tolist()

    def _decode(self, ids: list[int]) -> str:
        return "".join(self.characters[token] for token in ids)

    def encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        return map(self._ids, texts)

    def _ids(self, text: str) -> np.ndarray:
        code_points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        ids = np.searchsorted(self._code_points, code_points)
        unknown = self._code_points[np.minimum(ids, self.vocab_size - 1)] != code_points
        if unknown.any():
            position = int(unknown.argmax())
            raise InputError(
                f"The character {text[position]!r} (U+{ord(text[position]):04X}, at position {position}) is not among "
                f"the {self.vocab_size} characters of the corpus that this tokenizer was made from. Leave it out, or "
                "train with tokenizer=bpe or tokenizer=byte, which know every text."
            )
        return ids


class BpeTokenizer(Tokenizer):
    """Byte pair encoding over bytes (Sennrich et al. 2016; Radford et al. 2019, section 2.2): knows every text.

    Built from the content of a `tokenizer.json` of the `tokenizers` library. A text that spells the end token is
    encoded as the letters that it is: only a document's real end becomes the end token.
    """

    name = "bpe"

    def __init__(self, file_content: str):
        import tokenizers

        super().__init__(file_content)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file_content)
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"This is no tokenizer that the tokenizers library can read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # not kept in the file
        self._tokenizer.no_truncation()  # the file may say otherwise
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # some leave numbers out
        ends = map(self._tokenizer.token_to_id, END_TOKENS)
        self.end_token_id = next((end for end in ends if end is not None), None)

    @classmethod
    def train(
        cls,
        texts: Iterable[str],
        vocab_size: int,
        special_tokens: Sequence[str] = (END_TOKEN,),
        min_frequency: int = 2,  # a pair that is seen once teaches nothing
    ) -> BpeTokenizer:
        """Learns merges until there are `vocab_size` tokens, or no pair is left that is seen `min_frequency` times."""
        import tokenizers

        if vocab_size < SMALLEST_BPE:
            raise InputError(
                f"tokenizer.vocab_size={vocab_size}: BPE needs at least {SMALLEST_BPE}, one token for each byte and "
                "one for the end of a document. Use a larger one, or tokenizer=byte or tokenizer=char."
            )
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=min_frequency,
            special_tokens=list(special_tokens),
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(map(_without_endless_words, texts), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        _utf8(text)
        try:
            return self._tokenizer.encode(text, add_special_tokens=False).ids
        except Exception as error:  # of a list of words: one that is not in it; the library raises nothing more precise
            raise InputError(f"The tokenizer does not know every character of this text ({error}).") from error

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        for text in texts:
            _utf8(text)
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer that was saved in a folder."""
    path = Path(directory) / FILE_NAME
    try:
        file_content = path.read_bytes().decode("utf-8")
        content: Any = json.loads(file_content)
    except OSError as error:
        raise InputError(
            f"{path} cannot be read ({error.strerror or error}): a tokenizer was expected there."
        ) from error
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}. Take the tokenizer from another checkpoint.") from error
    if isinstance(content, dict) and "model" in content:
        return BpeTokenizer(file_content)
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        if content.get("name") == ByteTokenizer.name:
            return ByteTokenizer()
        if content.get("name") == CharTokenizer.name and isinstance(content.get("characters"), str):
            return CharTokenizer(content["characters"])
    raise InputError(
        f"{path} holds no tokenizer that is known here: expected byte, char, or one of the tokenizers library."
    )


def _without_endless_words(text: str) -> str:
    """A text to learn from, in which what goes on for long without a space gets some."""
    _utf8(text)
    return re.sub(rf"(\S{{{_LONGEST_WORD}}})", r"\1 ", text) if len(text) > _LONGEST_WORD else text


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"The text has half of a surrogate pair ({text[error.start]!r}) at position {error.start}, which no UTF-8 "
            "can hold: remove it or replace it."
        ) from error
