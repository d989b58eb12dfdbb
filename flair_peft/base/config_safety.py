"""What the config of a base may not have transformers do: count without end, fetch a model, run code or a kernel."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from flair_peft.base import weight_files
from flair_peft.base.unusable import UNUSABLE
from flair_peft.errors import BaseModelNotFoundError, UnsafeFileError

log = logging.getLogger("flair_peft")

# What transformers writes out one by one when it reads a config.
_COUNTED = re.compile(r"(layers?|labels|blocks|groups|experts)$")
_MANY = 1_000_000


def refuse_endless(source: str, kwargs: Mapping[str, Any]) -> None:
    """Return if a config counts nothing that transformers would write out when it reads the config, for ever.

    Raises:
        BaseModelNotFoundError: it counts as many layers or labels as no model has.
    """
    try:
        settings, _ = PretrainedConfig.get_config_dict(source, **weight_files.reaching(kwargs))
    except UNUSABLE:
        return  # who reads it says what is wrong with it
    refuse_many(settings, source)


def refuse_many(settings: Any, source: str) -> None:
    """Return if a config, as plain values, counts no more layers or labels than a model can have."""
    for name, value in settings.items() if isinstance(settings, Mapping) else enumerate(settings):
        if isinstance(value, int) and value > _MANY and _COUNTED.search(str(name)):
            raise BaseModelNotFoundError(
                f"Cannot use the base model '{source}': its config asks for {value:,} {name}. No model has so many, "
                "and writing them out would not end. Correct the config, or pass another base model."
            )
        if isinstance(value, Mapping | list):
            refuse_many(value, source)


def sanitise_(config: PretrainedConfig, kwargs: Mapping[str, Any] | None = None) -> PretrainedConfig:
    """Return the config; it and those inside it have nothing fetched and run, unless the user asked for that.

    A config can name a kernel as its attention (CVE-2026-4372), and code or another model inside it. It is modified in
    place.

    Raises:
        UnsafeFileError: it has another model fetched as a part of it.
    """
    kwargs = kwargs or {}
    asked = set(_attention_in(kwargs))
    for place, part in enumerate(_parts(config)):
        settings = vars(part) if isinstance(part, PretrainedConfig) else part
        if not kwargs.get("trust_remote_code"):
            _refuse_other_model(settings, config)
            if place:
                settings.pop("auto_map", None)  # of the whole model, the classes of transformers ask what the user says
        for name in filter(names_attention, list(settings)):
            if not asked.issuperset(_texts(settings[name])) and available_attention(settings[name]) is None:
                settings[name] = None
    return config


def _parts(value: Any) -> Iterator[Any]:
    """Yield the configs and dictionaries of which a config consists, itself first."""
    settings = vars(value) if isinstance(value, PretrainedConfig) else value
    if isinstance(settings, dict):
        yield value
    inner = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list | tuple) else ()
    for part in inner:
        yield from _parts(part)


def _refuse_other_model(settings: Mapping[Any, Any], config: PretrainedConfig) -> None:
    if isinstance(settings.get("backbone"), str):
        raise UnsafeFileError(
            f"Cannot use the config of '{config.name_or_path}': it names another model, '{settings['backbone']}', as "
            "its backbone. transformers would fetch that from the Hub, and ask whether its code may run. Use a base "
            "model that has no such part, or pass trust_remote_code=True if you trust both."
        )


def _attention_in(kwargs: Any) -> Iterator[str]:
    """Yield what arguments of the user name as attention, wherever in them."""
    for name, value in kwargs.items() if isinstance(kwargs, Mapping) else ():
        yield from _texts(value) if names_attention(name) else _attention_in(value)


def _texts(value: Any) -> Iterator[str]:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    for part in [value, *parts]:
        if isinstance(part, str):
            yield part


def names_attention(name: Any) -> bool:
    """Whether a setting of a transformer's config says how attention is computed."""
    return "attn_implementation" in str(name)


def is_fetched(attention: Any) -> bool:
    """Whether transformers would fetch code for an attention, or for one of several.

    It calls kernels on the Hub "owner/kernel", and takes one for FlashAttention where that is not installed.
    """
    return any("/" in text or _lacks_library(text) for text in _texts(attention))


def _lacks_library(attention: str) -> bool:
    is_here = is_flash_attn_3_available() if attention.endswith("3") else is_flash_attn_2_available()
    return attention.startswith("flash_attention") and not is_here


def available_attention(implementation: Any) -> Any:
    """Return the attention implementation, or ``None`` for the default where it is not part of transformers here."""
    if is_fetched(implementation):
        log.warning("The attention '%s' is not here: the default is used, which rounds differently.", implementation)
        return None
    return implementation
