"""LoRA that changes what a model predicts: the config that most tests give to embeddings."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig


def lora(**options: Any) -> LoraConfig:
    """Return LoRA of rank 4 on BERT's queries and values, whose B is random and whose scale is 3.

    Args:
        options: of ``LoraConfig``; ``target_modules=None`` leaves the choice to PEFT, by architecture.

    Raises:
        AssertionError: the adapter would start as a no-op, or its scale would be 1: most tests of an adapter pass on
            broken code then.
    """
    settings = {"r": 4, "lora_alpha": 12, "init_lora_weights": False, "target_modules": ["query", "value"], **options}
    config = LoraConfig(**settings)
    assert config.init_lora_weights is not True, "an adapter whose B is 0 changes nothing"
    assert config.lora_alpha != config.r, "a scale of 1 hides that it is missing"
    return config
