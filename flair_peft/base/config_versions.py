"""The config of a base as another transformers wrote it, in the words of the transformers that is installed.

transformers 5 says in ``rope_parameters`` and ``layer_types`` what 4.57 reads from settings with other names. 4.57
computes without what it does not know: what can be said in its names is, and the rest is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import math
import sys
import warnings
from collections.abc import Collection, Mapping
from typing import Any

import transformers
from packaging.version import InvalidVersion, Version
from transformers import MODEL_MAPPING, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from flair_peft.errors import BaseModelNotFoundError, name_some

log = logging.getLogger("flair_peft")

Settings = dict[str, Any]

# What 4.57 calls these, by class.
_THETA = ("global_rope_theta", "rope_theta", "rotary_emb_base")
_LOCAL_THETA = ("local_rope_theta", "rope_local_base_freq")
_ROTATED_SHARE = ("partial_rotary_factor", "rotary_pct")

# Classes whose layers read `rope_scaling` although their constructors do not name it.
_SCALE_UNNAMED = frozenset(
    {
        *("bitnet", "gemma", "gemma2", "glm", "glm4", "helium", "jetmoe", "lfm2", "minimax", "ministral", "mistral"),
        *("mixtral", "t5_gemma_module", "vaultgemma"),
    }
)
# Layers with a window are never scaled in these, and have the theta of the others.
_SCALE_FULL_LAYERS_ONLY = frozenset({"olmo3"})
# Has a setting for the theta of layers with a window, and does not read it.
_ONE_THETA = frozenset({"modernbert-decoder"})
# The window of an encoder reached its last token in 5, and the one before it in 4.57.
_WINDOW_EXCLUSIVE = frozenset({"t5_gemma_module"})

# Model type → setting → setting of 4.57.
_RENAMED: dict[str, dict[str, str]] = {
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
    "xlm": {"pad_token_id": "pad_index"},
    "flaubert": {"pad_token_id": "pad_index"},
}
# Names of kinds of layers that were others in 4.57.
_LAYERS_RENAMED = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}

# Model type, or "" for all → setting that 4.57 does not read → the values with which it computes the same.
_FIXED: dict[str, dict[str, tuple[Any, ...]]] = {
    "": {"per_layer_config": (None, {})},
    "bamba": {"rope_theta": (10000.0,), "partial_rotary_factor": (0.5,)},
    "esm": {"rope_theta": (None, 10000.0)},
    "gemma": {"use_bidirectional_attention": (None, False)},
    "gemma2": {"use_bidirectional_attention": (None, False)},
    "gemma3_text": {"use_bidirectional_attention": (None, False)},  # known from 4.57 on
    "gpt_oss": {"swiglu_alpha": (None, 1.702), "swiglu_limit": (None, 7.0)},
}
_NO_MATTER = frozenset(
    {
        *("auto_map", "initializer_factor", "initializer_range", "label_names", "num_nextn_predict_layers"),
        *("output_router_logits", "pretraining_tp", "quantization_config", "router_aux_loss_coef"),
        *("scale_decoder_outputs", "use_associative_scan", "use_cache", "use_mamba_kernels", "use_mambapy"),
    }
)
"""Settings that 4.57 does not read in some classes, and that change no hidden state of an encoder."""


def in_own_words(described: Mapping[str, Any], source: str) -> Settings:
    """Return the settings of a ``config.json`` as the installed transformers spells them.

    Raises:
        BaseModelNotFoundError: a setting, or the whole architecture, is one that it does not have.
    """
    model_type = str(described.get("model_type"))
    version = version_of(described)
    if model_type == "mistral" and "layer_types" in described:  # as AutoConfig has it
        model_type, described = "ministral", {**described, "model_type": "ministral"}
    if model_type in CONFIG_MAPPING:
        return _Reader(source, CONFIG_MAPPING[model_type], model_type, version).read(described)
    if version is None or version <= Version(transformers.__version__):
        return dict(described)
    by_code = " with code of its own, which trust_remote_code=True lets run" if described.get("auto_map") else ""
    raise BaseModelNotFoundError(
        f"Cannot load the base model from '{source}': it is of the type '{model_type}', which transformers {version} "
        f"wrote and transformers {transformers.__version__} does not know. Flair holds transformers to this version, "
        f"and no other class computes the same. Use a base of another type{', or one' * bool(by_code)}{by_code}."
    )


def attention_of(described: Mapping[str, Any]) -> str | None:
    """Return the attention of a newer transformers, where the default of the installed one computes something else."""
    return "eager" if is_capped(described) and is_newer(version_of(described)) else None


def is_capped(described: Mapping[str, Any]) -> bool:
    """Whether attention is capped (Gemma 2, T5Gemma): SDPA, which 4.57 takes for these, passes over that."""
    parts = [described, *(part for part in described.values() if isinstance(part, Mapping))]
    return any(part.get("attn_logit_softcapping") is not None for part in parts)


def version_of(described: Mapping[str, Any]) -> Version | None:
    """Return the version of transformers that wrote a config; ``None`` if it does not say."""
    try:
        return Version(str(described.get("transformers_version")))
    except InvalidVersion:
        return None


def is_newer(version: Version | None) -> bool:
    """Whether a version of transformers is of a later generation than the installed one."""
    return version is not None and version.major > Version(transformers.__version__).major


@functools.cache
def _named(config_class: Any) -> frozenset[str]:
    """Return the settings that a class's constructor names."""
    own = [cls for cls in config_class.__mro__ if "__init__" in vars(cls) and issubclass(cls, PretrainedConfig)]
    return frozenset(name for cls in own for name in inspect.signature(vars(cls)["__init__"]).parameters)


@functools.cache
def known_settings(config_class: Any) -> frozenset[str]:
    """Return all settings of a class."""
    common = {*vars(PretrainedConfig()), "num_labels", "torch_dtype", "output_attentions", "attn_implementation"}
    return frozenset(
        {*_named(config_class), *config_class.attribute_map, *dir(config_class), *_defaults(config_class), *common}
    )


@functools.cache
def _defaults(config_class: Any) -> Settings:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # some warn of settings of their own
            return vars(config_class())
    except (AttributeError, ImportError, OSError, TypeError, ValueError):
        return {}


def inner_configs(config_class: Any) -> dict[str, type[PretrainedConfig]]:
    """Return the configs in a config; ``sub_configs`` does not name those of T5Gemma."""
    made = {name: type(value) for name, value in _defaults(config_class).items() if isinstance(value, PretrainedConfig)}
    return {**{name: part for name, part in config_class.sub_configs.items() if hasattr(part, "model_type")}, **made}


@functools.cache
def _source_of(config_class: Any) -> str:
    """Return the text of the modules that read the config: some settings are in no constructor."""
    model_class = MODEL_MAPPING.get(config_class, None)
    modules = {config_class.__module__, *([] if model_class is None else [model_class.__module__])}
    return "".join(inspect.getsource(sys.modules[name]) for name in sorted(modules))


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the settings of one class, and those of the configs in it by readers of their own."""

    source: str
    config_class: Any
    model_type: str
    version: Version | None

    def read(self, described: Mapping[str, Any]) -> Settings:
        """Return the settings in the names that the class has for them."""
        known = known_settings(self.config_class)
        found = {new: value for new, value in described.items() if new in known or new != "rope_parameters"}
        for new, own in _RENAMED.get(self.model_type, {}).items():
            self._add_(found, {own: found[new]} if new in found else {}, of=new)
            if new not in known:
                found.pop(new, None)
        if "rope_parameters" not in known:
            self._add_(found, self._rope(described.get("rope_parameters"), described), of="rope_parameters")
        self._layers_(found)
        self._refuse_fixed(found)
        for name, part in inner_configs(self.config_class).items():
            if isinstance(found.get(name), Mapping):
                part = CONFIG_MAPPING.get(found[name].get("model_type"), part)
                found[name] = dataclasses.replace(self, config_class=part, model_type=part.model_type).read(found[name])
        return self._without_unknown(found, described)

    def _refusal(self, setting: str, value: Any, why: str) -> BaseModelNotFoundError:
        return BaseModelNotFoundError(
            f"Cannot load the base model from '{self.source}': its config says {setting}={value!r:.200}. "
            f"{self.config_class.__name__} of transformers {transformers.__version__}, to which Flair holds it, {why}: "
            "it would compute something else. Use another base model, or correct config.json if it does not mean that."
        )

    def _add_(self, found: Settings, own: Settings, *, of: str) -> None:
        """Add settings that were translated, in place; what the file says in both spellings must be the same."""
        for name, value in own.items():
            said = found.get(name)
            if said is not None and _comparable(said) != _comparable(value):
                raise self._refusal(name, said, f"cannot mean that and the file's {of}, which says {value!r:.200}")
        found.update(own)

    def _rope(self, rope: Any, described: Mapping[str, Any]) -> Settings:
        if not rope:
            return {}
        if not isinstance(rope, Mapping):
            raise self._refusal("rope_parameters", rope, "expects a group of settings")
        local = next((name for name in _LOCAL_THETA if name in _named(self.config_class)), None)
        local = None if self.model_type in _ONE_THETA else local
        parts = {kind: part or {} for kind, part in rope.items() if isinstance(part, Mapping) or part is None}
        if not parts or "rope_type" in rope:
            if local is not None:
                raise self._refusal("rope_parameters", dict(rope), "has positions of two kinds, and this names one")
            return self._flat(rope, described)
        sliding = dict(parts.pop("sliding_attention", {}))
        full = dict(parts.pop("full_attention", sliding))
        if parts:
            raise self._refusal("rope_parameters", dict(rope), f"has no layers of the kind {name_some(parts)}")
        found = self._flat(full, described)
        if local is not None:
            return {**found, **self._local(local, sliding)}
        of_windows = self._flat(sliding or full, described)
        if self.model_type in _SCALE_FULL_LAYERS_ONLY:
            of_windows["rope_scaling"] = found.get("rope_scaling") if _is_default(sliding) else sliding
        if of_windows != found:
            raise self._refusal("rope_parameters", dict(rope), "has one kind of positions for all layers")
        return found

    def _local(self, name: str, sliding: Settings) -> Settings:
        if not _is_default(sliding):
            raise self._refusal(
                "rope_parameters", {"sliding_attention": sliding}, "does not scale positions in layers with a window"
            )
        return {name: sliding["rope_theta"]} if sliding.get("rope_theta") is not None else {}

    def _flat(self, rope: Mapping[str, Any], described: Mapping[str, Any]) -> Settings:
        """Return what one set of rope parameters is called here."""
        scaling = {name: value for name, value in rope.items() if value is not None and name != "type"}
        kind = scaling.setdefault("rope_type", rope.get("type") or "default")
        found: Settings = {}
        for names in (_THETA, _ROTATED_SHARE):
            new = names[1] if names is _THETA else names[0]
            if new in scaling:
                found.update(self._number(new, scaling.pop(new), names))
        if _is_default(scaling):
            return {**found, **({"rope_scaling": None} if "rope_scaling" in _named(self.config_class) else {})}
        can_scale = "rope_scaling" in _named(self.config_class) or self.model_type in _SCALE_UNNAMED
        if not can_scale or (kind != "default" and kind not in ROPE_INIT_FUNCTIONS):
            raise self._refusal("rope_parameters", dict(rope), f"has no positions of the kind '{kind}'")
        return {**found, **(self._long(scaling, described) if kind == "longrope" else {"rope_scaling": scaling})}

    def _number(self, new: str, value: Any, names: Collection[str]) -> Settings:
        own = next((name for name in names if name in _named(self.config_class)), None)
        if own is not None:
            return {own: value}
        if value not in _FIXED.get(self.model_type, {}).get(new, (1.0,) if new == "partial_rotary_factor" else ()):
            raise self._refusal(new, value, "has no setting for that")
        return {}

    def _long(self, scaling: Settings, described: Mapping[str, Any]) -> Settings:
        """Return LongRoPE: its factor is the ratio of the lengths here, unless what follows of it is said, too."""
        before = scaling.pop("original_max_position_embeddings", described.get("original_max_position_embeddings"))
        length, factor = described.get("max_position_embeddings"), scaling.pop("factor", None)
        if before is None or length is None:
            raise self._refusal("rope_parameters", scaling, "needs the lengths before and after")
        if factor is not None and factor != length / before:
            widened = math.sqrt(1 + math.log(factor) / math.log(before)) if factor > 1 else 1.0
            scaling.setdefault("attention_factor", widened)
        if hasattr(self.config_class, "_rope_scaling_validation"):  # Phi-3: exactly these three
            if "attention_factor" in scaling:
                raise self._refusal("rope_parameters", scaling, "takes no factor but the ratio of the two lengths")
            scaling["type"] = scaling.pop("rope_type")
        return {"rope_scaling": scaling, "original_max_position_embeddings": before}

    def _layers_(self, found: Settings) -> None:
        """Say in place which layers have a window, where the class counts them instead of naming them."""
        layers = found.get("layer_types")
        if not isinstance(layers, list):
            return
        names = _LAYERS_RENAMED.get(self.model_type, {})
        found["layer_types"] = [names.get(layer, layer) for layer in layers]
        if self.model_type in _WINDOW_EXCLUSIVE and is_newer(self.version) and not found.get("is_decoder"):
            found["sliding_window"] += 1
        if "layer_types" in known_settings(self.config_class):
            return
        if "global_attn_every_n_layers" in _named(self.config_class):
            self._add_(found, {"global_attn_every_n_layers": self._period(layers, found)}, of="layer_types")
        elif self.model_type == "qwen2_moe" and {*layers} != {"full_attention"}:
            raise self._refusal("layer_types", layers, "has no setting for that")
        if self.version is None or is_newer(self.version) or "global_attn_every_n_layers" in _named(self.config_class):
            del found["layer_types"]

    def _period(self, layers: list[Any], found: Settings) -> int:
        if found.get("num_hidden_layers", len(layers)) == len(layers):
            said = found.get("global_attn_every_n_layers")
            second = next((index for index, kind in enumerate(layers) if index and kind == "full_attention"), None)
            for period in [*([said] if isinstance(said, int) and said > 0 else []), second or max(len(layers), 1)]:
                kinds = ["sliding_attention" if index % period else "full_attention" for index in range(len(layers))]
                if kinds == layers:
                    return period
        raise self._refusal(
            "layer_types", layers, "has layers without a window at equal distances, from the first one on"
        )

    def _refuse_fixed(self, found: Settings) -> None:
        known = known_settings(self.config_class)
        for name, values in {**_FIXED[""], **_FIXED.get(self.model_type, {})}.items():
            if name in found and name not in known and found[name] not in values:
                raise self._refusal(name, found[name], "has no setting for that")
        is_decoder = self.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        is_decoder = is_decoder and self.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        may_mean_it = self.version is None or is_newer(self.version)
        if is_decoder and may_mean_it and "is_causal" not in known and found.get("is_causal") is False:
            raise self._refusal("is_causal", False, "lets tokens see only those before them")

    def _without_unknown(self, found: Settings, described: Mapping[str, Any]) -> Settings:
        """Return the settings without empty ones that are not known, and name those that nothing here reads."""
        if not is_newer(self.version):
            return found
        unknown = {*found} - known_settings(self.config_class)
        judged = {**_FIXED[""], **_FIXED.get(self.model_type, {})}
        told = (
            {name for name in unknown & {*described} if found[name] is not None} - _NO_MATTER - {*judged, "is_causal"}
        )
        told = {name for name in told if name not in _source_of(self.config_class)}
        if told:
            log.warning(
                "The config of '%s' holds %s, which transformers %s does not read. Where transformers %s computes with "
                "it, it gives other vectors.",
                self.source,
                name_some(told),
                transformers.__version__,
                self.version,
            )
        return {name: value for name, value in found.items() if name not in unknown or value is not None}


def _is_default(rope: Mapping[str, Any]) -> bool:
    """Whether these parameters are those of positions that are neither scaled nor partial."""
    beside = {name for name, value in rope.items() if value is not None} - {"rope_theta", "rope_type", "type"}
    return rope.get("rope_type", "default") == "default" and not beside


def _comparable(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    kind = value.get("rope_type", value.get("type"))
    return {**{name: part for name, part in value.items() if name not in ("type", "rope_type")}, "": kind}
