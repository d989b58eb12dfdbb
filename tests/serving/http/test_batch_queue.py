"""The queue: who shares a batch, who waits, who leaves, and that nobody's trouble is another's."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from flair.data import Sentence

from flair_peft.serving import create_app
from tests.support import tiny
from tests.support.gated_model import GatedModel, wait_until
from tests.support.http_server import client_of
from tests.support.models import classifier

TEXTS = list(tiny.CORPUS)
Send = Callable[[Any], "Future[httpx.Response]"]


@pytest.fixture
def gated(base: Callable[[str], str]) -> GatedModel:
    """Return a classifier at whose gate calls can be made to wait."""
    return GatedModel(classifier(base("bert")).eval())


@contextmanager
def serving(gated: GatedModel, **limits: Any) -> Iterator[tuple[httpx.Client, Send]]:
    """Inside, the model answers: a client, and a function that sends inputs from a thread of its own."""
    with client_of(create_app({"m": gated.model}, **limits)) as client, ThreadPoolExecutor(64) as pool:
        gated.calls.clear()
        try:
            yield client, lambda inputs: pool.submit(client.post, "/predict", json={"inputs": inputs})
        finally:
            gated.gate.set()


def waiting(client: httpx.Client) -> int:
    """Return how many sentences wait."""
    lines = client.get("/metrics").text.splitlines()
    return int(float(next(line for line in lines if line.startswith("flair_peft_queue_sentences ")).split()[1]))


def hold(gated: GatedModel, client: httpx.Client, send: Send, inputs: list[Any]) -> list[Future[httpx.Response]]:
    """Return the answers to come of requests that all wait while the first is at the gate."""
    gated.close()
    answers = [send(inputs[0])]
    assert gated.arrived.wait(20)
    for number, given in enumerate(inputs[1:]):
        before = waiting(client)
        answers.append(send(given))
        wait_until(lambda before=before: waiting(client) > before)  # type: ignore[misc]
        assert number < len(inputs)
    return answers


def label_of(gated: GatedModel, text: str) -> str:
    """Return what the model says of a text."""
    sentence = Sentence(text)
    gated._predict([sentence])
    return sentence.get_labels("sentiment")[0].value


def test_queue_lets_requests_that_wait_share_a_batch(gated: GatedModel) -> None:
    """Up to its size, first come first served; each gets the answers to its own texts."""
    with serving(gated, batch=4) as (client, send):
        answers = hold(gated, client, send, TEXTS[:8])
        gated.gate.set()
        for text, answer in zip(TEXTS[:8], answers, strict=True):
            assert answer.result().json()[0]["label"] == label_of(gated, text)
    assert gated.calls[:3] == [TEXTS[:1], TEXTS[1:5], TEXTS[5:8]]


def test_queue_refuses_what_has_no_room_and_answers_the_rest(gated: GatedModel) -> None:
    """With a time after which to ask again; what never has room is told so."""
    with serving(gated, queue=5) as (client, send):
        answers = hold(gated, client, send, [TEXTS[0], TEXTS[:3]])
        refused = client.post("/predict", json={"inputs": TEXTS[:3]})
        assert (refused.status_code, refused.json()["code"]) == (503, "queue_full")
        assert int(refused.headers["Retry-After"]) >= 1
        too_many = client.post("/predict", json={"inputs": TEXTS[:6]})
        assert (too_many.status_code, too_many.json()["code"]) == (413, "too_many_texts")
        gated.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200]
        assert client.post("/predict", json={"inputs": TEXTS[:3]}).status_code == 200


def test_queue_forgets_a_request_whose_sender_is_gone(gated: GatedModel) -> None:
    """It is never predicted, and makes room."""
    with serving(gated) as (client, send):
        answers = hold(gated, client, send, TEXTS[:1])
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{client.base_url}/predict", json={"inputs": ["gone"] * 3}, timeout=0.3)
        last = send(TEXTS[1])
        wait_until(lambda: waiting(client) == 1)
        gated.gate.set()
        assert [answer.result().status_code for answer in (*answers, last)] == [200, 200]
    assert not any("gone" in call for call in gated.calls)


def test_queue_predicts_a_long_request_in_parts_between_others(gated: GatedModel) -> None:
    """A request that is longer than a batch keeps nobody waiting for all of it, and is not starved itself."""
    with serving(gated, batch=2) as (client, send):
        long = TEXTS[:7]
        answers = hold(gated, client, send, [TEXTS[8], long, TEXTS[7], TEXTS[8]])
        gated.gate.set()
        found = [each[0]["label"] for each in answers[1].result().json()]
        assert found == [label_of(gated, text) for text in long]
        assert [answer.result().json()[0]["label"] for answer in answers[2:]] == [
            label_of(gated, text) for text in TEXTS[7:9]
        ]
    sizes = [len(call) for call in gated.calls]
    assert max(sizes) == 2
    assert gated.calls.index([TEXTS[7], TEXTS[8]]) < len(gated.calls) - 1


def test_queue_bounds_the_words_of_a_batch(gated: GatedModel) -> None:
    """A text that has more goes alone."""
    texts = ["one two", "three four", "five", "six " * 9, "seven"]
    with serving(gated, batch_tokens=4) as (client, send):
        answers = hold(gated, client, send, ["first", *texts])
        gated.gate.set()
        assert all(answer.result().status_code == 200 for answer in answers)
    assert gated.calls[1:] == [texts[:2], texts[2:3], [texts[3].strip()], texts[4:]]


def test_request_that_fails_costs_no_other_its_answer(gated: GatedModel, caplog: pytest.LogCaptureFixture) -> None:
    """The others of its batch are predicted once more; its own text is in no log."""
    gated.raises = lambda text: ValueError(f"bad: {text}") if "secret" in text else None
    with serving(gated) as (client, send), caplog.at_level(logging.DEBUG):
        answers = hold(gated, client, send, [TEXTS[0], TEXTS[1], "a secret word", TEXTS[2]])
        gated.gate.set()
        statuses = [answer.result().status_code for answer in answers]
        assert statuses == [200, 200, 422, 200]
        failed = answers[2].result()
        assert failed.json()["code"] == "unreadable_text"
        assert "secret" not in failed.text
        assert answers[3].result().json()[0]["label"] == label_of(gated, TEXTS[2])
    assert "ValueError" in caplog.text
    assert "secret" not in caplog.text


def test_model_that_fails_is_not_the_fault_of_the_text(gated: GatedModel) -> None:
    """A plain text fails as well: 500, in sentences, and without a trace of the code."""
    with serving(gated) as (client, _):
        gated.raises = lambda _: RuntimeError("out of order")
        failed = client.post("/predict", json={"inputs": "Who ?"})
        gated.raises = lambda _: None
        assert (failed.status_code, failed.json()["code"]) == (500, "prediction_failed")
        assert failed.json()["error"].count(". ") == 2
        assert "Traceback" not in failed.text
        assert client.post("/predict", json={"inputs": "Who ?"}).status_code == 200


def test_client_alone_never_waits_for_others(gated: GatedModel) -> None:
    """However long it would have to."""
    with serving(gated, max_wait=20.0) as (client, _):
        start = time.monotonic()
        for text in TEXTS:
            assert client.post("/predict", json={"inputs": text}).status_code == 200
        assert time.monotonic() - start < 15
    assert gated.calls == [[text] for text in TEXTS]


def test_clients_that_were_answered_together_are_waited_for(gated: GatedModel) -> None:
    """Those of a batch ask again one after the other, and share the next one, too."""
    with serving(gated, max_wait=20.0) as (client, send):
        answers = hold(gated, client, send, TEXTS[:4])  # one at the gate, three behind it
        gated.gate.set()
        wait_until(lambda: len(gated.calls) == 2 or answers[0].done())
        again = send(TEXTS[4])
        assert all(answer.result().status_code == 200 for answer in (*answers, again))
        assert gated.calls == [TEXTS[:1], TEXTS[1:5]]


def test_queue_that_drains_answers_what_it_has_taken(gated: GatedModel) -> None:
    """And nothing else; it says that it is not ready, and lives."""
    app = create_app({"m": gated.model})
    with client_of(app) as client, ThreadPoolExecutor(8) as pool:
        gated.calls.clear()
        answers = hold(gated, client, lambda t: pool.submit(client.post, "/predict", json={"inputs": t}), TEXTS[:3])
        app.state.service.drain()
        refused = client.post("/predict", json={"inputs": TEXTS[0]})
        assert (refused.status_code, refused.json()["code"]) == (503, "closing")
        assert "Retry-After" in refused.headers
        assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
        gated.gate.set()
        assert [answer.result().status_code for answer in answers] == [200, 200, 200]
