"""A PEFT adapter that was trained on a class of transformers → the config, the tensors and the head for embeddings."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG
from peft import PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PretrainedConfig, PreTrainedModel

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, keys, methods, refusals
from flair_peft.base import memory_check, transformer
from flair_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    BaseMismatchError,
    BaseModelNotFoundError,
    FlairPeftError,
    UnsupportedMethodError,
    UntrainedAdapterError,
    name_some,
)
from flair_peft.foreign import older_peft, source_classes, translate_config
from flair_peft.foreign.adapter_files import CONFIG, AdapterFiles
from flair_peft.primitives.load_context import LoadOptions

log = logging.getLogger("flair_peft")

Tensors = Mapping[str, torch.Tensor]

_WRAPPER, _ROOT = "base_model.model.", "base_model."

_RANDOM_INIT = "pissa_niter_"

# What settings of the wrong type or form lead to: regular expressions, names and numbers.
_SENSELESS = (re.error, TypeError, AttributeError, LookupError, ValueError)

# Parameters of which PEFT reads as many rows and columns as a module has.
_SLICED = frozenset({"vera_A", "vera_B", "pvera_A", "pvera_B"})

# Parameters that make the product zero as long as they are: nothing was learned, whatever the others hold.
_DECIDING = ("lora_B", "lora_embedding_B", "lora_E")


@dataclass(frozen=True)
class ForeignHead:
    """The part of an adapter's file that embeddings have no place for: heads, and a decoder beside an encoder.

    Attributes:
        tensors: name in the source class → tensor, on the CPU.
        labels: of the rows, if the files tell.
        source_class: of transformers, if the adapter's config tells.
        reads: what the head's one linear layer is applied to: "tokens" or "last token". ``None`` for heads that
            compute more than that, or something else.
    """

    tensors: Tensors
    labels: tuple[str, ...] | None = None
    source_class: str | None = None
    reads: str | None = None


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

    Args:
        files: of the adapter.
        base_model: name or directory of the base; ``None`` for the one that the adapter names.
        base_revision: of the base; ``None`` for the one that the adapter names, if that is the base.
        options: how the Hub is reached.
        kwargs: that the user gives the embeddings.

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
    try:
        base_config = transformer.find_config(
            base, {**(kwargs.get("transformers_config_kwargs") or {}), **access, **trusted}
        )
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
        config, tensors, outside = translate_config.own_prompt(config, tensors)
    saved = getattr(config, "modules_to_save", None) or ()
    every_name = frozenset(name for name, _ in model.named_modules(remove_duplicate=False) if name)
    rules = source_classes.prefixes(base_config, model)
    named = [rule + name for rule in rules for name in every_name]
    configs.refuse_endless_patterns(config.to_dict(), named, source=files.source)
    landing = source_classes.locate(tensors, every_name, rules, source_classes.part_of_a_class(base_config, saved))
    outside.update(_single(landing.outside, tensors))
    placed, matrix, is_copy = _take_matrix(_single(landing.inside, tensors), _matrix_names(model), config)
    rows = _check_matrix(matrix, model.get_input_embeddings().weight, files.source)
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
    if getattr(config, "layer_replication", None):
        raise UnsupportedMethodError(
            f"Cannot use the adapter '{files.source}': it replicates layers of its base. Which tensors belong to which "
            "copy cannot be proven from the base. Use an adapter without layer_replication."
        )
    init = getattr(config, "init_lora_weights", None)
    if isinstance(init, str) and init.startswith(_RANDOM_INIT):
        raise UnsupportedMethodError(
            f"Cannot use the adapter '{files.source}': its init_lora_weights={init!r} takes from the base what a "
            "random decomposition gave, which is another one each time, and the file does not hold it. Save the "
            "adapter with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it."
        )
    config.base_model_name_or_path = None  # PEFT warns of another path than the one that the adapter was trained with
    return config


def fill_(embeddings: Any, plan: Plan, *, allow_untrained: bool) -> None:
    """Put the tensors of the adapter into new embeddings, in place; each of them is there afterwards, exactly once.

    Raises:
        BaseMismatchError: tensors have other shapes than in this model.
        AdapterMismatchError: tensors are missing or left over.
        UntrainedAdapterError: the adapter changes nothing, unless ``allow_untrained``.
    """
    model: PeftModel = embeddings.model
    _check_vocabulary(embeddings, plan)
    if plan.matrix is not None and not plan.is_copy:
        _fill_matrix_(embeddings, plan)
    if plan.ranks:
        model.peft_config[methods.ADAPTER_NAME].rank_pattern = dict(plan.ranks)
    own = _stored_state(model)
    match = keys.match_keys(plan.tensors, own)
    missing = [key for key in match.missing if not keys.is_unread(keys.plain_key(key)) or keys.has_container(key)]
    if older_peft.is_lost_bias(plan.config, missing):
        raise AdapterMismatchError(
            f"Cannot use the adapter '{plan.source}': its biases are not in the file ({name_some(missing, 2)}). PEFT "
            "0.7 to 0.20 trained them and did not store them. Use what was trained with bias='none' or 'all'."
        )
    unexpected = set(match.unexpected)
    unexpected -= injection.derived_again(model, {key: plan.tensors[key] for key in unexpected})
    if missing or unexpected or match.ambiguous:
        raise _misfit(plan, {"missing": missing, "left over": unexpected, "ambiguous": match.ambiguous})
    fitted = _fit({key: plan.tensors[theirs] for key, theirs in match.renamed.items()}, own, plan)
    _check_learned(plan, model, fitted, allow_untrained=allow_untrained)
    _set_(model, fitted, plan.ranks)
    after = _stored_state(model)
    lost = [key for key, tensor in fitted.items() if not torch.equal(after[key].cpu(), tensor.to(after[key].dtype))]
    if lost:
        raise _misfit(plan, {"not taken over by PEFT": lost})
    injection.repair_(model)
    _report(plan)


def _report(plan: Plan) -> None:
    log.info("'%s': all %s tensors that belong to the transformer are in place.", plan.source, len(plan.tensors))
    if plan.head is not None:
        log.warning(
            "%s tensors of '%s' belong to no embeddings: %s. They are kept in embeddings.foreign_head.",
            len(plan.head.tensors),
            plan.source,
            name_some(plan.head.tensors),
        )


def _single(names: Mapping[str, str], tensors: Tensors) -> dict[str, torch.Tensor]:
    """Return name → tensor without the second copies that PEFT stores of trained biases and resized matrices."""
    by_name = {name: tensors[key] for key, name in names.items()}
    for key, name in names.items():
        twin = _without_copy(name)
        if twin != name and twin in by_name and not torch.equal(by_name[twin], by_name[name]):
            raise AdapterMismatchError(
                f"Cannot place '{key}': '{twin}' means the same tensor and holds other values. PEFT writes both from "
                "one tensor. Save the adapter again."
            )
    return {_without_copy(name): tensor for name, tensor in by_name.items()}


def _without_copy(name: str) -> str:
    return name.replace(".modules_to_save.", ".")


def _stored_key(name: str) -> str:
    if name == translate_config.PROMPT:
        return name
    return _WRAPPER + name if keys.carrier(name) else _ROOT + name


def _stored_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what PEFT would store of the adapter."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {
        key: tensor for key, tensor in state.items() if _without_copy(key) == key or _without_copy(key) not in state
    }


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
        labels=files.labels,
        source_class=None if cls is None else cls.__name__,
        reads=None if cls is None else source_classes.reading_of_head(cls, config),
    )


def _check_vocabulary(embeddings: Any, plan: Plan) -> None:
    """Return unless the tokenizer has tokens, beside Flair's own, that neither base nor file have a row for."""
    own = set(embeddings.tokenizer.get_vocab().items())
    beyond = [token for token, index in own if index >= plan.rows and token != SENTENCE_BOUNDARY_TAG]
    if beyond:
        raise AdapterMismatchError(
            f"Cannot use the tokenizer beside '{plan.source}': the base has {plan.rows} rows of vocabulary, and its "
            f"tokens {name_some(beyond)} lie behind them. Their rows were not stored with the adapter. Save it with "
            "save_embedding_layers=True, or pass tokenizer= with the base model to do without these tokens."
        )


def _fill_matrix_(embeddings: Any, plan: Plan) -> None:
    """Bring the rows of the input embeddings to those of the file, in place; equal rows stay shared with the base."""
    assert plan.matrix is not None
    weight = _base_matrix(embeddings.base_model)
    wanted = plan.matrix.to(weight.device, weight.dtype)
    if torch.equal(weight[: plan.rows], wanted):
        return
    log.warning("'%s' has input embeddings of its own: they replace those of the base.", plan.source)
    weight.data[: plan.rows] = wanted


def _base_matrix(model: PreTrainedModel) -> torch.nn.Parameter:
    module: Any = model.get_input_embeddings()
    for inner in ("original_module", "base_layer"):
        module = getattr(module, inner, module)
    return module.weight


def _fit(tensors: Tensors, own: Tensors, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors in the shapes of the model, which differ by rows that Flair adds to the vocabulary."""
    fitted = {key: _grown(_cut(key, tensor, own[key]), own[key], plan.rows) for key, tensor in tensors.items()}
    method = methods.method_name(plan.config)
    if method == "RANDLORA" and any("randlora_" in key and fitted[key].shape != own[key].shape for key in fitted):
        raise translate_config.drawn_together(method, ())
    wrong = [
        f"{key} ({tuple(tensors[key].shape)} instead of {tuple(own[key].shape)})"
        for key, tensor in fitted.items()
        if tensor.shape != own[key].shape
    ]
    if wrong:
        raise BaseMismatchError(
            f"Cannot use '{plan.base}' as base model of '{plan.source}': {len(wrong)} tensors have another shape: "
            f"{name_some(wrong)}. The adapter was trained on a model of another size, or its config is not the one "
            "that it was trained with. Pass base_model= with the model that it was trained on."
        )
    return fitted


def _cut(key: str, tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the part that modules of this model read of a tensor that was made for larger ones, too."""
    is_sliced = not _SLICED.isdisjoint(key.split(".")) and tensor.dim() == own.dim() == 2
    return tensor[: own.shape[0], : own.shape[1]].clone() if is_sliced else tensor


def _grown(tensor: torch.Tensor, own: torch.Tensor, rows: int) -> torch.Tensor:
    """Return a tensor of the input embeddings with places for the rows that Flair added; these are not adapted."""
    if tensor.shape == own.shape or tensor.dim() != own.dim():
        return tensor
    grown = [axis for axis in range(own.dim()) if tensor.shape[axis] != own.shape[axis]]
    if len(grown) != 1 or tensor.shape[grown[0]] != rows or own.shape[grown[0]] <= rows:
        return tensor
    # Axis 0 is that of a trained copy of the matrix, whose new rows are the base's; axis 1 that of lora_embedding_A.
    result = own.detach().clone() if grown[0] == 0 else torch.zeros_like(own)
    result.narrow(grown[0], 0, rows).copy_(tensor)
    return result.cpu()


def _check_learned(plan: Plan, model: PeftModel, fitted: Tensors, *, allow_untrained: bool) -> None:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    is_unscaled = bool(layers) and len(injection.modules_without_effect(model)) == len(layers)
    if is_unscaled and not allow_untrained:
        raise UntrainedAdapterError(
            f"Cannot use the adapter '{plan.source}': the scale in its {CONFIG} is zero, so that it would compute what "
            "the base computes. A training with this scale learns nothing, or the file was changed afterwards. Correct "
            "its alpha, or pass allow_untrained=True to use it all the same."
        )
    deciding = [key for key in fitted if any(f".{name}" in key for name in _DECIDING)]
    zero = [key for key in deciding if not fitted[key].any()]
    if not zero:
        return
    factors = [key for key in fitted if any(f".{name}" in key for name in ("lora_A", "lora_embedding_A"))]
    if len(zero) == len(deciding) and len(deciding) + len(factors) == len(fitted) and not allow_untrained:
        raise UntrainedAdapterError(
            f"Cannot use the adapter '{plan.source}': all of its {len(zero)} matrices {name_some(zero, limit=2)} are "
            "zero, so that it would compute what the base computes. It was saved before it was trained, or the "
            "training lost it. Pass allow_untrained=True to train on it all the same."
        )
    log.warning(
        "%s of %s deciding matrices of '%s' are zero, so that they change nothing: %s.",
        len(zero),
        len(deciding),
        plan.source,
        name_some(zero, limit=3),
    )


def _set_(model: PeftModel, tensors: Tensors, ranks: Mapping[str, list[bool]] | None) -> None:
    """Let PEFT put the tensors in place; AdaLoRA keeps its full rank, with zeros where its budget left nothing."""
    config: Any = model.peft_config[methods.ADAPTER_NAME]
    if ranks:
        config.rank_pattern = None
        tensors = _at_full_rank(tensors, _stored_state(model), ranks)
    set_peft_model_state_dict(model, dict(tensors), adapter_name=methods.ADAPTER_NAME)
    if ranks:
        config.rank_pattern = dict(ranks)


def _at_full_rank(tensors: Tensors, own: Tensors, pattern: Mapping[str, list[bool]]) -> dict[str, torch.Tensor]:
    full = dict(tensors)
    for name, ranks in pattern.items():
        chosen = torch.tensor(ranks, dtype=torch.bool).flatten()
        module = _WRAPPER + name.rpartition(".lora_E")[0]
        for part in ("lora_A", "lora_B", "lora_E"):
            key = f"{module}.{part}"
            spread = torch.zeros(own[key].shape, dtype=own[key].dtype)
            spread[(slice(None), chosen) if part == "lora_B" else chosen] = tensors[key].to(spread.dtype)
            full[key] = spread
    return full


def _misfit(plan: Plan, problems: Mapping[str, Collection[str]]) -> AdapterMismatchError:
    found = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items() if names)
    return AdapterMismatchError(
        f"Cannot place every tensor of '{plan.source}' on '{plan.base}': {found}. The adapter is "
        f"{methods.describe(plan.config)}, and its file and its config do not go together on this base. Pass "
        "base_model= with the model that it was trained on, and check that both files are of one save."
    )
