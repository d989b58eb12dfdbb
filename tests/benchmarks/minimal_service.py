"""One Flair model behind FastAPI as one writes it by hand: a thread for each request, a lock around ``predict``.

``python -m tests.benchmarks.minimal_service MODEL PORT`` is what ``serving_http`` compares ``flair-peft serve`` with.
"""

from __future__ import annotations

import logging
import sys
import threading
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from flair.data import Sentence
from flair.nn import Classifier
from pydantic import BaseModel

import flair_peft  # noqa: F401 - checkpoint directories load with it


class Request(BaseModel):
    """What is asked."""

    inputs: str


def minimal_app(model: Classifier) -> FastAPI:
    """Return an app that predicts for one text at a time; FastAPI runs ``predict`` in its thread pool."""
    app, lock = FastAPI(), threading.Lock()

    @app.get("/ready")
    def ready() -> None:
        """Answer as soon as the model is there."""

    @app.post("/predict")
    def predict(request: Request) -> list[dict[str, Any]]:
        sentence = Sentence(request.inputs)
        with lock:
            model.predict(sentence)
        return [
            {"label": label.value, "score": label.score, "word": label.data_point.text}
            for label in sentence.get_labels(model.label_type)
        ]

    return app


def main() -> None:
    """Serve a model on loopback until the process is ended."""
    source, port = sys.argv[1:]
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    uvicorn.run(minimal_app(Classifier.load(source)), host="127.0.0.1", port=int(port), log_level="warning")


if __name__ == "__main__":
    main()
