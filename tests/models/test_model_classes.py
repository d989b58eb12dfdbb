"""Each trainable model class of Flair, with an adapter, through its whole life."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flair
import pytest
import torch
from flair.nn import Model

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from tests.support import round_trip
from tests.support.configs import lora
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO

LORA = lora(target_modules=["query", "value", "dense"])


def adapted(model: Model) -> list[PeftTransformerEmbeddings]:
    return [module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings)]


def head_dtypes(model: Model) -> set[torch.dtype]:
    """Return the dtypes of the floating-point parameters outside the embeddings."""
    inside = {id(parameter) for embeddings in adapted(model) for parameter in embeddings.parameters()}
    return {p.dtype for p in model.parameters() if id(p) not in inside and p.is_floating_point()}


@pytest.fixture(scope="module")
def trained(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Return a function from model name and dtype to a trained model, its corpus, its entry and its directory."""
    models: dict[Any, Any] = {}

    def train(name: str, dtype: torch.dtype = torch.float32) -> Any:
        if (name, dtype) not in models:
            directory = tmp_path_factory.mktemp(name)
            factories = round_trip.Factories(base("bert"), LORA, dtype=dtype)
            models[name, dtype] = (*round_trip.train_and_save(name, factories, directory), directory)
        return models[name, dtype]

    return train


@pytest.mark.parametrize("name", ZOO)
def test_model_in_fp32_predicts_bit_equal_after_loading(name: str, trained: Callable[..., Any]) -> None:
    """Every model class loads as what it was, and gives the very numbers that the live model gives."""
    model, corpus, entry, directory = trained(name)
    loaded = round_trip.load(directory)
    assert type(loaded) is type(model)
    assert round_trip.largest_difference(entry.predict(model, corpus), entry.predict(loaded, corpus)) == 0.0


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_model_in_bf16_predicts_the_same_after_loading(name: str, trained: Callable[..., Any]) -> None:
    """With a bf16 base, a head of linear layers is cast and agrees to bf16's rounding; every other is exact."""
    model, corpus, entry, directory = trained(name, torch.bfloat16)
    loaded = round_trip.load(directory)
    assert {embeddings.base_dtype for embeddings in adapted(loaded)} == {torch.bfloat16}
    assert head_dtypes(model) <= {torch.float32}
    is_cast = head_dtypes(loaded) == {torch.bfloat16}
    tolerance = round_trip.SCORE_TOLERANCE[torch.bfloat16] if is_cast else 0.0
    assert round_trip.largest_difference(entry.predict(model, corpus), entry.predict(loaded, corpus)) <= tolerance


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_model_saved_after_loading_loads_the_same_again(name: str, trained: Callable[..., Any], tmp_path: Path) -> None:
    """A cast head is saved with the exact values it was trained to, so a second generation equals the first."""
    model, _, _, directory = trained(name, torch.bfloat16)
    round_trip.load(directory).save(tmp_path / "final-model.pt")
    again = round_trip.load(tmp_path)
    again.train()
    stored = {name: tensor for name, tensor in again.state_dict().items() if not name.endswith("position_ids")}
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[key]), key
        assert tensor.dtype == stored[key].dtype, key


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_model_goes_on_training_after_loading(name: str, trained: Callable[..., Any], tmp_path: Path) -> None:
    """A loaded model trains with the head in fp32, and its adapter and its head change."""
    _, _, entry, directory = trained(name, torch.bfloat16)
    loaded = round_trip.load(directory)
    trainable = {name: p.detach().float().clone() for name, p in loaded.named_parameters() if p.requires_grad}
    entry.train(loaded, entry.corpus(), tmp_path)
    assert head_dtypes(loaded) <= {torch.float32}
    changed = {
        name for name, p in loaded.named_parameters() if p.requires_grad and not torch.equal(p.float(), trainable[name])
    }
    assert any("lora_" in name for name in changed)
    assert any("lora_" not in name for name in changed) or not head_dtypes(loaded)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_loaded_model_converted_as_a_whole_keeps_predicting(
    name: str, dtype: torch.dtype, trained: Callable[..., Any]
) -> None:
    """``half()`` and ``bfloat16()`` leave no two parts that cannot be multiplied; heads that need fp32 keep it."""
    _, corpus, entry, directory = trained(name)
    loaded = round_trip.load(directory)
    before, loss = entry.predict(loaded, corpus), entry.loss(loaded, corpus)
    (loaded.half if dtype == torch.float16 else loaded.bfloat16)()
    assert len(entry.predict(loaded, corpus)) == len(before)
    # Rounding can change the best of two labels that are nearly equal, but the loss only a little.
    assert entry.loss(loaded, corpus) == pytest.approx(loss, rel=2e-2 if dtype == torch.float16 else 1e-1)
    assert {embeddings.base_dtype for embeddings in adapted(loaded)} == {dtype}
    outputs = {embeddings.output_dtype for embeddings in adapted(loaded)}
    assert head_dtypes(loaded) <= outputs <= {dtype, torch.float32}
    assert len(outputs) == 1


# Flair's DocumentRNNEmbeddings reads constructor parameters in __setstate__, so it cannot be copied.
@pytest.mark.parametrize("name", few([name for name in ZOO if name != "text-classifier-rnn"], ONE_OF_A_KIND))
def test_deep_copy_of_model_predicts_the_same_and_is_independent(name: str, trained: Callable[..., Any]) -> None:
    """A copy gives the numbers of the original, and changing it leaves the original as it was."""
    model, corpus, entry, _ = trained(name)
    before = entry.predict(model, corpus)
    clone = copy.deepcopy(model)
    assert round_trip.largest_difference(before, entry.predict(clone, corpus)) == 0.0
    with torch.no_grad():
        for parameter in clone.parameters():
            parameter.add_(1.0)
    assert round_trip.largest_difference(before, entry.predict(model, corpus)) == 0.0


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger-crf", "multitask"])
def test_pickled_model_predicts_the_same(name: str, trained: Callable[..., Any]) -> None:
    """A model survives pickle, which multiprocessing and experiment trackers use."""
    model, corpus, entry, _ = trained(name)
    clone = pickle.loads(pickle.dumps(model))
    assert round_trip.largest_difference(entry.predict(model, corpus), entry.predict(clone, corpus)) == 0.0


@pytest.mark.parametrize("name", ["multitask", "multitask-word-and-document"])
def test_multitask_model_shares_its_embeddings_again_after_loading(name: str, trained: Callable[..., Any]) -> None:
    """Tasks that shared one embedding share one object after loading, so there is one base and one adapter."""
    model, _, _, directory = trained(name)
    assert len(adapted(model)) == len(adapted(round_trip.load(directory))) == 1


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), torch.device("cpu", 0)], ids=repr)
def test_loaded_model_keeps_predicting_on_another_spelling_of_the_device(
    device: Any, trained: Callable[..., Any]
) -> None:
    """``flair.device`` may be a string, and ``model.to`` may name the device it is on."""
    model, corpus, entry, directory = trained("text-classifier")
    flair.device = device
    loaded = round_trip.load(directory).to(device)
    assert round_trip.largest_difference(entry.predict(model, corpus), entry.predict(loaded, corpus)) == 0.0
