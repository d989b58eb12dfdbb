"""The tree that the state of a Flair model is: where it holds embeddings, and whether these have adapters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from flair.embeddings.base import EMBEDDING_CLASSES
from flair.embeddings.transformer import TransformerEmbeddings

from flair_peft.adapter import keys
from flair_peft.errors import ModelFileError

State = dict[str, Any]


# Where the state of a model holds embeddings that code around them makes: module prefix → parameters.
INNER = "inner_embeddings"


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


def embedding_params(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield module prefix and stored parameters of each transformer embedding in a Flair model's state."""
    for prefix, params in inner_embeddings(state).items():
        yield from _walk_params(params, prefix)
    for name, value in state.items():
        if name != "state_dict":
            yield from _walk_params(value, f"{name}.")


def _walk_params(value: Any, prefix: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(value, dict) or not isinstance(value.get("__cls__"), str):
        return
    embedding_class = EMBEDDING_CLASSES.get(value["__cls__"])
    if isinstance(embedding_class, type) and issubclass(embedding_class, TransformerEmbeddings):
        yield prefix, value
    for nested in value.values():
        if isinstance(nested, list):
            for index, params in enumerate(nested):
                yield from _walk_params(params, f"{prefix}list_embedding_{index}.")
        else:
            yield from _walk_params(nested, prefix)


def positions(prefix: str) -> list[str]:
    """Return where in stacks of embeddings a module prefix is; Flair numbers them alike in states and in modules."""
    return [segment for segment in prefix.split(".") if segment.startswith("list_embedding_")]
