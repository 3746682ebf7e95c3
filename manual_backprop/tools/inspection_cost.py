"""What `training.inspect_every` costs a training step: the same network trained with it and without.

    python -m manual_backprop.tools.inspection_cost

Three trainings from the same start take turns in one process, A B A', A' B A: without, with, and without again, so that
a machine that slows down slows all of them; ratios are taken turn by turn. The ratio of the two without is the noise
floor. Each turn is a multiple of N steps, so that as many of its steps are looked at as in a long run, and what they
show is written into metrics.jsonl. The pictures, which a run draws once at its end, are timed by themselves.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from manual_backprop.errors import EXIT_DONE, EXIT_FAILED, ConfigError, InputError
from manual_backprop.paired import Row, noise_floor, ratios, turns

COMMAND = "python -m manual_backprop.tools.inspection_cost"
BAR = 0.05  # of a step's time
ROWS = ("without", "with", "without again")


def measure(overrides: Sequence[str], every: int, steps: int, rounds: int, root: Path) -> tuple[list[Row], float]:
    """All turns of all rows, and the seconds that the pictures take. The first turn of each row does not count."""
    from manual_backprop.command_line import check
    from manual_backprop.interruption import Interruption
    from manual_backprop.report import RunReport
    from manual_backprop.runner import Runner

    rows, trainings = [Row(name) for name in ROWS], []
    with ExitStack() as closing:
        for name in ROWS:
            given = (*overrides, f"training.inspect_every={every if name == 'with' else 'null'}")
            runner = Runner(check(given).jobs[0].config, root / "outputs", Interruption())
            directory, tracker = runner._open_run()
            closing.callback(directory.release)
            closing.callback(tracker.finish, "KILLED")
            trainings.append((runner, tracker, RunReport(runner.facts, directory, tracker)))

        def turn(place: int) -> tuple[float, float]:
            """Seconds and the processor's seconds of a step. The loop is the Runner's, without anything else."""
            runner, tracker, _ = trainings[place]
            start, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                loss, _, _ = runner.train_step()
                if seen := runner.inspector.take():
                    tracker.log(runner.step, seen)
            loss.item()  # the device has done all of it
            return (time.perf_counter() - start) / steps, (time.process_time() - processor) / steps

        for place in range(len(ROWS)):
            turn(place)
        for order in turns(len(ROWS), 2 * rounds):
            for place in order:
                seconds, processor = turn(place)
                rows[place].seconds.append(seconds)
                rows[place].processor.append(processor)
        start = time.perf_counter()
        trainings[1][2].inspection(whole=True)
        return rows, time.perf_counter() - start


def page(overrides: Sequence[str], every: int, steps: int, rows: Sequence[Row], pictures: float) -> str:
    lines = [
        " ".join(overrides),
        f"training.inspect_every={every}: {len(rows[0].seconds)} turns of {steps} steps each",
        "",
        f"{'inspection':<16}{'ms a step':>11}{'time / without':>16}{'quartiles':>17}",
    ]
    for row in rows:
        low, middle, high = ratios(row.seconds, rows[0].seconds)
        lines.append(f"{row.name:<16}{1e3 * row.median:>11.2f}{middle:>16.4f}{f'{low:.4f} - {high:.4f}':>17}")
    return "\n".join([*lines, "", f"the pictures at the end of a run: {pictures:.1f} s"])


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    cost = ratios(rows[1].seconds, rows[0].seconds)[1] - 1
    noise = noise_floor(rows[2].seconds, rows[0].seconds)
    passed = cost <= BAR and noise <= BAR
    words = "ok" if passed else "FAILED" if cost - noise > BAR else "NOT SHOWN (a quieter machine is needed)"
    return passed, f"{words}: inspection costs {cost:+.2%} of a step, noise floor {noise:.2%}, bar {BAR:.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        epilog=f"Exit codes: 0 at most {BAR:.0%}, 1 more, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the run (model=small, on all cores)")
    parser.add_argument("--every", type=int, default=50, metavar="N", help="steps between two looks (%(default)s)")
    parser.add_argument("--looks", type=int, default=2, metavar="K", help="in a turn of K x N steps (%(default)s)")
    parser.add_argument("--rounds", type=int, default=4, metavar="R", help="turns there and back (%(default)s)")
    options = parser.parse_args(arguments)
    for name in ("every", "looks", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} {getattr(options, name)}: must be at least 1")
    steps = options.every * options.looks
    given = {override.partition("=")[0] for override in options.overrides}
    defaults = (f"device.threads={os.cpu_count()}", f"training.max_steps={steps * (2 * options.rounds + 2)}")
    overrides = [one for one in defaults if one.partition("=")[0] not in given] + options.overrides
    with tempfile.TemporaryDirectory(prefix="inspection_cost-") as folder:
        try:
            rows, pictures = measure([*overrides, "tracking=none"], options.every, steps, options.rounds, Path(folder))
        except ConfigError as error:
            raise InputError("; ".join(error.violations)) from None
    passed, words = verdict(rows)
    print(page(overrides, options.every, steps, rows, pictures), words, sep="\n\n")
    return EXIT_DONE if passed else EXIT_FAILED


if __name__ == "__main__":
    from manual_backprop.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
