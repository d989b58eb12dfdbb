"""The state of a Flair model → the model: every load of a model with adapters ends here."""

from __future__ import annotations

import contextvars
import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from flair.models import MultitaskModel
from flair.nn import Model

from flair_peft.adapter import injection
from flair_peft.base import memory_check
from flair_peft.codec import trust
from flair_peft.embeddings import head_dtype, weights
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import (
    AdapterConfigError,
    FlairPeftError,
    ModelFileError,
    StateMismatchError,
    UnsafeFileError,
    name_some,
)
from flair_peft.models import head_probe, stored_state
from flair_peft.primitives.base_record import load_options
from flair_peft.torchfile import state_tree

# How torch lists the keys that do not fit.
_LISTED = r"(Missing|Unexpected) key\(s\) in state_dict: ([^\n]*)"
_QUOTED = r'"([^"]+)"'
_is_going_on: contextvars.ContextVar[bool] = contextvars.ContextVar("flair_peft_is_going_on", default=False)


def assemble(load: Callable[[dict[str, Any]], Model], state: dict[str, Any], *, source: str) -> Model:
    """Return the model of a state, with one dtype at the boundary between its embeddings and its head.

    Args:
        load: Flair's own ``load`` of the class.
        state: of a Flair model whose embeddings all have their PEFT configs.
        source: named in errors.

    Raises:
        StateMismatchError: tensors do not fit the model that the settings describe.
        AdapterConfigError: the user says where the base model is, and the state holds all of its weights.
        UnsafeFileError: Flair would run code, or open what the state names, when it builds the model.
        ModelFileError: the settings are not those of this class.
    """
    token = _is_going_on.set(True)
    try:
        with naming_mismatches(source):
            if not load_options().trust_file:
                _refuse_unsafe_settings(state, source)
                _refuse_unsafe(state, source)
            _refuse_useless_base(state, source)
            head_probe.check_settings(state, source=source)
            # Flair makes the head, and a server may load a model between two predictions.
            with (
                weights.expecting(state_tree.inner_embeddings(state)),
                memory_check.bounded(source, stored_state.tensors_of(state)),
                injection.building,
                torch.inference_mode(False),
            ):
                model = load(state)
    finally:
        _is_going_on.reset(token)
    _check_numbers(model, state, source)
    stored_state.report_not_finite(stored_state.tensors_of(state), f"'{source}'")
    _share_embeddings_again(model)
    head_dtype.align_head_(model)
    head_probe.replay(model, state.get(head_probe.KEY), source=source)
    return model


def _refuse_unsafe_settings(state: dict[str, Any], source: str) -> None:
    """Return if no setting of the model, or of one of its tasks, would have Flair open what the file names."""
    danger = trust.unsafe_setting(state)
    if danger:
        raise UnsafeFileError(
            f"Cannot load '{source}': {danger}. Flair would open, and may run, what a file names in that place, or the "
            "file is damaged. Copy or save the model again, and load no such file from somebody whom you do not trust."
        )


def _refuse_unsafe(value: Any, source: str) -> None:
    """Return if nothing in a state would have Flair run code or unpickle when it builds the model."""
    danger = trust.unsafe_part(value) if isinstance(value, dict) else None
    if danger:
        raise UnsafeFileError(
            f"Cannot load '{source}': there are embeddings that need {danger}. No file may do that. Save the model "
            "without them."
        )
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ():
        _refuse_unsafe(inner, source)


def _refuse_useless_base(state: dict[str, Any], source: str) -> None:
    given = load_options().base_model
    stored = [stored for _, stored in stored_state.stored_bases(state)]
    needs_code = any(base.record is not None and base.record.needs_remote_code for base in stored)
    if given is not None and not needs_code and not any(base.is_needed for base in stored):
        raise AdapterConfigError(
            f"Cannot use the base_model given for '{source}', {given!r:.200}: the file holds all weights of its base "
            "itself. None would be read from there, or compared with what is there. Leave out base_model."
        )


def _check_numbers(model: Model, state: dict[str, Any], source: str) -> None:
    """Return if no whole numbers were stored for a weight: torch would read them as floating-point ones."""
    own, stored = model.state_dict(), stored_state.tensors_of(state)
    odd = {n for n, tensor in stored.items() if n in own and tensor.is_floating_point() != own[n].is_floating_point()}
    if odd:
        raise StateMismatchError(
            f"Cannot load '{source}': {name_some(odd)} in it are not of the kind of number that the model computes "
            "with. It would predict something else. Copy or save it again."
        )


def is_going_on() -> bool:
    """Whether a load is inside :func:`assemble`: loads re-enter, and only the outermost sees the whole model."""
    return _is_going_on.get()


def subclasses(root: type[Any]) -> Iterator[type[Any]]:
    """Yield all classes that derive from ``root``, once for each way in which they do."""
    for subclass in root.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def check_class(cls: type[Model], stored: Any, source: str) -> None:
    """Say which class a file holds where an abstract class would try all others, and another one read its settings."""
    known = {subclass.__name__ for subclass in subclasses(cls)}
    if not inspect.isabstract(cls):
        found = [model_class for model_class in subclasses(Model) if model_class.__name__ == stored]
        if found and not any(issubclass(cls, model_class) or issubclass(model_class, cls) for model_class in found):
            raise ModelFileError(
                f"Cannot load '{source}' as a {cls.__name__}: it holds a {stored}. Another class would read it as "
                f"something that it is not. Use {stored}.load."
            )
    elif stored is not None and stored not in known:
        raise ModelFileError(
            f"Cannot load '{source}' as a {cls.__name__}: it holds a {stored}. {cls.__name__}.load finds only classes "
            f"that derive from {cls.__name__}. Use {stored}.load, after importing the module that defines it, or "
            "flair.nn.Model.load."
        )


@contextmanager
def naming_mismatches(source: str) -> Iterator[None]:
    """Raise torch's list of keys that do not fit as an error that names the file."""
    try:
        yield
    except (FlairPeftError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        # Flair, PEFT and transformers raise what they like when a file gives them nonsense.
        if "loading state_dict" not in str(error):
            raise ModelFileError(
                f"Cannot build the model in '{source}': {type(error).__name__}: {str(error)[:200]}. Its settings are "
                "not those that this model class has, or this process could not build it. If the file was not copied "
                "whole, or comes from another version, copy or save it again."
            ) from error
        listed = re.findall(_LISTED, str(error))
        found = "; ".join(f"{kind.lower()}: {name_some(re.findall(_QUOTED, names))}" for kind, names in listed)
        raise StateMismatchError(
            f"Cannot load '{source}': {found or error}. The tensors in it and the model built from its settings "
            "differ. Load it with the versions of Flair and PEFT that wrote it, or save the model again."
        ) from error


def _share_embeddings_again(model: Model) -> None:
    """Make embeddings that were one object one again; Flair stores and builds them once for each place they have."""
    first: dict[Any, PeftTransformerEmbeddings] = {}
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            # Files of 0.1.0 do not number embeddings; the tasks of a multitask model may share theirs.
            is_numbered = isinstance(child, PeftTransformerEmbeddings) and child.origin is not None
            if is_numbered or (isinstance(child, PeftTransformerEmbeddings) and isinstance(model, MultitaskModel)):
                shared = first.setdefault(child.origin[0] if is_numbered else child.name, child)
                if shared is not child and _are_equal(shared.state_dict(), child.state_dict()):
                    replace_(parent, name, child, shared)


def replace_(parent: torch.nn.Module, name: str, child: torch.nn.Module, new: torch.nn.Module) -> None:
    """Replace embeddings, in place, also in the plain list that StackedEmbeddings keeps beside its submodules."""
    setattr(parent, name, new)
    listed = parent.__dict__.get("embeddings")
    if isinstance(listed, list):
        listed[:] = [new if item is child else item for item in listed]


def _are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
