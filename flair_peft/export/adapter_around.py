"""PEFT's files of an adapter in the names of a class around its transformer, whose head is saved with it in full."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from flair.nn import Model
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys
from flair_peft.errors import AdapterConfigError, name_some
from flair_peft.export import headed_class
from flair_peft.export.headed_class import HeadedModel
from flair_peft.export.linear_head import LinearHead
from flair_peft.models import directory_layout, save_plan
from flair_peft.storage import file_names

MERGED_INSTEAD = "Leave merged at True, or --adapter out"
"""What else can be written."""

_IN_PEFT = "base_model.model."


def write(folder: Path, model: Model, head: LinearHead, headed: HeadedModel) -> None:
    """Write the files of the adapter of a model.

    Raises:
        AdapterConfigError: more than the adapter was changed in the transformer.
    """
    plan = save_plan.plan_save(model)
    document: Any
    files: Any
    document, files = directory_layout.to_files(save_plan.encode(plan), plan)
    (part,) = document["parts"]
    prefixes = tuple(part["prefixes"])
    own = [name for name in files[file_names.HEAD] if name.startswith(prefixes)]
    beside = [name for name in own if keys.base_key(name.removeprefix(prefixes[0])) is not None]
    added = plan.parts[0].stored.added_rows
    if added is not None and len(added) > int(head.embeddings.use_context_separator):
        beside.append("rows of new tokens")
    settings = json.loads(files[file_names.ADAPTER_CONFIG])
    if beside or "modules_to_save" not in settings:
        reason = f"{name_some(beside)} were changed beside it" if beside else "its config has no modules_to_save"
        raise AdapterConfigError(
            f"Cannot write the adapter of '{head.embeddings.name}' for PEFT: {reason}. Its files have room for the "
            f"adapter and the head, and for nothing else. {MERGED_INSTEAD}."
        )
    tensors = dict([*_of_head(headed), *_of_adapter(files[file_names.ADAPTER_WEIGHTS], headed)])
    # One storage under several names is not stored: some methods have such.
    alone = {n: t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}
    safetensors.torch.save_file(alone, folder / file_names.ADAPTER_WEIGHTS, {"format": "pt"})
    text = json.dumps(_settings(settings, head, headed), indent=2)
    (folder / file_names.ADAPTER_CONFIG).write_text(text, encoding="utf-8")


def _of_head(headed: HeadedModel) -> Iterator[tuple[str, torch.Tensor]]:
    for name in headed.saved:
        state = headed.model.get_submodule(name).state_dict()
        yield from ((f"{_IN_PEFT}{name}.{key}", tensor.float()) for key, tensor in state.items())


def _of_adapter(tensors: Mapping[str, torch.Tensor], headed: HeadedModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors under their names in the class, but those of a pooler, which it lacks or has as its head."""
    inside = f"{headed.base_name}."
    for key, tensor in tensors.items():
        own = key.removeprefix(_IN_PEFT)
        if own == key:
            yield key, tensor
        elif inside + keys.carrier(own) in headed.modules and not _is_of_head(inside + own, headed):
            yield _IN_PEFT + inside + own, tensor


def _is_of_head(name: str, headed: HeadedModel) -> bool:
    return any(f"{name}.".startswith(f"{saved}.") for saved in headed.saved)


def _settings(settings: dict[str, Any], head: LinearHead, headed: HeadedModel) -> dict[str, Any]:
    """Return ``adapter_config.json`` for the class: it names each module, whatever else the class has."""
    base = headed.model.get_submodule(headed.base_name)
    # What adapts a bare parameter stands around its module, and target_parameters names it.
    adapted = [
        name
        for name, module in base.named_modules()
        if isinstance(module, BaseTunerLayer) and not isinstance(module, ParamWrapper)
    ]
    own = {name: f"{headed.base_name}.{name}" for name in adapted if f"{headed.base_name}.{name}" in headed.modules}
    settings["task_type"] = headed_class.task_of(head)
    settings["revision"] = head.embeddings.base_revision
    beside = [name for name in headed.modules if not _is_of_head(name, headed)]
    wanted = tuple(settings.get("modules_to_save") or ())
    # By their whole names: the head may have layers that are called so, too.
    saved = [name for name in beside if name.endswith(wanted)]
    settings["modules_to_save"] = [*saved, *headed.saved]
    if settings.get("target_modules") is not None:
        settings["target_modules"] = sorted(own.values())
        settings.update(
            {name: None for name in ("exclude_modules", "layers_to_transform", "layers_pattern") if name in settings}
        )
    for setting in configs.PATTERNS:
        if settings.get(setting):
            settings[setting] = dict(_inside(settings[setting], own))
    if isinstance(settings.get("feedforward_modules"), list):
        wanted = tuple(f".{name}" for name in settings["feedforward_modules"])
        settings["feedforward_modules"] = sorted(name for name in own.values() if f".{name}".endswith(wanted))
    return settings


def _inside(patterns: Mapping[str, Any], own: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    """Yield expressions for names in the class: those that say where a name begins become the names that they fit."""
    for pattern, value in patterns.items():
        if "^" in pattern:
            fitting = (there for name, there in own.items() if get_pattern_key(patterns.keys(), name) == pattern)
            yield from ((f"^{re.escape(there)}", value) for there in fitting)
        else:
            yield pattern, value
