"""Tables of runs: their summaries, and their configs with differing keys first.

The page shows them, and `compare RUNS --csv FILE` writes them.
"""

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..common.durable_files import write_atomically
from ..common.errors import InputError
from ..common.json_files import read_object
from ..common.origin import SOURCES
from ..config.validation import with_defaults
from ..tracking import TrainingLog, flatten
from ..training.comparison.runs import LOSS, Metric
from .equal_compute import compute_metric
from .runs import status_of
from .series import last_step, main_series, places_of, points_of
from .style import Logs

ABSENT = "-"


def best_value(log: TrainingLog, metric: str) -> tuple[float, int] | None:
    """The best finite value and its first step: the lowest value, or the highest if the metric is a score."""
    sign = -1 if Metric.of(log.run) == (metric, True) else 1
    points = points_of(log, metric)
    known = zip(points.y.tolist(), points.steps.tolist(), strict=True)
    best = min(((sign * value, step) for value, step in known if math.isfinite(value)), default=None)
    return None if best is None else (sign * best[0], best[1])


def best_run(logs: Logs) -> str | None:
    """The name of the run with the best value of the metric that all share; None if they have different metrics, or if
    fewer than two have a value."""
    metrics = {Metric.of(log.run) for log in logs.values()}
    if len(metrics) > 1:
        return None
    metric, highest = Metric.shared(metrics)
    if metric == LOSS:
        metric = compute_metric(logs)  # bits per byte if tokenizers differ
    reached = {name: found[0] for name, log in logs.items() if (found := best_value(log, metric)) is not None}
    return (max if highest else min)(reached, key=reached.__getitem__) if len(reached) > 1 else None


def summary(log: TrainingLog) -> dict[str, Any]:
    """The summary of a run: numbers unformatted, seconds as a float, None for unknown values."""
    metric = Metric.of(log.run).name
    best = best_value(log, metric)
    speeds = [speed for speed in points_of(log, "tokens_per_second").y.tolist() if math.isfinite(speed)]
    environment = log.run.get("made_with") or {}
    settings = flatten(with_defaults(log.config)) if "training" in log.config else flatten(log.config)
    return {
        "run": log.path.name,
        "status": status_of(log.run) or None,
        "task": settings.get("task.name"),
        "architecture": settings.get("architecture.name") or settings.get("architecture"),
        "parameters": log.model.get("parameters"),
        "steps": last_step(log),
        "tokens": _last(log, "tokens_seen"),
        "FLOPs": _last(log, "flops"),
        "metric": metric,
        "best": best[0] if best else None,
        "best at step": best[1] if best else None,
        "last": _last(log, metric),
        "seconds": _duration(log),
        "tokens a second": statistics.median(speeds) if speeds else None,
        "machine": _machine(log, environment),
        "commit": log.tags.get("git_commit", str(environment.get("commit") or "")).partition(" ")[0][:12] or None,
        "started": log.run.get("created_at"),
        "resumes": len(log.resumes),
    }


def _last(log: TrainingLog, metric: str) -> float | None:
    values = points_of(log, metric).y
    return float(values[-1]) if len(values) else None


def _duration(log: TrainingLog) -> float | None:
    """The time that a run has trained [s], without the pauses before it was resumed."""
    import numpy as np

    latest = max(main_series(log), key=lambda series: series.times_ms[-1], default=None)
    if latest is None:
        return None
    return float(places_of(log, np.array(latest.steps[-1:]), np.array(latest.times_ms[-1:]), "seconds")[0])


def _machine(log: TrainingLog, environment: Mapping[str, Any]) -> str | None:
    threads = environment.get("threads")
    parts = [environment.get("processor"), f"{threads} threads" if threads else None]
    parts.append(log.tags.get("device") or log.model.get("device"))
    return ", ".join(str(part) for part in parts if part) or None


def configs(logs: Logs) -> list[dict[str, Any]]:
    """A row for each key, with its value in every run and the source of the value (`config_sources.json`). Keys that
    differ between runs come first."""
    flat = {
        name: flatten(with_defaults(log.config) if "training" in log.config else log.config)
        for name, log in logs.items()
    }
    sources = {name: _sources(log.path) for name, log in logs.items()}
    rows = []
    for key in dict.fromkeys(key for settings in flat.values() for key in settings):
        values = [as_text(settings[key]) if key in settings else ABSENT for settings in flat.values()]
        row = {"key": key, "values": values, "sources": [sources[name].get(key, "") for name in logs]}
        rows.append(row | {"differs": len({*values}) > 1})
    return sorted(rows, key=lambda row: not row["differs"])


def _sources(path: Path) -> dict[str, str]:
    try:
        return {str(key): str(source) for key, source in read_object(path / SOURCES).items()}
    except InputError:
        return {}


def as_text(value: Any) -> str:
    """A value of a config as it is shown; floats have 12 digits."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.12g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def write_csv(logs: Logs, path: Path) -> None:
    """Writes a line for each run: its summary, whether it is the best, and its config with differing keys first, each
    followed by the source of its value. Raises StorageError."""
    rows, settings, best = {name: summary(log) for name, log in logs.items()}, configs(logs), best_run(logs)
    columns = [
        "name",
        "is best",
        *next(iter(rows.values()), {}),
        *(f"{row['key']}{kind}" for row in settings for kind in ("", " from")),
    ]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for place, (name, row) in enumerate(rows.items()):
        known = ["" if value is None else value for value in row.values()]
        config = [cell for one in settings for cell in (_cell(one["values"][place]), one["sources"][place])]
        writer.writerow([_cell(name), "yes" if name == best else "", *map(_cell, known), *config])
    write_atomically(path, text.getvalue().encode())


def _cell(value: Any) -> Any:
    """The value; a text that a spreadsheet would read as a formula is quoted."""
    return f"'{value}" if isinstance(value, str) and value[:1] in ("=", "+", "@", "\t", "\r") else value
