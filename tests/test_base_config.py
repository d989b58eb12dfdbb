"""Configs of bases: what another transformers wrote, and what files hold."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from flair_peft import base_config
from flair_peft.errors import BaseModelNotFoundError

_NEWER = "5.24.0"
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def read(model_type: str, version: str = _NEWER, **settings: Any) -> dict[str, Any]:
    described = {"model_type": model_type, "transformers_version": version, **settings}
    return base_config.in_own_words(described, "the base")


def flat(theta: float = 30.0, kind: str = "default", **more: Any) -> dict[str, Any]:
    return {"rope_type": kind, "rope_theta": theta, **more}


def refused(match: str) -> Any:
    return pytest.raises(BaseModelNotFoundError, match=match)


@pytest.mark.parametrize(
    ("model_type", "rope", "own"),
    [
        ("llama", flat(), {"rope_theta": 30.0, "rope_scaling": None}),
        ("llama", {"rope_theta": 30.0}, {"rope_theta": 30.0, "rope_scaling": None}),
        (
            "llama",
            {"rope_theta": 30.0, "type": "linear", "factor": 2.0},
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        ),
        ("mistral", {"rope_theta": 30.0, **_YARN}, {"rope_theta": 30.0, "rope_scaling": _YARN}),
        ("gpt_neox", flat(partial_rotary_factor=0.5), {"rotary_emb_base": 30.0, "rotary_pct": 0.5}),
        ("phi", flat(partial_rotary_factor=0.5), {"rope_theta": 30.0, "partial_rotary_factor": 0.5}),
        ("llama", flat(partial_rotary_factor=1.0), {"rope_theta": 30.0}),
        ("apertus", flat(), {"rope_scaling": None}),
        (
            "gemma3_text",
            {"full_attention": {"rope_theta": 30.0, **_YARN}, "sliding_attention": flat(70.0)},
            {"rope_theta": 30.0, "rope_scaling": _YARN, "rope_local_base_freq": 70.0},
        ),
        (
            "modernbert",
            {"full_attention": flat(30.0), "sliding_attention": flat(70.0)},
            {"global_rope_theta": 30.0, "local_rope_theta": 70.0},
        ),
        ("modernbert", {"full_attention": flat(30.0), "sliding_attention": None}, {"global_rope_theta": 30.0}),
        ("qwen3", {"full_attention": flat(), "sliding_attention": flat()}, {"rope_theta": 30.0}),
    ],
)
def test_rope_parameters_become_the_settings_of_the_class(
    model_type: str, rope: dict[str, Any], own: dict[str, Any]
) -> None:
    """Flat or for each kind of layer, of each kind of scaling; nothing is left under the newer name."""
    found = read(model_type, rope_parameters=rope)
    assert {name: found.get(name) for name in own} == own
    assert "rope_parameters" not in found


@pytest.mark.parametrize(
    ("model_type", "settings", "named"),
    [
        ("llama", {"rope_parameters": flat(kind="proportional")}, "'proportional'"),
        ("llama", {"rope_parameters": flat(partial_rotary_factor=0.5)}, "partial_rotary_factor=0.5"),
        ("llama", {"rope_parameters": [1]}, "rope_parameters"),
        ("qwen3", {"rope_parameters": {"full_attention": flat(30.0), "sliding_attention": flat(70.0)}}, "rope_param"),
        ("qwen3", {"rope_parameters": {"linear_attention": flat()}}, "linear_attention"),
        ("modernbert", {"rope_parameters": flat()}, "rope_parameters"),
        ("modernbert", {"rope_parameters": {"full_attention": flat(partial_rotary_factor=0.5)}}, "partial"),
        ("bamba", {"rope_parameters": flat(20000.0)}, "rope_theta=20000.0"),
        ("nemotron", {"rope_parameters": {"rope_theta": 30.0, **_YARN}}, "'yarn'"),
        ("modernbert", {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("modernbert", {"num_hidden_layers": 3, "layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2_moe", {"layer_types": ["sliding_attention", "full_attention"]}, "layer_types"),
        ("llama", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config"),
        ("qwen3", {"is_causal": False}, "is_causal=False"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gpt_oss", {"swiglu_limit": 3.0}, "swiglu_limit=3.0"),
        ("esm", {"rope_theta": 30.0}, "rope_theta=30.0"),
        ("eurobert", {}, "type 'eurobert', which transformers 5.24.0"),
    ],
)
def test_setting_that_cannot_be_said_is_refused_by_name(model_type: str, settings: dict[str, Any], named: str) -> None:
    """Three sentences, the first of which names the base and the setting."""
    with refused(named) as caught:
        read(model_type, **settings)
    assert "the base" in str(caught.value)


@pytest.mark.parametrize(
    ("old", "agrees"),
    [
        ({"rope_theta": 30.0}, True),
        ({"rope_theta": 30.0, "rope_scaling": {"type": "linear", "factor": 2.0}}, True),
        ({"rope_theta": None, "rope_scaling": None}, True),
        ({"rope_theta": 10000.0}, False),
        ({"rope_scaling": {"type": "linear", "factor": 3.0}}, False),
    ],
)
def test_config_in_both_spellings_is_read_unless_they_contradict(old: dict[str, Any], agrees: bool) -> None:
    """Which of two values was meant is not guessed."""
    rope = flat(kind="linear", factor=2.0)
    if agrees:
        assert read("llama", rope_parameters=rope, **old)["rope_theta"] == 30.0
        return
    with refused("rope_"):
        read("llama", rope_parameters=rope, **old)


@pytest.mark.parametrize(
    ("layers", "said", "period"),
    [("fss", None, 3), ("fssfss", 3, 3), ("fs", 3, 3), ("ff", None, 1), ("f", 3, 3), ("fss", 2, None)],
)
def test_layer_types_of_modernbert_become_the_distance_of_full_layers(
    layers: str, said: int | None, period: int | None
) -> None:
    """A distance that the file gives, too, is kept if it means the same layers."""
    names = [{"f": "full_attention", "s": "sliding_attention"}[layer] for layer in layers]
    given = {} if said is None else {"global_attn_every_n_layers": said}
    if period is None:
        with refused("global_attn_every_n_layers=2"):
            read("modernbert", layer_types=names, num_hidden_layers=len(names), **given)
        return
    found = read("modernbert", layer_types=names, num_hidden_layers=len(names), **given)
    assert found["global_attn_every_n_layers"] == period


def test_longrope_keeps_a_factor_that_is_not_the_ratio_of_the_lengths() -> None:
    """It says what follows of the factor instead; Phi-3, which takes no such thing, is refused."""
    rope = flat(kind="longrope", factor=3.0, original_max_position_embeddings=16, short_factor=[1.0], long_factor=[2.0])
    found = read("llama", rope_parameters=rope, max_position_embeddings=64)
    assert found["original_max_position_embeddings"] == 16
    assert found["rope_scaling"]["attention_factor"] == pytest.approx((1 + 1.0986123 / 2.7725887) ** 0.5)
    with refused("attention_factor"):
        read("phi3", rope_parameters=rope, max_position_embeddings=64)
    alike = read("phi3", rope_parameters={**rope, "factor": 4.0}, max_position_embeddings=64)
    assert alike["rope_scaling"] == {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}


def test_configs_in_a_config_are_read_likewise() -> None:
    """T5Gemma and models with images hold theirs under a name."""
    parts = {"encoder": {"rope_parameters": flat()}, "decoder": {"rope_parameters": flat(70.0)}}
    found = read("t5gemma", **copy.deepcopy(parts))
    assert (found["encoder"]["rope_theta"], found["decoder"]["rope_theta"]) == (30.0, 70.0)
    with refused("per_layer_config"):
        read("t5gemma", encoder={"per_layer_config": {"0": {"head_dim": 4}}})


def test_setting_that_nothing_reads_is_named_in_files_of_a_newer_transformers_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What only the text of the model's module reads is not named, nor what is empty."""
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        read("deberta-v2", position_buckets=8, novelty=None)
        read("llama", version="4.57.6", novelty=3)
        assert not caplog.messages
        read("llama", novelty=3)
    assert ["'novelty'" in message for message in caplog.messages] == [True]


def test_setting_of_an_older_transformers_is_not_judged() -> None:
    """4.57 computed with what it read, whatever else stood there."""
    assert read("llama", version="4.57.6", is_causal=False)["is_causal"] is False
