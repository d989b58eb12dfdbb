"""The tree that the state of a Flair model is: where it holds embeddings, and whether these have adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flair_peft.adapter import keys
from flair_peft.errors import ModelFileError

State = dict[str, Any]


# Where the state of a model holds embeddings that code around them makes: module prefix → parameters.
INNER = "inner_embeddings"

# What a CRF puts before and behind a sentence; Flair keeps them among the labels of a tagger.
MARKS = frozenset({"<START>", "<STOP>"})

_DEEPEST = 100  # deeper than embeddings stand in any model


def has_adapters(state: Any) -> bool:
    """Whether any part of a Flair model's state holds PEFT tensors or a PEFT config."""
    if not isinstance(state, Mapping):
        return False
    if any(keys.is_embedded_adapter_key(key) for key in state.get("state_dict", ())):
        return True
    if any(params.get("peft_config") is not None for _, params in embedding_params(state)):
        return True
    return any(has_adapters(task) for task in state.get("model_states", {}).values())


def inner_embeddings(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return module prefix → parameters of the embeddings that code around them makes, rather than Flair.

    Raises:
        ModelFileError: they are damaged.
    """
    found = state.get(INNER, {})
    if not isinstance(found, dict) or not all(
        isinstance(prefix, str) and isinstance(params, dict) and type(params.get("part")) is int
        for prefix, params in found.items()
    ):
        raise ModelFileError(
            "Cannot read what the file says of embeddings that are made by other code: it is damaged. A load would not "
            "know what they lack. Copy or save it again."
        )
    return found


@dataclass(frozen=True)
class StoredEmbeddings:
    """Transformer embeddings in the state of a model.

    Attributes:
        place: keys and indices on the way to their parameters.
        params: their parameters, as ``to_params`` gives them.
    """

    place: tuple[str | int, ...]
    params: dict[str, Any]

    @property
    def module_prefix(self) -> str:
        """What stands in front of the names of their tensors, but for a first name that differs from file to file."""
        first, *rest = self.place[1:] if self.place[0] == INNER else (f"{self.place[0]}.", *self.place[1:])
        return str(first) + "".join(f"list_embedding_{key}." for key in rest if isinstance(key, int))


def stored_embeddings(state: Mapping[Any, Any]) -> Iterator[StoredEmbeddings]:
    """Yield the transformer embeddings in the state of one model, or of one task of a model."""
    for name, value in state.items():
        if name == INNER and isinstance(value, dict):
            for prefix, params in value.items():
                yield from _walk((INNER, str(prefix)), params)
        elif name != "state_dict":
            yield from _walk((str(name),), value)


def task_states(state: Mapping[Any, Any]) -> dict[str, Mapping[Any, Any]]:
    """Return task → state of a model of several tasks; a state itself, under no name, where it is of one."""
    tasks = state.get("model_states")
    if not isinstance(tasks, dict):
        return {"": state}
    return {str(name): task for name, task in tasks.items() if isinstance(task, dict)}


def embedding_params(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield module prefix and stored parameters of each transformer embedding in a Flair model's state."""
    inner_embeddings(state)
    inner_first = sorted(stored_embeddings(state), key=lambda found: found.place[0] != INNER)
    yield from ((found.module_prefix, found.params) for found in inner_first)


def _walk(place: tuple[str | int, ...], value: Any) -> Iterator[StoredEmbeddings]:
    """Yield what is in embeddings within embeddings, each container once: a file can nest them without end."""
    seen: set[int] = set()
    pending = [(place, value)]
    while pending:
        place, value = pending.pop()
        if not isinstance(value, dict) or not isinstance(value.get("__cls__"), str) or id(value) in seen:
            continue
        seen.add(id(value))
        if _is_of_transformer(value):
            yield StoredEmbeddings(place, value)
        if len(place) < _DEEPEST:
            pending.extend(reversed([*_parts_of(place, value)]))


def _is_of_transformer(params: Mapping[Any, Any]) -> bool:
    """Whether parameters are those of transformer embeddings, whatever their class is called."""
    has_transformer = "config_state_dict" in params or "peft_config" in params
    return has_transformer or ("model" in params and "Transformer" in params["__cls__"])


def _parts_of(place: tuple[str | int, ...], value: Mapping[Any, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    for key, nested in value.items():
        if isinstance(key, str) and isinstance(nested, (list, tuple)):
            yield from (((*place, key, index), item) for index, item in enumerate(nested) if isinstance(item, dict))
        elif isinstance(key, str):
            yield (*place, key), nested


def positions(prefix: str) -> list[str]:
    """Return where in stacks of embeddings a module prefix is; Flair numbers them alike in states and in modules."""
    return [segment for segment in prefix.split(".") if segment.startswith("list_embedding_")]
