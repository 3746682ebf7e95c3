"""The time that logging adds to a training step: everything logged and sent to MLflow, compared with no logging.

Three processes train the same network with the same start: one logs nothing, one logs like a run (the terminal,
metrics.jsonl, the machine's metrics, the thread that sends to a real MLflow store), and one logs nothing again. They
take turns, A B A', A' B A, so that a machine that slows down slows all of them. Ratios are taken turn by turn; the
ratio of the two processes that log nothing is the noise floor. After each turn the logging process pauses, and MLflow
receives the rest; the processor time of that pause counts as the process's own, separately from its wall-clock time.

Example: python -m manual_backprop.tools.cost tracking --model tiny --steps 100 --json tracking.json

Exit codes: 0 at most 2 %, 1 more, or it could not be measured, 2 wrong arguments.
"""

import json
import os
import time
from argparse import Namespace
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...common.errors import CheckFailedError, InputError
from ...config.arguments import Parser, whole
from ...study.paired_timing import MeasuringProcess, Row, check_output
from ...tracking.mlflow_tracking import LONGEST_PAUSE
from .turns import table, take_turns, training, verdict

BAR = 0.02  # of a step's time
ROWS = ("nothing", "everything", "nothing again")
PAUSE = LONGEST_PAUSE + 0.5  # [s] after a turn: longer than the delivery thread waits between two deliveries
TIMEOUT = 120.0  # [s] for MLflow to create its store


def add_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--model", default="small", help="a size of conf/model (%(default)s)")
    add("--precision", default="fp32", help="(%(default)s)")
    add("--device", default="cpu", help="(%(default)s)")
    add("--threads", type=whole(1), default=os.cpu_count(), metavar="N", help="(all, %(default)s)")
    add("--log-every", type=whole(1), default=10, metavar="N", help="training.log_every (%(default)s)")
    add("--steps", type=whole(1), default=200, metavar="N", help="of a turn; a multiple of --log-every (%(default)s)")
    add("--rounds", type=whole(1), default=5, metavar="R", help="rounds of turns, forwards and backwards (%(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write the measurement to FILE")


def measure(options: Namespace, folder: Path) -> bool:
    """Measures, prints, and returns whether the limit was met. Raises CheckFailedError if a process fails, or if MLflow
    did not receive what was logged."""
    from ..command_line import check

    if options.steps % options.log_every:
        raise InputError(f"--steps {options.steps}: must be a multiple of --log-every {options.log_every}")
    check_output("--json", options.json)
    overrides = (
        *(f"model={options.model}", f"precision={options.precision}", f"device={options.device}", "tracking=mlflow"),
        *(f"device.threads={options.threads}", f"training.log_every={options.log_every}"),
        f"training.max_steps={options.steps * (2 * options.rounds + 1)}",
    )
    check([*overrides])  # before any process starts
    rows = in_turns(overrides, options.steps, options.rounds, folder)
    passed, words = verdict("logging", rows, BAR)
    about = f"{' '.join(overrides)}\n{len(rows[0].seconds)} turns of {options.steps} steps each"
    print(about, table("logs", rows), words, sep="\n\n")
    if options.json is not None:
        content = {"overrides": overrides, "steps": options.steps, "rows": [vars(row) for row in rows]}
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return passed


def in_turns(overrides: Sequence[str], steps: int, rounds: int, folder: Path) -> Sequence[Row]:
    """The rows of the three processes. A turn has `steps` steps."""
    processes = []
    with ExitStack() as closing:
        for name in ROWS:
            process = closing.enter_context(MeasuringProcess(_work, overrides, steps, folder, name == "everything"))
            process.answer()  # one after the other: the first prepares the text for all
            processes.append(process)
        rows = take_turns(ROWS, 2 * rounds, lambda place: processes[place].ask("turn"))
        for process in processes:
            process.ask("end")
    return rows


def _work(end: Connection, overrides: Sequence[str], steps: int, folder: Path, logs: bool) -> None:
    """One measuring process. It writes what a run prints, but does not show it on the terminal."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        del os.environ[name]  # the store is in a temporary folder
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere):
        _train(end, training(overrides, folder / "outputs"), steps, logs)


def _train(end: Connection, runner: Any, steps: int, logs: bool) -> None:
    from ..report import RunReport

    report = None
    if logs:
        directory, tracker = runner._open_run()
        report = RunReport(runner.facts, directory, tracker)
        report.start()
        _wait_for_store(directory)

    def turn() -> tuple[float, float]:
        """Wall-clock and processor seconds of a step. The loop is that of the Runner, without evaluations and saves."""
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
            time.sleep(PAUSE)
        return seconds / steps, (time.process_time() - processor) / steps

    end.send(True)
    while end.recv() == "turn":
        end.send(turn())
    if report is not None:
        report.end("KILLED")
        known = directory.read()["mlflow"]
        directory.release()
        if not known or not known["delivered"]:
            raise CheckFailedError("MLflow did not receive what was logged, so the measurement is not valid")
    end.send(True)


def _wait_for_store(directory: Any) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not directory.read()["mlflow"]:
        if time.monotonic() > deadline:
            raise CheckFailedError(f"MLflow did not create its store within {TIMEOUT:.0f} s")
        time.sleep(0.1)
    time.sleep(PAUSE)
