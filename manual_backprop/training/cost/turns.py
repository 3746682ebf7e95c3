"""Measures in turns, A B A', A' B A, how much longer a training step takes with something (B), and with what noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ...study.paired_timing import Row, noise_floor, ratios, turns

if TYPE_CHECKING:
    from ..runner import Runner


def training(overrides: Sequence[str], outputs: Path) -> Runner:
    """A Runner that has not started, composed as by `run`. Raises InputError for bad overrides."""
    from ...common.interruption import Interruption
    from ..command_line import check
    from ..runner import Runner

    return Runner(check([*overrides]).jobs[0].config, outputs, Interruption())


def take_turns(
    names: Sequence[str], times: int, turn: Callable[[int], tuple[float, float]], warm_up: int = 1
) -> list[Row]:
    """The rows of `names`, measured in turns. `turn(place)` returns the wall-clock and processor seconds of a step of
    row `place`. The first `warm_up` turns do not count."""
    rows = [Row(name) for name in names]
    for number, order in enumerate(turns(len(rows), warm_up + times)):
        for place in order:
            seconds, processor = turn(place)
            if number >= warm_up:
                rows[place].seconds.append(seconds)
                rows[place].processor.append(processor)
    return rows


def table(title: str, rows: Sequence[Row]) -> str:
    """A table with one line per row, each compared with the first row."""
    first = rows[0]
    heads = "ms a step", f"time / {first.name}", "quartiles", f"processor time / {first.name}"
    lines = ["{:<16}{:>11}{:>21}{:>17}{:>31}".format(title, *heads)]
    for row in rows:
        low, middle, high = ratios(row.seconds, first.seconds)
        processor = ratios(row.processor, first.processor)[1]
        lines.append(
            f"{row.name:<16}{1e3 * row.median:>11.2f}{middle:>21.4f}{f'{low:.4f} - {high:.4f}':>17}{processor:>31.4f}"
        )
    return "\n".join(lines)


def verdict(what: str, rows: Sequence[Row], bar: float) -> tuple[bool, str]:
    """Whether the second row costs at most the share `bar` of the first row's time, and a sentence about it. The third
    row repeats the first."""
    without, with_it, again = rows
    cost = ratios(with_it.seconds, without.seconds)[1] - 1
    noise = noise_floor(again.seconds, without.seconds)
    passed = cost <= bar and noise <= bar
    words = "ok" if passed else "FAILED" if cost - noise > bar else "NOT SHOWN (a quieter machine is needed)"
    return passed, f"{words}: {what} costs {cost:+.2%} of a step, noise floor {noise:.2%}, bar {bar:.0%}"
