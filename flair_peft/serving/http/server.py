"""A server of its own for the app: it is not ready any more before it ends, and answers what it has taken."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from flair_peft.errors import AdapterConfigError

# Seconds for which it refuses requests before it ends: whoever asks /ready learns of it.
_NOT_READY_SECONDS = 1.0
# Seconds after which readers that are too slow are left alone.
_LAST_SECONDS = 30


def reserve(host: str, port: int) -> socket.socket:
    """Return a socket with this address, at which nobody is answered yet: it is taken while the models are loaded.

    Raises:
        AdapterConfigError: it cannot be had.
    """
    try:
        known = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = min(known, key=lambda each: each[0] != socket.AF_INET)
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _taken(host, port, error) from error
    if os.name == "posix":  # elsewhere this would let two programs answer at one address
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    try:
        found.bind(address)
    except OSError as error:
        found.close()
        raise _taken(host, port, error) from error
    return found


def _taken(host: str, port: int, error: OSError) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot listen at {host}, port {port}: {error.strerror or error}. No other program can have that address, "
        "and this machine must have it. Pass another --port, of which 0 takes a free one, or another --host."
    )


class DrainingServer(uvicorn.Server):
    """Serves an app until a signal comes; a second one ends it at once."""

    def __init__(self, app: FastAPI, at: socket.socket, *, started: Callable[[str], None]) -> None:
        """Take an app and a socket that is reserved for it; ``started`` is told the address once it listens."""
        # h11 bounds headers, and httptools does not.
        options: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning", "access_log": False}
        super().__init__(uvicorn.Config(app, server_header=False, timeout_graceful_shutdown=_LAST_SECONDS, **options))
        self._service, self._at, self._tell = app.state.service, at, started
        self._ends_at: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        host, port = self._at.getsockname()[:2]
        try:
            self._at.listen(self.config.backlog)  # uvloop would say nothing of an error
        except OSError as error:  # a program that reserved it as well was faster
            raise _taken(host, port, error) from error
        await super().startup([self._at])
        if self.started:
            self._tell(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end; what uvicorn does besides, raising the signal again, would give an exit code of failure."""
        if self._ends_at is not None:
            self.force_exit = self.should_exit = True
        self._ends_at = time.monotonic() + _NOT_READY_SECONDS

    async def on_tick(self, counter: int) -> bool:
        """Return whether to end now."""
        if self._ends_at is not None:
            self._service.drain()
            if time.monotonic() >= self._ends_at:
                return True
        return await super().on_tick(counter)
