"""Curves of runs as plotly figures: what the page shows, and what a notebook draws.

    logs = {"tiny": load_training_log("4f1c2a"), "small": load_training_log("91be03")}
    create_loss_curves(logs, x="flops", log_x=True, smoothing=50).show()

Each takes logs by name, in the order of their colours, and the fields of `View`. The first STRONG runs are drawn in
full, the others faintly. What is not finite, was skipped or resumed is marked at the foot of the picture.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manual_backprop.common.errors import InputError
from manual_backprop.tracking import TrainingLog
from manual_backprop.visualizer.series import AXES, Points, View, points_of, reduced, series_of, smoothed

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Logs = Mapping[str, TrainingLog]

STRONG = 4  # runs drawn in full, unless more are asked for
LONGEST_NAME = 48  # in a picture; hovering shows all of it
LONGEST_HOVER = 90
# Told apart with any kind of colour vision (after Okabe and Ito 2008), on white and on black; with them go symbols.
COLOURS = ("#2f7fc1", "#e08a00", "#009e73", "#cc5f9f", "#56b4e9", "#d55e00", "#8c79d9", "#8a8f98")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
FAINT = 0.35  # opacity of a run that is not drawn in full
PALE = 0.6  # and of training loss, one batch a step
MARKS = "y9"  # an axis of its own for marks at the foot, from 0 to 1
NOISY = ("train/", "gradient_norm", "tokens_per_second", "peak_share", "system/", "inspect/")  # what smoothing is for
SINGLE = 60  # from so many points on a line has no markers
MOST_MARKS = 50  # of a run, in one picture
UNDRAWN = ("validation/loss", "validation/perplexity", "validation/unigram_loss", "validation/bigram_loss")
TITLES = {
    "train/loss": "Loss",
    "learning_rate": "Learning rate",
    "gradient_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "peak_share": "Share of peak",
    "validation/bits_per_byte": "Bits a byte",
}


@dataclass(frozen=True)
class Style:
    colour: str
    symbol: str
    faint: bool


def styles(names: Sequence[str], strong: int = STRONG) -> dict[str, Style]:
    return {
        name: Style(COLOURS[place % len(COLOURS)], SYMBOLS[place % len(SYMBOLS)], place >= strong)
        for place, name in enumerate(names)
    }


def create_loss_curves(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Training loss as a line and validation loss with markers [nats a token, of a language model]."""
    return figure_of(loss_curves(logs, View(**view), strong))


def create_validation_curves(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Validation loss, with its perplexity exp(loss) on a second axis that cannot part from the first."""
    return figure_of(validation_curves(logs, View(**view), strong))


def create_lr_schedule_plot(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """The learning rate of each step."""
    return figure_of(metric_curves(logs, "learning_rate", View(**view), strong))


def create_throughput_plot(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Tokens a second of training."""
    return figure_of(metric_curves(logs, "tokens_per_second", View(**view), strong))


def create_metric_plot(logs: Logs, metric: str, *, strong: int = STRONG, **view: Any) -> Figure:
    """Any metric that runs have logged, by its name: `gradient_norm`, `validation/exact_match`, ...

    Raises InputError where none of them has it, with what there is.
    """
    if not any(series_of(log, metric) for log in logs.values()):
        there = sorted({name for log in logs.values() for name in (*log.training, *log.validation, *log.system)})
        raise InputError(f"{metric}: no run has logged it; there are: {', '.join(there) or 'no metrics at all'}")
    return figure_of(metric_curves(logs, metric, View(**view), strong))


def figure_of(figure: dict[str, Any]) -> Figure:
    from plotly.graph_objects import Figure

    return Figure(figure)


# The same as plain mappings, {"data": traces, "layout": ...}, which are made in a tenth of the time


def loss_curves(logs: Logs, view: View, strong: int = STRONG) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for name, style in styles([*logs], strong).items():
        data += curve(name, logs[name], "train/loss", view, style, about="training loss")
        data += curve(name, logs[name], "validation/loss", view, style, about="validation loss", markers=True)
        data += marks(name, logs[name], ("train/loss", "validation/loss"), view, style, skipped=True)
    return {
        "data": legend_once(data),
        "layout": layout("Loss", loss_unit(logs), view, logs, ("train/loss", "validation/loss")),
    }


def validation_curves(logs: Logs, view: View, strong: int = STRONG) -> dict[str, Any]:
    metric, data = "validation/loss", []
    for name, style in styles([*logs], strong).items():
        data += curve(name, logs[name], metric, view, style, about="loss", markers=True, perplexity=True)
        data += marks(name, logs[name], (metric,), view, style)
    described = layout("Validation loss and perplexity", loss_unit(logs), view, logs, (metric,))
    if any(series_of(log, "validation/perplexity") for log in logs.values()):
        values = [one["y"] for one in data if one.get("mode") != "markers" and len(one["y"])]
        joined = np.concatenate(values) if values else np.empty(0)
        low, high = (view.low_y, view.high_y) if view.low_y is not None else (None, None)
        if joined.size and (low is None or high is None):
            low, high = float(joined.min()), float(joined.max())
        ticks = perplexity_ticks(low, high) if low is not None and high is not None else {}
        described["yaxis2"] = {
            "title": {"text": "perplexity"},
            "overlaying": "y",
            "side": "right",
            "matches": "y",  # one range for both: loss is what is drawn, and perplexity how it is labelled
            "type": "log" if view.log_y else "linear",
            "tickvals": list(ticks),
            "ticktext": list(ticks.values()),
            "showgrid": False,
            "zeroline": False,
        }
        described["margin"]["r"] = 64
        data.append({"x": [None], "y": [None], "yaxis": "y2", "hoverinfo": "skip", "showlegend": False, "name": ""})
    return {"data": legend_once(data), "layout": described}


def perplexity_ticks(low: float, high: float) -> dict[float, str]:
    """Round perplexities between two losses, by the loss at which they stand; some six of them."""
    low, high = min(low, 600.0), min(high, 600.0)
    pad = 0.1 * (high - low) + 1e-3
    for factors in (
        (1,),
        (1, 3),
        (1, 2, 5),
        (1, 1.5, 2, 3, 5, 7),
        tuple(range(10, 100, 5)),
        tuple(range(100, 1000, 10)),
    ):
        first, last = (math.floor((edge) / math.log(10)) - 2 for edge in (low - pad, high + pad))
        found = {
            math.log(value): f"{value:,.4g}"
            for exponent in range(first, last + 3)
            for factor in factors
            if (value := factor * 10.0**exponent) >= 1 and low - pad <= math.log(value) <= high + pad
        }
        if len(found) >= 4:
            break
    thinned = sorted(found)[:: max(1, len(found) // 7)]
    return {place: found[place] for place in thinned}


def metric_curves(logs: Logs, metric: str, view: View, strong: int = STRONG) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for name, style in styles([*logs], strong).items():
        measured = metric.startswith(("validation/", "evaluation/"))
        data += curve(name, logs[name], metric, view, style, about=words(metric).lower(), markers=measured)
        data += marks(name, logs[name], (metric,), view, style)
    return {"data": legend_once(data), "layout": layout(words(metric), "", view, logs, (metric,))}


def words(metric: str) -> str:
    last = metric.removeprefix("validation/").removeprefix("train/").removeprefix("system/")
    return TITLES.get(metric) or last.replace("_", " ").capitalize()


def task_metrics(logs: Logs) -> list[str]:
    """What tasks measure beside the loss, in the order in which runs have logged it."""
    found = [name for log in logs.values() for name in log.validation if name not in UNDRAWN]
    return list(dict.fromkeys(found))


def curve(
    name: str,
    log: TrainingLog,
    metric: str,
    view: View,
    style: Style,
    about: str,
    markers: bool = False,
    perplexity: bool = False,
) -> list[dict[str, Any]]:
    """One metric of one run; with smoothing the raw curve stays, faintly, below the smoothed one."""
    key = "curve", metric, view, style, markers, perplexity, name
    if key not in log.memo:
        log.memo[key] = _curve(name, log, metric, view, style, about, markers, perplexity)
    return [dict(trace) for trace in log.memo[key]]


def _curve(
    name: str, log: TrainingLog, metric: str, view: View, style: Style, about: str, markers: bool, perplexity: bool
) -> list[dict[str, Any]]:
    points = points_of(log, metric, view.x)
    smooth = view.smoothing > 1 and metric.startswith(NOISY)
    kinds = [(points, "", PALE if metric == "train/loss" else 1.0)]  # validation lies over it
    if smooth:
        finer = smoothed(log, metric, points, view.smoothing)
        kinds = [(points, "", 0.28), (finer, f", smoothed over {view.smoothing:g}", 1.0)]
    traces = []
    for all_points, kind, opacity in kinds:
        shown = reduced(all_points, view)
        if len(shown.x):
            traces.append(_trace(name, shown, style, f"{about}{kind}", opacity, markers, perplexity))
    return traces


def _trace(
    name: str, points: Points, style: Style, about: str, opacity: float, markers: bool, perplexity: bool
) -> dict[str, Any]:
    few = len(points.x) < (SINGLE * 10 if markers else 2)
    extra = ["perplexity %{customdata[1]:.4g}"] if perplexity else []
    columns = [points.steps.astype(float)] + ([np.exp(np.minimum(points.y, 700))] if perplexity else [])
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "x": points.x,
        "y": points.y,
        "customdata": np.stack(columns, axis=1),
        "name": safe(name),
        "legendgroup": safe(name, 10**6),
        "opacity": opacity * (FAINT if style.faint else 1),
        "line": {"color": style.colour, "width": 1 if style.faint or not markers else 2},
        "marker": {"symbol": style.symbol, "size": 6 if len(points.x) < SINGLE else 4, "color": style.colour},
        "hovertemplate": "<br>".join(
            [
                f"<b>{safe(name, LONGEST_HOVER)}</b>",
                f"{about} %{{y:.5g}}",
                *extra,
                "step %{customdata[0]:,}<extra></extra>",
            ]
        ),
    }


def legend_once(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each run stands once in the legend, by its strongest trace."""
    best: dict[str, tuple[float, int]] = {}
    for place, trace in enumerate(data):
        group = trace.get("legendgroup")
        if group is not None:
            weight = trace.get("opacity", 0) + (trace["mode"] != "markers")
            best[group] = max(best.get(group, (-1.0, -1)), (weight, place))
    kept = {place for _, place in best.values()}
    return [trace | {"showlegend": place in kept} for place, trace in enumerate(data)]


# Marks: what a curve does not show


def marks(
    name: str, log: TrainingLog, metrics: Sequence[str], view: View, style: Style, skipped: bool = False
) -> list[dict[str, Any]]:
    """At the foot: values that are not finite, steps that were skipped, and where a resume went on."""
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
    """Rows in a row are one mark."""
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
    return [
        (
            float(counts.x[place]),
            "line-ns",
            f"{grown[place]:.0f} skipped, not finite, up to step {counts.steps[place]:,}",
        )
        for place in np.flatnonzero(grown > 0)
    ]


def _resumes(log: TrainingLog, x: str) -> list[tuple[float, str, str]]:
    """Where the first row after it stands that the run has."""
    metric = "train/loss" if "train/loss" in log.training else next(iter(log.training or log.validation), "")
    points, found = points_of(log, metric, x), []
    for step in log.resumes:
        place = int(np.searchsorted(points.steps, step, side="right"))
        if len(points.x):
            at = points.x[min(place, len(points.x) - 1)]
            found.append((float(at), "triangle-up-open", f"resumed after step {step:,}"))
    return found


# Layout


def layout(title: str, unit: str, view: View, logs: Logs, metrics: Sequence[str]) -> dict[str, Any]:
    """Quiet, without a background: it lies on the page's own, dark or light."""
    grid = {"gridcolor": "rgba(128,128,128,0.18)", "zeroline": False, "linecolor": "rgba(128,128,128,0.5)"}
    x_axis = grid | {"title": {"text": AXES[view.x]}, "type": "log" if view.log_x else "linear", "showline": True}
    y_axis = grid | {"title": {"text": unit}, "type": "log" if view.log_y else "linear"}
    for axis in (x_axis, y_axis):
        if axis["type"] == "log":
            axis["exponentformat"] = "power"
    if view.x in ("flops", "tokens"):
        x_axis["exponentformat"] = "power" if view.x == "flops" else "SI"
    if view.low is not None and view.high is not None:
        edges = [view.low, view.high]
        x_axis["range"] = [math.log10(max(edge, 1e-300)) for edge in edges] if view.log_x else edges
    described: dict[str, Any] = {
        "title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 14}, "y": 0.97, "yanchor": "top"},
        "xaxis": x_axis,
        "yaxis": y_axis,
        "yaxis9": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7d838c"},
        "hovermode": "closest",
        "hoverlabel": {"align": "left", "namelength": -1},
        "legend": {"orientation": "h", "y": -0.22, "x": 0},
        "uirevision": f"{view.x} {view.log_x} {view.log_y}",
    }
    if note := _note(view, logs, metrics):
        described["annotations"] = [
            {"text": note, "xref": "paper", "yref": "paper", "x": 1, "y": 1, "xanchor": "right", "yanchor": "bottom"}
            | {"showarrow": False, "font": {"size": 11}}
        ]
    return described


def _note(view: View, logs: Logs, metrics: Sequence[str]) -> str:
    """Which runs are not in the picture, and why."""
    absent, unplaced = [], []
    for name, log in logs.items():
        there = [metric for metric in metrics if (one := series_of(log, metric)) is not None and one.steps]
        if not there:
            absent.append(name)
        elif not any(len(points_of(log, metric, view.x).x) for metric in there):
            unplaced.append(name)
    parts = []
    for some, why in ((absent, "nothing logged"), (unplaced, f"no {AXES[view.x]} logged")):
        if some:
            parts.append(f"{safe(', '.join(safe_part(name) for name in some[:3]))}{' ...' * (len(some) > 3)}: {why}")
    return "; ".join(parts)


def loss_unit(logs: Logs) -> str:
    texts = [isinstance(log.config.get("tokenizer"), dict) for log in logs.values()]
    return "nats a token" if texts and all(texts) else "loss"


def safe_part(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:15]}…{name[-8:]}"


def safe(text: str, longest: int = LONGEST_NAME) -> str:
    """A name as text: plotly reads HTML's tags, $ for formulas and %{...} for values in what it is given."""
    if len(text) > longest:
        text = f"{text[: longest - 13]}…{text[-12:]}"
    return html.escape(text).replace("$", "&#36;").replace("%", "&#37;")
