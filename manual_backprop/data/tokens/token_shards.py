"""A dataset's tokens in shards: `load_pretokenized` reads what `pretokenize_dataset` wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ...common.digests import file_digest, json_digest
from ...common.errors import InputError
from ...common.uris import expanded
from .tokenizer import Tokenizer, load_tokenizer

MANIFEST = "manifest.json"
PRETOKENIZED = "pretokenized"  # the dataset in a run's config, and its tokenizer


class TokenShards:
    """One split, indexed like an array (n,): `tokens[i]`, `tokens[a:b]`, or `tokens[indices]` with an integer array.

    A slice may span several shards; only what is indexed is read into memory. Document `i` has the tokens `offsets[i]`
    to `offsets[i + 1] - 1`, the last of which is the tokenizer's end token.
    """

    def __init__(self, shards: list[np.ndarray], offsets: np.ndarray, tokenizer: Tokenizer):
        self.shards, self.offsets, self.tokenizer = shards, offsets, tokenizer
        self._begins = np.cumsum([0, *map(len, shards)])

    def __len__(self) -> int:
        return int(self._begins[-1])

    def __getitem__(self, place: int | slice | np.ndarray) -> Any:
        if isinstance(place, np.ndarray):
            return self._gathered(place)
        if not isinstance(place, slice):
            if not -len(self) <= place < len(self):
                raise IndexError(f"token {place} of {len(self)}")
            place = int(place) % len(self)
            shard = int(np.searchsorted(self._begins, place, side="right")) - 1
            return self.shards[shard][place - self._begins[shard]]
        first, last, step = place.indices(len(self))
        if step != 1:
            raise IndexError("the step of a slice of tokens must be 1")
        parts = [
            shard[max(0, first - begin) : max(0, last - begin)]
            for shard, begin in zip(self.shards, self._begins.tolist(), strict=False)
            if begin < last and begin + len(shard) > first
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.shards[0][:0]])

    def _gathered(self, places: np.ndarray) -> np.ndarray:
        if places.size and (places.min() < 0 or places.max() >= len(self)):
            raise IndexError(f"tokens {places.min()} to {places.max()} of {len(self)}")
        numbers = np.searchsorted(self._begins, places, side="right") - 1
        found = np.empty(places.shape, dtype=self.shards[0].dtype)
        for number in np.unique(numbers):
            here = numbers == number
            found[here] = np.asarray(self.shards[number])[places[here] - self._begins[number]]
        return found

    def plain(self) -> Tokens:
        """The tokens as one array if there is a single shard, which needs no memory; otherwise this object."""
        return self.shards[0] if len(self.shards) == 1 else self

    @property
    def documents(self) -> int:
        """The number of documents."""
        return len(self.offsets) - 1

    def document(self, number: int) -> np.ndarray:
        """The tokens of one, its end token too."""
        if not 0 <= number < self.documents:
            raise IndexError(f"document {number} of {self.documents}")
        found: np.ndarray = self[int(self.offsets[number]) : int(self.offsets[number + 1])]
        return found


Tokens = np.ndarray | TokenShards  # of a split


def load_pretokenized(path: str | Path, split: str = "train") -> TokenShards:
    """A split that `pretokenize_dataset` wrote, verified by the digests in the manifest. Raises InputError.

    >>> _ = Path("text.txt").write_text("to be or not to be, that is the question. " * 200)
    >>> tokenizer = train_tokenizer("text.txt", vocab_size=270)
    >>> tokens = load_pretokenized(pretokenize_dataset("text.txt", tokenizer, workers=1), split="train")
    >>> len(tokens) > 1000, tokens[:3].tolist() == tokens.document(0)[:3].tolist()
    (True, True)
    """
    folder = expanded(path)
    contents = manifest_of(folder)
    if split not in contents["splits"]:
        raise InputError(f"{folder} has no split {split!r}, only {', '.join(contents['splits'])}.")
    check_digests(folder, contents, split)
    offsets, shards, begin = [np.zeros(1, dtype=np.int64)], [], 0
    for record in contents["splits"][split]["shards"]:
        shards.append(mapped(folder / f"{record['name']}.bin", contents["dtype"], record["tokens"]))
        offsets.append(np.fromfile(folder / f"{record['name']}.ends.bin", dtype=np.int64) + begin)
        begin += record["tokens"]
    return TokenShards(shards, np.concatenate(offsets), load_tokenizer(folder))


def mapped(path: Path, dtype: Any, *shape: int) -> np.ndarray:
    """The numbers in a file, memory-mapped and read-only; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r", shape=shape) if shape[0] else np.empty(shape, dtype)


def is_shards(path: str | Path) -> bool:
    """Whether `path` is a folder whose manifest is one of token shards."""
    file = expanded(path) / MANIFEST
    try:
        return "tokenizer_digest" in json.loads(file.read_text(encoding="utf-8"))["contents"]["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def manifest_of(path: str | Path) -> dict[str, Any]:
    """The contents of the manifest of token shards: settings, splits, notes. Raises InputError."""
    folder = expanded(path)
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents: dict[str, Any] = manifest["contents"]
        sound = manifest["sha256"] == json_digest(contents) and set(contents) >= {"settings", "splits", "dtype"}
        sound = sound and "tokenizer_digest" in contents["settings"]  # a corpus in the cache lacks this key
    except OSError as error:
        raise InputError(
            f"{folder} holds no token shards ({MANIFEST}: {error.strerror or error}); give a folder that "
            "`tools.tokenization pretokenize` wrote."
        ) from error
    except (ValueError, KeyError, TypeError):
        sound = False
    if not sound:
        raise InputError(f"{folder / MANIFEST} is damaged, or is not the manifest of token shards.")
    return contents


def check_digests(folder: Path, contents: dict[str, Any], split: str) -> None:
    tokenizer = load_tokenizer(folder)
    if tokenizer.digest != contents["settings"]["tokenizer_digest"]:
        raise InputError(f"The tokenizer in {folder} is not the one of its tokens: it has changed since.")
    for record in contents["splits"][split]["shards"]:
        check_shard(folder, record)


def check_shard(folder: Path, record: dict[str, Any]) -> None:
    for ending, key in ((".bin", "sha256"), (".ends.bin", "ends_sha256")):
        file = folder / f"{record['name']}{ending}"
        try:
            found = file_digest(file)
        except OSError as error:
            raise InputError(f"{file} cannot be read ({error.strerror or error}).") from error
        if found != record[key]:
            raise InputError(f"{file} is damaged: its SHA-256 is not the one in the manifest.")
