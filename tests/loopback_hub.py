"""A small dataset hub on this machine: serves a folder to the `datasets` and `huggingface_hub` libraries.

    with LoopbackHub(folder) as hub:  # folder/datasets/OWNER/NAME/FILES and folder/models/OWNER/NAME/FILES
        ...  # in processes with HF_ENDPOINT=hub.url

A repository has one commit, a hash of its files. `gated` names repositories that are refused without a login.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


class LoopbackHub:
    def __init__(self, folder: Path, gated: tuple[str, ...] = ()):
        self.folder, self.gated = folder, gated
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> LoopbackHub:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: Path) -> dict[str, str]:
        """The environment of a process that uses only this hub, with its cache in `home`."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def files(self, kind: str, name: str) -> dict[str, bytes]:
        root = self.folder / kind / name
        paths = sorted(path for path in root.rglob("*") if path.is_file())
        return {path.relative_to(root).as_posix(): path.read_bytes() for path in paths}

    def commit(self, kind: str, name: str) -> str:
        return hashlib.sha1(repr(self.files(kind, name)).encode()).hexdigest()


def _handler(hub: LoopbackHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            status, headers, body = _answer(hub, self.path, "")
            self._send(status, headers, body)

        def do_POST(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
            self._send(*_answer(hub, self.path, body or "{}"))

        do_HEAD = do_GET

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            wanted = self.headers.get("Range")
            if wanted and status == 200:
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = int(last) + 1 if last else len(body)
                headers |= {"Content-Range": f"bytes {first}-{min(end, len(body)) - 1}/{len(body)}"}
                status, body = 206, body[int(first) : end]
            self.send_response(status)
            for name, value in {"Accept-Ranges": "bytes", **headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    return Handler


def _answer(hub: LoopbackHub, target: str, body: str) -> tuple[int, dict[str, str], bytes]:
    """Answers /api/datasets/OWNER/NAME[/...] with a listing, /datasets/OWNER/NAME/resolve/REVISION/FILE with a file."""
    parts = [unquote(part) for part in urlsplit(target).path.strip("/").split("/")]
    api = parts[:1] == ["api"]
    parts = parts[1:] if api else parts
    kind = parts[0] if parts[0] in ("datasets", "models") else "models"
    rest = parts[1:] if parts[0] == kind else parts
    name, rest = "/".join(rest[:2]), rest[2:]
    files = hub.files(kind, name)
    if not files:
        return _refusal(401 if api else 404, "RepoNotFound", "Repository not found")
    commit = hub.commit(kind, name)
    revision = rest[1] if len(rest) > 1 else "main"
    if revision not in ("main", commit):
        return _refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    if name in hub.gated and (not api or rest[:1] != []) and rest[:1] == ["resolve"]:
        return _refusal(401, "GatedRepo", f"Access to dataset {name} is restricted. You must be authenticated.")
    if rest[:1] == ["resolve"]:
        return _file(files, "/".join(rest[2:]), commit)
    if rest[:1] == ["tree"]:
        below = "/".join(rest[2:])
        recursive = parse_qs(urlsplit(target).query).get("recursive", ["false"])[0].lower() in ("true", "1")
        return _json(list(_tree(files, below, recursive)))
    if rest[:1] == ["paths-info"]:
        wanted = json.loads(body).get("paths", []) if body.startswith("{") else parse_qs(body).get("paths", [])
        entries = {entry["path"]: entry for entry in _tree(files, "", True)}
        return _json([entries[path] for path in wanted if path in entries])
    siblings = [{"rfilename": path, "size": len(data)} for path, data in files.items()]
    info = {"_id": commit[:24], "id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []}
    return _json(
        info | {"gated": "auto" if name in hub.gated else False, "disabled": False, "downloads": 0, "likes": 0}
    )


def _file(files: dict[str, bytes], path: str, commit: str) -> tuple[int, dict[str, str], bytes]:
    if path not in files:
        return _refusal(404, "EntryNotFound", f"Entry not found: {path}", commit)
    data = files[path]
    return 200, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": commit}, data


def _tree(files: dict[str, bytes], below: str, recursive: bool) -> Iterator[dict[str, Any]]:
    seen = set()
    for path, data in files.items():
        parents = path.split("/")[:-1]
        for depth in range(1, len(parents) + 1):
            folder = "/".join(parents[:depth])
            if folder not in seen and (recursive or depth == 1):
                seen.add(folder)
                yield {"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0}
        if (not below or path.startswith(below + "/")) and (
            recursive or len(parents) == len(below.split("/")) * bool(below)
        ):
            yield {"type": "file", "path": path, "oid": hashlib.sha1(data).hexdigest(), "size": len(data)}


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


def _refusal(status: int, code: str, message: str, commit: str = "") -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers | ({"X-Repo-Commit": commit} if commit else {}), json.dumps({"error": message}).encode()
