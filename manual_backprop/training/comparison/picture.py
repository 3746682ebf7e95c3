"""The picture of several runs: their final losses, or what else ranks them, over a swept number; or else their curves.

If the runs differ only in settings that must not change the result, the differences are drawn below the curves.
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from manual_backprop.common.pictures import new_figure, picture, save_figure, with_grid
from manual_backprop.training.comparison.runs import LOSS, LOSSES, Compared, Metric, in_words, should_coincide, spreads

MOST_TICKS = 8  # with more values, not every value gets a tick
MOST_LINES = 10
LOGARITHMIC = 8  # ratio of largest to smallest value from which an axis is logarithmic


@picture
def draw_comparison(runs: Sequence[Compared], path: Path, title: str) -> None:
    """Writes a PNG. Losses in nats per token. Raises StorageError."""
    number, coincide = swept_number(runs), should_coincide(runs)
    figure = new_figure(8, 6.6 if coincide else 4.8)
    if coincide:
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
        _draw_curves(upper, runs)
        _draw_differences(lower, runs)
    elif number is not None:
        _draw_over(figure.subplots(), runs, number)
    else:
        _draw_curves(figure.subplots(), runs)
    for axes in figure.axes:
        with_grid(axes)
        if number is None or coincide:
            axes.legend(frameon=False, fontsize=9)
        else:  # curves may fill every corner
            figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.axes[-1].set_xlabel(number if number is not None and not coincide else "optimizer steps")
    figure.axes[0].set_title(title, fontsize=11)
    save_figure(figure, path)


def adds_to_curves(runs: Sequence[Compared]) -> bool:
    """Whether this picture shows more than the curves of a sweep."""
    return should_coincide(runs) or swept_number(runs) is not None


def swept_number(runs: Sequence[Compared]) -> str | None:
    """The key with the most values: at least three, all numbers. A seed does not count."""
    values: dict[str, set[Any]] = {}
    for run in runs:
        for name, value in run.settings.items():
            values.setdefault(name, set()).add(value)
    numbers = {
        name: len(found)
        for name, found in values.items()
        if name != "seed" and len(found) >= 3 and all(isinstance(value, int | float) for value in found)
    }
    return max(numbers, key=numbers.__getitem__) if numbers else None


def _draw_over(axes: Axes, runs: Sequence[Compared], number: str) -> None:
    lines: dict[str, list[Compared]] = {}
    for run in runs:
        others = {name: value for name, value in run.settings.items() if name != number}
        lines.setdefault(in_words(others) or "all runs", []).append(run)
    scattered = len(lines) > MOST_LINES  # a search: hardly any two runs differ in this number only
    if scattered:
        lines = {"all runs": list(runs)}
    metric = Metric.shared(run.main_metric for run in runs)
    ceiling = _ceiling(runs) if metric.name == LOSS else math.inf
    values = {run.log.path: value for run in runs if (value := run.last(metric)) is not None and value < ceiling}
    worst = (min if metric.highest_is_best else max)(values.values(), default=1.0)
    for label, line in lines.items():
        ended = sorted((run.settings[number], values[run.log.path]) for run in line if run.log.path in values)
        lost = [(run.settings[number], worst) for run in line if run.log.path not in values]
        (drawn,) = axes.plot(
            *_columns(ended), linestyle="" if scattered else "-", marker="o", markersize=5, label=label
        )
        axes.plot(*_columns(lost), linestyle="", marker="x", markersize=9, color=drawn.get_color())
    swept = sorted({run.settings[number] for run in runs})
    if swept[0] > 0 and swept[-1] / swept[0] >= LOGARITHMIC:
        axes.set_xscale("log")
    if len(swept) <= MOST_TICKS:
        axes.set_xticks(swept, [f"{value:g}" for value in swept])
        axes.minorticks_off()
    unit, above = (" [nats per token]", ", or above the first loss") if metric.name == LOSS else ("", "")
    marked = f"\nx: not finished{above}" if any(run.log.path not in values for run in runs) else ""
    axes.set_ylabel(f"final {metric.title}{unit}{marked}")


def _ceiling(runs: Sequence[Compared]) -> float:
    """About the first loss of the runs: the axis ends there, so that a diverged run leaves room for the others.
    Infinite if unknown."""
    first = [run.log.training["train/loss"].values[0] for run in runs if "train/loss" in run.log.training]
    return statistics.median(first) if first else math.inf


def _draw_curves(axes: Axes, runs: Sequence[Compared]) -> None:
    coincide = should_coincide(runs)
    for order, run in enumerate(runs):
        below = coincide and order == 0  # drawn wider, to be visible below the curves that cover it
        curves = [{**run.log.training, **run.log.validation}.get(metric) for metric in LOSSES]
        training, validation = [([], []) if curve is None else (curve.steps, curve.values) for curve in curves]
        (line,) = axes.plot(*training, linewidth=3 if below else 1, alpha=0.4)
        axes.plot(
            *validation,
            marker="o",
            markersize=9 if below else 4,
            fillstyle="none" if below else "full",
            linewidth=1,
            color=line.get_color(),
            label=run.label,
        )
    axes.set_ylabel("loss [nats per token]\npale: training, marked: validation")


def _draw_differences(axes: Axes, runs: Sequence[Compared]) -> None:
    for metric, marker in zip(LOSSES, (".", "o"), strict=True):
        by_step = spreads([run.log for run in runs], metric)
        parted = [(step, value) for step, value in by_step.items() if 0 < value < math.inf]
        equal = sum(value == 0 for value in by_step.values())
        label = f"{metric}: {equal} of {len(by_step)} equal in every bit"
        axes.plot(*_columns(parted), linestyle="", marker=marker, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_ylabel("largest difference\n[nats per token]")


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]
