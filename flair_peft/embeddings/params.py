"""Embeddings ⇄ their parameters: what files, copies and pickles hold of them beside their weights."""

from __future__ import annotations

import copy
import inspect
import logging
import weakref
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Set
from contextlib import AbstractContextManager
from io import BytesIO
from types import NoneType
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase
from typing_extensions import Self

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, keys, methods
from flair_peft.base import (
    config_versions,
    frozen,
    learned,
    memory_check,
    quantisation,
    resolve,
    tokenizers,
    transformer,
)
from flair_peft.base.learned import PlacedStart
from flair_peft.compat import FORMAT_VERSION, FormatVersion, check_format_version
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.weights import StoredWeights
from flair_peft.errors import AdapterConfigError, ModelFileError, name_some
from flair_peft.primitives import dtypes, mapped_memory
from flair_peft.primitives.base_record import BaseRecord, StoredBase
from flair_peft.primitives.fingerprint import are_same_bits

log = logging.getLogger("flair_peft")

_STATE_KEY = "flair_peft_params"


# Whose parameters hold an archive of a tokenizer: it is made anew for each, and copies of the parameters hold it too.
_described_by: weakref.WeakKeyDictionary[BytesIO, weakref.ref[Storable]] = weakref.WeakKeyDictionary()


def embeddings_of(params: Mapping[str, Any]) -> Storable | None:
    """Return the embeddings that returned these parameters, ``None`` for any other dictionary."""
    archive = params.get("tokenizer_data")
    found = _described_by.get(archive) if isinstance(archive, BytesIO) else None
    return None if found is None else found()


class _WithoutWeights:
    """Stands among parameters for weights that are in no pickle: it cannot be pickled."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __reduce__(self) -> Any:
        raise _without_weights(self._name)


def _without_weights(name: str) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot store all weights of '{name}': its base is quantised or spread over devices, and files and pickles "
        "hold none of its weights. Leave out save_base=True, or save the model with model.save instead of pickling it."
    )


class Storable(StoredWeights):
    """The part of embeddings that says what they are, and makes them again from that."""

    tokenizer: PreTrainedTokenizerBase
    base_model_name: str
    head_dtype: torch.dtype | None
    output_dtype: torch.dtype
    keep_virtual_rows: bool
    after_final_norm: bool
    save_base: bool
    _record: BaseRecord | None
    _cache_dir: str | None

    @property
    @abstractmethod
    def base_dtype(self) -> torch.dtype:
        """The dtype of the base model's weights."""

    @property
    @abstractmethod
    def is_quantised(self) -> bool:
        """Whether the base's weights are quantised."""

    @property
    def is_placed(self) -> bool:
        """Whether quantisation or a device map says where the base's weights are, so that nobody may move them."""
        return frozen.is_placed(self.base_model)

    _placed_start: PlacedStart | None = None
    _preparing: Mapping[str, Any] = {}

    # Number and base of these embeddings in the file that they come from.
    origin: tuple[int, StoredBase] | None = None

    @property
    def base_record(self) -> BaseRecord | None:
        """Where the base model comes from, as files say it; ``None`` where that was never known."""
        return self._record

    @property
    def base_revision(self) -> str | None:
        """Commit of the base model on the Hub; ``None`` if it comes from a directory."""
        return None if self._record is None else self._record.revision

    def to_params(self) -> dict[str, Any]:
        """Return the constructor parameters as plain values, the PEFT config and the dtypes among them.

        Those of embeddings whose weights no pickle holds refuse to be pickled; a save completes them.

        Raises:
            AdapterConfigError: the base is quantised by what files cannot say.
        """
        quantisation.check_storable(self.base_model, self.name)
        tokenizers.forget_use_(self.tokenizer)
        params, config = super().to_params(), self.adapter_config
        shape = {name: value for name, value in params["config_state_dict"].items() if name != "quantization_config"}
        params = {
            **params,
            "config_state_dict": shape,  # how it is quantised is said of the base, once
            "tokenizer_data": tokenizers.portable_tokenizer_files(params["tokenizer_data"], self.tokenizer),
            "format_version": FormatVersion(FORMAT_VERSION),
            "peft_config": configs.encode_config(config),
            "dtype": dtypes.dtype_name(self._placed_start.dtype if self._placed_start else self.base_dtype),
            "peft_gradient_checkpointing_kwargs": self._preparing,
            "head_dtype": dtypes.dtype_name(self.head_dtype),
            "keep_virtual_rows": self.keep_virtual_rows,
            "save_base": self.save_base,
            # Without this, transformers makes a fast tokenizer of the files of a slow one.
            "transformers_tokenizer_kwargs": {} if self.tokenizer.is_fast else {"use_fast": False},
            "derived_state": injection.derived_state(self.model) if methods.is_derived_from_base(config) else {},
            # Versions that do not know it refuse it, and read all other files.
            **({"after_final_norm": True} if self.after_final_norm else {}),
            **({"stored_base": _WithoutWeights(self.name)} if self.is_placed else {}),
        }
        _described_by[params["tokenizer_data"]] = weakref.ref(self)
        return params

    def proof_params(self, index: int, stored: StoredBase) -> dict[str, Any]:
        """Return what a load needs to find the base and to prove itself, to be stored with the parameters.

        Args:
            index: number of the embeddings in the file.
            stored: how the file stores their base.

        Raises:
            AdapterConfigError: the base is quantised by what files cannot say, or the file is to hold all weights.
        """
        quantisation.check_storable(self.base_model, self.name)
        if self.is_placed and not stored.is_needed:
            raise _without_weights(self.name)
        untrained = vector_probe.reachable(self, vector_probe.never_left(self.model, self._start))
        return {
            "part": index,
            "stored_base": stored.to_dict(),
            "probe": vector_probe.take_probe(self),
            "untrained": untrained,
            "trained_base": sorted(set(self._trained_base())),
        }

    def _trained_base(self) -> Iterator[str]:
        """Yield the names of the base's own weights that are trained: a user may have unfrozen some."""
        for name in injection.trainable_parameters(self.model):
            if keys.base_key(name) is not None:
                yield name

    def compare_with_base(self, trained: Set[str] | None = None, *, is_tied: bool = True) -> StoredBase:
        """Return which of the weights are the base's own, bit by bit, and need not be stored.

        They are compared with the base as its source has it. Where that is gone, everything has to be stored.

        Args:
            trained: names of those to be stored in any case; None means all that require a gradient.
            is_tied: tensors in one storage will be so after loading, too.
        """
        if self._placed_start is not None and self._record is not None:
            record = resolve.source_of_quantised(self._record, self.base_model, cache_dir=self._cache_dir)
            return self._placed_start.compare(self.model, record)
        found = None
        if self._record is not None:
            found = resolve.reference(self._record, self.base_model, dtype=self.base_dtype, cache_dir=self._cache_dir)
        if found is None:
            log.warning(
                "The base model '%s' is not found any more, as it was: the file will hold all its weights.",
                self.base_model_name,
            )
            return StoredBase(self._record)
        if trained is None:
            named = self.model.named_parameters(remove_duplicate=False)
            trained = {name for name, parameter in named if parameter.requires_grad}
        return learned.compare(self.model.state_dict(), trained, found, is_tied=is_tied)

    def find_base_(self) -> bool:
        """Take note of the base model that these weights may come from, if there is one of their shape.

        Weights in files of stock Flair come without a word on their base but its name. Whether they are that base's
        own, :meth:`compare_with_base` tells.
        """
        record = self._record or resolve.candidate(self.base_model_name, self.base_model, dtype=self.base_dtype)
        self._record = record
        return record is not None

    def expect_whole(self) -> None:
        """Let the next state dict hold every weight again."""
        self._left_out = frozenset()

    def without_frozen_weights(self) -> StoredBase:
        """Return what a file would leave out if all that is frozen were the base's own; the base is not read."""
        if self._placed_start is not None and self._record is not None:
            return self._placed_start.compare(self.model, self._record)
        frozen_names = {name for name, parameter in self.model.named_parameters() if not parameter.requires_grad}
        return StoredBase(self._record or BaseRecord(self.base_model_name), frozenset(frozen_names))

    def expect_without(self, stored: StoredBase) -> None:
        """Let the next state dict be without what the file leaves out; that is the base's own here, too.

        Weights that were the base's own when the file was written and were changed since get their values back.
        """
        self._left_out = frozenset(map(keys.canonical_key, stored.left_out))
        found = None
        if stored.record is not None and stored.is_needed and not self.is_placed:
            found = resolve.reference(stored.record, self.base_model, dtype=self.base_dtype, cache_dir=self._cache_dir)
        if found is not None:
            learned.restore_(self.model, stored.left_out, found)

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> Self:
        """Return embeddings of the stored shape; a state dict must fill them before they can embed.

        ``params`` is not modified. Parameters of the stock classes are read too, if they hold a PEFT config.

        Raises:
            FormatVersionError: the parameters were written by a newer version.
            ModelFileError: the architecture is not one that transformers knows.
        """
        params = dict(params)
        stock_format = params.pop("flair_peft_format", FORMAT_VERSION)
        check_format_version(params.pop("format_version", stock_format))
        lacking = {name for name in ("peft_config", "config_state_dict") if params.get(name) is None}
        if lacking:
            raise ModelFileError(
                f"Cannot rebuild the embeddings of '{params.get('model')}': their parameters lack "
                f"{name_some(lacking)}. They are damaged or were not written by flair_peft. Save the model again."
            )
        bounds = memory_check.bounds()
        if bounds is not None:
            bounds.check_settings(params["peft_config"])
        params["peft_config"] = configs.decode_config(params["peft_config"])
        # PEFT warns of another path; whether the base is the right one is checked by its weights.
        params["peft_config"].base_model_name_or_path = None
        params["use_context"] = params.pop("context_length", 0)
        for derived in ("truncate", "stride", "embedding_length", "use_lang_emb"):
            params.pop(derived, None)
        _refuse_unknown(cls, params)
        params["peft_gradient_checkpointing_kwargs"] = quantisation.stored_preparation(
            params.get("peft_gradient_checkpointing_kwargs")
        )
        shape = dict(params.pop("config_state_dict"))
        transformer.refuse_many(shape, str(params.get("model")))
        shape.pop("auto_map", None)  # names code
        shape.pop("quantization_config", None)  # it is read from what the file says of its base
        shape.pop("_attn_implementation", None)
        stored = StoredBase.from_dict(params.get("stored_base"))
        config_class = resolve.config_class(str(shape.get("model_type")), stored.record)
        # from_dict reads the attention implementation from its keyword arguments only.
        named = shape.pop("attn_implementation", None)
        saved_config = config_versions.from_stored(
            shape, config_class, attention=named, source=str(params.get("model"))
        )
        transformer.tame_(saved_config)
        pending_state, probe = params.pop("derived_state", {}), params.pop("probe", None)
        untrained, index = params.pop("untrained", []), params.pop("part", None)
        trained = params.pop("trained_base", [])
        if type(index) not in (int, NoneType):
            raise ModelFileError(
                f"Cannot rebuild the embeddings of '{params.get('model')}': their number in the file is {index!r:.80}. "
                "They are damaged or were not written by flair_peft. Save the model again."
            )
        embeddings = cls.create_from_state(saved_config=saved_config, **params)
        embeddings._pending_state, embeddings._pending_probe = pending_state, probe
        embeddings._pending_untrained, embeddings._pending_trained = untrained, trained
        embeddings.origin = None if index is None else (index, stored)
        return embeddings

    def _take_over(self, params: Mapping[str, Any]) -> None:
        """Let the next state dict be that of a file, for embeddings that code around them made anew.

        Args:
            params: of the embeddings that the file holds, as :meth:`to_params` wrote them.

        Raises:
            BaseMismatchError: the base is not the one that these were trained on.
            ModelFileError: the parameters are damaged.
        """
        check_format_version(params.get("format_version", FORMAT_VERSION))
        stored, dtype = StoredBase.from_dict(params.get("stored_base")), params.get("dtype")
        if stored.record is not None and stored.is_needed and self._record is not None:
            resolve.check_made(self._record, self.base_model, stored.record, cache_dir=self._cache_dir, name=self.name)
        self._left_out, self._awaits_weights = frozenset(map(keys.canonical_key, stored.left_out)), True
        if dtype is not None and not self.is_placed and dtypes.parse_dtype(dtype) != self.base_dtype:
            self._convert_base_(dtypes.parse_dtype(dtype))
        if stored.added_rows is not None:
            self._set_added_rows_(stored.added_rows)
        if params.get("derived_state"):
            injection.set_derived_state_(self.model, params["derived_state"])
        self._start, self._pending_probe = {}, params.get("probe")
        self._pending_untrained, self._pending_trained = params.get("untrained", []), params.get("trained_base", [])
        self.origin = (params["part"], stored)

    def _convert_base_(self, dtype: torch.dtype) -> None:
        """Convert the base to a dtype, in place, as transformers reads it in that."""
        kept = transformer.names_kept_in_fp32(self.base_model, dtype)
        for name, parameter in self.base_model.named_parameters():
            if parameter.is_floating_point() and name not in kept:
                parameter.data = parameter.data.to(dtype)

    def _set_added_rows_(self, rows: torch.Tensor) -> None:
        matrix = self.base_model.get_input_embeddings().weight
        if len(rows) <= len(matrix) and not are_same_bits(matrix[-len(rows) :], rows.to(matrix.dtype)):
            matrix.data[-len(rows) :] = rows

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self.in_use():
            return self._copy(memo)

    @abstractmethod
    def in_use(self) -> AbstractContextManager[None]:
        """Inside, the adapter is in memory."""

    def _copy(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        if isinstance(self.model, PeftModel) and methods.keeps_graph(self.adapter_config):
            clone.__setstate__(self.__getstate__())
            return clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        if isinstance(clone.model, PeftModel):
            injection.repair_(clone.model)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        if self.is_placed:
            raise _without_weights(self.name)
        return {
            _STATE_KEY: self.to_params(),
            "state_dict": {name: mapped_memory.lent(tensor) for name, tensor in self.state_dict().items()},
            "output_dtype": self.output_dtype,
            "training": self.training,
            "base": StoredBase(self._record).to_dict(),
            "start": dict(self._start),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        if _STATE_KEY not in state:
            super().__setstate__(state)
            return
        loaded = self.from_params(state[_STATE_KEY])
        loaded.load_state_dict(state["state_dict"])
        loaded.output_dtype = state["output_dtype"]
        # Files of 0.1.0 hold neither of these.
        loaded._record = StoredBase.from_dict(state.get("base")).record
        loaded._start = dict(state.get("start", {}))
        loaded.train(state["training"])
        self.__dict__.update(loaded.__dict__)


# What files may say beside the arguments of the constructor, and which of these only a user may give.
_STORED_BESIDE = frozenset({"config_state_dict", "derived_state", "probe", "untrained", "part", "trained_base"})
_ONLY_FROM_USERS = frozenset({"transformers_config_kwargs", "transformers_model_kwargs", "saved_config", "tokenizer"})


def _refuse_unknown(cls: type[Storable], params: Mapping[str, Any]) -> None:
    """Return if stored parameters are those that embeddings have: others would reach transformers as they are."""
    constructors = [vars(base)["__init__"] for base in cls.__mro__[:-1] if "__init__" in vars(base)]
    known = {name for constructor in constructors for name in inspect.signature(constructor).parameters}
    unknown = set(params) - (known - _ONLY_FROM_USERS - {"self", "args", "kwargs"}) - _STORED_BESIDE
    if unknown:
        raise ModelFileError(
            f"Cannot rebuild the embeddings of '{params.get('model')}': their parameters hold {name_some(unknown)}, "
            "which no embeddings have. They are damaged or were not written by Flair or flair_peft. Save the model "
            "again."
        )
