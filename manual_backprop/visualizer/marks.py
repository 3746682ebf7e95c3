"""Marks at the bottom of a picture for events that a curve does not show: non-finite values, skipped steps, resumes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..tracking import TrainingLog
from .series import View, points_of
from .style import FAINT, LONGEST_HOVER, MARKS, Style, safe

MOST_MARKS = 50  # of a run, in one picture


def marks(
    name: str, log: TrainingLog, metrics: Sequence[str], view: View, style: Style, skipped: bool = False
) -> list[dict[str, Any]]:
    """The marks of a run: non-finite values, skipped steps, and resumes."""
    key = "marks", tuple(metrics), view.x, view.log_x, style, skipped, name
    if key not in log.memo:
        found = [mark for metric in metrics for mark in _not_finite(log, metric, view.x)]
        found += _skipped(log, view.x) if skipped else []
        found += _resumes(log, view.x)
        log.memo[key] = _marks(name, [mark for mark in found if mark[0] > 0 or not view.log_x], style)
    return log.memo[key]


def _marks(name: str, found: list[tuple[float, str, str]], style: Style) -> list[dict[str, Any]]:
    if not found:
        return []
    if len(found) > MOST_MARKS:
        rest = len(found) - MOST_MARKS
        found = [*found[:MOST_MARKS], (found[-1][0], "x-thin", f"and {rest} more marks up to here")]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [place for place, _, _ in found],
            "y": [0.025] * len(found),
            "yaxis": MARKS,
            "cliponaxis": False,
            "text": [safe(text, 200) for _, _, text in found],
            "name": safe(name),
            "legendgroup": safe(name, 10**6),
            "marker": {
                "symbol": [symbol for _, symbol, _ in found],
                "size": 9,
                "color": style.colour,
                "line": {"width": 2, "color": style.colour},
                "opacity": FAINT if style.faint else 1,
            },
            "hovertemplate": f"<b>{safe(name, LONGEST_HOVER)}</b><br>%{{text}}<extra></extra>",
        }
    ]


def _not_finite(log: TrainingLog, metric: str, x: str) -> list[tuple[float, str, str]]:
    """A mark for each stretch of consecutive non-finite rows."""
    points = points_of(log, metric, x)
    bad = ~np.isfinite(points.y)
    if not bad.any():
        return []
    edges = np.flatnonzero(np.diff(np.concatenate(([False], bad, [False])).astype(int)))
    found = []
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        value = "NaN" if np.isnan(points.y[first]) else "infinite"
        steps = f"step {points.steps[first]:,}"
        steps += f" to {points.steps[end - 1]:,} ({end - first} rows)" if end - first > 1 else ""
        found.append((float(points.x[first]), "x-thin", f"{metric} is {value}: {steps}"))
    return found


def _skipped(log: TrainingLog, x: str) -> list[tuple[float, str, str]]:
    counts = points_of(log, "nonfinite_steps", x)
    grown = np.diff(counts.y, prepend=0.0)
    found = []
    for place in np.flatnonzero(grown > 0):
        text = f"{grown[place]:.0f} skipped, not finite, up to step {counts.steps[place]:,}"
        found.append((float(counts.x[place]), "line-ns", text))
    return found


def _resumes(log: TrainingLog, x: str) -> list[tuple[float, str, str]]:
    """A mark for each resume, at the first row after it."""
    metric = "train/loss" if "train/loss" in log.training else next(iter(log.training or log.validation), "")
    points, found = points_of(log, metric, x), []
    for step in log.resumes:
        place = int(np.searchsorted(points.steps, step, side="right"))
        if len(points.x):
            at = points.x[min(place, len(points.x) - 1)]
            found.append((float(at), "triangle-up-open", f"resumed after step {step:,}"))
    return found
