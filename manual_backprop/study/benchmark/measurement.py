"""Measures all rows of a case in turns, each in its own process. Nothing is timed before their gradients agree."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial

from ...common.errors import CheckFailedError
from ..paired_timing import MeasuringProcess, NotInTime, Row, noise_floor, ratios, turns
from .cases import GRAPHS, OURS, ROWS, Case, without_effect
from .rows import Answer, LeftOut, Ready, work_answer, work_products
from .rows import work as work_row

PEERS = [name for name in ROWS if name not in OURS]
AGAIN = " again"  # after the subject's name: it runs twice
FEWEST, MOST = 5, 20  # rounds, if the user does not give a number
WARMING_UP = 0.7  # largest share of a measurement's time; a row that takes longer to warm up is left out
LONGEST = 120.0  # [s] that a case's rounds may take, unless the fewest rounds take longer
AGREEMENT = {
    "fp64": 1e-9,
    "fp32": 1e-4,
    "tf32": 0.05,
    "bf16": 0.1,
    "bf16_mixed": 0.1,
    "fp16_mixed": 0.05,
}  # of loss and gradient, relative
NEGLIGIBLE = 1e-3  # errors of a parameter are relative to at least this share of the whole gradient, since the key's
# bias, for example, has a gradient of 0 and only rounding errors
WORST = 4.0  # a single parameter may be off by so many times the bar
REDUCED = (
    "tf32",
    "bf16",
    "bf16_mixed",
    "fp16_mixed",
)  # there rows are compared with autograd in fp32, since their rounding errors differ
ADVICE = "Was there too little memory? Try a smaller --batch-size, or fewer --rows."


@dataclass
class MeasuredRow(Row):
    """A row with the seconds of a step for each turn, and its memory."""

    first_seconds: float = 0.0  # of the first forward and backward pass, with the compiler's cache in its current state
    cold_seconds: float | None = None  # the same, if the cache was cold and the row was restarted
    cache: str = "none"  # state of the compiler's cache during the measurement, as in `rows.Ready`
    products: str = "unknown"  # the library of its matrix products, as in `rows.Ready`
    peak_bytes: int | None = None  # without the memory of imports; None if the system does not report it


@dataclass
class Measurement:
    case: Case
    rows: dict[str, MeasuredRow]  # the subject comes first
    again: MeasuredRow  # the subject, measured a second time
    products: Row  # a step's matrix products alone
    left_out: dict[str, str] = field(default_factory=dict)  # rows that cannot run here, and why
    remarks: list[str] = field(default_factory=list)  # on gradients of peers

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
        """row / subject, quartiles over the turns."""
        return ratios(row.seconds, self.subject.seconds)

    def memory_ratio(self, row: MeasuredRow) -> float | None:
        """row / subject."""
        mine, its = row.peak_bytes, self.subject.peak_bytes
        return mine / its if mine and its else None

    def share_of_limit(self, row: Row) -> float:
        """The time of the matrix products alone divided by that of the row; median over the turns."""
        return ratios(self.products.seconds, row.seconds)[1]


def measure(
    case: Case,
    names: Sequence[str],
    rounds: int | None = None,
    work: Callable[..., None] = work_row,
    at_once: bool = False,
    until: float | None = None,
) -> Measurement:
    """Measures rows. The first of `names` is the subject. A round is a turn of each row in order and one in reverse;
    `rounds` None: as many as the time allows.

    `work` runs in the process of a row and knows its name: `rows.work`, or a function that calls it. `at_once`: all
    rows warm up together, and their gradients are compared only with each other. `until`: the deadline by
    time.monotonic(); if necessary there are fewer rounds.
    Raises CheckFailedError if a process fails, or if gradients differ.
    """
    true = None if at_once else measure_of(case)  # before other processes start: it may need the most memory
    with ExitStack() as closing:
        processes: list[MeasuringProcess] = []
        rows: list[MeasuredRow] = []
        answers: dict[str, Ready] = {}
        left_out: dict[str, str] = {}
        wanted = [names[0], names[0] + AGAIN, *names[1:]]
        left_out |= {name: reason for name in wanted if (reason := without_effect(name, case))}
        ready_by = until and time.monotonic() + WARMING_UP * (until - time.monotonic())
        start = partial(_start, case=case, work=work, until=ready_by)
        begun = {name: start(name) for name in wanted if at_once and name not in left_out}
        for process in begun.values():
            closing.enter_context(process)
        for name in wanted:
            if name in left_out:
                continue
            print(f"{case.name or case.config.precision}: starting {name}", file=sys.stderr, flush=True)
            try:
                started = _warm_up(closing, name, begun.get(name), start, restarts=not at_once)
            except NotInTime:
                started = LeftOut("it had not warmed up in the given time")
                if name in begun:
                    begun[name].process.terminate()  # otherwise its end would be waited for
            if isinstance(started, LeftOut):
                if name in wanted[:2]:
                    raise CheckFailedError(f"{name}: {started.reason}")
                left_out[name] = started.reason
                continue
            process, row, answers[name] = started
            process.until = until
            processes.append(process)
            rows.append(row)
        remarks = check_agreement(case.config.precision, answers, true)
        products = Row("products alone")
        limit = closing.enter_context(MeasuringProcess(work_products, case, advice=ADVICE, until=until))
        seconds = [answer.step_seconds for answer in answers.values()] + [limit.answer()]
        rounds = rounds or rounds_for(seconds, until)
        print(f"{case.name or case.config.precision}: {rounds} rounds", file=sys.stderr, flush=True)
        everything = [*zip(processes, rows, strict=True), (limit, products)]
        for order in turns(len(everything), 2 * rounds):
            for place in order:
                process, measured = everything[place]
                measured.seconds.append(process.ask("turn"))
        for process, row in zip(processes, rows, strict=True):
            row.peak_bytes = process.ask("peak")
    subject, again, *others = rows
    return Measurement(case, {row.name: row for row in (subject, *others)}, again, products, left_out, remarks)


def _start(name: str, case: Case, work: Callable[..., None], until: float | None) -> MeasuringProcess:
    return MeasuringProcess(work, name.removesuffix(AGAIN), case, advice=ADVICE, until=until)


def _warm_up(
    closing: ExitStack,
    name: str,
    process: MeasuringProcess | None,
    start: Callable[[str], MeasuringProcess],
    restarts: bool,
) -> tuple[MeasuringProcess, MeasuredRow, Ready] | LeftOut:
    """Warms up a row, in `process` if it is given. With a cold compiler's cache and `restarts` the row starts a second
    time, so that neither the memory nor the time of the compiler counts."""
    cold_seconds = None
    while True:
        with ExitStack() as this:
            if process is None:
                process = this.enter_context(start(name))
            answer = process.answer()
            if isinstance(answer, LeftOut):
                return answer
            if answer.cache == "cold" and cold_seconds is None and restarts:
                cold_seconds, process = answer.first_seconds, None
                continue
            closing.push(this.pop_all())
        row = MeasuredRow(
            name,
            first_seconds=answer.first_seconds,
            cold_seconds=cold_seconds,
            cache=answer.cache,
            products=answer.products,
        )
        return process, row, answer


def rounds_for(step_seconds: Sequence[float], until: float | None = None) -> int:
    """The number of rounds that LONGEST and `until` allow, at least FEWEST without `until`. A round is two turns of
    each row."""
    from .rows import TURN

    round_seconds = sum(2 * max(TURN, seconds) for seconds in step_seconds)
    rounds = max(FEWEST, min(MOST, int(LONGEST / round_seconds)))
    return rounds if until is None else max(1, min(rounds, int(0.8 * (until - time.monotonic()) / round_seconds)))


def measure_of(case: Case) -> Answer | LeftOut | None:
    """The loss and gradients that all rows are compared with: autograd's in fp32 if the case has a lower precision.
    None: those of the first row."""
    if case.config.precision not in REDUCED:
        return None
    in_fp32 = replace(case, config=replace(case.config, precision="fp32"))
    with MeasuringProcess(work_answer, "torch-eager", in_fp32, advice=ADVICE) as process:
        answer: Answer | LeftOut = process.answer()
    return answer


def check_agreement(precision: str, answers: Mapping[str, Answer], true: Answer | LeftOut | None = None) -> list[str]:
    """Raises CheckFailedError unless all rows have the loss and gradients `true`, or without it those of the first row.

    A peer may be wrong in a single parameter that matters little: PyTorch sums the gradients of a layer norm in bf16 on
    a CPU, and after a thousand tokens is off by half of them. Returns remarks about such gradients.
    """
    remarks = []
    if isinstance(true, LeftOut):
        remarks.append(f"compared with one another only, not with the gradients in fp32: {true.reason}")
    compared = dict(answers)
    if isinstance(true, Answer):
        subject, first = "the gradients in fp32", true
    else:
        subject, first = next(iter(answers.items()))
        del compared[subject]
        if not math.isfinite(first.loss):
            raise CheckFailedError(f"{subject}: its loss is {first.loss}, so nothing was measured")
    bar = AGREEMENT[precision]
    total = math.hypot(*(numbers[0] for numbers in first.sketch.values()))
    for name, answer in compared.items():
        if not abs(answer.loss - first.loss) <= bar * abs(first.loss):
            raise _disagreement(name, subject, f"loss {answer.loss:.6g} against {first.loss:.6g}")
        if answer.sketch.keys() != first.sketch.keys():
            raise _disagreement(name, subject, "their parameters have different names")
        distances = {key: _distance(answer.sketch[key], first.sketch[key]) for key in first.sketch}
        share = math.hypot(*distances.values()) / total
        if not share <= bar:
            raise _disagreement(name, subject, f"all gradients: off by {share:.2g} of their norm, at most {bar:g}")
        shares = {key: distances[key] / max(first.sketch[key][0], NEGLIGIBLE * total) for key in distances}
        worst = max(shares, key=shares.__getitem__)
        if shares[worst] <= WORST * bar:
            continue
        how = f"gradient of {worst}: off by {shares[worst]:.2g} of its norm, at most {WORST * bar:g}"
        if first is not true or name.removesuffix(GRAPHS) not in PEERS:
            raise _disagreement(name, subject, how)
        count = sum(share > WORST * bar for share in shares.values())
        remarks.append(
            f"{name} itself rounds: {count} of its {len(shares)} gradients off by more than {WORST * bar:g} "
            f"of their norm, most that of {worst}, by {shares[worst]:.2g}"
        )
    return remarks


def _disagreement(name: str, subject: str, how: str) -> CheckFailedError:
    return CheckFailedError(f"{name} and {subject} disagree, so nothing was measured: {how}")


def _distance(mine: Sequence[float], its: Sequence[float]) -> float:
    """|g - h| of two gradients, estimated from their sketches."""
    differences = [one - other for one, other in zip(mine[1:], its[1:], strict=True)]
    return math.hypot(*differences) / math.sqrt(len(differences))
