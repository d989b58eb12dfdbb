"""Finds the base model of new embeddings, and of stored ones."""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flair
import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flair_peft.base import base_cache, check_base, memory_check, quantisation, transformer
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.base.tokenizers import KnownTokenizers
from flair_peft.errors import BaseMismatchError, BaseModelNotFoundError, ModelFileError
from flair_peft.primitives.base_record import BaseRecord, StoredBase, kept_arguments
from flair_peft.primitives.dtypes import DtypeLike, dtype_name, parse_dtype
from flair_peft.primitives.load_context import load_options
from flair_peft.primitives.mapped_memory import FilePages


@dataclasses.dataclass(frozen=True)
class Offer:
    """A base that is there already, for loads to put their models on if it is theirs.

    Attributes:
        base: as its source has it.
        is_converted: whether the user chose its dtype, so that models of another dtype go on it all the same.
        proven: what files said of their base, of those whose base was compared with the source in another dtype.
        renamed: what files in another dtype said of a base under another name → whether it is this one.
        tokenizers: of the models that were loaded, by the content of their files.
    """

    base: FrozenBase
    is_converted: bool = False
    proven: set[tuple[str | None, ...]] = dataclasses.field(default_factory=set)
    renamed: dict[tuple[str | None, ...], bool] = dataclasses.field(default_factory=dict)
    tokenizers: KnownTokenizers = dataclasses.field(default_factory=dict)

    def is_meant(self, record: BaseRecord) -> bool:
        """Whether a file that says this of its base may mean this one."""
        own = self.base.known_record
        if record.name == own.name and record.revision == own.revision:
            return True
        is_known = record.fingerprint is not None
        if is_known and record.dtype in (None, own.dtype) and self.base.is_as(record):
            return True
        source, revision = load_options().source_of(record)
        if _located(source) == own.name and revision == own.revision:
            return True
        is_other = record.dtype not in (None, own.dtype)
        return is_known and is_other and self.is_converted and self._is_under_another_name(record)

    def _is_under_another_name(self, record: BaseRecord) -> bool:
        """Whether the source of the base, in the dtype that a file says, has the weights that it says."""
        said = (record.dtype, record.fingerprint, record.read_fingerprint)
        if said not in self.renamed:
            try:
                self.renamed[said] = base_cache.read_for(self.base, record).is_as(record)
            except (BaseModelNotFoundError, BaseMismatchError):
                self.renamed[said] = False
        return self.renamed[said]

    def take(self, stored: StoredBase, config: PretrainedConfig, *, dtype: DtypeLike | None, name: str) -> FrozenBase:
        """Return the base for the embeddings of a file; see :func:`find_stored`."""
        record, own = stored.record, self.base.known_record
        assert record is not None
        wanted = record.dtype if dtype in (None, "auto") else dtype_name(parse_dtype(dtype))
        if record.quantization is not None:
            raise BaseMismatchError(
                f"Cannot load '{name}' on the shared base '{own.name}': it was trained on a quantised base, and this "
                "one is not. It would predict something else. Load it on its own."
            )
        if wanted not in (None, own.dtype) and not self.is_converted:
            raise BaseMismatchError(
                f"Cannot load '{name}' on the shared base '{own.name}': it was trained on weights in {wanted}, and "
                f"these are {own.dtype}. It would predict something else. Make the SharedBase with dtype='{wanted}', "
                f"or with dtype='{own.dtype}' if that is what you want."
            )
        said = (record.dtype, record.fingerprint, record.full_fingerprint, str(load_options().verify))
        if said not in self.proven:
            check_base.check_base(base_cache.read_for(self.base, record), record, name=name)
            self.proven.add(said)
        base = self.base if stored.added_rows is None else self.base.with_rows(stored.added_rows)
        return base.variant(config)


def find_new(
    name: str, *, dtype: DtypeLike | None, config_kwargs: Mapping[str, Any], model_kwargs: Mapping[str, Any]
) -> FrozenBase:
    """Return the base model that the user names, by Hub id or directory, on Flair's device.

    Raises:
        BaseModelNotFoundError: there is none, or not with all its weights.
    """
    config = transformer.find_config(name, config_kwargs)
    record = BaseRecord(
        name=_located(name),
        revision=getattr(config, "_commit_hash", None),
        # What a user allows, a base need not have.
        needs_remote_code=bool(model_kwargs.get("trust_remote_code") and getattr(config, "auto_map", None)),
        arguments=kept_arguments(model_kwargs),
    )
    kwargs = {key: value for key, value in model_kwargs.items() if key != "revision" or record.revision is None}
    with memory_check.bounded(name, {}):
        found = base_cache.find(record, config, dtype=dtype, kwargs=kwargs, device=flair.device, is_held=True)
    check_base.check_complete(found, model_kwargs)
    if found.is_placed:
        _ = found.known_record  # before an adapter is added to the very model, or a forward pass casts its biases
    return found


def find_stored(stored: StoredBase, config: PretrainedConfig, *, dtype: DtypeLike | None, name: str) -> FrozenBase:
    """Return the base model that a file needs, with the rows that the file adds to it, on Flair's device.

    Config and dtype are those of the trained model; ``name`` is that of the embeddings, for messages.

    Raises:
        BaseModelNotFoundError: it is neither on this machine nor on the Hub.
        BaseMismatchError: what was found is another model.
        ModelFileError: it needs code of its own, and the user has not said that it may run.
    """
    assert stored.record is not None
    options, record = load_options(), stored.record
    offer: Offer | None = options.offer
    _check_rows(stored, config, name)
    if offer is not None and offer.is_meant(record):
        return offer.take(stored, config, dtype=dtype, name=name)
    refuse_untrusted_code(record)
    source, revision = options.source_of(record)
    wanted = dataclasses.replace(record, name=source, revision=revision)
    try:
        if record.needs_remote_code:
            config = _naming_code(config, source, revision)
        kwargs = {**options.arguments(), **options.placement}
        if record.quantization is not None:
            config, kwargs = _quantising(wanted, config, kwargs)
        found = base_cache.find_again(wanted, config, dtype=dtype, kwargs=kwargs, device=flair.device, is_held=True)
    except BaseModelNotFoundError as error:
        if Path(source).is_dir() and not isinstance(error.__cause__, RuntimeError):
            raise  # it says what is wrong with what is there
        raise _explain(error, wanted, record, name) from error
    check_base.check_base(found, record, name=name)
    return found if stored.added_rows is None else found.with_rows(stored.added_rows)


def _quantising(
    record: BaseRecord, config: PretrainedConfig, kwargs: dict[str, Any]
) -> tuple[PretrainedConfig, dict[str, Any]]:
    """Return config and arguments by which the base is quantised as the file says, or as its source is already."""
    settings = quantisation.read_settings(record.quantization or {})
    before = getattr(_find_config(record.name, record.revision), "quantization_config", None)
    if before is None:
        return config, {**kwargs, "quantization_config": settings}
    config = copy.deepcopy(config)
    config.quantization_config = before
    return config, kwargs


def source_of_quantised(record: BaseRecord, model: PreTrainedModel, *, cache_dir: str | None) -> BaseRecord:
    """Return the record of a quantised base with the digest of all weights of its source, if that is there still."""
    kwargs = _reaching(record, cache_dir)
    try:
        found = base_cache.find_source(record, model.config, kwargs)
    except (BaseModelNotFoundError, BaseMismatchError):
        return record
    if record.fingerprint is None or not found.is_as(record):
        return record
    full, read = found.full_digests
    return dataclasses.replace(record, full_fingerprint=full, read_full_fingerprint=read)


def _check_rows(stored: StoredBase, config: PretrainedConfig, name: str) -> None:
    rows = 0 if stored.added_rows is None else len(stored.added_rows)
    size = None if stored.record is None else stored.record.vocabulary_size
    wanted = getattr(transformer.text_config(config), "vocab_size", None)
    if rows and size is not None and size + rows != wanted:
        raise ModelFileError(
            f"Cannot load '{name}': it adds {rows} rows to a vocabulary of {size}, and its model has {wanted}. The "
            "file is damaged. Copy or save it again."
        )


def _naming_code(config: PretrainedConfig, source: str, revision: str | None) -> PretrainedConfig:
    """Return a copy of the config that names the code of the base found, and none that a file names."""
    named = copy.deepcopy(config)
    vars(named).pop("auto_map", None)
    # Version 0.2.0 took the permission to run code, which a base need not have, for the need of it.
    if code := getattr(_find_config(source, revision), "auto_map", None):
        named.auto_map = code
    named._name_or_path = source
    return named


def build_stored(stored: StoredBase, config: PretrainedConfig, *, dtype: DtypeLike | None) -> PreTrainedModel:
    """Return a base model for a file that holds all its weights to fill; its code, if it has some, is in no file.

    Raises:
        BaseModelNotFoundError: it needs code of its own, and the base model that comes with it is not found.
    """
    record = stored.record
    if record is None or not record.needs_remote_code:
        return transformer.build_model(config, dtype=dtype, model_kwargs={})
    refuse_untrusted_code(record)
    source, revision = load_options().source_of(record)
    named = _naming_code(config, source, revision)
    kwargs = {"trust_remote_code": True, "code_revision": revision} if hasattr(named, "auto_map") else {}
    return transformer.build_model(named, dtype=dtype, model_kwargs=kwargs)


def _find_config(source: str, revision: str | None) -> PretrainedConfig:
    pinned = {} if revision is None else {"revision": revision}
    return transformer.find_config(source, {**load_options().arguments(), **pinned})


def refuse_untrusted_code(record: BaseRecord) -> None:
    """Return if the base needs no code of its own, or the user allows it to run.

    Raises:
        ModelFileError: the user has not said so; a file cannot.
    """
    if record.needs_remote_code and not load_options().trust_remote_code:
        raise ModelFileError(
            f"Cannot load the base model '{record.name}': it comes with code of its own, which would run on this "
            "machine. No file may switch that on. If you trust that code, pass trust_remote_code=True."
        )


def config_class(model_type: str, record: BaseRecord | None) -> type[PretrainedConfig]:
    """Return the config class of a model type, from the base's own code where transformers has none.

    Raises:
        ModelFileError: transformers does not know it, and there is no code of its own that may run.
    """
    if model_type in CONFIG_MAPPING:
        return CONFIG_MAPPING[model_type]
    if record is None or not record.needs_remote_code:
        raise ModelFileError(
            f"Cannot rebuild the base model: its model type {model_type!r} is not part of the installed transformers. "
            "It may be newer, or come with code of its own. Upgrade transformers to the version with which the model "
            "was trained."
        )
    refuse_untrusted_code(record)
    source, revision = load_options().source_of(record)
    return type(_find_config(source, revision))


def candidate(name: str, model: PreTrainedModel, *, dtype: torch.dtype) -> BaseRecord | None:
    """Return the record of the base model that a model may have been made from, or ``None`` if there is none.

    Args:
        name: recorded name, unless the user says where it is now.
        model: whose shape it must have, but for added rows.
        dtype: of the model's weights.

    Raises:
        BaseModelNotFoundError: the user says where it is, and it is not there.
        BaseMismatchError: the user names another model.
    """
    options = load_options()
    source, revision = options.source_of(BaseRecord(name, getattr(model.config, "_commit_hash", None)))
    try:
        config = _find_config(source, revision)
        record = BaseRecord(_located(source), revision=getattr(config, "_commit_hash", None))
        found = base_cache.find_again(record, model.config, dtype=dtype, kwargs=options.arguments())
    except (BaseModelNotFoundError, BaseMismatchError):
        if options.base_model is not None:
            raise
        return None
    return found.known_record


def check_made(
    record: BaseRecord, model: PreTrainedModel, expected: BaseRecord, *, cache_dir: str | None, name: str
) -> None:
    """Return if the base that a model was made from is the one that a file expects; its source is read again for that.

    Raises:
        BaseMismatchError: it is another one.
    """
    dtype = parse_dtype(expected.dtype or record.dtype or "float32")
    wanted = dataclasses.replace(record, fingerprint=expected.fingerprint, read_fingerprint=expected.read_fingerprint)
    found = base_cache.read_again(wanted, model.config, dtype=dtype, kwargs=_reaching(record, cache_dir))
    check_base.check_base(found, expected, name=name)


def _reaching(record: BaseRecord, cache_dir: str | None) -> dict[str, Any]:
    """Return the arguments by which a base is read again that a model was made from; nothing is downloaded."""
    kwargs: dict[str, Any] = {} if Path(record.name).is_dir() else {"local_files_only": True, "cache_dir": cache_dir}
    if record.needs_remote_code:
        kwargs["trust_remote_code"] = True  # the code of a model that was made from it runs here already
    return kwargs


def reference(
    record: BaseRecord,
    model: PreTrainedModel,
    *,
    dtype: torch.dtype,
    cache_dir: str | None,
    live: FrozenBase | None = None,
    pages: FilePages | None = None,
) -> FrozenBase | None:
    """Return the base as its source has it now, for a trained model to be compared with.

    Nothing is downloaded. ``None`` if it is gone, or if it is not the one that the model was made from any more. The
    base on which the model stands, ``live``, is taken where it proves to be what the source holds.
    """
    kwargs = _reaching(record, cache_dir)
    root = None if live is None else live.root
    if (
        root is not None
        and _is_meant(root, record, model, dtype=dtype)
        and base_cache.is_as_its_source(root, kwargs, pages or FilePages())
    ):
        return root

    def read(record: BaseRecord, wanted: torch.dtype) -> FrozenBase:
        return base_cache.read_again(record, model.config, dtype=wanted, kwargs=kwargs)

    try:
        found = read(record, dtype if record.dtype is None else parse_dtype(record.dtype))
        if not found.is_as(record):
            return None
        # The model may have been converted since it was made from its source.
        is_same = record.dtype in (None, dtype_name(dtype))
        return found if is_same else read(dataclasses.replace(record, fingerprint=None), dtype)
    except (BaseModelNotFoundError, BaseMismatchError):
        return None


def _is_meant(base: FrozenBase, record: BaseRecord, model: PreTrainedModel, *, dtype: torch.dtype) -> bool:
    """Whether a base that is alive is the one that the record says, as a model of this dtype and attention has it."""
    is_named = _origin(base.record) == _origin(record) and base.is_as(record)
    is_read_so = record.dtype in (None, dtype_name(dtype)) and base.known_record.dtype == dtype_name(dtype)
    is_same_kind = base.config._attn_implementation == model.config._attn_implementation
    return not base.is_placed and is_named and is_read_so and is_same_kind


def _origin(record: BaseRecord) -> tuple[Any, ...]:
    return record.name, record.revision, record.arguments, record.needs_remote_code


def _explain(
    error: BaseModelNotFoundError, wanted: BaseRecord, recorded: BaseRecord, name: str
) -> BaseModelNotFoundError | BaseMismatchError:
    if isinstance(error.__cause__, RuntimeError):
        reason = str(error.__cause__).strip().splitlines()[-1].strip().rstrip(".")
        return BaseMismatchError(
            f"Cannot use '{wanted.name}' as base model of '{name}': it has another shape ({reason}). Only the base "
            f"that the model was trained on fits: '{recorded.name}'. Pass base_model= with its directory or Hub id."
        )
    revision = f", revision {recorded.revision}" if recorded.revision else ""
    source = load_options().source
    named = f" from '{source}'" if source is not None else ""
    return BaseModelNotFoundError(
        f"Cannot load '{name}'{named}: its base model '{wanted.name}'{revision} is neither a directory here nor in the "
        "local cache, and it could not be downloaded. The file holds only what was learned on top of it. Pass "
        "base_model= with the directory or Hub id of that model."
    )


def _located(name: str) -> str:
    """Return the whole path of a directory, without detours; a name on the Hub as it is."""
    if not Path(name).is_dir():
        return name
    path = Path(name).absolute()
    short = Path(os.path.normpath(path))
    # Behind a link, ".." can lead elsewhere.
    return str(short if short.is_dir() and short.samefile(path) else path)
