"""What the state of a Flair model holds: embeddings and their parameters, adapters and their configs, tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from flair.embeddings.base import EMBEDDING_CLASSES
from peft import PeftConfig

from flair_peft.adapter import config as configs
from flair_peft.adapter import implied, keys
from flair_peft.adapter.implied import ImpliedConfig
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, counterpart
from flair_peft.errors import (
    AdapterConfigError,
    ConfigMismatchError,
    MissingConfigError,
    StateMismatchError,
    name_some,
)
from flair_peft.primitives import fingerprint
from flair_peft.primitives.base_record import StoredBase
from flair_peft.torchfile import state_tree
from flair_peft.torchfile.state_tree import State

log = logging.getLogger("flair_peft")


def with_config(state: State, peft_config: PeftConfig | None, *, source: str) -> State:
    """Return a copy of the state in which all embeddings that have adapter tensors have a PEFT config too.

    Containers are copied, tensors are not; ``state`` stays as it is.

    Args:
        state: of one Flair model.
        peft_config: for embeddings whose file does not hold one.
        source: named in errors.

    Raises:
        MissingConfigError: there are adapter tensors without a config, and none is given.
        AdapterConfigError: a config is given for a state that holds all configs itself.
    """
    if peft_config is not None and not lacks_config(state):
        raise AdapterConfigError(
            f"Cannot use the peft_config given for '{source}': it holds the config that it was trained with. Another "
            "one would change predictions. Leave out peft_config."
        )
    state = _copy_containers(state)
    if "model_states" in state:
        tasks = state["model_states"].items()
        given = {name: peft_config if lacks_config(task) else None for name, task in tasks}
        return {**state, "model_states": {name: with_config(task, given[name], source=source) for name, task in tasks}}
    prefixes = keys.find_adapter_prefixes(state.get("state_dict", ()))
    for prefix, params in state_tree.embedding_params(state):
        if params.get("peft_config") is None and _is_meant(prefix, prefixes):
            if peft_config is None:
                raise _missing_config(state["state_dict"], prefix, source)
            params["peft_config"] = configs.own_config(peft_config)
        if params.get("peft_config") is not None:
            _take_over_(params)
    return state


def _take_over_(params: dict[str, Any]) -> None:
    """Let the embeddings of a stock class be built as those of its counterpart with an adapter, in place."""
    found = EMBEDDING_CLASSES[params["__cls__"]]
    if not issubclass(found, PeftTransformerEmbeddings):
        params["__cls__"] = counterpart(found).__name__
        params["keep_virtual_rows"] = True  # stock Flair trained the words of prompt methods on the rows that it reads


def lacks_config(state: State) -> bool:
    """Whether embeddings that have adapter tensors have no PEFT config."""
    if "model_states" in state:
        return any(lacks_config(task) for task in state["model_states"].values())
    prefixes = keys.find_adapter_prefixes(state.get("state_dict", ()))
    return any(
        p.get("peft_config") is None and _is_meant(prefix, prefixes) for prefix, p in state_tree.embedding_params(state)
    )


def adapters_without_config(state: State) -> list[str]:
    """Return the places of adapters that have no PEFT config; those that several tasks share have one place."""
    found: dict[Any, str] = {}
    for task, task_state in state.get("model_states", {"": state}).items():
        tensors = task_state.get("state_dict", {})
        prefixes = keys.find_adapter_prefixes(tensors)
        for prefix, params in state_tree.embedding_params(task_state):
            mine = [each for each in prefixes if state_tree.positions(each) == state_tree.positions(prefix)]
            if mine and params.get("peft_config") is None:
                own = next(t for key, t in tensors.items() if key.startswith(mine[0]) and keys.is_adapter_key(key))
                found.setdefault(own.data_ptr(), f"{task}.{prefix}".strip("."))
    return list(found.values())


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names that its live counterpart gives them."""
    tensors = dict(state.get("state_dict", {}))
    for task, task_state in state.get("model_states", {}).items():
        tensors.update({f"{task}.{name}": tensor for name, tensor in tensors_of(task_state).items()})
    return tensors


def report_not_finite(tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Say which tensors of a model hold NaN or infinite numbers, apart from the base's own weights.

    Args:
        tensors: by the names that their state dict gives them, whatever stands in front.
        where: they are, for the message.
    """
    prefixes = tuple(keys.find_adapter_prefixes(tensors))
    # Matrices of the base, which older files hold beside what was learned, stay unread.
    of_base = {n for n, t in tensors.items() if t.dim() > 1 and n.startswith(prefixes) and keys.base_key(n) is not None}
    learned = {n: t for n, t in tensors.items() if n not in of_base or "modules_to_save" in n}
    broken = fingerprint.not_finite(learned)
    if broken:
        log.warning(
            "%s holds NaN or infinite numbers in %s of %s tensors that were learned: %s. Its training diverged, and "
            "its predictions mean nothing. Take an earlier checkpoint, or train again, with a lower learning rate or "
            "in fp32 or bf16.",
            where,
            len(broken),
            len(learned),
            name_some(broken, limit=3),
        )


def stored_bases(state: State) -> Iterator[tuple[int, StoredBase]]:
    """Yield, for each embeddings module with an adapter, its number in the file and how the file stores its base."""
    for value in state.values():
        if isinstance(value, torch.nn.Module):  # a decoder with embeddings of its own
            modules = (module for module in value.modules() if isinstance(module, PeftTransformerEmbeddings))
            yield from (module.origin for module in modules if module.origin is not None)
    for _, params in state_tree.embedding_params(state):
        if "part" in params:
            yield params["part"], StoredBase.from_dict(params.get("stored_base"))
    for task_state in state.get("model_states", {}).values():
        yield from stored_bases(task_state)


def _is_meant(prefix: str, adapter_prefixes: list[str]) -> bool:
    """Whether one of the prefixes that hold adapters is that of these embeddings.

    Flair stores parameters under other names than the modules have ("document_embeddings" for ``embeddings``), but a
    Flair model has one tree of embeddings, and the positions in its stacks are the same in both.
    """
    return any(state_tree.positions(found) == state_tree.positions(prefix) for found in adapter_prefixes)


def _copy_containers(value: Any) -> Any:
    if type(value) is dict:
        return {key: _copy_containers(item) for key, item in value.items()}
    if type(value) is list:
        return [_copy_containers(item) for item in value]
    return copy.copy(value) if isinstance(value, Mapping) else value


def _missing_config(state_dict: Mapping[str, Any], prefix: str, source: str) -> MissingConfigError:
    found = implied_config(state_dict, prefix)
    named = sorted(key for key in state_dict if keys.is_adapter_key(key))
    what = f"adapter weights ({name_some(named, 2)})" if found is None else _describe(found)
    config, others = ("…", ()) if found is None else (found.text, found.optional)
    return MissingConfigError(
        f"Cannot load '{source}': it holds {what} but not {_what_is_lost(found)}. Stock Flair does not "
        "store the PEFT config, and a wrong one changes predictions silently. Pass the config used in training: "
        f"load('{source}', peft_config={config})"
        + (f", with {' and '.join(others)} if you used them." if others else ".")
    )


def _what_is_lost(found: ImpliedConfig | None) -> str:
    if found is None or not found.open:
        return "the PEFT config that shapes them"
    if found.open[0] in ("lora_alpha", "alpha"):
        return f"the {found.open[0]} that scales them"
    return f"those settings of {found.method} that no tensor shows"


def _describe(config: ImpliedConfig) -> str:
    targets = name_some(config.settings.get("target_modules", ()))
    ranks = sorted({config.settings.get("r"), *config.settings.get("rank_pattern", {}).values()} - {None})
    rank = f" (rank {', '.join(map(str, ranks))} from their shapes, on {targets})" if ranks else ""
    return f"{config.method} weights{rank or (f' on {targets}' if targets else '')}"


def implied_config(state_dict: Mapping[str, Any], prefix: str) -> ImpliedConfig | None:
    """Return what the tensors of the embeddings with this prefix say of their PEFT config."""
    found = [
        p for p in keys.find_adapter_prefixes(state_dict) if state_tree.positions(p) == state_tree.positions(prefix)
    ]
    mine = tuple(f"{each}model." for each in found)
    shapes = {k: tuple(t.shape) for k, t in state_dict.items() if k.startswith(mine) and isinstance(t, torch.Tensor)}
    return implied.read_config(shapes) if mine else None


def explain_mismatch(error: StateMismatchError, state: State, given: PeftConfig, *, source: str) -> StateMismatchError:
    """Return the error of a load whose tensors do not fit the config given, with both configs in words.

    Args:
        error: of the load.
        state: as it was read from the file, without a config.
        given: by the user.
        source: named in the message.
    """
    if not error.problems:
        return error  # of the head, say, about which the config says nothing
    for task in state.get("model_states", {}).values():
        if (found := explain_mismatch(error, task, given, source=source)) is not error:
            return found
    prefixes = keys.find_adapter_prefixes(state.get("state_dict", ()))
    for prefix, params in state_tree.embedding_params(state):
        if params.get("peft_config") is None and _is_meant(prefix, prefixes):
            of_file = implied_config(state["state_dict"], prefix)
            if of_file is not None:
                unfit = "; ".join(f"{what}: {name_some(names, 1)}" for what, names in error.problems.items())
                return ConfigMismatchError(
                    f"Cannot load '{source}' with the config given, {implied.text_of(given, of_file)}. Its tensors are "
                    f"those of {of_file.text} ({unfit}). Pass the config that it was trained with."
                )
    return error
