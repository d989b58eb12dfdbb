"""A service under load for minutes: loads and unloads, lost and hostile clients, restarts; each answer is compared.

``python -m tests.benchmarks.serving_soak --minutes 10`` starts ``flair-peft serve`` with tiny models and lets clients
of every kind at it: those that ask and compare each answer with a direct ``predict``, those that go away before they
have one, those that read it slowly, those that send what is no request or too much of one, and one that loads and
unloads a model all the time. Three times the service is ended as a supervisor does and started again. Nothing may be
wrong, nobody may be left without an answer, and the memory may not grow.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import http.client
import json
import logging
import random
import socket
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from flair.data import Sentence
from flair.models import SequenceTagger
from flair.nn import Classifier

from tests.benchmarks import http_services
from tests.benchmarks.http_services import HOST, Answer, Client
from tests.benchmarks.report import RESULTS, heading, write
from tests.support import tiny
from tests.support.models import save_random

TOKEN = "a token for this soak alone"
KINDS = {"sentiment": "text-classifier", "ner": "sequence-tagger", "crf": "sequence-tagger-crf"}
MOVING = "moving"
"""The model that is loaded and unloaded: each time the other one of two."""

ASKERS, TOLERANCE, GROWTH = 8, 1e-3, 1.02
PATIENCE = http_services.START + http_services.ANSWER
"""Seconds in which every request has its answer, also one that meets a restart."""

AFOOT = 0.2
"""A request that was sent so many seconds before the service was told to end has to be answered by it."""

TEXTS = [
    "Berlin is large .",
    "I love this wonderful movie , it is great !",
    "George Washington went to Washington .",
    "Angela Merkel lives in Berlin , Germany . She sold the house in New York and bought a car .",
    "Zoë 🙂 met Ana\u0301 in São Paulo — twice .",
    "שלום from Tel Aviv",
    "a",
    " ".join(["The founder of Apple , Steve Jobs , was born in San Francisco ."] * 4),
]
HOSTILE: tuple[Any, ...] = (
    b"",
    b"{",
    b"[" * 50_000,
    b"\xff\xfe",
    b'{"inputs": "\\ud800", "model": "ner"}',
    {},
    [],
    {"inputs": 3, "model": "ner"},
    {"inputs": [["no"]], "model": "ner"},
    {"inputs": "a", "model": "absent"},
    {"inputs": "a", "model": ["ner", 1]},
    {"inputs": {"tokens": "no list"}, "model": "ner"},
    {"inputs": "a", "model": "ner", "adapter_id": "sentiment"},
)
OVERSIZED = b'{"model": "ner", "inputs": "' + b"a" * 10_000_000 + b'"}'

Expected = Mapping[str, Any]
"""Text → what is answered for it."""


def direct(source: str) -> Expected:
    """Return what a model of a source gives for each text, in the form of an answer, from Flair's own ``predict``."""
    model = Classifier.load(source)
    return {text: _answer(model, text) for text in TEXTS}


def _answer(model: Classifier, text: str) -> list[dict[str, Any]]:
    sentence = Sentence(text)
    model.predict(sentence)
    if not isinstance(model, SequenceTagger):
        return [{"label": label.value, "score": label.score} for label in sentence.get_labels(model.label_type)]
    return [
        {
            "entity_group": span.get_label(model.label_type).value,
            "score": span.get_label(model.label_type).score,
            "word": text[span.start_position : span.end_position],
            "start": span.start_position,
            "end": span.end_position,
        }
        for span in sentence.get_spans(model.label_type)
    ]


def is_same(found: Any, expected: Any) -> bool:
    """Whether two answers differ by the rounding of their scores at most."""
    if isinstance(expected, float):
        return isinstance(found, float) and abs(found - expected) < TOLERANCE
    if isinstance(expected, list):
        return isinstance(found, list) and len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, dict):
        has_keys = isinstance(found, dict) and found.keys() == expected.keys()
        return has_keys and all(is_same(found[key], expected[key]) for key in expected)
    return bool(found == expected)


@dataclass
class Soak:
    """A service under load, and what was seen of it."""

    command: Sequence[object]
    port: int
    expected: Mapping[str, Expected]
    """Name of a model, or digest of its adapter where it is the moving one → text → answer."""

    sources: Sequence[str]
    """Of the moving model."""

    log: Path
    problems: list[str] = field(default_factory=list)
    counted: collections.Counter[str] = field(default_factory=collections.Counter)
    memory: list[list[tuple[float, int]]] = field(default_factory=list)
    """For each start of the service: seconds since it was ready, and resident bytes."""

    def __post_init__(self) -> None:
        self._over, self._restarting, self._told_to_end = threading.Event(), threading.Event(), 0.0
        self._start()

    def _start(self) -> None:
        self._service = http_services.start(self.command, self.port, log=self.log)
        self.memory.append([])
        self._began = time.monotonic()

    def run(self, seconds: float, *, restarts: int) -> None:
        """Keep the service under load for so long; ``problems`` and ``memory`` hold what was seen."""
        actors = [self._ask] * ASKERS + [self._go_away, self._be_hostile, self._send_too_much, self._read_slowly]
        threads = [threading.Thread(target=self._keep, args=(each, n)) for n, each in enumerate([*actors, self._move])]
        for thread in threads:
            thread.start()
        # Early: the memory is watched from the last start on.
        moments = [time.monotonic() + (number + 1) * seconds / (3 * max(restarts, 1)) for number in range(restarts)]
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end and len(self.problems) < 20:
            if moments and now > moments[0]:
                moments.pop(0)
                self._restart()
            self._look_at_memory()
            time.sleep(min(1.0, seconds / 20))
        self._over.set()
        for thread in threads:
            thread.join(PATIENCE)
        if any(thread.is_alive() for thread in threads):
            self.problems.append("a client still waits for its answer")
        self._end()
        _, traceback, rest = self.log.read_text(encoding="utf-8", errors="replace").partition("Traceback")
        if traceback:
            self.problems.append(f"a traceback in the log of the service: …{rest[:3000][-1500:]}")

    def _keep(self, act: Callable[[random.Random], None], number: int) -> None:
        chance = random.Random(number)
        while not self._over.is_set():
            try:
                act(chance)
            except Exception as error:  # what a client meets is what this is about
                self.problems.append(f"{act.__name__}: {type(error).__name__}: {error}")

    def _restart(self) -> None:
        self._restarting.set()
        self._end()
        self._start()
        self._restarting.clear()
        self.counted["restarts"] += 1

    def _end(self) -> None:
        self._told_to_end = time.monotonic()
        status = self._service.end()
        if status:
            self.problems.append(f"the service ended with {status}")

    def _look_at_memory(self) -> None:
        resident = psutil.Process(self._service.process.pid).memory_info().rss
        self.memory[-1].append((time.monotonic() - self._began, resident))

    def answered(self, body: Any, *, path: str = "/predict", method: str = "POST") -> Answer:
        """Return the answer to a request, which is asked again while the service is away."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            sent = time.monotonic()
            try:
                with Client(self.port) as client:
                    answer = client.ask(body, path=path, method=method, Authorization=f"Bearer {TOKEN}")
            except (OSError, http.client.HTTPException) as error:
                self._note_lost(sent, error)
                continue
            if answer.status != 503:
                return answer
            assert answer.headers.get("retry-after"), "a 503 that does not say when to come again"
            self.counted["503"] += 1
            time.sleep(0.05)
        raise TimeoutError(f"no answer within {PATIENCE} seconds")

    def _note_lost(self, sent: float, error: Exception) -> None:
        """A connection that breaks is a problem, unless the service is being started again and did not have it yet."""
        was_afoot = sent < self._told_to_end - AFOOT
        if was_afoot or not (self._restarting.is_set() or sent < self._began):
            self.problems.append(f"a request without an answer: {type(error).__name__}: {error}")
        self.counted["connections refused"] += 1
        time.sleep(0.2)

    def _ask(self, chance: random.Random) -> None:
        """Ask for one text or several, of one model or several, and compare."""
        names = chance.sample([*KINDS, MOVING], chance.choice((1, 1, 1, 2)))
        texts = chance.choices(TEXTS, k=chance.choice((1, 1, 4)))
        is_one = len(texts) == 1
        body = {"inputs": texts[0] if is_one else texts, "model": names[0] if len(names) == 1 else names}
        answer = self.answered(body)
        if answer.status == 404 and MOVING in names:
            self.counted["404 of the moving model"] += 1
            return
        assert answer.status == 200, answer
        headers = {name.lower(): value for name, value in answer.headers.items()}
        digests = dict(zip(headers["x-model"].split(","), headers["x-adapter-digest"].split(","), strict=True))
        for name in names:
            found = answer.content if len(names) == 1 else answer.content[name]
            expected = self.expected[digests[name] if name == MOVING else name]
            wanted = [expected[text] for text in texts]
            if not is_same([found] if is_one else found, wanted):
                self.problems.append(f"wrong answer of {name}: {found} instead of {wanted}")
        self.counted["answers compared"] += len(names) * len(texts)

    def _go_away(self, chance: random.Random) -> None:
        """Send a request and close the connection before its answer."""
        try:
            with socket.create_connection((HOST, self.port), timeout=5) as connection:
                connection.sendall(_as_sent({"inputs": TEXTS * 4, "model": list(KINDS)}))
                time.sleep(chance.choice((0.0, 0.001, 0.02)))
            self.counted["went away"] += 1
        except OSError as error:
            self._note_lost(time.monotonic(), error)
        time.sleep(0.02)

    def _be_hostile(self, chance: random.Random) -> None:
        """Send what is no request."""
        body = chance.choice(HOSTILE)
        answer = self.answered(body)
        assert 400 <= answer.status < 500, (body, answer)
        assert isinstance(answer.content.get("error"), str), (body, answer)
        self.counted["refused as malformed"] += 1
        time.sleep(0.05)

    def _send_too_much(self, _: random.Random) -> None:
        """Send ten megabytes."""
        sent = time.monotonic()
        try:
            with socket.create_connection((HOST, self.port), timeout=PATIENCE) as connection:
                connection.sendall(_head(len(OVERSIZED)))
                with contextlib.suppress(OSError):  # it was answered, and closed, before all was sent
                    connection.sendall(OVERSIZED)
                received = connection.recv(1000)
            if not received:
                raise ConnectionResetError("closed without an answer")
            status = received.split(b" ", 2)[1]
            assert status in (b"413", b"503"), received
            self.counted["refused as too long"] += 1
        except OSError as error:
            self._note_lost(sent, error)
        time.sleep(0.5)

    def _read_slowly(self, _: random.Random) -> None:
        """Read an answer a few bytes at a time, and compare it."""
        texts, sent = TEXTS * 4, time.monotonic()
        try:
            with socket.create_connection((HOST, self.port), timeout=PATIENCE) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
                connection.sendall(_as_sent({"inputs": texts, "model": "ner"}, close=True))
                received = b""
                while part := connection.recv(512):
                    received += part
                    time.sleep(0.01)
            if not received:
                raise ConnectionResetError("closed without an answer")
        except OSError as error:
            self._note_lost(sent, error)
            return
        head, _, content = received.partition(b"\r\n\r\n")
        if b" 503 " in head.split(b"\r\n")[0]:
            return
        assert is_same(json.loads(content), [self.expected["ner"][text] for text in texts]), received
        self.counted["read slowly"] += 1

    def _move(self, chance: random.Random) -> None:
        """Load the moving model from its other source, or take it away."""
        source = self.sources[self.counted["loads"] % len(self.sources)]
        if chance.random() < 0.2:
            answer = self.answered(None, path=f"/models/{MOVING}", method="DELETE")
            assert answer.status in (200, 204, 404), answer
        else:
            answer = self.answered({"name": MOVING, "source": source}, path="/models")
            assert answer.status in (200, 201), answer
            self.counted["loads"] += 1
        time.sleep(0.1)

    def growth(self) -> float | None:
        """Return the resident memory at the end over that after a quarter of the time since the last start."""
        seen = [resident for _, resident in self.memory[-1]]
        quarter = len(seen) // 4
        return statistics.median(seen[-quarter:]) / statistics.median(seen[quarter : 2 * quarter]) if quarter else None


def _head(length: int, *, close: bool = False) -> bytes:
    lines = ["POST /predict HTTP/1.1", f"Host: {HOST}", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += ["Connection: close"] if close else []
    return "\r\n".join([*lines, f"Authorization: Bearer {TOKEN}", "", ""]).encode()


def _as_sent(body: Any, *, close: bool = False) -> bytes:
    content = json.dumps(body).encode()
    return _head(len(content), close=close) + content


def prepare(folder: Path) -> Soak:
    """Write the models, predict with them, and return the service that has them."""
    base = str(tiny.build("bert", folder / "base"))
    kinds = {**KINDS, "first": "text-classifier", "second": "text-classifier"}
    for seed, (name, kind) in enumerate(kinds.items()):
        save_random(kind, base, folder / name, seed=seed)
    sources = [str(folder / name) for name in ("first", "second")]
    expected: dict[str, Expected] = {name: direct(str(folder / name)) for name in KINDS}
    token = folder / "token"
    token.write_text(TOKEN, encoding="utf-8")
    port = http_services.free_port()
    named = [f"{name}={folder / name}" for name in KINDS]
    options = ["--port", port, "--threads", 1, "--admin-token-file", token]
    soak = Soak(["flair_peft", "serve", *named, *options], port, expected, sources, folder / "log.txt")
    for source in sources:  # which digest is which
        assert soak.answered({"name": MOVING, "source": source}, path="/models").status in (200, 201)
        models = soak.answered(None, path="/info", method="GET").content["models"]
        digest = next(model["adapter_digest"] for model in models if model["name"] == MOVING)
        expected[digest] = direct(source)
    return soak


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    growth = "too short to tell" if report["growth"] is None else f"{report['growth']:.3f}"
    lines = [
        "# A service under load",
        "",
        f"`python -m tests.benchmarks.serving_soak --minutes {report['minutes']:g}`, {report['date']}, "
        f"{report['machine']}, {report['versions']}.",
        "Tiny models; each answer is compared with a direct `predict`; memory is what is resident at the end over what",
        "was after a quarter of the time since the last start.",
        "",
        "| what | | wanted |",
        "|---|---|---|",
        f"| problems (wrong answers, requests without one, statuses) | {len(report['problems'])} | 0 |",
        f"| memory | {growth} | ≤ {GROWTH} |",
        *(f"| {what} | {count} | |" for what, count in sorted(report["counted"].items())),
    ]
    return "\n".join([*lines, *(f"\n{problem}" for problem in report["problems"])]) + "\n"


def main() -> int:
    """Keep a service under load, write the report, and return 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        soak = prepare(Path(folder))
        soak.run(60 * options.minutes, restarts=options.restarts)
    growth = soak.growth()
    seen = {"problems": soak.problems, "counted": dict(soak.counted), "growth": growth, "memory": soak.memory}
    report = {**heading("no GPU used"), "minutes": options.minutes, **seen}
    write("serving_soak", report, to_markdown(report), out=options.out)
    is_long = options.minutes >= 2  # before that, the allocator has not come to rest
    return int(bool(soak.problems) or (is_long and growth is not None and growth > GROWTH))


if __name__ == "__main__":
    sys.exit(main())
