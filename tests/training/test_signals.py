"""SIGINT and SIGTERM at random moments of a real command, from its first line on: it reports them and exits cleanly."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_tools import PATIENCE, environment, wait_until, words_of
from run_tools import resume, same_process, small, write_text

from manual_backprop.checkpoints.checkpoint import CheckpointManager, verify
from manual_backprop.common.errors import RunInUseError
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import list_runs, read_run

ENDLESS = small(
    *("dataset.path=text.txt", "training.max_steps=1000000", "training.eval_every=1000000", "training.save_every=7")
)


def start(root: Path) -> subprocess.Popen[str]:
    """Starts the command and waits until its first line has run: before that, Python itself handles signals."""
    pipe = subprocess.PIPE
    command = words_of("manual_backprop.run", tuple(ENDLESS))
    process = subprocess.Popen(command, cwd=root, env=environment(), stdout=pipe, stderr=pipe, text=True)
    wait_until(lambda: _catches(process.pid, signal.SIGTERM), interval=0.001)
    return process


def _catches(pid: int, number: int) -> bool:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> (number - 1) & 1)
    return False


def first_step(root: Path) -> bool:
    return any(file.read_bytes().count(b"\n") > 1 for file in root.glob("outputs/runs/*/metrics.jsonl"))


@pytest.mark.parametrize(
    "moments", [pytest.param(4, marks=pytest.mark.slow), pytest.param(24, marks=pytest.mark.nightly)]
)
def test_a_signal_at_any_moment(moments: int, tmp_path: Path) -> None:
    write_text(tmp_path / "text.txt")
    rng, seconds, trained = random.Random(0), 0.0, 0
    for number in range(moments + 1):
        kind = (signal.SIGINT, signal.SIGTERM)[number % 2]
        before = set(list_runs(tmp_path / "outputs"))
        begin = time.monotonic()
        process = start(tmp_path)
        if number == 0:  # how long it takes to the first step, on this machine
            wait_until(lambda: first_step(tmp_path), interval=0.005)
            seconds = time.monotonic() - begin
            wait_until(lambda: list(tmp_path.glob("outputs/runs/*/checkpoints/step-*")), interval=0.005)
            with same_process(), pytest.raises(RunInUseError, match=f"in use by process {process.pid} "):
                resume(tmp_path, "resume=last")
        else:
            time.sleep(rng.uniform(0, 1.2 * seconds))
        process.send_signal(kind)
        _, errors = process.communicate(timeout=PATIENCE)

        assert process.returncode == 128 + kind, errors
        assert "Traceback" not in errors
        assert errors.startswith(f"{kind.name}: "), errors
        assert len(errors.splitlines()) <= 2, errors
        for run in set(list_runs(tmp_path / "outputs")) - before:
            assert read_run(run)["status"] == "KILLED"
            steps = load_training_log(run).training.get("train/loss")
            checkpoints = CheckpointManager(run / "checkpoints")
            if steps is not None:  # a checkpoint of the very last step
                trained += 1
                latest = checkpoints.latest()
                assert latest is not None
                assert checkpoints.load().step == steps.steps[-1]
                assert f"saved {latest}" in errors
            for path in checkpoints.list():
                verify(path)
        outputs = {path.name for path in tmp_path.glob("outputs/*")}
        assert outputs <= {"datasets", "runs"}
        assert not list(tmp_path.glob("outputs/datasets/*.partial-*"))
    assert 1 <= trained <= moments, "some signals came before the first step, some after it"
