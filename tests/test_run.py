"""`python -m manual_backprop.run` as processes: exit codes and signals of one run.

What runs compute: test_runner.py. Sweeps: test_sweeps.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import manual_backprop
from manual_backprop.checkpoint import CheckpointManager
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import close_dead_runs, list_runs, read_run

REPOSITORY = Path(manual_backprop.__file__).resolve().parent.parent
SMALL = (
    *("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8", "tokenizer=byte"),
    *("training=smoke", "training.log_every=1", "tracking=none", "device=cpu", "dataset=text", "dataset.path=text.txt"),
)
ENDLESS = (*SMALL, "training.max_steps=1000000", "training.eval_every=1000000", "training.save_every=1000000")
PATIENCE = 120  # [s] for anything that a process is waited for


@pytest.fixture
def root(tmp_path: Path) -> Path:
    text = " ".join(f"the {('cat', 'dog', 'owl')[n * n % 3]} saw {n % 7} mice." for n in range(300))
    (tmp_path / "text.txt").write_text(text)
    return tmp_path


def environment() -> dict[str, str]:
    paths = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH", ""))))
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}


def command(overrides: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "manual_backprop.run", *overrides]


def run(root: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(overrides), cwd=root, env=environment(), capture_output=True, text=True, timeout=PATIENCE
    )


class Started:
    """A command that runs while the test looks at it; killed at the end, whatever happens."""

    def __init__(self, root: Path, *overrides: str):
        self.root, self.overrides = root, overrides

    def __enter__(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command(self.overrides), cwd=self.root, env=environment(), stdout=pipe, stderr=pipe, text=True
        )
        return self.process

    def __exit__(self, *exception: object) -> None:
        self.process.kill()
        self.process.communicate()


def wait_for_steps(root: Path, steps: int) -> Path:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        runs = list_runs(root / "outputs")
        log = runs[-1] / "metrics.jsonl" if runs else root / "none"
        if log.exists() and log.read_bytes().count(b"\n") > steps:
            return log.parent
        time.sleep(0.02)
    raise AssertionError("no run has come so far")


def test_done(root: Path) -> None:
    done = run(root, *SMALL, "training.max_steps=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "validation loss" in done.stdout
    (directory,) = list_runs(root / "outputs")
    assert read_run(directory)["status"] == "FINISHED"
    assert "training.max_steps=2" in read_run(directory)["command"]
    assert str(directory) in done.stdout
    # nothing lies about that a run does not have
    assert {path.name for path in root.iterdir()} == {"text.txt", "outputs"}
    assert {path.name for path in (root / "outputs").iterdir()} == {"datasets", "runs"}


def test_bad_config(root: Path) -> None:
    failed = run(root, *SMALL, "model.d_modle=3", "training.max_steps=-1")
    assert failed.returncode == 2
    assert "d_modle" in failed.stderr
    assert "max_steps" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (root / "outputs").exists()


def test_not_finite(root: Path) -> None:
    failed = run(root, *SMALL, "optimizer.learning_rate=1e30", "schedule.warmup_ratio=0")
    assert failed.returncode == 3
    assert "optimizer.learning_rate" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [read_run(path)["status"] for path in list_runs(root / "outputs")] == ["FAILED"]


def test_storage(root: Path) -> None:
    (root / "outputs").write_text("a file, not a folder")
    failed = run(root, *SMALL)
    assert failed.returncode == 4
    assert "outputs" in failed.stderr
    assert "Traceback" not in failed.stderr


def signalled(root: Path, number: signal.Signals) -> None:
    """A signal ends a run with a checkpoint, and `resume=last` with nothing repeated but its length finishes it."""
    with Started(root, *ENDLESS) as process:
        directory = wait_for_steps(root, 5)
        process.send_signal(number)
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + number
    assert f"{number.name}: saved" in errors
    assert "Traceback" not in errors
    assert read_run(directory)["status"] == "KILLED"
    checkpoint = CheckpointManager(directory / "checkpoints").load()
    steps = checkpoint.step
    assert steps >= 5
    assert list(load_training_log(directory).training["train/loss"].steps) == list(range(1, steps + 1))

    done = run(root, "resume=last", f"training.max_steps={steps + 3}")
    assert done.returncode == 0, done.stderr
    assert list_runs(root / "outputs") == [directory]
    assert read_run(directory)["status"] == "FINISHED"
    assert list(load_training_log(directory).training["train/loss"].steps) == list(range(1, steps + 4))


def test_sigterm(root: Path) -> None:
    signalled(root, signal.SIGTERM)


@pytest.mark.slow
def test_sigint(root: Path) -> None:
    signalled(root, signal.SIGINT)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(root: Path) -> None:
    """The first waits for the step to end; here it has a million batches. The second does not."""
    with Started(root, *ENDLESS, "training.gradient_accumulation_steps=1000000") as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("run directory"):
                break
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE)
    # the operating system tells only of a death by a signal; a shell calls it 143
    assert process.returncode == -signal.SIGTERM
    assert time.monotonic() - begin < 5
    (directory,) = list_runs(root / "outputs")
    assert close_dead_runs(root / "outputs") == [directory]
    assert read_run(directory)["status"] == "KILLED"


@pytest.mark.slow
def test_text_that_is_too_short(root: Path) -> None:
    (root / "text.txt").write_text("Only a few words.")
    failed = run(root, *SMALL)
    assert failed.returncode == 2
    assert "more text" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (root / "outputs/runs").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_without_warning(root: Path) -> None:
    """kill -9: the last checkpoint is there, the next command tells the truth about the run, and it can go on."""
    with Started(root, *[o for o in ENDLESS if "save_every" not in o], "training.save_every=5") as process:
        directory = wait_for_steps(root, 12)
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert read_run(directory)["status"] == "RUNNING"
    latest = CheckpointManager(directory / "checkpoints").load().step
    assert latest >= 10
    done = run(root, "resume=last", f"training.max_steps={latest + 5}")
    assert done.returncode == 0, done.stderr
    assert read_run(directory)["status"] == "FINISHED"
    assert read_run(directory)["resumes"][0]["previous_status"] == "KILLED"
    assert list(load_training_log(directory).training["train/loss"].steps) == list(range(1, latest + 6))


def test_a_terminal_that_cannot_show_a_character(root: Path) -> None:
    (root / "greetings.txt").write_text("grüße 你好 🎉 und so weiter. " * 40, encoding="utf-8")
    done = subprocess.run(
        command(["dataset=text", "dataset.path=greetings.txt", "tokenizer=char", "model=tiny", "training=smoke",
                 "model.max_seq_len=16", "tracking=none"]),
        cwd=root, env=environment() | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_network_that_does_not_fit_into_memory(root: Path) -> None:
    done = run(root, "model=tiny", "training=smoke", "model.d_model=1000000", "tracking=none")
    assert done.returncode == 2
    assert "does not fit into the memory of cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((root / "outputs").glob("runs/*"))
