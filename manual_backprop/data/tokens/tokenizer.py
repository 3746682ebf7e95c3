"""Tokenizers: text to token ids and back, without loss.

A tokenizer is one file `tokenizer.json`, small enough to be saved in every checkpoint; its digest is the SHA-256 of the
file. A pretrained one may also have `tokenizer_config.json`, which names its special tokens; if that changes something,
the digest covers both. BPE uses the `tokenizers` library and its file format; byte and character tokenizers need only
this module. Tokenizers add nothing for batching: an end token follows a document and nothing else.
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
SETTINGS_FILE = "tokenizer_config.json"  # of `transformers`: names the token that ends a document
OUR_FILES = ("manifest.json", "config.yaml")  # in our folders with a tokenizer: checkpoints, cached tokens and runs
END_TOKEN = "<eos>"
# Its names in other tokenizers; the first name that a tokenizer has is its end token.
END_TOKENS = (END_TOKEN, "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>")
SMALLEST_BPE = 257  # 256 bytes and the end token

_LONGEST_WORD = 10_000  # [characters]; training takes time quadratic in the length of a word

_FORMAT = "manual_backprop tokenizer 1"


class Tokenizer:
    """The base class of tokenizers. `end_token_id` follows every document; None: there is no such token.

    `encode` raises InputError for text that it cannot encode. `decode` leaves out the end token. It shows U+FFFD for
    bytes that are not UTF-8 (a sample may end inside a character), and for ids from `vocab_size` on, which a network
    with a larger vocabulary may generate.
    """

    name: str
    vocab_size: int  # V [tokens]
    end_token_id: int | None
    begin_token_ids: tuple[int, ...] = ()  # before every document and prompt
    unknown_token_id: int | None = None  # replaces unknown characters
    knows_all = True  # whether every text is encoded completely or refused
    context = 0  # number of preceding tokens that the text of a token may depend on

    def __init__(self, file_content: str):
        self.content = file_content  # of tokenizer.json
        self.digest = hashlib.sha256(file_content.encode("utf-8")).hexdigest()

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
        """The smallest dtype for storing every id on disk."""
        return np.uint16 if self.vocab_size <= 2**16 else np.uint32

    @property
    def files(self) -> dict[str, str]:
        """{name: content} of the files that `save` writes."""
        return {FILE_NAME: self.content}

    def save(self, directory: str | Path, prefix: str = "") -> list[Path]:
        """Write the files into a folder. `prefix` begins their names, for a folder with several tokenizers."""
        paths = []
        for name, content in self.files.items():
            paths.append(path := Path(directory) / f"{prefix}{name}")
            path.write_bytes(content.encode("utf-8"))
        return paths

    def open_bytes(self, ids: Sequence[int]) -> int:
        """The number of tokens at the end that are single bytes, whose text the next token may still change."""
        return 0

    def drops(self, character: str) -> bool:
        """Whether `encode` silently leaves out this character."""
        return False

    def _decode(self, ids: list[int]) -> str:
        raise NotImplementedError


class ByteTokenizer(Tokenizer):
    """One token for each byte of UTF-8, and the end token 256. It needs no training and encodes every text."""

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
    """One token for each character of a corpus, in the order of code points. It has no end token."""

    name = "char"
    end_token_id = None

    def __init__(self, characters: Iterable[str]):
        self.characters = sorted(set(characters))
        if not self.characters:
            raise InputError("A character tokenizer needs text to take its characters from, but got none.")
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
                "train with tokenizer=bpe or tokenizer=byte, which can encode every text."
            )
        return ids


class BpeTokenizer(Tokenizer):
    """Byte pair encoding over bytes (Sennrich et al. 2016; Radford et al. 2019, section 2.2), which encodes every text;
    or any other `tokenizer.json` of the `tokenizers` library, which may not.

    It is built from the content of that file and, if present, of `tokenizer_config.json`. The tokens that the file's
    post-processor adds before a text, `begin_token_ids`, precede every document and every prompt, unless `with_begin`
    is false. Those that it adds after a text are left out: only the end token ends a document, and a prompt has no end.
    A text that spells the end token is encoded as ordinary characters, not as the end token.
    """

    name = "bpe"

    def __init__(self, file_content: str, settings: str | None = None, with_begin: bool = True):
        import tokenizers

        super().__init__(file_content)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(file_content)
        except Exception as error:  # the library raises nothing more precise
            raise InputError(f"This is not a tokenizer that the tokenizers library can read: {error}") from error
        self._tokenizer.encode_special_tokens = True  # the file does not store this setting
        self._tokenizer.no_truncation()  # the file may have it set
        self._tokenizer.no_padding()
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values(), default=-1)  # some have unused ids
        content = json.loads(file_content)
        self.settings = None if settings is None else _settings(settings)
        ends = (number for name in END_TOKENS if (number := self._tokenizer.token_to_id(name)) is not None)
        self.end_token_id = usual = next(ends, None)
        if self.settings is not None and "eos_token" in self.settings:
            self.end_token_id = self._token_of("eos_token")
        if with_begin and content.get("post_processor") is not None:
            self.begin_token_ids = self._begin_tokens()
        if self.end_token_id != usual or self.begin_token_ids:
            both = f"{file_content}\n{json.dumps([self.end_token_id, *self.begin_token_ids])}"
            self.digest = hashlib.sha256(both.encode("utf-8")).hexdigest()
        kinds = _kinds(content.get("decoder"))
        self._bytes: dict[int, str] = {}
        if "ByteFallback" in kinds:
            numbers = self._tokenizer.get_vocab().items()
            self._bytes = {number: token for token, number in numbers if re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)}
        added = self._tokenizer.get_added_tokens_decoder().items()
        self._silent = {number: str(token) for number, token in added if token.special}  # left out when decoding
        self.context = 0 if kinds == ["ByteLevel"] else 32
        self.knows_all = _knows_every_byte(content, len(self._bytes))
        unknown = (content.get("model") or {}).get("unk_token")
        self.unknown_token_id = None if unknown is None else self._tokenizer.token_to_id(unknown)

    def _token_of(self, name: str) -> int | None:
        """The id of the token that the settings call `name`; None if that is null."""
        assert self.settings is not None
        token = self.settings[name]
        text = token.get("content") if isinstance(token, dict) else token
        if text is None:
            return None
        number = self._tokenizer.token_to_id(str(text))
        if number is None:
            raise InputError(
                f"{SETTINGS_FILE} names the {name} {str(text)!r}, but {FILE_NAME} has no such token. Give the two "
                "files that belong together, or correct the name."
            )
        return int(number)

    def _begin_tokens(self) -> tuple[int, ...]:
        """The tokens that the post-processor adds before a text, found by encoding one: there are many kinds of it."""
        for text in ("a", "0", *list(self._tokenizer.get_vocab())[:50]):
            try:
                plain = self._tokenizer.encode(text, add_special_tokens=False).ids
                full = self._tokenizer.encode(text, add_special_tokens=True).ids
            except Exception:  # an unknown character; the library raises nothing more precise
                continue
            if plain and full != plain:
                place = next((at for at in range(len(full)) if full[at : at + len(plain)] == plain), 0)
                return tuple(full[:place])
            if plain:
                return ()
        return ()

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, special_tokens: Sequence[str] = (END_TOKEN,), min_frequency: int = 2
    ) -> BpeTokenizer:
        """Learn merges until there are `vocab_size` tokens, or until no pair occurs `min_frequency` times."""
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
        tokenizer.train_from_iterator(map(_with_split_words, texts), trainer)
        return cls(tokenizer.to_str())

    def encode(self, text: str) -> list[int]:
        return list(self._encoding(text).ids)

    def _encoding(self, text: str) -> Any:
        _utf8(text)
        try:
            return self._tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # an unknown word or character; the library raises nothing more precise
            raise InputError(f"The tokenizer cannot encode every character of this text ({error}).") from error

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def encode_many(self, texts: list[str]) -> Iterable[np.ndarray]:
        for text in texts:
            _utf8(text)
        try:
            encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        except Exception:  # encode one by one, since the library does not say which text is wrong
            return [np.array(self.encode(text), dtype=np.int64) for text in texts]
        return (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)

    @property
    def files(self) -> dict[str, str]:
        if self.settings is None and not self.begin_token_ids:
            return super().files
        # Our folders without this file are from an older version, which added no begin tokens.
        return super().files | {SETTINGS_FILE: json.dumps(self.settings or {}, indent=2) + "\n"}

    def open_bytes(self, ids: Sequence[int]) -> int:
        if not self._bytes:
            return 0
        n = next((n for n, token in enumerate(reversed(ids)) if token not in self._bytes | self._silent), len(ids))
        return n if any(token in self._bytes for token in ids[len(ids) - n :]) else 0

    def drops(self, character: str) -> bool:
        if self.knows_all or character.isspace():
            return False
        ids = self._encoding(character).ids
        return self.unknown_token_id not in ids and not self._tokenizer.decode(ids, skip_special_tokens=False).strip()


def load_tokenizer(directory: str | Path, prefix: str = "") -> Tokenizer:
    """The tokenizer saved in a folder, in files whose names begin with `prefix`. Raises InputError."""
    path = Path(directory) / f"{prefix}{FILE_NAME}"
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
        folder, settings = path.parent, None
        if (beside := folder / f"{prefix}{SETTINGS_FILE}").is_file():
            try:
                settings = beside.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise InputError(f"{beside} cannot be read: {error}") from error
        older = settings is None and any((folder / name).is_file() for name in OUR_FILES)
        return BpeTokenizer(file_content, settings, with_begin=not older)
    if isinstance(content, dict) and content.get("format") == _FORMAT:
        if content.get("name") == ByteTokenizer.name:
            return ByteTokenizer()
        if content.get("name") == CharTokenizer.name and isinstance(content.get("characters"), str):
            return CharTokenizer(content["characters"])
    raise InputError(f"{path} holds no known tokenizer: expected byte, char, or one of the tokenizers library.")


def _settings(content: str) -> dict[str, Any]:
    """The settings in the content of tokenizer_config.json. Raises InputError."""
    try:
        found = json.loads(content)
    except ValueError as error:
        raise InputError(f"{SETTINGS_FILE} is damaged: {error}. Replace it from the source of {FILE_NAME}.") from error
    if not isinstance(found, dict):
        raise InputError(f"{SETTINGS_FILE} is damaged: expected a JSON object.")
    return {str(key): value for key, value in found.items()}


def _kinds(part: Any) -> list[str]:
    """The types of the components of a decoder, a normalizer or a pre-tokenizer."""
    if not isinstance(part, dict):
        return []
    inner = part.get("decoders") or part.get("normalizers") or part.get("pretokenizers")
    return [kind for one in inner for kind in _kinds(one)] if inner else [str(part.get("type"))]


def _knows_every_byte(content: dict[str, Any], n_bytes: int) -> bool:
    """Whether every text is encoded completely: no normalizer removes a part, and every byte has a token."""
    model = content.get("model") or {}
    if set(_kinds(content.get("normalizer"))) - {"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend"}:
        return False
    if n_bytes == 256 and model.get("byte_fallback"):
        return True
    import tokenizers

    vocabulary = model.get("vocab") or {}
    letters = set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    byte_level = "ByteLevel" in _kinds(content.get("pre_tokenizer"))
    return byte_level and isinstance(vocabulary, dict) and letters <= vocabulary.keys()


def _with_split_words(text: str) -> str:
    """The text with spaces inserted into very long words, for training."""
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
