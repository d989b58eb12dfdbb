"""The directory of an exported model of transformers: what in it is ours, and what is told to who opens it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flair_peft.base import weight_files
from flair_peft.errors import SaveError, name_some
from flair_peft.foreign.adapter_files import EXPORTED, TOKENIZER_FILES
from flair_peft.primitives import fingerprint
from flair_peft.storage import file_names, manifest
from flair_peft.storage.manifest import CARD

CONFIG = "config.json"


def names_of(folder: Path) -> list[str]:
    """Return which files in a folder are those of an earlier export, the config first; none if there was none."""
    record = _record(folder)
    if record is None:
        return []
    names = [name for name in record["files"] if isinstance(name, str) and manifest.is_name(name)]
    card = folder / CARD
    is_untouched = card.is_file() and manifest.entry_of(card.read_bytes()).sha256 == record.get("card")
    return [CONFIG, *names, *([card.name] if is_untouched else [])]


def refuse_others(folder: Path) -> None:
    """Return unless files lie there that would be read as part of the new model, or it as part of theirs.

    What transformers or PEFT trained on and saved in its place is theirs, too, although the config still says what it
    was.

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
    changed = _changed(folder)
    if changed:
        raise SaveError(
            f"Cannot save to '{folder}': files there were changed after an export ({name_some(changed)}), by a "
            "training on from it, for example. They would be lost. Choose another directory, or remove this one."
        )


def seal(folder: Path, settings: Mapping[str, Any], card: str) -> None:
    """The folder tells what it holds, and all of it is on the disk."""
    text = card.encode("utf-8", "replace")
    (folder / CARD).write_bytes(text)
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    files = {path.relative_to(folder).as_posix(): fingerprint.of_file(path) for path in paths}
    config = _read_config(folder)
    own = {name: digest for name, digest in files.items() if name not in (CONFIG, CARD)}
    config[EXPORTED] = {**settings, "files": own, "card": files[CARD], "config": _digest_of_settings(config)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in paths:
        shutil.copymode(folder / CARD, path)  # safetensors makes files that their owner alone may read
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _changed(folder: Path) -> list[str]:
    """Return the names of files of an earlier export that are not what it wrote."""
    record = _record(folder)
    if record is None:
        return []
    there = [name for name in names_of(folder)[1:] if name != CARD and (folder / name).is_file()]
    changed = [name for name in there if fingerprint.of_file(folder / name) != record["files"][name]]
    return changed if _digest_of_settings(_read_config(folder)) == record.get("config") else [CONFIG, *changed]


def _record(folder: Path) -> Mapping[str, Any] | None:
    try:
        record = _read_config(folder)[EXPORTED]
    except (OSError, ValueError, TypeError, LookupError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("files"), dict) else None


def _read_config(folder: Path) -> Any:
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))


def _digest_of_settings(config: Mapping[str, Any]) -> str:
    """Return the digest of what a config says of the model, however it is laid out."""
    settings = {name: value for name, value in config.items() if name != EXPORTED}
    return manifest.entry_of(json.dumps(settings, sort_keys=True).encode()).sha256
