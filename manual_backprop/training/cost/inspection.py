"""The time that `training.inspect_every` adds to a training step: the same network is trained with it and without.

Three trainings with the same start take turns in one process, A B A', A' B A: without, with, and without again. So a
machine that slows down slows all of them. Ratios are taken turn by turn; the ratio of the two without inspection is the
noise floor. A turn is a multiple of N steps, so that the share of inspected steps is that of a long run; their metrics
are written to metrics.jsonl. The pictures that a run draws once at its end are timed separately.

Example: python -m manual_backprop.tools.cost inspection model=tiny --every 10

Exit codes: 0 at most 5 %, 1 more, or it could not be measured, 2 wrong arguments.
"""

import os
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from ...config.arguments import Parser, whole
from ...study.paired_timing import Row
from .turns import table, take_turns, training, verdict

BAR = 0.05  # of a step's time
ROWS = ("without", "with", "without again")


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="of the run (model=small, on all cores)")
    add("--every", type=whole(1), default=50, metavar="N", help="inspect every N-th step (%(default)s)")
    add("--looks", type=whole(1), default=2, metavar="K", help="inspected, in a turn of K x N steps (%(default)s)")
    add("--rounds", type=whole(1), default=4, metavar="R", help="rounds of turns, forwards and backwards (%(default)s)")


def measure(options: Namespace, folder: Path) -> bool:
    steps = options.every * options.looks
    given = {override.partition("=")[0] for override in options.overrides}
    defaults = (f"device.threads={os.cpu_count()}", f"training.max_steps={steps * (2 * options.rounds + 2)}")
    overrides = [one for one in defaults if one.partition("=")[0] not in given] + options.overrides
    rows, pictures = in_turns([*overrides, "tracking=none"], options.every, steps, options.rounds, folder)
    passed, words = verdict("inspection", rows, BAR)
    about = f"training.inspect_every={options.every}: {len(rows[0].seconds)} turns of {steps} steps each"
    print(f"{' '.join(overrides)}\n{about}", table("inspection", rows), sep="\n\n")
    print(f"\nthe pictures at the end of a run: {pictures:.1f} s\n\n{words}")
    return passed


def in_turns(
    overrides: Sequence[str], every: int, steps: int, rounds: int, folder: Path
) -> tuple[Sequence[Row], float]:
    """The rows, and the seconds that the pictures take."""
    from ..report import RunReport

    trainings = []
    with ExitStack() as closing:
        for name in ROWS:
            given = (*overrides, f"training.inspect_every={every if name == 'with' else 'null'}")
            runner = training(given, folder / "outputs")
            directory, tracker = runner._open_run()
            closing.callback(directory.release)
            closing.callback(tracker.finish, "KILLED")
            trainings.append((runner, tracker, RunReport(runner.facts, directory, tracker)))

        def turn(place: int) -> tuple[float, float]:
            """Wall-clock and processor seconds of a step. The loop is that of the Runner, without anything else."""
            runner, tracker, _ = trainings[place]
            start, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loss, _, _ = runner.train_step()
                if seen := runner.inspector.take():
                    tracker.log(runner.step, seen)
            loss.item()  # waits for the device
            return (time.perf_counter() - start) / steps, (time.process_time() - processor) / steps

        rows = take_turns(ROWS, 2 * rounds, turn)
        start = time.perf_counter()
        trainings[1][2].inspection(whole=True)
        return rows, time.perf_counter() - start
