"""What a save stores of a model: what it leaves out, how the base is found again, what a probe sentence gives."""

from __future__ import annotations

import functools
import itertools
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from flair.embeddings import TransformerEmbeddings
from flair.nn import Model

from flair_peft.adapter import refusals
from flair_peft.base import like_config
from flair_peft.codec import state_json
from flair_peft.compat import versions
from flair_peft.embeddings import plain_transformers, stored_params, untrained
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.embeddings.vector_probe import Reading
from flair_peft.errors import AdapterConfigError, UnsupportedStateError
from flair_peft.models import card, head_probe, unkept_settings
from flair_peft.primitives import mapped_memory
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import LoadOptions, within_load
from flair_peft.torchfile import state_tree

Tensors = dict[str, torch.Tensor]

# A probe switches dropout off for a moment, which no other save may see.
_one_save = threading.RLock()


@dataclass(frozen=True)
class Description:
    """A Flair model as JSON and tensors by name, see :mod:`flair_peft.codec.state_json`."""

    document: Any
    tensors: Mapping[str, torch.Tensor]

    def __reduce__(self) -> Any:  # as it is pickled: one call of one function with a text and tensors
        return state_json.restore_state, (json.dumps(self.document), dict(self.tensors))


@dataclass(frozen=True)
class Part:
    """How a save stores one embeddings module.

    Attributes:
        index: its number in the file.
        embeddings: the module.
        stored: which of its weights are the base's own and left out, and how the base is found again.
        proof: what its parameters hold in a file alone: number, base, and what a load must give again.
    """

    index: int
    embeddings: TransformerEmbeddings
    stored: StoredBase
    proof: Mapping[str, Any]

    @property
    def is_plain(self) -> bool:
        """Whether the embeddings are Flair's own, without an adapter."""
        return not isinstance(self.embeddings, PeftTransformerEmbeddings)

    @cached_property
    def weights(self) -> Tensors:
        """Key in the transformer → each tensor that the file holds."""
        whole = {key.removeprefix("model."): tensor for key, tensor in self.embeddings.state_dict().items()}
        return {key: tensor for key, tensor in whole.items() if key not in self.stored.left_out}

    def prefixes_in(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[str]:
        """Yield in front of which names the very weights of the module lie; others on its base share some of them."""
        anchor = next((key for key, tensor in self.weights.items() if tensor.numel()), "")
        for name in tensors:
            prefix = name.removesuffix(anchor)
            may_be_here = prefix != name and prefix.endswith("model.")
            if may_be_here and all(_is_same(tensors.get(prefix + key), each) for key, each in self.weights.items()):
                yield prefix


@dataclass(frozen=True)
class SavePlan:
    """What is stored of a model; see :func:`plan_save`.

    Attributes:
        model: that is saved.
        parts: its embeddings with an adapter; those of Flair's own where there are none of these.
        head: what its head gives for a probe, and the vectors of embeddings that were read for that.
    """

    model: Model
    parts: tuple[Part, ...]
    head: Mapping[str, Any]

    def part_of(self, module: object) -> Part | None:
        """Return how an embeddings module is stored."""
        return next((part for part in self.parts if part.embeddings is module), None)


def check_model(model: Any) -> None:
    """Return if this is a Flair model.

    Raises:
        AdapterConfigError: it is not.
    """
    if not isinstance(model, Model):
        raise AdapterConfigError(
            f"Cannot save this {type(model).__name__}: it is no Flair model, which has a head and labels as well. Pass "
            "the model that you trained, such as a TextClassifier, and then where it is to be."
        )


def plan_save(
    model: Model, *, save_base: bool | None = None, stored_base: Callable[[Any], StoredBase] | None = None
) -> SavePlan:
    """Return what a save stores of a model, which stays as it is.

    Args:
        model: whose embeddings are compared with their base models, bit by bit.
        save_base: store the bases' weights too; None means what the embeddings were made with.
        stored_base: says it instead, for each of the embeddings.

    Raises:
        AdapterConfigError: the embeddings cannot be stored in this way.
        UnsupportedStateError: nor can their weights.
        UnsupportedMethodError: files cannot hold the adapter.
    """
    check_model(model)
    unkept_settings.refuse_deciding(model)
    embedded = adapted_embeddings(model)
    if not embedded:
        return _plan_plain(model, stored_base or functools.partial(_base_here, save_base=bool(save_base)))
    for embeddings in embedded:
        refusals.refuse_unstorable(embeddings.model)
        like_config.report_unlike_config(embeddings.base_model)
    with _one_save:
        bases = [_stored_base(each, save_base) if stored_base is None else stored_base(each) for each in embedded]
        unchanged = [untrained.never_updated(each.model, each._start) for each in embedded]
        readings = [Reading(each, has_graph=bool(names)) for each, names in zip(embedded, unchanged, strict=True)]
        head = head_probe.take(model, readings)
        proofs = map(stored_params.proof_params, readings, itertools.count(), bases, unchanged)
        return SavePlan(model, tuple(map(Part, itertools.count(), embedded, bases, proofs)), head)


def _plan_plain(model: Model, stored_base: Callable[[Any], StoredBase]) -> SavePlan:
    """Return what a save stores of a model without an adapter: all that its bases lack."""
    embedded = plain_transformers.plain_transformers(model)
    for embeddings in embedded:
        plain_transformers.refuse_unstorable(embeddings)
    with _one_save:
        with plain_transformers.describing({each: {"part": index} for index, each in enumerate(embedded)}):
            state = _state_of(model)
        # Those of which the state says nothing are made by code around them, and are modules like all others.
        described = {found.params.get("part") for found in state_tree.embeddings_in(state)}
        embedded = [embeddings for index, embeddings in enumerate(embedded) if index in described]
        bases = [stored_base(embeddings) for embeddings in embedded]
        proofs = [{"part": index, "stored_base": stored.to_dict()} for index, stored in enumerate(bases)]
        parts = tuple(map(Part, itertools.count(), embedded, bases, proofs))
        return SavePlan(model, parts, head_probe.take(model, []))


def _state_of(model: Model) -> dict[str, Any]:
    """Return the state that Flair gives of a model.

    Raises:
        UnsupportedStateError: Flair fails to, as with embeddings whose settings it does not read.
    """
    try:
        return model._get_state_dict()
    except AttributeError as error:
        raise UnsupportedStateError(
            f"Cannot store this {type(model).__name__}: Flair cannot say what it is made of ({error}), and its own "
            "save fails, too. Make it with all of its parts, and without settings that Flair does not store, such as "
            "word_dropout of DocumentRNNEmbeddings."
        ) from error


def _base_here(embeddings: TransformerEmbeddings, *, save_base: bool) -> StoredBase:
    """Return which weights of plain embeddings a base on this machine has; nothing is downloaded for that."""
    if save_base:
        return StoredBase()
    with within_load(options=LoadOptions(local_files_only=True)):
        return plain_transformers.compare_with_base(embeddings)


def encode(plan: SavePlan, **extra: Any) -> Description:
    """Return the model as JSON and tensors, without what is left out.

    Raises:
        UnsupportedStateError: the model holds an object that files cannot hold.
    """
    model, plain = plan.model, {part.embeddings: part.proof for part in plan.parts if part.is_plain}
    described = {part.index for part in plan.parts if part.is_plain}

    def complete(params: dict[str, Any]) -> dict[str, Any]:
        part = plan.part_of(stored_params.embeddings_of(params))
        if part is None:
            return params
        described.add(part.index)
        return {**params, **part.proof}

    with _one_save:
        with plain_transformers.describing(plain):
            state: dict[str, Any] = _to_store(_state_of(model), plan, model, complete)
        # Where there are none, too: files of before lack the key.
        state = {**state, unkept_settings.KEY: unkept_settings.read(model)}
        head = {**plan.head, "settings": head_probe.digest(state)}
        state = {**state, head_probe.KEY: head, "versions": versions(), **extra}
        if model.model_card is not None:
            state["model_card"] = card.plain(model.model_card)
        document, tensors = state_json.encode(state, complete=complete)
        if len(described) < len(plan.parts):
            inner = _inner_embeddings(plan, described)
            document, tensors = state_json.encode({**state, state_tree.INNER: inner}, complete=complete)
    return Description(document, tensors)


def _stored_base(embeddings: PeftTransformerEmbeddings, save_base: bool | None) -> StoredBase:
    is_whole = embeddings.save_base if save_base is None else save_base
    return StoredBase(embeddings.base_record) if is_whole else embeddings.compare_with_base()


def _to_store(
    value: Any, plan: SavePlan, module: torch.nn.Module | None, complete: Callable[[dict[str, Any]], dict[str, Any]]
) -> Any:
    """Return a copy of a state that is complete in its parameters, and without the weights that are left out."""
    if isinstance(value, dict) and value and all(isinstance(item, torch.Tensor) for item in value.values()):
        return _without_left_out(value, plan, None)
    if type(value) is list:
        return [_to_store(item, plan, None, complete) for item in value]
    if type(value) is not dict:
        return value
    stored, tasks = dict[str, Any](), getattr(module, "tasks", None)
    for name, item in complete(value).items():
        if module is not None and name == "state_dict":
            stored[name] = _without_left_out(item, plan, module)
        elif tasks and name == "model_states":
            stored[name] = {task: _to_store(each, plan, tasks[task], complete) for task, each in item.items()}
        else:
            stored[name] = _to_store(item, plan, None, complete)
    return stored


def _without_left_out(
    tensors: dict[str, torch.Tensor], plan: SavePlan, module: torch.nn.Module | None
) -> dict[str, torch.Tensor]:
    """Return a state dict without the weights that are left out: those of modules, wherever their weights lie."""
    named = () if module is None else module.named_modules(remove_duplicate=False)
    parts = ((f"{name}.model." if name else "model.", plan.part_of(module)) for name, module in named)
    found = [(prefix, part) for prefix, part in parts if part is not None]
    found += [(prefix, part) for part in plan.parts for prefix in part.prefixes_in(tensors)]
    left_out = {prefix + key for prefix, part in found for key in part.stored.left_out}
    return {name: tensor for name, tensor in tensors.items() if name not in left_out}


def _inner_embeddings(plan: SavePlan, described: set[int]) -> dict[str, dict[str, Any]]:
    """Return module prefix → parameters of embeddings that the state lacks: code around them makes them of its own."""
    parts = ((name, plan.part_of(module)) for name, module in plan.model.named_modules(remove_duplicate=False))
    lacking = ((name, part) for name, part in parts if part is not None and part.index not in described)
    return {f"{name}.": part.embeddings.save_embeddings(use_state_dict=False) for name, part in lacking}


def _is_same(first: Any, second: torch.Tensor) -> bool:
    return isinstance(first, torch.Tensor) and mapped_memory.place_of(first) == mapped_memory.place_of(second)
