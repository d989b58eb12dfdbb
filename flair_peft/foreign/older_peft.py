"""Adapters that older versions of PEFT wrote: settings with which the installed one computes the same, or an error.

Which version wrote an adapter, the fields of its config tell: each version adds some, and PEFT writes all of them.
Since 0.18, ``peft_version`` says it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from peft import PeftConfig

from flair_peft.adapter import config as configs
from flair_peft.errors import AdapterConfigError, UnsupportedMethodError, name_some

log = logging.getLogger("flair_peft")

Settings = Mapping[str, Any]

# A field that the version which changed the computation added, or ``peft_version``.
_SINCE_LOKR_SCALES, _SINCE_SEEDED_ADAMSS, _SINCE_PACKED_OFT = "rank_dropout_scale", "random_seed", "use_cayley_neumann"


def bring_up_to_date(settings: Settings, source: str) -> Settings:
    """Return the settings with which the installed PEFT computes what the version that wrote them did.

    Raises:
        UnsupportedMethodError: no settings do that; the message names the versions that can.
    """
    method = settings.get("peft_type")
    change = {"ADAMSS": _check_adamss, "BONE": _miss_for_bone, "LOKR": _unscaled_lokr, "OFT": _check_oft}.get(
        str(method)
    )
    return settings if change is None else change(settings, source)


def rename(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of an adapter under the names that the installed PEFT has for them."""
    return {name.replace(".bone_block", ".miss_block"): tensor for name, tensor in tensors.items()}


def refuse_other_alpha(config: PeftConfig, settings: Settings, names: Iterable[str]) -> None:
    """Return unless modules had, or may have had, another alpha when the adapter was trained.

    PEFT before 0.15 looked for the keys of ``alpha_pattern`` in another way, and before 0.14 only after those of
    ``rank_pattern``, the first of which decided both. The names are those of the source class.

    Raises:
        AdapterConfigError: they had.
    """
    alphas, ranks = getattr(config, "alpha_pattern", None), getattr(config, "rank_pattern", None) or {}
    if not alphas or "peft_version" in settings or "trainable_token_indices" in settings:
        return
    looked_up = list(alphas) if "exclude_modules" in settings else [*ranks, *alphas]
    unlike = [name for name in names if alphas.get(_older_key(looked_up, name)) != configs.value_for(alphas, name)]
    if unlike:
        raise AdapterConfigError(
            f"Cannot tell the alpha of {name_some(unlike, 3)}: an older PEFT wrote the adapter, and those before 0.15 "
            "read its alpha_pattern in another way than the installed one. The adapter may have been trained with "
            "another scale. Change the adapter_config.json, so that each key of alpha_pattern is the end of a "
            "module's name, and no key of rank_pattern means the same modules."
        )


def _older_key(pattern: Iterable[str], name: str) -> str | None:
    return next((key for key in pattern if re.match(rf".*\.{key}$", name)), None)


def is_lost_bias(config: PeftConfig, missing: Collection[str]) -> bool:
    """Whether all that a file lacks are biases that were trained: PEFT 0.7 to 0.20 did not store them."""
    trains_own = str(getattr(config, "bias", "none")).endswith("_only")
    return trains_own and bool(missing) and all(name.endswith("base_layer.bias") for name in missing)


def _unscaled_lokr(settings: Settings, source: str) -> Settings:
    if _SINCE_LOKR_SCALES in settings or "peft_version" in settings or "r" not in settings:
        return settings
    log.info("'%s': PEFT before 0.14 wrote this LoKr adapter and did not scale it by alpha, nor is it here.", source)
    return {**settings, "alpha": settings["r"], "alpha_pattern": dict(settings.get("rank_pattern") or {})}


def _miss_for_bone(settings: Settings, source: str) -> Settings:
    log.info("'%s' is a BONE adapter: PEFT 0.21 computes the same under the name of MiSS.", source)
    bias = {"Bone_only": "MiSS_only"}.get(settings.get("bias", "none"), settings.get("bias", "none"))
    return {**settings, "peft_type": "MISS", "bias": bias}


def _check_oft(settings: Settings, source: str) -> Settings:
    if _SINCE_PACKED_OFT not in settings and "peft_version" not in settings:
        raise _refused(settings, source, "0.15 and before", "stored and applied other matrices")
    takes_series = settings.get("use_cayley_neumann") and int(settings.get("num_cayley_neumann_terms") or 0) > 2
    if takes_series and "peft_version" not in settings:
        raise _refused(settings, source, "0.16 and 0.17", "ended the Cayley-Neumann series with another term")
    return settings


def _check_adamss(settings: Settings, source: str) -> Settings:
    if _SINCE_SEEDED_ADAMSS not in settings:
        raise _refused(settings, source, "0.19", "drew the subspaces without a seed, and its files do not hold them")
    return settings


def _refused(settings: Settings, source: str, versions: str, difference: str) -> UnsupportedMethodError:
    return UnsupportedMethodError(
        f"Cannot use the {settings['peft_type']} adapter '{source}': PEFT {versions} wrote it, which {difference}. The "
        "installed PEFT would compute something else from it. Train the adapter again, or merge it into its base with "
        "the PEFT that wrote it and use that as a base."
    )
