"""What of a model's weights was learned, and what is the base model's own and can be left out of a file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from flair_peft.adapter import keys
from flair_peft.base import quantisation, transformer
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.base.placement import is_dispatched
from flair_peft.errors import AdapterConfigError, name_some
from flair_peft.primitives import fingerprint, mapped_memory, progress
from flair_peft.primitives.base_record import BaseRecord, StoredBase
from flair_peft.primitives.fingerprint import are_same_bits, comparer
from flair_peft.primitives.mapped_memory import FilePages


def compare(
    state: Mapping[str, torch.Tensor],
    trained: Set[str],
    base: FrozenBase,
    *,
    is_tied: bool = True,
    pages: FilePages | None = None,
) -> StoredBase:
    """Return which tensors of a state dict a file can leave out.

    Args:
        state: of the transformer with its adapter.
        trained: keys of tensors that require a gradient; these are never left out, since they may be about to change.
        base: the base model, as its source has it.
        is_tied: tensors in one storage will be so after loading, too.
        pages: of mapped files, as they are known already; what two of them show alike is not read.
    """
    own, matrices = base.own_weights(), base.names_of_input_embeddings()
    left_out, are_same = set(), comparer(pages or FilePages())
    for key, tensor in state.items():
        name = keys.base_key(key)
        if name is None or key in trained:
            continue
        weight = own.get(name)
        if name in base.random_names:
            if keys.is_unread(name):
                left_out.add(key)
        elif weight is not None and are_same(tensor[: len(weight)] if name in matrices else tensor, weight):
            left_out.add(key)
        progress.advance(tensor.nbytes)
        for read in (tensor, weight):
            if read is not None:
                mapped_memory.let_go(read)
    left_out |= _aliases(state, left_out, own) if is_tied else set()
    full, read_full = base.full_digests
    record = dataclasses.replace(base.known_record, full_fingerprint=full, read_full_fingerprint=read_full)
    return StoredBase(record, frozenset(left_out), _added_rows(state, matrices, record))


def _aliases(state: Mapping[str, torch.Tensor], left_out: set[str], own: Mapping[str, Any]) -> set[str]:
    """Return keys that the base does not know and under which PEFT holds a tensor that is left out, once more.

    Prompt methods register the input embeddings a second time, and replicated layers are held under several numbers.
    """
    held = {mapped_memory.place_of(state[key]) for key in left_out if state[key].numel()}
    names = {key: keys.base_key(key) for key in state}
    others = (key for key, name in names.items() if name is not None and name not in own)
    return {key for key in others if mapped_memory.place_of(state[key]) in held}


def restore_(model: torch.nn.Module, left_out: Iterable[str], base: FrozenBase) -> None:
    """Give the named parameters the values that they have in the base, in place, where they have others."""
    own, parameters = base.own_weights(), dict(model.named_parameters(remove_duplicate=False))
    for key in left_out:
        name = keys.base_key(key)
        if key not in parameters or name is None or name not in own:
            continue
        parameter, wanted = parameters[key], own[name].to(parameters[key].device)
        if parameter.shape != wanted.shape:
            wanted = torch.cat([wanted, parameter.data[len(wanted) :]])
        if not are_same_bits(parameter, wanted):
            parameter.data = wanted.clone()


def _added_rows(state: Mapping[str, torch.Tensor], matrices: frozenset[str], record: BaseRecord) -> torch.Tensor | None:
    """Return the rows that the input embeddings have beyond the base's: a model must have them before it is filled."""
    of_matrix = (tensor for key, tensor in state.items() if keys.base_key(key) in matrices)
    size = record.vocabulary_size
    rows = (tensor[size:].detach().cpu().clone() for tensor in of_matrix if size is not None and len(tensor) > size)
    return next(rows, None)


@dataclass(frozen=True)
class PlacedStart:
    """What a base that is quantised or spread over devices is when it is read, for a save to find what was learned.

    The source cannot be quantised again for that: it would need the memory twice, and another device rounds in another
    way. Weights that are offloaded are written by nobody.

    Attributes:
        dtype: that the weights were read in; afterwards PEFT widens those that are not quantised.
        random_names: weights that the source lacks.
        matrices: names of the input embeddings.
        digests: name → digest of each tensor: of all its elements, or of a sample of those that are placed.
    """

    dtype: torch.dtype
    random_names: frozenset[str]
    matrices: frozenset[str]
    digests: Mapping[str, str]

    @classmethod
    def of(cls, base: PreTrainedModel, *, dtype: torch.dtype, random_names: frozenset[str]) -> PlacedStart:
        """Return what the model is now, before it has an adapter and before its first forward pass."""
        weights = _Weights.of(base)
        return cls(
            dtype=dtype,
            random_names=random_names,
            matrices=transformer.names_of_input_embeddings(base),
            digests={key: weights.digest(key) for key in weights.state if key not in weights.biases},
        )

    def compare(self, model: torch.nn.Module, record: BaseRecord) -> StoredBase:
        """Return which tensors of the model, with its adapter, a file can leave out: a load finds them in the base.

        Raises:
            AdapterConfigError: quantised weights were changed, which no file can hold.
        """
        weights = _Weights.of(model)
        named = {key: keys.base_key(key) or "" for key in weights.state if key not in weights.trained}
        changed = sorted(key for key in weights.placed if not self._is_same(weights, key, named[key]))
        if changed:
            raise AdapterConfigError(
                f"Cannot store the adapter: {name_some(changed)} of its base, which is quantised or spread over "
                "devices, were changed since they were read, by a merge for example or by the adapter's "
                "initialisation. They are in no file, and a load would find others. Make the embeddings again, and "
                "keep the adapter beside the base."
            )
        left_out = weights.biases.union(key for key, name in named.items() if self._is_same(weights, key, name))
        aliases = _aliases(weights.state, set(left_out), self.digests)
        rows = _added_rows(weights.state, self.matrices, record)
        return StoredBase(record, left_out | aliases, None if rows is None else rows.to(self.dtype))

    def _is_same(self, weights: _Weights, key: str, name: str) -> bool:
        if name not in self.digests or key in weights.biases:
            return False
        is_lacking = name in self.random_names and not keys.is_unread(name)
        return not is_lacking and self.digests[name] == weights.digest(key)


@dataclass(frozen=True)
class _Weights:
    """State dict of a model that is quantised or spread over devices, and which of its keys are which.

    Attributes:
        state: of the model.
        placed: keys of quantised weights and of their statistics; of all that is frozen in a dispatched model.
        biases: keys of frozen biases beside quantised weights. bitsandbytes casts them to the dtype that it computes
            in, at the first forward pass.
        trained: keys of tensors that require a gradient.
        is_spread: whether the model is only spread over devices: too large to read as a whole.
    """

    state: Mapping[str, torch.Tensor]
    placed: frozenset[str]
    biases: frozenset[str]
    trained: frozenset[str]
    is_spread: bool

    @classmethod
    def of(cls, model: torch.nn.Module) -> _Weights:
        state, named = model.state_dict(), model.named_parameters(remove_duplicate=False)
        trained = frozenset(name for name, parameter in named if parameter.requires_grad)
        modules = tuple(f"{name}." for name, module in model.named_modules(remove_duplicate=False) if _is_own(module))
        held = {key for key in state if key.startswith(modules)} - trained
        biases = frozenset(key for key in held if key.endswith(".bias"))
        is_spread = is_dispatched(model) and quantisation.engine(model) is None
        if is_spread:
            held |= {key for key in state if keys.base_key(key) is not None} - trained
        return cls(state, frozenset(held - biases), biases, trained, is_spread)

    def digest(self, key: str) -> str:
        if self.state[key].is_meta:
            return "offloaded"
        take = fingerprint.sampled if self.is_spread or key in self.placed else fingerprint.full
        return take(quantisation.parts_of(self.state[key]))


def quantised_keys(model: torch.nn.Module) -> frozenset[str]:
    """Return the state-dict keys of what quantising gives, and of the frozen biases beside it: no file holds them."""
    weights = _Weights.of(model)
    return weights.placed | weights.biases


def _is_own(module: torch.nn.Module) -> bool:
    """Whether the module itself holds quantised weights: these are parameters of the engine's own classes."""
    return any(
        type(parameter) is not torch.nn.Parameter for parameter in module._parameters.values() if parameter is not None
    )
