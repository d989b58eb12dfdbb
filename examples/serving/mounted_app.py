"""Flair models inside a FastAPI app of one's own, below ``/nlp``.

    pip install -c resources/constraints.txt -e ".[serve]" httpx
    python examples/quickstart.py --output models
    uvicorn --app-dir examples/serving mounted_app:app
    curl http://127.0.0.1:8000/reviews -H 'Content-Type: application/json' -d '["A fine film.", "A dull one."]'

``/nlp/predict``, ``/nlp/docs`` and the page at ``/nlp/`` are those of ``flair-peft serve``. Other routes of the app can
ask the models, too, as ``/reviews`` does: over no network, and in the same batches as everybody else.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from fastapi import FastAPI

from flair_peft.serving import create_app

MODELS = Path(os.environ.get("MODELS", "models"))

nlp = create_app({name: MODELS / f"{name}.pt" for name in ("sentiment", "ner")})
# The models as an address that only this process can reach.
client = httpx.AsyncClient(transport=httpx.ASGITransport(nlp), base_url="http://nlp")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    # FastAPI does not start and end what is mounted: this does.
    async with nlp.router.lifespan_context(nlp), client:
        yield


app = FastAPI(title="An app with models", lifespan=lifespan)
app.mount("/nlp", nlp)


@app.post("/reviews")
async def count(reviews: list[str]) -> dict[str, int]:
    """How many of the reviews are of which sentiment."""
    answer = await client.post("/predict", json={"model": "sentiment", "inputs": reviews})
    answer.raise_for_status()
    found = [labels[0]["label"] for labels in answer.json()]
    return {label: found.count(label) for label in sorted(set(found))}
