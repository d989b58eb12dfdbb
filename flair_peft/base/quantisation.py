"""Quantised bases: what quantised them, how files say so, and what training on them needs."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft import prepare_model_for_kbit_training
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PretrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from flair_peft.errors import AdapterConfigError, ModelFileError, name_some

# torchao's ways to quantise weights alone: a gradient passes those that quantise what goes in as well by none.
_WEIGHT_ONLY = frozenset({"Int8WeightOnlyConfig", "Float8WeightOnlyConfig", "IntxWeightOnlyConfig"})

# What torchao finds by its name for the fields of these.
_GRANULARITIES = frozenset({"PerRow", "PerTensor", "PerGroup", "PerAxis"})
_CHOICES = frozenset({"MappingType", "IntxPackingFormat", "IntxChooseQParamsAlgorithm", "Float8PackingFormat"})

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
        ModelFileError: they are damaged, or those of an engine that is not installed, or whose settings no file holds.
    """
    if str(stored.get("quant_method")) not in _STORED_ENGINES:
        raise ModelFileError(
            f"Cannot quantise the base model: the file asks for {stored.get('quant_method')!r}, and files hold the "
            f"settings of {name_some(sorted(_STORED_ENGINES))}. It is damaged or was not written by flair_peft."
        )
    wanted = str(stored["quant_method"])
    if importlib.util.find_spec(wanted) is None:
        raise ModelFileError(
            f"Cannot quantise the base model: it was trained on one that {wanted} quantised, and {wanted} is not "
            f"installed. Weights that are not quantised would predict something else. Run `pip install {wanted}`."
        )
    try:
        is_sound = _STORED_ENGINES[wanted](stored)
        settings = AutoQuantizationConfig.from_dict(copy.deepcopy(dict(stored))) if is_sound else None
    except (ValueError, TypeError, AttributeError, LookupError, AssertionError) as error:
        raise ModelFileError(
            f"Cannot quantise the base model as the file says: {type(error).__name__}: {error}. Its settings are "
            "damaged. Copy or save it again."
        ) from error
    if settings is None:
        raise ModelFileError("Cannot quantise the base model: its settings are damaged. Copy or save the file again.")
    return settings


def _is_sound_for_bitsandbytes(stored: Mapping[str, Any]) -> bool:
    dtype = getattr(torch, str(stored.get("bnb_4bit_compute_dtype", "float32")), None)
    return isinstance(dtype, torch.dtype) and _are_names(stored.get("llm_int8_skip_modules"))


def _is_sound_for_torchao(stored: Mapping[str, Any]) -> bool:
    """Whether the settings hold known names only: torchao looks up every name that it is given."""
    described = stored["quant_type"]["default"]
    is_known = described["_type"] in _WEIGHT_ONLY and all(map(_is_known, described["_data"].values()))
    return is_known and _are_names(stored.get("modules_to_not_convert"))


def _is_known(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None or isinstance(value, bool | int | float | str)
    if value["_type"] in _GRANULARITIES:
        return all(isinstance(number, int) for number in value["_data"].values())
    if value["_type"] in _CHOICES:
        return isinstance(value["_data"], str) and value["_data"].isupper()
    return value["_type"] == "torch.dtype" and isinstance(getattr(torch, value["_data"]), torch.dtype)


def _are_names(names: Any) -> bool:
    return names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))


# Engines whose settings files hold. What others need beside their settings, such as calibration data, is in no file.
_STORED_ENGINES: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
    "bitsandbytes": _is_sound_for_bitsandbytes,
    "torchao": _is_sound_for_torchao,
}


def parts_of(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return name → tensor of what a weight consists of: torchao's are made of several, all others of themselves."""
    if not is_traceable_wrapper_subclass(tensor):
        return {"": tensor}
    names, _ = tensor.__tensor_flatten__()
    return {name: getattr(tensor, name) for name in names}


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
    settings = settings_of(model.config) or {}
    kind = settings.get("quant_type") if found == "torchao" else None
    kind = kind["default"]["_type"] if isinstance(kind, dict) else kind
    if kind is not None and kind not in _WEIGHT_ONLY:
        raise AdapterConfigError(
            f"Cannot store '{name}': its base is quantised with torchao's {kind}, and files hold the settings of "
            f"{name_some(sorted(_WEIGHT_ONLY))} only. Others quantise what goes into a layer, and no gradient passes "
            "them, or were not tried. Use one of these."
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
