"""The picture of forecasts and true values, and of the error of each step of the horizon."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ...common.pictures import drawable, new_figure, picture, save_figure, with_grid
from ...data.series.reader import Series
from .baselines import Errors

FORECASTS = "forecasts.png"
MOST_SERIES = 4
MOST_FORECASTS = 24  # side by side
MOST_TICKS = 8


@picture
def draw_forecasts(
    series: Series, first: np.ndarray, forecasts: np.ndarray, errors: Mapping[str, Errors], path: Path, title: str
) -> None:
    """Write a PNG: each series with the forecasts (B, O, S) that begin at steps `first` (B,), and the error of each
    step of the horizon for each method."""
    horizon = forecasts.shape[1]
    shown = min(len(series.names), MOST_SERIES)
    figure = new_figure(11, 2.6 * shown + 3.2, dpi=110)
    lines = map(drawable, title.split("\n"))
    figure.suptitle("\n".join(lines), fontsize=10, parse_math=False)
    panels = figure.subplots(shown + 1, 1, squeeze=False)[:, 0]
    begin, end = max(int(first[0]) - horizon, 0), int(first[-1]) + horizon
    for place, axes in enumerate(panels[:shown]):
        axes.plot(np.arange(begin, end), series.values[begin:end, place], color="black", linewidth=1, label="truth")
        for row, one in enumerate(first):
            label = f"forecasts, {horizon} steps each" if row == 0 else None
            colour = f"C{row % 2}"
            axes.plot(one + np.arange(horizon), forecasts[row, :, place], color=colour, linewidth=1.4, label=label)
        ticks = np.unique(np.linspace(begin, end - 1, MOST_TICKS).astype(int))
        axes.set_xticks(ticks, [series.time_text(int(tick)) for tick in ticks], fontsize=8)
        axes.set_ylabel(drawable(series.names[place]), fontsize=9, parse_math=False)
        axes.legend(fontsize=8, frameon=False)
        with_grid(axes)
    for name, one in errors.items():
        panels[-1].plot(np.arange(1, horizon + 1), one.steps, label=f"{name}: {one.rmse:.4g}", marker=".")
    panels[-1].set_xlabel("steps ahead", fontsize=8)
    panels[-1].set_ylabel("RMSE", fontsize=9)
    panels[-1].set_ylim(bottom=0)
    panels[-1].legend(fontsize=8, frameon=False)
    with_grid(panels[-1])
    save_figure(figure, path)
