"""Names of the files and folders of a checkpoint directory, and the paths that cannot be one or be read alone."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

from flair_peft.errors import AdapterConfigError, ModelFileError

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
OLD_ADAPTER_WEIGHTS = "adapter_model.bin"


HEAD, BASE = "head.safetensors", "base.safetensors"


ARCHIVES = {"tokenizer_data": "tokenizer", "feature_extractor_data": "image_processor"}
"""Parameter of embeddings → folder of the files in its zip archive."""


def path_of(target: Any) -> Path:
    """Return the path that is meant, for something to be written there.

    Raises:
        AdapterConfigError: none is; an empty name would be the current directory.
    """
    if not isinstance(target, str | os.PathLike) or not os.fspath(target):
        raise AdapterConfigError(
            f"Cannot write to {target!r}: it names no place. Pass a path; the current directory is '.'."
        )
    return Path(target)


def refuse_impossible(source: Any) -> None:
    """Return if a file could have this name, whether or not there is one.

    Raises:
        ModelFileError: none can, or it is no name; to ask for it would be an error of the system, or of Python before
            3.13.
    """
    if not isinstance(source, str | os.PathLike):
        raise ModelFileError(
            f"Cannot load {source!r:.60}, a {type(source).__name__}: it is no name of a model. Pass a path or a Hub id."
        )
    try:
        Path(source).lstat()
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno != errno.ENAMETOOLONG:
            return
        reason = "too long" if isinstance(error, OSError) else "no text that a system takes"
        raise ModelFileError(
            f"Cannot load {str(source)[:60]!r}, a name of {len(str(source))} characters: as the name of a file it is "
            f"{reason}, and no repository is called so. Pass a path or a Hub id."
        ) from error


def refuse_part(path: Path) -> None:
    """Return unless the path is that of a file of a checkpoint, or of an adapter, which are directories.

    Raises:
        ModelFileError: it is.
    """
    if path.is_file() and path.suffix in (".json", ".safetensors"):
        raise ModelFileError(
            f"Cannot read '{path}': it is one file of several. A checkpoint, or an adapter, is the directory in which "
            f"it lies. Pass '{path.parent}'."
        )


def folder_of(index: int) -> str:
    """Return where the files of an embeddings module are: the first stands in the directory itself, as PEFT's do."""
    return "" if index == 0 else f"embeddings-{index}/"


def is_part(part: Any) -> bool:
    """Whether this describes an adapter of a directory: whose tensors are its, and which only PEFT reads."""
    lists = [part.get("prefixes"), part.get("only_for_peft")] if isinstance(part, dict) else [None]
    same_as = part.get("same_as", {}) if isinstance(part, dict) else None
    return (
        bool(lists[0])
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists)
        and isinstance(same_as, dict)
        and all(isinstance(name, str) for name in same_as.values())
    )
