"""Which config, tensors and head embeddings get from a PEFT adapter that was trained on a class of transformers."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from transformers import PretrainedConfig, PreTrainedModel

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, methods, refusals
from flair_peft.base import memory_check, transformer
from flair_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    BaseMismatchError,
    BaseModelNotFoundError,
    FlairPeftError,
    UnsupportedMethodError,
)
from flair_peft.foreign import older_peft, source_classes, translate_config
from flair_peft.foreign.adapter_files import CONFIG, AdapterFiles
from flair_peft.primitives.load_context import LoadOptions

Tensors = Mapping[str, torch.Tensor]

WRAPPER, _ROOT = "base_model.model.", "base_model."

# What settings of the wrong type or form lead to: regular expressions, names and numbers.
_SENSELESS = (re.error, TypeError, AttributeError, LookupError, ValueError)


@dataclass(frozen=True)
class ForeignHead:
    """The part of an adapter's file that embeddings have no place for: heads, and a decoder beside an encoder.

    Attributes:
        tensors: name in the source class → tensor, on the CPU.
        labels: of the rows, if the files tell.
        source_class: of transformers, if the adapter's config tells.
        reads: what the head's one linear layer is applied to: "tokens" or "last token". ``None`` for heads that
            compute more than that, or something else.
        subtoken_pooling: of an exported Flair model.
    """

    tensors: Tensors
    labels: tuple[str, ...] | None = None
    source_class: str | None = None
    reads: str | None = None
    subtoken_pooling: str | None = None


@dataclass(frozen=True)
class Plan:
    """What embeddings are made from, and filled with.

    Attributes:
        source: what the user called the adapter.
        base: name or directory of the base model.
        config: of the adapter, with the names of the bare model.
        tensors: key, as PEFT would store it of the bare model → tensor.
        matrix: the input embeddings as the adapter's file has them, or ``None`` if it leaves them to the base.
        is_copy: whether these are a trained copy beside the base's own, which stay as they are but for their number.
        base_rows: rows of the base's own input embeddings.
        head: what has no place in embeddings, or ``None``.
        ranks: which ranks AdaLoRA's budget left to which matrix.
        access: where the tokenizer is, and how the base is reached.
    """

    source: str
    base: str
    config: PeftConfig
    tensors: Tensors
    matrix: torch.Tensor | None
    is_copy: bool
    base_rows: int
    head: ForeignHead | None
    ranks: Mapping[str, list[bool]] | None
    access: Mapping[str, Any]

    @property
    def rows(self) -> int:
        """Rows of the input embeddings that the adapter was trained with."""
        return self.base_rows if self.matrix is None else len(self.matrix)

    @property
    def added_rows(self) -> torch.Tensor | None:
        """Rows that the adapter's file adds to the input embeddings of the base, or ``None``."""
        return self.matrix[self.base_rows :] if self.matrix is not None and self.rows > self.base_rows else None


def plan(
    files: AdapterFiles,
    *,
    base_model: str | None,
    base_revision: str | None,
    options: LoadOptions,
    kwargs: Mapping[str, Any],
) -> Plan:
    """Return what embeddings with this adapter are made from; no weights of the base are read.

    Without ``base_model`` and ``base_revision`` the adapter's config names them; ``kwargs`` are of the embeddings.

    Raises:
        BaseModelNotFoundError: there is no such base model.
        BaseMismatchError: it is none that the adapter can have been trained on.
        AdapterMismatchError: tensors of the adapter have no place, or several.
        AdapterConfigError: the config does not go with the tensors, or its settings do not make sense.
        UnsupportedMethodError: the method cannot work here.
    """
    base = _base_name(files, base_model)
    revision = base_revision or (files.settings.get("revision") if base_model in (None, base_named(files)) else None)
    access = {**options.arguments(), **({} if revision is None else {"revision": revision})}
    trusted = {name: kwargs[name] for name in ("trust_remote_code",) if name in kwargs}
    config_kwargs = {**(kwargs.get("transformers_config_kwargs") or {}), **access, **trusted}
    try:
        base_config = transformer.find_config(base, config_kwargs)
    except BaseModelNotFoundError as error:
        # A base that is there, or that needs code, did not move.
        is_here = base_model is not None or Path(base).is_dir() or "trust_remote_code=True" in str(error)
        raise error if is_here else _moved(files, base, error) from error
    bounds = memory_check.bounds()
    if bounds is not None:
        bounds.know_base(base, {**access, **trusted})
    model = source_classes.skeleton(base_config, trust_remote_code=bool(trusted.get("trust_remote_code")))
    try:
        return _plan(files, base, base_config, model, access)
    except FlairPeftError:
        raise
    except _SENSELESS as error:
        raise AdapterConfigError(
            f"Cannot use the adapter '{files.source}': the settings in its {CONFIG} do not make sense "
            f"({type(error).__name__}: {error}). PEFT did not write them so. Correct the file, or save the adapter "
            "again."
        ) from error


def _plan(
    files: AdapterFiles, base: str, base_config: PretrainedConfig, model: PreTrainedModel, access: Mapping[str, Any]
) -> Plan:
    config = _usable_config(files, model)
    source_classes.refuse_other_inputs(source_classes.source_class(base_config, files.settings))
    tensors, outside = files.tensors, dict[str, torch.Tensor]()
    if config.is_prompt_learning:
        config, tensors, outside = translate_config.trainable_prompt(config, tensors)
    # What belongs to the transformer, and what to a head or a decoder.
    saved = getattr(config, "modules_to_save", None) or ()
    every_name = frozenset(name for name, _ in model.named_modules(remove_duplicate=False) if name)
    rules = source_classes.prefixes(base_config, model)
    named = [rule + name for rule in rules for name in every_name]
    configs.refuse_endless_patterns(config.to_dict(), named, source=files.source)
    landing = source_classes.locate(tensors, every_name, rules, source_classes.part_of_a_class(base_config, saved))
    outside.update(_single(landing.outside, tensors))
    # The input embeddings, which PEFT stores beside the adapter where it has reason to think that they were changed.
    placed, matrix, is_copy = _take_matrix(_single(landing.inside, tensors), _matrix_names(model), config)
    rows = _check_matrix(matrix, model.get_input_embeddings().weight, files.source)
    # The config in the names of the bare model, unless these cannot say the same.
    translate_config.refuse_drawn_together(config, base_config, files.settings, every_name, tensors)
    adapted = {landing.prefix + keys.carrier(name) for name in placed if keys.has_container(name)}
    older_peft.refuse_other_alpha(config, files.settings, sorted(adapted))
    translate_config.resolve_(config, [name for name, _ in model.named_modules() if name], landing.prefix, placed)
    return Plan(
        source=files.source,
        base=base,
        config=config,
        tensors={_stored_key(name): tensor for name, tensor in placed.items()},
        matrix=matrix,
        is_copy=is_copy,
        base_rows=rows,
        head=_head(files, base_config, outside) if outside else None,
        ranks=translate_config.take_ranks_(config, landing.prefix, placed),
        access={"tokenizer": files.tokenizer, **access},
    )


def _moved(files: AdapterFiles, base: str, error: Exception) -> BaseModelNotFoundError:
    return BaseModelNotFoundError(
        f"Cannot load the adapter '{files.source}': '{files.folder / CONFIG}' names the base model '{base}', which "
        f"cannot be used ({str(error).partition('. ')[0]}). It may have been moved since. Pass base_model= with its "
        "directory or Hub id."
    )


def base_named(files: AdapterFiles) -> str | None:
    """Return the base model that the adapter's config names, if it does."""
    return files.settings.get("base_model_name_or_path") or None


def _base_name(files: AdapterFiles, base_model: str | None) -> str:
    base = base_model or base_named(files)
    if base is None:
        raise AdapterConfigError(
            f"Cannot tell the base model of the adapter '{files.source}': its config does not name one. An adapter is "
            "nothing without it. Pass base_model= with its Hub id or directory."
        )
    return str(base)


def _usable_config(files: AdapterFiles, model: PreTrainedModel) -> PeftConfig:
    config = copy.deepcopy(files.config)
    refusals.refuse_unsupported(model, config)
    for option, value in methods.options(config):
        if option.not_transferred:
            reason = option.not_transferred.format(value=value)
            raise UnsupportedMethodError(f"Cannot use the adapter '{files.source}': {reason}")
    config.base_model_name_or_path = None  # PEFT warns of another path than the one that the adapter was trained with
    return config


def _single(names: Mapping[str, str], tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return name → tensor without the second copies that PEFT stores of trained biases and resized matrices."""
    by_name = {name: tensors[key] for key, name in names.items()}
    for key, name in names.items():
        twin = keys.without_saved_copy(name)
        if twin != name and twin in by_name and not torch.equal(by_name[twin], by_name[name]):
            raise AdapterMismatchError(
                f"Cannot place '{key}': '{twin}' means the same tensor and holds other values. PEFT writes both from "
                "one tensor. Save the adapter again."
            )
    return {keys.without_saved_copy(name): tensor for name, tensor in by_name.items()}


def _stored_key(name: str) -> str:
    if name == translate_config.PROMPT:
        return name
    return WRAPPER + name if keys.carrier(name) else _ROOT + name


def _matrix_names(model: PreTrainedModel) -> frozenset[str]:
    matrix = model.get_input_embeddings()
    return frozenset(name for name, module in model.named_modules(remove_duplicate=False) if module is matrix)


def _take_matrix(
    placed: Tensors, matrices: Collection[str], config: PeftConfig
) -> tuple[dict[str, torch.Tensor], torch.Tensor | None, bool]:
    """Return the tensors without the input embeddings that PEFT stored beside the adapter, and these.

    The last tells whether these are a trained copy, which is among the tensors, too.
    """
    saved = getattr(config, "modules_to_save", None) or ()
    rest, frozen, trained = dict(placed), None, None
    for name, tensor in placed.items():
        carrier = keys.carrier(name)
        if carrier not in matrices or keys.plain_key(name) != f"{carrier}.weight" or keys.has_container(name):
            continue
        is_trained_copy = name == f"{carrier}.weight" and any(carrier.endswith(_last(entry)) for entry in saved)
        if is_trained_copy:
            trained = tensor
        else:
            frozen = rest.pop(name)
    return rest, trained if frozen is None else frozen, frozen is None


def _last(entry: str) -> str:
    return entry.rpartition(".")[2]


def _check_matrix(matrix: torch.Tensor | None, own: torch.Tensor, source: str) -> int:
    """Return the rows of the base's own input embeddings, if those of the file can stand for them."""
    if matrix is not None and (matrix.dim() != 2 or matrix.shape[1] != own.shape[1]):
        raise BaseMismatchError(
            f"Cannot use the base model for '{source}': its input embeddings have the shape {tuple(own.shape)}, those "
            f"in the file {tuple(matrix.shape)}. The adapter was trained on a model of another size. Pass base_model= "
            "with that."
        )
    if matrix is not None and len(matrix) < len(own):
        raise BaseMismatchError(
            f"Cannot use the base model for '{source}': its vocabulary has {len(own)} rows, and the adapter was "
            f"trained with {len(matrix)}. Rows of a base cannot be taken away. Pass base_model= with a base whose "
            "vocabulary was cut in the same way."
        )
    return len(own)


def _head(files: AdapterFiles, config: PretrainedConfig, outside: Tensors) -> ForeignHead:
    cls = source_classes.source_class(config, files.settings)
    return ForeignHead(
        tensors={name: tensor.clone() for name, tensor in outside.items()},
        labels=files.head.labels,
        subtoken_pooling=files.head.subtoken_pooling,
        source_class=None if cls is None else cls.__name__,
        reads=None if cls is None else source_classes.reading_of_head(cls, config),
    )
