"""A file that stays the same one while it is read, whatever takes its name meanwhile."""

from __future__ import annotations

import io
import os
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from flair_peft.errors import MissingFileError, ModelFileError

_TRIES = 20
_Found = TypeVar("_Found")


class HeldFile(os.PathLike[str]):
    """A file that is open as long as this object lives.

    Readers take it for a path and open it by that, as often as they like: each gets this very file. As text it is the
    path that it was given, for messages.

    Args:
        path: of the file.
        descriptor: of the file, already open; it now belongs to this object.

    Raises:
        MissingFileError: it is not there.
        ModelFileError: it cannot be opened.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.path = path
        self._descriptor = _opened(path) if descriptor is None else descriptor
        weakref.finalize(self, os.close, self._descriptor)
        place = f"/proc/self/fd/{self._descriptor}"
        self._place = place if os.path.exists(place) else None  # noqa: PTH110 - Linux's way to open a file once more

    def __str__(self) -> str:
        return str(self.path)

    def __fspath__(self) -> str:
        return self._place or os.fspath(self.path)

    def open(self, mode: str = "rb", buffering: int = -1) -> io.BufferedReader:
        """Return the file, open once more, from its beginning."""
        return Path(self).open(mode, buffering)  # type: ignore[return-value]

    def stat(self) -> os.stat_result:
        """Return the status of the file."""
        return os.fstat(self._descriptor)

    def is_what_readers_get(self) -> bool:
        """Whether its path still leads to it, where it can be opened by that alone."""
        return self._place is not None or (self.path.exists() and os.path.samestat(self.path.stat(), self.stat()))


AnyFile = Path | HeldFile


def held(file: AnyFile) -> HeldFile:
    """Return the file, held open."""
    return file if isinstance(file, HeldFile) else HeldFile(file)


def reading(path: AnyFile, read: Callable[[HeldFile], _Found]) -> _Found:
    """Return what is read of one and the same file: of the one before or after, where another takes its name.

    Raises:
        MissingFileError: it is not there.
        ModelFileError: it cannot be opened, or others take its name over and over.
    """
    if isinstance(path, HeldFile):
        return read(path)
    for left in reversed(range(_TRIES)):
        file = HeldFile(path)
        try:
            found = read(file)
            if file.is_what_readers_get():
                return found
        except ModelFileError:
            if not left or file.is_what_readers_get():
                raise
        time.sleep(0.005)
    raise ModelFileError(
        f"Cannot read '{path}': others took its place {_TRIES} times while it was read. Parts of several files must "
        "not become one model. Load it when nobody writes it."
    )


def _opened(path: Path) -> int:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        return os.open(path, flags)
    except FileNotFoundError as error:
        raise MissingFileError(f"Cannot read '{path}': there is no such file. Check the path.") from error
    except OSError as error:
        raise ModelFileError(
            f"Cannot read '{path}': {error.strerror or error}. The system does not let this process open it. Check "
            "what it is and its permissions."
        ) from error
