"""Put the tensors of an adapter that was trained on another class into embeddings, each exactly once."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

import torch
from flair.embeddings.transformer import SENTENCE_BOUNDARY_TAG
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from flair_peft.adapter import derived_state, keys, mending, methods, trainable
from flair_peft.errors import AdapterMismatchError, BaseMismatchError, UntrainedAdapterError, name_some
from flair_peft.foreign import older_peft, translate_config
from flair_peft.foreign.adapter_files import CONFIG
from flair_peft.foreign.transfer_plan import WRAPPER, Plan, Tensors

log = logging.getLogger("flair_peft")


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
    expected = _stored_state(model)
    fitted = _fit(_tensors_by_model_key(plan, model, expected), expected, plan)
    _refuse_untrained(plan, model, fitted, allow_untrained=allow_untrained)
    _set_(model, fitted, plan.ranks)
    after = _stored_state(model)
    lost = [key for key, tensor in fitted.items() if not torch.equal(after[key].cpu(), tensor.to(after[key].dtype))]
    if lost:
        raise _misfit(plan, {"not taken over by PEFT": lost})
    mending.repair_(model)
    _report(plan)


def _tensors_by_model_key(plan: Plan, model: PeftModel, expected: Tensors) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors under the keys that PEFT has for them in this model, if each has exactly one."""
    match = keys.match_keys(plan.tensors, expected)
    missing = [key for key in match.missing if not keys.is_unread(keys.plain_key(key)) or keys.has_container(key)]
    if older_peft.is_lost_bias(plan.config, missing):
        raise AdapterMismatchError(
            f"Cannot use the adapter '{plan.source}': its biases are not in the file ({name_some(missing, 2)}). PEFT "
            "0.7 to 0.20 trained them and did not store them. Use what was trained with bias='none' or 'all'."
        )
    unexpected = set(match.unexpected)
    unexpected -= derived_state.computed_again(model, {key: plan.tensors[key] for key in unexpected})
    if missing or unexpected or match.ambiguous:
        raise _misfit(plan, {"missing": missing, "left over": unexpected, "ambiguous": match.ambiguous})
    return {key: plan.tensors[theirs] for key, theirs in match.renamed.items()}


def _report(plan: Plan) -> None:
    log.info("'%s': all %s tensors that belong to the transformer are in place.", plan.source, len(plan.tensors))
    if plan.head is not None:
        log.warning(
            "%s tensors of '%s' belong to no embeddings: %s. They are kept in embeddings.foreign_head.",
            len(plan.head.tensors),
            plan.source,
            name_some(plan.head.tensors),
        )


def _stored_state(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return what PEFT would store of the adapter, without second copies."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    twins = {key: keys.without_saved_copy(key) for key in state}
    return {key: tensor for key, tensor in state.items() if twins[key] == key or twins[key] not in state}


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


def _fit(tensors: Tensors, expected: Tensors, plan: Plan) -> dict[str, torch.Tensor]:
    """Return the tensors in the shapes of the model, which differ by rows that Flair adds to the vocabulary."""
    sliced = frozenset(methods.method_traits(plan.config).sliced)
    cut = {
        key: _cut(tensor, expected[key]) if sliced & {*key.split(".")} else tensor for key, tensor in tensors.items()
    }
    fitted = {key: _grown(tensor, expected[key], plan.rows) for key, tensor in cut.items()}
    method = methods.method_traits(plan.config)
    is_of_method = method.prefixes[0] if method.is_sized_together else None
    if is_of_method and any(is_of_method in key and fitted[key].shape != expected[key].shape for key in fitted):
        raise translate_config.drawn_together(methods.method_name(plan.config), ())
    wrong = [
        f"{key} ({tuple(tensors[key].shape)} instead of {tuple(expected[key].shape)})"
        for key, tensor in fitted.items()
        if tensor.shape != expected[key].shape
    ]
    if wrong:
        raise BaseMismatchError(
            f"Cannot use '{plan.base}' as base model of '{plan.source}': {len(wrong)} tensors have another shape: "
            f"{name_some(wrong)}. The adapter was trained on a model of another size, or its config is not the one "
            "that it was trained with. Pass base_model= with the model that it was trained on."
        )
    return fitted


def _cut(tensor: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Return the part that modules of this model read of a tensor that was made for larger ones, too."""
    is_matrix = tensor.dim() == own.dim() == 2
    return tensor[: own.shape[0], : own.shape[1]].clone() if is_matrix else tensor


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


def _refuse_untrained(plan: Plan, model: PeftModel, fitted: Tensors, *, allow_untrained: bool) -> None:
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    is_unscaled = bool(layers) and len(trainable.modules_without_effect(model)) == len(layers)
    if is_unscaled and not allow_untrained:
        raise UntrainedAdapterError(
            f"Cannot use the adapter '{plan.source}': the scale in its {CONFIG} is zero, so that it would compute what "
            "the base computes. A training with this scale learns nothing, or the file was changed afterwards. Correct "
            "its alpha, or pass allow_untrained=True to use it all the same."
        )
    method = methods.method_traits(plan.config)
    deciding = [key for key in fitted if any(f".{name}" in key for name in method.deciding)]
    zero = [key for key in deciding if not fitted[key].any()]
    if not zero:
        return
    factors = [key for key in fitted if any(f".{name}" in key for name in method.factors.values())]
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


def _at_full_rank(tensors: Tensors, expected: Tensors, pattern: Mapping[str, list[bool]]) -> dict[str, torch.Tensor]:
    at_full_rank = dict(tensors)
    for name, ranks in pattern.items():
        chosen = torch.tensor(ranks, dtype=torch.bool).flatten()
        module = WRAPPER + name.rpartition(".lora_E")[0]
        for part in ("lora_A", "lora_B", "lora_E"):
            key = f"{module}.{part}"
            spread = torch.zeros(expected[key].shape, dtype=expected[key].dtype)
            spread[(slice(None), chosen) if part == "lora_B" else chosen] = tensors[key].to(spread.dtype)
            at_full_rank[key] = spread
    return at_full_rank


def _misfit(plan: Plan, problems: Mapping[str, Collection[str]]) -> AdapterMismatchError:
    lists = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items() if names)
    return AdapterMismatchError(
        f"Cannot place every tensor of '{plan.source}' on '{plan.base}': {lists}. The adapter is "
        f"{methods.describe(plan.config)}, and its file and its config do not go together on this base. Pass "
        "base_model= with the model that it was trained on, and check that both files are of one save."
    )
