"""The style of pictures of runs: colours, names, axes, and notes about missing runs."""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..tracking import TrainingLog
from .series import AXES, View, points_of, series_of

Logs = Mapping[str, TrainingLog]

STRONG = 4  # runs drawn in full, unless more are asked for
LONGEST_NAME = 48  # in a picture; hovering shows all of it
LONGEST_HOVER = 90
# Distinguishable with any kind of colour vision (after Okabe and Ito 2008), on white and on black, and used with
# symbols.
COLOURS = ("#2f7fc1", "#e08a00", "#009e73", "#cc5f9f", "#56b4e9", "#d55e00", "#8c79d9", "#8a8f98")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
FAINT = 0.35  # opacity of a run that is not drawn in full
MARKS = "y9"  # an axis of its own for marks at the foot, from 0 to 1
# On a dark or a light page.
PLAIN: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"family": "system-ui, sans-serif", "size": 12, "color": "#7d838c"},
}
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


def words(metric: str) -> str:
    last = metric.removeprefix("validation/").removeprefix("train/").removeprefix("system/")
    return TITLES.get(metric) or last.replace("_", " ").capitalize()


def layout(title: str, unit: str, view: View, logs: Logs, metrics: Sequence[str]) -> dict[str, Any]:
    """A layout without a background, for a dark or a light page."""
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
    described: dict[str, Any] = PLAIN | {
        "title": {"text": title, "x": 0, "xref": "paper", "font": {"size": 14}, "y": 0.97, "yanchor": "top"},
        "xaxis": x_axis,
        "yaxis": y_axis,
        "yaxis9": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
        "margin": {"l": 60, "r": 20, "t": 40, "b": 48},
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
    """A note about runs that are not in the picture, with the reason."""
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
    return "nats per token" if texts and all(texts) else "loss"


def safe_part(name: str) -> str:
    return name if len(name) <= 24 else f"{name[:15]}…{name[-8:]}"


def safe(text: str, longest: int = LONGEST_NAME) -> str:
    """A name as plain text: plotly would interpret HTML tags, $ for formulas and %{...} for values."""
    if len(text) > longest:
        text = f"{text[: longest - 13]}…{text[-12:]}"
    return html.escape(text).replace("$", "&#36;").replace("%", "&#37;")
