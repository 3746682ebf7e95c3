"""The picture of a run: training and validation loss over steps, beside what counting models reach."""

from __future__ import annotations

from pathlib import Path

from ..common.pictures import new_figure, picture, save_figure, with_grid
from . import TrainingLog


@picture
def draw_loss_curves(log: TrainingLog, path: Path, title: str) -> None:
    """Writes a PNG. Losses in nats a token."""
    figure = new_figure(8, 4.8, dpi=120)
    axes = figure.subplots()
    if (training := log.training.get("train/loss")) is not None:
        axes.plot(training.steps, training.values, color="#9ec5e8", linewidth=1, label="training (one batch)")
    if (validation := log.validation.get("validation/loss")) is not None:
        axes.plot(validation.steps, validation.values, color="#1f4e79", marker="o", markersize=4, label="validation")
        axes.annotate(
            f"{validation.values[-1]:.3f}",
            (validation.steps[-1], validation.values[-1]),
            xytext=(0, -14),
            textcoords="offset points",
            ha="right",
            color="#1f4e79",
        )
    for name, style in (("unigram", ":"), ("bigram", "--")):
        if (series := log.validation.get(f"validation/{name}_loss")) is not None:
            axes.axhline(series.values[-1], color="#b5651d", linestyle=style, linewidth=1.2, label=f"{name} model")
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel("loss [nats a token]")
    axes.set_title(title, fontsize=11)
    with_grid(axes)
    axes.legend(frameon=False)
    save_figure(figure, path)
