"""A cache of tokens in folders: one process writes a folder while others wait, and each opening verifies it.

A complete folder appears by one rename. Its manifest has the settings that it was written for and a digest of each
file, so that a reader gets exactly what it asked for, or nothing.
"""

import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar

import numpy as np

from ...common.digests import file_digest, json_digest
from ...common.durable_files import put_in_place
from ...common.errors import InputError, StorageError
from ...config.schema import DatasetConfig, TokenizerConfig
from ..sources.spool import SpooledText
from .token_shards import Tokens, mapped
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
QUIET_WAIT = 1.0  # [s] that a process waits for another before it logs that it waits

T = TypeVar("T")
Contents = dict[str, Any]


def cache_folder(cache: str | Path, dataset: DatasetConfig, tokenizer: TokenizerConfig, settings: Contents) -> Path:
    return Path(cache) / f"{dataset.name}-{tokenizer.name}-{json_digest(settings)[:16]}"


def find_prepared(folder: Path, settings: Contents, read: Callable[[Path, Contents], T]) -> T | None:
    """The result of `read(folder, contents of its manifest)`; None if there is no such folder, if it is for other
    settings, or if it does not match its manifest. Writes nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        contents = manifest["contents"]
        if contents["settings"] != settings or json_digest(contents) != manifest["sha256"]:
            return None
        if any(file_digest(folder / name) != digest for name, digest in contents["sha256"].items()):
            return None
        return read(folder, contents)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be used: %s", folder, error)
        return None


def prepare(
    folder: Path, settings: Contents, make: Callable[[Path], Contents], read: Callable[[Path, Contents], T]
) -> T:
    """The result of `read` for a folder, which `make` writes first unless it exists and is intact.

    `make` writes files into the folder that it gets, and returns further contents of the manifest, including `splits`.
    Raises StorageError if the cache cannot be written.
    """
    found = find_prepared(folder, settings, read)  # without the lock, so that a read-only cache works
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            found = find_prepared(folder, settings, read)
            if found is None:
                if folder.exists():
                    log.warning("%s is damaged and will be written again", folder)
                _make(folder, settings, make)
                found = find_prepared(folder, settings, read)
    except OSError as error:
        raise StorageError(
            f"The tokens cannot be stored in {folder.parent} ({error.strerror or error}): free some space or make the "
            "folder writable."
        ) from error
    if found is None:
        raise StorageError(f"{folder} was written but reads back differently: the disk or file system is faulty.")
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The lock for writing this folder. If another process has it, a warning says that this one waits."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        held = lock.acquire(timeout=QUIET_WAIT)
    except Timeout:
        log.warning("waiting for another process, which is preparing %s", folder)
        held = lock.acquire()
    with held:
        yield


def _make(folder: Path, settings: Contents, make: Callable[[Path], Contents]) -> None:
    """Write the folder under a temporary name, then rename it. The caller must have the lock."""
    begin = time.monotonic()
    for abandoned in folder.parent.glob(f"{folder.name}.partial-*"):  # of a killed process, since we have the lock
        shutil.rmtree(abandoned)
    staged = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    staged.mkdir()
    try:
        made = make(staged)
        digests = {path.name: file_digest(path) for path in sorted(staged.iterdir())}
        contents = {"settings": settings, **made, "sha256": digests}
        manifest = {"contents": contents, "sha256": json_digest(contents)}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # damaged, otherwise the caller would have used it
            shutil.rmtree(folder)
        put_in_place(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sizes = ", ".join(f"{split['tokens']} tokens ({name})" for name, split in contents["splits"].items())
    log.info("prepared %s in %.1f s: %s", sizes, time.monotonic() - begin, folder)


@dataclass(frozen=True)
class RowCache(Generic[T]):
    """Texts in rows, labelled or in pairs, as tokens in the cache: `make` and `read` are those of `prepare`."""

    dataset: DatasetConfig
    tokenizer: TokenizerConfig
    settings: Contents
    make: Callable[[Path], Contents]
    read: Callable[[Path, Contents], T]  # the result has `notes` and `counts`

    def find(self, cache: Path) -> T | None:
        folder = cache_folder(cache, self.dataset, self.tokenizer, self.settings)
        return find_prepared(folder, self.settings, self.read)

    def prepare(self, cache: Path) -> T:
        """The rows from `cache` if they are there and intact, otherwise prepared and stored there. Raises InputError
        for data that cannot be used, and StorageError."""
        folder = cache_folder(cache, self.dataset, self.tokenizer, self.settings)
        rows: Any = prepare(folder, self.settings, self.make, self.read)
        if rows.counts["bad_rows"] and self.dataset.on_bad_row != "skip":  # a run that skips bad rows prepared it
            raise InputError(f"{rows.notes[0]}. Correct them, or leave them out with dataset.on_bad_row=skip.")
        return rows

    def preview(self, cache: Path) -> tuple[T, bool]:
        """The rows without writing to `cache`, and whether they were in it: otherwise they are prepared for this call
        only."""
        if (found := self.find(cache)) is not None:
            return found, True
        with TemporaryDirectory(prefix="manual_backprop-") as folder:
            return self.prepare(Path(folder)), False  # its files stay mapped after their deletion


# One split as two files


@dataclass(frozen=True)
class Split:
    """The tokens of some documents, memory-mapped and read-only."""

    tokens: Tokens  # (n,) uint16 or uint32; the end token, if there is one, follows each document
    offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
    text_bytes: int  # of the text in UTF-8, without end tokens


def write_split(folder: Path, name: str, tokenizer: Tokenizer, text: SpooledText, parts: np.ndarray) -> dict[str, int]:
    """Write the tokens of the `parts` (documents, 2) of a text to NAME.bin, and the documents' beginnings to
    NAME.offsets.bin; return the split's sizes for the manifest."""
    end = [] if tokenizer.end_token_id is None else [np.array([tokenizer.end_token_id])]
    begin = [np.array(tokenizer.begin_token_ids, dtype=np.int64)]
    counts: list[np.ndarray] = [np.zeros(1, dtype=np.int64)]
    total, opens = 0, True
    with (folder / f"{name}.bin").open("wb") as file:
        for texts, closes in text.batches(parts):
            arrays: list[np.ndarray] = []
            lengths = []
            for ids, closing in zip(tokenizer.encode_many(texts), closes, strict=True):
                placed = [*(begin if opens else []), ids, *(end if closing else [])]
                arrays += placed
                total += sum(map(len, placed))
                opens = closing
                if closing:
                    lengths.append(total)
            np.concatenate(arrays).astype(tokenizer.dtype).tofile(file)
            counts.append(np.array(lengths, dtype=np.int64))
    np.concatenate(counts).tofile(folder / f"{name}.offsets.bin")
    return {"documents": len(parts), "bytes": int((parts[:, 1] - parts[:, 0]).sum()), "tokens": total}


def open_split(folder: Path, contents: Contents, name: str) -> Split:
    """Open a split that `write_split` wrote; its sizes are in the manifest's `contents`."""
    sizes = contents["splits"][name]
    return Split(
        mapped(folder / f"{name}.bin", contents["dtype"], sizes["tokens"]),
        mapped(folder / f"{name}.offsets.bin", np.int64, sizes["documents"] + 1),
        sizes["bytes"],
    )
