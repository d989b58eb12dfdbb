"""The checkpoint directory as files: its only writer, and the reader of all of it.

    flair_peft.json      the document, and the manifest of the files with their hashes
    README.md            the card: people edit it, so it is in no manifest and never read
    *.safetensors        tensors, under names that the manifest lists
    anything else        bytes, likewise; files that the manifest does not list are nobody's here, and stay

What is in the document, and which files there are, is for others to decide.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from flair_peft.errors import name_some
from flair_peft.primitives import host_internals, mapped_memory, progress
from flair_peft.primitives.held_file import HeldFile
from flair_peft.storage.atomic import flushing, replace_directory
from flair_peft.storage.held_directory import Folder, names_of, of_one_folder, readable
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
    unsupported,
)

Tensors = dict[str, torch.Tensor]
Content = bytes | Mapping[str, torch.Tensor]

_MAPPED_FROM = 64 << 20
"""Bytes from which on a file of tensors is mapped into memory instead of read."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds, every byte of it verified.

    Attributes:
        document: as it was given to ``write``.
        files: name → bytes of each file that holds no tensors.
        tensors: name of a file → name → tensor, on the CPU; those of large files are mapped, not copied.
    """

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
        with flushing() as write_new:
            for name, content in files.items():
                data = _serialise(name, content)
                manifest[name] = entry_of(data)
                write_new(folder / name, data)
            text = card.encode("utf-8", "replace")
            write_new(folder / CARD, text)
            write_new(folder / DOCUMENT, compose(Document(dict(document), manifest, entry_of(text).sha256)))

    replace_directory(directory, fill, names_of=names_of, gives_way=(CARD,))


def read(directory: Path) -> Checkpoint:
    """Return the checkpoint, every byte of it verified; one that is being replaced is read as it was or as it is.

    Raises:
        FormatVersionError: it was written by a newer flair_peft.
        ModelFileError: there is none, or it is not as it was written.
    """
    return of_one_folder(directory, _read)


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
        unshared[name] = plain.clone() if storage in seen or host_internals.is_copied_on_write(plain) else plain
        seen.add(storage)
    return unshared


def _read(folder: Folder) -> Checkpoint:
    document = folder.document()
    files: dict[str, bytes] = {}
    tensors: dict[str, Tensors] = {}
    # All are opened or read before any is hashed: a writer that replaces the folder meanwhile removes only names.
    large = {
        name: folder.held(name, entry.bytes)
        for name, entry in document.files.items()
        if name.endswith(".safetensors") and entry.bytes >= _MAPPED_FROM
    }
    small = {name: folder.content(name, entry.bytes) for name, entry in document.files.items() if name not in large}
    for name, entry in document.files.items():
        content = large.get(name) or small[name]
        _check_hash(folder.path / name, content, entry)
        if name.endswith(".safetensors"):
            tensors[name] = _tensors(folder.path / name, content)
        else:
            files[name] = small[name]
    return Checkpoint(document.body, files, tensors)


def _check_hash(path: Path, content: bytes | HeldFile, entry: Entry) -> None:
    digest = hashlib.sha256()
    if isinstance(content, bytes):
        digest.update(content)
    else:
        with readable(path), content.open() as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
                progress.advance(len(chunk))
    if digest.hexdigest() != entry.sha256:
        raise damaged(path, f"its hash is {digest.hexdigest()[:8]}…, not {entry.sha256[:8]}… as when it was saved")


def _tensors(path: Path, content: bytes | HeldFile) -> Tensors:
    """Return the tensors of a file, from its bytes or in memory that is mapped to the very file that was hashed."""
    try:
        if isinstance(content, bytes):
            return safetensors.torch.load(content)
        found = safetensors.torch.load_file(content)
    except Exception as error:
        # Under a right hash there may be anything, and safetensors fails in many ways.
        raise damaged(path, f"it holds no tensors in safetensors' format ({error})") from error
    if not content.is_what_readers_get():
        raise damaged(path, "another file took its place while it was read")
    return found
