"""Adapters within a budget: left on disk, back when they are used, and the same bits all the time."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.nn import Model
from peft import get_peft_model_state_dict, set_peft_model_state_dict

import flair_peft
from flair_peft import SharedBase
from flair_peft.embeddings import offload
from flair_peft.errors import AdapterConfigError
from tests.support.models import save_random, train_a_step
from tests.support.predictions import TEXTS, labels_of


def size_of(model: Model) -> int:
    return sum(p.nbytes for name, p in model.named_parameters() if "lora" in name)


def predicted(model: Model) -> list[Any]:
    sentences = [Sentence(text) for text in TEXTS]
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return labels_of(sentences)


def load(base: str, folder: Path, *, count: int, keep: float, **options: Any) -> tuple[SharedBase, list[Model]]:
    """Return models on a base whose budget is that of ``keep`` adapters."""
    directories = [save_random("text-classifier", base, folder / str(i), seed=i)[0] for i in range(count)]
    size = size_of(flair_peft.from_pretrained(directories[0]))
    shared = SharedBase(base, adapter_memory=int(size * keep), **options)
    return shared, [shared.load(directory) for directory in directories]


def on_disk(model: Model) -> bool:
    """Whether the adapter's tensors are those of its file."""
    memory = model.embeddings.adapter_memory
    return bool(memory._adapters[id(model.embeddings)].places)


def test_adapters_beyond_the_budget_are_left_on_disk_and_predict_the_same(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """The ones used last are in memory; the others come back when they are used."""
    _, models = load(base("bert"), tmp_path, count=4, keep=2.5)
    alone = [predicted(flair_peft.from_pretrained(tmp_path / str(i))) for i in range(4)]
    assert [on_disk(model) for model in models] == [True, True, False, False]
    assert predicted(models[0]) == alone[0]
    assert [on_disk(model) for model in models] == [False, True, True, False]
    assert [predicted(model) for model in models] == alone


@pytest.mark.parametrize("convert", [Model.float, Model.double, lambda model: model.to(torch.float32)])
def test_conversion_of_a_model_whose_adapter_is_on_disk_is_that_of_one_in_memory(
    convert: Callable[[Model], Model], base: Callable[[str], str], tmp_path: Path
) -> None:
    """It has the exact values then, and keeps them when it is used."""
    found = []
    for budget in (0.0, 9.0):
        _, (model, _) = load(base("bert"), tmp_path / str(budget), count=2, keep=budget, dtype="bfloat16")
        assert on_disk(model) is (budget == 0)
        dtypes = {p.dtype for p in convert(model).parameters() if p.is_floating_point()}
        found.append((predicted(model), {name: t for name, t in model.state_dict().items() if "lora" in name}))
        assert dtypes == {p.dtype for p in model.parameters() if p.is_floating_point()} != {torch.bfloat16}
    (labels, weights), (other_labels, other_weights) = found
    assert labels == other_labels
    assert weights
    assert all(torch.equal(weights[name], other_weights[name]) for name in weights)


def test_adapters_beyond_the_budget_predict_together(base: Callable[[str], str], tmp_path: Path) -> None:
    """A mixed pass needs all of its adapters at once, whatever the budget."""
    shared, models = load(base("bert"), tmp_path, count=4, keep=1)
    sentences = {model: [Sentence(text) for text in TEXTS] for model in models}
    shared.predict(sentences)
    for number, (model, found) in enumerate(sentences.items()):
        expected = [Sentence(text) for text in TEXTS]
        flair_peft.from_pretrained(tmp_path / str(number)).predict(expected)
        for one, other in zip(found, expected, strict=True):
            assert one.get_label("sentiment").value == other.get_label("sentiment").value
            assert one.get_label("sentiment").score == pytest.approx(other.get_label("sentiment").score, abs=1e-5)
        assert model in shared.models


def test_adapter_on_disk_is_saved_copied_and_trained_with_its_values(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Its tensors hold the values of the file, wherever they are."""
    _, models = load(base("bert"), tmp_path, count=2, keep=1)
    assert on_disk(models[0])
    expected = predicted(flair_peft.from_pretrained(tmp_path / "0"))
    flair_peft.save_pretrained(models[0], tmp_path / "again")
    stored = [(tmp_path / folder / "adapter_model.safetensors").read_bytes() for folder in ("0", "again")]
    assert stored[0] == stored[1]
    copied = copy.deepcopy(models[0])
    assert predicted(copied) == expected
    predicted(models[1])
    assert on_disk(models[0])
    train_a_step(models[0], "sentiment")
    assert predicted(models[0]) != expected
    assert predicted(copied) == predicted(flair_peft.from_pretrained(tmp_path / "0")) == expected


def test_adapter_that_was_trained_stays_in_memory(base: Callable[[str], str], tmp_path: Path) -> None:
    """What differs from the file is nowhere else."""
    _, models = load(base("bert"), tmp_path, count=3, keep=1)
    train_a_step(models[0], "sentiment")
    trained = predicted(models[0])
    predicted(models[1])
    predicted(models[2])
    assert predicted(models[0]) == trained


def _load_state(model: Model, other: Model) -> None:
    model.load_state_dict(other.state_dict())


def _hotswap(model: Model, other: Model) -> None:
    state = get_peft_model_state_dict(other.embeddings.model, save_embedding_layers=False)
    set_peft_model_state_dict(model.embeddings.model, {name: tensor.clone() for name, tensor in state.items()})


def _scale(model: Model, _: Model) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)


@pytest.mark.parametrize("change", [_load_state, _hotswap, _scale], ids=lambda change: change.__name__)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_adapter_that_was_changed_in_place_stays_as_it_is(
    dtype: str, change: Callable[[Model, Model], None], base: Callable[[str], str], tmp_path: Path
) -> None:
    """By whatever function, and whatever it computes in: its file has other values, and nobody else has these."""
    shared, (changed, other) = load(base("bert"), tmp_path, count=2, keep=1, dtype=dtype)
    before = predicted(changed)
    change(changed, other)
    after = predicted(changed)
    assert after != before
    predicted(other)
    predicted(shared.load(tmp_path / "0"))
    assert predicted(changed) == after
    flair_peft.save_pretrained(changed, tmp_path / "changed")
    assert predicted(shared.load(tmp_path / "changed")) == after


def test_adapter_on_disk_is_the_one_that_was_loaded_though_the_directory_holds_another(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A checkpoint that is replaced later changes no model that was loaded before."""
    _, models = load(base("bert"), tmp_path, count=2, keep=1)
    before = predicted(models[0])
    predicted(models[1])
    assert on_disk(models[0])
    save_random("text-classifier", base("bert"), tmp_path / "0", seed=9)
    assert predicted(models[0]) == before


def test_adapters_in_half_precision_come_back_in_it(base: Callable[[str], str], tmp_path: Path) -> None:
    """Files hold fp32; the base computes in bf16."""
    shared = SharedBase(base("bert"), dtype="bfloat16", adapter_memory=0)
    directories = [save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0] for i in range(2)]
    models = [shared.load(directory) for directory in directories]
    free = SharedBase(base("bert"), dtype="bfloat16")
    expected = [predicted(free.load(directory)) for directory in directories]
    assert [predicted(model) for model in models] == expected
    assert [predicted(model) for model in reversed(models)] == expected[::-1]
    assert on_disk(models[1])
    dtypes = {p.dtype for name, p in models[0].named_parameters() if "lora" in name}
    assert dtypes == {torch.bfloat16}


def test_adapters_within_a_budget_serve_threads(base: Callable[[str], str], tmp_path: Path) -> None:
    """No adapter leaves while somebody computes with it."""
    _, models = load(base("bert"), tmp_path, count=6, keep=2, dtype="bfloat16")
    expected = [predicted(model) for model in models]
    wrong: list[Any] = []

    def work(start: int) -> None:
        for turn in range(12):
            index = (start + turn) % len(models)
            if predicted(models[index]) != expected[index]:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(start,)) for start in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_budget_that_is_no_size_is_refused(base: Callable[[str], str]) -> None:
    """Sizes are bytes or texts."""
    assert SharedBase(base("bert"), adapter_memory="1MB")._memory is not None
    for size in (-1, "many", 1.5e6):
        with pytest.raises(AdapterConfigError, match="that is no size"):
            SharedBase(base("bert"), adapter_memory=size)


def test_unloaded_model_has_its_adapter_in_memory_for_good(base: Callable[[str], str], tmp_path: Path) -> None:
    """Outside of the base's care, a model depends on no file."""
    shared, models = load(base("bert"), tmp_path, count=2, keep=1)
    before = predicted(flair_peft.from_pretrained(tmp_path / "0"))
    shared.unload(models[0])
    assert predicted(models[0]) == before


def test_models_may_go_while_adapters_are_counted(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread drops the last reference to a model in the middle of a forward pass of another."""
    _, models = load(base("bert"), tmp_path, count=3, keep=1.5)
    expected = predicted(models[0])
    size_of_adapter = offload._size

    def size(*arguments: Any) -> int:
        del models[1:]
        gc.collect()
        return size_of_adapter(*arguments)

    monkeypatch.setattr(offload, "_size", size)
    assert predicted(models[0]) == expected
    assert len(models) == 1


@pytest.mark.parametrize("memory", [None, 1], ids=["in memory", "within a budget"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_what_is_written_into_a_state_dict_is_in_the_model(
    dtype: str, memory: int | None, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Averages of weights are made so; where the model computes in half precision, what it gives are exact values."""
    directories = [save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0] for i in range(2)]
    shared = SharedBase(base("bert"), dtype=dtype, adapter_memory=memory)
    model, other = map(shared.load, directories)
    before = predicted(model)
    copied = copy.deepcopy(model)
    for each in (model, copied):
        for name, tensor in each.state_dict().items():
            if "lora_B" in name or name.startswith("decoder"):
                tensor.mul_(2)
        expected = [tensor.clone() for tensor in each.state_dict().values()]
        after = predicted(each)
        assert after != before
        predicted(other)
        assert predicted(each) == after
        assert all(map(torch.equal, each.state_dict().values(), expected))
        flair_peft.save_pretrained(each, tmp_path / "written")
        assert predicted(shared.load(tmp_path / "written")) == after
        each.train()
        assert all(map(torch.equal, each.state_dict().values(), expected))
