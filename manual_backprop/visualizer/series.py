"""Series as arrays: their values on an x-axis, smoothing, and reduction to the resolution of a screen.

Everything is computed from all logged points. Reduction keeps the smallest and the largest value of each bucket, so
that a spike of one step stays visible. Smoothing uses only earlier values, so that a curve does not change when its run
grows, and it is corrected at the start, so that the curve begins at the first value.
"""

from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..common.errors import InputError
from ..tracking import Series, TrainingLog

# The x-axes: the name in an address, and the label below the axis.
AXES = {
    "step": "optimizer steps",
    "relative": "share of the run's steps",
    "tokens": "tokens seen",
    "flops": "FLOPs",
    "seconds": "seconds of running",
    "epochs": "epochs",
}
BUCKETS = 600  # with two points each: more than a screen has columns
FEW = 2 * BUCKETS  # so many points are drawn without reduction
LINE = 1e-9  # relative deviation up to which compute counts as proportional to the steps


class Points(NamedTuple):
    x: np.ndarray
    y: np.ndarray
    steps: np.ndarray


@dataclass(frozen=True)
class View:
    """How curves are drawn. `smoothing` is the span of an exponential mean in logged points; 0: none. `low`, `high` are
    the zoomed range of the x-axis, `low_y`, `high_y` that of the y-axis."""

    x: str = "step"
    log_x: bool = False
    log_y: bool = False
    smoothing: float = 0
    low: float | None = None
    high: float | None = None
    low_y: float | None = None
    high_y: float | None = None

    def __post_init__(self) -> None:
        if self.x not in AXES:
            raise InputError(f"x={self.x!r}: expected one of {', '.join(AXES)}")
        if not 0 <= self.smoothing < 1e9:
            raise InputError(f"smoothing={self.smoothing}: expected a number of points, 0 for none")


def series_of(log: TrainingLog, metric: str) -> Series | None:
    return next((part[metric] for part in (log.training, log.validation, log.system) if metric in part), None)


def metrics_of(log: TrainingLog) -> list[str]:
    return [*log.training, *log.validation, *log.system]


class _Column:
    """A growing list as an array: only new values are converted."""

    def __init__(self, kind: type) -> None:
        self.kept: np.ndarray = np.empty(1024, kind)
        self.length = 0

    def of(self, numbers: list) -> np.ndarray:
        if len(numbers) > len(self.kept):
            grown = np.empty(2 * len(numbers), self.kept.dtype)
            grown[: self.length] = self.kept[: self.length]
            self.kept = grown
        self.kept[self.length : len(numbers)] = numbers[self.length :]
        self.length = len(numbers)
        return self.kept[: self.length]


def arrays(series: Series) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """steps, values, times [ms], as they are in the lists now."""
    columns = series.memo.get("columns")
    if columns is None or columns[0] != series.revision:
        columns = series.revision, _Column(np.int64), _Column(np.float64), _Column(np.int64)
        series.memo["columns"] = columns
    _, steps, values, times = columns
    count = len(series.steps)  # the three lists have the same length: the reader appends to all of them at once
    return steps.of(series.steps[:count]), values.of(series.values), times.of(series.times_ms)


def points_of(log: TrainingLog, metric: str, x: str = "step") -> Points:
    """All points of a metric over the x-axis `x`; empty if the run has no such metric, or nothing for this axis.

    Points that a resume has overwritten are dropped. x never decreases; two points with the same x are both kept,
    unless x is the step.
    """
    key = "points", metric, x
    if key not in log.memo:
        log.memo[key] = _points_of(log, metric, x)
    return log.memo[key]


def _points_of(log: TrainingLog, metric: str, x: str) -> Points:
    series = series_of(log, metric)
    if series is None or not series.steps:
        return Points(np.empty(0), np.empty(0), np.empty(0, np.int64))
    steps, values, times = arrays(series)
    if left := log.superseded.get(metric):
        kept = ~np.isin(steps, np.fromiter(left, np.int64, len(left)))
        steps, values, times = steps[kept], values[kept], times[kept]
    places = places_of(log, steps, times, x)
    known = np.isfinite(places)
    steps, values, places = steps[known], values[known], places[known]
    if len(places) and (np.diff(places) < 0).any():
        order = np.argsort(places, kind="stable")
        steps, values, places = steps[order], values[order], places[order]
    return Points(places, values, steps)


def places_of(log: TrainingLog, steps: np.ndarray, times: np.ndarray, x: str) -> np.ndarray:
    """The positions of steps on an axis; NaN where the run has not logged what is needed."""
    if x == "step":
        return steps.astype(float)
    if x == "relative":
        return steps / max(planned_steps(log), 1)
    if x == "seconds":
        return _seconds(log, times)
    if x == "epochs" and series_of(log, "epoch") is None:
        tokens = log.tags.get("train_tokens", "")
        return _logged(log, "tokens_seen", steps) / float(tokens) if tokens.isdecimal() else np.full(len(steps), np.nan)
    return _logged(log, {"tokens": "tokens_seen", "flops": "flops", "epochs": "epoch"}[x], steps)


def _logged(log: TrainingLog, metric: str, steps: np.ndarray) -> np.ndarray:
    """The logged tokens or FLOPs at these steps, from 0 at step 0: interpolated linearly between two rows. After the
    last row they are unknown, unless all rows have the same amount per step."""
    known = points_of(log, metric)
    at, amounts = known.steps[np.isfinite(known.y)], known.y[np.isfinite(known.y)]
    if not len(at):
        return np.full(len(steps), np.nan)
    if at[0] > 0:
        at, amounts = np.concatenate(([0], at)), np.concatenate(([0.0], amounts))
    found = np.interp(steps, at, amounts)
    past = steps > at[-1]
    if past.any():
        rate = amounts[-1] / at[-1] if at[-1] else np.nan
        steady = len(at) > 1 and np.allclose(amounts, rate * at, rtol=LINE, atol=0)
        found[past] = steps[past] * rate if steady else np.nan
    return found


def planned_steps(log: TrainingLog) -> int:
    """The number of steps in the run's config; the last logged step if there is none, or if the run has gone
    further."""
    last = last_step(log)
    training = log.config.get("training")
    planned = training.get("max_steps") if isinstance(training, dict) else None
    return max(last, planned) if isinstance(planned, int) and log.run.get("status") != "FINISHED" else last


def last_step(log: TrainingLog) -> int:
    return max((one.steps[-1] for one in main_series(log)), default=0)


def main_series(log: TrainingLog) -> list[Series]:
    """The series of training and validation that have a point."""
    return [series for part in (log.training, log.validation) for series in part.values() if series.steps]


def _seconds(log: TrainingLog, times: np.ndarray) -> np.ndarray:
    """The seconds since the run began, without pauses between an end and a resume."""
    begun = _milliseconds(log.run.get("created_at"))
    main = main_series(log)
    if begun is None:
        begun = min((series.times_ms[0] for series in main), default=0)
    seconds = (times - begun) / 1000.0
    every = np.sort(np.concatenate([arrays(series)[2] for series in main])) if log.run.get("resumes") else None
    for resume in log.run.get("resumes") or []:
        at = _milliseconds(resume.get("at"))
        if every is not None and at is not None and (place := np.searchsorted(every, at)) > 0:
            seconds = seconds - np.where(times >= at, max(0.0, (at - every[place - 1]) / 1000.0), 0.0)
    return np.maximum(seconds, 0.0)


def _milliseconds(text: object) -> float | None:
    try:
        return datetime.fromisoformat(str(text)).timestamp() * 1000
    except ValueError:
        return None


# Smoothing and reducing


class Smoothing:
    """An exponential mean with decay 1 - 2 / (span + 1). Its weights sum to 1 from the first value on (the bias
    correction of Adam). A non-finite value is skipped, and is itself not changed.

    `of(values)` continues from its last call if values were only appended.
    """

    def __init__(self, span: float):
        self.decay = max(0.0, 1 - 2 / (span + 1))
        self.column = _Column(float)
        self.means: list[float] = []
        self.total = self.weight = 0.0

    def of(self, values: np.ndarray) -> np.ndarray:
        for value in values[len(self.means) :].tolist():
            if value - value == 0:  # finite
                self.total = self.decay * self.total + value
                self.weight = self.decay * self.weight + 1
                value = self.total / self.weight
            self.means.append(value)
        return self.column.of(self.means)


def smoothed(log: TrainingLog, metric: str, points: Points, span: float) -> Points:
    """`points`, which are all points of a metric, with smoothed values."""
    series = series_of(log, metric)
    if series is None or len(points.y) != len(series.values):  # some points are dropped, and later others may be
        return points._replace(y=Smoothing(span).of(points.y))
    key = "smoothing", span
    revision, smoothing = series.memo.get(key, (-1, None))
    if smoothing is None or revision != series.revision:
        smoothing = Smoothing(span)
        series.memo[key] = series.revision, smoothing
    return points._replace(y=smoothing.of(points.y))


def reduced(points: Points, view: View) -> Points:
    """The points reduced to as many as a screen can show: the smallest and the largest of each bucket, and both ends.
    All points if they are few, or few remain after zooming. Non-finite points are left out (marks show them)."""
    if view.low is not None and view.high is not None:
        # one more point on either side, so that lines continue to the edge of the picture
        first = max(0, int(np.searchsorted(points.x, view.low)) - 1)
        last = int(np.searchsorted(points.x, view.high, side="right")) + 1
        points = Points(*(column[first:last] for column in points))
    drawn = np.isfinite(points.y) & ((points.x > 0) | (not view.log_x)) & ((points.y > 0) | (not view.log_y))
    points = Points(*(column[drawn] for column in points))
    x, y = points.x, points.y
    if len(x) <= FEW:
        return points
    scale = np.log10(x) if view.log_x else x
    width = scale[-1] - scale[0]
    bucket = ((scale - scale[0]) / width * BUCKETS).astype(int) if width > 0 else np.arange(len(x)) * BUCKETS // len(x)
    edges = [*np.flatnonzero(np.diff(bucket, prepend=-1)).tolist(), len(x)]
    kept = {0, len(x) - 1}
    for start, end in pairwise(edges):
        part = y[start:end]
        kept |= {start + int(part.argmin()), start + int(part.argmax())}
    chosen = np.array(sorted(kept))
    return Points(*(column[chosen] for column in points))
