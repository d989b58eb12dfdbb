"""Lets whoever waits for long work see that it goes on."""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_watcher: contextvars.ContextVar[Callable[[int], object] | None] = contextvars.ContextVar("flair_peft_watcher")


@contextmanager
def watched_by(watcher: Callable[[int], object]) -> Iterator[None]:
    """Inside, ``watcher`` is told of the bytes that were read, as many as since it was told last."""
    token = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(token)


def advance(count: int) -> None:
    """Tell the watcher, if there is one, that so many bytes more were read."""
    watcher = _watcher.get(None)
    if watcher is not None:
        watcher(count)
