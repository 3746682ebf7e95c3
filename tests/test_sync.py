"""`sync` delivers a run that was never in MLflow, killed and resumed: all of it, and nothing twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_tools import Started, command, free_port, wait_until
from run_tools import small, write_text

from manual_backprop.sync import main as sync
from manual_backprop.tracking import load_training_log
from manual_backprop.tracking.run_directory import list_runs, read_run

OPTIONS = small("dataset.path=text.txt", "tracking=mlflow", "training.save_every=5", "training.eval_every=5")


@pytest.mark.slow
def test_everything_arrives_once(tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    write_text(tmp_path / "text.txt")
    nobody = f"http://127.0.0.1:{free_port()}"
    with Started(*OPTIONS, "training.max_steps=100000", cwd=tmp_path, MLFLOW_TRACKING_URI=nobody) as process:

        def saved() -> bool:
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
            return any(tmp_path.glob("outputs/runs/*/checkpoints/step-*"))

        wait_until(saved)
    (path,) = list_runs(tmp_path / "outputs")
    last = max(load_training_log(path).training["train/loss"].steps)
    end = max(last + 10, 20) // 5 * 5

    changed = ("resume=last", f"training.max_steps={end}", "optimizer.learning_rate=0.001")
    done = command(*changed, cwd=tmp_path, MLFLOW_TRACKING_URI=nobody)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert f"deliver the rest with: python -m manual_backprop.sync {path}" in done.stderr

    store = tmp_path / "mlflow.db"
    store.write_bytes(empty_store.read_bytes())
    sent = command("last", cwd=tmp_path, module="manual_backprop.sync")
    assert (sent.returncode, sent.stderr) == (0, "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    assert sync(["last"]) == 0  # now there is nothing to do

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
