"""Measures what each optimization of the kernels gains: a step without one of them, compared with the whole step.

The ablations are those of `benchmark/ablations.py`, measured by the processes of the bench. `page` is docs/kernels.md,
which `python -m manual_backprop.tools.kernel_gains` writes.
"""

import datetime
import statistics
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .benchmark.ablations import OPTIMIZATIONS, WITHOUT, Optimization, work
from .benchmark.cases import SUBJECT, Case
from .benchmark.measurement import MeasuredRow, Measurement, measure

NONE_OF_THEM, RECOMPUTED = "custom-reference", "custom-recompute"  # rows of the bench
AT_ONCE = 6  # rows that take turns with the subject: each is a process, and all are in memory
WIDTH = 120

PAGE = Path(__file__).with_suffix(".md")  # the page, with a {name} for each generated part


@dataclass(frozen=True)
class Gain:
    """A row compared with the subject in the same turns. Bytes are None if the system does not report them."""

    time: tuple[float, float, float]  # row / subject, quartiles of the turns
    more_bytes: int | None  # row - subject


@dataclass(frozen=True)
class Gains:
    """The gains of one case: the rows of all groups, and the noise that a difference has to exceed."""

    case: Case
    subjects: list[MeasuredRow]  # two of each group
    gains: dict[str, Gain]  # by the name of the row
    noise: float  # of a ratio of times
    noise_bytes: int
    left_out: dict[str, str]  # rows that cannot run here, and why


def measure_gains(case: Case, optimizations: Sequence[str], rounds: int) -> Gains:
    """Measures every given optimization that applies to this case, and the two rows without an optimization of their
    own, in groups of at most AT_ONCE."""
    names = [WITHOUT + name for name in optimizations if OPTIMIZATIONS[name].applies(case)] + [NONE_OF_THEM, RECOMPUTED]
    count = -(-len(names) // AT_ONCE)
    return gains_of([measure(case, [SUBJECT, *names[place::count]], rounds, work) for place in range(count)])


def gains_of(groups: Sequence[Measurement]) -> Gains:
    gains = {
        row.name: Gain(group.time_ratio(row), _difference(row, group.subject))
        for group in groups
        for row in group.in_order[2:]
    }
    subjects = [row for group in groups for row in (group.subject, group.again)]
    peaks = [row.peak_bytes for row in subjects if row.peak_bytes is not None]
    noise = max(group.noise for group in groups)
    left_out = {name: reason for group in groups for name, reason in group.left_out.items()}
    return Gains(groups[0].case, subjects, gains, noise, max(peaks) - min(peaks) if peaks else 0, left_out)


def _difference(row: MeasuredRow, subject: MeasuredRow) -> int | None:
    if row.peak_bytes is None or subject.peak_bytes is None:
        return None
    return row.peak_bytes - subject.peak_bytes


# The page


def section(measured: Gains) -> str:
    """The section of a case: its description, the table, and the noise."""
    lines = ["| without | lives in | time, without / with | more MB |", "|---|---|--:|--:|"]
    milliseconds = 1e3 * statistics.median(time for row in measured.subjects for time in row.seconds)
    peaks = [row.peak_bytes for row in measured.subjects if row.peak_bytes is not None]
    peak = f"{statistics.median(peaks) / 1e6:.1f}" if peaks else "unknown"
    named = {WITHOUT + name: f"`{name}` | `{one.place}`" for name, one in OPTIMIZATIONS.items()} | {
        NONE_OF_THEM: "all of them: `kernels=reference` | `kernels/`",
        RECOMPUTED: "nothing, with `training.recompute=block` | `models/step.py`",
    }
    for name, label in named.items():
        if reason := measured.left_out.get(name):
            lines.append(f"| {label} | left out: {reason} | |")
        elif gain := measured.gains.get(name):
            low, middle, high = gain.time
            ratio = _judged(f"{middle:.2f} ({low:.2f} to {high:.2f})", abs(middle - 1) <= measured.noise)
            more = "unknown"
            if gain.more_bytes is not None:
                more = _judged(f"{gain.more_bytes / 1e6:+.1f}", abs(gain.more_bytes) <= measured.noise_bytes)
            lines.append(f"| {label} | {ratio} | {more} |")
    title = f"{measured.case.name or measured.case.config.architecture}, {measured.case.config.precision}"
    noise = (
        f"Noise floor: {measured.noise:.1%} of the time, {measured.noise_bytes / 1e6:.1f} MB "
        f"({len(measured.subjects)} processes of `{SUBJECT}`)."
    )
    subject = f"`{SUBJECT}`: {milliseconds:.4g} ms a step, peak {peak} MB."
    return "\n\n".join((f"## {title}", f"{measured.case.describe()}. {subject}", "\n".join(lines), noise))


def _judged(text: str, is_noise: bool) -> str:
    return f"*{text}*" if is_noise else text


def page(sections: Sequence[str], optimizations: Sequence[str], command: str, turns: int) -> str:
    from .benchmark.page import machine

    written = PAGE.read_text(encoding="utf-8").format(
        command=command,
        optimizations="\n\n".join(
            f"**`{name}`**{_pairs(OPTIMIZATIONS[name])}. {OPTIMIZATIONS[name].about}" for name in optimizations
        ),
        subject=SUBJECT,
        turns=turns,
        machine=f"Measured on {datetime.date.today()} with "
        + ", ".join(f"{name} {value}" for name, value in machine().items())
        + ".",
        sections="\n\n".join(sections),
    )
    return "\n\n".join(map(_filled, written.strip().split("\n\n"))) + "\n"


def _pairs(optimization: Optimization) -> str:
    names = " and ".join(f"`{pair}`" for pair in optimization.pairs)
    return f", the pair{'s' * (len(optimization.pairs) > 1)} {names}" if names else ""


def _filled(part: str) -> str:
    """A paragraph wrapped to WIDTH; tables, headings and commands are not changed."""
    return part if part.startswith(("|", "#", "```")) else textwrap.fill(part, WIDTH, break_on_hyphens=False)
