"""Measures all rows of a case in turns, each in its own process. Nothing is timed before their gradients agree."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace

from ...common.errors import CheckFailedError
from ..paired_timing import MeasuringProcess, NotInTime, Row, noise_floor, ratios, turns
from .cases import GRAPHS, OURS, ROWS, Case, without_effect
from .rows import Answer, LeftOut, Ready, work_answer, work_products
from .rows import work as work_row

PEERS = [name for name in ROWS if name not in OURS]
AGAIN = " again"  # after the subject's name: the row that runs the subject a second time
FEWEST, MOST = 5, 20  # rounds, if the user does not give a number
WARMING_UP = 0.75  # largest share of a measurement's time for warming up; rows that are not ready then are left out
LONGEST = 120.0  # [s] for the rounds of a case, unless the fewest rounds take longer
# Of loss and gradient, relative.
AGREEMENT = {"fp64": 1e-9, "fp32": 1e-4, "tf32": 0.05, "bf16": 0.1, "bf16_mixed": 0.1, "fp16_mixed": 0.05}
NEGLIGIBLE = 1e-3  # a parameter with less than this share of the whole gradient is compared with that share: the
# gradient of the key's bias is 0, and only rounding errors are left of it
WORST = 4.0  # times the bar that a single parameter may be off
# Compared with autograd's gradients in fp32, since every row has rounding errors of its own.
REDUCED = ("tf32", "bf16", "bf16_mixed", "fp16_mixed")
ADVICE = "Was there too little memory? Try a smaller --batch-size, or fewer --rows."


@dataclass
class MeasuredRow(Row):
    """The time of a step [s] in each turn, `seconds`, and what it took to start."""

    first_seconds: float = 0.0  # of the first forward and backward pass, with the compiler's cache as it then was
    cold_seconds: float | None = None  # likewise, if the cache was cold and the row was started again
    cache: str = "none"  # of the compiler, when the steps were measured, as in `rows.Ready`
    products: str = "unknown"  # the library that makes its matrix products, likewise
    peak_bytes: int | None = None  # above what the imports took; None if the system does not report it


@dataclass
class Measurement:
    case: Case
    rows: dict[str, MeasuredRow]  # the subject comes first
    again: MeasuredRow  # the subject once more
    products: Row  # a step's matrix products alone
    left_out: dict[str, str] = field(default_factory=dict)  # rows that cannot run here, and why
    remarks: list[str] = field(default_factory=list)  # on gradients of peers
    disagreeing: dict[str, str] = field(default_factory=dict)  # peers whose gradients differ; they were not timed

    @property
    def subject(self) -> MeasuredRow:
        return next(iter(self.rows.values()))

    @property
    def in_order(self) -> list[MeasuredRow]:
        """The subject, the subject once more, and the other rows."""
        return [self.subject, self.again, *list(self.rows.values())[1:]]

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
    case: Case,
    names: Sequence[str],
    rounds: int | None = None,
    work: Callable[..., None] = work_row,
    at_once: bool = False,
    until: float | None = None,
) -> Measurement:
    """Measures the rows `names` of a case in turns; the first is the subject. `rounds`: turns of all rows, forwards and
    backwards (None: as many as the time allows).

    `work` runs in a row's process and builds what the row's name stands for: `rows.work`, or a function around it.
    `at_once`: all rows warm up together, and are compared with the subject only; one that fails or differs is left out.
    `until`: the deadline, by time.monotonic(); there are fewer rounds if it is near.
    Raises CheckFailedError if a process fails, or if gradients differ.
    """
    true = None if at_once else measure_of(case)  # before there are others: it may need more memory than any of them
    with ExitStack() as closing:
        wanted = [names[0], names[0] + AGAIN, *names[1:]]
        left_out = {name: reason for name in wanted if (reason := without_effect(name, case))}
        ready_by = until and time.monotonic() + WARMING_UP * (until - time.monotonic())

        def start(name: str) -> MeasuringProcess:
            return MeasuringProcess(work, name.removesuffix(AGAIN), case, advice=ADVICE, until=ready_by)

        warm: dict[str, tuple[MeasuringProcess, MeasuredRow, Ready]] = {}
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
                started = LeftOut("it had not warmed up in the time that there was")
                if name in begun:
                    begun[name].process.terminate()  # it would be waited for
            except CheckFailedError as error:
                if not at_once:
                    raise
                started = LeftOut(str(error))
            if isinstance(started, LeftOut):
                if name in wanted[:2]:
                    raise CheckFailedError(f"{name}: {started.reason}")
                left_out[name] = started.reason
                continue
            warm[name] = started
            started[0].until = until
        answers = {name: answer for name, (_, _, answer) in warm.items()}
        disagreeing = _disagreeing(case.config.precision, answers) if at_once else {}
        agreeing = {name: answer for name, answer in answers.items() if name not in disagreeing}
        remarks = check_agreement(case.config.precision, agreeing, true)
        timed = [(process, row) for name, (process, row, _) in warm.items() if name in agreeing]
        products = Row("products alone")
        limit = closing.enter_context(MeasuringProcess(work_products, case, advice=ADVICE, until=until))
        seconds = [answer.step_seconds for answer in agreeing.values()] + [limit.answer()]
        rounds = rounds or rounds_for(seconds, until)
        print(f"{case.name or case.config.precision}: {rounds} rounds", file=sys.stderr, flush=True)
        everything = [*timed, (limit, products)]
        longest = 0.0  # [s] that a turn of all has taken
        for order in turns(len(everything), 2 * rounds):
            begin = time.monotonic()
            if until is not None and products.seconds and begin + longest > until:
                break
            for place in order:
                process, measured = everything[place]
                measured.seconds.append(process.ask("turn"))
            longest = max(longest, time.monotonic() - begin)
        for process, row in timed:
            row.peak_bytes = process.ask("peak")
        for process, _ in everything:
            process.end.close()  # all end at the same time: a GPU's take a second each
    subject, again, *others = (row for _, row in timed)
    found = {row.name: row for row in (subject, *others)}
    return Measurement(case, found, again, products, left_out, remarks, disagreeing)


def _warm_up(
    closing: ExitStack,
    name: str,
    process: MeasuringProcess | None,
    start: Callable[[str], MeasuringProcess],
    restarts: bool,
) -> tuple[MeasuringProcess, MeasuredRow, Ready] | LeftOut:
    """A row that has warmed up, in its process if it has one. If the compiler's cache was cold and the row `restarts`,
    it is started once more: the compiler's memory and time must not count for the step."""
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
    """The number of rounds that LONGEST allows, FEWEST to MOST; fewer if the deadline `until` is near. A round is two
    turns of each row."""
    from .rows import TURN

    round_seconds = sum(2 * max(TURN, seconds) for seconds in step_seconds)
    rounds = max(FEWEST, min(MOST, int(LONGEST / round_seconds)))
    return rounds if until is None else max(1, min(rounds, int(0.8 * (until - time.monotonic()) / round_seconds)))


def measure_of(case: Case) -> Answer | LeftOut | None:
    """The loss and gradients with which all rows are compared: autograd's in fp32, if the case's own format is coarser.
    None: those of the first row."""
    if case.config.precision not in REDUCED:
        return None
    in_fp32 = replace(case, config=replace(case.config, precision="fp32"))
    with MeasuringProcess(work_answer, "torch-eager", in_fp32, advice=ADVICE) as process:
        answer: Answer | LeftOut = process.answer()
    return answer


def check_agreement(precision: str, answers: Mapping[str, Answer], true: Answer | LeftOut | None = None) -> list[str]:
    """Raises CheckFailedError unless all rows have the true loss and gradients, or without these, the first row's.

    A peer may be wrong in a single parameter of which little depends: PyTorch sums the gradients of a layer norm in
    bf16 on a CPU, and is off by half of them after a thousand tokens. The returned remarks describe such gradients.
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


def _disagreeing(precision: str, answers: Mapping[str, Answer]) -> dict[str, str]:
    """The peers whose loss or gradients are not those of the subject, which comes first, and how."""
    (subject, first), _, *others = answers.items()
    found = {}
    for name, answer in others:
        try:
            check_agreement(precision, {subject: first, name: answer})
        except CheckFailedError as error:
            found[name] = str(error)
    return found


def _distance(mine: Sequence[float], its: Sequence[float]) -> float:
    """An estimate of |g - h| for two gradients, from their sketches."""
    differences = [one - other for one, other in zip(mine[1:], its[1:], strict=True)]
    return math.hypot(*differences) / math.sqrt(len(differences))
