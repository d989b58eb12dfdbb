"""A checkpoint directory, read as it was or as it is while others replace it: its document and its files, held open.

Nothing here reads tensors.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, TypeVar

from flair_peft.errors import ModelFileError, name_some
from flair_peft.primitives.held_file import HeldFile
from flair_peft.storage.atomic import find_directory
from flair_peft.storage.manifest import CARD, DOCUMENT, LARGEST, Document, damaged, entry_of, parse

_Found = TypeVar("_Found")

_TRIES = 20


def hold(directory: Path) -> tuple[Document, dict[str, HeldFile]]:
    """Return what a checkpoint says of itself, and its files: all of one checkpoint, and none of these verified.

    Raises:
        FormatVersionError: it was written by a newer flair_peft.
        ModelFileError: there is none, or its document is not as it was written.
    """

    def open_all(folder: Folder) -> tuple[Document, dict[str, HeldFile]]:
        document = folder.document()
        return document, folder.hold([DOCUMENT, CARD, *document.files])

    return of_one_folder(directory, open_all, is_whole=lambda found: len(found[1]) == len(found[0].files) + 2)


def hold_files(directory: Path, names: Collection[str]) -> dict[str, HeldFile]:
    """Return those files of any directory that are there: all of one, even if a checkpoint is written there."""
    return of_one_folder(directory, lambda folder: folder.hold(names), is_whole=lambda found: len(found) == len(names))


def is_checkpoint(directory: Path) -> bool:
    """Return whether there is a checkpoint, whole or not; one that an interrupted save left aside counts."""
    return _has_document(find_directory(directory, names_of=names_of))


def names_of(directory: Path) -> list[str]:
    """Return which files in a directory are a checkpoint's, the document first; none if there is no document."""
    if not _has_document(directory):
        return []
    names = [DOCUMENT]
    # What cannot be known to be the checkpoint's stays, as other people's files do.
    with contextlib.suppress(ModelFileError), Folder(directory) as folder:
        document = folder.document()
        names.extend(document.files)
        if entry_of(folder.content(CARD)).sha256 == document.card:
            names.append(CARD)
    return names


def _has_document(directory: Path) -> bool:
    return os.path.isfile(directory / DOCUMENT)  # noqa: PTH113 - Path raises where a folder may not be entered


def _identity(place: Path) -> tuple[int, ...] | None:
    try:
        status = place.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns


def of_one_folder(
    directory: Path, read: Callable[[Folder], _Found], *, is_whole: Callable[[_Found], bool] = lambda _: True
) -> _Found:
    """Return what is read of the directory as it was or as it is; what is not whole is read anew where it changed."""
    tries_left = _TRIES
    while True:
        place = find_directory(directory, names_of=names_of)
        before = _identity(place)
        tries_left -= 1
        try:
            with Folder(place) as folder:
                found = read(folder)
            if is_whole(found) or not tries_left or not _was_replaced(place, before, directory):
                return found
        except ModelFileError:
            if not tries_left or not _was_replaced(place, before, directory):
                raise
        time.sleep(0.005)


def _was_replaced(place: Path, before: tuple[int, ...] | None, directory: Path) -> bool:
    """Return whether what could not be read was put away by a writer meanwhile."""
    after = _identity(place)
    return after != before or (after is None and is_checkpoint(directory))


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the file."""
    try:
        yield
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from error


class Folder:
    """One directory: the same one still when another has taken its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            with readable(path):
                self._descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def document(self) -> Document:
        """Return what flair_peft.json says, verified by its own hash."""
        try:
            return parse(self.content(DOCUMENT), self.path / DOCUMENT)
        except ModelFileError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                raise
            models = [path.name for path in self.path.glob("*.pt")]
            other = f"pass one of its files, such as {name_some(models, 2)}" if models else "copy it again"
            raise ModelFileError(
                f"Cannot read '{self.path}': there is no {DOCUMENT} in it. It is no checkpoint of flair_peft, or was "
                f"copied only in part. Check the path, or {other}."
            ) from error

    def content(self, name: str, size: int | None = None) -> bytes:
        """Return the bytes of a file, read as a whole; ``size`` is how many there must be."""
        with self.open(name, size) as file, readable(self.path / name):
            found = os.fstat(file.fileno()).st_size
            if found > LARGEST:
                raise damaged(self.path / name, f"it has {found} bytes, more than {LARGEST}")
            return file.read(found)

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Return a regular file, open for reading; a pipe or device is not even opened."""
        path = self.path / name if self._descriptor is None else Path(name)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with contextlib.ExitStack() as unless_right, readable(self.path / name):
            self._check(name, os.stat(path, dir_fd=self._descriptor), size)
            file = unless_right.enter_context(os.fdopen(os.open(path, flags, dir_fd=self._descriptor), "rb"))
            self._check(name, os.fstat(file.fileno()), size)
            unless_right.pop_all()
            return file

    def held(self, name: str, size: int | None = None) -> HeldFile:
        """Return a regular file, held open."""
        with self.open(name, size) as file:
            return HeldFile(self.path / name, os.dup(file.fileno()))

    def hold(self, names: Iterable[str]) -> dict[str, HeldFile]:
        """Return those files that are there; devices and the like are not."""
        found = {}
        for name in names:
            with contextlib.suppress(ModelFileError):
                found[name] = self.held(name)
        return found

    def _check(self, name: str, status: os.stat_result, size: int | None) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise damaged(self.path / name, "it is not a regular file")
        if size is not None and status.st_size != size:
            raise damaged(self.path / name, f"it has {status.st_size} bytes, not {size} as when it was saved")
