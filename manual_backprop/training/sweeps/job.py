"""A job of a sweep in its own process: if it runs out of memory or is killed, the other jobs continue.

The process is forked from a server that has imported torch, Matplotlib and MLflow once (Python's `forkserver`), so that
a job starts at once. It has its own process group: a signal that ends the sweep reaches it only through the sweep's
`stop` file, once for each signal, and then it saves a checkpoint like any run. It also stops when the process that
supervises it is gone.
"""

import io
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

from manual_backprop.common.errors import EXIT_DONE, EXIT_FAILED, Interrupted, ManualBackpropError
from manual_backprop.common.interruption import SIGNALS, Interruption
from manual_backprop.common.startup.output import OutputFile, endure_output
from manual_backprop.tracking.run_directory import FAILED, FINISHED, KILLED, RUNNING, read_run
from manual_backprop.training.sweeps.records import JobRecord, Records, measured, run_of_job

PRELOADED = ["manual_backprop.training.runner", "manual_backprop.common.startup.agg"]
INTERVAL = 0.1  # [s] between two checks of the `stop` file


@dataclass(frozen=True)
class JobRequest:
    """What the process of a job receives."""

    mapping: dict[str, Any]  # a RunConfig as a mapping
    root: Path  # the folder of outputs/
    sweep: Path
    number: int
    overrides: tuple[str, ...]
    sources: dict[str, str]  # where the value of each key was set
    prefix: str  # of each line that it prints
    main_process: int  # id of the sweep's process; it, or a worker of a launcher, supervises the job
    plugins: tuple[str, ...] = ()  # of the sweep's command line


def run_job_in_process(request: JobRequest, record: JobRecord, records: Records, preload: Sequence[str]) -> JobRecord:
    """Starts the job, waits until it ends in any way, and returns its record. Raises StorageError."""
    records.write(replace(record, status=RUNNING))
    context = multiprocessing.get_context("forkserver")
    _start_server(preload)
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_job, args=(request, there), name=f"job {request.number}")
    in_a_worker = os.getpid() != request.main_process
    if in_a_worker:  # joblib has set its own start method there, which a job's process would not find
        multiprocessing.set_start_method("forkserver", force=True)
    nothing: AbstractContextManager[list[int]] = nullcontext([])
    with _signals_of_a_worker() if in_a_worker else nothing as received:
        process.start()
        there.close()
        answer = _watch(process, here, records, in_a_worker, received)
    run = run_of_job(request.root / "outputs", request.sweep, request.number)
    if run is not None and read_run(run)["status"] == FINISHED:  # a signal came after the run had finished
        answer = {"status": FINISHED, "exit_code": EXIT_DONE, "error": None}
    ended = measured(replace(record, **answer), run)
    records.write(ended)
    return ended


def _start_server(preload: Sequence[str]) -> None:
    """Starts the fork server with signals blocked: it, and the tracker that Python starts beside it, must survive a
    signal that a cluster sends to every process. A job unblocks signals again."""
    forkserver.set_forkserver_preload(list(preload))
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # forkserver has unblocked two of them
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@contextmanager
def _signals_of_a_worker() -> Iterator[list[int]]:
    """The signals to forward in a worker of a launcher. It ignores most signals, which the sweep's process or the
    cluster sends to every process anyway; but SIGUSR1 and SIGUSR2 may be sent to the worker alone, and are
    forwarded."""
    received: list[int] = []

    def keep(number: int, frame: FrameType | None) -> None:
        received.append(number)

    passed_on = (signal.SIGUSR1, signal.SIGUSR2)
    before = {number: signal.signal(number, keep if number in passed_on else signal.SIG_IGN) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    process: Any, answers: Connection, records: Records, in_a_worker: bool, received: Sequence[int]
) -> dict[str, Any]:
    """Waits for a job and forwards signals meanwhile. Returns the outcome that it reported, or how it died."""
    passed_on, parent = 0, os.getppid()
    answer: dict[str, Any] | None = None
    is_there = True
    while is_there:
        try:
            if answers.poll(INTERVAL):
                answer = answers.recv()
        except EOFError:  # the process has ended
            is_there = False
        asked = max(records.stop_requests(), min(1, len(received))) + (in_a_worker and os.getppid() != parent)
        while passed_on < asked and process.is_alive():
            os.kill(process.pid, signal.SIGTERM)
            passed_on += 1
    process.join()
    if answer is not None:
        return answer
    code = process.exitcode
    if code < 0:
        name = signal.Signals(-code).name
        if passed_on:
            return {"status": KILLED, "exit_code": 128 - code, "error": f"{name}: it was stopped at once"}
        hint = "; perhaps the memory was full" if -code == signal.SIGKILL else ""
        return {"status": KILLED, "exit_code": 128 - code, "error": f"{name} killed its process{hint}"}
    return {"status": FAILED, "exit_code": code, "error": f"its process ended with exit code {code}"}


# In the job's process


class JobInterruption(Interruption):
    """Counts a signal that a cluster sends to every process only once, although the sweep forwards it as a SIGTERM."""

    def __init__(self, records: Records) -> None:
        super().__init__()
        self._records, self._same = records, False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        passed_on = self.received != number or self._records.stop_requests() == 1
        if self.received is not None and not self._same and passed_on:
            self._same = True
            return
        super()._handle(number, frame)


def _job(request: JobRequest, answers: Connection) -> None:
    os.setpgid(0, 0)  # Ctrl-C goes to the sweep, which forwards it
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    threading.Thread(target=_stop_when_alone, name="parent", daemon=True).start()
    endure_output()
    if request.prefix:
        sys.stdout, sys.stderr = PrefixedLines(1, request.prefix), PrefixedLines(2, request.prefix)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.argv = [sys.argv[0], *request.overrides]  # the command of this run alone
    outcome = _outcome(request)
    with suppress(BrokenPipeError):  # the sweep may have ended at a second signal, or been killed
        answers.send(outcome)


def _outcome(request: JobRequest) -> dict[str, Any]:
    try:
        from manual_backprop.common.origin import Origin
        from manual_backprop.config.plugins import load_plugins
        from manual_backprop.config.validation import validate
        from manual_backprop.training.runner import run_job

        load_plugins(request.plugins)
        origin = Origin(request.overrides, request.sources, sweep=request.sweep, job=request.number)
        run_job(validate(request.mapping), request.root, origin, JobInterruption(Records(request.sweep)))
    except Interrupted as error:
        return {"status": KILLED, "exit_code": error.exit_code, "error": str(error)}
    except KeyboardInterrupt:
        return {"status": KILLED, "exit_code": 128 + signal.SIGINT, "error": "interrupted"}
    except ManualBackpropError as error:
        print(error, file=sys.stderr)
        return {"status": FAILED, "exit_code": error.exit_code, "error": str(error)}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"status": FAILED, "exit_code": EXIT_FAILED, "error": f"{type(error).__name__}: {error}"}
    return {"status": FINISHED, "exit_code": EXIT_DONE, "error": None}


def _stop_when_alone() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)


class PrefixedLines(io.TextIOBase):
    """A stream that writes whole lines, each with the job's name first, so that parallel jobs stay readable."""

    def __init__(self, descriptor: int, prefix: str):
        self._output, self._prefix, self._begun = OutputFile(descriptor, "w", closefd=False), prefix, ""
        self._output.endures = 1
        self._lock = threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._begun = (self._begun + text).split("\n")
            shown = "".join(f"{self._prefix}{line}\n" for line in lines if line.strip())
            if shown:
                self._output.write(shown.encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        """Does nothing: whole lines are written already."""
