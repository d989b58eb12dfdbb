"""flair_peft.json: what a checkpoint says of itself, under a hash of its own, and of its files.

    {"format_version": 1, "sha256": …, "files": {name: {"bytes": …, "sha256": …}}, "card": …, …}

``sha256`` is that of all the rest, written without spaces and with the names in their order; ``card`` is the hash of
the model card as it was written. What else is in the document is for others to decide.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flair_peft.errors import FormatVersionError, ModelFileError, UnsupportedStateError
from flair_peft.primitives import strict_json

DOCUMENT = "flair_peft.json"
CARD = "README.md"
FORMAT_VERSION = 1
"""Of the directory; the embeddings in Flair's own files count theirs in compat.py."""
LARGEST = 256 << 20
"""Bytes of a file that is read as a whole; files of tensors may be larger."""

RESERVED = ("format_version", "sha256", "files", "card")
_PART = r"(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._-]+"
_NAME = re.compile(rf"{_PART}(?:/{_PART}){{0,3}}")
_DIGEST = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """What the manifest says of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Document:
    """A document taken apart.

    Attributes:
        body: all that is not the format's own.
        files: name → size and hash of each file of the checkpoint.
        card: hash of the model card as it was written.
    """

    body: dict[str, Any]
    files: dict[str, Entry]
    card: str


def is_name(name: str) -> bool:
    """Return whether a file of a checkpoint may have this name: up to four parts of ``A-Z a-z 0-9 . _ -``."""
    return _NAME.fullmatch(name) is not None and name not in (DOCUMENT, CARD)


def entry_of(content: bytes) -> Entry:
    """Return the size and the hash of a file with this content."""
    return Entry(len(content), hashlib.sha256(content).hexdigest())


def compose(document: Document) -> bytes:
    """Return the text of the document, signed.

    Raises:
        UnsupportedStateError: its body is not made of JSON's own types, or too large.
    """
    files = {name: asdict(entry) for name, entry in document.files.items()}
    unsigned = {"format_version": FORMAT_VERSION, "files": files, "card": document.card, **document.body}
    try:
        signed = {"format_version": FORMAT_VERSION, "sha256": hash_of(unsigned), **unsigned}
        text = json.dumps(signed, indent=2, allow_nan=False).encode("ascii") + b"\n"
        is_same = json.loads(text) == signed
    except (TypeError, ValueError, RecursionError) as error:
        raise unsupported(DOCUMENT, str(error)) from error
    if not is_same:
        raise unsupported(DOCUMENT, "tuples, and keys that are not strings, would be read back as something else")
    if len(text) > LARGEST:
        raise unsupported(DOCUMENT, f"it has {len(text)} bytes, more than {LARGEST}")
    return text


def parse(text: bytes, path: Path) -> Document:
    """Return the document, verified by its own hash; the path is for messages.

    Raises:
        FormatVersionError: it was written by a newer flair_peft.
        ModelFileError: it is damaged.
    """
    try:
        found = strict_json.loads(text.decode("utf-8"))
        is_signed = isinstance(found, dict) and found.get("sha256") == hash_of(found)
    except (ValueError, RecursionError) as error:
        raise damaged(path, f"it is no JSON of this format ({error})") from error
    if not isinstance(found, dict):
        raise damaged(path, "it holds no JSON object")
    # First, for a newer format may be signed in another way.
    _check_version(found.get("format_version"), path)
    if not is_signed:
        raise damaged(path, "its content does not match its hash")
    return _take_apart(found, path)


def hash_of(document: Mapping[str, Any]) -> str:
    """Return the hash of a document; whether it has one already makes no difference."""
    unsigned = {key: value for key, value in document.items() if key != "sha256"}
    canonical = json.dumps(unsigned, allow_nan=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def damaged(path: Path, why: str) -> ModelFileError:
    """Return the error for a file that is not what was saved."""
    return ModelFileError(
        f"Cannot read '{path}': {why}. It was changed, or copied only in part, after it was saved. Copy or save it "
        "again."
    )


def unsupported(what: object, why: str) -> UnsupportedStateError:
    """Return the error for what the format cannot hold."""
    return UnsupportedStateError(
        f"Cannot store '{what}': {why}. A checkpoint holds JSON, tensors and small files only. Change what is saved."
    )


def _check_version(version: Any, path: Path) -> None:
    """Return if this version can be read; one that no version has is damage, and not the future."""
    if type(version) is not int or version < 1:
        raise damaged(path, f"its format version is {str(version)[:20]!r}")
    if version > FORMAT_VERSION:
        raise FormatVersionError(
            f"Cannot read '{path}': it is in format version {version}. This flair_peft reads versions up to "
            f"{FORMAT_VERSION}, so a newer one wrote it, or it is damaged. Upgrade flair_peft, or copy it "
            "again."
        )


def _take_apart(found: dict[str, Any], path: Path) -> Document:
    files, card = found.get("files"), found.get("card")
    if not isinstance(card, str) or not isinstance(files, dict):
        raise damaged(path, "it has no list of files")
    entries = {name: _entry(name, value, path) for name, value in files.items()}
    return Document({key: value for key, value in found.items() if key not in RESERVED}, entries, card)


def _entry(name: str, value: Any, path: Path) -> Entry:
    if not is_name(name):
        raise damaged(path, f"it lists a file {name[:100]!r}, a name that no checkpoint uses")
    is_entry = isinstance(value, dict) and value.keys() == {"bytes", "sha256"}
    are_typed = is_entry and type(value["bytes"]) is int and isinstance(value["sha256"], str)
    if not are_typed or value["bytes"] < 0 or not _DIGEST.fullmatch(value["sha256"]):
        raise damaged(path, f"what it says of '{name}' is not a size and a hash")
    return Entry(**value)
