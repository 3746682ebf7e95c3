"""A text as token ids on disk, prepared once: `prepare_corpus`.

The cache holds one folder for each pair of data and tokenizer, named after the SHA-256 of everything that its content
depends on. It appears by one rename when it is complete, and is checked against the digests in its manifest each time
it is opened; so a reader finds a sound corpus or none. Batches are made in `batches`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DatasetConfig, TokenizerConfig
from ..durable import sync_directory, sync_file
from ..errors import InputError, StorageError
from .documents import Document, Source, open_source, split_documents
from .tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
)

log = logging.getLogger(__name__)

FORMAT = 1  # raised whenever the same text and settings would make other files
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Corpus:
    """Token ids of a training and a validation split, memory-mapped and read-only, and where they come from."""

    tokenizer: Tokenizer
    train: np.ndarray  # (n,) uint16 or uint32
    validation: np.ndarray  # (n,)
    dataset_digest: str  # SHA-256 of the data, whatever the tokenizer
    tokenizer_digest: str  # SHA-256 of tokenizer.json
    train_bytes: int  # of the text in UTF-8, without end tokens
    validation_bytes: int
    train_documents: int
    validation_documents: int


def prepare_corpus(dataset: DatasetConfig, tokenizer: TokenizerConfig, cache: str | Path) -> Corpus:
    """The corpus that a config means: out of `cache` where it is there and sound, else made and put there.

    Any number of processes may ask for the same one at once: one makes it, the others wait for it. Raises InputError
    for data that cannot be used and StorageError where the cache cannot be written.
    """
    source = open_source(dataset.name, dataset.path)
    dataset_digest = source.digest(source.read())
    vocab_size = tokenizer.vocab_size if tokenizer.name == BpeTokenizer.name else None
    settings = {"format": FORMAT, "dataset": dataset_digest, "tokenizer": tokenizer.name, "vocab_size": vocab_size}
    folder = Path(cache) / f"{dataset.name}-{tokenizer.name}-{_json_digest(settings)[:16]}"

    corpus = _open(folder, settings)  # without the lock: a sound corpus can be read where nothing can be written
    if corpus is None:
        corpus = _prepare(folder, source, tokenizer, settings)
    if vocab_size is not None and corpus.tokenizer.vocab_size < vocab_size:
        log.warning(
            "The text is too small to learn tokenizer.vocab_size=%d tokens: the tokenizer has %d.",
            vocab_size,
            corpus.tokenizer.vocab_size,
        )
    return corpus


def _prepare(folder: Path, source: Source, tokenizer: TokenizerConfig, settings: dict[str, Any]) -> Corpus:
    """Waits until no other process makes this corpus, then makes it if none has."""
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            corpus = _open(folder, settings)
            if corpus is None:
                if folder.exists():
                    log.warning("%s is damaged and will be made again", folder)
                _build(folder, source, tokenizer, settings)
                corpus = _open(folder, settings)
    except OSError as error:
        raise StorageError(
            f"The prepared text cannot be kept in {folder.parent} ({error.strerror or error}): make room or make "
            "the folder writable."
        ) from error
    if corpus is None:
        raise StorageError(f"{folder} was written and then read back differently: the disk or file system is at fault.")
    return corpus


def _build(folder: Path, source: Source, config: TokenizerConfig, settings: dict[str, Any]) -> None:
    """Makes a corpus in a folder beside its place and moves it there. The caller holds the lock."""
    begin = time.monotonic()
    files = list(source.read())
    if source.digest(files) != settings["dataset"]:
        raise InputError("The text changed while it was being read. Start again when nothing writes to it.")
    train, validation = split_documents(source.parse(files))
    del files
    tokenizer = _make_tokenizer(config, train, validation)

    for abandoned in folder.parent.glob(f"{folder.name}.partial-*"):  # its maker was killed: the lock is ours
        shutil.rmtree(abandoned)
    staged = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    staged.mkdir()
    try:
        sizes = {"train": _write_split(staged, "train", tokenizer, train)}
        sizes["validation"] = _write_split(staged, "validation", tokenizer, validation)
        tokenizer.save(staged)
        digests = {path.name: _digest(path) for path in sorted(staged.iterdir())}
        contents = {"settings": settings, "dtype": np.dtype(tokenizer.dtype).name, "splits": sizes, "sha256": digests}
        manifest = {"contents": contents, "sha256": _json_digest(contents)}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in staged.iterdir():
            sync_file(path)
        sync_directory(staged)
        if folder.exists():  # damaged, or the caller would have used it
            shutil.rmtree(folder)
        staged.rename(folder)
        sync_directory(folder.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    log.info(
        "prepared %d training and %d validation tokens in %.1f s: %s",
        sizes["train"]["tokens"],
        sizes["validation"]["tokens"],
        time.monotonic() - begin,
        folder,
    )


def _make_tokenizer(config: TokenizerConfig, train: list[Document], validation: list[Document]) -> Tokenizer:
    if config.name == ByteTokenizer.name:
        return ByteTokenizer()
    if config.name == CharTokenizer.name:
        return CharTokenizer.train(document.text for document in (*train, *validation))
    if config.name == BpeTokenizer.name:
        if config.vocab_size is None:
            raise InputError("tokenizer=bpe needs to know how many tokens to learn: give tokenizer.vocab_size=NUMBER.")
        return BpeTokenizer.train([document.text for document in train], config.vocab_size)
    raise InputError(f"tokenizer={config.name}: there is no such tokenizer; use bpe, byte or char.")


def _write_split(folder: Path, name: str, tokenizer: Tokenizer, documents: list[Document]) -> dict[str, int]:
    tokens = tokenizer.encode_documents([document.text for document in documents])
    tokens.tofile(folder / f"{name}.bin")
    size = sum(len(document.text.encode("utf-8")) for document in documents)
    return {"documents": len(documents), "bytes": size, "tokens": len(tokens)}


def _open(folder: Path, settings: dict[str, Any]) -> Corpus | None:
    """The corpus in a folder; None where there is none, or where it is not what its manifest says."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents, splits = manifest["contents"], manifest["contents"]["splits"]
        if contents["settings"] != settings or _json_digest(contents) != manifest["sha256"]:
            return None
        if any(_digest(folder / name) != digest for name, digest in contents["sha256"].items()):
            return None
        tokenizer = load_tokenizer(folder)
        tokens = {}
        for name, sizes in splits.items():
            tokens[name] = np.memmap(folder / f"{name}.bin", contents["dtype"], mode="r", shape=(sizes["tokens"],))
        return Corpus(
            tokenizer=tokenizer,
            train=tokens["train"],
            validation=tokens["validation"],
            dataset_digest=settings["dataset"],
            tokenizer_digest=tokenizer.digest,
            train_bytes=splits["train"]["bytes"],
            validation_bytes=splits["validation"]["bytes"],
            train_documents=splits["train"]["documents"],
            validation_documents=splits["validation"]["documents"],
        )
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used: %s", folder, error)
        return None


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode("utf-8")).hexdigest()
