"""A model whose ``predict`` waits at a gate, and keeps a list of what it was called with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from flair.nn import Model


class GatedModel:
    """Wraps the ``predict`` of a model, in place.

    Attributes:
        calls: the texts of each call that began.
        gate: while it is not set, calls wait.
        raises: text → error that a call with it raises, or ``None``.
    """

    def __init__(self, model: Model) -> None:
        self.model, self.calls, self.gate = model, list[list[str]](), threading.Event()
        self.gate.set()
        self.raises: Callable[[str], Exception | None] = lambda _: None
        self.arrived = threading.Event()
        self._predict = model.predict
        model.predict = self._predict_at_gate

    def close(self) -> None:
        """Let calls wait from now on."""
        self.arrived.clear()
        self.gate.clear()

    def _predict_at_gate(self, points: list[Any], **options: Any) -> None:
        self.calls.append([point.text for point in points])
        self.arrived.set()
        assert self.gate.wait(30)
        errors = [error for point in points if (error := self.raises(point.text)) is not None]
        if errors:
            raise errors[0]
        self._predict(points, **options)


def wait_until(condition: Callable[[], bool]) -> None:
    """Return once something is so."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)
