"""The page's server, over real HTTP: what it answers, and whom it refuses. A browser looks at it in test_page.py."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import numpy as np
import pytest
import uvicorn
from logged_runs import log_of, write_run

from manual_backprop.common.errors import InputError
from manual_backprop.compare import main as compare
from manual_backprop.tracking import TrainingLogger, create_run_directory, load_training_log
from manual_backprop.visualize import main as visualize
from manual_backprop.visualizer import create_app
from manual_backprop.visualizer.mlflow_store import ServerStore
from manual_backprop.visualizer.runs import labels_of, named_runs, status_of
from manual_backprop.visualizer.series import View
from manual_backprop.visualizer.server import launch, open_session
from manual_backprop.visualizer.session import as_json
from manual_backprop.visualizer.tables import best_run, configs, summary


class Site:
    def __init__(self, port: int, before: str = ""):
        self.port, self.before = port, before

    def get(self, path: str, method: str = "GET", body: str | None = None, **headers: str) -> tuple[int, bytes, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(
                method, self.before + path, body, {name.replace("_", "-"): value for name, value in headers.items()}
            )
            answer = connection.getresponse()
            return answer.status, answer.read(), answer.headers
        finally:
            connection.close()

    def json(self, path: str, runs: list[str] = [], **given: Any) -> Any:  # noqa: B006
        query = urlencode([*(("run", run) for run in runs), *given.items()])
        status, content, _ = self.get(f"/api/{path}?{query}")
        answer = json.loads(content)
        assert status == 200, answer
        return answer


@contextmanager
def serving(app: Any) -> Iterator[int]:
    """A port at which uvicorn serves the application, as `launch` has it."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(10)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("visualizer")
    for number, name in enumerate(["first", "same", "same", "<script>alert('$x$')</script>", "last"]):
        path = write_run(root, name, losses=[5.0 - number] * 3, validation={15: 6.0 - number, 30: 5.5 - number})
        (path / "samples" / "step-000015.txt").write_text(f"a {number}\n\n----\n\nb\n")
        (path / "loss_curves.png").write_bytes(b"\x89PNG\r\n")
        (path / "link.png").symlink_to("/etc/hostname")
    (path / "samples" / "step-000030.txt").write_text("late\n")
    return root


@pytest.fixture(scope="module")
def site(root: Path) -> Iterator[Site]:
    with serving(create_app(root=root / "outputs")) as port:
        yield Site(port)


def test_the_newest_four_are_chosen(site: Site) -> None:
    table = site.json("runs")
    names = [row["name"] for row in table["runs"]]
    assert names == ["last", "<script>alert('$x$')</script>", "same", "same", "first"]
    assert table["chosen"] == [row["id"] for row in table["runs"][:4]]
    row = table["runs"][0]
    assert (row["status"], row["steps"], row["best"], row["metric"]) == ("FINISHED", 30, 1.5, "validation/loss")


def test_all_that_the_page_asks_for(site: Site) -> None:
    ids = [row["id"] for row in site.json("runs")["runs"]]
    answer = site.json("curves", ids[:2], x="flops", log_x=1, smoothing=10)
    assert [chart["key"] for chart in answer["charts"]] == ["loss", "validation", "learning_rate"]
    assert answer["charts"][0]["figure"]["layout"]["xaxis"]["type"] == "log"
    (only,) = site.json("curves", ids[:2], only="tokens_seen", also="tokens_seen")["charts"]
    assert only["figure"]["data"][0]["y"] == {"dtype": "f8", "bdata": "AAAAAABAj0AAAAAAAECfQAAAAAAAcKdA"}
    compute = site.json("compute", ids[:2])
    assert len(compute["table"]["budgets"]) == 401
    assert compute["sentences"] == ["from 1.5e10 to 3.0e10 FLOPs last leads <script>alert('$x$')</script> throughout"]
    tables = site.json("tables", ids[1:4])
    assert tables["best"] == "<script>alert('$x$')</script>"
    assert tables["names"][1:] == [f"same ({ids[2][-6:]})", f"same ({ids[3][-6:]})"], "two of one name"
    samples = site.json("samples", ids[:2], step=20)
    assert [(one["step"], one["texts"]) for one in samples["samples"]] == [(15, ["a 4", "b"]), (15, ["a 3", "b"])]
    assert site.json("samples", ids[:2])["samples"][0]["texts"] == ["late"]
    assert [run["pictures"] for run in site.json("pictures", ids[:2])["runs"]] == [["loss_curves.png"]] * 2
    assert site.get(f"/picture/{ids[0]}/loss_curves.png")[:2] == (200, b"\x89PNG\r\n")


def test_a_run_that_is_asked_for_twice_is_drawn_once(site: Site) -> None:
    (first, *_) = [row["id"] for row in site.json("runs")["runs"]]
    assert len(site.json("curves", [first, first])["charts"][0]["figure"]["data"]) == 2, "training and validation"


def test_the_page_and_its_parts(site: Site) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
        ("/plotly.min.js", "text/javascript"),
    ):
        status, content, headers = site.get(path)
        assert (status, headers["content-type"].partition(";")[0]) == (200, kind)
        assert headers["content-security-policy"].startswith("default-src 'self'")
        assert len(content) > 1000
        if not path.startswith("/plotly"):
            assert not re.search(rb"(?:https?:)?//(?!www\.w3\.org)[a-z]+\.[a-z]", content), "nothing from elsewhere"


PATHS = (
    *("/../setup.cfg", "/..%2f..%2fetc%2fpasswd", "/page/../server.py", "/session.py", "/static/x", "/api/nothing"),
    *("/picture/{id}/run.json", "/picture/{id}/..%2f..%2f..%2fsecret.png", "/picture/{id}/../run.json"),
    *("/picture/{id}/link.png", "/picture/..%2f..%2f/secret.png", "/picture/../secret.png", "/picture/{id}/%00.png"),
    *(
        "/api/curves?run=../../secret",
        "/api/tables?run=%2Fetc",
        "/api/samples?run=..",
        "/api/tick?run={id}%2F..%2F{id}",
    ),
)


@pytest.mark.parametrize("path", PATHS)
def test_no_path_leads_out_of_the_outputs(path: str, site: Site, root: Path) -> None:
    (root / "secret.png").write_bytes(b"\x89PNG secret")
    status, content, _ = site.get(path.replace("{id}", site.json("runs")["runs"][0]["id"]))
    assert status == 404
    assert b"secret\x00" not in content
    assert b"PNG" not in content


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example:80"},
        {"Host": ""},
        {"Host": "[::1"},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"},
        {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(headers: dict[str, str], site: Site) -> None:
    for path in ("/", "/api/runs", "/plotly.min.js"):
        connection = http.client.HTTPConnection("127.0.0.1", site.port, timeout=60)
        connection.putrequest("GET", path, skip_host="Host" in headers)
        for name, value in headers.items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        assert answer.status in (400, 403), path
        assert len(answer.read()) < 200
        connection.close()


def test_this_machines_own_names_are_none_of_them(site: Site) -> None:
    for host in (f"localhost:{site.port}", f"127.0.0.1:{site.port}", f"[::1]:{site.port}"):
        assert site.get("/api/runs", Host=host, Origin=f"http://{host}")[0] == 200


def test_what_is_asked_wrongly_is_answered_in_a_sentence(site: Site) -> None:
    (first, *_) = [row["id"] for row in site.json("runs")["runs"]]
    for query, words in (
        ("curves?x=nothing", "expected one of step"),
        ("curves?smoothing=nan", "smoothing='nan': expected a number"),
        ("curves?low=x&high=1", "expected a number"),
        (f"samples?run={first}&step=1e400", "expected a number"),
        ("tables?run=gone", "there is no run 'gone' here"),
        ("curves?" + "&".join(f"run={number}" for number in range(201)), "at most 200"),
    ):
        status, content, _ = site.get(f"/api/{query}")
        assert status == 404
        assert words in json.loads(content)["error"]
    for body in ("", "[]", "{", '{"run": 3, "text": "x"}', json.dumps({"run": first, "text": "x" * 200_000})):
        assert site.get("/api/model", "POST", body)[0] == 400
    for method in ("POST", "PUT", "DELETE"):
        assert site.get("/api/runs", method)[0] == 405


def test_nothing_is_written(root: Path, site: Site) -> None:
    """Also of a run whose process is gone: it is shown so, and its file still says RUNNING."""

    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.lstat().st_mtime_ns, path.lstat().st_size) for path in root.rglob("*")}

    gone = write_run(root, "gone", status=None)
    content = json.loads((gone / "run.json").read_text())
    content["owner"]["pid"] = 2**22 + 1
    (gone / "run.json").write_text(json.dumps(content))
    try:
        before = state()
        rows = site.json("runs")["runs"]
        assert {row["name"]: row["status"] for row in rows}["gone"] == "DEAD"
        ids = [row["id"] for row in rows]
        for path in ("curves", "compute", "tables", "samples", "pictures", "tick"):
            site.json(path, ids)
        assert site.get(f"/api/export?run={ids[0]}")[0] == 200
        assert state() == before
    finally:
        shutil.rmtree(gone)


# A run that goes on


def test_a_run_grows_and_says_how_it_ends(tmp_path: Path) -> None:
    directory = create_run_directory(tmp_path / "outputs", "growing")
    logger = TrainingLogger(directory.path)
    run = directory.run_id
    with serving(create_app(root=tmp_path / "outputs")) as port:
        site = Site(port)

        def tick() -> dict[str, Any]:
            return site.json("tick", [run])["runs"][run]

        def drawn() -> int:
            data = site.json("curves", [run])["charts"][0]["figure"]["data"]
            return sum(len(trace["x"]["bdata"]) for trace in data if isinstance(trace["x"], dict))

        assert site.json("runs")["runs"][0]["steps"] == 0
        first = tick()
        assert (first["status"], first["step"]) == ("RUNNING", 0)
        logger.log_step(1, {"train/loss": 3.0})
        second = tick()
        assert second["version"] > first["version"]
        assert tick() == second, "nothing new"
        before = drawn()
        logger.log_step(2, {"train/loss": 2.0})
        assert drawn() > before
        assert site.json("runs")["runs"][0]["steps"] == 2
        logger.finish("FAILED")
        assert tick()["status"] == "FAILED"
        directory.resume(1)
        assert tick()["resumes"] == [1]
        assert tick()["status"] == "RUNNING"
    directory.release()


def test_a_tick_of_a_long_run_reads_only_what_is_new(tmp_path: Path) -> None:
    """100,000 rows: the next one costs a small part of what the first reading did, pictures included."""
    path = write_run(tmp_path, losses=[], validation={}, status=None)
    row = '{"step": %d, "time_ms": %d, "metrics": {"train/loss": %f, "flops": %d}}\n'
    with (path / "metrics.jsonl").open("a") as file:
        file.writelines(row % (step, 1700000000000 + step, 3 + step % 7 / 100, step) for step in range(1, 100_001))
    session = open_session(root=tmp_path / "outputs")
    (run,) = session.chosen()

    def look() -> float:
        begin = time.process_time()
        session.tick([run])
        as_json(session.curves([run], View()))
        return time.process_time() - begin

    first, later = look(), []
    for step in range(100_001, 100_006):
        with (path / "metrics.jsonl").open("a") as file:
            file.write(row % (step, 1700000000000 + step, 3.0, step))
        later.append(look())
    assert session.tick([run])["runs"][run]["step"] == 100_005
    assert min(later) < 0.1
    assert min(later) < first / 5


# Sharing


def test_a_shared_page_needs_the_token(root: Path) -> None:
    with serving(create_app(root=root / "outputs", host="0.0.0.0", token="s3cret-token")) as port:
        outside, inside = Site(port), Site(port, "/s3cret-token")
        for path in ("/", "/api/runs", "/page.js", "/wrong/api/runs", "/s3cret-tokenx/", "//s3cret-token/"):
            status, content, _ = outside.get(path, Host="some-machine.example:80")
            assert status == 403, path
            assert b"whole address" in content
        assert inside.get("/", Host="some-machine.example:80")[0] == 200
        assert inside.json("runs")["runs"]
        assert outside.get("/s3cret-token")[2]["location"] == "/s3cret-token/"
        assert inside.get("/api/runs", Origin="https://evil.example")[0] == 403


def test_share_listens_everywhere_behind_a_random_token_and_warns(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(
        uvicorn.Server,
        "run",
        lambda self, sockets: started.append((self.config.app, sockets[0].getsockname())) or sockets[0].close(),
    )
    for options, address, shared in (
        ({}, "127.0.0.1", False),
        ({"share": True}, "0.0.0.0", True),
        ({"host": "0.0.0.0"}, "0.0.0.0", True),
    ):
        said: list[str] = []
        launch(root=root / "outputs", port=0, say=said.append, **options)  # type: ignore[arg-type]
        assert started[-1][1][0] == address
        (url,) = (line for line in said if line.startswith("http://"))
        assert bool(re.search(r"/[\w-]{32}/$", url)) == shared
        assert any(line.startswith("Warning: whoever has this address") for line in said) == shared
        assert re.fullmatch(r"read 4 runs: 12 rows, 0\.0 MB, in \d+\.\d s", said[0])
    assert started[1][0] is not started[2][0]


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
            (["--export", "runs.txt"], "must be the name of a page"),
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
    with pytest.raises(InputError, match="must be the name of a table"):
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
    """Attention of every head adds up to 1 and looks at nothing that comes later; the five likeliest are those of the
    model's own logits. With a file in place of a browser."""
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
    """The same weights under another name: what is seen is the same."""
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


# MLflow


def test_runs_that_only_mlflow_has(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From its database, which is not changed: what the run's directory said, and no run twice."""
    from manual_backprop.tracking.mlflow_delivery import MlflowDelivery
    from manual_backprop.tracking.tracker import LocalTracker

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
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
    server = ServerStore(f"sqlite:///{tmp_path / 'mlflow.db'}")  # what a server is asked, of the same store
    (asked,) = server.rows()
    assert asked | {"steps": 3} == row
    other = server.reader(run).read()
    assert (str(other.training), other.validation, other.config, other.tags) == (
        *(str(log.training), log.validation, log.config),
        log.tags,
    )
    as_json([session.curves([run], View()), session.compute([run]), session.tables([run])])
    with pytest.raises(InputError, match="its checkpoints are not at hand"):
        session.model(run, "x")
    assert (tmp_path / "mlflow.db").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == there


def test_a_store_of_something_else_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(b"no database at all")
    write_run(tmp_path)
    assert len(open_session(root=tmp_path / "outputs").table()["runs"]) == 1


def test_two_hundred_runs(tmp_path: Path) -> None:
    """In the table within a second, cold: of each run only its evaluations and its last line are looked at."""
    first = write_run(tmp_path, losses=[3.0] * 300, every=1, validation=dict.fromkeys(range(10, 301, 10), 2.0))
    for number in range(199):
        shutil.copytree(first, first.with_name(f"20260101-000000-run-{number:06d}"))
    begin = time.process_time()
    rows = open_session(root=tmp_path / "outputs").table()["runs"]
    assert time.process_time() - begin < 1
    assert len(rows) == 200
    assert {(row["steps"], row["best"]) for row in rows} == {(300, 2.0)}


def test_quotes_of_ids(site: Site) -> None:
    """Whatever an id is, what is said of it is text."""
    status, content, headers = site.get("/api/tables?run=" + quote("<img src=x onerror=alert(1)>"))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert "no run" in json.loads(content)["error"]


def test_statuses() -> None:
    here = {"host": socket.gethostname(), "pid": os.getpid()}
    assert status_of({"status": "RUNNING", "owner": here}) == "RUNNING"
    assert status_of({"status": "RUNNING", "owner": here | {"pid": 2**22 + 1}}) == "DEAD"
    assert status_of({"status": "RUNNING", "owner": {"host": "another", "pid": 2**22 + 1}}) == "RUNNING", "nobody knows"
    assert status_of({"status": "FINISHED", "owner": here | {"pid": 2**22 + 1}}) == "FINISHED"
    assert status_of({}) == ""
