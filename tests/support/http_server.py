"""An app behind a real socket on this machine, and a client for it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn


@contextmanager
def address_of(app: Any) -> Iterator[str]:
    """Inside, the app answers at the address."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, http="h11", ws="none", log_level="error"))
        started = threading.Event()
        startup = server.startup

        async def start(sockets: Any = None) -> None:
            await startup(sockets)
            started.set()

        server.startup = start  # type: ignore[method-assign]
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            assert started.wait(30)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(30)


@contextmanager
def client_of(app: Any, **options: Any) -> Iterator[httpx.Client]:
    """Inside, the client talks to the app."""
    with address_of(app) as address, httpx.Client(base_url=address, timeout=60, **options) as client:
        yield client
