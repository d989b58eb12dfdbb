"""Lets whoever waits for long work see that it goes on: deep in a load, nobody knows who asked for it."""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

_watcher: contextvars.ContextVar[Callable[[int], object] | None] = contextvars.ContextVar("flair_peft_watcher")

_PATIENCE, _INTERVAL = 2.0, 0.5
"""Seconds without a bar, and from one look of it to the next."""


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
    """What takes longer than two seconds has a bar on stderr meanwhile, which what is read inside moves.

    There is none where stderr is no terminal, where there is one around it already, and where
    ``HF_HUB_DISABLE_PROGRESS_BARS`` or ``transformers.utils.logging.disable_progress_bar()`` switched bars off.
    ``total`` is in bytes, as far as one can say; further options are those of ``tqdm``.
    """
    if _watcher.get(None) is not None:
        yield
        return
    bar_of_bytes = {"unit": "B", "unit_scale": True, "unit_divisor": 1024, "leave": False, "delay": _PATIENCE}
    # Much of what takes time reads nothing, so that bytes in a second would say something else.
    layout = {} if total else {"bar_format": "{desc}: {n_fmt}{unit} [{elapsed}]"}
    settings = {**bar_of_bytes, **layout, "disable": _is_switched_off(), **options}
    with tqdm(desc=what, total=total, **settings) as bar, watched_by(bar.update), _ticking(bar):
        yield


def _is_switched_off() -> bool | None:
    """Return what tqdm takes: ``None`` is for off where there is no terminal."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled  # what transformers switches, too

    return True if are_progress_bars_disabled() else None


@contextmanager
def _ticking(bar: tqdm[Any]) -> Iterator[None]:
    """Inside, the time on the bar goes on, whether bytes are told of or not."""
    if bar.disable:
        yield
        return
    over = threading.Event()

    def tick() -> None:
        pause = _PATIENCE
        while not over.wait(pause):
            bar.refresh()
            bar.last_print_t = time.time()  # or tqdm leaves the line where it is, and takes it for none
            pause = _INTERVAL

    ticker = threading.Thread(target=tick, daemon=True)
    ticker.start()
    try:
        yield
    finally:
        over.set()
        ticker.join()


def advance(count: int) -> None:
    """Tell the watcher, if there is one, that so many bytes more were read."""
    watcher = _watcher.get(None)
    if watcher is not None:
        watcher(count)
