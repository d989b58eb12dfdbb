"""Models with one config on one base: those that are copied are what PEFT would have made, and are nobody else's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from peft import PeftModel

import flair_peft
from flair_peft.adapter import injection
from flair_peft.base import adapter_template
from tests.support.configs import lora
from tests.support.method_cases import make_embeddings, one_kind_each
from tests.support.methods import Method, perturb_
from tests.support.models import classifier, save_random, train_a_step
from tests.support.predictions import TEXTS

Base = Callable[[str], str]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[PeftModel]:
    """Return a list that grows by each model that PEFT adds an adapter to when one is loaded."""
    models, add = list[PeftModel](), injection.inject_skeleton

    def adding(*args: Any, **kwargs: Any) -> PeftModel:
        models.append(add(*args, **kwargs))
        return models[-1]

    monkeypatch.setattr(injection, "inject_skeleton", adding)
    return models


def scores(model: Any) -> list[float]:
    sentences = [Sentence(text.split()) for text in TEXTS]
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return [label.score for sentence in sentences for label in sentence.get_labels(model.label_type)]


def own_addresses(model: Any) -> set[int]:
    """Return where the memory is of all that a model trains."""
    return {parameter.data_ptr() for parameter in model.parameters() if parameter.requires_grad}


@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_copied_model_is_what_the_first_one_is(method: Method, kind: str, base: Base, tmp_path: Path) -> None:
    """For every method: classes, values, what is trained, config and predictions are those of the first."""
    labels = Dictionary(add_unk=False)
    labels.add_item("positive"), labels.add_item("negative")
    embeddings = make_embeddings(method, kind, base, torch.float32)
    flair_peft.save_pretrained(
        TextClassifier(embeddings, label_dictionary=labels, label_type="sentiment").eval(), tmp_path / "model"
    )
    first, _second, third = (flair_peft.from_pretrained(tmp_path / "model") for _ in range(3))
    assert [type(module) for module in first.modules()] == [type(module) for module in third.modules()]
    values, others = first.state_dict(), third.state_dict()
    assert values.keys() == others.keys()
    assert all(torch.equal(values[name], others[name]) for name in values)
    trained = [{name: p.requires_grad for name, p in model.named_parameters()} for model in (first, third)]
    assert trained[0] == trained[1]
    assert first.embeddings.adapter_config == third.embeddings.adapter_config
    assert first.embeddings.adapter_config is not third.embeddings.adapter_config
    assert scores(first) == scores(third)


def test_copied_models_are_added_by_peft_no_more(base: Base, tmp_path: Path, made: list[PeftModel]) -> None:
    """The second model is what is copied, so that the third needs no walk of PEFT's; another config needs one."""
    same = [save_random("text-classifier", base("bert"), tmp_path / str(seed), seed=seed)[0] for seed in range(4)]
    other, _ = save_random("text-classifier", base("bert"), tmp_path / "other", config=lora(r=3, target_modules=None))
    kept = [flair_peft.from_pretrained(path) for path in same]
    assert len(made) == 2
    kept.append(flair_peft.from_pretrained(other))
    assert len(made) == 3
    assert len({tuple(scores(model)) for model in kept}) == len(kept)


@pytest.mark.parametrize(
    "options",
    [{}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["output.dense"]}, {"lora_dropout": 0.5}],
    ids=str,
)
def test_training_a_copied_model_changes_no_other(options: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """What one learns, and what it trains of the base, is in memory of its own; the next starts as the file says."""
    path, _ = save_random("text-classifier", base("bert"), tmp_path / "model", config=lora(**options))
    models = [flair_peft.from_pretrained(path) for _ in range(4)]
    before = [scores(model) for model in models]
    assert all(own_addresses(a).isdisjoint(own_addresses(b)) for a in models for b in models if a is not b)
    for number in (1, 2):
        train_a_step(models[number], models[number].label_type)
        assert scores(models[number]) != before[number]
    assert [scores(models[0]), scores(models[3])] == [before[0], before[3]]
    assert scores(flair_peft.from_pretrained(path)) == before[0]


def test_adapter_that_takes_much_memory_is_not_kept(
    base: Base, tmp_path: Path, made: list[PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more copy of what is trained is held for the models to come: only where that is little beside the base."""
    monkeypatch.setattr(adapter_template, "_FEW_NUMBERS", 0)
    path, _ = save_random("text-classifier", base("bert"), tmp_path / "model", config=lora(r=32))
    kept = [flair_peft.from_pretrained(path) for _ in range(4)]
    assert len(made) == len(kept)


def test_config_that_a_user_changes_is_that_of_one_model(base: Base, tmp_path: Path) -> None:
    """Models copied from one another have configs and layers of their own."""
    path, _ = save_random("text-classifier", base("bert"), tmp_path / "model")
    models: list[Any] = [flair_peft.from_pretrained(path) for _ in range(4)]
    models[2].embeddings.adapter_config.lora_alpha = 1
    perturb_(models[2].embeddings.model, seed=9)
    models[2].embeddings.model.base_model.disable_adapter_layers()
    assert models[3].embeddings.adapter_config.lora_alpha != 1
    assert scores(models[3]) == scores(models[0]) == scores(flair_peft.from_pretrained(path))


def test_threads_that_load_at_once_get_models_that_predict_alike(base: Base, tmp_path: Path) -> None:
    """Several threads may load, and copy, while others do."""
    path, _ = save_random("text-classifier", base("bert"), tmp_path / "model")
    shared = flair_peft.SharedBase(base("bert"))
    expected, found = scores(shared.load(path)), list[Any]()
    threads = [threading.Thread(target=lambda: found.extend(shared.load(path) for _ in range(3))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [scores(model) for model in found] == [expected] * 12


def test_copied_model_is_saved_and_loads_as_what_it_is(base: Base, tmp_path: Path) -> None:
    """A file of a model that was copied is that of the model it equals."""
    path, _ = save_random("text-classifier", base("bert"), tmp_path / "model")
    models = [flair_peft.from_pretrained(path) for _ in range(3)]
    models[2].save(tmp_path / "again.pt")
    assert scores(TextClassifier.load(tmp_path / "again.pt")) == scores(models[0])
    assert scores(classifier(base("bert"))) != scores(models[0])
