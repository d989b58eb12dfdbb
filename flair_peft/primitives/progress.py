"""Lets whoever waits for long work see that it goes on: deep in a load, nobody knows who asked for it."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_watcher: contextvars.ContextVar[Callable[[int], object] | None] = contextvars.ContextVar("flair_peft_watcher")


@contextmanager
def watched_by(watcher: Callable[[int], object]) -> Iterator[None]:
    """Inside, ``watcher`` is told of the bytes that were read, as many as since it was told last."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


@contextmanager
def shown(what: str, *, total: int | None = None, **options: Any) -> Iterator[None]:
    """What is read inside moves a bar on stderr; none is shown where that is no terminal.

    Args:
        what: stands in front of the bar.
        total: bytes that will be read, as far as one can say.
        **options: of ``tqdm``.
    """
    bar_of_bytes = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "disable": None}
    with tqdm(desc=what, total=total, **{**bar_of_bytes, **options}) as bar, watched_by(bar.update):
        yield


def advance(count: int) -> None:
    """Tell the watcher, if there is one, that so many bytes more were read."""
    watcher = _watcher.get(None)
    if watcher is not None:
        watcher(count)
