"""The page's server over real HTTP: its answers, and refused requests. test_page.py tests it with a browser."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
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

import pytest
import uvicorn
from logged_runs import write_run

from manual_backprop.common.errors import InputError
from manual_backprop.tracking import TrainingLogger, create_run_directory
from manual_backprop.visualizer import create_app
from manual_backprop.visualizer.export import exported
from manual_backprop.visualizer.series import View
from manual_backprop.visualizer.server import launch, open_session
from manual_backprop.visualizer.session import as_json


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


def test_a_run_that_ends_in_nan_is_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path, losses=[3.0, math.inf, math.nan], validation={10: 3.0, 30: math.nan}, settings={"a": 1})
    session = open_session(root=tmp_path / "outputs")
    answers = json.loads(as_json([session.curves([path.name], View()), session.compute([path.name]), session.table()]))
    assert answers[2]["runs"][0]["best"] == 3.0
    found = {row["key"]: row["values"] for row in json.loads(as_json(session.tables([path.name])))["summary"]}
    assert (found["best"], found["last"]) == ([3.0], ["nan"])


def test_nothing_is_chosen_or_there(tmp_path: Path, site: Site) -> None:
    assert open_session(root=tmp_path / "outputs").table()["runs"] == []
    assert site.json("curves")["charts"] == []
    assert site.json("compute")["sentences"] == site.json("tables")["names"] == site.json("samples")["steps"] == []
    with pytest.raises(InputError, match="there are no runs here to export"):
        exported(open_session(root=tmp_path / "outputs"), [], View())


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
    """Also for a run whose process is gone: the page shows DEAD, and its file still says RUNNING."""

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
    """With 100,000 rows, reading the next one costs a small part of the first reading, pictures included."""
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


def test_from_a_notebook(root: Path) -> None:
    """A notebook's event loop is running: the page is served, and the next cell can run."""

    async def cell() -> list[str]:
        said: list[str] = []
        launch(root=root / "outputs", port=0, say=said.append)
        return said

    said = asyncio.run(cell())
    assert said[-1] == "It ends with this process."
    (port,) = (int(line.rstrip("/").rpartition(":")[2]) for line in said if line.startswith("http://"))
    assert Site(port).json("runs")["runs"]


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
        assert any(line.startswith("Warning: anyone who has this address") for line in said) == shared
        assert re.fullmatch(r"read 4 runs: 12 rows, 0\.0 MB, in \d+\.\d s", said[0])
    assert started[1][0] is not started[2][0]


def test_quotes_of_ids(site: Site) -> None:
    """Whatever an id contains, it is shown as text."""
    status, content, headers = site.get("/api/tables?run=" + quote("<img src=x onerror=alert(1)>"))
    assert status == 404
    assert headers["content-type"] == "application/json"
    assert headers["x-content-type-options"] == "nosniff"
    assert "no run" in json.loads(content)["error"]
