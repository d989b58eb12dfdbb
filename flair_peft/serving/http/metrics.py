"""Figures for Prometheus: requests, errors, latency, batches and the queue, of one app alone."""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SENTENCES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The figures of one app; two apps of a process have registries of their own."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        """Count from zero; ``waiting`` returns the length of the queue."""
        self._registry = CollectorRegistry()
        common: dict[str, Any] = {"registry": self._registry, "namespace": "flair_peft"}
        self._requests = Counter("requests", "Predictions asked for, by model.", ["model"], **common)
        self._errors = Counter("errors", "Requests without a prediction, by what was wrong.", ["code"], **common)
        self._latency = Histogram("request_seconds", "From body to answer.", ["model"], buckets=_SECONDS, **common)
        self._sentences = Counter("sentences", "Sentences predicted, by model.", ["model"], **common)
        self._batch = Histogram("batch_sentences", "Sentences of a batch.", buckets=_SENTENCES, **common)
        self._sharing = Histogram("batch_requests", "Requests that share a batch.", buckets=_SENTENCES, **common)
        self._seconds = Histogram("batch_seconds", "Time of a batch.", buckets=_SECONDS, **common)
        queue = Gauge("queue_sentences", "Sentences that wait.", **common)
        queue.set_function(waiting)

    def saw_request(self, models: Sequence[str], seconds: float) -> None:
        """Count an answered request."""
        for name in models:
            self._requests.labels(name).inc()
            self._latency.labels(name).observe(seconds)

    def saw_error(self, code: str) -> None:
        """Count a request without an answer."""
        self._errors.labels(code).inc()

    def saw_batch(self, *, models: Sequence[str], sentences: int, requests: int, seconds: float) -> None:
        """Count a batch: the name of the model of each of its sentences, and so on."""
        for name, count in collections.Counter(models).items():
            self._sentences.labels(name).inc(count)
        self._batch.observe(sentences)
        self._sharing.observe(requests)
        self._seconds.observe(seconds)

    def to_text(self) -> bytes:
        """Return the figures as Prometheus reads them."""
        return generate_latest(self._registry)
