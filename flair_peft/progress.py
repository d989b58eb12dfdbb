"""A progress bar over bytes, for whoever reads many of them: deep in a load, nobody knows who asked for it."""

from __future__ import annotations

import contextvars
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_bar: contextvars.ContextVar[Any] = contextvars.ContextVar("flair_peft_progress", default=None)


@contextmanager
def showing(what: str, *, total: int) -> Iterator[None]:
    """What is read inside moves a bar on stderr; none is shown where that is no terminal.

    Args:
        what: stands in front of the bar.
        total: bytes that will be read, as far as one can say.
    """
    with tqdm(desc=what, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=None) as bar:
        token = _bar.set(bar)
        try:
            yield
        finally:
            _bar.reset(token)


def advance(count: int) -> None:
    """Move the bar on by so many bytes, if there is one."""
    bar = _bar.get()
    if bar is not None:
        bar.update(count)
