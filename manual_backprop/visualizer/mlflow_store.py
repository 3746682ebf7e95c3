"""Runs that are only in an MLflow store: copied from another machine, or logged by another program.

A database file is opened read-only and without MLflow, whose client would migrate its tables. A server is queried
through MLflow.
"""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..common.errors import InputError, first_line
from ..common.uris import file_uri, sqlite_database
from ..tracking import TrainingLog
from ..tracking.mlflow_delivery import RUN_ID_TAG, prepare_environment, without_credentials
from ..tracking.training_log import Metrics

BEST = "validation/loss"
INFINITE = 1.79e308  # MLflow stores infinity as this value or a larger one
STATUSES = {"SCHEDULED": "RUNNING"}


def open_store(uri: str) -> SqliteStore | ServerStore | None:
    """The store at `uri`; None if there is none (a database that does not exist)."""
    _, database = sqlite_database(uri)
    if database is not None:
        return SqliteStore(database) if database.is_file() else None
    return ServerStore(uri) if uri.startswith(("http://", "https://")) else None


class _Reader:
    """Reads one run; fetches all of its points again when there are new ones."""

    def __init__(self, store: SqliteStore | ServerStore, run_id: str):
        self.store, self.run_id = store, run_id
        self._seen: Any = None
        self._log: TrainingLog | None = None

    def read(self) -> TrainingLog:
        seen = self.store.state(self.run_id)
        if self._log is None or seen != self._seen:
            self._seen, self._log = seen, self.store.log(self.run_id)
        return self._log


class _Store:
    def reader(self, run_id: str) -> _Reader:
        return _Reader(self, run_id)  # type: ignore[arg-type]


class SqliteStore(_Store):
    def __init__(self, file: Path):
        self.file = file

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        address = f"{file_uri(self.file)}?mode=ro"
        try:
            connection = sqlite3.connect(address, uri=True, timeout=5)
            try:
                yield connection
            finally:
                connection.close()
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
        return [
            _row(
                run_id,
                name,
                status,
                start,
                last[run_id],
                best.get(run_id),
                settings.get(run_id, {}),
                tags.get(run_id, {}),
            )
            for run_id, name, status, start in found
            if run_id in last
        ]

    def state(self, run_id: str) -> Any:
        with self._open() as store:
            counted = store.execute(
                "select count(*), max(timestamp) from metrics where run_uuid = ?", (run_id,)
            ).fetchone()
            return counted, store.execute("select status, end_time from runs where run_uuid = ?", (run_id,)).fetchone()

    def log(self, run_id: str) -> TrainingLog:
        points = (
            "select key, step, case when is_nan then null else value end, timestamp from metrics where run_uuid = ?"
        )
        with self._open() as store:
            name, status, start = store.execute(
                "select name, status, start_time from runs where run_uuid = ?", (run_id,)
            ).fetchone()
            rows = store.execute(points + " order by timestamp, rowid", (run_id,)).fetchall()
            settings = dict(store.execute("select key, value from params where run_uuid = ?", (run_id,)))
            tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run_id,)))
        found = [(key, step, math.nan if value is None else value, time) for key, step, value, time in rows]
        return _log(run_id, name, status, start, found, settings, tags, str(self.file))


class ServerStore(_Store):
    def __init__(self, uri: str):
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
        return [
            _row(
                run.info.run_id,
                run.info.run_name,
                run.info.status,
                run.info.start_time,
                None,  # only the history of a metric has steps
                run.data.metrics.get(BEST),
                run.data.params,
                run.data.tags,
            )
            for run in runs
            if run.data.metrics
        ]

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
        points.sort(key=lambda point: point[3])
        info = run.info
        settings, tags = dict(run.data.params), dict(run.data.tags)
        return _log(run_id, info.run_name, info.status, info.start_time, points, settings, tags, self.uri)


def _nested(rows: Any) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for run_id, key, value in rows:
        found.setdefault(run_id, {})[key] = value
    return found


def _row(
    run_id: str,
    name: str,
    status: str,
    start: int | None,
    step: int | None,
    best: float | None,
    settings: dict[str, str],
    tags: dict[str, str],
) -> dict[str, Any]:
    return {
        "id": run_id,
        "name": name or run_id,
        "task": settings.get("task.name", ""),
        "architecture": settings.get("architecture.name", ""),
        "parameters": _value(settings.get("parameters", "")) or None,
        "steps": step,
        "metric": BEST,
        "best": best if best is not None and math.isfinite(best) else None,
        "status": STATUSES.get(status, status),
        "started": _time(start),
        "sweep": tags.get("mlflow.parentRunId", ""),
        "local": tags.get(RUN_ID_TAG, ""),
        "from": "MLflow",
    }


def _log(
    run_id: str,
    name: str,
    status: str,
    start: int | None,
    points: list[tuple[str, int, float, int]],
    settings: dict[str, str],
    tags: dict[str, str],
    place: str,
) -> TrainingLog:
    metrics = Metrics()
    for key, step, value, time in points:
        metrics.put(key, step, math.copysign(math.inf, value) if abs(value) >= INFINITE else value, time)
    config: dict[str, Any] = {}
    for key, text in settings.items():
        group, _, rest = key.partition(".")
        if rest and isinstance(config.setdefault(group, {}), dict):
            config[group][rest] = _value(text)
        elif not rest and key != "parameters":
            config[key] = _value(text)
    counted = _value(settings.get("parameters", ""))
    run = {
        "run_name": name or run_id,
        "run_id": run_id,
        "status": STATUSES.get(status, status),
        "created_at": _time(start),
    }
    return metrics.log(
        path=Path(place) / run_id,
        run=run,
        config=config,
        damaged_lines=0,
        model={"parameters": counted} if isinstance(counted, int) else {},
        tags=tags,
        resumes=tuple(sorted({*metrics.resumed_after})),
    )


def _value(text: str) -> Any:
    """The value of a parameter. MLflow stores parameters as text: None, True, numbers and lists in Python or JSON."""
    with suppress(ValueError):
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    return text


def _time(milliseconds: int | None) -> str:
    return "" if milliseconds is None else datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat()
