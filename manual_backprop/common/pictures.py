"""Matplotlib figures without pyplot, which has global state and needs a display. A picture is saved whole or not at
all."""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec

from .durable_files import storage_errors, write_atomically
from .errors import ManualBackpropError, first_line
from .plain_text import visible

LONGEST_LINE = 160  # [characters] of a text in a picture: a longer one leaves no room for the plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

log = logging.getLogger(__name__)
_failed: set[str] = set()  # pictures for which a warning has been logged


def picture(draw: Callable[P, bool | None]) -> Callable[P, bool]:
    """Decorator of a function that draws and saves a picture. It returns whether the picture was saved.

    The function draws with matplotlib's default settings, not the user's. An unexpected exception is logged as one
    warning, and the run continues; a ManualBackpropError, such as a full disk, is raised.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **named: P.kwargs) -> bool:
        try:
            from .startup.agg import matplotlib

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about glyphs that the font lacks and deprecated settings
                usual = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
                with matplotlib.rc_context(usual):
                    return draw(*args, **named) is not False
        except ManualBackpropError:
            raise
        except Exception as error:
            about = (draw.__doc__ or draw.__name__).partition("\n")[0]
            if about not in _failed:
                _failed.add(about)
                log.warning(
                    "a picture cannot be drawn and is left out (%s: %s)", type(error).__name__, first_line(error)
                )
            return False

    return drawn


def new_figure(width: float, height: float, dpi: int = 90) -> Figure:
    """An empty figure of this size [inches]."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def drawable(text: str) -> str:
    """The text, with each character that matplotlib's font lacks replaced by its code point in hexadecimal."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    known = get_font(findfont(FontProperties())).get_charmap()
    return "".join(letter if ord(letter) in known else f"{ord(letter):X}" for letter in text)


def with_grid(axes: Axes, which: str = "both") -> None:
    """Draw a pale grid instead of the top and right frame. `which`: "x", "y" or "both"."""
    axes.grid(axis=which, alpha=0.25)  # type: ignore[arg-type]
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a PNG, or the format that the file name's suffix names. Raises StorageError."""
    content = io.BytesIO()
    _disable_math_text(figure)
    if (layout := figure.get_layout_engine()) is not None:  # savefig would draw everything once more for the layout
        layout.execute(figure)
        figure.set_layout_engine("none")
    figure.savefig(content, format=path.suffix.removeprefix(".") or "png")
    with storage_errors(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _disable_math_text(figure: Figure) -> None:
    """Show `$` literally and shorten long lines: the texts hold names of runs and files, not formulas. Only tick labels
    of a logarithmic axis stay formulas; matplotlib makes these itself."""
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatter

    formulas = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatter):
                formulas |= {*axis.get_ticklabels(), *axis.get_ticklabels(minor=True)}
            else:
                axis.get_ticklabels()  # creates them now, so that findobj below sees them
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        if text not in formulas:
            text.set_parse_math(False)
            text.set_text("\n".join(map(_short, text.get_text().split("\n"))))


def _short(line: str) -> str:
    line = visible(line)
    return line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE - 3]}..."
