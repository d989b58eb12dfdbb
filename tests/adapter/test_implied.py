"""What tensors say of their config, against the config that they were made with."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable

import pytest
import torch
from peft import IA3Config, PeftConfig
from transformers import AutoModel

from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.adapter import config as configs
from flair_peft.adapter import implied, injection, methods
from tests.support.configs import lora
from tests.support.method_cases import ALL, make_embeddings, one_kind_each
from tests.support.methods import METHODS, Method

Base = Callable[[str], str]
Shapes = dict[str, tuple[int, ...]]
Make = Callable[[str, str], PeftTransformerDocumentEmbeddings]


def shapes_of(model: torch.nn.Module, prefix: str = "") -> Shapes:
    return {prefix + key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def made(base: Base) -> Make:
    """Return a function from a method and a kind of base to embeddings, which nobody changes."""
    return functools.cache(lambda name, kind: make_embeddings(ALL[name], kind, base, torch.float32))


@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_method_is_read_from_the_tensors_of_every_method(method: Method, kind: str, made: Make) -> None:
    """Names of tensors are enough to tell every method that can be trained."""
    embeddings = made(method.name, kind)
    found = implied.read_config(shapes_of(embeddings.model, "embeddings.model."))
    assert found is not None
    assert found.method == methods.method_name(embeddings.adapter_config)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "all linear": lambda: lora(target_modules="all-linear"),
    "one of two that end alike": lambda: lora(target_modules=["attention.output.dense"]),
    "one layer": lambda: lora(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
    "regular expression": lambda: lora(target_modules=r".*layer\.0\..*(query|output\.dense)"),
    "rank pattern": lambda: lora(rank_pattern={"layer.1.attention.self.query": 8, "value": 2}),
    "dora": lambda: lora(use_dora=True),
    "lora bias": lambda: lora(lora_bias=True),
    "modules to save": lambda: lora(modules_to_save=["pooler"]),
    "embeddings": lambda: lora(target_modules=["query", "word_embeddings"]),
    "trained tokens": lambda: lora(trainable_token_indices={"word_embeddings": [5, 6]}),
    "ia3": lambda: IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "ia3 with what peft fills in": lambda: IA3Config(target_modules=["dense"]),
    "ia3 without feedforward": lambda: IA3Config(target_modules=["query"], feedforward_modules=[]),
}


@pytest.mark.parametrize("prefix", ["", "embeddings.model.", "tars_model.embeddings.list_embedding_1.model."])
@pytest.mark.parametrize("name", CONFIGS)
def test_config_with_the_open_values_filled_in_makes_tensors_of_the_same_names_and_shapes(
    name: str, prefix: str, base: Base
) -> None:
    """What is read, and nothing else, is enough to make the adapter again."""
    config = CONFIGS[name]()
    model = AutoModel.from_pretrained(base("bert"))
    expected = shapes_of(injection.inject(model, config))
    found = implied.read_config({prefix + key: shape for key, shape in expected.items()})
    assert found is not None
    given = {setting: getattr(config, setting) for setting in found.open}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = injection.inject(AutoModel.from_pretrained(base("bert")), found.to_config(**given))
    assert shapes_of(again) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lora", "LoraConfig(r=4, lora_alpha=…, target_modules=['query', 'value'])"),
        ("dora", "LoraConfig(r=4, lora_alpha=…, target_modules=['query', 'value'], use_dora=True)"),
        (
            "modules to save",
            "LoraConfig(r=4, lora_alpha=…, modules_to_save=['pooler'], target_modules=['query', 'value'])",
        ),
        ("one of two that end alike", "LoraConfig(r=4, lora_alpha=…, target_modules=['attention.output.dense'])"),
        ("ia3 without feedforward", "IA3Config(feedforward_modules=[], target_modules=['query'])"),
    ],
)
def test_text_is_the_call_with_the_open_value_left_open(name: str, text: str, base: Base) -> None:
    model = injection.inject(AutoModel.from_pretrained(base("bert")), CONFIGS[name]())
    found = implied.read_config(shapes_of(model))
    assert found is not None
    assert found.text == text


def test_model_without_an_adapter_implies_nothing(base: Base) -> None:
    assert implied.read_config(shapes_of(AutoModel.from_pretrained(base("bert")))) is None
    assert implied.read_config({}) is None


def test_text_of_a_given_config_shows_what_can_be_compared(base: Base) -> None:
    model = injection.inject(AutoModel.from_pretrained(base("bert")), lora())
    found = implied.read_config(shapes_of(model))
    assert found is not None
    assert implied.text_of(lora(r=8), found) == "LoraConfig(lora_alpha=12, r=8, target_modules=['query', 'value'])"
    assert implied.text_of(IA3Config(target_modules="all-linear"), found) == "IA3Config(target_modules='all-linear')"


SPEAKING = {"BEFT", "IA3", "LN_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA"}
"""Methods that need no config: what their tensors say is all that changes predictions."""


@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_methods_whose_tensors_do_not_say_everything_have_open_settings(
    method: Method, kind: str, base: Base, made: Make
) -> None:
    """A scale or a seed that no tensor shows is asked for, whatever the method; no module is named after a wrapper."""
    embeddings = made(method.name, kind)
    found = implied.read_config(shapes_of(embeddings.model, "embeddings.model."))
    assert found is not None
    says_everything = found.method in SPEAKING and method.name != "vera_without_projection"
    assert bool(found.open) != says_everything
    assert all(f"{name}=…" in found.text for name in found.open)
    assert "base_model" not in found.settings.get("target_modules", [])
    if says_everything and kind == "encoder":
        expected, again = shapes_of(embeddings.model), AutoModel.from_pretrained(base("bert"))
        again.resize_token_embeddings(embeddings.model.get_input_embeddings().weight.shape[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert shapes_of(injection.inject(again, configs.own_config(found.to_config()))) == expected


def test_open_settings_of_gralora_are_those_that_change_predictions(base: Base) -> None:
    """The call is printed with what has to be filled in, and nothing of what only starts or trains an adapter."""
    embeddings = make_embeddings(METHODS["GRALORA"], "encoder", base, torch.float32)
    found = implied.read_config(shapes_of(embeddings.model))
    assert found is not None
    assert found.open == ("r", "hybrid_r", "alpha", "gralora_k")
    assert found.text == (
        "GraloraConfig(r=…, hybrid_r=…, alpha=…, gralora_k=…, target_modules=['intermediate.dense', 'query', 'value'])"
    )
