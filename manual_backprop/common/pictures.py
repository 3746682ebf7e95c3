"""Figures of matplotlib without pyplot, which has a global state and wants a display; saved whole or not at all."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from .durable_files import storage_errors, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, dpi: int = 90) -> Figure:
    """[inches]"""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def with_grid(axes: Axes, which: str = "both") -> None:
    """A pale grid in place of a frame. `which`: the axis that it is for, or both."""
    axes.grid(axis=which, alpha=0.25)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a PNG, or what else the file's name ends in. Raises StorageError."""
    content = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of letters that the font of the pictures lacks
        figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
