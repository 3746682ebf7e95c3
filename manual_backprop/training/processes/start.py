"""Starts the processes of one machine (`device.processes=4`), or joins those started by torchrun.

The process of the user checks the command line, holds the store by which the others find each other, and forwards
signals; it does not train. The others read their job as JSON from standard input. A process that torchrun has started
finds its rank in the environment, and uses torchrun's store.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from ...common.errors import EXIT_DONE, ConfigError, Interrupted, ManualBackpropError, ProcessFailed
from ...common.exit_codes import exit_code_of
from ...common.interruption import Interruption
from ...common.origin import Origin
from ...common.processes import ALONE, Place, Processes, acting_as
from ...config.plugins import given_plugins, load_plugins
from ...config.schema import RunConfig
from ...config.validation import validate
from ...tracking.environment import code_digest
from ...tracking.run_directory import close_dead_runs
from .group import LOOPBACK, connect, open_store

INTERVAL = 0.05  # [s] between two checks of the processes
GRACE = 20.0  # [s] for the others to end after one has failed; longer than `watch.PATIENCE`
RESULT_KEY = "manual_backprop/result"


class Failed(ManualBackpropError):
    """The error with which the first process ended."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


# In the process that the user started


def run_in_processes(config: RunConfig, root: Path, origin: Origin, interruption: Interruption) -> float:
    """Runs `run_job` in `device.processes` processes of this machine. Returns what `run_job` returns.

    Raises the error of the first process, or ProcessFailed if it was killed.
    """
    size = config.device.processes
    store, port = open_store(size)
    request = {"config": config.to_dict(), "root": root, "argv": sys.argv, "plugins": given_plugins(), **vars(origin)}
    text = json.dumps(request, default=str)  # of paths
    interruption.defer()
    started = [_start(rank, size, port, text) for rank in range(size)]
    try:
        codes = _wait(started, interruption)
    finally:
        for process in started:
            process.kill()  # if it has not ended
            process.wait()
        close_dead_runs(root / "outputs")
    return _outcome(codes, store)


def _start(rank: int, size: int, port: int, request: str) -> subprocess.Popen[bytes]:
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    environment = {
        **os.environ,
        **{name: str(value) for name, value in place.items()},
        "MASTER_ADDR": LOOPBACK,
        "MANUAL_BACKPROP_PARENT": str(os.getpid()),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "manual_backprop.training.worker"],
        stdin=subprocess.PIPE,
        env=environment,
        process_group=0,  # Ctrl-C goes to the user's process, which forwards it
    )
    assert process.stdin is not None
    try:
        process.stdin.write(request.encode())
        process.stdin.close()
    except BrokenPipeError:
        pass  # the process has ended; its exit code is read later
    return process


def _wait(started: list[subprocess.Popen[bytes]], interruption: Interruption) -> list[int]:
    """Waits for all processes and returns their exit codes. Forwards a signal to all of them."""
    passed_on = False
    end = math.inf
    while any(process.poll() is None for process in started):
        if interruption.received is not None and not passed_on:
            passed_on = True
            for process in started:
                process.send_signal(interruption.received)
        if any(process.poll() for process in started):
            end = min(end, time.monotonic() + GRACE)
        if time.monotonic() > end:
            for process in started:
                process.kill()
        time.sleep(INTERVAL)
    return [process.wait() for process in started]


def _outcome(codes: list[int], store: dist.Store) -> float:
    first, size = codes[0], len(codes)
    result: dict[str, Any] = json.loads(store.get(RESULT_KEY)) if store.check([RESULT_KEY]) else {}
    if first == EXIT_DONE and not any(codes):
        return float(result["reached"])
    if first > 128:
        raise Interrupted(first - 128, result.get("message", signal.Signals(first - 128).name))
    if first > 0:
        raise Failed(result.get("message", f"process 0 of {size} ended with exit code {first}"), first)
    if first < 0:
        name = signal.Signals(-first).name
        raise ProcessFailed(
            f"process 0 of {size} was killed by {name} (was the memory full?); resume its last "
            "checkpoint with resume=last"
        )
    bad = next(rank for rank, code in enumerate(codes) if code)
    raise ProcessFailed(f"process {bad} of {size} ended with exit code {codes[bad]} after the run")


# In each of the processes


def run_worker(run_job: Callable[[RunConfig, Path, Origin], float]) -> int:
    """The main function of a process started by `run_in_processes` (`training.worker`): reads its job from standard
    input and runs it. Returns the exit code."""
    place = Place.found()
    assert place is not None
    request = json.loads(sys.stdin.buffer.read())
    sys.argv = request["argv"]
    load_plugins(request["plugins"])
    threading.Thread(target=_stop_when_alone, name="parent", daemon=True).start()
    result: dict[str, Any] = {}

    def work() -> None:
        sweep = None if request["sweep"] is None else Path(request["sweep"])
        origin = Origin(tuple(request["overrides"]), request["sources"], sweep, request["job"])
        try:
            result["reached"] = run_job(validate(request["config"]), Path(request["root"]), origin)
        except ManualBackpropError as error:
            result["message"] = str(error)
            raise SystemExit(error.exit_code) from error

    try:
        code = exit_code_of(work)
    except SystemExit as error:
        code = cast(int, error.code)
    if place.rank == 0 and result:
        store = dist.TCPStore(place.address, place.port, is_master=False, wait_for_workers=False)
        store.set(RESULT_KEY, json.dumps(result))
    return code


def _stop_when_alone() -> None:
    parent = int(os.environ["MANUAL_BACKPROP_PARENT"])
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


# In every process of a training, however it was started


@contextmanager
def joined(config: RunConfig) -> Iterator[Processes]:
    """A context with the group of this process; a process that was started alone is a group of one.

    An exception inside is reported to the other processes, which then end too.
    """
    place = Place.found()
    if place is None:
        yield ALONE
        return
    _refuse(config, place)
    cuda = config.device.name != "cpu" and torch.cuda.is_available()
    group = connect(place, "cpu:gloo,cuda:nccl" if cuda else "gloo")
    if config.device.threads is None:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // place.local_size))
    try:
        with acting_as(group):
            group.agree({"code": code_digest(), "torch": torch.__version__} | config.to_dict())
            yield group
            group.leave()
    except BaseException as error:
        group.report(error)
        raise


def _refuse(config: RunConfig, place: Place) -> None:
    asked, rows = config.device.processes, config.training.batch_size * config.training.gradient_accumulation_steps
    found = []
    if asked not in (1, place.size):
        found.append(f"device.processes={asked}: torchrun has started {place.size} processes; leave it out")
    if rows % place.size:
        found.append(
            f"training.batch_size={config.training.batch_size}: {rows} rows of an optimizer step cannot be shared by "
            f"{place.size} processes; give a multiple"
        )
    if found:
        raise ConfigError(found)
