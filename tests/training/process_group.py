"""Real processes that share a training, for tests. They are forked from a process that has imported torch, and get
their rank like under torchrun."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from manual_backprop.common.exit_codes import exit_code_of
from manual_backprop.common.interruption import SIGNALS
from manual_backprop.training import report
from manual_backprop.training.processes import watch
from manual_backprop.training.processes.group import open_store
from manual_backprop.training.runner import run_job

Job = dict[str, Any]  # a config's mapping
PATIENCE = 3.0  # [s] in place of the 15 s after which a process that does not answer is lost
PRELOADED = ["manual_backprop.training.runner", "manual_backprop.training.command_line"]


class Together:
    """`size` processes, each of which runs the jobs one after the other in the folder `root`."""

    def __init__(self, root: Path, size: int, jobs: Sequence[Job], before: Callable[[int], None] | None = None):
        """`before(rank)`, a function of a module, changes something in each process first."""
        context = multiprocessing.get_context("forkserver")
        forkserver.set_forkserver_preload(PRELOADED)
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        self._stores = [open_store(size) for _ in jobs]
        ports = [port for _, port in self._stores]
        self.processes: list[BaseProcess] = [
            context.Process(target=_run, args=(rank, size, ports, list(jobs), root, before)) for rank in range(size)
        ]
        for process in self.processes:
            process.start()

    def codes(self, timeout: float = 120) -> list[int | None]:
        """Their exit codes, once all have ended."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
            process.join()
        return codes

    def said(self, rank: int = 0) -> str:
        return (self.root / f"output-{rank}.txt").read_text(encoding="utf-8")


def _run(
    rank: int, size: int, ports: list[int], jobs: list[Job], root: Path, before: Callable[[int], None] | None
) -> None:
    from manual_backprop.config.validation import validate

    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked where a sweep's test has started the forkserver
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    sys.stdout = sys.stderr = (root / f"output-{rank}.txt").open("w", encoding="utf-8", buffering=1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    os.chdir(root)
    report.draw_inspection, report.draw_training_progress = no_pictures, no_pictures  # which cost most of such a run
    watch.PATIENCE, watch.INTERVAL = PATIENCE, 0.2
    if before is not None:
        before(rank)

    def work() -> None:
        for job, port in zip(jobs, ports, strict=True):
            os.environ["MASTER_PORT"] = str(port)
            run_job(validate(job), root)

    code = exit_code_of(work)
    sys.stdout.flush()
    os._exit(code)


def no_pictures(*_: Any) -> Any:
    return []


def job_of(config: Any) -> Job:
    mapping: Job = json.loads(json.dumps(config.to_dict()))
    return mapping
