"""The directory of an exported model of transformers: what in it is ours, and what is told to who opens it."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flair_peft.base import weight_files
from flair_peft.errors import SaveError, name_some
from flair_peft.foreign.adapter_files import EXPORTED, TOKENIZER_FILES
from flair_peft.storage import file_names, manifest
from flair_peft.storage.manifest import CARD

CONFIG = "config.json"


def names_of(folder: Path) -> list[str]:
    """Return which files in a folder are those of an earlier export, the config first; none if there was none."""
    record = _record(folder)
    if record is None:
        return []
    names = [name for name in record.get("files") or [] if isinstance(name, str) and manifest.is_name(name)]
    card = folder / CARD
    is_untouched = card.is_file() and _digest(card.read_bytes()) == record.get("card")
    return [CONFIG, *(name for name in names if name != CONFIG), *([card.name] if is_untouched else [])]


def refuse_others(folder: Path) -> None:
    """Return unless files lie there that would be read as part of the new model, or it as part of theirs.

    Raises:
        SaveError: there are such.
    """
    adapter = (file_names.ADAPTER_CONFIG, file_names.ADAPTER_WEIGHTS, manifest.DOCUMENT)
    clashing = (CONFIG, *weight_files.NAMES, *adapter, *TOKENIZER_FILES)
    there = {path.name for pattern in clashing for path in folder.glob(pattern)} - {*names_of(folder)}
    if there:
        raise SaveError(
            f"Cannot save to '{folder}': files of another model are there ({name_some(there)}). One of the two would "
            "be read with files of the other. Choose another directory."
        )


def seal(folder: Path, settings: Mapping[str, Any], card: str) -> None:
    """The folder tells what it holds, and all of it is on the disk."""
    text = card.encode("utf-8", "replace")
    (folder / CARD).write_bytes(text)
    files = sorted(path.name for path in folder.iterdir() if path.name != CARD)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config[EXPORTED] = {**settings, "files": files, "card": _digest(text)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _record(folder: Path) -> Mapping[str, Any] | None:
    try:
        record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))[EXPORTED]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
