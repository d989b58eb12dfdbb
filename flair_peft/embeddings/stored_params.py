"""Embeddings ⇄ their parameters: what files, copies and pickles hold of them beside their weights."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from types import NoneType
from typing import Any

import torch
from transformers import PretrainedConfig

from flair_peft.adapter import config as configs
from flair_peft.adapter import derived_state, keys, methods, trainable
from flair_peft.base import (
    config_safety,
    memory_check,
    quantisation,
    resolve,
    stored_config,
    tokenizers,
    transformer,
)
from flair_peft.compat import FORMAT_VERSION, FormatVersion, check_format_version
from flair_peft.embeddings import untrained, vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.pending_load import PendingLoad
from flair_peft.embeddings.vector_probe import Reading
from flair_peft.errors import AdapterConfigError, ModelFileError, name_some
from flair_peft.primitives import dtypes
from flair_peft.primitives.base_record import StoredBase
from flair_peft.primitives.fingerprint import are_same_bits

Params = Mapping[str, Any]

# What files may say beside the arguments of the constructor, and which of these only a user may give.
_STORED_BESIDE = frozenset({"config_state_dict", "derived_state", "probe", "untrained", "part", "trained_base"})
_ONLY_FROM_USERS = frozenset({"transformers_config_kwargs", "transformers_model_kwargs", "saved_config", "tokenizer"})

# What the constructor finds out by itself; of the first two, what it did when the model was made counts.
_DERIVED = frozenset({"truncate", "stride", "embedding_length", "use_lang_emb"})


def describe(embeddings: AdaptedEmbeddings, stock: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the constructor parameters of embeddings as plain values, the PEFT config and the dtypes among them.

    ``stock`` returns those that Flair stores. Those of embeddings whose weights no pickle holds refuse to be pickled; a
    save completes them.

    Raises:
        AdapterConfigError: the base is quantised by what files cannot say.
    """
    quantisation.check_storable(embeddings.base_model, embeddings.name)
    tokenizers.forget_use_(embeddings.tokenizer)
    params = {**stock(), **_own_params(embeddings)}
    shape = params["config_state_dict"].items()
    params["config_state_dict"] = {name: value for name, value in shape if name != "quantization_config"}
    params["tokenizer_data"] = tokenizers.portable_tokenizer_files(params["tokenizer_data"], embeddings.tokenizer)
    _described_by[params["tokenizer_data"]] = weakref.ref(embeddings)
    return params


# Whose parameters hold an archive of a tokenizer: it is made anew for each, and copies of the parameters hold it too.
_described_by: weakref.WeakKeyDictionary[BytesIO, weakref.ref[AdaptedEmbeddings]] = weakref.WeakKeyDictionary()


def embeddings_of(params: Params) -> AdaptedEmbeddings | None:
    """Return the embeddings that returned these parameters, ``None`` for any other dictionary."""
    archive = params.get("tokenizer_data")
    reference = _described_by.get(archive) if isinstance(archive, BytesIO) else None
    return None if reference is None else reference()


class _WithoutWeights:
    """Stands among parameters for weights that are in no pickle: it cannot be pickled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        raise without_weights(self._name)


def without_weights(name: str) -> AdapterConfigError:
    """Return the error of whatever would store the weights of a base that is quantised or spread over devices."""
    return AdapterConfigError(
        f"Cannot store all weights of '{name}': its base is quantised or spread over devices, and files and pickles "
        "hold none of its weights. Leave out save_base=True, or save the model with model.save instead of pickling it."
    )


def _own_params(embeddings: AdaptedEmbeddings) -> dict[str, Any]:
    """Return the parameters that Flair's own embeddings do not have."""
    config, start = embeddings.adapter_config, embeddings.base_source.placed_start
    return {
        "format_version": FormatVersion(FORMAT_VERSION),
        "peft_config": configs.encode_config(config),
        "dtype": dtypes.dtype_name(start.dtype if start else embeddings.base_dtype),
        "peft_gradient_checkpointing_kwargs": embeddings._preparing,
        "head_dtype": dtypes.dtype_name(embeddings.head_dtype),
        "keep_virtual_rows": embeddings.keep_virtual_rows,
        "save_base": embeddings.save_base,
        # Somebody may have given the tokenizer another limit since they were derived from it.
        "truncate": embeddings.truncate,
        "stride": embeddings.stride,
        # Without this, transformers makes a fast tokenizer of the files of a slow one.
        "transformers_tokenizer_kwargs": {} if embeddings.tokenizer.is_fast else {"use_fast": False},
        "derived_state": derived_state.read(embeddings.model) if methods.is_derived_from_base(config) else {},
        # Versions that do not know these refuse them, and read all other files.
        **({"after_final_norm": True} if embeddings.after_final_norm else {}),
        **({} if embeddings.length_grouping else {"length_grouping": False}),
        **({"stored_base": _WithoutWeights(embeddings.name)} if embeddings.is_placed else {}),
    }


def proof_params(reading: Reading, index: int, stored: StoredBase, unchanged: Sequence[str]) -> dict[str, Any]:
    """Return what a load needs to find the base and to verify the result, to be stored with the parameters.

    Args:
        reading: what the embeddings gave for the probe of the head; where that is nothing, they are probed alone.
        index: number of the embeddings in the file.
        stored: how the file stores their base.
        unchanged: names of their parameters that were never updated.

    Raises:
        AdapterConfigError: the base is quantised by what files cannot say, or the file is to hold all weights.
    """
    embeddings = reading.embeddings
    quantisation.check_storable(embeddings.base_model, embeddings.name)
    if embeddings.is_placed and not stored.is_needed:
        raise without_weights(embeddings.name)
    # One forward pass tells both: what the embeddings give, and what a gradient can reach.
    states, probe = reading.states, None
    if not states:
        ids = vector_probe.probe_ids(embeddings)
        states = vector_probe.probe_states(embeddings, ids, has_graph=bool(unchanged))
        probe = vector_probe.describe_probe(embeddings, ids, states)
    return {
        "part": index,
        "stored_base": stored.to_dict(),
        "probe": probe,
        "untrained": untrained.reached_by_gradients(embeddings.model, unchanged, states),
        "trained_base": trained_base(embeddings),
    }


def trained_base(embeddings: AdaptedEmbeddings) -> list[str]:
    """Return the names of the base's own weights that are trained: a user may have unfrozen some."""
    return sorted(name for name in trainable.parameters(embeddings.model) if keys.base_key(name) is not None)


def rebuild(embeddings_class: type[AdaptedEmbeddings], params: Params) -> Any:
    """Return embeddings of the stored shape, which wait for a state dict.

    Raises:
        FormatVersionError: the parameters were written by a newer version.
        ModelFileError: they are damaged, or the architecture is not one that transformers knows.
    """
    arguments, origin = _constructor_arguments(embeddings_class, params), _origin_of(params)
    embeddings = embeddings_class.create_from_state(**arguments)
    _take_reading_(embeddings, params)
    pending = PendingLoad.from_params(params)
    pending.adapter_config = embeddings._pending.adapter_config
    embeddings._pending, embeddings.origin = pending, origin
    return embeddings


def _take_reading_(embeddings: AdaptedEmbeddings, params: Params) -> None:
    """The embeddings cut and split long sentences as those did that were stored, if the file says how."""
    truncate, stride = params.get("truncate", embeddings.truncate), params.get("stride", embeddings.stride)
    if type(truncate) is not bool or type(stride) is not int or stride < 0:
        raise _damaged(params, f"their truncate is {truncate!r:.80} and their stride {stride!r:.80}")
    embeddings.truncate, embeddings.stride = truncate, stride


def _constructor_arguments(embeddings_class: type[AdaptedEmbeddings], stored: Params) -> dict[str, Any]:
    params = dict(stored)
    stock_format = params.pop("flair_peft_format", FORMAT_VERSION)
    check_format_version(params.pop("format_version", stock_format))
    lacking = {name for name in ("peft_config", "config_state_dict") if params.get(name) is None}
    if lacking:
        raise _damaged(params, f"their parameters lack {name_some(lacking)}")
    bounds = memory_check.bounds()
    if bounds is not None:
        bounds.check_settings(params["peft_config"])
    params["peft_config"] = configs.decode_config(params["peft_config"])
    # PEFT warns of another path; whether the base is the right one is checked by its weights.
    params["peft_config"].base_model_name_or_path = None
    params["use_context"] = params.pop("context_length", 0)
    params = {name: value for name, value in params.items() if name not in _DERIVED}
    _refuse_unknown(embeddings_class, params)
    params["peft_gradient_checkpointing_kwargs"] = quantisation.stored_preparation(
        params.get("peft_gradient_checkpointing_kwargs")
    )
    params["saved_config"] = saved_config(params)
    return {name: value for name, value in params.items() if name not in _STORED_BESIDE}


def _origin_of(params: Params) -> tuple[int, StoredBase] | None:
    """Return the number and the base that embeddings have in the file that their parameters come from."""
    index = params.get("part")
    if type(index) not in (int, NoneType):
        raise _damaged(params, f"their number in the file is {index!r:.80}")
    return None if index is None else (index, StoredBase.from_dict(params.get("stored_base")))


def saved_config(params: Params) -> PretrainedConfig:
    """Return the shape of the transformer; nothing in it has code fetched or run."""
    shape, source = dict(params["config_state_dict"]), str(params.get("model"))
    config_safety.refuse_many(shape, source)
    shape.pop("auto_map", None)  # names code
    shape.pop("quantization_config", None)  # it is read from what the file says of its base
    shape.pop("_attn_implementation", None)
    record = StoredBase.from_dict(params.get("stored_base")).record
    config_class = resolve.config_class(str(shape.get("model_type")), record)
    # from_dict reads the attention implementation from its keyword arguments only.
    attention = shape.pop("attn_implementation", None)
    config = stored_config.from_stored(shape, config_class, attention=attention, source=source)
    return config_safety.sanitise_(config)


def _refuse_unknown(embeddings_class: type[AdaptedEmbeddings], params: Params) -> None:
    """Return if stored parameters are those that embeddings have: others would reach transformers as they are."""
    constructors = [vars(base)["__init__"] for base in embeddings_class.__mro__[:-1] if "__init__" in vars(base)]
    known = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    unknown = set(params) - (known - _ONLY_FROM_USERS - {"self", "args", "kwargs"}) - _STORED_BESIDE
    if unknown:
        raise _damaged(params, f"their parameters hold {name_some(unknown)}, which no embeddings have")


def _damaged(params: Params, what: str) -> ModelFileError:
    return ModelFileError(
        f"Cannot rebuild the embeddings of '{params.get('model')}': {what}. They are damaged or were not written by "
        "Flair or flair_peft. Save the model again."
    )


def take_over_(embeddings: AdaptedEmbeddings, params: Params) -> PendingLoad:
    """Bring embeddings that code around them made anew to those of a file, and return what its state dict holds.

    Args:
        embeddings: modified in place; their weights are those of the state dict afterwards.
        params: of the embeddings that the file holds.

    Raises:
        BaseMismatchError: the base is not the one that these were trained on.
        ModelFileError: the parameters are damaged.
    """
    check_format_version(params.get("format_version", FORMAT_VERSION))
    stored, dtype, source = StoredBase.from_dict(params.get("stored_base")), params.get("dtype"), embeddings.base_source
    if stored.record is not None and stored.is_needed and source.record is not None:
        resolve.check_made(
            source.record, embeddings.base_model, stored.record, cache_dir=source.cache_dir, name=embeddings.name
        )
    if dtype is not None and not embeddings.is_placed and dtypes.parse_dtype(dtype) != embeddings.base_dtype:
        transformer.convert_(embeddings.base_model, dtypes.parse_dtype(dtype))
    if stored.added_rows is not None:
        _set_added_rows_(embeddings.base_model.get_input_embeddings().weight, stored.added_rows)
    if params.get("derived_state"):
        derived_state.put_back_(embeddings.model, params["derived_state"])
    embeddings._start, embeddings.origin = {}, (params["part"], stored)
    return PendingLoad.from_params(params)


def _set_added_rows_(matrix: torch.Tensor, rows: torch.Tensor) -> None:
    if len(rows) <= len(matrix) and not are_same_bits(matrix[-len(rows) :], rows.to(matrix.dtype)):
        matrix.data[-len(rows) :] = rows
