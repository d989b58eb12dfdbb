"""Quantised bases: what quantised them, how files say so, and what training on them needs."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from flair_peft.errors import AdapterConfigError, ModelFileError, name_some

# Engines whose settings files hold. What others need beside their settings, such as calibration data, is in no file.
_STORED_ENGINES = frozenset({"bitsandbytes"})

# What peft.prepare_model_for_kbit_training takes, as files hold it.
_PREPARING = frozenset({"use_gradient_checkpointing", "gradient_checkpointing_kwargs"})


def engine(model: torch.nn.Module | PretrainedConfig) -> str | None:
    """Return what quantised the weights, such as ``"bitsandbytes"``; ``None`` if nothing did."""
    found = getattr(model, "quantization_method", None)
    return None if found is None else str(getattr(found, "value", found))


def settings_of(config: PretrainedConfig) -> dict[str, Any] | None:
    """Return the settings by which transformers quantised the weights, as plain values."""
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return None
    described = settings if isinstance(settings, dict) else settings.to_dict()
    plain = json.loads(json.dumps(described, default=str))
    return {name: value for name, value in plain.items() if not name.startswith("_")}


def read_settings(stored: Mapping[str, Any]) -> Any:
    """Return the settings for ``from_pretrained`` that :func:`settings_of` described.

    Raises:
        ModelFileError: they are damaged, or those of an engine whose settings no file of ours holds.
    """
    if str(stored.get("quant_method")) not in _STORED_ENGINES:
        raise ModelFileError(
            f"Cannot quantise the base model: the file asks for {stored.get('quant_method')!r}, and files hold the "
            f"settings of {name_some(sorted(_STORED_ENGINES))}. It is damaged or was not written by flair_peft."
        )
    try:
        settings = AutoQuantizationConfig.from_dict(copy.deepcopy(dict(stored)))
    except (ValueError, TypeError, AttributeError, LookupError) as error:
        raise ModelFileError(
            f"Cannot quantise the base model as the file says: {type(error).__name__}: {error}. Its settings are "
            "damaged. Copy or save it again."
        ) from error
    is_dtype = isinstance(settings.bnb_4bit_compute_dtype, torch.dtype)
    skipped = settings.llm_int8_skip_modules or []
    if not is_dtype or not isinstance(skipped, list) or not all(isinstance(name, str) for name in skipped):
        raise ModelFileError("Cannot quantise the base model: its settings are damaged. Copy or save the file again.")
    return settings


def check_storable(model: PreTrainedModel, name: str) -> None:
    """Return if files can say how the base is quantised.

    Raises:
        AdapterConfigError: they cannot.
    """
    found = engine(model)
    if found is not None and found not in _STORED_ENGINES:
        raise AdapterConfigError(
            f"Cannot store '{name}': its base is quantised by {found}, and files hold the settings of "
            f"{name_some(sorted(_STORED_ENGINES))} only. Quantise it with transformers' BitsAndBytesConfig to be able "
            "to save."
        )


def prepare_(model: PreTrainedModel, kwargs: Mapping[str, Any] | None) -> PreTrainedModel:
    """Prepare a quantised model for training, in place: by PEFT's function, and by what bitsandbytes gets wrong."""
    if engine(model) is None:
        return model
    for module in model.modules():
        # bitsandbytes repacks 4-bit weights for some CPUs at the first prediction: they are rounded once more, layers
        # narrower than a block fail, and the next training step fails (bitsandbytes#2078).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
        # PEFT moves 8-bit weights on the CPU whenever DoRA looks at them; bitsandbytes loses their scales then.
        if hasattr(getattr(module, "weight", None), "SCB"):
            module.register_forward_pre_hook(_keep_scales)
    # Without a word on it, torch warns at each step that it will ask for one.
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, **(kwargs or {})}
    return prepare_model_for_kbit_training(model, **settings)


def _keep_scales(layer: Any, _inputs: Any) -> None:
    """Let an 8-bit layer that holds the scales of its weights not take those of a moved copy, which has none."""
    if layer.weight.CB is not None and layer.weight.SCB is None:
        layer.weight.CB = None


def stored_preparation(kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the part of the arguments for :func:`prepare_` that files hold: plain switches."""
    kept = {name: value for name, value in (kwargs or {}).items() if name in _PREPARING}
    nested = kept.get("gradient_checkpointing_kwargs")
    if nested is not None:
        kept["gradient_checkpointing_kwargs"] = {n: v for n, v in dict(nested).items() if isinstance(v, bool)}
    return {name: value for name, value in kept.items() if isinstance(value, bool | dict)}
