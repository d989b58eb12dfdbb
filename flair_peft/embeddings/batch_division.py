"""Ways to run a batch without the padding of its sentences, and its output put together again."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft.embeddings.pass_cost import Cost

Inputs = Mapping[str, Any]
Run = Callable[[Inputs, Sequence[int]], Mapping[str, Any]]
"""Inputs and the numbers of their rows in the batch → output."""

# Inputs of shape (batch, length, …), and those that a row has one of.
BY_POSITION = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", "bbox", "langs", "special_tokens_mask"}
)
_BY_ROW = frozenset({"pixel_values", "image"})

_STATES = ("hidden_states", "encoder_hidden_states")
_LAST = ("last_hidden_state", "encoder_last_hidden_state")


@dataclass(frozen=True, kw_only=True)
class Division(abc.ABC):
    """A way to run a batch without the padding of its sentences.

    Attributes:
        width: to which the batch is padded.
        first: how many rows of the outputs stand in front of the inputs'.
    """

    width: int
    first: int = 0

    @property
    @abc.abstractmethod
    def tried_length(self) -> int:
        """How long rows are; what a trial finds for some length holds for less."""

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """What is tried out once for all divisions that have it in common."""

    @abc.abstractmethod
    def cost(self, price: Cost) -> float:
        """Return what the passes cost."""

    @abc.abstractmethod
    def run(self, run: Run, inputs: Inputs) -> Mapping[str, Any]:
        """Return the output for the inputs of the batch, as one pass for all gives it."""

    @abc.abstractmethod
    def join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return one tensor of shape (batch, width, hidden), zero for padding, from the states of each pass."""

    @abc.abstractmethod
    def sample(self, inputs: Inputs) -> tuple[Inputs, Division | None, Sequence[int]]:
        """Return a small batch on which this can be tried out, how it is divided, and the lengths to compare."""


def find_lengths(inputs: Inputs, cost: Callable[[], Cost]) -> list[int] | None:
    """Return the lengths of the sentences, ``None`` where the batch cannot be divided or is too small for it.

    Args:
        inputs: of the transformer. Padding stands behind each row: tokenizers of embeddings put it there.
        cost: of a forward pass; only asked for where there is anything to divide.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or len(ids) < 2 or not all(_can_be_cut(name, given, ids) for name, given in inputs.items()):
        return None
    # A group saves less than the whole batch costs. Beneath that, lengths need not be fetched from a GPU.
    if ids.numel() <= cost().fixed or mask.shape != ids.shape:
        return None
    counts = mask.sum(dim=1)
    if not torch.equal(mask, (torch.arange(ids.shape[1], device=mask.device) < counts[:, None]).to(mask.dtype)):
        return None
    return [max(1, count) for count in counts.tolist()]


def _can_be_cut(name: str, given: Any, ids: torch.Tensor) -> bool:
    if not isinstance(given, torch.Tensor):
        return given is None or isinstance(given, bool)
    shape = ids.shape if name in BY_POSITION else ids.shape[:1]
    return name in BY_POSITION | _BY_ROW and given.shape[: len(shape)] == shape


def run_divided(run: Run, inputs: Inputs, division: Division | None) -> Mapping[str, Any]:
    """Return the output for the inputs, computed so divided, or as they are."""
    return run(inputs, range(len(inputs["input_ids"]))) if division is None else division.run(run, inputs)


def cut(inputs: Inputs, rows: Sequence[int], length: int) -> dict[str, Any]:
    """Return the inputs of these rows, cut to a length; tensors are new ones."""
    found = {}
    for name, given in inputs.items():
        if isinstance(given, torch.Tensor):
            given = given[torch.tensor(rows, device=given.device)]
            given = given[:, :length] if name in BY_POSITION else given
        found[name] = given
    return found


class JoinedOutput(Mapping[str, Any]):
    """The hidden states of a divided batch, as one pass for all would return them, with zeros for the padding.

    They are put together when they are asked for: most layers never are.
    """

    def __init__(self, outputs: Sequence[Mapping[str, Any]], division: Division) -> None:
        self._division = division
        names = [name for name in (*_STATES, *_LAST) if outputs[0].get(name) is not None]
        self._parts = {name: [output[name] for output in outputs] for name in names}
        self._joined: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Any:
        parts = self._parts[name]
        if name not in _STATES:
            return self._join(parts)
        layers = list(zip(*parts, strict=True))
        return LazyStates(len(layers), lambda index: self._join(layers[index]))

    def _join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        # Models return one tensor under several names.
        if id(states[0]) not in self._joined:
            self._joined[id(states[0])] = self._division.join(states)
        return self._joined[id(states[0])]


class LazyStates(Sequence[torch.Tensor]):
    """The hidden states of all layers, each of which is put together when it is asked for: most never are."""

    def __init__(self, count: int, find: Callable[[int], torch.Tensor]) -> None:
        self._count, self._find = count, find

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(self._count)))
        return self._find(index)
