"""What this package says during a training stands in Flair's ``training.log``, beside what Flair says of it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

_ours, _flairs = logging.getLogger("flair_peft"), logging.getLogger("flair")


class _InFlairsFiles(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        if self is not next(each for each in _ours.handlers if isinstance(each, _InFlairsFiles)):
            return  # of several trainings at once, Flair's logger has the files of all
        for handler in _flairs.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handle(record)
        # Python writes to stderr what no handler gets, and these are some.
        others = [*_ours.handlers, *(logging.root.handlers if _ours.propagate else ())]
        last = logging.lastResort
        if (
            last is not None
            and record.levelno >= last.level
            and all(isinstance(each, _InFlairsFiles) for each in others)
        ):
            last.handle(record)


@contextlib.contextmanager
def shared() -> Iterator[None]:
    """Inside, what the logger of this package passes on goes to the files of Flair's logger, too."""
    handler = _InFlairsFiles()
    _ours.addHandler(handler)
    try:
        yield
    finally:
        _ours.removeHandler(handler)
