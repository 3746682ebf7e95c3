"""What logging costs a training step: the same run with everything written down and sent to MLflow, and with nothing.

    python -m manual_backprop.tools.tracking_cost

Three processes train the same network from the same start: one logs nothing, one logs as a run does (the line for the
terminal, metrics.jsonl, the machine's own metrics, the thread that feeds a real MLflow store), and one logs nothing
again. They take turns, A B A', A' B A, so that a machine that slows down slows all of them; ratios are taken turn by
turn. The ratio of the two that log nothing is the noise floor. After each turn the logging one has a rest, in which
MLflow takes what is left; the processor time of that rest counts as its own, beside the time that passed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from manual_backprop.errors import EXIT_DONE, EXIT_FAILED, CheckFailedError, InputError
from manual_backprop.paired import MeasuringProcess, Row, check_output, noise_floor, ratios, turns
from manual_backprop.tracking.mlflow_tracking import LONGEST_REST

COMMAND = "python -m manual_backprop.tools.tracking_cost"
BAR = 0.02  # of a step's time
ROWS = ("nothing", "everything", "nothing again")
REST = LONGEST_REST + 0.5  # [s] after a turn: longer than MLflow's thread waits between two deliveries
PATIENCE = 120.0  # [s] for MLflow to create its store


@dataclass(frozen=True)
class Case:
    """What is measured."""

    overrides: tuple[str, ...]  # of the run
    steps: int  # a turn
    root: Path


def measure(case: Case, rounds: int) -> list[Row]:
    """All turns of all rows. Raises CheckFailedError if a process fails, or if MLflow did not take what was logged."""
    rows, processes = [Row(name) for name in ROWS], []
    with ExitStack() as closing:
        for row in rows:
            process = closing.enter_context(MeasuringProcess(_work, case, row.name == "everything"))
            process.answer()  # one after the other: the first one prepares the text for all
            processes.append(process)
        for order in turns(len(rows), 2 * rounds):
            for place in order:
                seconds, processor = processes[place].ask("turn")
                rows[place].seconds.append(seconds)
                rows[place].processor.append(processor)
        for process in processes:
            process.ask("end")
    return rows


def _work(end: Connection, case: Case, logs: bool) -> None:
    """A measuring process. It says nothing on the terminal: what a run prints is written, and not shown."""
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        _train(end, case, logs)


def _train(end: Connection, case: Case, logs: bool) -> None:
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # the store is one of its own, in a temporary folder
    from manual_backprop.command_line import check
    from manual_backprop.interruption import Interruption
    from manual_backprop.report import RunReport
    from manual_backprop.runner import Runner

    runner = Runner(check([*case.overrides]).jobs[0].config, case.root / "outputs", Interruption())
    report = None
    if logs:
        directory, tracker = runner._open_run()
        report = RunReport(runner.facts, directory, tracker)
        report.start()
        _wait_for_store(directory)

    def turn(steps: int) -> tuple[float, float]:
        """Seconds and the processor's seconds of a step. The loop is the Runner's, without evaluations and saves."""
        start, processor = time.perf_counter(), time.process_time()
        begin, log_every = start, int(runner.config.training.log_every)
        for _ in range(steps):
            loss, rate, norm = runner.train_step()
            if runner.step % log_every == 0:
                runner._check_finite()
                now = time.perf_counter()
                skipped = int(runner.optimizer.nonfinite_steps)
                values = loss.item(), rate, norm.item(), (now - begin) / log_every, skipped
                if report is not None:
                    report.step(*values)
                begin = time.perf_counter()
        seconds = time.perf_counter() - start
        if logs:
            time.sleep(REST)
        return seconds / steps, (time.process_time() - processor) / steps

    turn(case.steps)  # warm-up
    end.send(True)
    while end.recv() == "turn":
        end.send(turn(case.steps))
    if report is not None:
        report.end("KILLED")
        known = directory.read()["mlflow"]
        directory.release()
        if not known or not known["delivered"]:
            raise CheckFailedError("MLflow did not take what was logged: the measurement says nothing")
    end.send(True)


def _wait_for_store(directory: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not directory.read()["mlflow"]:
        if time.monotonic() > deadline:
            raise CheckFailedError(f"MLflow did not create its store within {PATIENCE:.0f} s")
        time.sleep(0.1)
    time.sleep(REST)


def page(case: Case, rows: Sequence[Row]) -> str:
    lines = [
        f"{' '.join(case.overrides)}",
        f"{len(rows[0].seconds)} turns of {case.steps} steps each",
        "",
        f"{'logs':<16}{'ms a step':>11}{'time / nothing':>16}{'quartiles':>17}{'processor time / nothing':>27}",
    ]
    for row in rows:
        low, middle, high = ratios(row.seconds, rows[0].seconds)
        processor = ratios(row.processor, rows[0].processor)[1]
        lines.append(
            f"{row.name:<16}{1e3 * row.median:>11.2f}{middle:>16.4f}{f'{low:.4f} - {high:.4f}':>17}{processor:>27.4f}"
        )
    return "\n".join(lines)


def verdict(rows: Sequence[Row]) -> tuple[bool, str]:
    cost = ratios(rows[1].seconds, rows[0].seconds)[1] - 1
    noise = noise_floor(rows[2].seconds, rows[0].seconds)
    passed = cost <= BAR
    words = (
        "ok" if passed else "FAILED" if cost - noise > BAR else "NOT SHOWN (the noise is too large: a quieter machine)"
    )
    return passed, f"{words}: logging costs {cost:+.2%} of a step, noise floor {noise:.2%}, bar {BAR:.0%}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description=__doc__,
        epilog=f"Exit codes: 0 at most {BAR:.0%}, 1 more, or it could not be measured, 2 wrong arguments.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="small", help="a size of conf/model (default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="(default: all, %(default)s)")
    parser.add_argument("--log-every", type=int, default=10, help="training.log_every [steps] (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=200, help="a turn; a multiple of --log-every (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns there and back (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurement there, too")
    options = parser.parse_args(arguments)
    for name in ("threads", "log_every", "steps", "rounds"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.steps % options.log_every:
        raise InputError(f"--steps {options.steps}: must be a multiple of --log-every {options.log_every}")
    check_output("--json", options.json)
    steps = options.steps * (2 * options.rounds + 1)
    overrides = (
        *(f"model={options.model}", f"precision={options.precision}", f"device={options.device}", "tracking=mlflow"),
        *(f"device.threads={options.threads}", f"training.log_every={options.log_every}"),
        f"training.max_steps={steps}",
    )
    _check_overrides(overrides)
    with tempfile.TemporaryDirectory(prefix="tracking_cost-", ignore_cleanup_errors=True) as folder:
        case = Case(overrides, options.steps, Path(folder))
        rows = measure(case, options.rounds)
    passed, words = verdict(rows)
    print(page(case, rows), words, sep="\n\n")
    if options.json is not None:
        content = {"overrides": overrides, "steps": options.steps, "rows": [vars(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return EXIT_DONE if passed else EXIT_FAILED


def _check_overrides(overrides: Sequence[str]) -> None:
    """Raises InputError in one line, before any process starts."""
    from manual_backprop.command_line import check
    from manual_backprop.errors import ConfigError

    try:
        check([*overrides])
    except ConfigError as error:
        raise InputError("; ".join(error.violations)) from None


if __name__ == "__main__":
    from manual_backprop.exit_codes import exit_code_of

    sys.exit(exit_code_of(main))
