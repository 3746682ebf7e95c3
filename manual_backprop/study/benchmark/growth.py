"""How a step's time grows with the sequence length, and its memory with the batch size, for us and the peers.

Each point is a complete measurement.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...common.pictures import new_figure, picture, save_figure, with_grid
from .cases import OURS, Case
from .measurement import Measurement, measure
from .page import WIDTH, as_json

LENGTHS = (64, 128, 256, 512, 1024, 2048)  # T, at a batch of SEQUENCES
SEQUENCES = 2
BATCH_SIZES = (1, 2, 4, 8, 16, 32)  # B, at the case's own T


def over_length(case: Case) -> list[Case]:
    points = [replace(case, config=replace(case.config, max_seq_len=length)) for length in LENGTHS]
    return [replace(point, batch_size=SEQUENCES, name=f"T={point.config.max_seq_len}", bar=None) for point in points]


def over_batch_size(case: Case) -> list[Case]:
    return [replace(case, batch_size=size, name=f"B={size}", bar=None) for size in BATCH_SIZES]


def grow(cases: Sequence[Case], names: Sequence[str], rounds: int | None, picture: Path | None) -> dict[str, Any]:
    """Measures, prints and draws every case. Returns the data for the JSON."""
    found = []
    for case in cases:
        lengths = [measure(point, names, rounds) for point in over_length(case)]
        sizes = [measure(point, names, rounds) for point in over_batch_size(case)]
        print(case.describe(), "", table(lengths, sizes), "", sep="\n", flush=True)
        found.append((case, lengths, sizes))
    if picture is not None:
        draw(found, picture)
    return {
        "growth": [
            {"over_length": list(map(as_json, lengths)), "over_batch_size": list(map(as_json, sizes))}
            for _, lengths, sizes in found
        ]
    }


def times(points: Sequence[Measurement], name: str) -> list[float | None]:
    """The times of a row [ms a step]; None if it was left out."""
    return [1e3 * point.rows[name].median if name in point.rows else None for point in points]


def peaks(points: Sequence[Measurement], name: str) -> list[float | None]:
    """The peak memory of a row [MB]; None if it was left out or the system does not report it."""
    sizes = [point.rows[name].peak_bytes if name in point.rows else None for point in points]
    return [None if size is None else size / 1e6 for size in sizes]


def _lines(values: list[float | None]) -> str:
    return "".join("         -" if value is None else f"{value:>10.4g}" for value in values)


def table(lengths: Sequence[Measurement], sizes: Sequence[Measurement]) -> str:
    """Both curves of every row, and below each curve the ratio of the best peer to ours."""
    lines = []
    for title, points, curve in (("ms a step", lengths, times), ("peak MB", sizes, peaks)):
        names = list(dict.fromkeys(name for point in points for name in point.rows))
        lines.append(f"{title:<{WIDTH}}" + "".join(f"{point.case.name:>10}" for point in points))
        lines += [f"{name:<{WIDTH}}" + _lines(curve(points, name)) for name in names]
        ours = curve(points, names[0])
        columns = zip(*(curve(points, name) for name in names if name not in OURS), strict=True)
        best = [min((value for value in column if value is not None), default=None) for column in columns]
        if best:
            quotients = [peer / mine if peer and mine else None for peer, mine in zip(best, ours, strict=True)]
            lines.append(f"{'best peer / ours':<{WIDTH}}" + _lines(quotients))
        lines.append("")
    return "\n".join(lines[:-1])


@picture
def draw(found: Sequence[tuple[Case, list[Measurement], list[Measurement]]], path: Path) -> None:
    """Writes a PNG: for each case time over T and memory over B, both on logarithmic axes. Raises StorageError."""
    figure = new_figure(10, 4.2 * len(found))
    grid = figure.subplots(len(found), 2, squeeze=False)
    for (case, lengths, sizes), (left, right) in zip(found, grid, strict=True):
        length_ticks = [point.case.config.max_seq_len for point in lengths]
        size_ticks = [point.case.batch_size for point in sizes]
        for name in lengths[0].rows:
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "linewidth": 2.5 if name in OURS else 1.2}
            left.plot(length_ticks, times(lengths, name), label=name, **style)
            right.plot(size_ticks, peaks(sizes, name), label=name, **style)
        left.set(xlabel=f"T, sequence length (B={SEQUENCES})", ylabel="ms a step")
        right.set(xlabel=f"B, batch size (T={case.config.max_seq_len})", ylabel="peak memory [MB]")
        left.set_title(case.describe(), fontsize=8, loc="left")
        left.legend(frameon=False, fontsize=8)
        for axes, ticks in ((left, length_ticks), (right, size_ticks)):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            with_grid(axes)
    save_figure(figure, path)
