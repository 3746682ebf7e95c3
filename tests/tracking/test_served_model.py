"""A finished run in MLflow: its model loads without a pickle and is served, and everything else of the run is there."""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_tools import newest, same_process, train

from manual_backprop.common.errors import CheckpointError, InputError, NotFiniteError
from manual_backprop.common.uris import path_of
from manual_backprop.tracking.late_delivery import deliver_run
from manual_backprop.tracking.mlflow_model import is_servable, write_model
from manual_backprop.tracking.run_directory import read_run
from manual_backprop.trained_models.served import ServedModel, ServedSequences

OPTIONS = ("tracking=mlflow", "training.max_steps=6", "training.save_every=2", "training.eval_every=2")


@pytest.fixture(scope="module")
def variables() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_NAME"):
            patch.delenv(name, raising=False)
        yield patch


@pytest.fixture(scope="module")
def run(text: Path, empty_store: Path, tmp_path_factory: pytest.TempPathFactory, variables: pytest.MonkeyPatch) -> Path:
    """The directory of a run that has finished and is delivered."""
    root = tmp_path_factory.mktemp("served")
    shutil.copy(empty_store, root / "mlflow.db")
    with same_process():
        path = train(root, text, *OPTIONS)
    assert read_run(path)["mlflow"]["delivered"] is True
    variables.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{root / 'mlflow.db'}")
    return path


@pytest.fixture(scope="module")
def logged(run: Path) -> Any:
    """The same run, as MLflow has it."""
    from mlflow import MlflowClient

    return MlflowClient().get_run(read_run(run)["mlflow"]["run_id"])


@pytest.fixture(scope="module")
def model(logged: Any) -> Path:
    """Where its model lies."""
    from mlflow import MlflowClient

    (output,) = logged.outputs.model_outputs
    assert output.step == 6
    found = MlflowClient().get_logged_model(output.model_id)
    assert (found.status, found.name, found.source_run_id) == ("READY", "model", logged.info.run_id)
    place = path_of(found.artifact_location)
    assert place is not None
    return place


def test_continuations(logged: Any, model: Path) -> None:
    import mlflow
    import numpy
    import pandas

    loaded = mlflow.pyfunc.load_model(f"runs:/{logged.info.run_id}/model")
    params = {"max_length": 5, "seed": 3}
    texts = loaded.predict(["the cat", "an owl"], params=params)
    assert [type(text) for text in texts] == [str, str]
    assert all(len(text) <= 5 for text in texts)
    assert loaded.predict(pandas.DataFrame({"text": ["the cat", "an owl"]}), params=params) == texts
    assert loaded.predict(numpy.array(["the cat", "an owl"]), params=params) == texts
    assert loaded.predict("the cat", params=params) == texts[:1]
    assert loaded.predict(["the cat"]) == loaded.predict(["the cat"]), "the same seed, the same text"
    assert loaded.predict(["the cat"]) != loaded.predict(["the cat"], params={"seed": 4})
    assert len(loaded.predict(["the cat"], params={"temperature": 0.0})) == 1
    (again,) = mlflow.pyfunc.load_model(f"models:/{logged.outputs.model_outputs[0].model_id}").predict(
        "", params=params
    )
    assert isinstance(again, str), "an empty text begins at the end token"


def is_a_pickle(content: bytes) -> bool:
    try:
        return len(list(pickletools.genops(content))) > 0
    except (ValueError, UnicodeDecodeError):
        return False


def test_a_pickle_is_seen_to_be_one() -> None:
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert is_a_pickle(pickle.dumps({"weight": [1.5, "x"]}, protocol))


def test_nothing_in_it_is_a_pickle_or_a_copy(run: Path, model: Path) -> None:
    files = {str(path.relative_to(model)) for path in model.rglob("*") if path.is_file()} - {"registered_model_meta"}
    (checkpoint,) = model.glob("step-*")
    inside = ("manifest.json", "state.json", "parameters.safetensors", "tokenizer.json")
    assert files == {
        *("MLmodel", "requirements.txt", "python_env.yaml"),
        *(f"{checkpoint.name}/{name}" for name in inside),
    }
    for name in files:
        content = (model / name).read_bytes()
        assert b"cloudpickle" not in content
        assert not is_a_pickle(content), name
    for name in inside[1:]:
        assert (checkpoint / name).samefile(run / "checkpoints" / checkpoint.name / name)
    assert f"torch=={__import__('torch').__version__.partition('+')[0]}" in (model / "requirements.txt").read_text()


def test_it_is_the_best_checkpoint(run: Path, model: Path) -> None:
    from manual_backprop.checkpoints.checkpoint import CheckpointManager

    best = CheckpointManager(run / "checkpoints").best()
    assert best is not None
    assert (model / best.name / "parameters.safetensors").samefile(best / "parameters.safetensors")


def test_a_flipped_bit_is_refused(run: Path, tmp_path: Path) -> None:
    (checkpoint,) = (run / "checkpoints").glob("step-000006")
    for name in ("parameters.safetensors", "tokenizer.json", "state.json", "manifest.json"):
        write_model(tmp_path / "model", checkpoint, "r", "m-1")
        file = tmp_path / "model" / checkpoint.name / name
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.unlink()  # it is a hard link
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=name if name != "manifest.json" else "damaged"):
            ServedModel(file.parent)


def test_an_encoder_decoder_is_served_as_symbols(tmp_path: Path) -> None:
    """As MLflow loads it: the answers of the library, for texts of symbols; its checkpoint has no tokenizer."""
    import mlflow

    from manual_backprop import EncoderDecoderWrapper

    wrapper = EncoderDecoderWrapper(vocab_size=13, d_model=16, n_blocks=1, n_heads=2, d_ffn=16, max_seq_len=8)
    sources, targets = [[1, 2, 3], [4, 5]], [[3, 2, 1], [5, 4]]
    for _ in range(80):
        wrapper.train_step(sources, targets, learning_rate=0.3)
    checkpoint = wrapper.save_checkpoint(tmp_path)
    assert is_servable(checkpoint)
    write_model(tmp_path / "model", checkpoint, "r", "m-1")
    served = mlflow.pyfunc.load_model(str(tmp_path / "model"))
    assert served.predict(["1 2 3", "4 5"]) == ["3 2 1", "5 4"]
    assert served.predict(["1 2 3"], params={"beams": 3, "max_length": 2}) == ["3 2"]
    with pytest.raises(InputError, match="'a b' is not a source: expected symbols"):
        ServedSequences(checkpoint).predict(["a b"])


def test_what_cannot_be_continued_is_named(run: Path) -> None:
    served = ServedModel(run / "checkpoints" / "step-000006")
    with pytest.raises(InputError, match="3 is not a text"):
        served.predict([3])
    with pytest.raises(InputError, match="no parameter 'max_lenth': expected max_length"):
        served.predict(["a"], {"max_lenth": 3})
    with pytest.raises(InputError, match="temperature=-1"):
        served.predict(["a"], {"temperature": -1})
    with pytest.raises(InputError, match="expected texts"):
        served.predict(3)


def test_delivered_again_it_is_one_model(run: Path, logged: Any, model: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    before = (model / "MLmodel").stat().st_mtime_ns
    deliver_run(str(run), run.parent.parent)
    assert len(client.get_run(logged.info.run_id).outputs.model_outputs) == 1
    assert (model / "MLmodel").stat().st_mtime_ns == before
    # as after a kill between two of its steps
    model_id = logged.outputs.model_outputs[0].model_id
    client.finalize_logged_model(model_id, "FAILED")
    (model / "MLmodel").unlink()
    deliver_run(str(run), run.parent.parent)
    assert (model / "MLmodel").exists()
    assert client.get_logged_model(model_id).status == "READY"
    assert len(client.get_run(logged.info.run_id).outputs.model_outputs) == 1
    assert len(client.search_logged_models([logged.info.experiment_id])) == 1


def test_the_rest_of_the_run(run: Path, logged: Any) -> None:
    from mlflow import MlflowClient

    from manual_backprop.tracking import load_training_log

    assert {name for name in logged.data.metrics if name.startswith("system/")} >= {
        *("system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"),
    }
    assert not any(name.startswith("system/") for name in load_training_log(run).training)
    (given,) = logged.inputs.dataset_inputs
    assert given.dataset.digest == logged.data.tags["dataset_digest"][:36]
    assert json.loads(given.dataset.profile)["train_bytes"] > 1000
    assert {"vocab_size": "257", "mlflow.data.context": "training"}.items() <= {
        tag.key: tag.value for tag in given.tags
    }.items()
    assert logged.data.tags["gradient_check"] == "passed"
    assert "gradient check: passed" in (run / "run.log").read_text()
    files = {file.path for file in MlflowClient().list_artifacts(logged.info.run_id)}
    assert {"packages.txt", "gradient_check.txt", "config.yaml", "training_progress.png"} <= files


def test_a_run_that_fails_has_its_traceback_there_and_its_last_loss(run: Path, text: Path) -> None:
    from mlflow import MlflowClient

    from manual_backprop.tracking import load_training_log

    root = run.parent.parent.parent
    diverging = ("optimizer.learning_rate=1e30", "schedule=constant", "schedule.warmup_ratio=0", "optimizer=sgd")
    with pytest.raises(NotFiniteError), same_process():
        train(root, text, *OPTIONS, "training.eval_every=1000", *diverging)
    failed = newest(root)
    loss = load_training_log(failed).training["train/loss"]
    assert not all(value - value == 0 for value in loss.values), "the loss that ended it is there"
    found = MlflowClient().get_run(read_run(failed)["mlflow"]["run_id"])
    assert found.info.status == "FAILED"
    assert "traceback.txt" in {file.path for file in MlflowClient().list_artifacts(found.info.run_id)}
    assert not found.outputs.model_outputs, "no model of a run that failed"
    assert found.data.metrics["nonfinite_steps"] >= 1


@pytest.mark.slow
def test_it_is_served(logged: Any, model: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder = str(Path(sys.executable).parent)
    environment = os.environ | {
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    command = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1", "--model-uri", f"runs:/{logged.info.run_id}/model"]
    with (tmp_path / "said").open("w") as said:
        server = subprocess.Popen(
            command, stdout=said, stderr=said, env=environment, cwd=tmp_path, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, (tmp_path / "said").read_text()
            assert time.monotonic() < deadline, (tmp_path / "said").read_text()
            time.sleep(0.2)
        answers = []
        for given in (
            {"inputs": ["the cat"]},
            {"instances": ["the cat"]},
            {"dataframe_split": {"columns": ["text"], "data": [["the cat"]]}},
        ):
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/invocations",
                json.dumps(given | {"params": {"max_length": 6}}).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as response:
                answers.append(json.load(response)["predictions"])
        assert answers[0] == answers[1] == answers[2]
        assert isinstance(answers[0][0], str)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)
