"""The time to sum the gradients of two processes, and how much of it the backward pass hides.

One process with all threads takes turns with two processes that share the rows of the same step and have half of the
threads each (`device.processes=2`). The two processes run their steps in four ways: without summing gradients (each
trains alone); summing all gradients after the backward pass; summing those of each block while the backward pass of the
block below runs, as in a run; and without summing again, for the noise. The optimizer is always sharded. Tokens are
random.

Example: python -m manual_backprop.tools.cost reduction --case C1 --rounds 2

Exit codes: 0 measured, 1 a process failed, 2 wrong arguments.
"""

from __future__ import annotations

import os
import time
from argparse import Namespace
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

from ...common.allocator import keep_freed_memory
from ...common.processes import ALONE, Place, acting_as
from ...config.arguments import Parser, whole
from ...study.benchmark.cases import CASES, SUBJECT, Case
from ...study.paired_timing import MeasuringProcess, Row, noise_floor, ratios
from .turns import table, take_turns

if TYPE_CHECKING:
    from ...common.batch import AnyBatch
    from ...models.network import Network
    from ..processes.group import Group

SIZE = 2  # processes
ROWS = ("one process", "not added up", "at the end", "as they come", "not added up 2")
WARM_UP = 3  # steps
ON_CPU = tuple(name for name, case in CASES.items() if case.device == "cpu" and case.network == "decoder")


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--case", choices=ON_CPU, default="C2", help="of the bench (%(default)s)")
    add("--precision", choices=("fp32", "bf16", "bf16_mixed"), default="fp32", help="(%(default)s)")
    add("--steps", type=whole(1), default=3, metavar="K", help="in a turn (%(default)s)")
    add("--rounds", type=whole(1), default=5, metavar="R", help="rounds of turns, forwards and backwards (%(default)s)")


def measure(options: Namespace, folder: Path) -> bool:
    threads = os.cpu_count() or 1
    from ..processes.group import open_store  # torch

    case = CASES[options.case].case(options.case, options.precision, threads, None)
    with ExitStack() as closing:
        store, port = open_store(SIZE)
        alone = closing.enter_context(MeasuringProcess(work, case, threads, 0, 1, port))
        together = [
            closing.enter_context(MeasuringProcess(work, case, max(1, threads // SIZE), rank, SIZE, port))
            for rank in range(SIZE)
        ]
        for process in (alone, *together):
            process.answer()

        def turn(place: int) -> tuple[float, float]:
            asked = [alone] if place == 0 else together
            for process in asked:
                process.end.send((ROWS[place].removesuffix(" 2"), options.steps))
            answers = [process.answer() for process in asked]
            return max(seconds for seconds, _ in answers), sum(processor for _, processor in answers)

        rows = take_turns(ROWS, 2 * options.rounds, turn)
        for process in together:
            process.end.send(None)
        for process in together:
            process.answer()
        del store  # needed until here: the two processes have found each other through it
    print(case.describe(), table("reduction", rows), verdict(rows), sep="\n\n")
    return True


def verdict(rows: list[Row]) -> str:
    """A sentence with the costs as shares of a step that sums gradients as they come."""
    _, without, at_end, as_they_come, again = rows
    step = as_they_come.seconds
    whole_cost = ratios([one - other for one, other in zip(at_end.seconds, without.seconds, strict=True)], step)[1]
    left = ratios([one - other for one, other in zip(step, without.seconds, strict=True)], step)[1]
    noise = noise_floor(again.seconds, without.seconds)
    hidden = f"{1 - left / whole_cost:.0%} of it hidden" if whole_cost > noise else "too little to say what is hidden"
    return (
        f"adding up costs {whole_cost:.1%} of a step at the end and {left:.1%} as the gradients come: {hidden}; "
        f"noise floor {noise:.1%}"
    )


def work(end: Connection, case: Case, threads: int, rank: int, size: int, port: int) -> None:
    """A measuring process: for each question (way, number of steps) it answers with the wall-clock and processor
    seconds of a step."""
    import torch

    from ..processes.group import LOOPBACK, connect

    os.environ |= {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(threads)
    group = connect(Place(rank, size, rank, size, LOOPBACK, port), "gloo") if size > 1 else None
    with acting_as(group or ALONE):
        answer(end, case, group)


def answer(end: Connection, case: Case, group: Group | None) -> None:
    from ...models.network import no_callback
    from ...models.training_step import Reduction, TrainingStep, sharded
    from ...study.benchmark.rows import ADAMW, EPSILON, LEARNING_RATE, MAX_GRAD_NORM, build, random_batch
    from ..processes.reduction import GroupReduction, Requests

    class AtTheEnd(GroupReduction):
        def watched(self, batches: Iterable[AnyBatch]) -> Iterator[AnyBatch]:
            self.network.on_gradients_complete = no_callback
            return iter(batches)

    keep_freed_memory()
    network: Network = build(SUBJECT, case).network  # type: ignore[union-attr]
    optimizer = sharded(network.adamw(**ADAMW, epsilon=EPSILON), network)
    ways: dict[str, Reduction] = {"one process": Reduction(), "not added up": Reduction()}
    if group is not None:
        ways |= {
            "at the end": AtTheEnd(group, network, Requests),
            "as they come": GroupReduction(group, network, Requests),
        }
    steps = {
        way: TrainingStep(network, optimizer, MAX_GRAD_NORM, graph=False, reduction=one) for way, one in ways.items()
    }
    rows = case.batch_size // (1 if group is None else group.size)
    batch = random_batch(replace(case, batch_size=rows), network.device)
    denominator = case.tokens
    for way in steps:
        for number in range(WARM_UP):
            steps[way]([batch], denominator, LEARNING_RATE, number + 1)
    end.send(None)
    while (question := end.recv()) is not None:
        way, count = question
        start, processor = time.perf_counter(), time.process_time()
        for number in range(count):
            loss, _ = steps[way]([batch], denominator, LEARNING_RATE, WARM_UP + number)
        loss.item()
        end.send(((time.perf_counter() - start) / count, (time.process_time() - processor) / count))
    if group is not None:
        group.leave()
    end.send(None)
