"""Checks of every request to the chat page, before gradio sees it: host, origin, password, address, size and file paths."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import re
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from fastapi.datastructures import Headers
from fastapi.responses import PlainTextResponse

Scope = MutableMapping[str, Any]
Event = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[Event], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
"""The types of an ASGI application."""

MAX_UPLOAD = 512 * 2**20
"""Maximum size of one upload request in bytes."""

MAX_FILE = 128 * 2**20
"""Maximum size of one uploaded file in bytes."""

MAX_EVENT = 4 * 2**20
"""Maximum size of any other request in bytes."""

WRONG_PASSWORD_S = 1.0
"""Time after a wrong password in which no other request from its address is looked at: guesses at the same time gain nothing."""

API = "/gradio_api"
FILE = f"{API}/file="
ALLOWED = (
    ("GET", re.compile(r"/|/(assets|static)/.+|/theme\.css|/favicon\.ico|/manifest\.json|/config")),
    ("GET", re.compile(rf"{API}/(queue/data|heartbeat/\w+|startup-events|upload_progress|app_id)")),
    ("GET", re.compile(rf"{re.escape(FILE)}.+")),
    ("POST", re.compile(rf"{API}/(queue/join|upload|cancel)")),
)
"""The requests that the page makes. gradio has many more addresses, among them ones that fetch other servers' pages."""

LOOPBACK_NAMES = re.compile(r"(localhost|127(\.\d+){3}|\[::1\])(:\d+)?")

_HEADERS = {
    # gradio writes scripts and styles into its page, and compiles templates of components.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; connect-src 'self' blob: data:; "
        "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
HEADERS = [(name.lower().encode(), value.encode()) for name, value in _HEADERS.items()]
"""Headers of every response."""


class RequestChecks:
    """An ASGI application that passes a request to another one if it is allowed.

    Args:
        app: the application.
        folder: the only folder whose files a request may name.
        password: that every request must have, with any user name; None for a server on loopback, which then answers only to
            requests for a name of this machine: another name can be that of a page in the browser that is resolved to it.
    """

    def __init__(self, app: Application, folder: Path, password: str | None) -> None:
        self._app = app
        self._folder = folder.resolve()
        self._password = password
        self._guesses: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by address, while requests are looked at

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            raise ValueError(f"expected an HTTP request, got {scope['type']}")
        problem = await self._problem(scope)
        if problem is None and scope["method"] == "POST":
            receive, problem = await self._checked_body(scope, receive)
        if problem is not None:
            await problem(scope, receive, send)
            return

        async def send_with_headers(message: Event) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
            await send(message)

        await self._app(scope, receive, send_with_headers)

    async def _problem(self, scope: Scope) -> PlainTextResponse | None:
        headers, path = Headers(scope=scope), scope["path"]
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._password is None and not LOOPBACK_NAMES.fullmatch(host):
            return _refusal(421, "expected a request for localhost, 127.0.0.1 or [::1]")
        if origin is not None and origin.partition("://")[2] != host:
            return _refusal(403, "a page of another server sent this request")
        if self._password is not None and path != "/manifest.json" and not await self._may_enter(scope, headers):
            return PlainTextResponse(
                "This page needs its password; leave the user name empty.",
                401,
                {"WWW-Authenticate": 'Basic realm="mmtune chat; leave the user name empty", charset="UTF-8"'},
            )
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        if not any(method == allowed and pattern.fullmatch(path) for allowed, pattern in ALLOWED):
            return _refusal(404, "no such address")
        if path.startswith(FILE) and not self._is_own_file(path.removeprefix(FILE)):
            return _refusal(403, "this file does not belong to the page")
        return None

    async def _may_enter(self, scope: Scope, headers: Headers) -> bool:
        if "authorization" not in headers:
            return False
        address = scope["client"][0] if scope.get("client") else ""
        async with self._guesses.setdefault(address, asyncio.Lock()):
            has_password = self._has_password(headers)
            if not has_password:
                await asyncio.sleep(WRONG_PASSWORD_S)
            return has_password

    def _has_password(self, headers: Headers) -> bool:
        scheme, _, value = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "basic" or self._password is None:
            return False
        try:
            _, _, password = base64.b64decode(value, validate=True).partition(b":")
        except binascii.Error:
            return False
        return hmac.compare_digest(password, self._password.encode())

    def _is_own_file(self, name: str) -> bool:
        path = Path(name)
        return "\0" not in name and path.is_absolute() and path.resolve().is_relative_to(self._folder)

    async def _checked_body(self, scope: Scope, receive: Receive) -> tuple[Receive, PlainTextResponse | None]:
        """The body of a request, limited in size; that of an event is read and checked."""
        if scope["path"].startswith(f"{API}/upload"):
            length = Headers(scope=scope).get("content-length", "")
            too_large = not length.isdecimal() or int(length) > MAX_UPLOAD
            message = f"expected an upload of at most {MAX_UPLOAD >> 20} MB"
            return receive, _refusal(413, message) if too_large else None
        body, more = b"", True
        while more:
            part = await receive()
            if part["type"] != "http.request":
                return receive, _refusal(400, "the connection was closed")
            body, more = body + part.get("body", b""), part.get("more_body", False)
            if len(body) > MAX_EVENT:
                return receive, _refusal(413, f"expected at most {MAX_EVENT >> 20} MB")
        try:
            paths = list(_paths_in(json.loads(body or b"null")))
        except (ValueError, RecursionError):
            return receive, _refusal(400, "expected JSON")
        if not all(isinstance(path, str) and self._is_own_file(path) for path in paths):
            return receive, _refusal(403, "this file does not belong to the page")
        read = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again() -> Event:
            return next(read, None) or await receive()

        return receive_again, None


def _refusal(status: int, reason: str) -> PlainTextResponse:
    return PlainTextResponse(f"mmtune chat: {reason}", status)


def _paths_in(value: Any) -> Iterator[Any]:
    """The values of all keys `path` in a JSON value: gradio reads the files that they name."""
    if isinstance(value, dict):
        yield from (each for key, each in value.items() if key == "path")
        for each in value.values():
            yield from _paths_in(each)
    elif isinstance(value, list):
        for each in value:
            yield from _paths_in(each)
