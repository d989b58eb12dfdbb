"""Configs of bases: what another transformers wrote, and what files hold."""

from __future__ import annotations

import copy
import json
import logging
import pickle
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import transformers
from flair.data import Sentence
from flair.models import TextClassifier
from transformers import MODEL_MAPPING, Gemma3TextConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.base import config_versions, stored_config, transformer
from flair_peft.errors import AdapterConfigError, BaseModelNotFoundError
from tests.regression.make import labels
from tests.support import tiny
from tests.support.configs import lora
from tests.support.selection import few

_NEWER = "5.24.0"
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def read(model_type: str, version: str = _NEWER, **settings: Any) -> dict[str, Any]:
    described = {"model_type": model_type, "transformers_version": version, **settings}
    return config_versions.in_own_words(described, "the base")


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


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "llama", "max_position_embeddings": 8, "rope_parameters": {"rope_type": "longrope"}},
        {
            "model_type": "llama",
            "max_position_embeddings": 8,
            "rope_parameters": flat(kind="longrope", factor="2", original_max_position_embeddings=0),
        },
        {"model_type": "modernbert", "num_hidden_layers": 2, "layer_types": [["full_attention"], {}]},
        {"model_type": "modernbert", "num_hidden_layers": 10**5, "layer_types": ["full_attention"] * 99999 + ["?"]},
    ],
)
def test_settings_without_sense_are_refused_by_the_name_of_their_folder(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """With an error of the tree, at once."""
    (tmp_path / "config.json").write_text(json.dumps({"transformers_version": _NEWER, **settings}), encoding="utf-8")
    with refused(f"Cannot load the base model from '{tmp_path}'"):
        transformer.find_config(str(tmp_path), {})


def test_setting_of_an_older_transformers_is_not_judged() -> None:
    """4.57 computed with what it read, whatever else stood there."""
    assert read("llama", version="4.57.6", is_causal=False)["is_causal"] is False


def stored(config: PretrainedConfig) -> dict[str, Any]:
    return json.loads(config.to_json_string(use_diff=False))


def restored(described: dict[str, Any], config: PretrainedConfig) -> PretrainedConfig:
    return stored_config.from_stored(described, type(config), attention=None, source="the base")


def configs_of_text() -> Iterator[PretrainedConfig]:
    """Yield a config of each class with a bare model that reads text."""
    for config_class in dict.fromkeys(MODEL_MAPPING):
        try:
            config = config_class()
        except (AttributeError, ImportError, OSError, TypeError, ValueError):
            continue  # is made of other configs, or from the Hub
        if getattr(config.get_text_config(), "vocab_size", None) and config_class.__name__ not in _UNSTORABLE:
            yield config


def altered(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield configs with one setting changed, by the constructor and afterwards."""
    for name, value in vars(config).items():
        if name.startswith("_") or name in ("dtype", "model_type") or not isinstance(value, bool | int | float):
            continue
        other = not value if isinstance(value, bool) else value * 2 + 2
        try:
            yield type(config)(**{name: other})
            changed = copy.deepcopy(config)
            setattr(changed, name, other)
            type(config).from_dict(stored(changed))
            yield changed
        except (AttributeError, AssertionError, TypeError, ValueError):
            continue  # settings that do not go together


@pytest.mark.parametrize("is_varied", few([False, True], always=[False]))
def test_config_that_was_stored_comes_back_as_it_was(is_varied: bool) -> None:
    """Of every class that transformers has for text, the first and the third time."""
    seen = 0
    for config in configs_of_text():
        for case in islice(altered(config), 8) if is_varied else [config]:
            try:
                described = stored(case)
            except (AttributeError, TypeError):
                continue  # no dictionary
            again = case
            for _ in range(3):
                again = restored(stored(again), case)
            assert stored(again) == described, type(case).__name__
            seen += 1
        assert not stored_config.changing(config)
    assert seen > 150


# Their constructors refuse what `to_dict` gives for the configs of images and sound in them.
_UNSTORABLE = {"Phi4MultimodalConfig"}


def test_config_of_an_older_file_is_read_as_its_constructor_reads_it() -> None:
    """An old name that the constructor translates once and for all is not set back."""
    config = CONFIG_MAPPING["phi3"](**{**_PHI3, "rope_scaling": {"type": "longrope", **_FACTORS}})
    described = {**stored(config), "rope_scaling": {"type": "su", **_FACTORS}, "transformers_version": "4.40.0"}
    assert restored(described, config).rope_scaling["type"] == "longrope"


_PHI3 = {"hidden_size": 16, "num_attention_heads": 2, "pad_token_id": 0}
_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}


@pytest.mark.parametrize("version", ["4.57.3", transformers.__version__])
def test_window_that_was_halved_once_is_not_halved_again(version: str) -> None:
    """Whichever version stored it."""
    config = Gemma3TextConfig(sliding_window=512, use_bidirectional_attention=True)
    assert config.sliding_window == 257
    assert restored({**stored(config), "transformers_version": version}, config).sliding_window == 257


def test_what_a_stored_config_did_not_read_stays_unread() -> None:
    """A model that was trained on a newer base without its rope parameters predicts what it did then."""
    config = CONFIG_MAPPING["llama"](rope_theta=10000.0)
    found = restored({**stored(config), "rope_parameters": flat(30.0)}, config)
    assert found.rope_theta == 10000.0
    assert not hasattr(found, "rope_parameters")
    newer = {**stored(config), "rope_theta": None, "rope_parameters": flat(30.0), "transformers_version": _NEWER}
    assert restored(newer, config).rope_theta == 30.0


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a bidirectional Gemma 3 with a window of 16, as its ``config.json`` has it, and a tokenizer for BERT."""
    folder = tmp_path_factory.mktemp("gemma")
    tokenizer = tiny._TOKENIZERS["bert"](folder)
    tokenizer.save_pretrained(folder)
    config = Gemma3TextConfig(
        **tiny._SIZE,
        vocab_size=len(tokenizer),
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
        use_bidirectional_attention=True,
        pad_token_id=0,
    )
    tiny._random_model(config, transformers.Gemma3TextModel, seed=0).save_pretrained(folder)
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**described, "sliding_window": 16}), encoding="utf-8")
    return str(folder)


def score(model: Any) -> float:
    sentence = Sentence("Berlin and Paris are large cities in Europe . " * 5)
    model.predict(sentence)
    return float(sentence.get_labels("c")[0].score)


def test_model_on_bidirectional_gemma_predicts_the_same_after_three_loads(gemma: str, tmp_path: Path) -> None:
    """With sentences longer than the window: directories, files, copies, pickles and a shared base."""
    config = lora(r=2, lora_alpha=6, target_modules="all-linear")
    embeddings = PeftTransformerDocumentEmbeddings(gemma, peft_config=config, cls_pooling="mean")
    model: Any = TextClassifier(embeddings, label_dictionary=labels("A", "B"), label_type="c").eval()
    assert embeddings.base_model.config.sliding_window == 9
    expected = score(model)
    for turn in range(3):
        flair_peft.save_pretrained(model, tmp_path / str(turn))
        model.save(tmp_path / f"{turn}.pt")
        ways = [
            flair_peft.from_pretrained(tmp_path / str(turn)),
            TextClassifier.load(tmp_path / f"{turn}.pt"),
            SharedBase(gemma).load(tmp_path / str(turn)),
            copy.deepcopy(model),
        ]
        assert [score(way) for way in ways] == pytest.approx([expected] * 4, abs=1e-6)
        model = ways[turn % 2]
    again = pickle.loads(pickle.dumps(embeddings))
    assert again.base_model.config.sliding_window == 9


def test_merge_of_a_config_that_stock_flair_reads_otherwise_is_refused(gemma: str) -> None:
    """Stock Flair would halve the window of the merged model with each load."""
    embeddings = PeftTransformerDocumentEmbeddings(gemma, cls_pooling="mean")
    model = TextClassifier(embeddings, label_dictionary=labels("A", "B"), label_type="c")
    with pytest.raises(AdapterConfigError, match="another 'sliding_window'"):
        flair_peft.merge(model)
