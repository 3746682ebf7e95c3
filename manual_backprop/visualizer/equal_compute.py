"""Compares runs at equal compute: loss over the logged FLOPs, and which run leads from where on.

Between two measurements the loss is interpolated linearly over FLOPs, from the logged values; there is no value before
the first and after the last one. Compute is the logged metric `flops`; runs without it are left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .figures import figure_of, legend_once
from .series import View, points_of, series_of
from .style import FAINT, STRONG, Logs, layout, loss_unit, safe, styles, words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

BUDGETS = 401  # positions of the slider
LEVELS = 5  # approximate number of lines of equal loss
BETWEEN = 8  # points drawn between two measurements: a line over FLOPs is curved over their logarithm


@dataclass(frozen=True)
class Curve:
    """A run's measurements: `losses[i]` at `flops[i]`, in increasing order of FLOPs."""

    flops: np.ndarray
    losses: np.ndarray

    def at(self, flops: float) -> float | None:
        """The loss at this compute; None outside the measured range."""
        if not len(self.flops) or not self.flops[0] <= flops <= self.flops[-1]:
            return None
        return float(np.interp(flops, self.flops, self.losses))

    def reaches(self, loss: float) -> float | None:
        """The compute at which the loss first falls to this value; None if it was never above it, or never falls so
        far."""
        below = np.flatnonzero(self.losses <= loss)
        if not len(below) or below[0] == 0:
            return None
        before, after = below[0] - 1, below[0]
        share = (self.losses[before] - loss) / (self.losses[before] - self.losses[after])
        return float(self.flops[before] + share * (self.flops[after] - self.flops[before]))


@dataclass(frozen=True)
class Crossing:
    """Where the curves of two runs cross: above `flops` [FLOPs] `leader` has the lower loss."""

    flops: float
    loss: float
    leader: str
    other: str

    def __str__(self) -> str:
        return f"above {scientific(self.flops)} FLOPs {self.leader} leads {self.other}"


def compute_metric(logs: Logs) -> str:
    """The metric that can be compared: bits per byte if tokenizers differ, else the validation loss."""
    having = {
        name: [log for log in logs.values() if (one := series_of(log, name)) is not None and one.steps]
        for name in ("validation/bits_per_byte", "validation/loss")
    }
    if having["validation/bits_per_byte"] and len({*map(_tokenizer, having["validation/loss"])}) > 1:
        return "validation/bits_per_byte"
    return "validation/loss" if having["validation/loss"] else "train/loss"


def _tokenizer(log: Any) -> str:
    return log.tags.get("tokenizer_digest") or json.dumps(log.config.get("tokenizer"), sort_keys=True, default=str)


def curve_of(log: Any, metric: str) -> Curve:
    points = points_of(log, metric, "flops")
    kept = np.isfinite(points.y) & (points.x > 0)
    flops, losses = points.x[kept], points.y[kept]
    if len(flops):
        last = np.append(np.diff(flops) > 0, True)  # of two at the same FLOPs, the later one
        flops, losses = flops[last], losses[last]
    return Curve(flops, losses)


def find_crossover_points(logs: Logs, metric: str | None = None) -> list[Crossing]:
    """The points where the curves of any two runs cross, within the range that both cover, in order of FLOPs.

    A curve that only touches another one does not cross it. `metric`: see `compute_metric`.
    """
    metric = metric or compute_metric(logs)
    curves = {name: curve_of(log, metric) for name, log in logs.items()}
    found = [one for a, b in combinations(curves, 2) for one in _crossings(a, curves[a], b, curves[b])]
    return sorted(found, key=lambda one: one.flops)


def _crossings(a: str, one: Curve, b: str, other: Curve) -> list[Crossing]:
    places = _common(one, other)
    if not len(places):
        return []
    first, second = (np.interp(places, curve.flops, curve.losses) for curve in (one, other))
    gap = first - second  # piecewise linear, with all its corners in `places`
    apart = np.flatnonzero(gap)  # places where one run leads
    found = []
    for turn in np.flatnonzero(np.diff(np.sign(gap[apart]))):
        before, after = apart[turn], apart[turn + 1]
        if after == before + 1:
            share = gap[before] / (gap[before] - gap[after])
            at = places[before] + share * (places[after] - places[before])
        else:
            at = places[before + 1]  # the curves meet there
        leader, behind = (a, b) if gap[after] < 0 else (b, a)
        found.append(Crossing(float(at), float(np.interp(at, one.flops, one.losses)), leader, behind))
    return found


def _common(one: Curve, other: Curve) -> np.ndarray:
    """All FLOPs at which either run was measured, within the range that both cover."""
    if not len(one.flops) or not len(other.flops):
        return np.empty(0)
    low, high = max(one.flops[0], other.flops[0]), min(one.flops[-1], other.flops[-1])
    places = np.unique(np.concatenate((one.flops, other.flops)))
    return places[(places >= low) & (places <= high)]


def sentences(logs: Logs, metric: str | None = None) -> list[str]:
    """Sentences about any two runs: which one leads from where on, or why they cannot be compared."""
    metric = metric or compute_metric(logs)
    curves = {name: curve_of(log, metric) for name, log in logs.items()}
    said = []
    for a, b in combinations(curves, 2):
        places, crossings = _common(curves[a], curves[b]), _crossings(a, curves[a], b, curves[b])
        if not len(places):
            reason = [name for name in (a, b) if not len(curves[name].flops)]
            said.append(
                f"{' and '.join(reason)}: no {words(metric).lower()} with its FLOPs was logged"
                if reason
                else f"{a} and {b} were measured over no common compute"
            )
            continue
        low, high = (scientific(edge) for edge in (places[0], places[-1]))
        if crossings:
            about = f"they cross {len(crossings)} times; up to {high} FLOPs" if len(crossings) > 1 else f"up to {high}"
            said.append(f"{crossings[-1]} ({about})")
            continue
        gaps = [np.interp(places, curves[name].flops, curves[name].losses) for name in (a, b)]
        gap = float(np.sum(gaps[0] - gaps[1]))
        if gap == 0:
            said.append(f"from {low} to {high} FLOPs {a} and {b} are equal")
        else:
            leader, other = (a, b) if gap < 0 else (b, a)
            said.append(f"from {low} to {high} FLOPs {leader} leads {other} throughout")
    return list(dict.fromkeys(said))


def scientific(flops: float) -> str:
    """2.1e12"""
    digits, _, exponent = f"{flops:.1e}".partition("e")
    return f"{digits}e{int(exponent)}"


def budget_table(logs: Logs, metric: str | None = None) -> dict[str, Any]:
    """The data of the slider: budgets [FLOPs], and every run's value at each budget, None outside the measured
    range."""
    metric = metric or compute_metric(logs)
    curves = {name: curve_of(log, metric) for name, log in logs.items()}
    ends = [edge for curve in curves.values() if len(curve.flops) for edge in (curve.flops[0], curve.flops[-1])]
    if not ends:
        return {"metric": metric, "budgets": [], "losses": {name: [] for name in logs}}
    low, high = min(ends), max(ends)
    budgets = np.geomspace(low, high, BUDGETS) if high > low else np.array([low])
    budgets[0], budgets[-1] = low, high  # not a rounding step outside
    return {
        "metric": metric,
        "budgets": budgets.tolist(),
        "losses": {name: [curve.at(budget) for budget in budgets] for name, curve in curves.items()},
        "ranges": {
            name: [float(curve.flops[0]), float(curve.flops[-1])] if len(curve.flops) else None
            for name, curve in curves.items()
        },
    }


def create_flops_normalized_loss(
    logs: Logs, metric: str | None = None, budget: float | None = None, *, strong: int = STRONG
) -> Figure:
    """Loss over cumulative FLOPs (logarithmic), with lines of equal loss and the compute at which each run reaches
    them. A `budget` [FLOPs] is drawn as a vertical line."""
    return figure_of(compute_curves(logs, metric, budget, strong))


def compute_curves(
    logs: Logs, metric: str | None = None, budget: float | None = None, strong: int = STRONG
) -> dict[str, Any]:
    metric = metric or compute_metric(logs)
    curves = {name: curve_of(log, metric) for name, log in logs.items()}
    about = words(metric).lower()
    data: list[dict[str, Any]] = []
    for name, style in styles([*logs], strong).items():
        curve = curves[name]
        if not len(curve.flops):
            continue
        shared = {
            "type": "scatter",
            "name": safe(name),
            "legendgroup": safe(name, 10**6),
            "opacity": FAINT if style.faint else 1,
        }
        finer = _between(curve.flops)
        line = {"mode": "lines", "x": finer, "y": np.interp(finer, curve.flops, curve.losses), "hoverinfo": "skip"}
        points = {"mode": "markers", "x": curve.flops, "y": curve.losses}
        points["marker"] = {"symbol": style.symbol, "size": 6 if len(curve.flops) < 60 else 3, "color": style.colour}
        points["hovertemplate"] = f"<b>{safe(name, 90)}</b><br>{about} %{{y:.5g}}<br>%{{x:.3e}} FLOPs<extra></extra>"
        data += [shared | line | {"line": {"color": style.colour, "width": 1.5}}, shared | points]
    unit = loss_unit(logs) if metric.endswith("/loss") else about
    described = layout(f"{words(metric)} over compute", unit, View("flops", True), logs, (metric,))
    described["shapes"] = []
    for level in iso_levels([curve.losses for curve in curves.values()]):
        described["shapes"].append(
            {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": level, "y1": level, "layer": "below"}
            | {"line": {"color": "rgba(128,128,128,0.6)", "width": 1, "dash": "dot"}}
        )
        data += _reached(level, about, curves, strong)
    if budget is not None:
        line = {"type": "line", "x0": budget, "x1": budget, "yref": "paper", "y0": 0, "y1": 1}
        described["shapes"].append(line | {"line": {"color": "#7d838c", "width": 1.5}})
    return {"data": legend_once(data), "layout": described}


def iso_levels(losses: Sequence[np.ndarray]) -> list[float]:
    """Round numbers between the lowest and the highest value of all."""
    values = np.concatenate(list(losses)) if losses else np.empty(0)
    if not values.size or values.max() <= values.min():
        return []
    raw = (values.max() - values.min()) / LEVELS
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw)
    first = math.ceil(values.min() / step)
    return [float(f"{place * step:.10g}") for place in range(first, math.floor(values.max() / step) + 1)]


def _between(flops: np.ndarray) -> np.ndarray:
    """The FLOPs of the measurements, and of points between them, evenly spaced in the logarithm."""
    if not 1 < len(flops) < 500:
        return flops
    logarithms = np.log(flops)
    finer = np.interp(np.arange((len(flops) - 1) * BETWEEN + 1) / BETWEEN, np.arange(len(flops)), logarithms)
    places = np.exp(finer)
    places[::BETWEEN] = flops
    return places


def _reached(level: float, about: str, curves: Mapping[str, Curve], strong: int) -> list[dict[str, Any]]:
    found = {name: place for name, curve in curves.items() if (place := curve.reaches(level)) is not None}
    if not found:
        return []
    least, seen = min(found.values()), styles([*curves], strong)
    texts = [
        f"<b>{safe(name, 90)}</b> reaches {about} {level:g} at {scientific(place)} FLOPs"
        + (f",<br>{place / least:.2f} times the least" if place > least else "")
        for name, place in found.items()
    ]
    colours = [seen[name].colour for name in found]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "x": [*found.values()],
            "y": [level] * len(found),
            "marker": {"symbol": "circle-open", "size": 11, "color": colours, "line": {"width": 1.5}},
            "opacity": 0.8,
            "text": texts,
            "hovertemplate": "%{text}<extra></extra>",
            "name": "",
        }
    ]
