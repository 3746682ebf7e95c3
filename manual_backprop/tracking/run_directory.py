"""The run directory: its name, owner and status, and finding runs.

    outputs/runs/<time>-<run_name>-<6 hex>/
        config.yaml  run.json  metrics.jsonl  run.log  samples/  checkpoints/step-NNNNNN/

run.json records who owns the run and how it ended; it is replaced atomically, never written in place. The owner locks
`.lock` for as long as it lives; the system releases the lock when it dies. So a run whose status is RUNNING while its
lock is free has died. Standard library and filelock only. Not here: metrics.jsonl and checkpoints/.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints.checkpoint import CheckpointManager
from ..common.durable_files import storage_errors, write_atomically
from ..common.errors import CheckpointError, InputError, RunInUseError, StorageError
from ..common.json_files import read_object
from ..common.machine import boot_id, is_on_local_file_system
from ..common.origin import Origin
from ..common.uris import expanded, same_place

if TYPE_CHECKING:
    from filelock import FileLock

VERSION = 1
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
RUNS, SWEEPS = "runs", "sweeps"  # below the outputs directory; a sweep is the parent run of its jobs
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
STATUSES = (RUNNING, FINISHED, FAILED, KILLED)
_LOCK_TIMEOUT = 1.0  # [s]; close_dead_runs takes a free lock for a moment
logger = logging.getLogger("manual_backprop.tracking")
_updating = threading.Lock()  # the tracker's thread and the loop both update run.json


class RunDirectory:
    """A run that this process owns, from `create_run_directory` or `open_run_directory` until `release`. Without a lock
    another process of the same training owns it, and this one only reads it."""

    def __init__(self, path: Path, lock: FileLock | None):
        self.path = path
        self.run_id = path.name
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples"
        self.checkpoints = path / "checkpoints"
        self.log = path / "run.log"
        self._lock = lock

    def read(self) -> dict[str, Any]:
        """The content of run.json."""
        return read_run(self.path)

    def update(self, **fields: Any) -> None:
        """Replace these fields of run.json. Raises StorageError."""
        update_run(self.path, lambda run: run.update(fields))

    def resume(self, step: int, changed: Mapping[str, Any] | None = None) -> None:
        """Record that the run resumes after `step` completed steps; `changed` are the differences. Raises
        StorageError."""
        for leftover in self.path.glob(".*.json.*"):  # temporary files of a killed process
            leftover.unlink(missing_ok=True)
        now = _now()

        def resume(run: dict[str, Any]) -> None:
            entry = {"at": now, "step": step, "command": shlex.join(sys.argv), "previous_status": run["status"]}
            run["resumes"].append(entry | {"changed": dict(changed or {})})
            run.update(status=RUNNING, started_at=now, ended_at=None, owner=_this_process())

        update_run(self.path, resume)

    def release(self) -> None:
        """Release the lock. The status is unchanged: `finish` of the tracker or logger sets it."""
        if self._lock is not None:
            self._lock.release()


@dataclass(frozen=True)
class FoundRun:
    """A run, and the requested checkpoint (None: the run has none)."""

    path: Path
    checkpoint: Path | None


def create_run_directory(
    root: str | Path, run_name: str, origin: Origin | None = None, folder: str = RUNS
) -> RunDirectory:
    """Create and own `<root>/runs/<time>-<run_name>-<6 hex>/`; `root` is the outputs directory. Raises StorageError."""
    runs = Path(root).absolute() / folder
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", run_name).strip("-.")[:80] or "run"
    with storage_errors(f"create a run directory in {runs}"):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{uuid.uuid4().hex[:6]}"
            with suppress(FileExistsError):
                path.mkdir()  # fails if it exists: then another process has started with the same name
                break
        lock = _locked(path)
        if folder == RUNS:
            (path / "samples").mkdir()
            (path / "checkpoints").mkdir()
    now = _now()
    content = {
        "version": VERSION,
        "run_id": path.name,
        "run_name": run_name,
        "status": RUNNING,
        "created_at": now,
        "started_at": now,
        "ended_at": None,
        "owner": _this_process(),
        "command": shlex.join(sys.argv),
        "resumes": [],
        "sweep": None,
        "mlflow": None,
    }
    if origin is not None and origin.sweep is not None:
        content["sweep"] = {"run_id": origin.sweep.name, "directory": str(origin.sweep), "job": origin.job}
    write_atomically(path / RUN_FILE, _as_bytes(content))
    return RunDirectory(path, lock)


def open_run_directory(path: str | Path, step: int) -> RunDirectory:
    """Own an existing run, to resume it after `step` completed steps.

    Raises RunInUseError with the owner's pid if another process owns it, InputError if it is not a run directory.
    """
    directory = own_run_directory(path)
    try:
        directory.resume(step)
    except BaseException:
        directory.release()
        raise
    return directory


def own_run_directory(path: str | Path) -> RunDirectory:
    """Own a run that has ended, without changing it, except that a dead owner's is marked KILLED. Raises as
    open_run_directory."""
    path = Path(path).absolute()
    read_run(path)
    lock = _locked(path)
    if read_run(path)["status"] == RUNNING:
        end_run(path, KILLED)
    return RunDirectory(path, lock)


def close_dead_runs(root: str | Path) -> list[Path]:
    """Mark runs as KILLED whose status is RUNNING but whose owner is dead; return them. Any command may call this.

    The lock of such a run is free. If another machine may have a lock that this one cannot see (`_lock_is_visible`),
    the run is left alone, and a warning says what to do.
    """
    from filelock import FileLock, Timeout

    closed, unknown = [], []
    for path in [*list_runs(root), *list_runs(root, SWEEPS)]:
        run = _read_or_none(path)
        if run is None or run["status"] != RUNNING:
            continue
        lock = FileLock(path / LOCK_FILE, timeout=0, thread_local=False)
        with suppress(Timeout, OSError, StorageError, NotImplementedError), lock:
            if not _lock_is_visible(path, run["owner"]):
                unknown.append((path, run["owner"].get("host")))
                continue
            update_run(
                path, lambda run: run.update(status=KILLED, ended_at=_now()) if run["status"] == RUNNING else None
            )
            closed.append(path)
    if unknown:
        path, host = unknown[-1]
        others = f" and {len(unknown) - 1} more" * (len(unknown) > 1)
        logger.warning(
            "%s%s has the status RUNNING on the machine %s, which cannot be checked from here. If it has ended: "
            "python -m manual_backprop.sync %s",
            path.name, others, host, " ".join(shlex.quote(str(one)) for one, _ in unknown),
        )  # fmt: skip
    return closed


def list_runs(root: str | Path, folder: str = RUNS) -> list[Path]:
    """Every run directory below an outputs directory, the most recently started last."""
    paths = [file.parent for file in (Path(root).absolute() / folder).glob(f"*/{RUN_FILE}")]
    started = [(run["started_at"], path) for path in paths if (run := _read_or_none(path)) is not None]
    return [path for _, path in sorted(started)]


def find_run(root: str | Path, which: str) -> FoundRun:
    """The run that `which` names, with the checkpoint to use.

    `last`: the most recently started run with a sound checkpoint, at its latest one. `best`: the same run, at its best
    one. Or a run id, its last six characters, or its id in MLflow. Or the path of a run directory or of one of its
    checkpoints. Raises InputError, which lists what exists, if there is none.
    """
    runs = list_runs(root)
    if which in {"last", "best"}:
        for path in reversed(runs):
            checkpoints = CheckpointManager(path / "checkpoints")
            if checkpoints.newest_sound() is not None:
                return FoundRun(path, checkpoints.best() if which == "best" else checkpoints.latest())
        raise CheckpointError(f"{which}: no run in {Path(root).absolute() / 'runs'} has a sound checkpoint")
    named = expanded(which).absolute()
    for path, checkpoint in ((named, None), (named.parent.parent, named)):
        if (path / RUN_FILE).is_file():
            path = _below_root(path, root)
            asked = None if checkpoint is None else path / "checkpoints" / checkpoint.name
            return FoundRun(path, asked or CheckpointManager(path / "checkpoints").latest())
    matching = [path for path in [*runs, *list_runs(root, SWEEPS)] if which in _ids(path)]
    if len(matching) == 1:
        return FoundRun(matching[0], CheckpointManager(matching[0] / "checkpoints").latest())
    if matching:
        raise InputError(f"{which!r} names {len(matching)} runs: {', '.join(path.name for path in matching)}")
    newest = ", ".join(path.name for path in reversed(runs[-3:])) or "none"
    raise InputError(
        f"there is no run {which!r}: expected last, best, a run id or a path; the newest runs in "
        f"{Path(root).absolute() / 'runs'} are: {newest}"
    )


def find_sweep(root: str | Path, which: str) -> Path:
    """The directory of the sweep that `which` names: `last`, its id, the last six characters of that, or its path.
    Raises InputError, which lists what exists, if there is none."""
    sweeps = list_runs(root, SWEEPS)
    if which == "last" and sweeps:
        return sweeps[-1]
    named = expanded(which).absolute()
    if named.parent.name == SWEEPS and (named / RUN_FILE).is_file():
        return _below_root(named, root)
    matching = [path for path in sweeps if which in _ids(path)]
    if len(matching) == 1:
        return matching[0]
    newest = ", ".join(path.name for path in reversed(sweeps[-3:])) or "none"
    raise InputError(
        f"there is no sweep {which!r}: expected last, the id of a sweep or its directory; the newest sweeps in "
        f"{Path(root).absolute() / SWEEPS} are: {newest}"
    )


def read_run(path: Path) -> dict[str, Any]:
    """The content of a run.json. Raises InputError."""
    file = path / RUN_FILE
    run = read_object(file, f"{path} is not a run directory: it has no {RUN_FILE}")
    if run.get("version") != VERSION:
        raise InputError(f"{file} is not a run of version {VERSION}, the one that this program reads")
    if run.get("status") not in STATUSES or not isinstance(run.get("owner"), dict) or "started_at" not in run:
        raise InputError(f"{file} is damaged: it lacks status, owner or started_at")
    return run


def update_run(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change run.json atomically. Only the owner and its threads may call this without taking the lock. Raises
    StorageError."""
    with _updating:
        run = read_run(path)
        change(run)
        write_atomically(path / RUN_FILE, _as_bytes(run))


def end_run(path: Path, status: str) -> None:
    """Write the final status of a run."""
    if status not in STATUSES[1:]:
        raise ValueError(f"status={status!r}: expected one of {', '.join(STATUSES[1:])}")
    update_run(path, lambda run: run.update(status=status, ended_at=_now()))


def _locked(path: Path) -> FileLock:
    from filelock import FileLock, Timeout  # takes 0.05 s, which a refused command line need not wait for

    lock = FileLock(path / LOCK_FILE, timeout=_LOCK_TIMEOUT, thread_local=False)
    try:
        lock.acquire()
    except Timeout as error:
        owner = (_read_or_none(path) or {"owner": {}})["owner"]
        raise RunInUseError(
            f"{path} is in use by process {owner.get('pid', 'unknown')} on {owner.get('host', 'an unknown machine')}: "
            "wait until it ends, or stop it"
        ) from error
    except NotImplementedError as error:
        raise StorageError(f"{path} is on a file system without file locks: choose another directory") from error
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {error.strerror}") from error
    return lock


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot_id(), "since": _now()}


def _lock_is_visible(path: Path, owner: Mapping[str, Any]) -> bool:
    """Whether a free lock proves that the owner is dead: it ran under this kernel (the machine may have been renamed
    since), or no other kernel can write here, or it has this machine's host name (older runs recorded only that)."""
    boot = boot_id()
    same_kernel = boot is not None and owner.get("boot") == boot
    return same_kernel or owner.get("host") == socket.gethostname() or is_on_local_file_system(path)


def _read_or_none(path: Path) -> dict[str, Any] | None:
    with suppress(InputError):
        return read_run(path)
    return None


def _below_root(path: Path, root: str | Path) -> Path:
    """The path of a run below the outputs directory `root`, if `path` reaches it another way, as by a symbolic link."""
    here = Path(root).absolute() / path.parent.name / path.name
    return here if same_place(here, path) else path


def _ids(path: Path) -> set[str]:
    run = _read_or_none(path) or {}
    return {path.name, path.name[-6:], (run.get("mlflow") or {}).get("run_id", path.name)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _as_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
