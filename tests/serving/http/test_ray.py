"""The app on Ray Serve: what the app of one machine says, from replicas that load, drop and lose models."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from flair_peft import serving
from flair_peft.errors import AdapterConfigError
from flair_peft.serving.http.requests import PredictionRequest
from flair_peft.serving.http.service import Limits
from tests.benchmarks.http_services import free_port
from tests.support.direct_answers import assert_same
from tests.support.direct_answers import plain as plain_form
from tests.support.http_server import client_of
from tests.support.models import save_random

ray = pytest.importorskip("ray", reason="Ray is not installed")
ray_deployment = pytest.importorskip("flair_peft.serving.http.ray_deployment")

# Ray leaves sockets and files to its own processes.
pytestmark = [pytest.mark.matrix, pytest.mark.filterwarnings("ignore")]

ROOT = Path(__file__).parents[3]
MODELS = {
    "ner": "sequence-tagger",
    "sentiment": "text-classifier",
    "score": "text-regressor",
    "pair": "text-pair-classifier",
}
KINDS = {"ner": "spans", "sentiment": "labels", "score": "number"}
TEXTS = ["Berlin is large .", "George Washington went to Washington ."]
PROOF = ("x-model", "x-adapter-digest", "x-base-fingerprint")
SECONDS = 300
LIMITS = Limits(max_wait=0.05, batch=32, batch_tokens=None, queue=64, max_texts=8, max_length=10_000, max_body=10_000)


@pytest.fixture(scope="module")
def sources(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("on-ray")
    return {name: save_random(kind, base("bert"), root / name)[0] for name, kind in MODELS.items()}


@contextlib.contextmanager
def deployed(sources: dict[str, str], **options: Any) -> Iterator[httpx.Client]:
    """A client of the app on Ray, in a cluster of its own."""
    from ray import serve

    port = free_port()
    ray.init(num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(serving.ray_app(sources, **options))
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
            yield client
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture(scope="module")
def on_ray(sources: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of one replica that holds two models of four, and drops one for each other that is asked."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    patch.setenv("PYTHONPATH", str(ROOT))
    with deployed(sources, models_per_replica=2, max_texts=8, max_body=10_000) as client:
        yield client
    patch.undo()


@pytest.fixture(scope="module")
def plain(sources: dict[str, str]) -> Iterator[httpx.Client]:
    """A client of the app of one machine with the same models."""
    with client_of(serving.create_app(sources, max_texts=8, max_body=10_000)) as client:
        yield client


@pytest.mark.parametrize("name", KINDS)
def test_ray_app_answers_as_the_app_of_one_machine(on_ray: httpx.Client, plain: httpx.Client, name: str) -> None:
    """Answers and the proof in their headers are the same, for a replica that has to drop models on the way."""
    for body in ({"model": name, "inputs": TEXTS}, {"adapter_id": name, "inputs": TEXTS[:1]}):
        found, expected = (client.post("/predict", json=body) for client in (on_ray, plain))
        assert found.status_code == expected.status_code == 200
        assert_same(found.json(), [plain_form(answer, KINDS[name]) for answer in expected.json()], KINDS[name])
        assert [found.headers[header] for header in PROOF] == [expected.headers[header] for header in PROOF]


def test_ray_app_answers_for_several_models_and_without_their_adapters(
    on_ray: httpx.Client, plain: httpx.Client
) -> None:
    """More models in one request than a replica holds are held for its time; bodies are those of one machine."""
    for parameters in ({}, {"adapter": False}):
        body = {"model": list(KINDS), "inputs": TEXTS[0], "parameters": parameters}
        found, expected = (client.post("/predict", json=body) for client in (on_ray, plain))
        assert found.status_code == 200, found.text
        for name, kind in KINDS.items():
            assert_same([found.json()[name]], [plain_form(expected.json()[name], kind)], kind)
        assert found.headers.get("x-adapter") == expected.headers.get("x-adapter")
        assert [found.headers[header] for header in PROOF] == [expected.headers[header] for header in PROOF]


def test_ray_app_says_of_its_models_what_the_app_of_one_machine_says(on_ray: httpx.Client, plain: httpx.Client) -> None:
    """/info has every model, though no replica holds all of them."""
    found, expected = (client.get("/info").json() for client in (on_ray, plain))
    assert found["models"] == expected["models"]
    assert found["versions"] == expected["versions"]
    assert on_ray.get("/ready").status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        {"model": "absent", "inputs": "a"},
        {"inputs": "a"},
        {"model": "ner", "inputs": 3},
        {"model": "ner", "inputs": ["a"] * 9},
        {"model": "ner", "inputs": "a" * 20_000},
        {"model": "pair", "inputs": "only one"},
        {"model": "ner", "inputs": "a", "parameters": {"top_k": 2}},
    ],
    ids=["unknown", "none", "type", "many", "long", "unfit", "top_k"],
)
def test_ray_app_refuses_as_the_app_of_one_machine(on_ray: httpx.Client, plain: httpx.Client, body: Any) -> None:
    """Status, code and sentences are the same, whether the app or a replica refuses."""
    found, expected = (client.post("/predict", json=body) for client in (on_ray, plain))
    assert 400 <= found.status_code == expected.status_code < 500
    assert found.json() == expected.json()


def test_replica_mixes_models_in_one_batch(sources: dict[str, str]) -> None:
    """What several models are asked at one time shares a batch, as Ray hands it over."""
    # Long enough for the other one to come on a busy machine, too.
    replica = ray_deployment.Replica(sources, {}, dataclasses.replace(LIMITS, max_wait=1))
    shared: list[int] = []
    replica._service.metrics.saw_batch = lambda **batch: shared.append(batch["requests"])  # type: ignore[method-assign]

    async def predict_twice() -> None:
        leases = [await replica.lease(name) for name in ("ner", "sentiment")]
        jobs = [ray_deployment._Job([lease], PredictionRequest(inputs=TEXTS)) for lease in leases]
        for _ in range(2):  # the first one says how many are to be expected
            assert all(reply.error is None for reply in await replica.predict_all(jobs))

    asyncio.run(predict_twice())
    replica._service.close()
    assert shared[-1] == len(("ner", "sentiment"))


def test_replica_keeps_a_model_that_was_dropped_until_it_has_answered(sources: dict[str, str]) -> None:
    """The model goes with the last one who holds it, and a model that is held is not loaded twice."""
    replica = ray_deployment.Replica(sources, {}, LIMITS)

    async def hold_and_drop() -> None:
        lease = await replica.lease("ner")
        assert (await replica.lease("ner")).served is lease.served
        assert [model.name for model in replica._service.models.all] == ["ner"]
        del lease
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not replica._service.models.all

    asyncio.run(hold_and_drop())
    replica._service.close()


def test_ray_example_with_a_killed_replica_has_only_right_answers(sources: dict[str, str], tmp_path: Path) -> None:
    """Two replicas under load, one of them killed: each answer is what predict says, and none is missing."""
    settings = {"PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    named = [f"{name}={sources[name]}" for name in ("ner", "sentiment")]
    options = ["--port", str(free_port()), "--seconds", "3"]
    command = [sys.executable, str(ROOT / "examples" / "serving" / "ray_example.py"), *named, *options]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, **settings}, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "0 wrong or missing; two again: True" in done.stdout


def test_ray_app_of_a_live_model_is_refused() -> None:
    """Replicas on other machines cannot get what lives in this process."""
    with pytest.raises(AdapterConfigError, match="no path and no Hub id"):
        serving.ray_app({"ner": object()})
    with pytest.raises(AdapterConfigError, match="no models"):
        serving.ray_app({})
