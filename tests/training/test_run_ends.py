"""How runs end early, in this process: signals, non-finite numbers, a full disk."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from run_tools import assert_same_tensors, config_of, metric, newest, resume, stumbling, train
from small_disk import run_on_small_disk

from manual_backprop.checkpoints.checkpoint import CheckpointManager, load_checkpoint
from manual_backprop.common.errors import Interrupted, NotFiniteError, StorageError
from manual_backprop.common.interruption import Interruption
from manual_backprop.tracking.run_directory import list_runs, open_run_directory, read_run
from manual_backprop.training.runner import Runner, run_job

pytestmark = pytest.mark.usefixtures("here")


# Signals


def stop_after(root: Path, steps: int, number: int) -> threading.Thread:
    """Sends this process a signal when a run has logged so many steps."""

    def watch() -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            runs = list_runs(root / "outputs")
            with suppress(FileNotFoundError):
                if runs and (runs[-1] / "metrics.jsonl").read_bytes().count(b"\n") > steps:
                    os.kill(os.getpid(), number)
                    return
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_saves_and_the_rest_is_exact(number: int, text: Path, tmp_path: Path) -> None:
    options = ("training.max_steps=120", "model.dropout=0.1", "training.save_every=1000", "training.batch_size=1")
    whole = train(tmp_path / "whole", text, *options)
    (tmp_path / "stopped").mkdir()
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    watcher = stop_after(tmp_path / "stopped", 5, number)
    with pytest.raises(Interrupted, match=r"saved .*step-\d{6} after \d+ steps; continue with resume=") as caught:
        train(tmp_path / "stopped", text, *options)
    watcher.join()
    assert caught.value.exit_code == 128 + number
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == handlers
    run = newest(tmp_path / "stopped")
    assert read_run(run)["status"] == "KILLED"
    (path,) = CheckpointManager(run / "checkpoints").list()
    assert 5 <= load_checkpoint(path).step < 120

    resume(tmp_path / "stopped", "resume=last")

    assert read_run(run)["status"] == "FINISHED"
    assert metric(run, "train/loss") == metric(whole, "train/loss")
    assert_same_tensors(run / "checkpoints/step-000120", whole / "checkpoints/step-000120")


def test_a_signal_before_the_first_step(text: Path, tmp_path: Path) -> None:
    """During set-up a signal ends the program at once; afterwards no run has the status RUNNING."""
    config = config_of(text)
    timer = threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGTERM))
    with Interruption() as interruption:
        timer.start()
        with pytest.raises(Interrupted, match="SIGTERM: no step was made") as caught:
            [Runner(config, tmp_path / "outputs", interruption) for _ in range(100)]
    timer.join()
    assert caught.value.exit_code == 143
    assert list_runs(tmp_path / "outputs") == []


def test_a_signal_while_the_run_directory_is_made(text: Path, tmp_path: Path) -> None:
    with Interruption() as interruption:
        runner = Runner(config_of(text), tmp_path / "outputs", interruption)
        runner.task.save = lambda directory: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore
        with pytest.raises(Interrupted, match="SIGTERM"):
            runner.run()
    assert read_run(newest(tmp_path))["status"] == "KILLED"
    open_run_directory(newest(tmp_path), 0).release()  # nobody owns it any more


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interruption() as interruption:
            interruption.defer()
            os.kill(os.getpid(), signal.SIGHUP)
            assert interruption.received is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interruption.received == signal.SIGTERM
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_when_the_run_is_done_ends_the_command(text: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The run is FINISHED, but nothing after it, such as another job, starts."""
    config = config_of(text, "training.max_steps=1")
    monkeypatch.setattr(
        "manual_backprop.training.report.RunReport.summary", lambda *given: os.kill(os.getpid(), signal.SIGTERM)
    )
    with pytest.raises(Interrupted, match="was already complete") as caught:
        run_job(config, tmp_path)
    assert caught.value.exit_code == 143
    assert read_run(newest(tmp_path))["status"] == "FINISHED"


# Steps that are not finite

DIVERGING = ("optimizer.learning_rate=1e30", "schedule=constant", "schedule.warmup_ratio=0", "training.max_steps=20")


@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16_mixed"])
def test_a_diverging_run_raises(precision: str, text: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match=r"not finite in 1 of the last steps, up to step 2\. .*learning_rate"):
        train(tmp_path, text, *DIVERGING, f"precision={precision}")
    run = newest(tmp_path)
    assert read_run(run)["status"] == "FAILED"
    assert "NotFiniteError" in (run / "traceback.txt").read_text()
    assert "NotFiniteError" in (run / "run.log").read_text()
    assert CheckpointManager(run / "checkpoints").list() == []


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_diverging_run_that_skips_ends_at_its_limit(optimizer: str, text: Path, tmp_path: Path) -> None:
    options = ("training.non_finite=skip", "training.non_finite_limit=4", "training.save_every=1000")
    with pytest.raises(NotFiniteError, match=r"4 steps in a row, up to step 5, .*non_finite_limit=4"):
        train(tmp_path, text, *DIVERGING, *options, f"optimizer={optimizer}")
    assert metric(newest(tmp_path), "nonfinite_steps") == [0, 1, 2, 3, 4]
    assert read_run(newest(tmp_path))["status"] == "FAILED"


@pytest.mark.parametrize(
    "options", [("training.eval_every=1",), ("training.max_steps=1", "training.sample_prompts=[]")]
)
def test_a_diverged_model_is_not_called_finished(options: Sequence[str], text: Path, tmp_path: Path) -> None:
    """Its last step was finite, but its update has made the parameters non-finite, which shows only when they are
    used."""
    with pytest.raises(NotFiniteError, match="validation loss after step 1 is nan"):
        train(tmp_path, text, *DIVERGING, *options)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("gradient", [False, True])
def test_skipped_steps_update_nothing(optimizer: str, gradient: bool, text: Path, tmp_path: Path) -> None:
    """Parameters and moments keep every bit, the steps are counted, and the run goes on."""
    options = ("training.max_steps=8", "training.save_every=1", "training.keep_checkpoints=100")
    config = config_of(text, *options, "training.non_finite=skip", f"optimizer={optimizer}")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {3, 4, 6}, gradient)
        runner.run()
    run = newest(tmp_path)
    assert metric(run, "nonfinite_steps") == [0, 0, 1, 2, 2, 3, 3, 3]
    states = {step: load_checkpoint(run / f"checkpoints/step-{step:06d}").tensors for step in range(1, 9)}
    for step in range(2, 9):
        for group, named in states[step].items():
            changed = [name for name, value in named.items() if not torch.equal(value, states[step - 1][group][name])]
            assert bool(set(changed) - {"counts"}) == (step not in {3, 4, 6}), (step, group)
    assert states[8]["optimizer"]["counts"].tolist() == [5, 3, 0, 0]


def test_raise_counts_steps_between_two_logs(text: Path, tmp_path: Path) -> None:
    config = config_of(text, "training.max_steps=8", "training.log_every=4", "training.save_every=1000")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        stumbling(runner, {2}, gradient=True)
        with pytest.raises(NotFiniteError, match="in 1 of the last steps, up to step 4"):
            runner.run()


# Storage


def test_outputs_that_cannot_be_written(text: Path, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="outputs") as caught:
        train(tmp_path, text)
    assert caught.value.exit_code == 4
    (tmp_path / "outputs").unlink()
    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/runs").write_text("a file, not a folder")
    with pytest.raises(StorageError, match="outputs/runs"):
        train(tmp_path, text)


@pytest.mark.parametrize("name", ["samples", "training_progress.png"])
def test_a_run_directory_that_cannot_be_written_any_more(name: str, text: Path, tmp_path: Path) -> None:
    config = config_of(text, "training.max_steps=2")
    with Interruption() as interruption:
        runner = Runner(config, tmp_path / "outputs", interruption)
        healthy = runner.train_step

        def spoil() -> Any:
            place = newest(tmp_path) / name
            if name == "samples":
                if place.is_dir():
                    place.rmdir()
                    place.write_text("a file, not a folder")
            else:
                place.mkdir(exist_ok=True)
            return healthy()

        runner.train_step = spoil  # type: ignore[method-assign]
        runner.run()
    assert re.search(rf"cannot write .*{name}.*continues without it", (newest(tmp_path) / "run.log").read_text())
    assert read_run(newest(tmp_path))["status"] == "FINISHED"
    assert CheckpointManager(newest(tmp_path) / "checkpoints").load().step == 2


ON_A_FULL_DISK = """
    import sys
    from pathlib import Path
    from run_tools import config_of, newest, write_text
    from manual_backprop.checkpoints.checkpoint import CheckpointManager
    from manual_backprop.common.exit_codes import exit_code_of
    from manual_backprop.common.interruption import Interruption
    from manual_backprop.tracking.run_log import warnings_to_terminal
    from manual_backprop.training.runner import Runner, run_job
    from manual_backprop.training.command_line import check
    from manual_backprop.tracking.run_directory import list_runs

    disk = Path(sys.argv[1])
    text = write_text(disk.parent / "text.txt")
    filler = disk / "filler"

    def fill():
        with filler.open("wb", buffering=0) as file:
            for size in (1 << 16, 1 << 10, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    pass

    def train(full, free):
        options = ("training.max_steps=20", "training.save_every=5", "training.eval_every=5", "model.dropout=0.1")
        config = config_of(text, *options, "training.keep_checkpoints=1")
        with Interruption() as interruption:
            runner = Runner(config, disk / "outputs", interruption)
            healthy = runner.train_step

            def step():
                if runner.step == full:
                    fill()
                if runner.step == free:
                    print("sound", CheckpointManager(runner.directory.checkpoints).newest_sound().name)
                    filler.unlink()
                return healthy()

            runner.train_step = step
            runner.run()

    warnings_to_terminal()
    print("code", exit_code_of(lambda: train(full=7, free=12)))
    first = newest(disk)
    print("code", exit_code_of(lambda: train(full=7, free=None)))
    second = newest(disk)
    assert second != first
    print("sound", CheckpointManager(second / "checkpoints").newest_sound().name)
    print("code", exit_code_of(lambda: train(full=None, free=None)))
    assert newest(disk) == second
    filler.unlink()
    print("code", exit_code_of(lambda: run_job(check([f"resume={second}"]).jobs[0].config, disk) and None))
    from run_tools import assert_same_tensors, metric
    assert_same_tensors(first / "checkpoints/step-000020", second / "checkpoints/step-000020")
    for run in (first, second):
        assert len(metric(run, "train/loss")) == 20
    assert metric(first, "train/loss") == metric(second, "train/loss")
    assert metric(first, "validation/loss") == metric(second, "validation/loss")
"""


@pytest.mark.slow
def test_a_full_disk_costs_the_save_and_nothing_else(tmp_path: Path) -> None:
    """A small disk is full for a while; or until the end, when only the final save is an error; or from the start, when
    no run starts. A run that failed can be resumed afterwards."""
    done = run_on_small_disk(ON_A_FULL_DISK, tmp_path, megabytes=8)
    assert done.returncode == 0, done.stdout + done.stderr
    told = [line for line in done.stdout.splitlines() if line.startswith(("code ", "sound "))]
    assert told == ["sound step-000005", "code 0", "code 4", "sound step-000005", "code 4", "code 0"]
    assert "Traceback" not in done.stderr
    assert "Logging error" not in done.stderr
    assert "The run continues without this checkpoint" in done.stderr
    assert "free some space" in done.stderr
    assert len(done.stderr.splitlines()) < 20, done.stderr
