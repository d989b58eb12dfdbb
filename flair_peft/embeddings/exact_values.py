"""Tensors of a module cast to another dtype to compute in, with their exact values kept for files and for training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper

_KEPT, _GIVEN = "_flair_peft_exact_values", "_flair_peft_exact_values_given"


def cast_(owner: torch.nn.Module, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """Cast tensors of a module, in place; its ``state_dict`` and :func:`restore_` give their exact values back.

    Args:
        owner: keeps the exact values.
        tensors: name in the module → its parameter or buffer.
        dtype: that they have afterwards, if they are floating-point.
    """
    kept = exact_values(owner)
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != dtype:
            kept[name] = exact_value(tensor.data, kept[name]) if name in kept else tensor.data
            tensor.data = kept[name].to(dtype)
    if kept:
        owner.__dict__[_KEPT] = kept
        if _give_exact_values not in owner._state_dict_hooks.values():
            owner._register_state_dict_hook(_give_exact_values)


def exact_values(owner: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return name → exact value of the tensors of a module that were :func:`cast_`; it may be changed."""
    kept: dict[str, torch.Tensor] = owner.__dict__.get(_KEPT, {})
    return kept


def exact_value(current: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Return the exact value if ``current`` is still its cast, else ``current`` in the wider dtype of the two."""
    moved, wider = exact.to(current.device), torch.promote_types(exact.dtype, current.dtype)
    return moved if torch.equal(moved.to(current.dtype), current.detach()) else current.detach().to(wider)


def settle_(owner: torch.nn.Module) -> set[str]:
    """Let the tensors of a module follow their exact values, where these were written to; return the names of these.

    A state dict gives them away in the place of tensors, and who averages weights writes into what it gives.
    """
    written, given = set[str](), owner.__dict__.get(_GIVEN, {})
    for name, exact in exact_values(owner).items() if given else ():
        if given.get(name, (0, 0))[0] == id(exact) and given[name] != _state_of(exact):
            tensor: Any = owner
            for part in name.split("."):
                tensor = getattr(tensor, part, None)
            if isinstance(tensor, torch.Tensor) and tensor.shape == exact.shape:  # no other module is in its place
                tensor.data = exact.to(tensor.device, tensor.dtype)
                written.add(name)
            given[name] = _state_of(exact)
    return written


def _state_of(exact: torch.Tensor) -> tuple[int, int]:
    """Return what tells whether a tensor is another one, or was written to; of those in inference mode, the former."""
    return id(exact), 0 if exact.is_inference() else exact._version


def restore_(owner: torch.nn.Module, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> bool:
    """Give tensors that were cast their exact values back, in place; return whether there were any.

    Values that changed since the cast win over the ones kept.
    """
    settle_(owner)
    kept = exact_values(owner)
    pairs = [(tensor, kept.pop(name)) for name, tensor in tensors().items() if name in kept] if kept else []
    if not kept:
        owner.__dict__.pop(_GIVEN, None)
        owner.__dict__.pop(_KEPT, None)
    for tensor, exact in pairs:
        tensor.data, tensor.grad = exact_value(tensor, exact), None  # a gradient has the dtype of the cast
    return bool(pairs)


@contextlib.contextmanager
def converted(owner: torch.nn.Module, tensors: Callable[[], Mapping[str, torch.Tensor]]) -> Iterator[None]:
    """Inside, tensors of a module get another dtype: those that are wide enough then have their exact values again."""
    settle_(owner)
    kept = exact_values(owner)
    now = tensors() if kept else {}
    exact = {name: exact_value(now[name], value) for name, value in kept.items() if name in now}
    narrow = {name for name, value in exact.items() if now[name].itemsize < value.itemsize}
    yield
    now = tensors() if exact else {}
    wide = {name for name in narrow if name in now and now[name].itemsize >= exact[name].itemsize}
    for name in wide | {name for name, value in exact.items() if name in now and now[name].dtype == value.dtype}:
        now[name].data = exact[name].to(now[name].device, now[name].dtype)
        kept.pop(name, None)  # which a model within has done, too


def cast_copies_(model: torch.nn.Module) -> None:
    """Cast copies of modules (``modules_to_save``) to the dtype of what they stand for."""
    for name, wrapper in _copied(model):
        dtypes = {inside: p.dtype for inside, p in wrapper.original_module.named_parameters()}
        for adapter, copy in wrapper.modules_to_save.items():
            for inside, parameter in copy.named_parameters():
                wanted = dtypes.get(inside, parameter.dtype)
                if wanted.is_floating_point:
                    cast_(model, {f"{name}.modules_to_save.{adapter}.{inside}": parameter}, wanted)


def without_copies(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the parameters of a model but for those of copies of modules, which train in the dtype of the base."""
    copies = tuple(f"{name}.modules_to_save." for name, _ in _copied(model))
    return {name: parameter for name, parameter in model.named_parameters() if not name.startswith(copies)}


def _copied(model: torch.nn.Module) -> list[tuple[str, ModulesToSaveWrapper]]:
    return [(name, part) for name, part in model.named_modules() if isinstance(part, ModulesToSaveWrapper)]


def _give_exact_values(module: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Put the values that were loaded in place of their casts: files keep weights as they were trained."""
    written = settle_(module)
    kept, given = exact_values(module), module.__dict__.setdefault(_GIVEN, {})
    for name, exact in kept.items():
        key = prefix + name
        if key in state_dict:
            # Kept, so that it is the same tensor each time: a save tells by that what of a model it has seen.
            kept[name] = exact if name in written else exact_value(state_dict[key], exact)
            state_dict[key] = kept[name]
            given[name] = _state_of(kept[name])
