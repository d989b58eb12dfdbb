"""The published matrix: 154 combinations that released Flair cannot load, each from training to predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import round_trip, tiny
from tests.support.configs import lora
from tests.support.methods import MATRIX, Method
from tests.support.selection import few

MODELS = ("text-classifier", "sequence-tagger")
MATRIX_ARCHITECTURES = (
    "bert",
    "roberta",
    "xlm-roberta",
    "deberta-v2",
    "electra",
    "distilbert",
    "albert",
    "modernbert",
    "xlnet",
    "t5",
    "llama",
)
OTHER_ARCHITECTURES = ("gpt2", "qwen2", "qwen3", "mistral", "gemma", "bert-slow", "bert-mlm", "bert-padded-vocab")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_round_trip(factories: round_trip.Factories, model_name: str, dtype: torch.dtype, directory: Path) -> None:
    model, corpus, entry = round_trip.train_and_save(model_name, factories, directory)
    before = entry.predict(model, corpus)
    loaded = round_trip.load(directory)

    assert [e.base_dtype for e in factories.made] == [dtype] * len(factories.made)
    difference = round_trip.largest_difference(before, entry.predict(loaded, corpus))
    is_cast = {tensor.dtype for name, tensor in loaded.named_parameters() if "embeddings" not in name} == {dtype}
    assert difference <= (round_trip.SCORE_TOLERANCE[dtype] if is_cast else 0.0)


# PEFT's own words on kernels that it could not compile and on layers that it does not know.
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("model_name", few(MODELS, ["text-classifier"]))
@pytest.mark.parametrize("dtype", few([torch.float32, torch.bfloat16], [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("method", list(MATRIX.values()), ids=list(MATRIX))
def test_method_on_bert_predicts_the_same_after_loading(
    method: Method, dtype: torch.dtype, model_name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Each of 22 PEFT configurations survives train → save → load, in fp32 and bf16."""
    factories = round_trip.Factories(base("bert"), method.config("encoder"), dtype=dtype)
    check_round_trip(factories, model_name, dtype, tmp_path)


@pytest.mark.parametrize("model_name", few(MODELS, ["sequence-tagger"]))
@pytest.mark.parametrize("dtype", few(DTYPES, [torch.bfloat16]), ids=str)
@pytest.mark.parametrize("architecture", [*MATRIX_ARCHITECTURES, *OTHER_ARCHITECTURES])
def test_lora_on_architecture_predicts_the_same_after_loading(
    architecture: str, dtype: torch.dtype, model_name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """LoRA survives train → save → load on each architecture, in fp32, bf16 and fp16."""
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture], fan_in_fan_out=architecture == "gpt2")
    options = {"transformers_tokenizer_kwargs": {"use_fast": False}} if architecture == "bert-slow" else {}
    factories = round_trip.Factories(base(architecture), config, dtype=dtype, **options)
    check_round_trip(factories, model_name, dtype, tmp_path)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer")
@pytest.mark.parametrize("model_name", few(MODELS, ["sequence-tagger"]))
@pytest.mark.parametrize("architecture", few(tiny.MORE_TARGETS, ["umt5", "squeezebert"]))
def test_lora_on_uncommon_architecture_predicts_the_same_after_loading(
    architecture: str, model_name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """LoRA survives train → save → load on architectures that stock Flair or PEFT treat apart."""
    config = lora(target_modules=tiny.MORE_TARGETS[architecture])
    factories = round_trip.Factories(base(architecture), config, dtype=torch.float32)
    check_round_trip(factories, model_name, torch.float32, tmp_path)


def test_matrix_has_its_154_combinations() -> None:
    """The published number counts 22 configurations in two dtypes and 11 architectures in three, on two models."""
    on_bert = len(MATRIX) * 2 * len(MODELS)
    on_architectures = len(MATRIX_ARCHITECTURES) * len(DTYPES) * len(MODELS)
    assert on_bert + on_architectures == 154
