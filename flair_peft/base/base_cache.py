"""The cache of bases: models that ask for the same source, dtype and device stand on the same base while one lives."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig

from flair_peft.base import memory_check, transformer, weight_files
from flair_peft.base.frozen_base import FrozenBase, PlacedBase, described, state_of_source
from flair_peft.base.other_dtype import ConvertedBase
from flair_peft.base.placement import PLACING, QUANTISING, is_placed
from flair_peft.primitives import building, mapped_memory
from flair_peft.primitives.base_record import BaseRecord
from flair_peft.primitives.dtypes import DtypeLike, parse_dtype
from flair_peft.primitives.mapped_memory import FilePages

# Weak: a base lives as long as a model that stands on it.
_cache: weakref.WeakValueDictionary[tuple[Any, ...], FrozenBase] = weakref.WeakValueDictionary()

# How the source is reached, which does not change what is in it.
_ACCESS = frozenset({"cache_dir", "force_download", "local_files_only", "proxies", "token"})

_PLAIN = (str, int, float, bool, type(None))


def read_again(
    record: BaseRecord, config: PretrainedConfig, *, dtype: torch.dtype, kwargs: Mapping[str, Any]
) -> FrozenBase:
    """Return the source of a base, to be compared with once: its weights need no room, whatever their dtype.

    By the fingerprint in its record they are known to be what a load in that dtype gives.

    Raises:
        BaseModelNotFoundError: there is none.
    """
    if record.fingerprint is not None:
        mapped = ConvertedBase(find_source(record, config, kwargs), dtype)
        if mapped.is_as(record):
            return mapped
    # The class may choose dtypes of its own, or the files hold several.
    return find_again(record, config, dtype=dtype, kwargs=kwargs)


def read_for(base: FrozenBase, expected: BaseRecord) -> FrozenBase:
    """Return a base, or its source read anew if a file expects it in another dtype.

    Raises:
        BaseModelNotFoundError: the source is gone.
    """
    record = base.known_record
    if expected.dtype in (None, record.dtype):
        return base
    kwargs = {} if Path(record.name).is_dir() else {"local_files_only": True}
    record = dataclasses.replace(record, fingerprint=expected.fingerprint, read_fingerprint=expected.read_fingerprint)
    return read_again(record, base.config, dtype=parse_dtype(str(expected.dtype)), kwargs=kwargs)


def find_source(record: BaseRecord, config: PretrainedConfig, kwargs: Mapping[str, Any]) -> FrozenBase:
    """Return the source of a base, as it is before it is quantised, spread over devices or converted.

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
    with building.lock:
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
            chosen = None if key is None else _identity(record, found.config, dtype, kwargs, device)
            found = found if chosen is None else _cache.setdefault(chosen, found)
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
    """Return the base model that a checkpoint was trained on, as its source has it; see :func:`find`.

    The vocabulary of the trained model, whose config this is, may be larger than the source's.

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


def is_as_its_source(base: FrozenBase, kwargs: Mapping[str, Any], pages: FilePages) -> bool:
    """Whether a base that is alive is what its source holds now: its files are as they were, and so is its memory.

    Only where the system proves the latter, as it does for weights that are mapped from the files.
    """
    with building.lock:
        states = [key[0] for key, found in _cache.items() if found is base]
    if state_of_source(base.record) not in states:
        return False
    files: list[Path] = []
    with contextlib.suppress(Exception):  # what cannot be found is read again, which says why
        files = weight_files.find(base.record.name, _arguments(base.record, kwargs))
    return pages.show(base.own_weights().values(), files)


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
    if is_quantised_before or not QUANTISING.isdisjoint(kwargs):
        arguments.setdefault("device_map", {"": str(device)})
    model, random_names = transformer.find_model(record.name, copy.deepcopy(config), dtype=dtype, kwargs=arguments)
    if is_placed(model):
        mapped_memory.give_back_freed()
    if is_placed(model) and not is_quantised_before:
        return PlacedBase(model, record, random_names, source=functools.partial(find_source, record, config, kwargs))
    base = FrozenBase(model, record, random_names)
    if torch.device(device).type == "cpu" or is_placed(model):
        return base
    digests = base.sampled_digests  # of the mapped file, before its weights go elsewhere
    base = FrozenBase(model.to(device), record, random_names)
    base.sampled_digests = digests
    return base


def _arguments(record: BaseRecord, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    revision = {} if record.revision is None else {"revision": record.revision}
    return {**revision, **record.arguments, **kwargs}


def _identity(
    record: BaseRecord,
    config: PretrainedConfig,
    dtype: DtypeLike | None,
    kwargs: Mapping[str, Any],
    device: torch.device | str,
) -> tuple[Any, ...] | None:
    """Return what two loads must have in common to share storage, or ``None`` if that cannot be told."""
    source = state_of_source(record)
    if (
        source is None
        or not PLACING.isdisjoint(kwargs)
        or not all(isinstance(value, _PLAIN) for value in kwargs.values())
    ):
        return None
    named = {name: value for name, value in {**record.arguments, **kwargs}.items() if name not in _ACCESS}
    settings = tuple(sorted((name, repr(value)) for name, value in named.items()))
    # The attention implementation is not part of the config's dictionary.
    shape = (type(config).__name__, json.dumps(described(config), sort_keys=True, default=str))
    wanted = (config._attn_implementation, str(torch.get_default_dtype() if dtype is None else dtype), str(device))
    return (source, *shape, *wanted, settings)
