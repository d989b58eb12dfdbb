"""What an adapter trains, and what of it has no effect."""

from __future__ import annotations

import logging

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter.methods import ADAPTER_NAME

log = logging.getLogger("flair_peft")


def parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return name → parameter of all that the adapter trains."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def modules_without_effect(model: PeftModel) -> list[str]:
    """Return the names of the modules whose adapter is multiplied with zero, such as by ``lora_alpha=0``."""
    unscaled = []
    for name, module in model.named_modules():
        scales = [value for key, value in vars(module).items() if key.endswith("scaling") and isinstance(value, dict)]
        if isinstance(module, BaseTunerLayer) and any(scale.get(ADAPTER_NAME) == 0 for scale in scales):
            unscaled.append(name)
    return unscaled


def report_without_effect(model: PeftModel) -> None:
    """Say which adapters are multiplied with zero, so that they change nothing and learn nothing."""
    unscaled = modules_without_effect(model)
    if unscaled:
        log.warning(
            "The adapter has no effect on %s modules, such as '%s': its scale is zero there. It changes nothing and "
            "learns nothing. Pass an alpha (or scaling) that is not zero, such as lora_alpha=32 with LoRA.",
            len(unscaled),
            unscaled[0].removeprefix("base_model.model."),
        )
