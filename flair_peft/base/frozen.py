"""The frozen transformer as its source has it, held by storage by all models of a process that stand on it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import PretrainedConfig, PreTrainedModel

from flair_peft.adapter import injection, keys
from flair_peft.base import added_rows, memory_check, module_copy, quantisation, transformer
from flair_peft.errors import AdapterConfigError, BaseMismatchError, name_some
from flair_peft.primitives import fingerprint, host_internals, mapped_memory
from flair_peft.primitives.base_record import BaseRecord
from flair_peft.primitives.dtypes import DtypeLike, dtype_name, parse_dtype

# Weak: a base lives as long as a model that stands on it.
_cache: weakref.WeakValueDictionary[tuple[Any, ...], FrozenBase] = weakref.WeakValueDictionary()
_lock = injection.building

# State of a source and sample of its weights → digests of all its weights, and of those that are read.
_full_fingerprints: dict[tuple[Any, str], tuple[str, str]] = {}

# What a config says of its origin, which does not change the model.
_NO_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})

# What says how the weights are quantised, and where they go.
_QUANTISING = frozenset({"load_in_4bit", "load_in_8bit", "quantization_config"})
PLACING = _QUANTISING | {"device_map", "max_memory", "offload_folder"}

# How the source is reached, which does not change what is in it.
_ACCESS = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "token"})

_PLAIN = (str, int, float, bool, type(None))


class FrozenBase:
    """A base model whose weights nobody changes. Its copies are models of their own that hold the same memory.

    Memory is copied on write, so that no copy sees what is written to another, whoever writes and however: by the
    system, page by page, where a copy maps the weights from their file; else by torch, tensor by tensor.

    Attributes:
        record: what files say of it.
        random_names: weights that the source lacks, and that are random therefore: other copies of it have others.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: BaseRecord,
        random_names: frozenset[str],
        *,
        key: tuple[Any, ...] | None = None,
        parent: FrozenBase | None = None,
    ) -> None:
        self._model, self.record, self.random_names = model, record, random_names
        self._key, self._parent = key, parent
        self._places = {_place(parameter) for parameter in model.parameters()}
        self._held: dict[tuple[int, int], torch.Tensor] = {}
        self._is_in_memory = False
        self._variants: dict[str, FrozenBase] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenBase:
        return self

    @property
    def config(self) -> PretrainedConfig:
        """The config of the model."""
        return self._model.config

    @property
    def fingerprint(self) -> str:
        """Digest of a sample of the weights that the source has."""
        return self._sampled_fingerprints[0]

    @property
    def read_fingerprint(self) -> str:
        """The same without weights that nobody reads: transformers writes random poolers into copies of a base."""
        return self._sampled_fingerprints[1]

    @functools.cached_property
    def _sampled_fingerprints(self) -> tuple[str, str]:
        if self._parent is not None:
            return self._parent._sampled_fingerprints
        return fingerprint.sampled_and_part(self.own_weights(), self._names_read())

    @property
    def full_fingerprint(self) -> str:
        """Digest of all weights that the source has; read once for each state of the source and dtype."""
        return self._full_fingerprints[0]

    @property
    def read_full_fingerprint(self) -> str:
        """The same without weights that nobody reads."""
        return self._full_fingerprints[1]

    @functools.cached_property
    def _full_fingerprints(self) -> tuple[str, str]:
        if self._parent is not None:
            return self._parent._full_fingerprints
        key = (_state_of_source(self.record), self.fingerprint)
        found = _full_fingerprints.get(key) or fingerprint.full_and_part(self.own_weights(), self._names_read())
        if key[0] is not None:
            _full_fingerprints[key] = found
        return found

    def _names_read(self) -> frozenset[str]:
        return frozenset(name for name in self.own_weights() if not keys.is_unread(name))

    def is_as(self, record: BaseRecord) -> bool:
        """Whether the weights that are read are those of a record, by a sample, or it says nothing of them.

        One of the two may lack weights that the other has, and that nobody reads.
        """
        digests = (record.fingerprint, record.read_fingerprint)
        return record.fingerprint in (None, self.fingerprint) or self.read_fingerprint in digests

    def is_fully_as(self, record: BaseRecord) -> bool:
        """Whether all weights that are read are those of a record."""
        digests = (record.full_fingerprint, record.read_full_fingerprint)
        return record.full_fingerprint == self.full_fingerprint or self.read_full_fingerprint in digests

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record with all that shows from the base itself."""
        if self._parent is not None:
            return self._parent.known_record
        return dataclasses.replace(
            self.record,
            fingerprint=self.fingerprint,
            read_fingerprint=self.read_fingerprint,
            vocabulary_size=self.own_rows,
            dtype=str(self._model.get_input_embeddings().weight.dtype).removeprefix("torch."),
            attention=str(self.config._attn_implementation),
            quantization=quantisation.settings_of(self.config),
        )

    @property
    def expected_record(self) -> BaseRecord:
        """The record of a base that was found for a file: with the fingerprint if it was compared with that."""
        if self._parent is not None:
            return self._parent.expected_record
        is_known = "_sampled_fingerprints" in vars(self)
        return self.known_record if is_known else dataclasses.replace(self.record, fingerprint=None)

    @property
    def root(self) -> FrozenBase:
        """The base as its source has it, without rows added and with the attention of its config."""
        return self if self._parent is None else self._parent.root

    @property
    def own_rows(self) -> int:
        """Rows of the input embeddings."""
        return len(self._model.get_input_embeddings().weight)

    @property
    def is_placed(self) -> bool:
        """Whether the weights may not be moved; see :func:`is_placed`."""
        return is_placed(self._model)

    def own_weights(self) -> Mapping[str, torch.Tensor]:
        """Return name → tensor of all weights that the source has; they must not be written to."""
        return {name: t for name, t in self._model.state_dict().items() if name not in self.random_names}

    def names_of_parameters(self) -> frozenset[str]:
        """Return the names of all weights but buffers, which a model computes when it is made."""
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def names_of_input_embeddings(self) -> frozenset[str]:
        """Return the names under which state dicts hold the input embeddings: several where weights are tied."""
        matrix = self._model.get_input_embeddings().weight
        parameters = self._model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in parameters if parameter is matrix)

    def copy(self) -> PreTrainedModel:
        """Return a model with parameters and buffers of its own; the parameters take memory where they are written to.

        A base that is quantised or spread over devices is not shared: it is returned itself.
        """
        if is_placed(self._model):
            return self._model
        parameters = list(self._model.parameters())
        return self._around(dict(zip(map(id, parameters), self._lend(parameters), strict=True)))

    def _around(self, tensors: Mapping[int, torch.Tensor]) -> PreTrainedModel:
        """Return the model with parameters of its own around tensors, by the identity of the base's parameters."""
        memo: dict[int, Any] = {}
        for parameter in self._model.parameters():
            tensor = tensors.get(id(parameter), parameter.data)
            memo[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return module_copy.copy_modules(self._model, memo)

    def _lend(self, parameters: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return what has the values of the base's parameters and can be written to."""
        tensors = [parameter.detach() for parameter in parameters]
        with _lock, torch.inference_mode(False):
            mapped = [None] * len(tensors) if self.root._is_in_memory else mapped_memory.map_again(tensors)
            return [self._clone(t) if other is None else other for t, other in zip(tensors, mapped, strict=True)]

    def _clone(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a clone of one of the base's tensors that has memory of its own from the first write on."""
        place = _place(tensor)
        if self._parent is not None and place in self._parent._places:
            return self._parent._clone(tensor)
        held = self._held.get(place, tensor)
        lazy = _copied_on_write(held)
        if lazy is None and held is tensor:
            held = tensor.clone()  # mapped memory is nothing that torch copies on write
            mapped_memory.page_out(tensor)
            lazy = _copied_on_write(held)
        self._held[place] = held
        return held.clone() if lazy is None else lazy

    def hold_in_memory(self) -> None:
        """From now on copies hold one set of weights in memory, instead of mapping the file each for itself.

        The system counts mapped pages for each mapping, as if each took memory.
        """
        self.root._is_in_memory = True

    def private_copy(self) -> PreTrainedModel:
        """Return a model with storage of its own."""
        return copy.deepcopy(self._model)

    def variant(self, config: PretrainedConfig) -> FrozenBase:
        """Return the base with the same storage for a model of this config, whose attention may be another.

        Raises:
            BaseMismatchError: the config differs in more than the attention and the size of the vocabulary.
        """
        own, other = _described(self.config), _described(config)
        named = sorted(name for name in {*own, *other} - {"vocab_size"} if own.get(name) != other.get(name))
        if named:
            raise BaseMismatchError(
                f"Cannot put the model on the shared base '{self.record.name}': its config has another "
                f"{name_some(named)}. It would compute something else than in its training. Load it on its own, or "
                "make a SharedBase with these settings."
            )
        attention = config._attn_implementation
        if attention in (None, self.config._attn_implementation):
            return self
        with _lock, torch.inference_mode(False):
            if attention not in self._variants:
                self._variants[attention] = self._with_attention(attention)
            return self._variants[attention]

    def _with_attention(self, attention: str) -> FrozenBase:
        """Return a base of the same storage; models choose the classes of their attention when they are built."""
        if self.record.needs_remote_code:
            raise BaseMismatchError(
                f"Cannot put the model on the shared base '{self.record.name}': it was trained with {attention} "
                "attention, and a base with code of its own is not built anew for that. Load the model on its own, or "
                "make a SharedBase with that attn_implementation."
            )
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        model = transformer.build_model(config, dtype=self._model.dtype, model_kwargs={})
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = own[name].data if isinstance(tensor, torch.nn.Parameter) else own[name].clone()
        model.name_or_path = self._model.name_or_path
        key = (*(self._key or (id(self),)), attention)
        return FrozenBase(model, self.record, self.random_names, key=key, parent=self)

    def read_for(self, expected: BaseRecord) -> FrozenBase:
        """Return this base, or its source read anew if a file expects it in another dtype.

        Raises:
            BaseModelNotFoundError: the source is gone.
        """
        record = self.known_record
        if expected.dtype in (None, record.dtype):
            return self
        kwargs = {} if Path(record.name).is_dir() else {"local_files_only": True}
        record = dataclasses.replace(
            record, fingerprint=expected.fingerprint, read_fingerprint=expected.read_fingerprint
        )
        return read_again(record, self.config, dtype=parse_dtype(str(expected.dtype)), kwargs=kwargs)

    def share_(self, parameters: Mapping[str, torch.nn.Parameter]) -> int:
        """Let each frozen weight that is this base's, bit by bit, have its memory, in place; return their bytes.

        Args:
            parameters: name in the base model → parameter.
        """
        own = dict(self._model.named_parameters(remove_duplicate=False))
        frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        same = [name for name in frozen if name in own and fingerprint.are_same_bits(frozen[name], own[name])]
        for name, tensor in zip(same, self._lend([own[name] for name in same]), strict=True):
            frozen[name].data = tensor
        return sum(frozen[name].nbytes for name in same)

    def reaching(self, token_id: int) -> FrozenBase:
        """Return this base with a row for the token: a vocabulary padded beyond its tokenizer has one already."""
        lacking = token_id + 1 - self.own_rows
        return self.with_rows(lacking) if lacking > 0 else self

    def with_rows(self, new: torch.Tensor | int) -> FrozenBase:
        """Return this base with rows appended to its input embeddings: those given, or so many mean rows."""
        if self._model.get_input_embeddings().weight.is_meta:
            raise AdapterConfigError(
                f"Cannot add a row to the input embeddings of '{self.record.name}': they are offloaded, and Flair's "
                "context separator needs one. Keep the embeddings on a device in device_map, or pass "
                "use_context_separator=False."
            )
        with _lock, torch.inference_mode(False):
            if isinstance(new, int):
                new = self._mean_row.repeat(new, 1)
            key = None if self._key is None else (*self._key, fingerprint.of_tensor(new))
            found = _cache.get(key) if key is not None else None
            return found or _remember(self._extended(new, key))

    @functools.cached_property
    def _mean_row(self) -> torch.Tensor:
        return added_rows.mean_rows(self._model.get_input_embeddings().weight, 1)

    def _extended(self, new: torch.Tensor, key: tuple[Any, ...] | None) -> FrozenBase:
        if is_placed(self._model):
            _ = self.known_record  # as it is without the rows: a base that cannot be shared gets them itself
        longer = self._model if is_placed(self._model) else self._around({})
        added_rows.append_rows_(longer, new, _folder(self.record))
        return FrozenBase(longer, self.record, self.random_names, key=key, parent=self)

    def holds(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether the memory of all these is that of all copies of this base: nobody has written to one of them."""
        held = {mapped_memory.address(tensor) for tensor in self._all_held()}
        return all(mapped_memory.address(tensor) in held for tensor in tensors)

    def _all_held(self) -> Iterator[torch.Tensor]:
        yield from self._held.values()
        if self._parent is not None:
            yield from self._parent._all_held()


class _Placed(FrozenBase):
    """A base that is quantised when it is read, or spread over devices. What proves it is its source.

    Devices quantise in different ways, and weights that are offloaded are not there to be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: BaseRecord,
        random_names: frozenset[str],
        *,
        source: Callable[[], FrozenBase],
    ) -> None:
        super().__init__(model, record, random_names)
        self._source = source

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record of the source, with the settings by which it is quantised."""
        attention, settings = str(self.config._attn_implementation), quantisation.settings_of(self.config)
        record = dataclasses.replace(self._source().known_record, attention=attention, quantization=settings)
        mapped_memory.give_back_freed()
        return record

    @functools.cached_property
    def _sampled_fingerprints(self) -> tuple[str, str]:
        return str(self.known_record.fingerprint), str(self.known_record.read_fingerprint)

    @functools.cached_property
    def _full_fingerprints(self) -> tuple[str, str]:
        return self._source()._full_fingerprints


class _Converted(FrozenBase):
    """A source in its own dtype, mapped from its files, whose weights are converted one by one when they are read."""

    def __init__(self, source: FrozenBase, dtype: torch.dtype) -> None:
        super().__init__(source._model, source.record, source.random_names)
        self._dtype = dtype

    def own_weights(self) -> Mapping[str, torch.Tensor]:
        """Return name → tensor of all weights that the source has, as a load in the dtype gives them."""
        kept = transformer.names_kept_in_fp32(self._model, self._dtype)
        return _Conversion(super().own_weights(), self._dtype, kept)

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record of the base as a load in the dtype has it."""
        return dataclasses.replace(super().known_record, dtype=dtype_name(self._dtype))


class _Conversion(Mapping[str, torch.Tensor]):
    """Weights in another dtype; nothing holds a tensor that was converted."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, kept: frozenset[str]) -> None:
        self._weights, self._dtype, self._kept = weights, dtype, kept

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        wanted = torch.float32 if name in self._kept else self._dtype
        if tensor.dtype == wanted or not tensor.is_floating_point():
            return tensor
        converted = tensor.to(wanted)
        mapped_memory.let_go(tensor)
        return converted

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def read_again(
    record: BaseRecord, config: PretrainedConfig, *, dtype: torch.dtype, kwargs: Mapping[str, Any]
) -> FrozenBase:
    """Return the source of a base, to be compared with once: its weights need no room, whatever their dtype.

    Args:
        record: of the base; by its fingerprint the weights are known to be what a load in the dtype gives.
        config: of the model.
        dtype: of the base.
        kwargs: for ``AutoModel.from_pretrained``.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    if record.fingerprint is not None:
        mapped = _Converted(find_source(record, config, kwargs), dtype)
        if mapped.is_as(record):
            return mapped
    # The class may choose dtypes of its own, or the files hold several.
    return find_again(record, config, dtype=dtype, kwargs=kwargs)


def find_source(record: BaseRecord, config: PretrainedConfig, kwargs: Mapping[str, Any]) -> FrozenBase:
    """Return the source of a base that is quantised when it is read or spread over devices, as it is before that.

    Args:
        record: of the base.
        config: of the model, quantised or not.
        kwargs: for ``AutoModel.from_pretrained``.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    plain.dtype = None  # that of the trained model: "auto" reads it before it looks into the files
    kept = {name: value for name, value in kwargs.items() if name not in PLACING}
    return find_again(record, plain, dtype="auto", kwargs=kept)


def find(
    record: BaseRecord,
    config: PretrainedConfig,
    *,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
    is_held: bool = False,
) -> FrozenBase:
    """Return the base model, and the very same one as long as it is alive and nothing of its source has changed.

    Args:
        record: its name and revision.
        config: shape and settings.
        dtype: as for :func:`flair_peft.base.transformer.find_model`.
        kwargs: for ``AutoModel.from_pretrained``.
        device: where its weights go, unless quantisation or a device map places them.
        is_held: whether a model will stand on it, so that it must fit into the memory of the device; what is only
            compared is mapped from its files.

    Raises:
        BaseModelNotFoundError: there is none.
        InsufficientMemoryError: it does not fit.
    """
    with _lock:
        bounds = memory_check.bounds()
        if bounds is not None:
            bounds.know_base(record.name, _arguments(record, kwargs))
        key = _identity(record, config, dtype, kwargs, device)
        found = _cache.get(key) if key is not None else None
        if found is None:
            if is_held:
                memory_check.check_fits(
                    record.name, config, dtype=dtype, kwargs=_arguments(record, kwargs), device=device
                )
            found = _load(record, config, dtype=dtype, kwargs=kwargs, device=device)
            if is_placed(found._model):
                return found  # which is not copied, so that nobody else may have it
            # Asked for by name, the attention implementation that was chosen gives the same model, which may be alive.
            own = None if key is None else _identity(record, found.config, dtype, kwargs, device)
            known = None if own is None else _cache.get(own)
            if known is None:
                found._key = own
                _remember(found)
            found = known or found
            if key is not None:
                _cache[key] = found
        return found


def find_again(
    record: BaseRecord,
    config: PretrainedConfig,
    *,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str = "cpu",
    is_held: bool = False,
) -> FrozenBase:
    """Return the base model that a checkpoint was trained on, as its source has it.

    Args:
        record: what the checkpoint says of it.
        config: that of the trained model, whose vocabulary may be larger than the source's.
        dtype: of the trained model's base.
        kwargs: as for :func:`find`.
        device: as for :func:`find`.
        is_held: as for :func:`find`.

    Raises:
        BaseModelNotFoundError: there is none, or none of this shape.
        InsufficientMemoryError: it does not fit.
    """
    size = record.vocabulary_size
    if size is None:
        size = transformer.text_config(transformer.find_config(record.name, kwargs)).vocab_size
    shape = copy.deepcopy(config)
    transformer.text_config(shape).vocab_size = size
    shape.output_hidden_states = True
    return find(record, shape, dtype=dtype, kwargs=kwargs, device=device, is_held=is_held)


def _load(
    record: BaseRecord,
    config: PretrainedConfig,
    *,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str,
) -> FrozenBase:
    arguments = _arguments(record, kwargs)
    is_quantised_before = hasattr(config, "quantization_config")
    if is_quantised_before or not _QUANTISING.isdisjoint(kwargs):
        arguments.setdefault("device_map", {"": str(device)})
    model, random_names = transformer.find_model(record.name, copy.deepcopy(config), dtype=dtype, kwargs=arguments)
    if is_placed(model):
        mapped_memory.give_back_freed()
    if is_placed(model) and not is_quantised_before:
        return _Placed(model, record, random_names, source=functools.partial(find_source, record, config, kwargs))
    base = FrozenBase(model, record, random_names)
    if torch.device(device).type == "cpu" or is_placed(model):
        return base
    digests = base._sampled_fingerprints  # of the mapped file, before its weights go elsewhere
    base = FrozenBase(model.to(device), record, random_names)
    base._sampled_fingerprints = digests
    return base


def _arguments(record: BaseRecord, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    revision = {} if record.revision is None else {"revision": record.revision}
    return {**revision, **record.arguments, **kwargs}


def is_placed(model: torch.nn.Module) -> bool:
    """Whether quantisation or a device map says where the weights are, so that nobody may move them."""
    return bool(getattr(model, "quantization_method", None)) or is_dispatched(model)


def is_dispatched(model: torch.nn.Module) -> bool:
    """Whether accelerate spread the weights over devices, or to the disk."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places


def _remember(base: FrozenBase) -> FrozenBase:
    if base._key is not None:
        _cache[base._key] = base
    return base


def _identity(
    record: BaseRecord,
    config: PretrainedConfig,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str,
) -> tuple[Any, ...] | None:
    """Return what two loads must have in common to share storage, or ``None`` if that cannot be told."""
    source = _state_of_source(record)
    if (
        source is None
        or not PLACING.isdisjoint(kwargs)
        or not all(isinstance(value, _PLAIN) for value in kwargs.values())
    ):
        return None
    named = {name: value for name, value in {**record.arguments, **kwargs}.items() if name not in _ACCESS}
    settings = tuple(sorted((name, repr(value)) for name, value in named.items()))
    described = _described(config)
    # The attention implementation is not part of the config's dictionary.
    shape = (type(config).__name__, json.dumps(described, sort_keys=True, default=str), config._attn_implementation)
    return (source, shape, str(torch.get_default_dtype() if dtype is None else dtype), str(device), settings)


def _described(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a model: not where it comes from, nor its attention, which no dictionary holds."""
    return {name: value for name, value in config.to_dict().items() if name not in _NO_SETTINGS}


def _state_of_source(record: BaseRecord) -> tuple[Any, ...] | None:
    if Path(record.name).is_dir():
        folder = Path(record.name, record.arguments.get("subfolder", ""))
        stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
        return (str(folder.resolve()), *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    return None if record.revision is None else (record.name, record.revision)


def _folder(record: BaseRecord) -> Path | None:
    """Return the directory that holds the weights, if it is on this machine."""
    if Path(record.name).is_dir():
        return Path(record.name, record.arguments.get("subfolder", ""))
    if record.revision is None:
        return None
    found = try_to_load_from_cache(record.name, "config.json", revision=record.revision)
    return Path(found).parent if isinstance(found, str) else None


def _copied_on_write(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a clone that torch gives memory of its own when one of the two is written to, if it can do that."""
    if tensor.device.type not in ("cpu", "cuda"):
        return None  # elsewhere torch does not promise that every write is seen (pytorch#150569)
    try:
        return host_internals.lazy_clone(tensor)
    except RuntimeError:
        return None


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what tells a base's tensors apart as long as it lives: the memory of a storage can move."""
    return host_internals.storage_identity(tensor), int(tensor.storage_offset())
