"""The page's server: read-only, and by default only for this machine (`guard` checks requests)."""

import asyncio
import json
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from ..common.errors import InputError, ManualBackpropError
from ..tracking.mlflow_delivery import tracking_uri
from .export import exported, page_file
from .guard import LOOPBACK, Guard
from .runs import Runs, named_runs
from .series import View
from .session import Session, as_json
from .style import STRONG

LARGEST_REQUEST = 100_000  # [bytes]
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}


def open_session(which: Sequence[str] = (), root: str | Path = "outputs") -> Session:
    """A session with the runs below `root`, and those that are only in MLflow. The page starts with the runs `which`.

    Raises InputError if one of them does not exist.
    """
    from .mlflow_store import open_store

    root = Path(root).absolute()
    runs, uri = Runs(root), tracking_uri(root)
    if uri.startswith("sqlite") or not runs.rows():  # an MLflow server is queried only if needed: it may be slow
        runs.elsewhere = open_store(uri)
    chosen: list[str] = []
    for one in which:
        try:
            chosen += runs.add(named_runs([one], root))
        except InputError:
            matching = [row["id"] for row in runs.rows() if row.get("from") and one in (row["id"], row["name"])]
            if len(matching) != 1:
                raise
            chosen += matching
    runs.rows()  # so that the first page appears at once
    return Session(runs, chosen)


def create_app(
    runs: Sequence[str] | Session = (),
    root: str | Path = "outputs",
    *,
    host: str = "127.0.0.1",
    token: str | None = None,
) -> Starlette:
    """The page as an ASGI application. `host` is its name besides those of this machine. With a `token` it answers
    under any name, but only to addresses that begin with the token."""
    session = runs if isinstance(runs, Session) else open_session(runs, root)

    def answering(answer: Callable[[Request], Any]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            try:
                content = await run_in_threadpool(lambda: as_json(answer(request)))
            except ManualBackpropError as error:
                return Response(json.dumps({"error": str(error)}), 404, media_type="application/json")
            return Response(content, media_type="application/json")

        return endpoint

    async def model(request: Request) -> Response:
        body = await request.body()
        asked = {}
        with suppress(ValueError):
            asked = json.loads(body[:LARGEST_REQUEST])
        run_id, text = (asked.get(name) for name in ("run", "text")) if isinstance(asked, dict) else (None, None)
        if not isinstance(run_id, str) or not isinstance(text, str) or len(body) > LARGEST_REQUEST:
            return Response(json.dumps({"error": "a run and a text were expected"}), 400, media_type="application/json")
        return await answering(lambda _: session.model(run_id, text))(request)

    async def export(request: Request) -> Response:
        try:
            state = request.query_params.get("state", "")
            wanted = _ids(request), _view(request), _strong(request), state
            content = await run_in_threadpool(exported, session, *wanted)
        except ManualBackpropError as error:
            return PlainTextResponse(str(error), 404)
        headers = {"content-disposition": "attachment; filename=runs.html"}
        return Response(content, media_type="text/html", headers=headers)

    async def picture(request: Request) -> Response:
        try:
            content = await run_in_threadpool(session.picture, request.path_params["run"], request.path_params["name"])
        except (InputError, OSError):
            return PlainTextResponse("there is no such picture", 404)
        return Response(content, media_type="image/png")

    async def file(request: Request) -> Response:
        name = request.path_params.get("name") or "page.html"
        content = await run_in_threadpool(page_file, name)
        if content is None:
            return PlainTextResponse("there is no such page", 404)
        kept = {"cache-control": "private, max-age=86400"} if name.startswith("plotly") else {}
        return Response(content, media_type=TYPES[Path(name).suffix], headers=kept)

    def curves(request: Request) -> dict[str, Any]:
        also, only = request.query_params.getlist("also"), request.query_params.get("only", "")
        return session.curves(_ids(request), _view(request), _strong(request), also, only)

    answers: dict[str, Callable[[Request], Any]] = {
        "runs": lambda _: session.table(),
        "tick": lambda request: session.tick(_ids(request)),
        "curves": curves,
        "compute": lambda request: session.compute(_ids(request), _strong(request)),
        "tables": lambda request: session.tables(_ids(request)),
        "samples": lambda request: session.samples(_ids(request), _number(request, "step", int)),
        "pictures": lambda request: session.pictures(_ids(request)),
    }
    routes = [Route(f"/api/{name}", answering(answer)) for name, answer in answers.items()]
    routes += [
        Route("/api/model", model, methods=["POST"]),
        Route("/api/export", export),
        Route("/picture/{run}/{name:path}", picture),
        Route("/", file),
        Route("/{name}", file),
    ]
    return Starlette(routes=routes, middleware=[Middleware(Guard, host=host, token=token)])


def _ids(request: Request) -> list[str]:
    return request.query_params.getlist("run")


def _view(request: Request) -> View:
    given = request.query_params
    ranges = {name: _number(request, name, float) for name in ("low", "high", "low_y", "high_y")}
    log_x, log_y = (given.get(name) == "1" for name in ("log_x", "log_y"))
    return View(given.get("x", "step"), log_x, log_y, _number(request, "smoothing", float) or 0, **ranges)


def _strong(request: Request) -> int:
    return max(1, _number(request, "strong", int) or STRONG)


def _number(request: Request, name: str, kind: Callable[[str], Any]) -> Any:
    text = request.query_params.get(name)
    if text is None or text == "":
        return None
    with suppress(ValueError, OverflowError):
        number = kind(text)
        if number - number == 0:
            return number
    raise InputError(f"{name}={text[:50]!r}: expected a number")


def launch(
    runs: Sequence[str] = (),
    root: str | Path = "outputs",
    host: str = "127.0.0.1",
    port: int = 7860,
    share: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Serves the page until it is interrupted; in a notebook in the background, until its kernel ends.

    `share`: on all interfaces, protected by a random token. Raises InputError.
    """
    import uvicorn

    session = open_session(runs, root)
    if share and host in LOOPBACK:
        host = "0.0.0.0"
    token = secrets.token_urlsafe(24) if not _is_loopback(host) else None
    listening = _listen(host, port)
    read(session, say)
    name = socket.gethostname() if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    port = listening.getsockname()[1]
    say(f"http://{name}:{port}/{f'{token}/' if token else ''}")
    if token:
        say(
            "Warning: anyone who has this address and can reach this machine sees every run here, and their texts are "
            "computed here. The connection is not encrypted; no tunnel is opened."
        )
    app = create_app(session, host=host, token=token)
    config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", server_header=False)
    serve = partial(uvicorn.Server(config).run, sockets=[listening])
    if _in_a_loop():
        threading.Thread(target=serve, daemon=True).start()
        say("It ends with this process.")
    else:
        say("Ctrl-C ends it.")
        serve()


def read(session: Session, say: Callable[[str], None]) -> None:
    """Reads the runs that the page starts with, so that its first picture appears at once; prints a line about it."""
    begin, ids, size, rows = time.perf_counter(), session.chosen(), 0, 0
    for place, run_id in enumerate(ids, start=1):
        if sys.stderr.isatty():
            print(f"\rreading run {place} of {len(ids)}", end="", file=sys.stderr, flush=True)
        with suppress(InputError):
            log = session.runs.log(run_id)
            rows += max((len(one.steps) for one in log.training.values()), default=0)
            with suppress(OSError):
                size += (log.path / "metrics.jsonl").stat().st_size
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    with suppress(InputError):
        session.curves(ids, View())  # the first view of the page
        session.compute(ids)
    seconds = time.perf_counter() - begin
    say(f"read {len(ids)} {'run' if len(ids) == 1 else 'runs'}: {rows:,} rows, {size / 1e6:.1f} MB, in {seconds:.1f} s")


def _in_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    with suppress(ValueError):  # a name
        return ip_address(host).is_loopback
    return host == "localhost"


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        reason = "it is in use" if error.errno == 98 else error.strerror or str(error)
        raise InputError(
            f"--host {host} --port {port}: cannot listen there: {reason}; "
            f"try --port {port + 1 if port < 65535 else 7860}"
        ) from error
    return listening
