"""A folder that is made whole or not at all. Standard library only."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from manual_backprop.durable import process_is_alive, storage_errors, sync_directory, sync_file
from manual_backprop.errors import InputError


def refuse_used(target: Path) -> None:
    """Raises InputError unless `target` can become a new folder."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} is there already, and is no folder: name another one")
    with storage_errors(f"read {target}"):
        if target.is_dir() and any(target.iterdir()):
            raise InputError(f"{target} holds files already: name a new folder, nothing is overwritten")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A hidden sibling to write into, which becomes `target` at the end, or vanishes with whatever goes wrong."""
    refuse_used(target)
    target = target.absolute()
    staging = target.with_name(f".{target.name}.staging-{os.getpid()}-{uuid.uuid4().hex[:6]}")
    try:
        with storage_errors(f"write {target}"):
            staging.mkdir(parents=True)
            _remove_leftovers(target)
            yield staging
            for path in staging.rglob("*"):
                sync_directory(path) if path.is_dir() else sync_file(path)
            sync_directory(staging)
            staging.rename(target)  # over an empty folder too
            sync_directory(target.parent)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _remove_leftovers(target: Path) -> None:
    """What a process that was killed left beside `target`."""
    before = f".{target.name}.staging-"
    for path in target.parent.iterdir():
        pid = path.name.removeprefix(before).partition("-")[0]
        if path.name.startswith(before) and pid.isdecimal() and not process_is_alive(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
