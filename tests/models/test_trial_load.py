"""Before a training, what files would hold of a model is loaded: what nothing could load is said while that helps."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.models import TextClassifier
from flair.trainers import ModelTrainer

from flair_peft.errors import StateMismatchError
from flair_peft.models import save
from tests.support.configs import lora
from tests.support.methods import METHODS
from tests.support.models import CLASSIFIER, make
from tests.support.zoo import ZOO

Base = Callable[[str], str]
SAID = "does not load as the same model"


def _put_in_layers(model: Any) -> None:
    size = model.decoder.in_features
    model.decoder = torch.nn.Sequential(torch.nn.Linear(size, size), torch.nn.ReLU(), torch.nn.Linear(size, 3))


def _add_label(model: Any) -> None:
    model.label_dictionary.add_item("another")


def _exchange_activation(model: Any) -> None:
    for layer in model.embeddings.base_model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()


def _hook(model: Any) -> None:
    layer = model.embeddings.base_model.encoder.layer[0]
    layer.intermediate.register_forward_hook(lambda _module, _given, found: found * 1.5)


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "layers of the head": (_put_in_layers, "missing: 'decoder.bias'"),
    "a label": (_add_label, "size mismatch for decoder.weight"),
    "a buffer": (lambda model: model.register_buffer("mine", torch.zeros(3)), "unexpected: 'mine'"),
    "weight norm": (lambda model: torch.nn.utils.parametrizations.weight_norm(model.decoder), "missing"),
    "an activation": (_exchange_activation, "its vectors of a probe sentence"),
    "a hook": (_hook, "its vectors of a probe sentence"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_what_no_load_would_give_back_is_said_before_the_first_epoch(
    change: Callable[[Any], Any], words: str, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is so: the file of the training cannot be loaded."""
    model = make(CLASSIFIER, base("bert"), lora())
    change(model)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        ModelTrainer(model, CLASSIFIER.corpus()).fine_tune(tmp_path, max_epochs=1)
    (said,) = (record.getMessage() for record in caplog.records if SAID in record.getMessage())
    assert words in said
    with pytest.raises(StateMismatchError):
        TextClassifier.load(tmp_path / "final-model.pt")


@pytest.mark.parametrize("name", ZOO)
def test_nothing_is_said_of_models_as_they_are_made(name: str, base: Base, caplog: pytest.LogCaptureFixture) -> None:
    """Of any class of Flair's."""
    with caplog.at_level(logging.DEBUG, "flair_peft"):
        save.check_storable(make(ZOO[name], base("bert"), lora()))
    assert not [
        record for record in caplog.records if SAID in record.getMessage() or "Not tried" in record.getMessage()
    ]


@pytest.mark.parametrize("method", ["PROMPT_TUNING", "PREFIX_TUNING", "IA3", "VERA", "OFT", "TRAINABLE_TOKENS"])
def test_nothing_is_said_of_adapters_as_they_are_made(
    method: str, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of a prompt and rows of the vocabulary are in several places."""
    with caplog.at_level(logging.DEBUG, "flair_peft"):
        save.check_storable(make(CLASSIFIER, base("bert"), METHODS[method].config("encoder")))
    assert not [
        record for record in caplog.records if SAID in record.getMessage() or "Not tried" in record.getMessage()
    ]


def test_trial_changes_nothing(base: Base) -> None:
    """Neither random numbers, nor weights, nor the mode, nor what the model predicts."""
    model = make(CLASSIFIER, base("bert"), lora(init_lora_weights=False)).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    save.check_storable(model)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert all(module.training for module in model.embeddings.base_model.modules())


def test_large_bases_are_not_loaded_once_more(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial would take their memory twice."""
    monkeypatch.setattr(save, "_LARGEST_TRIAL", 0)
    monkeypatch.setattr(save.trial_load, "report_loss", lambda *_: pytest.fail("it is loaded"))
    save.check_storable(make(CLASSIFIER, base("bert"), lora()))


def test_whole_model_counts_for_the_limit(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables of words beside a small base are loaded with it."""
    model = make(CLASSIFIER, base("bert"), lora())
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    tried = list[object]()
    monkeypatch.setattr(save.trial_load, "report_loss", lambda plan, _: tried.append(plan))
    monkeypatch.setattr(save, "_LARGEST_TRIAL", size)
    save.check_storable(model)
    assert len(tried) == 1
    model.table = torch.nn.Embedding(100, 8)
    save.check_storable(model)
    assert len(tried) == 1
