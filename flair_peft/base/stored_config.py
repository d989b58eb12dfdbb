"""The config of a base as files hold it: the values that it had when it was stored, whatever its constructor does."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import transformers
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from flair_peft.base import config_versions
from flair_peft.base.config_versions import Settings


def from_stored(described: Mapping[str, Any], config_class: Any, *, attention: Any, source: str) -> PretrainedConfig:
    """Return the config that a file holds, with the values that it had when it was stored.

    Constructors derive some values from others: bidirectional Gemma 3 halves its window whenever it is made.

    Raises:
        BaseModelNotFoundError: it was stored under a newer transformers, with settings that are not known here.
    """
    described = dict(described)
    if config_class.model_type in CONFIG_MAPPING:
        if config_versions.is_newer(config_versions.version_of(described)):
            described = config_versions.in_own_words(described, source)
        else:  # what was not read when the model was trained
            unread = {"layer_types", "rope_parameters"} - config_versions.known_settings(config_class)
            described = {name: value for name, value in described.items() if name not in unread}
    config = _made(config_class, described, attention)
    _restore_(config, described, is_own=described.get("transformers_version") == transformers.__version__)
    return config


def _made(config_class: Any, described: Settings, attention: Any) -> PretrainedConfig:
    try:
        # from_dict reads the attention implementation from its keyword arguments only.
        return config_class.from_dict(copy.deepcopy(described), attn_implementation=attention)
    except (AttributeError, KeyError, TypeError, ValueError):
        # DBRX, for one, takes no dictionary that it wrote for the configs in it.
        inner = config_versions.inner_configs(config_class)
        plain = {name: value for name, value in described.items() if name not in inner}
        if len(plain) == len(described):
            raise
        return config_class.from_dict(copy.deepcopy(plain), attn_implementation=attention)


def _restore_(config: PretrainedConfig, stored: Mapping[str, Any], *, is_own: bool) -> None:
    """Give the config the stored values where it has others, in place.

    Args:
        config: that was made of the stored values.
        stored: as plain values.
        is_own: whether this very version stored them. Others may have other names for the same, which constructors
            translate once and for all: then only what changes whenever a config is made is set back.
    """
    own = _plain(config)
    for name, value in stored.items():
        part = getattr(config, name, None)
        if isinstance(part, PretrainedConfig) and isinstance(value, Mapping):
            _restore_(part, value, is_own=is_own)
            continue
        is_other = name in own and name not in _OF_ORIGIN and own[name] != _as_json(value)
        if is_other and (is_own or name in changing(config)):
            setattr(config, name, copy.deepcopy(value))


def changing(config: PretrainedConfig) -> frozenset[str]:
    """Return the settings that are others whenever the config is made of its own dictionary."""
    own, again = _plain(config), _plain(_made(type(config), config.to_dict(), None))
    return frozenset(name for name in {*own, *again} if own.get(name) != again.get(name))


# What does not change the model, or is read in another form than it is stored in.
_OF_ORIGIN = frozenset(
    {"_name_or_path", "architectures", "dtype", "id2label", "label2id", "model_type", "transformers_version"}
)


def _plain(config: PretrainedConfig) -> Settings:
    return {name: _as_json(value) for name, value in config.to_dict().items()}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
