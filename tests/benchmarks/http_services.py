"""Services in processes of their own on loopback, and clients that ask them over connections that stay open."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from tests.benchmarks.report import ROOT

HOST = "127.0.0.1"
START, STOP, ANSWER = 120, 60, 60
"""Seconds that a service may take to start and to end, and for one answer."""


class Answer(NamedTuple):
    """What came back, and after how many seconds."""

    status: int
    content: Any
    headers: Mapping[str, str]
    seconds: float


class Client:
    """A client with one connection, which stays open."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=ANSWER)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()

    def ask(self, body: Any, *, path: str = "/predict", method: str = "POST", **headers: str) -> Answer:
        """Return the answer to a body, which is sent as JSON unless it is bytes."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        start = time.perf_counter()
        self._connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
        response = self._connection.getresponse()
        content = response.read()
        seconds = time.perf_counter() - start
        is_json = (response.getheader("content-type") or "").startswith("application/json")
        return Answer(
            response.status, json.loads(content) if is_json else content, dict(response.headers.items()), seconds
        )


def ask_all(port: int, bodies: Sequence[Any], *, clients: int) -> tuple[list[Answer], float]:
    """Return the answers to all bodies in their order, asked by so many clients, and the seconds from first to last.

    A client asks as soon as it has its last answer. All of them are connected before the time begins.
    """
    answers: list[Any] = [None] * len(bodies)
    turns = iter(range(len(bodies)))
    start_line = threading.Barrier(clients + 1)

    def work() -> None:
        with Client(port) as client:
            client.ask(None, path="/ready", method="GET")
            start_line.wait()
            for turn in turns:  # the next one is handed out under Python's lock
                answers[turn] = client.ask(bodies[turn])

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    start_line.wait()
    start = time.perf_counter()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - start
    assert all(answer is not None for answer in answers), "a client ended without an answer"
    return answers, taken


@dataclass
class Service:
    """A service in a process of its own."""

    process: subprocess.Popen[bytes]
    port: int

    def end(self) -> int:
        """End it as a supervisor does, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return listener.getsockname()[1]


def start(command: Sequence[object], port: int, *, log: Path | None = None) -> Service:
    """Return a service that is ready; what it says goes to ``log``.

    Raises:
        RuntimeError: it ended, or is not ready after two minutes.
    """
    settings = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    settings["FLAIR_DEVICE"] = os.getenv("FLAIR_DEVICE", "cpu")
    with contextlib.ExitStack() as stack:
        output = subprocess.DEVNULL if log is None else stack.enter_context(log.open("ab"))
        process = subprocess.Popen(
            [sys.executable, "-m", *map(str, command)],
            cwd=ROOT,
            env=os.environ | settings,
            stdout=output,
            stderr=output,
        )
    service = Service(process, port)
    deadline = time.monotonic() + START
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError, http.client.HTTPException), Client(port) as client:
            if client.ask(None, path="/ready", method="GET").status == 200:
                return service
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"{' '.join(map(str, command))} is not ready; its status is {process.wait()}.")


@contextlib.contextmanager
def running(command: Sequence[object], port: int) -> Iterator[Service]:
    """A service that is ready, and ends with the context."""
    service = start(command, port)
    try:
        yield service
    finally:
        service.end()
