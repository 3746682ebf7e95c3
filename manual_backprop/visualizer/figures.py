"""Curves of runs as plotly figures, for the page and for notebooks.

    logs = {"tiny": load_training_log("4f1c2a"), "small": load_training_log("91be03")}
    create_loss_curves(logs, x="flops", log_x=True, smoothing=50).show()

Each function takes logs by name, in the order of their colours, and the fields of `View`. The first STRONG runs are
drawn in full, the others faintly. Marks at the bottom show non-finite values, skipped steps and resumes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from ..common.errors import InputError
from ..tracking import TrainingLog
from .marks import marks
from .series import Points, View, points_of, reduced, series_of, smoothed
from .style import FAINT, LONGEST_HOVER, STRONG, Logs, Style, layout, loss_unit, safe, styles, words

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PALE = 0.6  # opacity of the training loss, which is noisy
NOISY = ("train/", "gradient_norm", "tokens_per_second", "peak_share", "system/", "inspect/")  # are smoothed
SINGLE = 60  # a line with at least so many points has no markers
ROUND = (1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(10, 100, 5), range(100, 1000, 10)  # ever finer ticks
UNDRAWN = ("validation/loss", "validation/perplexity", "validation/unigram_loss", "validation/bigram_loss")


def create_loss_curves(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Training loss as a line and validation loss with markers [nats per token, of a language model]."""
    return figure_of(loss_curves(logs, View(**view), strong))


def create_validation_curves(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Validation loss, with its perplexity exp(loss) on a second axis that always matches the first."""
    return figure_of(validation_curves(logs, View(**view), strong))


def create_lr_schedule_plot(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """The learning rate of each step."""
    return figure_of(metric_curves(logs, "learning_rate", View(**view), strong))


def create_throughput_plot(logs: Logs, *, strong: int = STRONG, **view: Any) -> Figure:
    """Tokens a second of training."""
    return figure_of(metric_curves(logs, "tokens_per_second", View(**view), strong))


def create_metric_plot(logs: Logs, metric: str, *, strong: int = STRONG, **view: Any) -> Figure:
    """Any metric that runs have logged, by its name: `gradient_norm`, `validation/exact_match`, ...

    Raises InputError with the existing metrics if no run has it.
    """
    if not any(series_of(log, metric) for log in logs.values()):
        there = sorted({name for log in logs.values() for name in (*log.training, *log.validation, *log.system)})
        raise InputError(f"{metric}: no run has logged it; there are: {', '.join(there) or 'no metrics at all'}")
    return figure_of(metric_curves(logs, metric, View(**view), strong))


def figure_of(figure: dict[str, Any]) -> Figure:
    from plotly.graph_objects import Figure

    return Figure(figure)


# The same as plain mappings, {"data": traces, "layout": ...}, which take a tenth of the time


def loss_curves(logs: Logs, view: View, strong: int = STRONG) -> dict[str, Any]:
    metrics = "train/loss", "validation/loss"
    data: list[dict[str, Any]] = []
    for name, style in styles([*logs], strong).items():
        data += curve(name, logs[name], "train/loss", view, style, about="training loss")
        data += curve(name, logs[name], "validation/loss", view, style, about="validation loss", markers=True)
        data += marks(name, logs[name], metrics, view, style, skipped=True)
    return {"data": legend_once(data), "layout": layout("Loss", loss_unit(logs), view, logs, metrics)}


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
            "matches": "y",  # one range for both axes: the loss is drawn, the second axis labels perplexities
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
    """About six round perplexities between two losses, by their loss."""
    low, high = min(low, 600.0), min(high, 600.0)
    pad = 0.1 * (high - low) + 1e-3
    for factors in ROUND:
        first, last = (math.floor(edge / math.log(10)) - 2 for edge in (low - pad, high + pad))
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


def task_metrics(logs: Logs) -> list[str]:
    """The metrics of tasks besides the loss, in the order in which runs have logged them."""
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
    """One metric of one run; with smoothing the raw curve is drawn faintly below the smoothed one."""
    key = "curve", metric, view, style, markers, perplexity, name
    if key in log.memo:
        return log.memo[key]
    points = points_of(log, metric, view.x)
    kinds = [(points, about, PALE if metric == "train/loss" else 1.0)]  # the validation loss is drawn over it
    if view.smoothing > 1 and metric.startswith(NOISY):
        finer = smoothed(log, metric, points, view.smoothing)
        kinds = [(points, about, 0.28), (finer, f"{about}, smoothed over {view.smoothing:g}", 1.0)]
    drawn = [(reduced(every, view), kind, opacity) for every, kind, opacity in kinds]
    traces = [
        _trace(name, shown, style, kind, opacity, markers, perplexity) for shown, kind, opacity in drawn if len(shown.x)
    ]
    if view.low is None and view.low_y is None:  # a zoomed part is not requested again
        log.memo[key] = traces
    return traces


def _trace(
    name: str, points: Points, style: Style, about: str, opacity: float, markers: bool, perplexity: bool
) -> dict[str, Any]:
    few = len(points.x) < (SINGLE * 10 if markers else 2)
    hover = [f"<b>{safe(name, LONGEST_HOVER)}</b>", f"{about} %{{y:.5g}}"]
    hover += ["perplexity %{customdata[1]:.4g}"] if perplexity else []
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
        "hovertemplate": "<br>".join([*hover, "step %{customdata[0]:,}<extra></extra>"]),
    }


def legend_once(data: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The traces, with each run only once in the legend, by its strongest trace."""
    best: dict[str, tuple[float, int]] = {}
    for place, trace in enumerate(data):
        group = trace.get("legendgroup")
        if group is not None:
            weight = trace.get("opacity", 0) + (trace["mode"] != "markers")
            best[group] = max(best.get(group, (-1.0, -1)), (weight, place))
    kept = {place for _, place in best.values()}
    return [trace | {"showlegend": place in kept} for place, trace in enumerate(data)]
