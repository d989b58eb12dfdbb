"""A PEFT config goes through JSON and comes back as it was, or an error names what cannot."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from collections.abc import Callable
from typing import Any

import peft
import pytest
from peft import (
    AdaLoraConfig,
    EvaConfig,
    IA3Config,
    LoftQConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftType,
    SupertuningConfig,
    TaskType,
)
from peft.tuners.lora.config import CordaConfig

from flair_peft import PeftTransformerWordEmbeddings
from flair_peft.adapter.config import decode_config, default_config, encode_config, own_config
from flair_peft.errors import AdapterConfigError
from tests.support.methods import LORA_VARIANTS, METHODS, REFUSED_METHODS

TARGETS = ["query", "value"]


def _lora(**settings: Any) -> Callable[[], PeftConfig]:
    return lambda: LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": list(TARGETS), **settings})


NESTED: dict[str, Callable[[], PeftConfig]] = {
    "loftq": _lora(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=8, loftq_iter=2)),
    "eva": _lora(init_lora_weights="eva", eva_config=EvaConfig(rho=3.0, tau=0.9, adjust_scaling_factors=False)),
    "corda": _lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm", verbose=True)),
}
VARIANTS: dict[str, Callable[[], PeftConfig]] = {
    **{name: lambda m=method: m.config("encoder") for name, method in METHODS.items() if name not in REFUSED_METHODS},
    **NESTED,
    "dora": _lora(use_dora=True),
    "rslora": _lora(use_rslora=True),
    "pissa": _lora(init_lora_weights="pissa_niter_4"),
    "olora": _lora(init_lora_weights="olora"),
    "gaussian": _lora(init_lora_weights="gaussian"),
    "no initialisation": _lora(init_lora_weights=False),
    "all linear": _lora(target_modules="all-linear"),
    "regular expression": _lora(target_modules=r".*\.(query|value)$", exclude_modules=r".*\.1\..*"),
    "patterns": _lora(rank_pattern={"query": 2}, alpha_pattern={r"^.*\.value": 5}),
    "layers": _lora(layers_to_transform=[0, 1], layers_pattern="layer"),
    "one layer": _lora(layers_to_transform=1),
    "modules to save": _lora(modules_to_save=["pooler"]),
    "token rows": _lora(trainable_token_indices={"word_embeddings": [3, 1]}),
    "token row list": _lora(trainable_token_indices=[3, 1]),
    "bias": _lora(bias="lora_only", lora_bias=True),
    "parameters": _lora(target_parameters=["encoder.weight"]),
    "replication": _lora(layer_replication=[[0, 1], [0, 2]]),
}


def _filled(config: PeftConfig, **settings: Any) -> PeftConfig:
    """Return the config as injection, or its owner, changed it after the constructor had looked at it."""
    vars(config).update(settings)
    return config


FILLED: dict[str, Callable[[], PeftConfig]] = {
    "feed-forward modules beside the targets": lambda: _filled(
        IA3Config(target_modules=list(TARGETS)), feedforward_modules={"output.dense"}
    ),
    "a regular expression for the targets of some layers": lambda: _filled(
        LoraConfig(layers_to_transform=[1]), target_modules=r".*\.(query|value)"
    ),
    "a pattern of layers without layers": lambda: _filled(
        OFTConfig(layers_to_transform=[1], layers_pattern="layer", target_modules=list(TARGETS)),
        layers_to_transform=None,
    ),
    "an initialisation that is done": lambda: _filled(NESTED["loftq"](), init_lora_weights=True),
    "an alpha that was taken away": lambda: _filled(SupertuningConfig(r=4, lora_alpha=3), lora_alpha=None),
}


def _plain(value: Any) -> Any:
    """Return a config's value with sets and tuples as sorted or plain lists, and enums as their values."""
    if isinstance(value, (set, frozenset)):
        return sorted(_plain(item) for item in value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value) if isinstance(value, (PeftType, TaskType)) else value


def _settings(config: PeftConfig) -> dict[str, Any]:
    settings = _plain(config.to_dict())
    for name in ("target_modules", "exclude_modules", "feedforward_modules"):
        if isinstance(settings.get(name), list):
            settings[name] = sorted(settings[name])
    return settings


def _variant_configs() -> dict[str, Callable[[], PeftConfig]]:
    return {**VARIANTS, **FILLED, **{name: lambda v=v: v.config("encoder") for name, v in LORA_VARIANTS.items()}}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", _variant_configs())
def test_config_of_every_method_encoded_and_decoded_is_equal(name: str) -> None:
    """Every setting of every method survives as text, and the class is the method's own."""
    config = own_config(_variant_configs()[name]())
    decoded = decode_config(json.loads(json.dumps(encode_config(config))))
    assert type(decoded) is type(config)
    assert _settings(decoded) == _settings(config)
    assert decoded.task_type == TaskType.FEATURE_EXTRACTION
    assert decoded.inference_mode is False


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", _variant_configs())
def test_config_encoded_again_after_decoding_is_the_same_text(name: str) -> None:
    """Files do not change by being loaded and saved."""
    encoded = encode_config(own_config(_variant_configs()[name]()))
    assert encode_config(decode_config(encoded)) == encoded


def test_config_of_methods_covers_what_the_installed_peft_offers() -> None:
    """A method that a new PEFT brings is missed by no list of this file."""
    assert {t.value for t in peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING} <= set(METHODS)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", NESTED)
def test_config_with_nested_settings_decoded_initialises_like_the_original(name: str) -> None:
    """Nested settings come back as what PEFT makes of them itself, not as something with other attributes."""
    config = own_config(NESTED[name]())
    decoded = decode_config(encode_config(config))
    for field in ("loftq_config", "eva_config", "corda_config"):
        mine, theirs = getattr(config, field), getattr(decoded, field)
        assert type(theirs) is type(mine), field
        as_dict = dataclasses.asdict if dataclasses.is_dataclass(mine) else (lambda value: value)
        assert as_dict(theirs) == as_dict(mine), field


def test_config_encoded_twice_gives_the_same_text_whatever_order_a_set_has() -> None:
    """PEFT turns target lists into sets; files list them sorted."""
    names = [f"module_{number}" for number in range(40)]
    encoded = [encode_config(LoraConfig(target_modules=some)) for some in (names, names[::-1])]
    assert json.dumps(encoded[0]) == json.dumps(encoded[1])
    assert encoded[0]["target_modules"] == sorted(names)


def test_config_encoded_is_not_connected_to_the_config() -> None:
    """Neither encoding nor changing the result writes into the config."""
    config = LoraConfig(target_modules=TARGETS, rank_pattern={"query": 2})
    before = copy.deepcopy(config.to_dict())
    encoded = encode_config(config)
    encoded["rank_pattern"]["value"] = 9
    encoded["target_modules"].append("key")
    assert config.to_dict() == before


def test_config_stored_is_not_changed_by_decoding_it() -> None:
    """What a file holds can be decoded any number of times, and no result is connected to it."""
    stored = encode_config(LoraConfig(target_modules=TARGETS, rank_pattern={"query": 2}))
    before = copy.deepcopy(stored)
    decode_config(stored).rank_pattern["value"] = 9
    assert stored == before


def test_config_given_as_an_object_is_decoded_to_a_copy() -> None:
    """Files of other writers may hold the config object; it is not handed on."""
    config = LoraConfig(target_modules=TARGETS, rank_pattern={"query": 2})
    decoded = decode_config(config)
    assert decoded is not config
    assert decoded.rank_pattern == {"query": 2}
    assert decoded.rank_pattern is not config.rank_pattern


SCALED = {"LORA": "lora_alpha", "ADALORA": "lora_alpha", "LOHA": "alpha", "LOKR": "alpha", "FOURIERFT": "scaling"}


@pytest.mark.parametrize("stored", ["without", "null"])
@pytest.mark.parametrize("method", SCALED)
def test_config_stored_without_its_scale_is_not_given_the_default_of_peft(method: str, stored: str) -> None:
    """A lost alpha is asked for, not assumed."""
    settings = encode_config(METHODS[method].config("encoder"))
    found = settings.pop(SCALED[method])
    if stored == "null":
        settings[SCALED[method]] = None
    with pytest.raises(AdapterConfigError, match=f"lacks '{SCALED[method]}'"):
        decode_config(settings)
    assert getattr(decode_config({**settings, SCALED[method]: found}), SCALED[method]) == found


@pytest.mark.parametrize("value", [1, True, "x", [1], {"a": 1}])
def test_config_with_an_unknown_setting_raises_an_error_that_names_it(value: Any) -> None:
    """A setting that this PEFT lacks would be lost, so it is refused with its name and the version to install."""
    stored = {**encode_config(LoraConfig(target_modules=TARGETS)), "use_magic": value, "peft_version": "9.8.7"}
    with pytest.raises(AdapterConfigError, match=r"use_magic.*9\.8\.7"):
        decode_config(stored)


def test_config_with_a_zero_that_is_unknown_raises_an_error() -> None:
    """Zero is a value, not a switch that is off."""
    stored = {**encode_config(LoraConfig(target_modules=TARGETS)), "magic_offset": 0}
    with pytest.raises(AdapterConfigError, match="magic_offset"):
        decode_config(stored)


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_config_with_an_unknown_setting_that_is_off_is_decoded_without_it(value: Any) -> None:
    """A setting of a newer PEFT that was not used says nothing."""
    config = own_config(LoraConfig(r=4, target_modules=TARGETS))
    decoded = decode_config({**encode_config(config), "use_magic": value})
    assert _settings(decoded) == _settings(config)


def test_config_without_settings_that_this_peft_added_takes_their_defaults() -> None:
    """A file of an older PEFT, which lacks newer settings, is read."""
    config = own_config(LoraConfig(r=4, target_modules=TARGETS))
    stored = encode_config(config)
    for name in ("peft_version", "use_dora", "lora_bias", "trainable_token_indices", "target_parameters"):
        stored.pop(name, None)
    assert _settings(decode_config(stored)) == _settings(config)


@pytest.mark.parametrize(
    "stored",
    [{"peft_type": "MAGIC"}, {"peft_type": None}, {"peft_type": ["LORA"]}, {}, None, 3, "LORA", ["LORA"], LoraConfig],
)
def test_config_of_an_unknown_method_raises_an_error_with_the_version(stored: Any) -> None:
    """What names no method of the installed PEFT is refused, and nothing is taken for LoRA."""
    with pytest.raises(AdapterConfigError, match=peft.__version__.replace(".", r"\.")):
        decode_config(stored)


@pytest.mark.parametrize(
    "value",
    [len, object(), b"bytes", {1: 2}, complex(1, 2)],
    ids=["function", "object", "bytes", "integer-key", "complex"],
)
def test_config_with_a_value_that_json_lacks_raises_an_error_that_names_the_setting(value: Any) -> None:
    """Files hold no code, so a config with anything but plain values cannot be stored."""
    config = LoraConfig(target_modules=TARGETS)
    config.rank_pattern = {"deep": [value]}
    with pytest.raises(AdapterConfigError, match=r"rank_pattern\.deep"):
        encode_config(config)


def test_config_that_no_file_can_hold_is_refused_when_the_embeddings_are_made(base: Callable[[str], str]) -> None:
    """The error comes now, not after the training; and it names the setting."""
    config = LoraConfig(target_modules=TARGETS)
    config.alpha_pattern = {"query": lambda: 3}
    with pytest.raises(AdapterConfigError, match=r"alpha_pattern\.query"):
        PeftTransformerWordEmbeddings(base("bert"), peft_config=config)


def test_config_of_the_user_is_as_before_after_the_embeddings_are_made(base: Callable[[str], str]) -> None:
    """PEFT writes into the config it is given; the user's own stays untouched and can be used again."""
    config = LoraConfig(
        r=4, lora_alpha=12, target_modules="all-linear", init_lora_weights=False, task_type=TaskType.CAUSAL_LM
    )
    config.inference_mode = True
    before, identity = copy.deepcopy(vars(config)), {name: id(value) for name, value in vars(config).items()}
    first = PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    second = PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    assert vars(config) == before
    assert {name: id(value) for name, value in vars(config).items()} == identity
    assert first.adapter_config is not second.adapter_config
    assert first.adapter_config is not config


def test_config_copied_for_flair_is_for_feature_extraction_and_trainable() -> None:
    """Whatever task the user's config names, Flair reads hidden states and trains."""
    given = AdaLoraConfig(total_step=10, task_type=TaskType.SEQ_CLS, inference_mode=True)
    own = own_config(given)
    assert (own.task_type, own.inference_mode) == (TaskType.FEATURE_EXTRACTION, False)
    assert (given.task_type, given.inference_mode) == (TaskType.SEQ_CLS, True)


@pytest.mark.parametrize(
    "given",
    [{"peft_type": "LORA"}, "lora", LoraConfig, 16, PeftConfig(), [LoraConfig(target_modules=TARGETS)]],
    ids=["dictionary", "string", "class", "number", "no-method", "list"],
)
def test_config_of_the_wrong_type_raises_an_error_that_shows_it(given: Any) -> None:
    """Only an instance of a method's config is one."""
    with pytest.raises(AdapterConfigError, match=r"Pass one, for example LoraConfig\("):
        own_config(given)


@pytest.mark.parametrize(("has_unread_layers", "excluded"), [(True, True), (False, False)])
def test_config_by_default_adapts_all_linear_layers_that_can_learn(has_unread_layers: bool, excluded: bool) -> None:
    """The default is LoRA with a scale of 2 on all linear layers; a pooler, which Flair does not read, is left out."""
    config = default_config(has_unread_layers=has_unread_layers)
    assert (config.r, config.lora_alpha, config.target_modules) == (16, 32, "all-linear")
    assert bool(config.exclude_modules) is excluded


def test_config_by_default_on_bert_leaves_the_pooler_alone(base: Callable[[str], str]) -> None:
    """Every parameter of the default adapter can get a gradient."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"))
    adapted = {name for name, _ in embeddings.model.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 6
    assert not [name for name in adapted if "pooler" in name]


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ({"lora_alpha": math.nan}, "LoraConfig.lora_alpha is nan"),
        ({"alpha_pattern": {"query": math.inf}}, "LoraConfig.alpha_pattern.query is inf"),
    ],
)
def test_config_with_a_number_that_is_none_is_refused(settings: dict[str, Any], where: str) -> None:
    """Given or read, before it makes predictions none and files unreadable."""
    config = LoraConfig(**settings)
    for refuse in (lambda: own_config(config), lambda: decode_config(config.to_dict())):
        with pytest.raises(AdapterConfigError, match=re.escape(where)):
            refuse()
