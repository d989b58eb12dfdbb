"""Files of models: written in each form, changed so that every checksum still agrees, and with code in them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flair.nn import Model
from safetensors.torch import load_file

import flair_peft
from flair_peft.codec import state_json
from flair_peft.storage import manifest

DOCUMENT = "flair_peft.json"
"""What a directory says of its model and its files."""


def save_as(kind: str, model: Model, folder: Path) -> Path:
    """Save a model with the function that the kind names, and return where."""
    path = folder / kind
    if kind.endswith("directory"):
        flair_peft.save_pretrained(model, path, save_base=kind.startswith("whole"))
    else:
        path = path.with_suffix(".pt")
        model.save(path, **({"save_base": kind.startswith("whole")} if kind != "stock" else {}))
    return path


def save_stock(model: Model, path: Path) -> Path:
    """Save a model as stock Flair does, without its hook."""
    flair_peft.uninstall()
    model.save(path)
    flair_peft.install()
    return path


def write_text(text: str, tensors: dict[str, torch.Tensor], path: Path, *, is_zip: bool = True) -> None:
    """Write what ``Model.save`` writes, with any text and tensors in the place of the model's."""
    torch.save(_Text(text, tensors), path, pickle_protocol=2, _use_new_zipfile_serialization=is_zip)


class _Text:
    def __init__(self, text: str, tensors: dict[str, torch.Tensor]) -> None:
        self.text, self.tensors = text, tensors

    def __reduce__(self) -> Any:
        return state_json.restore_state, (self.text, self.tensors)


def tensors_in(directory: Path) -> dict[str, torch.Tensor]:
    """Return file and name → tensor of all that a directory holds."""
    files = sorted(directory.rglob("*.safetensors"))
    return {f"{path.relative_to(directory)}: {name}": t for path in files for name, t in load_file(path).items()}


def resign(place: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change the document, and make its hash and those of all files right again."""
    document = json.loads((place / DOCUMENT).read_text())
    for name in document["files"]:
        if (place / name).is_file():
            entry = manifest.entry_of((place / name).read_bytes())
            document["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    change(document)
    document["sha256"] = manifest.hash_of(document)
    (place / DOCUMENT).write_text(json.dumps(document))


class Payload:
    """Makes a directory when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)
