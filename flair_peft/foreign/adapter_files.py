"""The files of a PEFT adapter that any library wrote: find them, read them, run nothing of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from peft import PeftConfig

from flair_peft.adapter import config as configs
from flair_peft.base import memory_check
from flair_peft.errors import AdapterConfigError, ModelFileError, name_some
from flair_peft.foreign import older_peft
from flair_peft.primitives.fingerprint import not_finite
from flair_peft.primitives.held_file import AnyFile, HeldFile
from flair_peft.primitives.load_context import LoadOptions
from flair_peft.storage import file_names, held_directory, hub

CONFIG, WEIGHTS = file_names.ADAPTER_CONFIG, file_names.ADAPTER_WEIGHTS
OLD_WEIGHTS = file_names.OLD_ADAPTER_WEIGHTS

EXPORTED = "flair_peft"
"""What the config of a model that this package exported calls the settings of the Flair model."""

# The config of the whole model names its labels, where somebody put it beside the adapter.
_MODEL_CONFIG, _TOKENIZER_CONFIG = "config.json", "tokenizer_config.json"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model")


# What transformers leaves out of a config, since it is what it takes then.
_NOT_WRITTEN = {"0": "LABEL_0", "1": "LABEL_1"}


@dataclass(frozen=True)
class HeadSettings:
    """What files tell of a head.

    Attributes:
        labels: by row.
        subtoken_pooling: of the Flair model that was exported: how it scores a word by its subtokens.
    """

    labels: tuple[str, ...] | None = None
    subtoken_pooling: str | None = None


@dataclass(frozen=True)
class AdapterFiles:
    """What the files of an adapter hold.

    Attributes:
        source: what the user called it.
        folder: where the files are.
        settings: ``adapter_config.json`` as it is.
        config: the same for this process; a copy of its own.
        tensors: name → tensor, as the file spells the names.
        head: what the files tell of that.
    """

    source: str
    folder: Path
    settings: Mapping[str, Any]
    config: PeftConfig
    tensors: Mapping[str, torch.Tensor]
    head: HeadSettings = field(default_factory=HeadSettings)

    @property
    def tokenizer(self) -> str | None:
        """The directory of the tokenizer that lies beside the adapter, or ``None``."""
        return str(self.folder) if (self.folder / _TOKENIZER_CONFIG).is_file() else None


def read(source: str, *, revision: str | None, subfolder: str | None, options: LoadOptions) -> AdapterFiles:
    """Return what the files of an adapter, in a directory or on the Hub, hold; its tensors are on the CPU.

    Raises:
        ModelFileError: files are missing or damaged.
        AdapterConfigError: the installed PEFT does not know the method or one of its settings.
        UnsupportedMethodError: an older PEFT wrote them, and computed something else.
    """
    wanted = [CONFIG, WEIGHTS, OLD_WEIGHTS, _MODEL_CONFIG, *TOKENIZER_FILES]
    folder = hub.find_files(source, wanted, revision=revision, subfolder=subfolder, options=options)
    # From a checkpoint that is being replaced, settings and tensors are those of one.
    files = held_directory.hold_files(folder, (CONFIG, WEIGHTS, OLD_WEIGHTS)) if folder.is_dir() else {}
    if CONFIG not in files:
        raise _missing(source, folder, CONFIG)
    settings = _read_json(files[CONFIG])
    weights = files.get(WEIGHTS) or files.get(OLD_WEIGHTS)
    if weights is None:
        raise _missing(source, folder, WEIGHTS)
    tensors = older_peft.rename(_read_tensors(source, weights))
    memory_check.Bounds(source, tensors).check_settings(settings)
    return AdapterFiles(source, folder, settings, _config(files[CONFIG], settings), tensors, _of_head(folder))


def _missing(source: str, folder: Path, name: str) -> ModelFileError:
    return ModelFileError(
        f"Cannot load the adapter '{source}': there is no {name} in '{folder}'. PEFT writes one with every adapter. "
        "Check the path, and pass subfolder= if the adapter is in a folder of it."
    )


def _read_json(path: AnyFile) -> dict[str, Any]:
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _damaged(path, error) from error
    if not isinstance(content, dict):
        raise _damaged(path, f"it holds a {type(content).__name__}")
    return content


def _config(path: AnyFile, settings: Mapping[str, Any]) -> PeftConfig:
    try:
        return configs.decode_config(older_peft.bring_up_to_date(settings, str(Path(str(path)).parent)))
    except AdapterConfigError:
        raise
    except (TypeError, ValueError, KeyError, RecursionError) as error:
        raise AdapterConfigError(
            f"Cannot read '{path}': {str(error).strip() or type(error).__name__}. The installed PEFT refuses these "
            "settings. Install the version of PEFT that wrote them, or correct the file."
        ) from error


def _read_tensors(source: str, path: HeldFile) -> dict[str, torch.Tensor]:
    try:
        if path.path.name == WEIGHTS:
            content = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers fail in many ways
        raise _damaged(path, str(error).strip().partition("\n")[0]) from error
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise _damaged(path, "it holds something else than tensors by name")
    if not content:
        raise _damaged(path, "it holds no tensors")
    _refuse_senseless(source, content)
    return content


def _refuse_senseless(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Return if all tensors hold numbers to compute with."""
    empty = [name for name, tensor in tensors.items() if not tensor.numel()]
    if empty:
        raise ModelFileError(
            f"Cannot use the adapter '{source}': {len(empty)} of its tensors are empty: {name_some(empty)}. "
            "DeepSpeed's ZeRO-3 spreads weights over processes, and leaves such tensors where they are saved without "
            "being gathered. Gather them (zero_to_fp32.py does that to its checkpoints), and save the adapter again."
        )
    broken = not_finite(tensors)
    if broken:
        raise ModelFileError(
            f"Cannot use the adapter '{source}': {len(broken)} of its tensors hold NaN or infinite numbers: "
            f"{name_some(broken)}. Its training diverged, and every prediction would be NaN. Take an earlier "
            "checkpoint, or train again, with a lower learning rate or in fp32 or bf16."
        )


def _of_head(folder: Path) -> HeadSettings:
    """Return what a model's config beside the adapter tells of its head; transformers' own placeholders are no labels.

    A training on from an export keeps what Flair's model was, and may have had other labels.
    """
    path = folder / _MODEL_CONFIG
    config = _read_json(path) if path.is_file() else {}
    names, exported = config.get("id2label", _NOT_WRITTEN), config.get(EXPORTED)
    if not isinstance(names, dict) or {str(index) for index in range(len(names))} != set(names):
        return HeadSettings()
    labels = tuple(str(names[str(index)]) for index in range(len(names)))
    if isinstance(exported, dict) and exported.get("names") == [*labels] and isinstance(exported.get("labels"), list):
        # id2label may call several of these the same.
        return HeadSettings(tuple(map(str, exported["labels"])), exported.get("subtoken_pooling"))
    is_named = labels != tuple(f"LABEL_{index}" for index in range(len(labels)))
    return HeadSettings(labels if is_named else None)


def _damaged(path: AnyFile, reason: object) -> ModelFileError:
    return ModelFileError(
        f"Cannot read '{path}': {str(reason).rstrip('.')}. It is truncated, damaged, or not one of PEFT's files; "
        "pickles that hold more than tensors are not read. Copy or save it again."
    )
