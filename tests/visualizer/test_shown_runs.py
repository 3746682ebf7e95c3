"""The shown runs: the command, tables, exports, a model on a text, MLflow."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import time
from pathlib import Path

import numpy as np
import pytest
from logged_runs import log_of, write_run
from run_tools import same_process

from manual_backprop.common.errors import InputError
from manual_backprop.common.uris import sqlite_uri
from manual_backprop.compare import main as compare
from manual_backprop.tracking import TrainingLogger, create_run_directory, load_training_log
from manual_backprop.training.command_line import check
from manual_backprop.training.runner import run_job
from manual_backprop.visualize import main as visualize
from manual_backprop.visualizer import estimate_model_params
from manual_backprop.visualizer.mlflow_store import ServerStore
from manual_backprop.visualizer.runs import labels_of, named_runs, status_of
from manual_backprop.visualizer.series import View
from manual_backprop.visualizer.server import open_session
from manual_backprop.visualizer.session import as_json
from manual_backprop.visualizer.tables import best_run, configs, summary

# The command


def test_wrong_arguments(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for arguments, words in (
            (["nothing"], "there is no run 'nothing'"),
            (["--port", "65536"], "must be at most 65535"),
            (["--port", str(port)], f"cannot listen there: it is in use; try --port {port + 1}"),
            (["--host", "nowhere.invalid"], "cannot listen there"),
            (["--export", "runs.txt"], "must end in .html"),
            (["--text", "x"], "needs --export FILE.html"),
            (["--prot", "1"], "did you mean --port"),
        ):
            with pytest.raises(InputError, match=re.escape(words)):
                visualize(arguments)


def test_runs_are_named_as_everywhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    (newest, *_) = open_session().chosen()
    own = tmp_path / "my_run"
    TrainingLogger(own).log_step(1, {"train/loss": 1.0})
    given = [
        newest[-6:],
        newest,
        f"outputs/runs/{newest}",
        str(own),
        str(own / "metrics.jsonl"),
        f"../{root.name}/outputs/runs/{newest}",
    ]
    assert open_session(given).chosen() == [newest, "my_run"], "each once"
    sweep = root / "outputs" / "sweeps" / "20260101-000000-a-sweep-abcdef"
    (sweep / "jobs").mkdir(parents=True)
    job = {"number": 0, "overrides": [], "swept": ["seed=1"], "run_directory": f"/elsewhere/{newest}"}
    (sweep / "jobs" / "0000.json").write_text(json.dumps(job))
    content = json.loads((root / "outputs" / "runs" / newest / "run.json").read_text()) | {"run_id": sweep.name}
    (sweep / "run.json").write_text(json.dumps(content))
    for name in (str(sweep), "abcdef", sweep.name):
        assert open_session([name]).chosen() == [newest]
    assert named_runs(["abcdef", newest], root / "outputs") == [root / "outputs" / "runs" / newest]
    shutil.rmtree(sweep)
    same = [str(shutil.copytree(own, tmp_path / place / own.name)) for place in "ab"]
    assert open_session([newest, str(own), *same, *same]).chosen() == [newest, "my_run", "a-my_run", "b-my_run"]


# Tables


def test_what_differs_comes_first_and_where_it_came_from(tmp_path: Path) -> None:
    logs = {}
    for rate in (1e-3, 3e-3):
        path = write_run(tmp_path, config={"seed": 1, "optimizer": {"learning_rate": rate}}, losses=[rate] * 2)
        (path / "config_sources.json").write_text(json.dumps({"optimizer.learning_rate": "command line"}))
        logs[f"{rate:g}"] = load_training_log(path)
    first, second = configs(logs)
    assert first == {
        "key": "optimizer.learning_rate",
        "values": ["0.001", "0.003"],
        "sources": ["command line"] * 2,
        "differs": True,
    }
    assert (second["key"], second["differs"], second["sources"]) == ("seed", False, ["", ""])


def test_the_summary(tmp_path: Path) -> None:
    made = {"processor": "a processor", "threads": 2, "commit": "0123456789abcdef and changes"}
    log = log_of(
        tmp_path, validation={10: 4.0, 20: 3.0, 30: math.nan}, made_with=made, model={"parameters": 77, "d_model": 4}
    )
    found = summary(log)
    assert (found["best"], found["best at step"], found["steps"], found["tokens"], found["FLOPs"]) == (
        3.0,
        20,
        30,
        3000,
        3e10,
    )
    assert math.isnan(found["last"])
    assert (found["parameters"], found["machine"], found["commit"]) == (77, "a processor, 2 threads", "0123456789ab")
    score = {"best_metric": "validation/loss", "best_is_highest": True}
    high, low = (log_of(tmp_path, validation={10: value, 20: 0.5}, **score) for value in (0.9, 0.8))
    assert summary(high)["best"] == 0.9
    assert best_run({"low": low, "high": high}) == "high"
    worse = log_of(tmp_path, validation={10: 3.5})
    other = log_of(tmp_path, validation={10: 3.5}, best_metric="validation/rmse")
    assert best_run({"a": log, "b": worse}) == "a"
    assert best_run({"a": log, "b": other}) is None, "they measure different things"


def test_compare_writes_the_same_as_a_table(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import csv

    runs = [str(path) for path in sorted((root / "outputs" / "runs").iterdir())][:3]
    assert compare([*runs, runs[0], "--csv", str(tmp_path / "runs.csv")]) == 0
    assert "table: " in capsys.readouterr().out
    with (tmp_path / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    logs = {str(path): load_training_log(path) for path in runs}
    assert [row["name"] for row in rows] == [*labels_of(logs).values()]
    assert [float(row["best"]) for row in rows] == [summary(log)["best"] for log in logs.values()]
    assert sorted(row["is best"] for row in rows) == ["", "", "yes"]
    with pytest.raises(InputError, match=r"must end in \.csv"):
        compare([*runs, "--csv", "runs.txt"])


# Export


def test_an_export_holds_everything(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(root)
    file = tmp_path / "runs.html"
    assert visualize(["--export", str(file)]) == 0
    assert f"wrote {file}" in capsys.readouterr().out
    page = file.read_text(encoding="utf-8")
    for part in ('<link rel="stylesheet"', "<script src=", "<img src=", "@import"):
        assert part not in page
    content = re.search(r'<script type="application/json" id="exported">(.*?)</script>', page, flags=re.DOTALL)
    assert content is not None
    answers = json.loads(content[1])
    assert [*answers["curves"]] == ["step", "relative", "tokens", "flops", "seconds", "epochs"]
    assert answers["table"]["chosen"] == open_session().chosen()
    assert answers["pictures"]["runs"][0]["inside"]["loss_curves.png"].startswith("data:image/png;base64,")
    assert page.count("<script>alert(") == 0, "a run's name is text"


# A trained model


def test_a_model_at_a_text(finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The attention of every head sums to 1 and sees no later position; the five likeliest tokens are those of the
    model's logits. The page is exported to a file."""
    from manual_backprop.trained_models.saved_model import load

    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    session = open_session([str(finished)])
    answer = session.model(finished.name, "the cat")
    assert answer["tokens"] == ["t", "h", "e", "␣", "c", "a", "t"]
    saved = load(str(finished), device="cpu")
    import torch

    logits = saved.model.forward(torch.tensor([saved.tokenizer().encode("the cat")]))["logits"]
    assert logits is not None
    shares, _ = logits[0].double().softmax(-1).topk(5)
    assert np.array([[share for _, share in place] for place in answer["next"]]) == pytest.approx(
        shares.numpy(), rel=1e-4
    )
    config = saved.model.config
    assert [one["name"] for one in answer["maps"]] == [f"blocks.{block}.attention" for block in range(config.n_blocks)]
    for one in answer["maps"]:
        assert len(one["figure"]["data"]) == config.n_heads
        for heat in one["figure"]["data"]:
            assert heat["customdata"].sum(1) == pytest.approx(np.ones(7), rel=1e-5)
            assert np.isnan(heat["z"]).sum() == 7 * 6 / 2
            assert not np.triu(heat["customdata"], 1).any()
    monkeypatch.chdir(tmp_path)
    assert visualize([str(finished), "--text", "the cat", "--export", "model.html"]) == 0
    assert '"tokens":["t","h","e"' in (tmp_path / "model.html").read_text(encoding="utf-8")
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()} == before
    assert len(session.model(finished.name, "the cat saw the owl")["tokens"]) == config.max_seq_len
    assert "The first 8 of 19 tokens" in session.model(finished.name, "the cat saw the owl")["note"]
    with pytest.raises(InputError, match="characters: give at most"):
        session.model(finished.name, "x" * 10_001)


@pytest.mark.parametrize("implementation", ["torch", "baseline"])
def test_a_model_that_another_implementation_has_trained(implementation: str, finished: Path, tmp_path: Path) -> None:
    """The same weights with another implementation give the same view."""
    run = Path(shutil.copytree(finished.parent.parent, tmp_path / "outputs")) / "runs" / finished.name
    from manual_backprop.checkpoints.checkpoint import CheckpointManager

    manager = CheckpointManager(run / "checkpoints", keep=None)
    best = manager.best()
    assert best is not None
    saved = manager.load(best)
    state = json.loads(json.dumps(saved.state))
    state["config"]["implementation"] = {
        "name": implementation,
        **({"compile": "never"} if implementation == "baseline" else {}),
    }
    shutil.rmtree(best)
    manager.save(saved.step, saved.tensors, state, saved.metric, files=[run / "tokenizer.json"])
    mine = open_session([str(run)]).model(run.name, "owl")
    theirs = open_session([str(finished)]).model(finished.name, "owl")
    assert mine["model"].startswith(f"{implementation} (")
    for one, other in zip(mine["maps"], theirs["maps"], strict=True):
        assert as_json(one) == as_json(other)


@pytest.mark.parametrize("network", ["encoder_decoder", "decoder"])
def test_a_model_of_sequences(network: str, tmp_path: Path) -> None:
    """Numbers, and what the model generates from them; for an encoder-decoder also the cross-attention."""
    options = ("model=tiny", "model.d_model=16", "model.n_heads=2", "model.d_ffn=16", "training.max_steps=2")
    options += ("task=reversal", f"network={network}", "tracking=none", "device=cpu", "kernels.compile=never")
    rows = [f"task.{split}_rows=8" for split in ("training", "validation", "test")]
    with same_process():
        run_job(check([*options, *rows, "training.batch_size=4"]).jobs[0].config, tmp_path)
    session = open_session(root=tmp_path / "outputs")
    (run,) = session.chosen()
    assert session.table()["runs"][0]["metric"] == "validation/exact_match"
    log = session.runs.log(run)
    assert estimate_model_params(log.config) == estimate_model_params(log) == log.model["parameters"]
    answer = session.model(run, "1 2 3 4")
    maps = {one["name"]: one["figure"]["data"] for one in answer["maps"]}
    written = len(answer["tokens"])
    if network == "decoder":
        assert answer["tokens"][:5] == ["1", "2", "3", "4", "<sep>"]
        assert [*maps] == ["blocks.0.attention", "blocks.1.attention"]
    else:
        assert answer["tokens"][0] == "<bos>"
        (heat, _) = maps["decoder.blocks.1.cross_attention"]
        assert heat["x"] == ["0 1", "1 2", "2 3", "3 4"]
        assert heat["customdata"].shape == (written, 4)
        assert answer["maps"][-1]["figure"]["layout"]["xaxis"]["type"] == "category", (
            "plotly would take 0 1 for a number"
        )
        assert maps["encoder.blocks.0.attention"][0]["customdata"].shape == (4, 4)
        assert maps["decoder.blocks.0.attention"][0]["customdata"].shape == (written, written)
    for heats in maps.values():
        for heat in heats:
            assert heat["customdata"].sum(1) == pytest.approx(np.ones(len(heat["y"])), rel=1e-5)
    assert len(answer["next"]) == written
    with pytest.raises(InputError, match="is not a symbol of this run"):
        session.model(run, "the cat")


# MLflow


def test_runs_that_only_mlflow_has(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its database, which is not changed: the same as from the run's directory, and no run twice."""
    from manual_backprop.tracking.mlflow_delivery import MlflowDelivery
    from manual_backprop.tracking.tracker import LocalTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tmp_path = tmp_path / "exp#2 a%20b"  # where a path that is taken for a URI goes wrong
    tmp_path.mkdir()
    shutil.copy2(empty_store, tmp_path / "mlflow.db")
    directory = create_run_directory(tmp_path / "outputs", "a & b")
    tracker = LocalTracker(directory.path, "manual_backprop", "a & b")
    tracker.log_parameters(
        {"model.d_model": 8, "optimizer.betas": "[0.9, 0.95]", "parameters": 123, "architecture.name": "llama"}
    )
    tracker.set_tags({"tokenizer_digest": "abc"})
    for step, loss in ((1, 3.0), (2, math.nan), (3, math.inf)):
        tracker.log(step, {"train/loss": loss, "flops": 10.0 * step})
    tracker.log(3, {"validation/loss": 2.5})
    tracker.finish()
    MlflowDelivery(directory.path, tmp_path / "outputs").deliver(final=True)
    directory.release()
    local = load_training_log(directory.path)
    (row,) = open_session(root=tmp_path / "outputs").table()["runs"]
    assert row["id"] == directory.run_id, "it is here, too"
    shutil.rmtree(tmp_path / "outputs")
    before, there = (tmp_path / "mlflow.db").read_bytes(), sorted(os.listdir(tmp_path))
    session = open_session(["a & b"], root=tmp_path / "outputs")
    (row,) = session.table()["runs"]
    assert (row["name"], row["status"], row["steps"], row["best"], row["parameters"]) == (
        "a & b",
        "FINISHED",
        3,
        2.5,
        123,
    )
    assert row["architecture"] == "llama"
    (run,) = session.chosen()
    log = session.runs.log(run)
    for name in ("train/loss", "flops"):
        assert log.training[name].steps == local.training[name].steps
        assert str(log.training[name].values) == str([float(value) for value in local.training[name].values])
    assert log.config["model"] == {"d_model": 8}
    assert log.config["optimizer"] == {"betas": [0.9, 0.95]}
    assert log.tags["tokenizer_digest"] == "abc"
    assert session.runs.log(run) is log, "nothing has come"
    server = ServerStore(sqlite_uri(tmp_path / "mlflow.db"))  # what a server is asked, of the same store
    (asked,) = server.rows()
    assert asked | {"steps": 3} == row
    other = server.read(run)
    assert (str(other.training), other.validation, other.config, other.tags) == (
        *(str(log.training), log.validation, log.config),
        log.tags,
    )
    as_json([session.curves([run], View()), session.compute([run]), session.tables([run])])
    with pytest.raises(InputError, match="its checkpoints are not available here"):
        session.model(run, "x")
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == there


def test_a_store_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(b"no database at all")
    write_run(tmp_path)
    assert len(open_session(root=tmp_path / "outputs").table()["runs"]) == 1


def test_two_hundred_runs(tmp_path: Path) -> None:
    """In the table within a second without a cache: only the evaluations and the last line of each run are read."""
    first = write_run(tmp_path, losses=[3.0] * 300, every=1, validation=dict.fromkeys(range(10, 301, 10), 2.0))
    for number in range(199):
        shutil.copytree(first, first.with_name(f"20260101-000000-run-{number:06d}"))
    begin = time.process_time()
    rows = open_session(root=tmp_path / "outputs").table()["runs"]
    assert time.process_time() - begin < 1
    assert len(rows) == 200
    assert {(row["steps"], row["best"]) for row in rows} == {(300, 2.0)}


def test_statuses() -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    assert status_of({"status": "RUNNING", "owner": here}) == "RUNNING"
    assert status_of({"status": "RUNNING", "owner": here | {"pid": 2**22 + 1}}) == "DEAD"
    assert status_of({"status": "RUNNING", "owner": {"host": "another", "pid": 2**22 + 1}}) == "RUNNING", "nobody knows"
    assert status_of({"status": "FINISHED", "owner": here | {"pid": 2**22 + 1}}) == "FINISHED"
    assert status_of({}) == ""
