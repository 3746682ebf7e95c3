"""`python -m manual_backprop.run` as processes: exit codes and signals of one run.

What runs compute: test_runner.py. Sweeps: test_sweeps.py.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from command_tools import PATIENCE, Started, command, steps_of, wait_until
from run_tools import small, write_text

from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import close_dead_runs, list_runs, read_run

HERE = "dataset.path=text.txt"
FOR_EVER = (HERE, "training.max_steps=1000000", "training.eval_every=1000000")
SMALL = small(HERE)
ENDLESS = small(*FOR_EVER, "training.save_every=1000000")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder in which the commands run."""
    write_text(tmp_path / "text.txt")
    return tmp_path


def wait_for_steps(root: Path, steps: int) -> Path:
    """Waits until the run has made so many steps. Returns its directory."""

    def found() -> Path | None:
        runs = list_runs(root / "outputs")
        return runs[-1] if runs and steps_of(runs[-1]) > steps else None

    return wait_until(found)


def test_done(root: Path) -> None:
    done = command(*SMALL, "training.max_steps=2", "kernels.compile=never", cwd=root)  # or a first run would say so
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
    failed = command(*SMALL, "model.d_modle=3", "training.max_steps=-1", cwd=root)
    assert failed.returncode == 2
    assert "d_modle" in failed.stderr
    assert "max_steps" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (root / "outputs").exists()


def test_not_finite(root: Path) -> None:
    failed = command(*SMALL, "optimizer.learning_rate=1e30", "schedule.warmup_ratio=0", cwd=root)
    assert failed.returncode == 3
    assert "optimizer.learning_rate" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert [read_run(path)["status"] for path in list_runs(root / "outputs")] == ["FAILED"]


def test_storage(root: Path) -> None:
    (root / "outputs").write_text("a file, not a folder")
    failed = command(*SMALL, cwd=root)
    assert failed.returncode == 4
    assert "outputs" in failed.stderr
    assert "Traceback" not in failed.stderr


def signalled(root: Path, number: signal.Signals) -> None:
    """A signal ends a run with a checkpoint; `resume=last` with only its length finishes it."""
    with Started(*ENDLESS, cwd=root) as process:
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

    done = command("resume=last", f"training.max_steps={steps + 3}", cwd=root)
    assert done.returncode == 0, done.stderr
    assert list_runs(root / "outputs") == [directory]
    assert read_run(directory)["status"] == "FINISHED"
    assert list(load_training_log(directory).training["train/loss"].steps) == list(range(1, steps + 4))


@pytest.mark.slow
def test_sigterm(root: Path) -> None:
    signalled(root, signal.SIGTERM)


@pytest.mark.slow
def test_sigint(root: Path) -> None:
    signalled(root, signal.SIGINT)


@pytest.mark.slow
def test_a_second_signal_leaves_at_once(root: Path) -> None:
    """The first signal waits for the end of the step, which has a million batches here. The second one does not."""
    with Started(*ENDLESS, "training.gradient_accumulation_steps=1000000", cwd=root) as process:
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
    assert time.monotonic() - begin < 20  # the step would take a quarter of an hour
    (directory,) = list_runs(root / "outputs")
    assert close_dead_runs(root / "outputs") == [directory]
    assert read_run(directory)["status"] == "KILLED"


@pytest.mark.slow
def test_text_that_is_too_short(root: Path) -> None:
    (root / "text.txt").write_text("Only a few words.")
    failed = command(*SMALL, cwd=root)
    assert failed.returncode == 2
    assert "more text" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (root / "outputs/runs").exists()


@pytest.mark.slow
def test_a_run_that_was_killed_without_warning(root: Path) -> None:
    """After kill -9 the last checkpoint exists, the next command marks the run as KILLED, and it can be resumed."""
    with Started(*small(*FOR_EVER, "training.save_every=5"), cwd=root) as process:
        directory = wait_for_steps(root, 12)
        process.kill()
        process.communicate(timeout=PATIENCE)
    assert read_run(directory)["status"] == "RUNNING"
    latest = CheckpointManager(directory / "checkpoints").load().step
    assert latest >= 10
    done = command("resume=last", f"training.max_steps={latest + 5}", cwd=root)
    assert done.returncode == 0, done.stderr
    assert read_run(directory)["status"] == "FINISHED"
    assert read_run(directory)["resumes"][0]["previous_status"] == "KILLED"
    assert list(load_training_log(directory).training["train/loss"].steps) == list(range(1, latest + 6))


@pytest.mark.slow
def test_a_terminal_that_cannot_show_a_character(root: Path) -> None:
    (root / "greetings.txt").write_text("grüße 你好 🎉 und so weiter. " * 40, encoding="utf-8")
    done = command(
        *("dataset=text", "dataset.path=greetings.txt", "tokenizer=char", "model=tiny", "training=smoke"),
        *("model.max_seq_len=16", "tracking=none"),
        cwd=root,
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 0, done.stderr
    assert "gr??e" in done.stdout, "a sample"
    assert "continue 'gr??e ??' instead" in done.stderr
    (run,) = list_runs(root / "outputs")
    assert "grüße" in (run / "samples" / "step-000020.txt").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_network_that_does_not_fit_into_memory(root: Path) -> None:
    text = ("dataset=text", HERE, "tokenizer=byte")
    done = command("model=tiny", "training=smoke", "model.d_model=1000000", "tracking=none", *text, cwd=root)
    assert done.returncode == 2
    assert "does not fit into the memory of cpu" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((root / "outputs").glob("runs/*"))
