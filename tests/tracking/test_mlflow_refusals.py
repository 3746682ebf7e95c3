"""MLflow that refuses a part of a run: the rest arrives, the status always, and one sentence says what is missing."""

import io
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from manual_backprop.checkpoints.checkpoint import CheckpointManager
from manual_backprop.config.rules import Tags
from manual_backprop.sync import main as sync
from manual_backprop.tracking import create_run_directory, open_tracker
from manual_backprop.tracking.late_delivery import next_in_mlflow
from manual_backprop.tracking.mlflow_delivery import MlflowDelivery
from manual_backprop.tracking.mlflow_messages import one_line, where_to_look, without_credentials
from manual_backprop.tracking.run_directory import RunDirectory, read_run
from manual_backprop.tracking.tracker import LocalTracker


@pytest.fixture
def store(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a project in the working directory, whose outputs directory is `tmp_path / "outputs"`."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return tmp_path / "mlflow.db"


@pytest.fixture
def server(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """MLflow's own, but for what it refuses: metrics whose names begin with "bad", models (as before its version 3),
    and artifacts, whose place it tells without serving it, and which cannot be made."""
    from mlflow.server import app, handlers
    from werkzeug.serving import make_server
    from werkzeug.wrappers import Request, Response

    (tmp_path / "outputs").mkdir()
    (tmp_path / "outputs/file").write_text("no folder")
    root = str(tmp_path / "outputs/file/artifacts")
    monkeypatch.setattr(
        handlers, "_tracking_store", handlers._tracking_store_registry.get_store(f"sqlite:///{store}", root)
    )

    def refusing(environ: dict[str, Any], start_response: Callable[..., Any]) -> Any:
        request = Request(environ)
        if "logged-models" in request.path:
            return Response("<!doctype html><title>404 Not Found</title>", 404)(environ, start_response)
        environ["wsgi.input"] = io.BytesIO(request.get_data())  # which can be read once
        names = [metric["key"] for metric in (request.get_json(silent=True) or {}).get("metrics", [])]
        if any(name.startswith("bad") for name in names):
            said = {"error_code": "INVALID_PARAMETER_VALUE", "message": f"no metric {names[0]}, says this server"}
            return Response(json.dumps(said), 400, content_type="application/json")(environ, start_response)
        return app(environ, start_response)

    served = make_server("127.0.0.1", 0, refusing, threaded=True)
    thread = threading.Thread(target=served.serve_forever)
    thread.start()
    address = f"http://127.0.0.1:{served.server_port}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    yield address
    served.shutdown()
    thread.join()


def a_run(root: Path, steps: int = 300) -> RunDirectory:
    """One that has ended, with a checkpoint."""
    run = create_run_directory(root, "refused")
    tracker = open_tracker("mlflow", run, root=root, experiment_name="lab", run_name="refused")
    tracker.log_parameters({"seed": 1})
    tracker.set_tags({"device": "cpu", "a//b": "which no MLflow takes"})
    (run.path / "config.yaml").write_text("seed: 1\n")
    (run.path / "notes.txt").write_text("notes\n")
    for name in ("config.yaml", "notes.txt"):
        tracker.log_artifact(run.path / name)
    for step in range(1, steps + 1):
        tracker.log(step, {"train/loss": 1 / step, "bad/one": step, "gradient_norm": 2.0})
    CheckpointManager(run.checkpoints).save(steps, {}, {"metrics_length": tracker.sync()}, 1.0)
    tracker.finish("FINISHED")
    run.release()
    return run


def test_what_a_server_takes_is_there_and_what_it_refuses_is_named(server: str, tmp_path: Path, caplog, capsys) -> None:
    from mlflow import MlflowClient

    run = a_run(tmp_path / "outputs")
    (line,) = [record.getMessage() for record in caplog.records if record.name == "manual_backprop.tracking"]
    for _ in range(2):  # delivered again, it says the same, and ends well
        known = read_run(run.path)["mlflow"]
        found = MlflowClient(server).get_run(known["run_id"])
        assert found.info.status == known["status"] == "FINISHED"
        assert found.data.params == {"seed": "1"}
        assert found.data.tags["device"] == "cpu"
        assert set(found.data.metrics) == {"train/loss", "gradient_norm"}
        assert len(MlflowClient(server).get_metric_history(known["run_id"], "train/loss")) == 300
        assert set(known["refused"]) == {"tag a//b", "metric bad/one", "artifacts"}
        for said in ("the tag a//b (", "the metric bad/one (", "says this server)", "the artifacts (NotADirectory"):
            assert line.count(said) == 1, line
        assert "mlflow server --serve-artifacts" in line
        assert line.endswith(f"deliver the rest with: python -m manual_backprop.sync {run.path}")
        assert sync([str(run.path)]) == 0
        line, errors = (text.strip() for text in capsys.readouterr())
        assert f"is delivered to {server}, experiment lab. It refuses the " in line
        assert errors == ""
    assert next_in_mlflow(run.path, "see it") == f"{server}/#/experiments/{known['experiment_id']} # see it"


def test_a_server_without_models(server: str, store: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("manual_backprop.tracking.mlflow_delivery.is_servable", lambda checkpoint: True)
    monkeypatch.setattr(
        "manual_backprop.tracking.mlflow_delivery.parameters_digest", lambda checkpoint: "of its parameters"
    )
    run = create_run_directory(tmp_path / "outputs", "models")
    CheckpointManager(run.checkpoints).save(1, {}, {}, 1.0)
    LocalTracker(run.path, "lab", "models").finish()
    monkeypatch.setattr(MlflowDelivery, "_link_checkpoints", lambda self: True)  # they have a place elsewhere
    delivery = MlflowDelivery(run.path, tmp_path / "outputs")
    delivery.deliver(final=True)
    assert list(delivery.refused) == ["model"]
    assert "error code 404" in delivery.refusal_message()
    assert "A server needs MLflow 3 for models" in delivery.refusal_message()
    assert "html" not in delivery.refusal_message()
    run.release()


@pytest.mark.parametrize("what", ["experiment", "run"])
def test_deleted_in_the_ui_while_it_goes_on(what: str, store: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    client, root = MlflowClient(f"sqlite:///{store}"), tmp_path / "outputs"
    run = create_run_directory(root, "deleted")
    tracker = LocalTracker(run.path, "lab", "deleted")
    tracker.log_parameters({"seed": 1})
    delivery = MlflowDelivery(run.path, root)
    tracker.log(1, {"x": 1})
    delivery.deliver()
    before = client.get_run(run.read()["mlflow"]["run_id"]).info
    if what == "run":
        client.delete_run(before.run_id)
    else:
        client.delete_experiment(before.experiment_id)
    tracker.log(2, {"x": 2})
    tracker.finish()
    delivery.deliver(final=True)
    after = client.get_run(run.read()["mlflow"]["run_id"])
    assert (after.info.run_id == before.run_id) == (what == "experiment")
    assert (after.info.status, after.info.lifecycle_stage) == ("FINISHED", "active")
    assert [point.step for point in client.get_metric_history(after.info.run_id, "x")] == [1, 2]
    assert after.data.params == {"seed": "1"}
    assert delivery.refused == {}
    run.release()


def test_a_dead_run_that_mlflow_has_no_more_stops_no_delivery(store: Path, tmp_path: Path, capsys) -> None:
    root = tmp_path / "outputs"
    gone, run = create_run_directory(root, "gone"), create_run_directory(root, "there")
    for one in (gone, run):
        LocalTracker(one.path, "lab", one.run_id)
    MlflowDelivery(gone.path, root).deliver()
    gone.update(mlflow={**gone.read()["mlflow"], "run_id": "0" * 32})
    gone.release()
    LocalTracker(run.path, "lab", "there").finish()
    run.release()
    assert sync([run.run_id]) == 0
    assert capsys.readouterr().err == ""


def test_what_mlflow_says_of_a_whole_store_keeps_its_remedy(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    run = create_run_directory(tmp_path / "outputs", "whole")
    LocalTracker(run.path, "lab", "whole").finish()
    run.release()
    with sqlite3.connect(store) as database:
        database.execute("UPDATE alembic_version SET version_num = '451aebb31d03'")
    assert sync([run.run_id]) == 1
    said = capsys.readouterr().err
    assert f"mlflow db upgrade sqlite:///{store} " in said
    assert "pip install --upgrade mlflow" in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", str(tmp_path / "mlruns"))
    assert sync([run.run_id]) == 1
    said = capsys.readouterr().err
    assert "MLFLOW_TRACKING_URI=sqlite:///mlflow.db" in said
    assert "mlflow migrate-filestore" in said
    assert next_in_mlflow(run.path, "see it").startswith(f"python -m manual_backprop.sync {run.run_id} ")


def test_no_secret_is_shown_or_stored(store: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    for uri, shown in {
        "http://anna:geheim@host:5000/path/": "http://host:5000/path/",
        "https://host/?token=sekret#more": "https://host/",
        "postgresql://anna:geheim@host/lab?password=sekret": "postgresql://host/lab",
        "sqlite:////data/a@b/mlflow.db": "sqlite:////data/a@b/mlflow.db",
    }.items():
        assert without_credentials(uri) == shown
        for quoted in (uri, f"Failed to parse: {uri}/api/2.0", "user anna, password geheim, /?token=sekret/api/2.0"):
            text = one_line(ValueError(quoted), uri)
            assert not any(secret in text for secret in ("geheim", "sekret") if secret in uri), text
    run = create_run_directory(tmp_path / "outputs", "secrets")
    LocalTracker(run.path, "lab", "secrets").finish()
    run.release()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1/?token=sekret")
    assert sync([run.run_id]) == 2
    said = capsys.readouterr().err
    assert "give a token as MLFLOW_TRACKING_TOKEN" in said
    assert "sekret" not in said + "".join(file.read_text() for file in run.path.glob("*.*"))


def test_mlflow_ui_is_named_where_it_shows_something(store: Path, tmp_path: Path, monkeypatch) -> None:
    uri, root = f"sqlite:///{store}", tmp_path / "outputs"

    def look(at: str, **known: str) -> str | None:
        return where_to_look(at, root, {"tracking_uri": without_credentials(at), **known})

    assert where_to_look(uri, root, None) is None
    assert where_to_look(uri, root, {"tracking_uri": "http://elsewhere"}) is None
    assert look(uri) == "mlflow ui"
    assert look("https://anna:geheim@host/x?y=z", experiment_id="3") == "https://host/x/#/experiments/3"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://anna:geheim@host/lab")
    assert look("postgresql://anna:geheim@host/lab") == 'mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"'
    (tmp_path / "mlruns").mkdir()  # where a bare one would look first
    assert look(uri) == f"mlflow ui --backend-store-uri {uri}"
    (tmp_path / "mlruns").rmdir()
    monkeypatch.chdir(tmp_path.parent)
    assert look(uri) == f"mlflow ui --backend-store-uri {uri}"


def test_names_of_tags_are_those_that_mlflow_takes() -> None:
    from mlflow.exceptions import MlflowException
    from mlflow.utils.validation import _validate_tag

    for name in (
        "a",
        "a b",
        "a/b",
        "a.b",
        ".a",
        "a..",
        "é",
        "_",
        "x" * 250,
        "a//b",
        "/a",
        "a/",
        "..",
        "..a",
        ".",
        "./a",
    ):
        rule, mlflow = True, True
        try:
            Tags().read({name: "1"})
        except ValueError:
            rule = False
        try:
            _validate_tag(name, "1")
        except MlflowException:
            mlflow = False
        assert rule == mlflow, name
