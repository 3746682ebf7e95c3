"""Protects the page's server: which requests are answered, and the security headers of every response.

A request must name this machine as its host and come from this page. So a page of another site in the same browser can
neither read from this server nor use DNS rebinding. If the server can be reached from other machines, every address
begins with a random token.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.responses import PlainTextResponse, Response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """An ASGI application that protects another one. `host` is its name besides those of this machine; with a `token`
    it answers under any name."""

    def __init__(self, app: ASGIApp, host: str, token: str | None):
        self.app, self.hosts, self.token = app, {*LOOPBACK, host.lower()}, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(headers, scope["path"])
        if refusal is None and self.token is not None:
            first, slash, rest = scope["path"].removeprefix("/").partition("/")
            if not secrets.compare_digest(first.encode(), self.token.encode()):
                refusal = "This page needs the whole address that was printed where it was started."
            else:
                scope = {**scope, "path": f"/{rest}", "raw_path": f"/{rest}".encode()}
                if not slash:  # the addresses in the page are relative
                    await Response(status_code=307, headers={"location": f"/{self.token}/"})(scope, receive, send)
                    return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        app = self.app if refusal is None else PlainTextResponse(refusal, 403)
        await app(scope, receive, with_headers)

    def _refusal(self, headers: dict[str, str], path: str) -> str | None:
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if self.token is None and _host_name(host) not in self.hosts:
            return "This page answers only to the address at which it was started."
        if origin is not None and origin.lower() != f"http://{host}":
            return "Other sites may not ask this page."
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "Other sites may not ask this page."
        return None


def _host_name(host: str) -> str:
    """The host name without a port; empty if malformed."""
    try:
        named = urlsplit(f"//{host}")
        _ = named.port  # raises ValueError if it is not a port
        return "" if "@" in host else named.hostname or ""
    except ValueError:
        return ""
