"""Flair's ``.pt`` files: the only place that unpickles."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flair.embeddings.base import EMBEDDING_CLASSES
from flair.embeddings.transformer import TransformerEmbeddings
from flair.file_utils import load_torch_state
from peft import PeftConfig

from flair_peft import config as configs
from flair_peft import keys
from flair_peft.errors import MissingConfigError, ModelFileError, name_some

State = dict[str, Any]

_LORA_MARK = "lora_A"


def read_state(path: Path) -> State:
    """Return the state of a Flair model, read by Flair's own function.

    Raises:
        ModelFileError: the file is truncated, empty, or not a Flair model.
    """
    try:
        state = load_torch_state(str(path))
    except (RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise ModelFileError(
            f"Cannot read '{path}' ({path.stat().st_size} bytes): {type(error).__name__}: {error}. It is truncated, or "
            "it was never written by Flair. Copy or save it again."
        ) from error
    if not isinstance(state, dict) or not ("state_dict" in state or "model_states" in state):
        raise ModelFileError(
            f"Cannot load '{path}': it holds a {type(state).__name__} without a 'state_dict'. A Flair model file has "
            "one beside its settings. Pass a file that model.save() or Flair's trainer wrote."
        )
    return state


def has_adapters(state: Any) -> bool:
    """Whether any part of a Flair model's state holds PEFT tensors or a PEFT config."""
    if not isinstance(state, Mapping):
        return False
    if any(keys.is_adapter_key(key) for key in state.get("state_dict", ())):
        return True
    if any("peft_config" in params for _, params in _embedding_params(state)):
        return True
    return any(has_adapters(task) for task in state.get("model_states", {}).values())


def with_config(state: State, peft_config: PeftConfig | None, *, source: str) -> State:
    """Return a copy of the state in which all embeddings that have adapter tensors have a PEFT config too.

    Containers are copied, tensors are not; ``state`` stays as it is.

    Args:
        state: of one Flair model.
        peft_config: for embeddings whose file does not hold one.
        source: named in errors.

    Raises:
        MissingConfigError: there are adapter tensors without a config, and none is given.
    """
    state = _copy_containers(state)
    if "model_states" in state:
        tasks = {name: with_config(task, peft_config, source=source) for name, task in state["model_states"].items()}
        return {**state, "model_states": tasks}
    prefixes = keys.find_adapter_prefixes(state.get("state_dict", ()))
    for prefix, params in _embedding_params(state):
        if "peft_config" in params or not _is_meant(prefix, prefixes):
            continue
        if peft_config is None:
            raise _missing_config(state["state_dict"], source)
        params["peft_config"] = configs.own_config(peft_config)
    return state


def _embedding_params(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield module prefix and stored parameters of each transformer embedding in a Flair model's state."""
    for name, value in state.items():
        if name != "state_dict":
            yield from _walk_params(value, "tars_model.embeddings." if name == "tars_embeddings" else f"{name}.")


def _walk_params(value: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict) or "__cls__" not in value:
        return
    embedding_class = EMBEDDING_CLASSES.get(value["__cls__"])
    if isinstance(embedding_class, type) and issubclass(embedding_class, TransformerEmbeddings):
        yield prefix, value
    for nested in value.values():
        stacked = nested if isinstance(nested, list) else [nested]
        for index, params in enumerate(stacked):
            yield from _walk_params(params, f"{prefix}list_embedding_{index}.")


def _is_meant(prefix: str, adapter_prefixes: list[str]) -> bool:
    """Whether one of the prefixes that hold adapters is that of these embeddings, or of a part of them."""
    return any(found == prefix or found.endswith(prefix) or found.startswith(prefix) for found in adapter_prefixes)


def _copy_containers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy_containers(item) for item in value]
    return copy.copy(value) if isinstance(value, Mapping) else value


def _missing_config(state_dict: Mapping[str, Any], source: str) -> MissingConfigError:
    lora = {key: tensor for key, tensor in state_dict.items() if f".{_LORA_MARK}." in key}
    ranks = sorted({int(tensor.shape[0]) for tensor in lora.values()})
    targets = {key.split(f".{_LORA_MARK}.")[0].rpartition(".")[2] for key in lora}
    adapters = sorted(key for key in state_dict if keys.is_adapter_key(key))
    if ranks:
        what = f"LoRA weights (rank {', '.join(map(str, ranks))} from their shapes, on {name_some(targets)})"
        lost = "the lora_alpha that scales them"
        config = f"LoraConfig(r={ranks[-1]}, lora_alpha=…, target_modules={sorted(targets)})"
    else:
        what, lost, config = f"adapter weights ({name_some(adapters, 2)})", "the PEFT config that shapes them", "…"
    return MissingConfigError(
        f"Cannot load '{source}': it holds {what} but not {lost}. Stock Flair does not store the PEFT config, and a "
        f"wrong one changes predictions silently. Pass the config used in training: load('{source}', "
        f"peft_config={config})."
    )
