"""What cannot work with an adapter, found before it fails or predicts something else, with the reason."""

from __future__ import annotations

import inspect
import itertools
import logging
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, methods
from flair_peft.adapter.methods import ADAPTER_NAME, describe, method_name
from flair_peft.errors import AdapterConfigError, FlairPeftError, UnsupportedMethodError, name_some
from flair_peft.primitives.dtypes import dtype_name

log = logging.getLogger("flair_peft")


def refuse_unsupported(model: PreTrainedModel, config: PeftConfig) -> None:
    """Return if the method is not known to fail on this architecture.

    Raises:
        UnsupportedMethodError: it is; the message names the method, the architecture and the reason.
        AdapterConfigError: the config of a prompt does not say how long it is.
    """
    reasons = [methods.method_traits(config).refused]
    reasons += [option.refused.format(value=value) for option, value in methods.options(config)]
    reason = next(filter(None, reasons), None)
    if reason is not None:
        raise unsupported(model, config, reason)
    rows = getattr(config, "num_virtual_tokens", None)
    if config.is_prompt_learning and not isinstance(rows, int):
        raise AdapterConfigError(
            f"Cannot use this {method_name(config)} config: num_virtual_tokens={rows!r} is no number of rows, and "
            "PEFT has no default. Pass one, such as num_virtual_tokens=20."
        )
    if methods.prepends_rows(config) and "bbox" in inspect.signature(model.forward).parameters:
        raise unsupported(model, config, "it asks for a bounding box per row, and virtual tokens have none")
    if methods.prepends_cache(config) and "past_key_values" not in inspect.signature(model.forward).parameters:
        raise unsupported(model, config, "its forward takes no past key values, which carry the prefix")
    if methods.prepends_cache(config) and model.config.is_encoder_decoder:
        raise unsupported(model, config, "a prefix reaches its decoder alone, and Flair reads its encoder")
    places = set(map(str, getattr(model, "hf_device_map", {}).values()))
    if methods.prepends_cache(config) and places and places <= {"cpu", "disk"}:
        raise unsupported(model, config, "PEFT puts a prefix on a GPU alone where the base is spread (peft#3619)")


_NAMING = ("target_modules", "exclude_modules", "feedforward_modules", "modules_to_save", "trainable_token_indices")


def check_names(model: PreTrainedModel, config: PeftConfig) -> None:
    """Return if each name in a user's config may be meant; those that no module has are said.

    PEFT is content if one of them is there. Lists that are meant for many architectures name what others have, so that
    only a name that is nearly that of a module which no other entry names is taken for a slip of the pen.

    Raises:
        AdapterConfigError: there is one.
    """
    names = [name for name, _ in model.named_modules() if name]
    for setting in _NAMING:
        entries = getattr(config, setting, None) or ()
        entries = () if isinstance(entries, str) else entries
        meant_by = {entry: _ending_in(entry, names) for entry in entries if isinstance(entry, str)}
        unmatched = sorted(entry for entry, modules in meant_by.items() if not modules)
        if not unmatched or (setting == "target_modules" and len(unmatched) == len(meant_by)):
            continue  # without any target, PEFT adds no adapter
        taken = {name for modules in meant_by.values() for name in modules}
        free = [name.split(".") for name in names if name not in taken]
        slips = {e: n for e in unmatched for n in {".".join(f[-1 - e.count(".") :]) for f in free} if _is_slip(e, n)}
        # Several names that nothing has are a list for many architectures.
        if slips and len(unmatched) <= max(1, len(meant_by) - len(unmatched)):
            meant = ", ".join(f"'{entry}' (is '{name}' meant?)" for entry, name in slips.items())
            raise AdapterConfigError(
                f"Cannot add a {method_name(config)} adapter to {type(model).__name__}: no module of it is called "
                f"{meant}, which its {setting} name. PEFT would go without, and a part of the adapter would be "
                "missing. Correct the name, or leave it out."
            )
        log.warning(
            "No module of %s is called %s: %s selects nothing by that. Its linear modules are called %s.",
            type(model).__name__,
            name_some(unmatched),
            setting,
            name_some(linear_names(model), limit=12),
        )
    _report_lost_layers(model, config, names)


def _report_lost_layers(model: PreTrainedModel, config: PeftConfig, names: Sequence[str]) -> None:
    wanted = getattr(config, "layers_to_transform", None)
    wanted = {wanted} if isinstance(wanted, int) else set(wanted or ())
    numbers = {int(part) for name in names for part in name.split(".") if part.isdigit()}
    if wanted - numbers and wanted & numbers:
        log.warning(
            "%s has no layers %s: layers_to_transform selects nothing by these. Its layers are called 0 to %s.",
            type(model).__name__,
            name_some(map(str, sorted(wanted - numbers))),
            max(numbers),
        )


def _ending_in(entry: str, names: Sequence[str]) -> list[str]:
    return [name for name in names if f".{name}".endswith(f".{entry}")]


def _is_slip(written: str, name: str) -> bool:
    """Whether a name was written with its letters in another order or case, or with one too many or too few.

    Another letter or number makes another name: ``q_proj`` and ``k_proj``, ``fc1`` and ``fc2``.
    """
    short, long = sorted((written.lower(), name.lower()), key=len)
    are_others = re.findall(r"\d+", written) != re.findall(r"\d+", name)
    if are_others or len(long) < 4 or len(long) - len(short) > 1:
        return False
    if len(long) == len(short):
        return sorted(long) == sorted(short)
    return any(long[:i] + long[i + 1 :] == short for i in range(len(long)))


def try_out(model: PeftModel, forward: Callable[[], tuple[torch.Tensor, ...]], *, rows: int) -> None:
    """Return if one small forward pass with the adapter gives hidden states of the right shape.

    Args:
        model: the PEFT model; only named in errors.
        forward: runs the pass and returns hidden states, each of shape (batch, rows, hidden).
        rows: the number of rows that each sentence must have.

    Raises:
        UnsupportedMethodError: it fails or gives another shape.
    """
    config = model.peft_config[ADAPTER_NAME]
    base = model.get_base_model()
    try:
        with torch.no_grad():
            hidden_states = forward()
    except FlairPeftError:
        raise
    except Exception as error:
        reason = f"its first forward pass fails with {type(error).__name__}: {str(error) or 'no message'}"
        longest = getattr(base.config, "max_position_embeddings", None)
        if isinstance(longest, int) and config.is_prompt_learning and config.num_virtual_tokens + rows > longest:
            raise AdapterConfigError(
                f"Cannot put num_virtual_tokens={config.num_virtual_tokens} in front of sentences: "
                f"{type(base).__name__} reads {longest} positions at most, those of the sentence included. Take fewer."
            ) from error
        raise unsupported(base, config, reason) from error
    if not all(states.isfinite().all() for states in hidden_states):
        log.warning(
            "%s gives NaN or infinite numbers in %s. Its weights hold some, or its numbers are beyond what this dtype "
            "can hold, and every prediction would be NaN. Pass dtype='float32' or 'bfloat16', or another base model.",
            type(base).__name__,
            dtype_name(hidden_states[0].dtype),
        )
    counts = {states.shape[1] for states in hidden_states}
    if any(count < rows for count in counts):
        raise unsupported(base, config, f"it gives {sorted(counts)} rows for a sentence of {rows} subtokens")


def refuse_lost_prefix(model: PeftModel) -> None:
    """Return unless transformers would drop the prefix: it passes no past key values through a checkpointed layer.

    Raises:
        UnsupportedMethodError: gradient checkpointing was switched on after a prefix was added.
    """
    config, base = model.peft_config[ADAPTER_NAME], model.get_base_model()
    if methods.prepends_cache(config) and getattr(base, "is_gradient_checkpointing", False):
        raise unsupported(base, config, "gradient checkpointing drops past key values, which carry the prefix")


def refuse_without_adapter(model: torch.nn.Module) -> None:
    """Return if the model of embeddings has its adapter, and not only the base that PEFT's ``merge_and_unload`` leaves.

    Raises:
        AdapterConfigError: it has none, or something is wrapped around it; the message names what merges a whole
            Flair model.
    """
    if not isinstance(model, PeftModel) and any(isinstance(each, PeftModel) for each in model.modules()):
        raise AdapterConfigError(
            f"Cannot store, train or copy these embeddings: a {type(model).__name__} is wrapped around their model, "
            "and files hold an adapter on its base. Take it off, by embeddings.model = embeddings.model.module or so; "
            "flair_peft.join_processes() trains in several processes."
        )
    is_there = isinstance(model, PeftModel) and ADAPTER_NAME in model.peft_config
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    if not is_there or all(keys.base_key(name) is not None for name, _ in named):
        raise AdapterConfigError(
            "Cannot store, train or copy these embeddings: their adapter was merged, unloaded or deleted, and what is "
            "left can only embed. Files hold adapters beside their base, and a load would look for one. Make the "
            "embeddings again; flair_peft.merge(model) turns a model with its adapter into a plain one, which Flair "
            "saves and loads."
        )


def refuse_unstorable(model: PeftModel, layers: Sequence[BaseTunerLayer] | None = None) -> None:
    """Return if a file that holds the adapter and not the base would give the model back as it is now.

    Args:
        model: with its adapter.
        layers: those of the adapter, if they were looked up already.

    Raises:
        AdapterConfigError: the adapter is merged, switched off or, unless layers are given, scaled in another way
            than its config says, or there are several.
    """
    if not isinstance(model, PeftModel):
        refuse_without_adapter(model)
    is_looked_up = layers is not None
    if layers is None:
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    others = sorted(set(model.peft_config) - {ADAPTER_NAME})
    if ADAPTER_NAME not in model.peft_config:
        raise AdapterConfigError(
            f"Cannot store the adapter: it is called {name_some(others) or 'nothing'}, and files hold one called "
            f"'{ADAPTER_NAME}' alone. Make embeddings with the adapter that you want to store."
        )
    refuse_without_adapter(model)
    if others:
        reason, remedy = f"is one of several, beside {name_some(others)}, and files hold one", "delete_adapter(name)"
    elif any(layer.merged for layer in layers):
        reason, remedy = "is merged into the base, onto which a load would add it once more", "unmerge_adapter()"
    elif model._adapters_disabled or any(layer.disable_adapters for layer in layers):
        reason = "is switched off, and a load would switch it on"
        remedy = "leaving disable_adapter(), or enable_adapter_layers()"
    elif not is_looked_up and (rescaled := _rescaled(model)):
        reason = f"is scaled in {name_some(rescaled)} otherwise than its config says, from which a load would scale it"
        remedy = f"set_scale('{ADAPTER_NAME}', 1) of its layers, or set lora_alpha in the config of new embeddings"
    else:
        return
    raise AdapterConfigError(
        f"Cannot store the {describe(model.peft_config[ADAPTER_NAME])} adapter as it is: it {reason}. The model would "
        f"predict something else after loading. Undo that on embeddings.model, here by {remedy}."
    )


def _rescaled(model: PeftModel) -> list[str]:
    """Return the names of LoRA's layers whose scale is not what PEFT makes of their config."""
    config = model.peft_config[ADAPTER_NAME]
    return [
        name
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, LoraLayer)
        and ADAPTER_NAME in layer.scaling
        # Scales are tensors of float32 where adapters are swapped in a compiled model.
        and not math.isclose(float(layer.scaling[ADAPTER_NAME]), _scale(config, name, layer), rel_tol=1e-5)
    ]


def _scale(config: Any, name: str, layer: LoraLayer) -> float:
    """Return the scale that PEFT gives a layer of LoRA when it adds it."""
    alpha, rank = config.lora_alpha, layer.r[ADAPTER_NAME]
    if methods.method_traits(config).masks_ranks:
        return alpha if alpha > 0 else rank
    if config.alpha_pattern:
        # Layers within layers, and those around parameters, are looked up by other names than they have.
        is_renamed = isinstance(layer, ParamWrapper) or "base_layer" in name.split(".")
        alpha = layer.lora_alpha[ADAPTER_NAME] if is_renamed else configs.value_for(config.alpha_pattern, name, alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


def explain_injection(model: PreTrainedModel, config: PeftConfig, error: Exception) -> AdapterConfigError:
    """Return what PEFT raised while it added the adapter as an error with what would fit."""
    targets = getattr(config, "target_modules", None)
    targets = sorted(targets) if isinstance(targets, set) else targets
    is_unmatched = "target" in str(error).lower() and "found" in str(error).lower()
    chosen = getattr(config, "layers_to_transform", None)
    if is_unmatched and chosen is not None and isinstance(targets, list) and {*targets} & {*names_to_target(model)}:
        return AdapterConfigError(
            f"Cannot add a {method_name(config)} adapter to {type(model).__name__}: in the layers that "
            f"layers_to_transform={chosen!r} chooses it has no {name_some(targets, limit=12)}. Layers have numbers "
            f"from 0, and it has {getattr(model.config, 'num_hidden_layers', 'fewer')}. Choose others."
        )
    if is_unmatched:
        return AdapterConfigError(
            f"Cannot add a {method_name(config)} adapter to {type(model).__name__}: its target_modules {targets!r} "
            f"match no module that it can adapt. Its layers are called {name_some(names_to_target(model), limit=12)}. "
            f"Pass some of these{_or_all_linear(model)}."
        )
    if targets is None and "specify `target_modules`" in str(error):
        return AdapterConfigError(
            f"Cannot add a {method_name(config)} adapter to {type(model).__name__}: its config names no "
            f"target_modules. PEFT has no default for the model type '{model.config.model_type}'. Pass "
            f"target_modules={names_to_target(model)}{_or_all_linear(model)}."
        )
    needs_gpu = next((each.needs_gpu for each in methods.all_traits(config) if each.needs_gpu), None)
    if needs_gpu is not None and not torch.cuda.is_available():
        return unsupported(model, config, needs_gpu)
    is_lora = methods.method_traits(config).adds_product
    other = "another method" if is_lora else "another method, LoRA for example,"
    return UnsupportedMethodError(
        f"Cannot use this {method_name(config)} config on {type(model).__name__}. The reason: PEFT says: "
        f"{str(error).rstrip('.')}. Correct the config, or choose {other} or another base model."
    )


def linear_names(model: torch.nn.Module) -> list[str]:
    """Return what the linear layers are called, poolers apart, by the last parts of their names."""
    return _last_parts(model, lambda layer: isinstance(layer, torch.nn.Linear | Conv1D))


def names_to_target(model: torch.nn.Module) -> list[str]:
    """Return what the layers are called that an adapter fits: linear ones, or convolutions if there are none."""
    return linear_names(model) or _last_parts(model, lambda layer: isinstance(layer, torch.nn.Conv1d))


def _last_parts(model: torch.nn.Module, is_meant: Callable[[torch.nn.Module], bool]) -> list[str]:
    named = ((name, module) for name, module in model.named_modules() if not keys.is_unread(name))
    layers = ((name, m.get_base_layer() if isinstance(m, BaseTunerLayer) else m) for name, m in named)
    return sorted({name.removesuffix(".base_layer").rpartition(".")[2] for name, m in layers if is_meant(m)})


def _or_all_linear(model: torch.nn.Module) -> str:
    return ', or target_modules="all-linear"' if linear_names(model) else ""


def unsupported(model: PreTrainedModel, config: PeftConfig, reason: str) -> UnsupportedMethodError:
    """Return the error that says why the method cannot work on this model."""
    return UnsupportedMethodError(
        f"Cannot use {method_name(config)} on {type(model).__name__}. The reason: {reason.rstrip('.')}. "
        "Choose another method, LoRA for example, or another base model."
    )
