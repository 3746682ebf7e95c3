"""One of several processes dies, hangs, fails or gets a signal: all end with the true status, and name that process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
from process_group import PATIENCE, Together, job_of
from run_tools import assert_same_tensors, config_of, metric, newest, small
from torch.distributed import HashStore

from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.common.errors import EXIT_NOT_FINITE, EXIT_RANK_FAILED, InputError, ProcessFailed
from manual_backprop.common.processes import Place
from manual_backprop.run import main
from manual_backprop.tracking.run_directory import close_dead_runs, list_runs, read_run
from manual_backprop.training.processes import group
from manual_backprop.training.processes.watch import Watch

ENDLESS = ("training.max_steps=100000", "training.save_every=5", "training.batch_size=4", "model.dropout=0.1")
STEP = 7  # in which process 1 does what it should not


def in_step(what: Callable[[Any], None], rank_of_it: int = 1) -> Callable[[int], None]:
    """Calls `what` in process `rank_of_it`, after a step's last gradients are computed and before they are sent."""

    def change(rank: int) -> None:
        if rank != rank_of_it:
            return
        from manual_backprop.training.processes.reduction import REST, GroupReduction

        whole, count = GroupReduction._complete, 0

        def complete(self: Any, block: str | None) -> None:
            nonlocal count
            count += block is REST
            if block is REST and count == STEP:
                what(self)
            whole(self, block)

        GroupReduction._complete = complete  # type: ignore[method-assign]

    return change


def kill(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: Any) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(_: Any) -> None:
    raise ValueError("what nobody thought of")


def spoil(reduction: Any) -> None:
    """Spoils gradients that are not sent yet: whether a running sum would include the fault would be random."""
    from manual_backprop.training.processes.reduction import REST

    reduction._gradients(REST)[0][3] = float("nan")


def dawdle(_: Any) -> None:
    """Takes longer than the others wait for a process that does not respond, as a disk or a tokenizer may."""
    time.sleep(2 * PATIENCE)


killed, stopped, failing, spoiled, slow = map(in_step, (kill, stop, fail, spoil, dawdle))
first_killed = in_step(kill, 0)


def test_a_killed_process_ends_all(text: Path, tmp_path: Path) -> None:
    together = Together(tmp_path, 2, [job_of(config_of(text, *ENDLESS))], kill_one)
    assert together.codes() == [EXIT_RANK_FAILED, -signal.SIGKILL]
    run = newest(tmp_path)
    assert read_run(run)["status"] == "FAILED"
    assert "process 1 of 2 has ended without a message: it was killed" in together.said()
    assert "process 1 of 2" in (run / "traceback.txt").read_text()
    assert CheckpointManager(run / "checkpoints").latest() is not None


def kill_one(rank: int) -> None:
    killed(rank)


def test_a_failure_is_told_by_the_first_with_its_traceback(text: Path, tmp_path: Path) -> None:
    together = Together(tmp_path, 2, [job_of(config_of(text, *ENDLESS))], fail_one)
    assert together.codes() == [EXIT_RANK_FAILED, 1]
    assert "process 1 of 2 has failed: ValueError: what nobody thought of" in together.said()
    kept = (newest(tmp_path) / "traceback.txt").read_text()
    assert "in fail" in kept
    assert "process_faults" in kept


def fail_one(rank: int) -> None:
    failing(rank)


def test_a_stopped_process_is_missed(text: Path, tmp_path: Path) -> None:
    together = Together(tmp_path, 2, [job_of(config_of(text, *ENDLESS))], stop_one)
    together.processes[0].join(60)
    assert together.processes[0].exitcode == EXIT_RANK_FAILED
    assert together.processes[1].is_alive(), "it is stopped, and not dead"
    assert f"process 1 of 2 has not answered for {PATIENCE:.0f} s" in together.said()
    assert read_run(newest(tmp_path))["status"] == "FAILED"
    together.codes(0)


def stop_one(rank: int) -> None:
    stopped(rank)


def test_a_slow_process_is_waited_for_and_not_a_number_is_one_for_all(text: Path, tmp_path: Path) -> None:
    ten = ("training.max_steps=10", "training.batch_size=4")
    together = Together(tmp_path, 2, [job_of(config_of(text, *ten))], slow_one)
    assert together.codes() == [0, 0], together.said()
    spoiled_run = Together(tmp_path / "spoiled", 2, [job_of(config_of(text, *ten))], spoil_one)
    assert spoiled_run.codes() == [EXIT_NOT_FINITE, EXIT_NOT_FINITE], spoiled_run.said()
    assert "not finite in 1 of the last steps, up to step 7" in spoiled_run.said()


def slow_one(rank: int) -> None:
    slow(rank)


def spoil_one(rank: int) -> None:
    spoiled(rank)


def test_the_first_process_is_killed(text: Path, tmp_path: Path) -> None:
    together = Together(tmp_path, 2, [job_of(config_of(text, *ENDLESS))], kill_first)
    assert together.codes() == [-signal.SIGKILL, EXIT_RANK_FAILED]
    close_dead_runs(tmp_path / "outputs")
    assert read_run(newest(tmp_path))["status"] == "KILLED"


def kill_first(rank: int) -> None:
    first_killed(rank)


@pytest.mark.parametrize("whom", [(1,), pytest.param((0, 1), marks=pytest.mark.nightly)])
def test_a_signal_to_any_saves_the_same_step_on_all(whom: tuple[int, ...], text: Path, tmp_path: Path) -> None:
    options = ("training.save_every=100000", "training.batch_size=4", "model.dropout=0.1", "schedule=constant")
    endless = config_of(text, *options, "training.max_steps=100000", "schedule.warmup_ratio=0")
    together = Together(tmp_path, 2, [job_of(endless)])
    wait_for_steps(tmp_path, 20)
    for rank in whom:
        os.kill(together.processes[rank].pid or 0, signal.SIGTERM)
    assert together.codes() == [128 + signal.SIGTERM] * 2, together.said()
    run = newest(tmp_path)
    assert read_run(run)["status"] == "KILLED"
    assert f"continue with resume={run.name}" in together.said()
    saved = CheckpointManager(run / "checkpoints").latest()
    assert saved is not None
    steps = int(saved.name.removeprefix("step-")) + 5
    whole = job_of(config_of(text, *options, f"training.max_steps={steps}", "schedule.warmup_ratio=0"))
    assert Together(tmp_path / "whole", 2, [whole]).codes() == [0, 0]
    assert Together(tmp_path, 2, [whole | {"resume": str(run)}]).codes() == [0, 0]
    last = Path("checkpoints") / f"step-{steps:06d}"
    assert_same_tensors(newest(tmp_path / "whole") / last, run / last)


def wait_for_steps(root: Path, steps: int) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        runs = list_runs(root / "outputs")
        metrics = runs[-1] / "metrics.jsonl" if runs else None
        if metrics is not None and metrics.is_file() and metrics.read_bytes().count(b"\n") > steps:
            return
        time.sleep(0.02)
    raise AssertionError("no step was made")


def test_who_does_something_else_is_named(text: Path, tmp_path: Path) -> None:
    together = Together(tmp_path, 2, [job_of(config_of(text, *ENDLESS))], other_seed)
    assert together.codes() == [2, 2]
    assert "processes 0 and 1 of 2 do not do the same" in together.said()
    assert "code: 'another'" not in together.said(), "only rank 1's is changed"
    assert "another" in together.said()
    assert not list_runs(tmp_path / "outputs"), "nothing was begun"


def other_seed(rank: int) -> None:
    if rank == 1:
        from manual_backprop.training.processes import start

        start.code_digest = lambda: "another"


def test_a_port_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LIMIT", timedelta(seconds=0.5))
    monkeypatch.setattr(group, "LAST_MESSAGE_TIMEOUT", timedelta(seconds=0.5))
    with socket.socket() as other:  # takes what comes and says nothing, as many servers do
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            ProcessFailed,
            match=f"process 1 of 2 does not find the others at 127.0.0.1:{port}: another program listens there",
        ):
            group.connect(Place(1, 2, 1, 2, "127.0.0.1", port), "gloo")


def test_a_sweep_under_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 29500}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, str(value))
    for asked in (["-m", "model=tiny", "seed=0,1"], ["sweep.resume=last"]):
        with pytest.raises(InputError, match="start it without torchrun"):
            main(asked)


# The ways in which users start them


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:  # what it has started sees that it is gone
            process.kill()
            process.wait()


def test_the_command_starts_its_processes_and_passes_a_signal_on(text: Path, tmp_path: Path, here: None) -> None:
    line = small(f"dataset.path='{text}'", *ENDLESS, "device.processes=2", "device.threads=null")
    with command("-m", "manual_backprop.run", *line) as process:
        wait_for_steps(tmp_path, 10)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    run = newest(tmp_path)
    assert read_run(run)["status"] == "KILLED"
    assert output.count(f"continue with resume={run.name}") == 1, output
    assert output.count("parameters, gpt2") == 1, "one process speaks for all"


def test_torchrun_starts_them(text: Path, tmp_path: Path, here: None) -> None:
    line = small(f"dataset.path='{text}'", *ENDLESS)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    with command(*torchrun, "-m", "manual_backprop.run", *line) as process:
        wait_for_steps(tmp_path, 10)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    run = newest(tmp_path)
    assert read_run(run)["status"] == "KILLED", output
    assert CheckpointManager(run / "checkpoints").latest() is not None
    assert output.count("parameters, gpt2") == 1


@pytest.mark.nightly
def test_jobs_of_a_sweep_start_them(text: Path, tmp_path: Path, here: None) -> None:
    line = small(f"dataset.path='{text}'", "training.max_steps=3", "training.batch_size=4", "device.processes=2")
    with command("-m", "manual_backprop.run", "-m", *line, "device.threads=1", "seed=0,1") as process:
        output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    runs = list_runs(tmp_path / "outputs")
    assert [read_run(one)["status"] for one in runs] == ["FINISHED"] * 2
    assert len({float(metric(one, "validation/loss")[-1]) for one in runs}) == 2, "two seeds"


def test_a_process_that_has_died(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one for which nobody has waited yet; not one whose state cannot be read."""
    child = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(os, "getpid", lambda: child.pid)
    watch = Watch(HashStore(), 0, 1)
    assert not watch._has_died(0)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert watch._has_died(0)
    child.wait()
    assert watch._has_died(0)
    for error in (psutil.AccessDenied(child.pid), OSError("/proc")):
        monkeypatch.setattr(psutil, "Process", mock.Mock(side_effect=error))
        assert not watch._has_died(0)
