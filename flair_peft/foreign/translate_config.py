"""Translate a PEFT config that was written for a class around a base model to the names of the bare model.

Settings that mean the same there stay as they are written; the others are replaced by the names of modules. What they
meant is read off the names that the modules have in the source class: those of the bare model behind its prefix.
"""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, methods
from flair_peft.errors import AdapterConfigError, BaseMismatchError, UnsupportedMethodError, name_some
from flair_peft.foreign import source_classes

log = logging.getLogger("flair_peft")

Tensors = Mapping[str, torch.Tensor]

PROMPT = "prompt_embeddings"

# Sizes of the rows that a prompt's config holds.
_PROMPT_SIZES = ("num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers")


def trainable_prompt(
    config: Any, tensors: Tensors
) -> tuple[PeftConfig, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return config and virtual tokens in the form that can be trained on, and what belongs to a decoder.

    PEFT stores what a prompt encoder gave, not the encoder. The same rows as plain parameters compute the same.
    """
    config, kept, outside = copy.deepcopy(config), dict(tensors), dict[str, torch.Tensor]()
    count, rows = config.num_virtual_tokens, kept.get(PROMPT)
    if rows is not None and methods.prepends_rows(config) and config.num_transformer_submodules == 2:
        kept[PROMPT], outside[f"decoder.{PROMPT}"] = rows[:count], rows[count:]
        config.num_transformer_submodules = 1
    goes_on_as = methods.method_traits(config).goes_on_as
    if goes_on_as:
        log.info("P-tuning stores its virtual tokens and not their encoder: they are trained on as prompt tuning.")
        plain = PEFT_TYPE_TO_CONFIG_MAPPING[goes_on_as]
        config = plain(task_type=config.task_type, **{name: getattr(config, name) for name in _PROMPT_SIZES})
    vars(config).update(methods.method_traits(config).start)
    return config, kept, outside


def refuse_drawn_together(
    config: Any, base_config: PretrainedConfig, settings: Mapping[str, Any], modules: Collection[str], tensors: Tensors
) -> None:
    """Return unless the method computes something else without the modules that it adapted beside the transformer.

    The config has the names of its source class; ``modules`` are all of the bare model.

    Raises:
        UnsupportedMethodError: it does, or nothing tells which modules those were.
    """
    method = methods.method_traits(config)
    if not method.is_drawn_together or any(method.drawn in name.split(".") for name in tensors):
        return
    beside: set[str] = set()
    classes = source_classes.possible_classes(base_config, settings)
    for model in filter(None, (source_classes.build_source(cls, base_config) for cls in classes)):
        rules = source_classes.prefixes(base_config, model)
        adapted = {name for name, module in model.named_modules() if _is_adapted(config, name, module)}
        own = {name: source_classes.bare_name(name, rules, modules) for name in adapted}
        beside.update(name for name, bare in own.items() if bare is None)
        meant = {bare for bare in own.values() if bare is not None}
        beside.update(meant ^ {name for name in modules if name in meant or _selects(config, name)})
    if beside or not classes:
        raise drawn_together(methods.method_name(config), beside)


def drawn_together(method: str, beside: Collection[str]) -> UnsupportedMethodError:
    """Return the error for modules that were adapted together with those of the transformer."""
    named = f" ({name_some(beside, limit=3)})" if beside else ""
    return UnsupportedMethodError(
        f"Cannot use this {method} adapter: it has one random part for all modules that it adapts, and was, or may "
        f"have been, trained together with modules that embeddings do not have{named}. Without these the random part "
        "is another one, and the file does not hold it as a smaller model needs it. Train the adapter with targets "
        "that select modules of the transformer alone, on a class that the adapter's config names."
    )


def _is_adapted(config: Any, name: str, module: torch.nn.Module) -> bool:
    is_linear = isinstance(module, (torch.nn.Linear, Conv1D))
    if config.target_modules == "all-linear":
        return is_linear
    return (is_linear or isinstance(module, torch.nn.Embedding)) and _selects(config, name)


def resolve_(config: Any, modules: list[str], prefix: str, placed: Tensors) -> None:
    """Let the config select in the bare model what it selected in the source class, in place.

    Settings that mean the same in both stay as they are written.

    Raises:
        BaseMismatchError: the config selects modules that the file has no tensors for.
    """
    of_method = (name for name in placed if keys.has_container(name) and ".token_adapter." not in name)
    method = methods.method_traits(config)
    # What counts layers means the same in both.
    adapted = set() if method.counts_layers else {keys.carrier(name) for name in of_method} - {""}
    original = copy.deepcopy(config)
    _resolve_saved_(config, modules, prefix, placed)
    _resolve_tokens_(config, prefix, placed)
    if adapted and hasattr(config, "target_modules") and not getattr(config, "target_parameters", None):
        _resolve_targets_(config, original, modules, prefix, adapted)
    for setting in configs.PATTERNS:
        if getattr(config, setting, None) and method.has_module_patterns:
            _refuse_rivals(getattr(config, setting), setting, prefix, adapted)
            _resolve_pattern_(config, setting, prefix, adapted)
    if getattr(config, "feedforward_modules", None) is not None:
        _resolve_feedforward_(config, original.target_modules, prefix, adapted)


def _resolve_saved_(config: Any, modules: list[str], prefix: str, placed: Tensors) -> None:
    entries = getattr(config, "modules_to_save", None)
    if not entries:
        return
    weights = {keys.plain_key(name).rpartition(".")[0] for name in placed if not keys.has_container(name)}
    meant = [name for name in modules if any(f"{prefix}{name}".endswith(entry) for entry in entries)]
    saved = [name for name in meant if any(weight == name or weight.startswith(f"{name}.") for weight in weights)]
    kept = [entry for entry in entries if any(name.endswith(entry) for name in saved)]
    again = [name for name in modules if any(name.endswith(entry) for entry in kept)]
    # PEFT compares the ends of names, and would find others under a name that they end with: its parts stand for it.
    exact = {part for name in saved for part in _unmistakable(name, modules, weights)}
    config.modules_to_save = (kept if again == saved else sorted(exact)) or None


def _unmistakable(name: str, modules: Collection[str], weights: Collection[str]) -> list[str]:
    if not any(other != name and other.endswith(name) for other in modules):
        return [name]
    return [weight for weight in weights if weight == name or weight.startswith(f"{name}.")]


def _resolve_tokens_(config: Any, prefix: str, placed: Tensors) -> None:
    indices = getattr(config, "trainable_token_indices", None)
    if not isinstance(indices, dict):
        return
    carriers = {keys.carrier(name) for name in placed if "trainable_tokens_delta" in name}
    named = {name.removeprefix(prefix): rows for name, rows in indices.items()}
    kept = {name: rows for name, rows in named.items() if any(carrier.endswith(name) for carrier in carriers)}
    config.trainable_token_indices = kept or None


def _resolve_targets_(config: Any, original: Any, modules: list[str], prefix: str, adapted: set[str]) -> None:
    if not isinstance(original.target_modules, str) or original.target_modules != "all-linear":
        wanted = {name for name in modules if _selects(original, f"{prefix}{name}")}
        lacking = sorted(name for name in wanted - adapted if not keys.is_unread(name))
        if lacking:
            raise BaseMismatchError(
                f"Cannot use this base model for the adapter: the adapter's config selects {len(lacking)} modules of "
                f"it that the file has no tensors for: {name_some(lacking)}. The base has more layers than the one "
                "that it was trained on, or the file is incomplete. Pass base_model= with that model."
            )
    if {name for name in modules if _selects(config, name)} == adapted:
        return
    _name_targets_(config, adapted)


def _name_targets_(config: Any, adapted: Collection[str]) -> None:
    config.target_modules = sorted(adapted)
    for setting in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, setting):
            vars(config)[setting] = None


def name_modules_(config: Any, adapted: Collection[str]) -> None:
    """Let the config name each module that it adapts, in place, if PEFT could not read it as it is.

    PEFT fills in what a config leaves open when it adds the adapter, and may refuse that when it reads it again.
    """
    try:
        type(config)(**config.to_dict())
    except ValueError:
        _name_targets_(config, adapted)
        if getattr(config, "feedforward_modules", None) is not None:
            config.feedforward_modules = sorted(filter(_finding_feedforward(config), adapted))


def _selects(config: Any, name: str) -> bool:
    return config.target_modules is not None and bool(check_target_module_exists(config, name))


def _refuse_rivals(pattern: Mapping[str, Any], setting: str, prefix: str, adapted: Collection[str]) -> None:
    unclear = configs.rivals(pattern, sorted(prefix + name for name in adapted))
    if unclear:
        raise AdapterConfigError(
            f"Cannot tell the {setting} of the adapter: two keys of it give {name_some(unclear, 3)} different values. "
            "PEFT takes the first that matches, and its files sort the keys, so that the order of the training is "
            "lost. Change the adapter_config.json, so that one key matches each module."
        )


def _resolve_pattern_(config: Any, setting: str, prefix: str, adapted: Collection[str]) -> None:
    pattern = getattr(config, setting)
    meant = {name: configs.value_for(pattern, prefix + name) for name in sorted(adapted)}
    if any(configs.value_for(pattern, name) != wanted for name, wanted in meant.items()):
        exact = {f"^{re.escape(name)}": wanted for name, wanted in meant.items() if wanted is not None}
    else:
        used = {get_pattern_key(pattern.keys(), name) for name in adapted}
        exact = {key: pattern[key] for key in pattern if key in used}  # PEFT warns of those of a head
    vars(config)[setting] = exact


def take_ranks_(config: Any, prefix: str, placed: Tensors) -> dict[str, list[bool]] | None:
    """Return the ranks that AdaLoRA left, by the names of the bare model, and take them out of the config.

    A new adapter has all ranks; PEFT takes the names of matrices in this pattern for those of modules, and warns.
    """
    if not methods.method_traits(config).masks_ranks or not config.rank_pattern:
        return None
    ranks = {name.removeprefix(prefix): chosen for name, chosen in config.rank_pattern.items()}
    config.rank_pattern = None
    return {name: chosen for name, chosen in ranks.items() if name in placed}


def _resolve_feedforward_(config: Any, targets: Any, prefix: str, adapted: Collection[str]) -> None:
    is_feedforward = _finding_feedforward(config)
    meant = sorted(name for name in adapted if is_feedforward(prefix + name))
    is_same = meant == sorted(filter(is_feedforward, adapted)) and config.target_modules == targets
    if not is_same:
        # PEFT wants the names of these among those, when it reads the config again.
        config.target_modules, config.feedforward_modules = sorted(adapted), meant


def _finding_feedforward(config: Any) -> Callable[[str], bool]:
    given = config.feedforward_modules
    return lambda name: bool(re.fullmatch(given, name)) if isinstance(given, str) else any(map(name.endswith, given))
