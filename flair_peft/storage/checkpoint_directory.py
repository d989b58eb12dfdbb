"""The checkpoint directory as files: its only writer and reader.

    flair_peft.json      the document, and the manifest of the files with their hashes
    README.md            the card: people edit it, so it is in no manifest and never read
    *.safetensors        tensors, under names that the manifest lists
    anything else        bytes, likewise; files that the manifest does not list are nobody's here, and stay

What is in the document, and which files there are, is for others to decide.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import safetensors.torch
import torch

from flair_peft.errors import ModelFileError, name_some
from flair_peft.primitives import mapped_memory, progress
from flair_peft.primitives.held_file import HeldFile
from flair_peft.storage.atomic import explained, find_directory, replace_directory, write_file, write_flushed
from flair_peft.storage.manifest import (
    CARD,
    DOCUMENT,
    LARGEST,
    RESERVED,
    Document,
    Entry,
    compose,
    damaged,
    entry_of,
    is_name,
    parse,
    unsupported,
)

__all__ = [
    "CARD",
    "DOCUMENT",
    "Checkpoint",
    "Content",
    "Tensors",
    "explained",
    "hold",
    "hold_files",
    "is_checkpoint",
    "read",
    "write",
    "write_file",
]

Tensors = dict[str, torch.Tensor]
Content = bytes | Mapping[str, torch.Tensor]
_Found = TypeVar("_Found")

_MAPPED_FROM = 64 << 20
"""Bytes from which on a file of tensors is mapped into memory instead of read."""
_TRIES = 20


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, every byte of it verified.

    Attributes:
        directory: where it was read.
        document: as it was given to ``write``.
        files: name → bytes of each file that holds no tensors.
        tensors: name of a file → name → tensor, on the CPU; those of large files are mapped, not copied.
    """

    directory: Path
    document: dict[str, Any]
    files: Mapping[str, bytes]
    tensors: Mapping[str, Tensors]


def write(directory: Path, document: Mapping[str, Any], files: Mapping[str, Content], card: str) -> None:
    """The directory holds this checkpoint, whole, or an error was raised and it holds what it held before.

    Files in it that no checkpoint named stay, as the very same files, and so does a card that somebody edited.

    Args:
        directory: it and its parents may be missing.
        document: of JSON's own types; no key of the format itself.
        files: name → bytes, or tensors under a name that ends in ``.safetensors``. Tensors may be on any device, share
            memory and be strided in any way.
        card: the text of README.md.

    Raises:
        SaveError: it could not be written.
        UnsupportedStateError: a document, name or tensor that the format cannot hold.
    """
    _check_content(directory, document, files)

    def fill(folder: Path) -> None:
        manifest = {}
        for name, content in files.items():
            data = _serialise(name, content)
            manifest[name] = entry_of(data)
            write_flushed(folder / name, data)
        text = card.encode("utf-8", "replace")
        write_flushed(folder / CARD, text)
        write_flushed(folder / DOCUMENT, compose(Document(dict(document), manifest, entry_of(text).sha256)))

    replace_directory(directory, fill, names_of=_names_of, gives_way=(CARD,))


def read(directory: Path) -> Checkpoint:
    """Return the checkpoint, every byte of it verified; one that is being replaced is read as it was or as it is.

    Raises:
        FormatVersionError: it was written by a newer flair_peft.
        ModelFileError: there is none, or it is not as it was written.
    """
    return _of_one_folder(directory, lambda folder: _read(folder, directory))


def hold(directory: Path) -> tuple[Document, dict[str, HeldFile]]:
    """Return what a checkpoint says of itself, and its files: all of one checkpoint, and none of these verified.

    Raises:
        FormatVersionError: it was written by a newer flair_peft.
        ModelFileError: there is none, or its document is not as it was written.
    """

    def open_all(folder: _Folder) -> tuple[Document, dict[str, HeldFile]]:
        document = folder.document()
        return document, folder.hold([DOCUMENT, CARD, *document.files])

    return _of_one_folder(directory, open_all, is_whole=lambda found: len(found[1]) == len(found[0].files) + 2)


def hold_files(directory: Path, names: Collection[str]) -> dict[str, HeldFile]:
    """Return those files of any directory that are there: all of one, even if a checkpoint is written there."""
    return _of_one_folder(directory, lambda folder: folder.hold(names), is_whole=lambda found: len(found) == len(names))


def is_checkpoint(directory: Path) -> bool:
    """Return whether there is a checkpoint, whole or not; one that an interrupted save left aside counts."""
    return _has_document(find_directory(directory, names_of=_names_of))


def _check_content(directory: Path, document: Mapping[str, Any], files: Mapping[str, Content]) -> None:
    clashing = {name for name in RESERVED if name in document}
    if clashing:
        raise unsupported(directory, f"its document uses names of the format itself: {name_some(clashing)}")
    bad = {name for name in files if not is_name(name)}
    if bad:
        raise unsupported(directory, f"file names must be made of A-Z a-z 0-9 . _ -, unlike {name_some(bad)}")
    for name, content in files.items():
        if isinstance(content, Mapping) != name.endswith(".safetensors"):
            raise unsupported(name, "tensors, and nothing else, go to names that end in .safetensors")
        if not isinstance(content, Mapping) and len(content) > LARGEST:
            raise unsupported(name, f"it has {len(content)} bytes, more than {LARGEST}")


def _serialise(name: str, content: Content) -> bytes:
    if not isinstance(content, Mapping):
        return content
    if "__metadata__" in content:
        raise unsupported(name, "a tensor cannot be called '__metadata__', which safetensors keeps for itself")
    try:
        # Some dtypes can be written but not read.
        for dtype in {tensor.dtype for tensor in content.values()}:
            safetensors.torch.load(safetensors.torch.save({"": torch.empty(0, dtype=dtype)}))
        return safetensors.torch.save(_unshared(content), {"format": "pt"})
    except (safetensors.SafetensorError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        raise unsupported(name, str(error)) from error


def _unshared(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors contiguous, on the CPU and no two in one storage, which safetensors would not store."""
    unshared, seen = {}, set()
    for name, tensor in tensors.items():
        plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        storage = mapped_memory.address(plain) - plain.storage_offset() * plain.itemsize
        unshared[name] = plain.clone() if storage in seen or mapped_memory.is_copied_on_write(plain) else plain
        seen.add(storage)
    return unshared


def _names_of(directory: Path) -> list[str]:
    """Return which files in a directory are a checkpoint's, the document first; none if there is no document."""
    if not _has_document(directory):
        return []
    names = [DOCUMENT]
    # What cannot be known to be the checkpoint's stays, as other people's files do.
    with contextlib.suppress(ModelFileError), _Folder(directory) as folder:
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


def _of_one_folder(
    directory: Path, read: Callable[[_Folder], _Found], *, is_whole: Callable[[_Found], bool] = lambda _: True
) -> _Found:
    """Return what is read of the directory as it was or as it is; what is not whole is read anew where it changed."""
    tries_left = _TRIES
    while True:
        place = find_directory(directory, names_of=_names_of)
        before = _identity(place)
        tries_left -= 1
        try:
            with _Folder(place) as folder:
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


def _read(folder: _Folder, directory: Path) -> Checkpoint:
    document = folder.document()
    files: dict[str, bytes] = {}
    tensors: dict[str, Tensors] = {}
    with contextlib.ExitStack() as opened:
        # All are opened or read before any is hashed: a writer that replaces the folder meanwhile removes only names.
        large = {
            name: opened.enter_context(folder.open(name, entry.bytes))
            for name, entry in document.files.items()
            if _is_mapped(name, entry)
        }
        small = {name: folder.content(name, entry.bytes) for name, entry in document.files.items() if name not in large}
        for name, entry in document.files.items():
            _check_hash(folder.path / name, large.get(name) or small[name], entry)
            if name in large:
                tensors[name] = folder.mapped(name, large[name])
            elif name.endswith(".safetensors"):
                tensors[name] = _tensors(folder.path / name, small[name])
            else:
                files[name] = small[name]
    return Checkpoint(directory, document.body, files, tensors)


def _is_mapped(name: str, entry: Entry) -> bool:
    return name.endswith(".safetensors") and entry.bytes >= _MAPPED_FROM


def _check_hash(path: Path, content: bytes | BinaryIO, entry: Entry) -> None:
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with _readable(path):
            while chunk := content.read(1 << 20):
                digest.update(chunk)
                progress.advance(len(chunk))
    if digest.hexdigest() != entry.sha256:
        raise damaged(path, f"its hash is {digest.hexdigest()[:8]}…, not {entry.sha256[:8]}… as when it was saved")


def _tensors(path: Path, content: bytes | str) -> Tensors:
    """Return the tensors of a file, from its bytes or from a path to it."""
    try:
        if isinstance(content, bytes):
            return safetensors.torch.load(content)
        return safetensors.torch.load_file(content)
    except Exception as error:
        # Under a right hash there may be anything, and safetensors fails in many ways.
        raise damaged(path, f"it holds no tensors in safetensors' format ({error})") from error


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn the operating system's errors into one that names the file."""
    try:
        yield
    except OSError as error:
        raise damaged(path, f"it cannot be read ({error.strerror or error})") from error


class _Folder:
    """One directory: the same one still when another has taken its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        if os.open in os.supports_dir_fd:
            with _readable(path):
                self._descriptor = os.open(path, getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY)

    def __enter__(self) -> _Folder:
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
            raise ModelFileError(
                f"Cannot read '{self.path}': there is no {DOCUMENT} in it. It is no checkpoint of flair_peft, or was "
                "copied only in part. Check the path, or copy it again."
            ) from error

    def content(self, name: str, size: int | None = None) -> bytes:
        """Return the bytes of a file, read as a whole; ``size`` is how many there must be."""
        with self.open(name, size) as file, _readable(self.path / name):
            found = os.fstat(file.fileno()).st_size
            if found > LARGEST:
                raise damaged(self.path / name, f"it has {found} bytes, more than {LARGEST}")
            return file.read(found)

    def open(self, name: str, size: int | None = None) -> BinaryIO:
        """Return a regular file, open for reading; a pipe or device is not even opened."""
        path = self.path / name if self._descriptor is None else Path(name)
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        with contextlib.ExitStack() as unless_right, _readable(self.path / name):
            self._check(name, os.stat(path, dir_fd=self._descriptor), size)
            file = unless_right.enter_context(os.fdopen(os.open(path, flags, dir_fd=self._descriptor), "rb"))
            self._check(name, os.fstat(file.fileno()), size)
            unless_right.pop_all()
            return file

    def hold(self, names: Iterable[str]) -> dict[str, HeldFile]:
        """Return those files that are there; devices and the like are not."""
        found = {}
        for name in names:
            with contextlib.suppress(ModelFileError), self.open(name) as file:
                found[name] = HeldFile(self.path / name, os.dup(file.fileno()))
        return found

    def _check(self, name: str, status: os.stat_result, size: int | None) -> None:
        if not stat.S_ISREG(status.st_mode):
            raise damaged(self.path / name, "it is not a regular file")
        if size is not None and status.st_size != size:
            raise damaged(self.path / name, f"it has {status.st_size} bytes, not {size} as when it was saved")

    def mapped(self, name: str, file: BinaryIO) -> Tensors:
        """Return the tensors of an open file, in memory that is mapped to it."""
        path = self.path / name
        if sys.platform == "linux":
            # The very file that was hashed, even if its name is gone.
            return _tensors(path, f"/proc/self/fd/{file.fileno()}")
        tensors = _tensors(path, str(path))
        with _readable(path):
            if not os.path.samestat(path.stat(), os.fstat(file.fileno())):
                raise damaged(path, "another file took its place while it was read")
        return tensors
