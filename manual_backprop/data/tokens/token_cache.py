"""Folders of prepared tokens: made once by one process while others wait, and verified each time they are opened.

A folder appears by one rename when it is complete. Its manifest has the settings that it was made for and a digest of
each file, so a reader finds what it asked for, or nothing.
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
from typing import Any, TypeVar

import numpy as np

from ...common.digests import file_digest, json_digest
from ...common.durable_files import put_in_place
from ...common.errors import StorageError
from ..sources.spool import SpooledText
from .token_shards import Tokens
from .tokenizer import Tokenizer

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
QUIET_WAIT = 1.0  # [s] that a process waits for another without a word

T = TypeVar("T")
Contents = dict[str, Any]


def find_prepared(folder: Path, settings: Contents, read: Callable[[Path, Contents], T]) -> T | None:
    """What `read` makes of a folder and the contents of its manifest; None where there is none, where it was made for
    other settings, or where it is not what its manifest says. Writes nothing."""
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
    """What `read` makes of a folder, which `make` fills unless it is there and sound.

    `make` writes files into the folder that it is given and returns what else the manifest says, `splits` among it.
    Raises StorageError where the cache cannot be written.
    """
    found = find_prepared(folder, settings, read)  # without the lock: a cache may be read that nobody may write
    if found is not None:
        return found
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            found = find_prepared(folder, settings, read)
            if found is None:
                if folder.exists():
                    log.warning("%s is damaged and will be made again", folder)
                _make(folder, settings, make)
                found = find_prepared(folder, settings, read)
    except OSError as error:
        raise StorageError(
            f"The prepared text cannot be kept in {folder.parent} ({error.strerror or error}): make room or make "
            "the folder writable."
        ) from error
    if found is None:
        raise StorageError(f"{folder} was written and then read back differently: the disk or file system is at fault.")
    return found


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone in making this folder; where another process is making it, a line says that this one waits."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder.with_name(folder.name + ".lock"))
    try:
        lock.acquire(timeout=QUIET_WAIT)
    except Timeout:
        log.warning("waiting for another process, which is preparing %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _make(folder: Path, settings: Contents, make: Callable[[Path], Contents]) -> None:
    """In a folder beside its place, and then moved there. The caller holds the lock."""
    begin = time.monotonic()
    for abandoned in folder.parent.glob(f"{folder.name}.partial-*"):  # its maker was killed: the lock is ours
        shutil.rmtree(abandoned)
    staged = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    staged.mkdir()
    try:
        made = make(staged)
        digests = {path.name: file_digest(path) for path in sorted(staged.iterdir())}
        contents = {"settings": settings, **made, "sha256": digests}
        manifest = {"contents": contents, "sha256": json_digest(contents)}
        (staged / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        if folder.exists():  # damaged, or the caller would have used it
            shutil.rmtree(folder)
        put_in_place(staged, folder)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    sizes = ", ".join(f"{split['tokens']} tokens ({name})" for name, split in contents["splits"].items())
    log.info("prepared %s in %.1f s: %s", sizes, time.monotonic() - begin, folder)


# One split as two files


@dataclass(frozen=True)
class Split:
    """The tokens of some documents, memory-mapped and read-only."""

    tokens: Tokens  # (n,) uint16 or uint32; each document is followed by the end token where there is one
    offsets: np.ndarray  # (documents + 1,) int64: document i is tokens[offsets[i] : offsets[i + 1]]
    text_bytes: int  # of the text in UTF-8, without end tokens


def write_split(folder: Path, name: str, tokenizer: Tokenizer, text: SpooledText, parts: np.ndarray) -> dict[str, int]:
    """NAME.bin has the tokens of the `parts` (documents, 2) of a text, NAME.offsets.bin where documents begin."""
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
    """One that `write_split` wrote, by the sizes in the manifest."""
    sizes = contents["splits"][name]
    return Split(
        np.memmap(folder / f"{name}.bin", contents["dtype"], mode="r", shape=(sizes["tokens"],)),
        np.memmap(folder / f"{name}.offsets.bin", np.int64, mode="r", shape=(sizes["documents"] + 1,)),
        sizes["bytes"],
    )
