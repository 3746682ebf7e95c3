"""The picture of a run: loss and accuracy over steps, in training and validation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..common.pictures import new_figure, picture, save_figure, with_grid
from ..tracking import TrainingLog

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINING, VALIDATION, SIMPLE = "#9ec5e8", "#1f4e79", "#b5651d"
SHARES = {"accuracy": ("accuracy", VALIDATION, "o"), "exact_match": ("exact match", "#2e7d32", "s")}


@picture
def draw_training_progress(log: TrainingLog, path: Path, title: str) -> None:
    """Writes a PNG: losses [nats per token] with those of the count-based models, and accuracies if there are any."""
    shares = [name for name in SHARES if log.validation.get(f"validation/{name}") is not None]
    figure = new_figure(12 if shares else 8, 4.8, dpi=120)
    figure.suptitle(title, fontsize=11, parse_math=False)
    panels = figure.subplots(1, 2 if shares else 1, squeeze=False)[0]
    _draw_losses(panels[0], log)
    if shares:
        _draw_shares(panels[1], log, shares)
    for axes in panels:
        axes.set_xlabel("optimizer steps")
        with_grid(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False)
    save_figure(figure, path)


def _draw_losses(axes: Axes, log: TrainingLog) -> None:
    if (training := log.training.get("train/loss")) is not None:
        axes.plot(training.steps, training.values, color=TRAINING, linewidth=1, label="training (one batch)")
    if (validation := log.validation.get("validation/loss")) is not None:
        axes.plot(validation.steps, validation.values, color=VALIDATION, marker="o", markersize=4, label="validation")
        _name_the_last(axes, validation.steps[-1], validation.values[-1], f"{validation.values[-1]:.3f}", VALIDATION)
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if (series := log.validation.get(f"validation/{name}_loss")) is not None:
            axes.axhline(series.values[-1], color=SIMPLE, linestyle=style, linewidth=1.2, label=f"{name} model")
    axes.set_ylabel("loss [nats per token]")


def _draw_shares(axes: Axes, log: TrainingLog, names: list[str]) -> None:
    for place, name in enumerate(names):
        series = log.validation[f"validation/{name}"]
        label, colour, marker = SHARES[name]
        axes.plot(series.steps, series.values, color=colour, marker=marker, markersize=4, label=label)
        _name_the_last(
            axes, series.steps[-1], series.values[-1], f"{series.values[-1]:.1%}", colour, below=14 * (place + 1)
        )
    axes.set_ylim(-0.02, 1.05)
    axes.set_ylabel("share that is right, in validation")


def _name_the_last(axes: Axes, step: float, value: float, text: str, colour: str, below: int = 14) -> None:
    axes.annotate(text, (step, value), xytext=(0, -below), textcoords="offset points", ha="right", color=colour)
