"""What a method of PEFT is and does, as its config says."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_NAME = "default"

# Methods that put rows of their own in front of the sentence's rows.
PREPENDING = frozenset({"PROMPT_TUNING", "P_TUNING"})

# Methods that put past key values in front of the sentence, so that its positions start later.
PREFIXING = frozenset({"PREFIX_TUNING", "CARTRIDGE"})

# Methods that decompose the base's weights when they are added and keep results that no state dict holds.
# Trained tokens keep the rows that they replace, to put them back after merging.
_DERIVED_FROM_BASE = frozenset({"ADAMSS", "FROD", "OSF", "PSOFT", "SUPERTUNING", "TINYLORA", "TRAINABLE_TOKENS"})

# Initialisations of LoRA that leave the base's weights as they are; all others take something out of them.
_INITS_BESIDE_BASE = frozenset({True, False, "gaussian", "eva", "orthogonal"})

# Methods whose layers take the name of an adapter for each sentence of a batch.
_MIXABLE = frozenset({"LORA", "HIRA", "ROAD", "GLORA"})


# Learning rates at which AdamW trained these methods best on real text, and that of LoRA for all others.
# resources/benchmarks/quality.md has the measurements.
_RATES = {"IA3": 3e-2, "PROMPT_TUNING": 3e-2, "P_TUNING": 3e-2, "PREFIX_TUNING": 1e-2, "CARTRIDGE": 1e-2}
_RATE_OF_LORA = 1e-3

HEAD_RATE = 1e-2
"""A learning rate to try for a head, which starts at random on top of an adapter."""

# Methods that train matrices as large as those of the base.
_FULL_SIZE = frozenset({"OSF"})


def method_name(config: PeftConfig) -> str:
    """Return PEFT's name of the method, such as ``"LORA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def describe(config: PeftConfig) -> str:
    """Return the method with the setting that shapes its tensors, such as ``"LORA (r=8)"``."""
    shaping = [name for name in ("r", "num_virtual_tokens") if isinstance(getattr(config, name, None), int)]
    return method_name(config) + "".join(f" ({name}={getattr(config, name)})" for name in shaping[:1])


def is_derived_from_base(config: PeftConfig) -> bool:
    """Whether the method keeps results computed from the base's weights, so that these must be there before it."""
    trains_tokens = bool(getattr(config, "trainable_token_indices", None))
    return method_name(config) in _DERIVED_FROM_BASE or trains_tokens


def init_rewrites_base(init: object) -> bool:
    """Whether this value of ``init_lora_weights`` takes something out of the base's weights."""
    return init not in _INITS_BESIDE_BASE


def rewrites_base(config: PeftConfig) -> bool:
    """Whether adding the adapter, or filling it, may change frozen weights of the base."""
    return (
        init_rewrites_base(getattr(config, "init_lora_weights", True))
        or bool(getattr(config, "kasa_config", None))
        or bool(getattr(config, "layer_replication", None))
        or is_derived_from_base(config)
    )


def virtual_tokens(config: PeftConfig) -> int:
    """Return how many positions of the transformer the method takes from each sentence."""
    takes_positions = method_name(config) in PREPENDING | PREFIXING
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if takes_positions else 0


def preparation(config: PeftConfig | None) -> dict[str, bool]:
    """Return what ``peft.prepare_model_for_kbit_training`` is to do unless the user says something else."""
    # transformers passes no past key values, which carry the prefix, through a checkpointed layer.
    return {"use_gradient_checkpointing": config is None or method_name(config) not in PREFIXING}


def needs_step_hook(config: PeftConfig) -> bool:
    """Whether the method must be told after each optimiser step, so that it can move its rank budget."""
    uses_asa = method_name(config) == "ADAMSS" and bool(getattr(config, "use_asa", False))
    return method_name(config) == "ADALORA" or uses_asa


def rate_to_try(config: PeftConfig, rate: float) -> float | None:
    """Return a learning rate to try, where an adapter hardly learns with this one; ``None`` where it may.

    Flair's 5e-5 is made for whole transformers; it is a twentieth of what suits LoRA.
    """
    suited = _RATES.get(method_name(config), _RATE_OF_LORA)
    return suited if 20 * rate < 1.001 * suited and method_name(config) not in _FULL_SIZE else None


def depends_on_batch(config: PeftConfig) -> bool:
    """Whether the vectors of a sentence depend on the sentences that are embedded together with it."""
    return method_name(config) == "LILY"


def why_not_mixed(config: PeftConfig) -> str | None:
    """Return why sentences of this adapter cannot share a forward pass with those of others; ``None`` if they may."""
    if method_name(config) not in _MIXABLE:
        return "PEFT mixes no adapters of this method in one batch"
    reasons = {
        "bias": "it changes biases of the base",
        "use_dora": "PEFT mixes no DoRA in one batch",
        "modules_to_save": "it replaces modules of the base",
        "trainable_token_indices": "it replaces rows of the base",
        "target_parameters": "it adapts bare parameters",
    }
    found = (reason for name, reason in reasons.items() if getattr(config, name, None) not in (None, False, "none", []))
    return next(found, None)


def keeps_graph(config: PeftConfig) -> bool:
    """Whether modules of the adapter keep tensors of their last forward pass, which torch does not copy."""
    return method_name(config) == "SHADOW" or bool(getattr(config, "monteclora_config", None))


def without_costly_init(config: PeftConfig) -> PeftConfig:
    """Return a copy whose initialisation neither reads base weights nor data; tensors have the same shapes."""
    fields = {field.name for field in dataclasses.fields(config)}
    skeleton = copy.deepcopy(config)
    skeleton.base_model_name_or_path = None  # PEFT warns of a base under another name; loads compare its weights
    if isinstance(getattr(config, "init_lora_weights", None), str):
        skeleton.init_lora_weights = True
    if method_name(config) == "ADALORA":
        skeleton.rank_pattern = None  # says which ranks are masked, not how many there are
    if "prompt_tuning_init" in fields:
        from peft.tuners.prompt_tuning import PromptTuningInit

        skeleton.prompt_tuning_init = PromptTuningInit.RANDOM
    return skeleton
