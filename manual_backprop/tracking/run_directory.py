"""A run's directory: its name, its owner, its status, and how it is found again.

    outputs/runs/<time>-<run_name>-<6 hex>/
        config.yaml  run.json  metrics.jsonl  run.log  samples/  checkpoints/step-NNNNNN/

run.json says who owns the run and how it ended; it is replaced at once, never written in place. A lock on `.lock` is
held by the owner for as long as it lives, however it dies: a run that says RUNNING while its lock is free is dead.
Standard library and filelock only; what is in metrics.jsonl and checkpoints/ is the business of others.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.common.durable_files import storage_errors, write_atomically
from manual_backprop.common.errors import CheckpointError, InputError, RunInUseError, StorageError
from manual_backprop.common.json_files import read_object
from manual_backprop.common.machine import boot_id, is_of_one_kernel
from manual_backprop.common.origin import Origin
from manual_backprop.common.uris import same_place

if TYPE_CHECKING:
    from filelock import FileLock

VERSION = 1
RUN_FILE = "run.json"
LOCK_FILE = ".lock"
RUNS, SWEEPS = "runs", "sweeps"  # below the outputs directory; a sweep is the parent run of its jobs' runs
RUNNING, FINISHED, FAILED, KILLED = "RUNNING", "FINISHED", "FAILED", "KILLED"
STATUSES = (RUNNING, FINISHED, FAILED, KILLED)
_LOCK_TIMEOUT = 1.0  # [s] close_dead_runs holds a free lock for a moment
logger = logging.getLogger("manual_backprop.tracking")
_updating = threading.Lock()  # the tracker's thread and the loop both update run.json


class RunDirectory:
    """A run that this process owns: made by `create_run_directory` or `open_run_directory`, given back by `release`.
    Without a lock, of a run that several processes share, it is another one's, and only read."""

    def __init__(self, path: Path, lock: FileLock | None):
        self.path = path
        self._lock = lock

    @property
    def run_id(self) -> str:
        return self.path.name

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def log(self) -> Path:
        return self.path / "run.log"

    def read(self) -> dict[str, Any]:
        """The content of run.json."""
        return read_run(self.path)

    def update(self, **fields: Any) -> None:
        """Replace these fields of run.json. Raises StorageError."""
        update_run(self.path, lambda run: run.update(fields))

    def resume(self, step: int, changed: Mapping[str, Any] | None = None, command: Sequence[str] | None = None) -> None:
        """The run goes on after `step` completed steps; `changed` is what is not as it was. Raises StorageError."""
        for leftover in self.path.glob(".*.json.*"):  # of a kill while a file was replaced
            leftover.unlink(missing_ok=True)
        now = _now()
        written = shlex.join(sys.argv if command is None else command)

        def resume(run: dict[str, Any]) -> None:
            entry = {"at": now, "step": step, "command": written, "previous_status": run["status"]}
            run["resumes"].append(entry | {"changed": dict(changed or {})})
            run.update(status=RUNNING, started_at=now, ended_at=None, owner=_this_process())

        update_run(self.path, resume)

    def release(self) -> None:
        """Let others own the directory. The status stays as it is: `finish` of the tracker or logger sets it."""
        if self._lock is not None:
            self._lock.release()


@dataclass(frozen=True)
class FoundRun:
    """A run, and the checkpoint that was asked for (None: the run has none)."""

    path: Path
    checkpoint: Path | None


def create_run_directory(
    root: str | Path,
    run_name: str,
    command: Sequence[str] | None = None,
    origin: Origin | None = None,
    folder: str = RUNS,
) -> RunDirectory:
    """Make and own `<root>/runs/<time>-<run_name>-<6 hex>/`; `root` is the outputs directory. Raises StorageError."""
    runs = Path(root).absolute() / folder
    name = re.sub(r"[^A-Za-z0-9._=-]+", "-", run_name).strip("-.")[:80] or "run"
    with storage_errors(f"create a run directory in {runs}"):
        runs.mkdir(parents=True, exist_ok=True)
        while True:
            path = runs / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{uuid.uuid4().hex[:6]}"
            with suppress(FileExistsError):
                path.mkdir()  # exclusive: of two simultaneous starts one takes another name
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
        "command": shlex.join(sys.argv if command is None else command),
        "resumes": [],
        "sweep": None,
        "mlflow": None,
    }
    if origin is not None and origin.sweep is not None:
        content["sweep"] = {"run_id": origin.sweep.name, "directory": str(origin.sweep), "job": origin.job}
    write_atomically(path / RUN_FILE, _as_bytes(content))
    return RunDirectory(path, lock)


def open_run_directory(path: str | Path, step: int, command: Sequence[str] | None = None) -> RunDirectory:
    """Own a run that exists, to resume it after `step` completed steps.

    Raises RunInUseError with the owner's pid while another process owns it, InputError if it is no run directory.
    """
    directory = own_run_directory(path)
    try:
        directory.resume(step, command=command)
    except BaseException:
        directory.release()
        raise
    return directory


def own_run_directory(path: str | Path) -> RunDirectory:
    """Own a run that has ended, without changing it (a dead owner's is marked KILLED). Raises as open_run_directory."""
    path = Path(path).absolute()
    read_run(path)
    lock = _locked(path)
    if read_run(path)["status"] == RUNNING:
        end_run(path, KILLED)
    return RunDirectory(path, lock)


def close_dead_runs(root: str | Path) -> list[Path]:
    """Mark runs KILLED that say RUNNING and whose owner is gone; return them. Every command may call this first.

    The lock of a run is free then. Where another machine may hold it unseen (`_is_seen_from_here`) the run is left
    alone, and one line says what to type.
    """
    from filelock import FileLock, Timeout

    closed, unknown = [], []
    for path in [*list_runs(root), *list_runs(root, SWEEPS)]:
        run = _read_or_none(path)
        if run is None or run["status"] != RUNNING:
            continue
        lock = FileLock(path / LOCK_FILE, timeout=0, thread_local=False)
        with suppress(Timeout, OSError, StorageError, NotImplementedError), lock:
            if not _is_seen_from_here(path, run["owner"]):
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
            "%s%s says RUNNING, on the machine %s, which cannot be seen from here. Where that has ended: "
            "python -m manual_backprop.sync %s",
            path.name, others, host, " ".join(shlex.quote(str(one)) for one, _ in unknown),
        )  # fmt: skip
    return closed


def list_runs(root: str | Path, folder: str = RUNS) -> list[Path]:
    """Every run directory below an outputs directory, the newest start last."""
    runs = []
    for file in (Path(root).absolute() / folder).glob(f"*/{RUN_FILE}"):
        run = _read_or_none(file.parent)
        if run is not None:
            runs.append((run["started_at"], file.parent))
    return [path for _, path in sorted(runs)]


def find_run(root: str | Path, which: str) -> FoundRun:
    """The run that `which` names, with the checkpoint to use.

    `last`: the newest start with a sound checkpoint, at its latest one. `best`: the same run, at its best one. A run
    id, its six last characters, or the id that MLflow gave it. A path: of a run directory or of one of its
    checkpoints. Raises InputError if there is none, with what there is.
    """
    runs = list_runs(root)
    if which in {"last", "best"}:
        for path in reversed(runs):
            checkpoints = CheckpointManager(path / "checkpoints")
            if checkpoints.newest_sound() is not None:
                return FoundRun(path, checkpoints.best() if which == "best" else checkpoints.latest())
        raise CheckpointError(f"{which}: no run in {Path(root).absolute() / 'runs'} has a sound checkpoint")
    named = Path(which).expanduser().absolute()
    for path, checkpoint in ((named, None), (named.parent.parent, named)):
        if (path / RUN_FILE).is_file():
            path = _as_called_here(path, root)
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
    """The directory of the sweep that `which` names: `last`, its id, the six last characters of that, or its path.
    Raises InputError if there is none, with what there is."""
    sweeps = list_runs(root, SWEEPS)
    if which == "last" and sweeps:
        return sweeps[-1]
    named = Path(which).expanduser().absolute()
    if named.parent.name == SWEEPS and (named / RUN_FILE).is_file():
        return _as_called_here(named, root)
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
    run = read_object(file, f"{path} is no run directory: it has no {RUN_FILE}")
    if run.get("version") != VERSION:
        raise InputError(f"{file} is not a run of version {VERSION}, the one that this program reads")
    if run.get("status") not in STATUSES or not isinstance(run.get("owner"), dict) or "started_at" not in run:
        raise InputError(f"{file} is damaged: it lacks status, owner or started_at")
    return run


def update_run(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change run.json at once. For the owner and its threads; others need the lock. Raises StorageError."""
    with _updating:
        run = read_run(path)
        change(run)
        write_atomically(path / RUN_FILE, _as_bytes(run))


def end_run(path: Path, status: str) -> None:
    """Write how a run ended."""
    if status not in STATUSES[1:]:
        raise ValueError(f"status={status!r}: expected one of {', '.join(STATUSES[1:])}")
    update_run(path, lambda run: run.update(status=status, ended_at=_now()))


def _locked(path: Path) -> FileLock:
    from filelock import FileLock, Timeout  # half a tenth of a second, which a refused command line need not wait for

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
        raise StorageError(f"{path} lies on a file system without file locks: choose another directory") from error
    except OSError as error:
        raise StorageError(f"cannot lock {path}: {error.strerror}") from error
    return lock


def _this_process() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname(), "boot": boot_id(), "since": _now()}


def _is_seen_from_here(path: Path, owner: Mapping[str, Any]) -> bool:
    """Whether a free lock says for certain that the owner is gone: it ran under this kernel, whatever the machine was
    called then; or no other one can write there; or it has this machine's name, which runs had alone before."""
    boot = boot_id()
    same_kernel = boot is not None and owner.get("boot") == boot
    return same_kernel or owner.get("host") == socket.gethostname() or is_of_one_kernel(path)


def _read_or_none(path: Path) -> dict[str, Any] | None:
    with suppress(InputError):
        return read_run(path)
    return None


def _as_called_here(path: Path, root: str | Path) -> Path:
    """A run of the outputs directory `root` that was named by another way, where `outputs` is a symbolic link."""
    here = Path(root).absolute() / path.parent.name / path.name
    return here if same_place(here, path) else path


def _ids(path: Path) -> set[str]:
    run = _read_or_none(path) or {}
    return {path.name, path.name[-6:], (run.get("mlflow") or {}).get("run_id", path.name)}


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")


def _as_bytes(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()
