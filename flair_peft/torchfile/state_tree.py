"""The tree that the state of a Flair model is: its tasks, its embeddings and their adapters, its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from flair_peft.adapter import implied, keys
from flair_peft.adapter.implied import ImpliedConfig
from flair_peft.errors import ModelFileError

if TYPE_CHECKING:
    import torch

State = dict[str, Any]


# Where the state of a model holds embeddings that code around them makes: module prefix → parameters.
INNER = "inner_embeddings"

# What a CRF puts before and behind a sentence; Flair keeps them among the labels of a tagger.
MARKS = frozenset({"<START>", "<STOP>"})

_DEEPEST = 100  # deeper than embeddings stand in any model


@dataclass(frozen=True)
class StoredEmbeddings:
    """Embeddings as the state of a model holds them.

    Flair stores parameters under other names than the modules have ("document_embeddings" for ``embeddings``), but a
    Flair model has one tree of embeddings, and the positions in its stacks are the same in both.

    Attributes:
        place: keys and indices on the way to their parameters, in the state of the model or of its task.
        params: their parameters, the very dictionary of the state.
        tensors: of the model, or of that task of it, which the embeddings belong to.
        task: prefix of the names of a multitask model's task.
    """

    place: tuple[str | int, ...]
    params: dict[str, Any]
    tensors: Mapping[str, Any]
    task: str

    @property
    def prefix(self) -> str:
        """What stands in front of the names of their tensors, but for a first name that differs from file to file."""
        first, *rest = self.place[1:] if self.place[0] == INNER else (f"{self.place[0]}.", *self.place[1:])
        return str(first) + "".join(f"list_embedding_{key}." for key in rest if isinstance(key, int))

    @cached_property
    def adapter_prefixes(self) -> tuple[str, ...]:
        """Prefixes of those tensors that are of their adapter."""
        stored, mine = keys.find_adapter_prefixes(self.tensors), positions(self.prefix)
        return tuple(prefix for prefix in stored if positions(prefix) == mine)

    @property
    def lacks_config(self) -> bool:
        """Whether they have adapter tensors and no PEFT config."""
        return self.params.get("peft_config") is None and bool(self.adapter_prefixes)

    def implied_config(self) -> ImpliedConfig | None:
        """Return what their tensors say of their PEFT config."""
        mine = tuple(f"{prefix}model." for prefix in self.adapter_prefixes)
        shapes = ((key, getattr(tensor, "shape", None)) for key, tensor in self.tensors.items() if key.startswith(mine))
        return implied.read_config({key: tuple(s) for key, s in shapes if s is not None}) if mine else None


def tasks_of(state: Any, name: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the state of a model and those of its tasks, each with the prefix that its tensors have in the model."""
    if isinstance(state, Mapping):
        yield name, state
        tasks = state.get("model_states")
        for task, task_state in tasks.items() if isinstance(tasks, Mapping) else ():
            yield from tasks_of(task_state, f"{name}{task}.")


def embeddings_in(state: Any) -> Iterator[StoredEmbeddings]:
    """Yield all transformer embeddings in the state of a model, those of its tasks included."""
    return (found for found in _parts_in(state) if _is_of_transformer(found.params))


def others_in(state: Any) -> Iterator[StoredEmbeddings]:
    """Yield all embeddings without a transformer of their own in the state of a model, those around others first."""
    found = (found for found in _parts_in(state) if not _is_of_transformer(found.params))
    return (each for each in found if each.params["__cls__"].endswith("Embeddings"))


def _parts_in(state: Any) -> Iterator[StoredEmbeddings]:
    for task, part in tasks_of(state):
        for place, value in _roots(part):
            for at, params in _walk(place, value):
                yield StoredEmbeddings(at, params, part.get("state_dict", {}), task)


def has_adapters(state: Any) -> bool:
    """Whether any part of a Flair model's state holds PEFT tensors or a PEFT config.

    Raises:
        ModelFileError: what it says of embeddings that other code makes is damaged.
    """
    tensors = (part.get("state_dict", ()) for _, part in tasks_of(state))
    if any(keys.is_embedded_adapter_key(key) for names in tensors for key in names):
        return True
    for _, part in tasks_of(state):
        inner_embeddings(part)
    return any(embeddings.params.get("peft_config") is not None for embeddings in embeddings_in(state))


def holds_tensors(state: Mapping[str, Any]) -> bool:
    """Whether a model's state, or that of each of its tasks, has tensors by name."""
    tensors, tasks = state.get("state_dict"), state.get("model_states")
    if isinstance(tasks, dict):
        return all(isinstance(task, dict) and holds_tensors(task) for task in tasks.values())
    return isinstance(tensors, Mapping) and all(isinstance(key, str) for key in tensors)


def tensors_of(state: State) -> dict[str, torch.Tensor]:
    """Return the tensors of a model under the names that its live counterpart gives them."""
    parts = tasks_of(state)
    return {f"{task}{name}": tensor for task, part in parts for name, tensor in part.get("state_dict", {}).items()}


def inner_embeddings(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return module prefix → parameters of the embeddings that code around them makes, rather than Flair.

    Raises:
        ModelFileError: they are damaged.
    """
    inner = state.get(INNER, {})
    if not isinstance(inner, dict) or not all(
        isinstance(prefix, str) and isinstance(params, dict) and type(params.get("part")) is int
        for prefix, params in inner.items()
    ):
        raise ModelFileError(
            "Cannot read what the file says of embeddings that are made by other code: it is damaged. A load would not "
            "know what they lack. Copy or save it again."
        )
    return inner


def positions(prefix: str) -> list[str]:
    """Return where in stacks of embeddings a module prefix is; Flair numbers them alike in states and in modules."""
    return [segment for segment in prefix.split(".") if segment.startswith("list_embedding_")]


def _roots(state: Mapping[Any, Any]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield place and value of what may be embeddings, those that other code makes first."""
    inner = state.get(INNER)
    for prefix, params in inner.items() if isinstance(inner, dict) else ():
        yield (INNER, str(prefix)), params
    for name, value in state.items():
        if name not in (INNER, "state_dict"):
            yield (str(name),), value


def _walk(place: tuple[str | int, ...], value: Any) -> Iterator[tuple[tuple[str | int, ...], dict[str, Any]]]:
    """Yield embeddings and what is in them, each container once: a file can nest them without end."""
    seen: set[int] = set()
    pending = [(place, value)]
    while pending:
        place, value = pending.pop()
        if not isinstance(value, dict) or not isinstance(value.get("__cls__"), str) or id(value) in seen:
            continue
        seen.add(id(value))
        yield place, value
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
