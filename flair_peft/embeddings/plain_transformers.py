"""Flair's own transformer embeddings in a directory: what is stored of them, and the weights that their base has."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from flair.embeddings import TransformerEmbeddings
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from flair_peft.adapter import keys
from flair_peft.base import config_safety, placement, resolve, stored_config, tokenizers, transformer
from flair_peft.embeddings import stored_params
from flair_peft.embeddings.base_source import BaseSource
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.embeddings.word_and_document import counterpart
from flair_peft.errors import AdapterConfigError, UnsupportedStateError, name_some
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.load_context import load_options

Tensors = dict[str, torch.Tensor]

# A transformer can have an adapter without being one: by its add_adapter.
_OF_PEFT = (PeftModel, BaseTunerLayer, AuxiliaryTrainingWrapper)


def plain_transformers(model: torch.nn.Module) -> list[TransformerEmbeddings]:
    """Return Flair's own transformer embeddings in a model, each once, in the order of its modules."""
    found = (module for module in model.modules() if isinstance(module, TransformerEmbeddings))
    return [module for module in found if not isinstance(module, PeftTransformerEmbeddings)]


def refuse_unstorable(embeddings: TransformerEmbeddings) -> None:
    """Return if Flair makes embeddings of what it stores that read the same weights.

    Raises:
        AdapterConfigError: their transformer has an adapter of PEFT.
        UnsupportedStateError: their weights are quantised, or spread over devices, or their config changes.
    """
    if any(isinstance(module, _OF_PEFT) for module in embeddings.model.modules()):
        raise AdapterConfigError(
            f"Cannot save '{embeddings.name}' in a directory: it is of Flair's own class and has an adapter of PEFT. "
            "Flair does not store how that is read. Make the model with "
            f"{counterpart(type(embeddings)).__name__}, or use model.save(path) and flair_peft.convert_legacy."
        )
    if placement.is_placed(embeddings.model):
        raise UnsupportedStateError(
            f"Cannot save '{embeddings.name}': its weights are quantised or spread over devices. Flair would make a "
            "transformer of other weights of what it stores. Load the model without that, and save it then."
        )
    if lost := stored_config.changing(embeddings.model.config):
        raise UnsupportedStateError(
            f"Cannot save '{embeddings.name}': Flair stores its {type(embeddings.model.config).__name__} and reads "
            f"another {name_some(lost)} from it. The model would predict something else. Use another base model."
        )


def compare_with_base(embeddings: TransformerEmbeddings) -> StoredBase:
    """Return which weights are the base model's own, bit by bit, and need not be stored.

    None are where the base is not found, or where only such are equal that nobody reads: no load should need a base for
    a pooler.
    """
    model = embeddings.model
    source = BaseSource(str(embeddings.base_model_name), None, cache_dir=load_options().cache_dir)
    if not source.find_record_(model):
        return StoredBase()
    found, state = source.compare(model, model, trained=frozenset()), model.state_dict()
    left_out = {key for key in found.left_out if not keys.is_unread(key)}
    if left_out.isdisjoint(name for name, _ in model.named_parameters(remove_duplicate=False)):
        return StoredBase(found.record)
    if left_out == state.keys():
        # By what is stored of them, embeddings are found among the tensors of a model.
        left_out.discard(min(state, key=lambda key: state[key].numel()))
    rows = found.added_rows if left_out & transformer.names_of_input_embeddings(model) else None
    return dataclasses.replace(found, left_out=frozenset(left_out), added_rows=rows)


@contextlib.contextmanager
def describing(beside: Mapping[TransformerEmbeddings, Mapping[str, Any]]) -> Iterator[None]:
    """Inside, embeddings give more than Flair's parameters of themselves.

    Args:
        beside: embeddings → what stands beside their parameters.
    """

    def to_params(embeddings: TransformerEmbeddings) -> dict[str, Any]:
        tokenizers.forget_use_(embeddings.tokenizer)
        params = {**type(embeddings).to_params(embeddings), **beside[embeddings]}
        # Of models that were loaded, the slow tokenizer is gone of which transformers would make some fast ones.
        files = tokenizers.portable_tokenizer_files(params["tokenizer_data"], embeddings.tokenizer)
        return {**params, "tokenizer_data": files}

    for embeddings in beside:
        # An attribute of this one object, in front of the method of its class.
        embeddings.__dict__["to_params"] = functools.partial(to_params, embeddings)
    try:
        yield
    finally:
        for embeddings in beside:
            embeddings.__dict__.pop("to_params", None)


def take_from_base_(params: dict[str, Any]) -> tuple[int | None, Tensors]:
    """Return number and weights of embeddings that a directory leaves to their base, which is found and checked.

    Args:
        params: of the embeddings in the directory; they are Flair's alone afterwards.

    Raises:
        BaseModelNotFoundError: the base is neither on this machine nor on the Hub.
        BaseMismatchError: what was found is another model.
        ModelFileError: what the file says of it is damaged.
    """
    config_safety.refuse_many(params.get("config_state_dict", {}), str(params.get("model")))
    index, stored = params.pop("part", None), StoredBase.from_dict(params.get("stored_base"))
    config = stored_params.saved_config(params) if stored.is_needed else None
    params.pop("stored_base", None)
    if config is None or stored.record is None:
        return index, {}
    found = resolve.find_stored(stored, config, dtype=stored.record.dtype, name=str(params.get("name")))
    own = found.own_weights()
    return index, {key: own[key] for key in stored.left_out if key in own}
