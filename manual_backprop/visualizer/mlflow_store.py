"""Runs that are only in an MLflow store: copied from another machine, or logged by another program.

A database file is opened read-only and without MLflow, whose client would migrate its tables. A server is queried
through MLflow.
"""

from __future__ import annotations

import json
import math
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from ..common.errors import InputError, first_line
from ..common.uris import file_uri, sqlite_database
from ..tracking import TrainingLog
from ..tracking.mlflow_delivery import RUN_ID_TAG, prepare_environment, without_credentials
from ..tracking.training_log import Metrics

BEST = "validation/loss"
INFINITE = 1.79e308  # MLflow stores infinity as this value or a larger one
STATUSES = {"SCHEDULED": "RUNNING"}


def open_store(uri: str) -> Store | None:
    """The store at `uri`; None if there is none (a database that does not exist)."""
    _, database = sqlite_database(uri)
    if database is not None:
        return SqliteStore(database) if database.is_file() else None
    return ServerStore(uri) if uri.startswith(("http://", "https://")) else None


class StoredRun(NamedTuple):
    """A run as MLflow stores it, without its metrics."""

    id: str
    name: str
    status: str
    start: int | None  # [ms]
    settings: dict[str, str]  # MLflow's params
    tags: dict[str, str]

    def row(self, step: int | None, best: float | None) -> dict[str, Any]:
        """The run's row in the table of runs."""
        return {
            "id": self.id,
            "name": self.name or self.id,
            "task": self.settings.get("task.name", ""),
            "architecture": self.settings.get("architecture.name", ""),
            "parameters": _value(self.settings.get("parameters", "")) or None,
            "steps": step,
            "metric": BEST,
            "best": best if best is not None and math.isfinite(best) else None,
            "status": STATUSES.get(self.status, self.status),
            "started": _time(self.start),
            "sweep": self.tags.get("mlflow.parentRunId", ""),
            "local": self.tags.get(RUN_ID_TAG, ""),
            "from": "MLflow",
        }

    def log(self, points: Iterable[tuple[str, int, float, int]], place: str) -> TrainingLog:
        """The run's log, from its points (metric, step, value, time [ms]) in the order in which they were written."""
        metrics = Metrics()
        for key, step, value, time in points:
            metrics.put(key, step, math.copysign(math.inf, value) if abs(value) >= INFINITE else value, time)
        config: dict[str, Any] = {}
        for key, text in self.settings.items():
            group, _, rest = key.partition(".")
            if rest and isinstance(config.setdefault(group, {}), dict):
                config[group][rest] = _value(text)
            elif not rest and key != "parameters":
                config[key] = _value(text)
        counted = _value(self.settings.get("parameters", ""))
        run = {"run_name": self.name or self.id, "run_id": self.id, "created_at": _time(self.start)}
        return metrics.log(
            path=Path(place) / self.id,
            run=run | {"status": STATUSES.get(self.status, self.status)},
            config=config,
            damaged_lines=0,
            model={"parameters": counted} if isinstance(counted, int) else {},
            tags=self.tags,
            resumes=tuple(sorted({*metrics.resumed_after})),
        )


class Store(ABC):
    """Runs that MLflow has. A run is read again, with all of its points, when there are new ones."""

    def __init__(self) -> None:
        self._known: dict[str, tuple[Any, TrainingLog]] = {}

    def read(self, run_id: str) -> TrainingLog:
        """The current log of a run; the same object as long as nothing has changed. Raises InputError."""
        state = self.state(run_id)
        if run_id not in self._known or self._known[run_id][0] != state:
            self._known[run_id] = state, self.log(run_id)
        return self._known[run_id][1]

    @abstractmethod
    def rows(self) -> list[dict[str, Any]]:
        """A row of the table for each run that has logged a metric."""

    @abstractmethod
    def state(self, run_id: str) -> Any:
        """A value that changes whenever the run has something new."""

    @abstractmethod
    def log(self, run_id: str) -> TrainingLog: ...


class SqliteStore(Store):
    def __init__(self, file: Path):
        super().__init__()
        self.file = file

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        address = f"{file_uri(self.file)}?mode=ro"
        try:
            with closing(sqlite3.connect(address, uri=True, timeout=5)) as connection:
                yield connection
        except sqlite3.Error as error:
            raise InputError(f"{self.file} cannot be read as MLflow's database: {error}") from error

    def rows(self) -> list[dict[str, Any]]:
        runs = "select run_uuid, name, status, start_time from runs where lifecycle_stage = 'active'"
        with self._open() as store:
            found = store.execute(runs).fetchall()
            last = dict(store.execute("select run_uuid, max(step) from latest_metrics group by run_uuid"))
            least = "select run_uuid, min(value) from metrics where key = ? and not is_nan group by run_uuid"
            best = dict(store.execute(least, (BEST,)))
            tags = _nested(
                store.execute("select run_uuid, key, value from tags where key like '%run_id%' or key like '%parent%'")
            )
            wanted = "'parameters', 'task.name', 'architecture.name'"
            settings = _nested(store.execute(f"select run_uuid, key, value from params where key in ({wanted})"))
        stored = (StoredRun._make([*run, settings.get(run[0], {}), tags.get(run[0], {})]) for run in found)
        return [run.row(last[run.id], best.get(run.id)) for run in stored if run.id in last]

    def state(self, run_id: str) -> Any:
        with self._open() as store:
            counted = store.execute(
                "select count(*), max(timestamp) from metrics where run_uuid = ?", (run_id,)
            ).fetchone()
            return counted, store.execute("select status, end_time from runs where run_uuid = ?", (run_id,)).fetchone()

    def log(self, run_id: str) -> TrainingLog:
        run = "select run_uuid, name, status, start_time from runs where run_uuid = ?"
        points = (
            "select key, step, case when is_nan then null else value end, timestamp from metrics where run_uuid = ?"
        )
        with self._open() as store:
            found = store.execute(run, (run_id,)).fetchone()
            rows = store.execute(points + " order by timestamp, rowid", (run_id,)).fetchall()
            settings = dict(store.execute("select key, value from params where run_uuid = ?", (run_id,)))
            tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run_id,)))
        known = ((key, step, math.nan if value is None else value, time) for key, step, value, time in rows)
        return StoredRun._make([*found, settings, tags]).log(known, str(self.file))


class ServerStore(Store):
    def __init__(self, uri: str):
        super().__init__()
        self.uri = uri
        self._client: Any = None

    @contextmanager
    def _asking(self) -> Iterator[Any]:
        prepare_environment()
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        self._client = self._client or MlflowClient(tracking_uri=self.uri)
        try:
            yield self._client
        except MlflowException as error:
            raise InputError(f"MLflow at {without_credentials(self.uri)}: {first_line(error)}") from error

    def rows(self) -> list[dict[str, Any]]:
        with self._asking() as client:
            experiments = [one.experiment_id for one in client.search_experiments()]
            runs = client.search_runs(experiments, max_results=1000) if experiments else []
        # only the history of a metric has steps
        return [_stored(run).row(None, run.data.metrics.get(BEST)) for run in runs if run.data.metrics]

    def state(self, run_id: str) -> Any:
        with self._asking() as client:
            run = client.get_run(run_id)
        return run.info.status, dict(run.data.metrics)

    def log(self, run_id: str) -> TrainingLog:
        with self._asking() as client:
            run = client.get_run(run_id)
            points = [
                (name, point.step, point.value, point.timestamp)
                for name in run.data.metrics
                for point in client.get_metric_history(run_id, name)
            ]
        return _stored(run).log(sorted(points, key=lambda point: point[3]), self.uri)


def _stored(run: Any) -> StoredRun:
    info = run.info
    about = info.run_id, info.run_name, info.status, info.start_time
    return StoredRun(*about, dict(run.data.params), dict(run.data.tags))


def _nested(rows: Any) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for run_id, key, value in rows:
        found.setdefault(run_id, {})[key] = value
    return found


def _value(text: str) -> Any:
    """The value of a parameter. MLflow stores parameters as text: None, True, numbers and lists in Python or JSON."""
    with suppress(ValueError):
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    return text


def _time(milliseconds: int | None) -> str:
    return "" if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()
