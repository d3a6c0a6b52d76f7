"""Loopback: a web server that answers this machine only, and only GET and HEAD."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lib.errors import MachineError, SettingsError

__all__ = ["ADDRESS", "App", "guarded_app", "listen", "serve"]

ADDRESS = "127.0.0.1"
# How long requests are still answered after the server was told to end.
_LAST_ANSWERS_SECONDS = 2

Message = MutableMapping[str, Any]
App = Callable[[Message, Callable[[], Awaitable[Message]], "Send"], Awaitable[None]]
Send = Callable[[Message], Awaitable[None]]

_OWN_NAMES = re.compile(rb"(127\.0\.0\.1|localhost)(:\d+)?", re.IGNORECASE)


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine's own address; port 0 takes any free port.

    Raises SettingsError if the port is out of range, MachineError if it is not available.
    """
    if not 0 <= port <= 65535:
        raise SettingsError(f"port {port}: not from 0 to 65535")
    try:
        return socket.create_server((ADDRESS, port))
    except OSError as error:
        raise MachineError(f"{ADDRESS}:{port}: {os.strerror(error.errno or 0)}") from None


def guarded_app(app: App) -> App:
    """Return the ASGI app behind two checks.

    Host: a foreign page may have its name resolved to 127.0.0.1 (DNS rebinding); its requests
    carry that name and are refused. Method: anything but GET and HEAD could change something.
    """

    async def guarded(
        scope: Message, receive: Callable[[], Awaitable[Message]], send: Send
    ) -> None:
        if scope["type"] == "http":
            hosts = [value for name, value in scope["headers"] if name == b"host"]
            if len(hosts) != 1 or not _OWN_NAMES.fullmatch(hosts[0]):
                await _refuse(send, 421, "the Host header is not this machine's own name")
                return
            if scope["method"] not in ("GET", "HEAD"):
                await _refuse(send, 405, "read-only")
                return
        await app(scope, receive, send)

    return guarded


def serve(app: App, listener: socket.socket) -> None:
    """Serve until SIGINT or SIGTERM, which is raised again when the server has ended."""
    import uvicorn  # only the extra `browse` installs it

    config = uvicorn.Config(
        guarded_app(app),
        # Datasette reports errors; uvicorn would print a traceback for every broken connection.
        log_level="critical",
        access_log=False,
        http="h11",
        loop="asyncio",
        ws="none",
        proxy_headers=False,
        server_header=False,
        # Browsers keep connections open; without a limit they would keep the server alive.
        timeout_graceful_shutdown=_LAST_ANSWERS_SECONDS,
    )
    uvicorn.Server(config).run([listener])


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": f"{reason}\n".encode()})
