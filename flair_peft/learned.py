"""What of a model's weights was learned, and what is the base model's own and can be left out of a file."""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft import keys
from flair_peft.frozen import FrozenBase
from flair_peft.sources import StoredBase

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}


@dataclass(frozen=True)
class Part:
    """How the file that is being written stores one embeddings module, and which number it has there."""

    index: int
    stored: StoredBase


Plan = Mapping[int, Part]

_plan: contextvars.ContextVar[Plan] = contextvars.ContextVar("flair_peft_plan")


@contextmanager
def storing(plan: Plan) -> Iterator[None]:
    """State dicts and parameters made inside are those of a file; ``plan`` maps ``id(embeddings)`` to how."""
    token = _plan.set(plan)
    try:
        yield
    finally:
        _plan.reset(token)


def planned(embeddings: object) -> Part | None:
    """Return how the file that is being written stores these embeddings; ``None`` if none is."""
    return _plan.get({}).get(id(embeddings))


def compare(state: Mapping[str, torch.Tensor], trained: set[str], base: FrozenBase) -> StoredBase:
    """Return which tensors of a state dict a file can leave out.

    Args:
        state: of the transformer with its adapter.
        trained: keys of tensors that require a gradient; these are never left out, since they may be about to change.
        base: the base model, read anew from its source.
    """
    own, matrices = base.own_weights(), base.names_of_input_embeddings()
    left_out, added_rows = set(), None
    for key, tensor in state.items():
        name = keys.base_key(key)
        if name is None or key in trained:
            continue
        if name in base.random_names:
            if is_unread(name):
                left_out.add(key)
        elif name in matrices and name in own and len(tensor) > len(own[name]):
            if are_same_bits(tensor[: len(own[name])], own[name]):
                left_out.add(key)
                added_rows = tensor[len(own[name]) :]
        elif name in own and are_same_bits(tensor, own[name]):
            left_out.add(key)
    left_out |= _aliases(state, left_out, own)
    if added_rows is None:
        added_rows = _rows_beyond(state, own, matrices)
    record = dataclasses.replace(base.known_record, full_fingerprint=base.full_fingerprint)
    rows = None if added_rows is None else added_rows.detach().cpu().clone()
    return StoredBase(record, frozenset(left_out), rows)


def _aliases(state: Mapping[str, torch.Tensor], left_out: set[str], own: Mapping[str, torch.Tensor]) -> set[str]:
    """Return keys that the base does not know and under which PEFT holds a tensor that is left out, once more.

    Prompt methods register the input embeddings a second time, and replicated layers are held under several numbers.
    """
    held = {_place(state[key]) for key in left_out if state[key].numel()}
    names = {key: keys.base_key(key) for key in state}
    return {key for key, name in names.items() if name is not None and name not in own and _place(state[key]) in held}


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def restore_(model: torch.nn.Module, left_out: Iterable[str], base: FrozenBase) -> None:
    """Give the named parameters the values that they have in the base, in place, where they have others."""
    own, parameters = base.own_weights(), dict(model.named_parameters(remove_duplicate=False))
    for key in left_out:
        name = keys.base_key(key)
        if key not in parameters or name not in own:
            continue
        parameter, wanted = parameters[key], own[name].to(parameters[key].device)
        if parameter.shape != wanted.shape:
            wanted = torch.cat([wanted, parameter.data[len(wanted) :]])
        if not are_same_bits(parameter, wanted):
            parameter.data = wanted.clone()


def is_unread(name: str) -> bool:
    """Whether no hidden state depends on the weight, so that its value does not matter: poolers."""
    return "pooler" in name.split(".")


def are_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    if first.dim() == 0 or not first.numel():
        return bool((first == second).all())
    as_integers = _INTEGERS[first.itemsize]
    return torch.equal(first.detach().contiguous().view(as_integers), second.detach().contiguous().view(as_integers))


def _rows_beyond(
    state: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor], matrices: frozenset[str]
) -> torch.Tensor | None:
    """Return the added rows of a matrix that is stored whole: the model must have them before it is filled."""
    for key, tensor in state.items():
        name = keys.base_key(key)
        if name in matrices and name in own and len(tensor) > len(own[name]):
            return tensor[len(own[name]) :]
    return None
