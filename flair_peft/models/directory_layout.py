"""The state of a Flair model ⇄ the files of a checkpoint directory: which tensor goes where, and comes from where."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, methods
from flair_peft.base import memory_check
from flair_peft.codec import state_json
from flair_peft.errors import FlairPeftError, ModelFileError, UnsupportedStateError, name_some
from flair_peft.foreign import translate_config
from flair_peft.models.save_plan import Description, Part, SavePlan
from flair_peft.primitives import fingerprint, mapped_memory
from flair_peft.primitives.fingerprint import are_same_bits
from flair_peft.storage import file_names

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes | Tensors]


def to_files(description: Description, plan: SavePlan) -> tuple[dict[str, Any], Files]:
    """Return the document of a checkpoint directory and the files beside it.

    Raises:
        UnsupportedStateError: the weights of its embeddings are not among those of the model.
    """
    tensors, files, parts = dict(description.tensors), dict[str, Any](), []
    document = json.loads(json.dumps(description.document))
    archives = {
        params[name]["tensor"] for params in _params_of(document) for name in file_names.ARCHIVES if params.get(name)
    }
    for part in plan.parts:
        folder = file_names.folder_of(part.index)
        for params in _params_of(document, part.index):
            for name, content in _take_archives(params, tensors):
                files.setdefault(folder + name, content)
            params.pop("peft_config", None)
        prefixes = list(part.prefixes_in(tensors))
        if not prefixes:
            raise UnsupportedStateError(
                f"Cannot store the embeddings '{part.embeddings.name}': their state_dict() gives other tensors each "
                "time. A hook of it, or a module that computes what it holds, makes them anew. Take that away first."
            )
        for name in [prefix + key for prefix in prefixes for key in part.weights]:
            tensors.pop(name)
        only_for_peft, rest, same_as = list[str](), dict(part.weights), _tied(part.weights)
        if not part.is_plain:
            files[folder + file_names.ADAPTER_CONFIG] = _adapter_config(part.embeddings)
            files[folder + file_names.ADAPTER_WEIGHTS], only_for_peft, rest = _split(part)
            same_as = _held_elsewhere(rest, files[folder + file_names.ADAPTER_WEIGHTS])
        rest = {name: tensor for name, tensor in rest.items() if name not in same_as}
        base = set() if part.stored.is_needed else {name for name in rest if keys.base_key(name) is not None}
        files.setdefault(file_names.BASE, {}).update({prefixes[0] + name: rest.pop(name) for name in base})
        tensors.update({prefixes[0] + name: tensor for name, tensor in rest.items()})
        twice = {"same_as": same_as} if same_as else {}
        parts.append({"prefixes": prefixes, "only_for_peft": only_for_peft, **twice})
    # Equal archives are one tensor: two embeddings on one base have the same tokenizer.
    files[file_names.HEAD] = {name: tensor for name, tensor in tensors.items() if name not in archives}
    return {"parts": parts, "model": document}, {name: content for name, content in files.items() if content != {}}


def from_files(
    document: Mapping[str, Any], files: Mapping[str, bytes], tensors: Mapping[str, Mapping[str, torch.Tensor]]
) -> Any:
    """Return the state of the model that :func:`to_files` took apart.

    Raises:
        ModelFileError: parts of it do not fit each other.
    """
    parts, model = document.get("parts"), json.loads(json.dumps(document.get("model")))
    if not isinstance(parts, list) or not all(file_names.is_part(part) for part in parts):
        raise _damaged("its list of embeddings is not one")
    found: Tensors = {**tensors.get(file_names.HEAD, {}), **tensors.get(file_names.BASE, {})}
    known = {
        file_names.HEAD,
        file_names.BASE,
        *(file_names.folder_of(index) + file_names.ADAPTER_WEIGHTS for index in range(len(parts))),
    }
    if set(tensors) - known:
        raise _damaged(f"nothing uses {name_some(set(tensors) - known)}")
    for index, part in enumerate(parts):
        folder = file_names.folder_of(index)
        adapter = dict(tensors.get(folder + file_names.ADAPTER_WEIGHTS, {}))
        bounds = memory_check.Bounds(folder + file_names.ADAPTER_CONFIG, {**adapter, **found})
        is_plain = not adapter and folder + file_names.ADAPTER_CONFIG not in files
        _give_weights(part, adapter, found)
        for params in _params_of(model, index):
            if not is_plain:
                params["peft_config"] = _read_config(files, folder + file_names.ADAPTER_CONFIG, bounds)
            _give_archives(params, folder, files, found)
    return state_json.decode(model, found)


def _params_of(document: Any, index: int | None = None) -> Iterator[dict[str, Any]]:
    """Yield the stored parameters of one embeddings module, or of all: once for each task that shares it."""
    pending = [document]
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            is_meant = "part" in value if index is None else value.get("part") == index
            if is_meant and "__cls__" in value and "config_state_dict" in value:
                yield value
            pending.extend(value.values())
        elif isinstance(value, list):
            pending.extend(value)


def _take_archives(params: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, bytes]]:
    """Take the archives out of the parameters, and yield name and content of each file in them."""
    for name, folder in file_names.ARCHIVES.items():
        stored = params.pop(name, None)
        if stored is not None:
            content = state_json.decode(stored, {stored["tensor"]: tensors[stored["tensor"]]})
            with zipfile.ZipFile(content) as archive:
                yield from ((f"{folder}/{file}", archive.read(file)) for file in archive.namelist())


def _give_archives(params: dict[str, Any], folder: str, files: Mapping[str, bytes], tensors: Tensors) -> None:
    for name, subfolder in file_names.ARCHIVES.items():
        inside = f"{folder}{subfolder}/"
        members = {file.removeprefix(inside): content for file, content in files.items() if file.startswith(inside)}
        if not members:
            continue
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w") as archive:
            for file, content in members.items():
                archive.writestr(file, content)
        packed.seek(0)
        params[name], held = state_json.encode(packed, where=inside + name)
        tensors.update(held)


def _split(part: Part) -> tuple[Tensors, list[str], Tensors]:
    """Return PEFT's own file, the keys in it that only PEFT reads, and the weights that it does not hold exactly."""
    model, ours = part.embeddings.model, part.weights
    theirs = get_peft_model_state_dict(model, adapter_name=methods.ADAPTER_NAME, save_embedding_layers=False)
    match, rest = keys.match_keys(theirs, ours), dict(ours)
    exact = {key: name for key, name in match.renamed.items() if are_same_bits(theirs[name], ours[key])}
    for key in exact:
        rest.pop(key)
    return dict(theirs), sorted(set(theirs) - set(exact.values())), rest


def _held_elsewhere(rest: Tensors, theirs: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return key → key of PEFT's file, or of an earlier tensor, that holds the same bits.

    Some methods register one tensor under the name of each layer, as VeRA does, or compute what PEFT's file holds from
    what is trained, as prefixes are.
    """
    held = {fingerprint.of_tensor(tensor): name for name, tensor in sorted(theirs.items())}
    found = {}
    for name in sorted(name for name in rest if keys.base_key(name) is None):
        digest = fingerprint.of_tensor(rest[name])
        if digest in held:
            found[name] = held[digest]
        elif name not in theirs:
            held[digest] = name
    return found


def _tied(weights: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Return key → earlier key under which the very same memory is held, as those of tied weights are."""
    first = dict[Any, str]()
    earlier = {name: first.setdefault(mapped_memory.place_of(tensor), name) for name, tensor in weights.items()}
    return {name: other for name, other in earlier.items() if other != name}


def _give_weights(part: Mapping[str, Any], adapter: Tensors, tensors: Tensors) -> None:
    first, whole = part["prefixes"][0], dict(adapter)
    for name in part["only_for_peft"]:
        if adapter.pop(name, None) is None:
            raise _damaged(f"'{name}' is missing")
    own = {name.removeprefix(first): tensor for name, tensor in tensors.items() if name.startswith(first)}
    same_as = part.get("same_as", {})
    missing, again = set(same_as.values()) - {*whole, *own}, set(same_as) & {*adapter, *own}
    if missing or again:
        raise _damaged(f"{name_some(missing or again)} {'are missing' if missing else 'are there twice'}")
    own |= {name: whole[other] if other in whole else own[other] for name, other in same_as.items()}
    if set(adapter) & set(own):
        raise _damaged(f"{name_some(set(adapter) & set(own))} are there twice")
    for prefix in part["prefixes"]:
        taken = {prefix + name for name in {**adapter, **(own if prefix != first else {})}} & set(tensors)
        if taken:
            raise _damaged(f"{name_some(taken)} are there twice")
        tensors.update({prefix + name: tensor for name, tensor in {**own, **adapter}.items()})


def _adapter_config(embeddings: Any) -> bytes:
    """Return what PEFT itself writes, so that PEFT alone can read it."""
    config: PeftConfig = configs.own_config(embeddings.adapter_config)
    config.base_model_name_or_path = embeddings.base_model_name
    config.inference_mode = True
    layers = embeddings.base_model.named_modules()
    adapted = [name for name, module in layers if isinstance(module, BaseTunerLayer)]
    _resolve_patterns_(config, adapted)
    translate_config.name_modules_(config, adapted)
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return Path(folder, file_names.ADAPTER_CONFIG).read_bytes()


def _resolve_patterns_(config: PeftConfig, adapted: list[str]) -> None:
    """Let the config give each module the same rank and alpha in any order of its patterns: PEFT sorts them."""
    if not methods.method_traits(config).has_module_patterns:
        return
    for setting in configs.PATTERNS:
        if getattr(config, setting, None):
            vars(config)[setting] = configs.without_rivals(getattr(config, setting), adapted)


def _read_config(files: Mapping[str, bytes], name: str, bounds: memory_check.Bounds) -> dict[str, Any]:
    try:
        stored = json.loads(files[name])
        bounds.check_settings(stored)
        return configs.encode_config(configs.decode_config(stored))
    except KeyError as error:
        raise _damaged(f"'{name}' is missing") from error
    except (ValueError, RecursionError, TypeError) as error:
        if isinstance(error, FlairPeftError):
            raise
        raise _damaged(f"'{name}' cannot be read: {error}") from error


def _damaged(what: str) -> ModelFileError:
    return ModelFileError(
        f"Cannot read the checkpoint: {what}. It is damaged, or was put together from several. Copy or save it again."
    )
