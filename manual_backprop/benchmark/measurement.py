"""All rows of a case in turns, each in a process of its own; and nothing is timed before their gradients agree."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from ..errors import CheckFailedError
from ..paired import MeasuringProcess, Row, noise_floor, ratios, turns
from .cases import OURS, Case
from .rows import LeftOut, Ready, work_products
from .rows import work as work_row

AGAIN = " again"  # behind the subject's name: it runs twice
FEWEST, MOST = 5, 20  # rounds, where the user does not say how many
LONGEST = 120.0  # [s] that a case's rounds may take, where the fewest do not take longer
AGREEMENT = {"fp64": 1e-9, "fp32": 1e-4, "bf16": 0.1, "bf16_mixed": 0.1}  # of loss and gradient, relative
NEGLIGIBLE = 1e-3  # a parameter with less than this share of the whole gradient is compared with that share: the key's
# bias has a gradient of 0, of which rounding errors are all that there is
WORST = 4.0  # times the bar that a single parameter may be off
ADVICE = "Was there too little memory? Try a smaller --batch-size, or fewer --rows."


@dataclass
class MeasuredRow(Row):
    """`seconds` of a step, by turns."""

    first_seconds: float = 0.0  # of the first forward and backward pass, with the compiler's cache as it then was
    cold_seconds: float | None = None  # likewise, where the cache was cold and the row was started again
    cache: str = "none"  # of the compiler, when the steps were measured, as in `rows.Ready`
    peak_bytes: int | None = None  # above what the imports took; None where the system does not tell


@dataclass
class Measurement:
    case: Case
    rows: dict[str, MeasuredRow]  # the subject comes first
    again: MeasuredRow  # the subject once more
    products: Row  # a step's matrix products alone
    left_out: dict[str, str] = field(default_factory=dict)  # rows that cannot be had here, and why

    @property
    def subject(self) -> MeasuredRow:
        return next(iter(self.rows.values()))

    @property
    def noise(self) -> float:
        return noise_floor(self.again.seconds, self.subject.seconds)

    @property
    def fastest_peer(self) -> MeasuredRow | None:
        peers = [row for name, row in self.rows.items() if name not in OURS]
        return min(peers, key=lambda row: self.time_ratio(row)[1], default=None)

    def time_ratio(self, row: Row) -> tuple[float, float, float]:
        """row / subject, quartiles of the turns."""
        return ratios(row.seconds, self.subject.seconds)

    def memory_ratio(self, row: MeasuredRow) -> float | None:
        """row / subject."""
        mine, its = row.peak_bytes, self.subject.peak_bytes
        return mine / its if mine and its else None

    def share_of_limit(self, row: Row) -> float:
        """The time of the products alone over that of the row, turn by turn."""
        return ratios(self.products.seconds, row.seconds)[1]


def measure(
    case: Case, names: Sequence[str], rounds: int | None = None, work: Callable[..., None] = work_row
) -> Measurement:
    """`names` of rows: the first is the subject. `rounds` of turns there and back, None: what the time allows.

    `work` is what a row's process runs, and knows what is behind a name: `rows.work`, or what is built upon it.
    Raises CheckFailedError where a process fails, or where gradients differ.
    """
    with ExitStack() as closing:
        processes: list[MeasuringProcess] = []
        rows: list[MeasuredRow] = []
        answers: dict[str, Ready] = {}
        left_out: dict[str, str] = {}
        for name in (names[0], names[0] + AGAIN, *names[1:]):
            print(f"{case.name or case.config.precision}: starting {name}", file=sys.stderr, flush=True)
            started = _start(closing, case, name, work)
            if isinstance(started, LeftOut):
                if name == names[0]:
                    raise CheckFailedError(f"{name}: {started.reason}")
                left_out[name] = started.reason
                continue
            process, row, answers[name] = started
            processes.append(process)
            rows.append(row)
        check_agreement(case.config.precision, answers)
        products = Row("products alone")
        limit = closing.enter_context(MeasuringProcess(work_products, case, advice=ADVICE))
        seconds = [answer.step_seconds for answer in answers.values()] + [limit.answer()]
        rounds = rounds or rounds_for(seconds)
        print(f"{case.name or case.config.precision}: {rounds} rounds", file=sys.stderr, flush=True)
        everything = [*zip(processes, rows, strict=True), (limit, products)]
        for order in turns(len(everything), 2 * rounds):
            for place in order:
                process, measured = everything[place]
                measured.seconds.append(process.ask("turn"))
        for process, row in zip(processes, rows, strict=True):
            row.peak_bytes = process.ask("peak")
    subject, again, *others = rows
    return Measurement(case, {row.name: row for row in (subject, *others)}, again, products, left_out)


def _start(
    closing: ExitStack, case: Case, name: str, work: Callable[..., None]
) -> tuple[MeasuringProcess, MeasuredRow, Ready] | LeftOut:
    """A row that has warmed up. With a cold compiler's cache it is started once more: neither the compiler's memory nor
    its time is the step's."""
    cold_seconds = None
    while True:
        process = MeasuringProcess(work, name.removesuffix(AGAIN), case, advice=ADVICE)
        with ExitStack() as this:
            this.enter_context(process)
            answer = process.answer()
            if isinstance(answer, LeftOut):
                return answer
            if answer.cache == "cold" and cold_seconds is None:
                cold_seconds = answer.first_seconds
                continue
            closing.push(this.pop_all())
        row = MeasuredRow(name, first_seconds=answer.first_seconds, cold_seconds=cold_seconds, cache=answer.cache)
        return process, row, answer


def rounds_for(step_seconds: Sequence[float]) -> int:
    """As many as LONGEST allows, at least FEWEST: a round is two turns of each row."""
    from .rows import TURN

    round_seconds = sum(2 * max(TURN, seconds) for seconds in step_seconds)
    return max(FEWEST, min(MOST, int(LONGEST / round_seconds)))


def check_agreement(precision: str, answers: Mapping[str, Ready]) -> None:
    """CheckFailedError unless all rows have the loss and the gradients of the first."""
    (subject, first), *others = answers.items()
    bar = AGREEMENT[precision]
    total = math.hypot(*(numbers[0] for numbers in first.sketch.values()))
    for name, answer in others:
        if not abs(answer.loss - first.loss) <= bar * abs(first.loss):
            raise _disagreement(name, subject, f"loss {answer.loss:.6g} against {first.loss:.6g}")
        if answer.sketch.keys() != first.sketch.keys():
            raise _disagreement(name, subject, "their parameters have different names")
        distances = {key: _distance(answer.sketch[key], first.sketch[key]) for key in first.sketch}
        shares = {"all parameters": (math.hypot(*distances.values()) / total, bar)} | {
            key: (distance / max(first.sketch[key][0], NEGLIGIBLE * total), WORST * bar)
            for key, distance in distances.items()
        }
        for key, (share, most) in shares.items():
            if not share <= most:
                how = f"gradient of {key}: off by {share:.2g} of its norm, at most {most:g}"
                raise _disagreement(name, subject, how)


def _distance(mine: Sequence[float], its: Sequence[float]) -> float:
    """Of two gradients, from their sketches: |g - h|, estimated."""
    differences = [one - other for one, other in zip(mine[1:], its[1:], strict=True)]
    return math.hypot(*differences) / math.sqrt(len(differences))


def _disagreement(name: str, subject: str, how: str) -> CheckFailedError:
    return CheckFailedError(f"{name} and {subject} disagree, so nothing was measured: {how}")
