"""A run that MLflow never heard of, killed and resumed: afterwards `sync` delivers all of it, and nothing twice."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from run_tools import write_text

from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import list_runs, read_run

OPTIONS = (
    *("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=24", "model.max_seq_len=8", "tokenizer=byte"),
    *("training=smoke", "training.log_every=1", "training.save_every=5", "training.eval_every=5", "device=cpu"),
    *("device.threads=1", "dataset=text", "dataset.path=text.txt", "tracking=mlflow"),
)
MOST_SECONDS = 180  # for one command, on a busy machine


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """MLflow is at a port where nobody answers."""
    for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return os.environ | {
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{port}",
    }


def command(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", f"manual_backprop.{name}", *arguments]


@pytest.mark.slow
def test_everything_arrives_once(tmp_path: Path, empty_store: Path, environment: dict[str, str]) -> None:
    from mlflow import MlflowClient

    write_text(tmp_path / "text.txt")
    pipe = subprocess.PIPE
    killed = subprocess.Popen(
        command("run", *OPTIONS, "training.max_steps=100000"), cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe
    )
    deadline = time.monotonic() + MOST_SECONDS
    while not list((tmp_path / "outputs").glob("runs/*/checkpoints/step-*")):
        assert killed.poll() is None, killed.stderr.read().decode() if killed.stderr else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)
    killed.kill()
    killed.communicate()
    (path,) = list_runs(tmp_path / "outputs")
    last = max(load_training_log(path).training["train/loss"].steps)
    end = max(last + 10, 20) // 5 * 5

    done = subprocess.run(
        command("run", "resume=last", f"training.max_steps={end}", "optimizer.learning_rate=0.001"),
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"deliver the rest with: python -m manual_backprop.sync {path}" in done.stderr

    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    del environment["MLFLOW_TRACKING_URI"]
    for _ in range(2):  # the second time there is nothing to do
        sent = subprocess.run(
            command("sync", "last"), cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=MOST_SECONDS
        )
        assert (sent.returncode, sent.stderr) == (0, "")

    client = MlflowClient(f"sqlite:///{store}")
    run = client.get_run(read_run(path)["mlflow"]["run_id"])
    log = load_training_log(path)
    for name, series in (log.training | log.validation | log.system).items():
        points = client.get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in points) == series.steps, name
        assert {point.step: point.timestamp for point in points} == dict(
            zip(series.steps, series.times_ms, strict=True)
        ), name
    assert log.training["train/loss"].steps == list(range(1, end + 1))
    assert run.info.status == "FINISHED"
    assert run.data.tags["changed.optimizer.learning_rate"].startswith("0.001 (from step ")
    assert run.data.params["training.max_steps"] == "100000"
    assert len(run.inputs.dataset_inputs) == len(run.outputs.model_outputs) == 1
