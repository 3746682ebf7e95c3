"""The runs of an outputs directory, and those that are only in an MLflow store, by id. It only reads.

`Runs.rows()` is the table of all runs. From each run's metrics it reads only the lines of evaluations and the last one,
and the next time only new lines.
"""

import json
import math
import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.durable_files import process_is_alive
from ..common.errors import InputError
from ..common.uris import expanded
from ..tracking import LogReader, TrainingLog, find_run, list_runs
from ..tracking.metrics_file import METRICS
from ..tracking.run_directory import RUN_FILE, RUNNING, SWEEPS, find_sweep, read_run
from ..tracking.training_log import TRACKING_FILE, load_config
from ..training.comparison.runs import Metric
from ..training.sweeps.records import runs_of_sweep

if TYPE_CHECKING:
    from .mlflow_store import Store

DEAD = "DEAD"  # run.json says RUNNING, but the process is gone


class Runs:
    """All known runs, by id: those below `root`, those that `add` was called with, and those in `elsewhere`."""

    def __init__(self, root: str | Path):
        self.root = Path(root).absolute()
        self.elsewhere: Store | None = None  # what MLflow has
        self._paths: dict[str, Path] = {}
        self._scans: dict[Path, Scan] = {}
        self._readers: dict[Path, LogReader] = {}
        self._extra: list[Path] = []
        self._rows: dict[str, dict[str, Any]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Updates the list of runs."""
        folder = self.root / "runs"
        found = {}
        with suppress(OSError), os.scandir(folder) as entries:
            found = {entry.name: folder / entry.name for entry in entries if (folder / entry.name / RUN_FILE).is_file()}
        for path in self._extra:
            name = path.name
            while found.get(name, path) != path:  # two folders with the same name
                name = f"{path.parent.name}-{name}"
            found[name] = path
        self._paths = found

    def add(self, paths: Sequence[Path]) -> list[str]:
        """The ids of the runs in these directories, which may be anywhere."""
        paths, folder = [path.resolve() for path in paths], (self.root / "runs").resolve()
        inside = {path: path.name for path in paths if path.parent == folder and path.name in self}
        self._extra += [path for path in paths if path not in inside]
        self.refresh()
        known = {path: run_id for run_id, path in self._paths.items()} | inside
        return [known[path] for path in paths]

    def rows(self) -> list[dict[str, Any]]:
        """The rows of the table, newest start first."""
        self.refresh()
        rows = []
        for run_id, path in self._paths.items():
            scan = self._scans.setdefault(path, Scan(path))
            with suppress(InputError, OSError):  # a run that is just being created, or damaged: the others are shown
                rows.append({"id": run_id} | scan.row())
        if self.elsewhere is not None:
            known = {row["id"] for row in rows}
            with suppress(InputError):  # an unreadable store; opening one of its runs shows the error
                rows += [row for row in self.elsewhere.rows() if row.get("local") not in known]
        rows.sort(key=lambda row: (row["started"] or "", row["id"]), reverse=True)
        self._rows = {row["id"]: row for row in rows}
        return rows

    def __contains__(self, run_id: str) -> bool:
        return run_id in self._paths or run_id in self._rows

    def path(self, run_id: str) -> Path | None:
        """The directory of a run; None if it is only in MLflow. Raises InputError for an unknown id."""
        if run_id not in self:
            self.rows()
        if run_id not in self:
            raise InputError(f"there is no run {run_id[:100]!r} here")
        return self._paths.get(run_id)

    def log(self, run_id: str) -> TrainingLog:
        """The current log of a run; the same object as long as nothing has changed. Raises InputError."""
        path = self.path(run_id)
        if path is None:
            assert self.elsewhere is not None
            return self.elsewhere.read(run_id)
        return self._readers.setdefault(path, LogReader(path)).read()


def labels_of(logs: Mapping[str, TrainingLog]) -> dict[str, str]:
    """A name for each run, by id or path: its own; if two runs have the same name, with the last six characters of the
    id."""
    names = {run_id: str(log.run.get("run_name") or log.path.name or run_id) for run_id, log in logs.items()}
    count = Counter(names.values())
    labels = {run_id: name if count[name] == 1 else f"{name} ({run_id[-6:]})" for run_id, name in names.items()}
    unique = len({*labels.values()}) == len(labels)
    return labels if unique else {run_id: f"{name} ({run_id})" for run_id, name in names.items()}


def status_of(run: Mapping[str, Any]) -> str:
    """The status in run.json; DEAD if it is RUNNING but the process on this machine is gone; empty if there is none."""
    status, owner = str(run.get("status", "")), run.get("owner") or {}
    here = owner.get("host") == socket.gethostname() and isinstance(owner.get("pid"), int)
    return DEAD if status == RUNNING and here and not process_is_alive(owner["pid"]) else status


def named_runs(which: Sequence[str], root: Path) -> list[Path]:
    """The directories named on a command line: runs, sweeps (all their runs), folders of a TrainingLogger; each once.
    Raises InputError."""
    found: list[Path] = []
    for one in which:
        path = expanded(one)
        if (path / "jobs").is_dir() or _is_sweep(one, root):
            sweep = path if (path / "jobs").is_dir() else find_sweep(root, one)
            if not (jobs := runs_of_sweep(sweep)):
                raise InputError(f"{one}: no run of this sweep exists")
            found += jobs
        elif path.name == METRICS and path.is_file():
            found.append(path.parent)
        elif (path / METRICS).is_file() and not (path / RUN_FILE).is_file():
            found.append(path)
        else:
            found.append(find_run(root, one).path)
    return list(dict.fromkeys(path.absolute() for path in found))


def _is_sweep(which: str, root: Path) -> bool:
    sweeps = list_runs(root, SWEEPS)
    names = {path.name for path in sweeps} | {path.name[-6:] for path in sweeps}
    return which in names and not any(which in (path.name, path.name[-6:]) for path in list_runs(root))


class Scan:
    """One run's row, without reading all of its metrics."""

    def __init__(self, path: Path):
        self.path = path
        self._start()

    def _start(self) -> None:
        self._position, self._step, self._inode = 0, 0, 0
        self._measured: dict[int, dict[str, Any]] = {}  # metrics of evaluations, by step

    def row(self) -> dict[str, Any]:
        run = read_run(self.path) if (self.path / RUN_FILE).is_file() else {}
        self._read_metrics()
        settings = self._settings(run)
        metric, highest = Metric.of(run)
        values = [step[metric] for step in self._measured.values() if _finite(step.get(metric))]
        sweep = run.get("sweep") or {}
        return {
            "name": str(run.get("run_name") or self.path.name),
            "task": settings.get("task.name") or "",
            "architecture": settings.get("architecture.name") or "",
            "parameters": settings.get("parameters"),
            "steps": self._step,
            "metric": metric,
            "best": (max if highest else min)(values, default=None),
            "status": status_of(run),
            "started": run.get("started_at") or "",
            "sweep": str(sweep.get("run_id") or ""),
        }

    def _settings(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """The flat parameters that a run has tracked; or its config, which takes ten times as long to read."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            tracked = json.loads((self.path / TRACKING_FILE).read_text(encoding="utf-8"))["parameters"]
            if "architecture.name" in tracked:
                return {"task.name": "language_model"} | tracked
        model = run.get("model") or {}
        config = {}
        with suppress(InputError):
            config = load_config(self.path)
        groups = {f"{key}.name": (config.get(key) or {}) for key in ("task", "architecture")}
        named = {key: group.get("name") for key, group in groups.items() if isinstance(group, Mapping)}
        architecture = model.get("architecture") or named.get("architecture.name") or config.get("architecture")
        return named | {"architecture.name": architecture, "parameters": model.get("parameters")}

    def _read_metrics(self) -> None:
        try:
            state = (self.path / METRICS).stat()
        except OSError:
            return
        if state.st_size < self._position or state.st_ino != self._inode:
            self._start()
            self._inode = state.st_ino
        if state.st_size == self._position:
            return
        with (self.path / METRICS).open("rb") as file:
            file.seek(self._position)
            content = file.read()
        end = content.rfind(b"\n") + 1
        place = content.find(b'"validation/', 0, end)
        while place >= 0:
            start, stop = content.rfind(b"\n", 0, place) + 1, content.find(b"\n", place)
            with suppress(ValueError, KeyError, TypeError):
                entry = json.loads(content[start:stop])
                self._measured.setdefault(int(entry["step"]), {}).update(entry["metrics"])
            place = content.find(b'"validation/', stop, end)
        last = content[:end].rstrip(b"\n").rpartition(b"\n")[2]
        with suppress(ValueError, KeyError, TypeError):
            self._step = int(json.loads(last).get("step", self._step))
        self._position += end


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
