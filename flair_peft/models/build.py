"""A stored Flair model → the live one: every load of a model with adapters ends here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import unquote

import torch
from flair.embeddings import TransformerEmbeddings
from flair.models import MultitaskModel
from flair.nn import Model

from flair_peft.base import memory_check
from flair_peft.codec import state_positions
from flair_peft.embeddings import fill_weights, head_dtype, plain_transformers
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import StateMismatchError, name_some
from flair_peft.models import head_probe, unkept_settings
from flair_peft.models.stored import Stored, report_not_finite
from flair_peft.primitives import building
from flair_peft.primitives.load_context import within_load
from flair_peft.torchfile import state_tree

_Child = TypeVar("_Child", bound=torch.nn.Module)


def build(stored: Stored, load: Callable[[dict[str, Any]], Model]) -> Model:
    """Return the model, with one dtype at the boundary between its embeddings and its head.

    Args:
        stored: with the PEFT configs of all its embeddings, see :func:`flair_peft.models.stored.complete`.
        load: Flair's own ``load`` of the class.

    Raises:
        StateMismatchError: tensors do not fit the model that the settings describe, or it gives something else than it
            gave when it was saved.
    """
    source, probes = stored.source, list[Any]()
    with within_load(options=stored.options):
        # Flair makes the head, and a server may load a model between two predictions.
        with (
            within_load(is_building=True, inner=dict(stored.inner), probes=probes),
            memory_check.bounded(source, stored.tensors),
            building.lock,
            torch.inference_mode(False),
        ):
            _take_from_bases_(stored)
            tensors = state_tree.tensors_of(stored.state)
            model = load(stored.state)
        unkept_settings.set_again_(model, stored.state, source=source)
        if stored.kind == "directory" and not adapted_embeddings(model):
            fill_weights.take_dtypes_(model, tensors)
        _check_numbers(model, stored.tensors, source)
        report_not_finite(stored.tensors, f"'{source}'")
        _share_embeddings_again(model)
        _share_plain_again(model, stored)
        head_dtype.align_head_(model)
        head_probe.replay(model, stored.state.get(head_probe.KEY), source=source, probes=probes)
    return model


def _take_from_bases_(stored: Stored) -> None:
    """Give the state the weights that a directory leaves to the bases of Flair's own embeddings, in place."""
    for params in (each.params for each in stored.embeddings if each.params.get("peft_config") is None):
        index, weights = plain_transformers.take_from_base_(params)
        for prefix in stored.prefixes.get(index, ()) if weights and index is not None else ():
            tensors, start = state_positions.group_of(stored.state, prefix)
            tensors.update({start + key: tensor for key, tensor in weights.items()})


def _check_numbers(model: Model, tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """Return if no whole numbers were stored for a weight: torch would read them as floating-point ones."""
    live = model.state_dict()
    odd = {n for n, t in tensors.items() if n in live and t.is_floating_point() != live[n].is_floating_point()}
    if odd:
        raise StateMismatchError(
            f"Cannot load '{source}': {name_some(odd)} in it are not of the kind of number that the model computes "
            "with. It would predict something else. Copy or save it again."
        )


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


def _share_plain_again(model: Model, stored: Stored) -> None:
    """As for embeddings with an adapter; a directory says of each in which places its weights are."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for prefixes in stored.prefixes.values():
        first, *others = [_module_of(prefix) for prefix in prefixes]
        for name in others:
            above, _, last = name.rpartition(".")
            shared: Any = modules.get(first)
            own: Any = modules.get(name)
            if isinstance(own, TransformerEmbeddings) and type(shared) is type(own) and not adapted_embeddings(own):
                replace_(modules[above], last, own, shared)


def _module_of(prefix: str) -> str:
    """Return the name of the embeddings whose weights have this prefix, such as "state_dict/embeddings.model."."""
    above, _, name = prefix.rpartition("state_dict/")
    return ".".join([*map(unquote, above.split("/")[1::2]), name.removesuffix(".model.")])


def replace_(parent: torch.nn.Module, name: str, child: torch.nn.Module, new: torch.nn.Module) -> None:
    """Replace embeddings, in place, also in the plain list that StackedEmbeddings keeps beside its submodules."""
    setattr(parent, name, new)
    listed = parent.__dict__.get("embeddings")
    if isinstance(listed, list):
        listed[:] = [new if item is child else item for item in listed]


def replace_each_(model: torch.nn.Module, kind: type[_Child], make: Callable[[_Child], torch.nn.Module]) -> None:
    """Replace each module of a class by what is made of it, once, in place, wherever in the model it stands."""
    made: dict[int, torch.nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind):
                if id(child) not in made:
                    made[id(child)] = make(child)
                replace_(parent, name, child, made[id(child)])


def _are_equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
