"""A server of its own for the app: it is not ready any more before it ends, and answers what it has taken."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

# Seconds for which it refuses requests before it ends: whoever asks /ready learns of it.
_NOT_READY_SECONDS = 1.0
# Seconds after which readers that are too slow are left alone.
_LAST_SECONDS = 30


class DrainingServer(uvicorn.Server):
    """Serves an app until a signal comes; a second one ends it at once."""

    def __init__(self, app: FastAPI, *, host: str, port: int, started: Callable[[str], None]) -> None:
        """Make the server.

        Args:
            app: as ``create_app`` makes it.
            host: name or address.
            port: 0 takes a free one.
            started: is told the address once it listens.
        """
        # h11 bounds headers, and httptools does not.
        options: dict[str, Any] = {"http": "h11", "ws": "none", "log_level": "warning", "access_log": False}
        super().__init__(
            uvicorn.Config(
                app, host=host, port=port, server_header=False, timeout_graceful_shutdown=_LAST_SECONDS, **options
            )
        )
        self._service, self._tell = app.state.service, started
        self._ends_at: float | None = None

    async def startup(self, sockets: Any = None) -> None:
        """Listen, and say where."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
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
