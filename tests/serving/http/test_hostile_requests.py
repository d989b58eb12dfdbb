"""Whatever is sent gets an answer: in sentences, with a status that blames the sender, and repeated to nobody."""

from __future__ import annotations

import json
import logging
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

JSON = {"Content-Type": "application/json"}
DEEP = b"[" * 100_000 + b"]" * 100_000


def body(**parts: Any) -> bytes:
    return json.dumps({"inputs": "Who ?", "model": "text-classifier", **parts}).encode()


HOSTILE: dict[str, tuple[bytes, int]] = {
    "nothing": (b"", 422),
    "no JSON": (b"{inputs: 1}", 422),
    "no object": (b'["inputs"]', 422),
    "null": (b"null", 422),
    "NaN": (b'{"inputs": NaN}', 422),
    "huge number": (b'{"inputs": ' + b"9" * 10_000 + b"}", 422),
    "no UTF-8": (b'{"inputs": "\xff\xfe"}', 422),
    "raw NUL": (b'{"inputs": "a\0b"}', 422),
    "NUL": (body(inputs="a\0b"), 422),
    "lone surrogate": (b'{"inputs": "half \\ud83d", "model": "text-classifier"}', 422),
    "lone surrogate in tokens": (b'{"inputs": {"tokens": ["\\udc00"]}, "model": "text-classifier"}', 422),
    "lone surrogate in a name": (b'{"inputs": "a", "model": "\\ud83d"}', 422),
    "deep": (DEEP, 422),
    "deep objects": (b'{"a":' * 50_000, 422),
    "deep inputs": (b'{"model": "text-classifier", "inputs": ' + DEEP + b"}", 422),
    "name twice": (b'{"inputs": "a", "inputs": "b", "model": "text-classifier"}', 422),
    "name twice within": (b'{"inputs": {"text": "a", "text": "b"}, "model": "text-classifier"}', 422),
    "unknown name": (body(prompt="x"), 422),
    "unknown parameter": (body(parameters={"aggregation": "x"}), 422),
    "number": (body(inputs=7), 422),
    "numbers": (body(inputs=[1, 2]), 422),
    "list in a list": (body(inputs=[["a"]]), 422),
    "no text": (body(inputs={}), 422),
    "two texts": (body(inputs={"text": "a", "tokens": ["b"]}), 422),
    "pair of nothing": (body(inputs={"text_pair": "a"}), 422),
    "pair for a classifier": (body(inputs={"text": "a", "text_pair": "b"}), 422),
    "text for pairs": (body(model="text-pair-classifier"), 422),
    "pair for triples": (body(inputs={"texts": ["a", "b"]}, model="text-triple-classifier"), 422),
    "entities for a classifier": (body(inputs={"text": "a", "entities": []}), 422),
    "no entities": (body(model="relation-extractor"), 422),
    "model is a number": (body(model=1), 422),
    "no models": (body(model=[]), 422),
    "model twice": (body(model=["text-classifier", "text-classifier"]), 422),
    "two names": (body(adapter_id="sequence-tagger"), 422),
    "no name": (b'{"inputs": "a"}', 422),
    "unknown model": (body(model="../../etc/passwd"), 404),
    "one unknown model": (body(model=["text-classifier", "nobody"]), 404),
    "top_k of none": (body(parameters={"top_k": 0}), 422),
    "top_k is a text": (body(parameters={"top_k": "3"}), 422),
    "top_k is true": (body(parameters={"top_k": True}), 422),
    "adapter is a text": (body(parameters={"adapter": "no"}), 422),
    "too many texts": (body(inputs=["a"] * 257), 413),
    "a long text": (body(inputs=["a", "b " * 10_001]), 413),
    "too long": (body(inputs="a " * (1 << 19)), 413),
    "ten megabytes": (b" " * (10 << 20), 413),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_body_that_cannot_be_read_is_refused_in_sentences(client: httpx.Client, name: str) -> None:
    """A 4xx, with what is wrong and what to do; the next request is answered as ever."""
    content, status = HOSTILE[name]
    answer = client.post("/predict", content=content, headers=JSON)
    assert answer.status_code == status, answer.text
    assert answer.json().keys() == {"error", "code"}
    assert len(answer.json()["error"].split(". ")) >= 3
    assert len(answer.text) < 1000
    assert client.post("/predict", content=body(), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "entity", [(0, 5), (1, 13), (13, 13), (20, 13), (0, 10**9), (-1, 3), (7, 6), ("0", 13), (0.5, 13)]
)
def test_entity_that_is_no_words_is_refused(client: httpx.Client, entity: tuple[Any, Any]) -> None:
    """Nothing is guessed of what may have been meant."""
    given = {"start": entity[0], "end": entity[1], "entity_group": "PER"}
    inputs = {"text": "Angela Merkel met Steve Jobs .", "entities": [given]}
    answer = client.post("/predict", content=body(inputs=inputs, model="relation-extractor"), headers=JSON)
    assert answer.status_code == 422


def test_refusals_repeat_no_text_and_log_none(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """What is sent may be private: an error says where it is wrong, and not what stands there."""
    wrong: list[dict[str, Any]] = [
        {"inputs": {"text": "a secret", "tokens": ["b"]}},
        {"inputs": [{"text": "a secret"}, 7]},
        {"inputs": "a secret", "parameters": {"top_k": "a secret"}},
        {"inputs": "a secret \0"},
        {"inputs": "a secret", "model": ["a", 1]},
    ]
    with caplog.at_level(logging.DEBUG):
        for each in wrong:
            answer = client.post("/predict", content=body(**each), headers=JSON)
            assert answer.status_code == 422
            assert "secret" not in answer.text
        client.post("/predict", content=body(inputs="a secret"), headers=JSON)
    ours = [record for record in caplog.records if not record.name.startswith("http")]
    assert not any("secret" in record.getMessage() for record in ours)


def test_body_of_another_kind_is_refused(client: httpx.Client) -> None:
    """A page elsewhere can make a browser send it without asking."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = client.post("/predict", content=body(), headers={"Content-Type": kind})
        assert (answer.status_code, answer.json()["code"]) == (415, "not_json")


def raw(address: str, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Return what a server answers to bytes."""
    place = urlsplit(address)
    assert place.hostname
    with socket.create_connection((place.hostname, place.port or 80), timeout=20) as opened:
        for piece in pieces:
            try:
                opened.sendall(piece)
            except OSError:
                break  # it has answered, and closed
            time.sleep(pause)
        received = b""
        try:
            while b"\r\n\r\n" not in received and (more := opened.recv(65536)):
                received += more
        except ConnectionResetError:
            pass
        return received


HEAD = b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"


def test_body_in_chunks_is_bounded_while_it_comes(address: str) -> None:
    """Without a length, too: nothing of it is kept beyond the limit."""
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    answer = raw(address, HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * 40, b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413")


@pytest.mark.parametrize(
    "head",
    [
        b"POST /predict HTTP/1.1\r\nHost: here\r\n" + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 90) for n in range(2000)),
        b"POST /predict HTTP/1.1\r\nX: " + b"a" * (1 << 20) + b"\r\n",
        b"POST /" + b"a" * (1 << 20) + b" HTTP/1.1\r\n",
        b"\x16\x03\x01 hello\r\n\r\n",
        HEAD + b"Content-Length: -3\r\n",
        HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n",
        HEAD + b"Content-Length: 3\r\nTransfer-Encoding: nonsense\r\n",
    ],
    ids=["many headers", "long header", "long path", "no HTTP", "negative length", "two lengths", "odd encoding"],
)
def test_head_that_is_hostile_is_refused(client: httpx.Client, address: str, head: bytes) -> None:
    """By a 4xx, and the server goes on."""
    answer = raw(address, head + b"\r\n")
    assert answer.startswith((b"HTTP/1.1 4", b"HTTP/1.1 501"))
    assert client.get("/health").status_code == 200


def test_body_that_never_ends_is_no_trouble_to_others(client: httpx.Client, address: str) -> None:
    """A sender that is slow, or goes away in the middle, is the only one who waits."""
    place = urlsplit(address)
    with socket.create_connection((place.hostname, place.port)) as slow:  # type: ignore[arg-type]
        slow.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        assert client.post("/predict", content=body(), headers=JSON).status_code == 200
    assert client.post("/predict", content=body(), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/predict", 405),
        ("PUT", "/info", 405),
        ("GET", "/nobody", 404),
        ("GET", "/../../setup.cfg", 404),
        ("GET", "/%2e%2e/%2e%2e/setup.cfg", 404),
        ("GET", "/..%2f..%2fapp.py", 404),
        ("POST", "/", 405),
        ("GET", "/%00", 404),
        ("GET", "/page.css%00.html", 404),
    ],
)
def test_address_that_is_not_there_is_refused_in_sentences(
    client: httpx.Client, method: str, path: str, status: int
) -> None:
    """As JSON, whatever asks; no file beside the page's is served."""
    answer = client.request(method, path)
    assert answer.status_code == status
    assert answer.json().keys() == {"error", "code"}
