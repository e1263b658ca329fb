"""Server of the chat page: address, password, private folder, and the end by Ctrl-C."""

from __future__ import annotations

import errno
import gc
import ipaddress
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from mmtune.utils.errors import UserError, reason_of

if TYPE_CHECKING:
    from mmtune.chat.session import ChatSession

LOOPBACK = "127.0.0.1"
FIRST_PORT, PORTS = 7860, 100
FONT, MONOSPACED = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
"""Fonts of the browser's machine; gradio's own are of other servers."""

MIN_PASSWORD = 8
"""Minimum length of a password."""


def check_web() -> None:
    """
    Raises:
        UserError: a library of the extra `web` is not installed.
    """
    missing = [name for name in ("fastapi", "gradio", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(f"mmtune chat --web needs {', '.join(missing)}: pip install 'mmtune[web]'")


def read_password(host: str, file: str | None) -> str | None:
    """The password of the page, from the first line of a file.

    Raises:
        UserError: a host other than loopback without a password, a file that cannot be read, or a short password.
    """
    if file is None:
        if not _is_loopback(host):
            raise UserError(
                f"--host {host}: anyone who reaches this machine could use the page: expected a password too; "
                f"add --password-file FILE, or leave out --host and use an SSH tunnel"
            )
        return None
    try:
        password = Path(file).read_text("utf-8").partition("\n")[0].strip()
    except (OSError, ValueError) as error:
        raise UserError(f"--password-file {file}: {reason_of(error)}") from error
    if len(password) < MIN_PASSWORD:
        raise UserError(f"--password-file {file}: expected at least {MIN_PASSWORD} characters in its first line")
    return password


def listen(host: str, port: int | None) -> socket.socket:
    """A socket that listens at a host, on a port or the first free one from `FIRST_PORT`.

    Raises:
        UserError: an unknown host, or a port that is used.
    """
    if port is not None and not 0 < port < 65536:
        raise UserError(f"--port {port}: expected a number from 1 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else [port]:
        try:
            return socket.create_server((host, candidate), family=family)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UserError(f"--host {host}, port {candidate}: {reason_of(error)}") from error
    if port is None:
        raise UserError(f"all ports from {FIRST_PORT} to {FIRST_PORT + PORTS - 1} are used; give another one with --port")
    raise UserError(f"--port {port}: another program uses it; give another one, or leave it out for the first free port")


def run_page(new_session: Callable[[], ChatSession], name: str, listener: socket.socket, password: str | None) -> None:
    """Serve the page until Ctrl-C or SIGTERM, which is then raised as without the server.

    Args:
        new_session: makes the session of a new conversation.
        name: of the model, as the page shows it.
        listener: the socket.
        password: of the page; None for a page on loopback without one.
    """
    with _private_folder() as folder:
        import gradio
        import uvicorn
        from fastapi import FastAPI

        from mmtune.chat.web.page import ChatPage
        from mmtune.chat.web.request_checks import MAX_FILE, RequestChecks

        page = ChatPage(new_session, name, folder)
        app = gradio.mount_gradio_app(
            FastAPI(openapi_url=None),
            page.blocks,
            "/",
            allowed_paths=[],
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            mcp_server=False,
            pwa=False,
            ssr_mode=False,
            max_file_size=MAX_FILE,
            show_error=False,
            theme=gradio.themes.Default(primary_hue="blue", neutral_hue="slate", font=FONT, font_mono=MONOSPACED),
            css_paths=Path(__file__).with_name("page.css"),
            head=f"<script>{Path(__file__).with_name('page.js').read_text('utf-8')}</script>",
        )

        class Server(uvicorn.Server):
            def handle_exit(self, sig: int, frame: FrameType | None) -> None:
                page.stop()
                super().handle_exit(sig, frame)

        config = uvicorn.Config(
            RequestChecks(app, folder, password),
            log_level="critical",
            timeout_graceful_shutdown=1,
            server_header=False,
            ws="none",
        )
        print(f"chat page: {_address(listener)} (Ctrl-C ends it)", flush=True)
        try:
            Server(config).run(sockets=[listener])
        finally:
            page.close()
            gc.freeze()  # Python's collection at the exit would search all objects of the libraries, for seconds


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    if ipaddress.ip_address(host).is_unspecified:
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


@contextmanager
def _private_folder() -> Iterator[Path]:
    """A folder that only this user can read, where gradio stores uploads; deleted at the end."""
    with tempfile.TemporaryDirectory(prefix="mmtune-chat-", ignore_cleanup_errors=True) as name:
        before = os.environ.get("GRADIO_TEMP_DIR")
        os.environ["GRADIO_TEMP_DIR"] = name  # gradio has no other setting for it
        try:
            yield Path(name)
        finally:
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before
