"""Questions to a PEFT config, answered from the table of traits; importing this module imports no other library."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

from flair_peft.adapter import traits
from flair_peft.adapter.traits import MethodTraits, OptionTraits, Traits

if TYPE_CHECKING:
    from peft import PeftConfig

ADAPTER_NAME = "default"

HEAD_RATE = 1e-2
"""The learning rate that suits a head, which starts at random on top of an adapter; traits have those of methods."""

TOO_LOW, TOO_LOW_FOR_HEADS, TOO_HIGH = 10, 20, 10
"""How many times below or above what suits a learning rate is too far from it.

Flair's 5e-5, made for whole transformers, is a tenth of what suits LoRA, and an adapter hardly learns with it. Above,
LoRA found none of the names at 3e-3, and at 1e-2 no part of speech but by chance (resources/benchmarks/quality.jsonl).
"""


def method_name(config: PeftConfig) -> str:
    """Return PEFT's name of the method, such as ``"LORA"``."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def method_traits(config: PeftConfig) -> MethodTraits:
    """Return what is true of the config's method, whatever its options."""
    return traits.of_method(method_name(config))


def options(config: PeftConfig) -> list[tuple[OptionTraits, Any]]:
    """Return the options that the config switches on and that change what is true of it, each with its value."""
    chosen = [(option, getattr(config, option.setting, None)) for option in traits.OPTIONS]
    init = getattr(config, "init_lora_weights", None)
    of_init = [] if init is None else [(traits.of_init(init), init)]
    return [*((option, value) for option, value in chosen if option.is_on(value)), *of_init]


def all_traits(config: PeftConfig) -> list[Traits]:
    """Return what is true of the config's method, and then of each option that it switches on."""
    return [method_traits(config), *(option for option, _ in options(config))]


def describe(config: PeftConfig) -> str:
    """Return the method with the setting that shapes its tensors, such as ``"LORA (r=8)"``."""
    return method_name(config) + "".join(f" ({name}={getattr(config, name)})" for name in shaping(config)[:1])


def shaping(config: PeftConfig) -> list[str]:
    """Return the names of the settings of a config that shape its tensors: the rank, or the number of tokens."""
    rank = method_traits(config).from_tensors.rank
    names = ("r" if rank is None else rank[0], "num_virtual_tokens")
    return [name for name in names if isinstance(getattr(config, name, None), int)]


def is_derived_from_base(config: PeftConfig) -> bool:
    """Whether the method keeps results computed from the base's weights, so that these must be there before it."""
    return any(each.derived_from_base for each in all_traits(config))


def rewrites_base(config: PeftConfig) -> bool:
    """Whether adding the adapter, or filling it, may change frozen weights of the base, or needs them to be there."""
    return any(each.rewrites_base or each.derived_from_base for each in all_traits(config))


def reads_base(config: PeftConfig) -> bool:
    """Whether adding the adapter, or filling it, computes with the base's weights."""
    return rewrites_base(config) or any(each.reads_base for each in all_traits(config))


def virtual_tokens(config: PeftConfig) -> int:
    """Return how many positions of the transformer the method takes from each sentence."""
    takes_positions = method_traits(config).kind in (traits.PROMPT, traits.PREFIX)
    return int(getattr(config, "num_virtual_tokens", 0) or 0) if takes_positions else 0


def prepends_rows(config: PeftConfig) -> bool:
    """Whether the method puts rows of its own in front of the sentence's rows."""
    return method_traits(config).kind == traits.PROMPT


def prepends_cache(config: PeftConfig) -> bool:
    """Whether the method puts past key values in front of the sentence, so that its positions start later."""
    return method_traits(config).kind == traits.PREFIX


def preparation(config: PeftConfig | None) -> dict[str, bool]:
    """Return what ``peft.prepare_model_for_kbit_training`` is to do unless the user says something else."""
    # transformers passes no past key values, which carry the prefix, through a checkpointed layer.
    return {"use_gradient_checkpointing": config is None or not prepends_cache(config)}


def needs_step_hook(config: PeftConfig) -> bool:
    """Whether the method must be told after each optimiser step, so that it can move its rank budget."""
    method = method_traits(config)
    return method.needs_step or bool(method.needs_step_with and getattr(config, method.needs_step_with, False))


def suited_rate(config: PeftConfig) -> float | None:
    """Return the learning rate that suits the method; ``None`` where that of a whole transformer does."""
    return method_traits(config).learning_rate


def is_too_low(rate: float, suited: float | None, times: int = TOO_LOW) -> bool:
    """Whether what a rate suits hardly learns with this one."""
    return suited is not None and times * rate < 1.001 * suited


def is_too_high(rate: float, suited: float | None) -> bool:
    """Whether what a rate suits may be thrown about by this one."""
    return suited is not None and rate > 0.999 * TOO_HIGH * suited


def depends_on_batch(config: PeftConfig) -> bool:
    """Whether the vectors of a sentence depend on the sentences that are embedded together with it."""
    return method_traits(config).depends_on_batch


def own_losses(config: PeftConfig) -> dict[str, str]:
    """Return option → method of PEFT's model, of those with a loss that PEFT leaves to the training loop."""
    return {option.setting: option.own_loss for option, _ in options(config) if option.own_loss}


def why_not_mixed(config: PeftConfig) -> str | None:
    """Return why sentences of this adapter cannot share a forward pass with those of others; ``None`` if they may."""
    if not method_traits(config).is_mixable:
        return "PEFT mixes no adapters of this method in one batch"
    return next((each.not_mixed for each in all_traits(config) if each.not_mixed), None)


def keeps_graph(config: PeftConfig) -> bool:
    """Whether modules of the adapter keep tensors of their last forward pass, which torch does not copy."""
    return any(each.keeps_graph for each in all_traits(config))


def without_costly_init(config: PeftConfig) -> PeftConfig:
    """Return a copy whose initialisation neither reads base weights nor data; tensors have the same shapes."""
    fields = {field.name for field in dataclasses.fields(config)}
    skeleton = copy.deepcopy(config)
    skeleton.base_model_name_or_path = None  # PEFT warns of a base under another name; loads compare its weights
    if isinstance(getattr(config, "init_lora_weights", None), str):
        skeleton.init_lora_weights = True
    if method_traits(config).masks_ranks:
        skeleton.rank_pattern = None  # says which ranks are masked, not how many there are
    if "prompt_tuning_init" in fields:
        skeleton.prompt_tuning_init = "RANDOM"
    return skeleton
