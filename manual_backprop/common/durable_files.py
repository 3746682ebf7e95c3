"""Atomic, durable writes: checkpoints and run directories survive a kill, a power cut and a full disk.

A file or a folder is written under a temporary name beside its target, synced to the disk, and renamed: a reader sees
the old content or the new one, never a part. Standard library only. Two writers of one file need a lock of their own.
"""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import InputError, StorageError

_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "your disk quota is used up: free some space",
    errno.EFBIG: "the file is larger than this process may write (ulimit -f)",
    errno.EACCES: "permission denied: choose a directory that you may write",
    errno.EPERM: "not permitted: choose a directory that you may write",
    errno.EROFS: "the file system is read-only: choose another directory",
}


@contextmanager
def storage_errors(doing: str) -> Iterator[None]:
    """Turn an OSError into a StorageError that names the failed action: `storage_errors("write RUN/run.json")`."""
    try:
        yield
    except OSError as error:
        reason = _ADVICE.get(error.errno or 0, error.strerror or str(error))
        raise StorageError(f"cannot {doing}: {reason}") from error


def write_page(path: Path, text: str) -> None:
    """Write a page that a command makes, and its folder if necessary. Raises StorageError."""
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def sync_file(path: Path) -> None:
    """Wait until the content of a file, or of a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk. Before that, a rename may be lost."""
    try:
        sync_file(path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a directory; their rename is atomic
            raise


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file's content as a whole, or leave it unchanged. Raises StorageError."""
    with storage_errors(f"write {path}"), atomic_file(path) as file:
        file.write(content)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A new file to write, which replaces `path` at the end and is deleted after an exception. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_directory(path.parent)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def refuse_used(target: Path) -> None:
    """Raises InputError unless `target` is absent or an empty folder, and StorageError if it cannot be read."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists already and is not a folder: name another one")
    with storage_errors(f"read {target}"):
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} holds files already: name a new folder, nothing is overwritten")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden staging folder beside `target`. It is renamed to `target` at the end, or deleted after an exception.
    Raises InputError if `target` is a file or holds files, and StorageError."""
    refuse_used(target)
    target = target.absolute()
    staging = target.with_name(f".{target.name}.staging-{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        with storage_errors(f"write {target}"):
            staging.mkdir(parents=True)
            _remove_leftovers(target)
            yield staging
            put_in_place(staging, target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def put_in_place(staged: Path, target: Path) -> None:
    """Sync a complete folder to the disk and rename it to `target`, which must be absent or an empty folder. Raises
    OSError."""
    for path in staged.rglob("*"):
        sync_directory(path) if path.is_dir() else sync_file(path)
    sync_directory(staged)
    staged.rename(target)
    sync_directory(target.parent)


def _remove_leftovers(target: Path) -> None:
    """Delete the staging folders that killed processes left beside `target`."""
    before = f".{target.name}.staging-"
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(before).partition("-")[0]
        if path.name.startswith(before) and pid.isdecimal() and not process_is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def process_is_alive(pid: int) -> bool:
    """Whether a process with this id runs on this machine. The system may have reused the id."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True
