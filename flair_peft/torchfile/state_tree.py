"""The tree that the state of a Flair model is: its tasks, its embeddings and their adapters, its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from flair.embeddings.base import EMBEDDING_CLASSES
from flair.embeddings.transformer import TransformerEmbeddings

from flair_peft.adapter import implied, keys
from flair_peft.adapter.implied import ImpliedConfig
from flair_peft.errors import ModelFileError

State = dict[str, Any]


# Where the state of a model holds embeddings that code around them makes: module prefix → parameters.
INNER = "inner_embeddings"


@dataclass(frozen=True)
class StoredEmbeddings:
    """Transformer embeddings as the state of a model holds them.

    Attributes:
        prefix: of their names, as the state counts them; the modules may be called otherwise.
        params: their parameters, the very dictionary of the state.
        tensors: of the model, or of that task of it, which the embeddings belong to.
        adapter_prefixes: of those tensors that are their adapter's.
        task: prefix of the names of a multitask model's task.
    """

    prefix: str
    params: dict[str, Any]
    tensors: Mapping[str, Any]
    adapter_prefixes: tuple[str, ...]
    task: str

    @property
    def lacks_config(self) -> bool:
        """Whether they have adapter tensors and no PEFT config."""
        return bool(self.adapter_prefixes) and self.params.get("peft_config") is None

    def implied_config(self) -> ImpliedConfig | None:
        """Return what their tensors say of their PEFT config."""
        mine = tuple(f"{prefix}model." for prefix in self.adapter_prefixes)
        tensors = ((key, tensor) for key, tensor in self.tensors.items() if isinstance(tensor, torch.Tensor))
        return implied.read_config({k: tuple(t.shape) for k, t in tensors if k.startswith(mine)}) if mine else None


def tasks_of(state: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the state of a model and those of its tasks, each with the prefix that its tensors have in the model."""
    if isinstance(state, Mapping):
        yield name, state
        tasks = state.get("model_states")
        for task, task_state in tasks.items() if isinstance(tasks, Mapping) else ():
            yield from tasks_of(task_state, f"{name}{task}.")


def embeddings_in(state: Any) -> list[StoredEmbeddings]:
    """Return all transformer embeddings in the state of a model, those of its tasks included.

    Flair stores parameters under other names than the modules have ("document_embeddings" for ``embeddings``), but a
    Flair model has one tree of embeddings, and the positions in its stacks are the same in both.
    """
    found = []
    for task, part in tasks_of(state):
        tensors = part.get("state_dict", {})
        prefixes = keys.find_adapter_prefixes(tensors)
        for prefix, params in _embedding_params(part):
            mine = tuple(each for each in prefixes if _positions(each) == _positions(prefix))
            found.append(StoredEmbeddings(prefix, params, tensors, mine, task))
    return found


def has_adapters(state: Any) -> bool:
    """Whether any part of a Flair model's state holds PEFT tensors or a PEFT config."""
    tensors = (part.get("state_dict", ()) for _, part in tasks_of(state))
    if any(keys.is_embedded_adapter_key(key) for names in tensors for key in names):
        return True
    parts = (part for _, part in tasks_of(state))
    return any(params.get("peft_config") is not None for part in parts for _, params in _embedding_params(part))


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names that its live counterpart gives them."""
    parts = tasks_of(state)
    return {f"{task}{name}": tensor for task, part in parts for name, tensor in part.get("state_dict", {}).items()}


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


def _embedding_params(state: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield module prefix and stored parameters of each transformer embedding, without those of tasks."""
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


def _positions(prefix: str) -> list[str]:
    """Return where in stacks of embeddings a module prefix is; Flair numbers them alike in states and in modules."""
    return [segment for segment in prefix.split(".") if segment.startswith("list_embedding_")]
