"""A transformer whose layers somebody changed is not trained: a load builds the one that its config says."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.trainers import ModelTrainer
from transformers import PreTrainedModel

import flair_peft
from flair_peft.base import like_config
from flair_peft.errors import StateMismatchError, UnsupportedStateError
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, make

Base = Callable[[str], str]


def _cut(base: PreTrainedModel) -> None:
    base.encoder.layer = base.encoder.layer[:1]


def _put_in(base: PreTrainedModel) -> None:
    base.embeddings.dropout = torch.nn.Sequential(torch.nn.Linear(32, 32), base.embeddings.dropout)


def _take_out(base: PreTrainedModel) -> None:
    base.embeddings.LayerNorm = torch.nn.Identity()


CHANGES = {
    "layers that are cut off": (_cut, r"without 'encoder\.layer\.1\.attention"),
    "a layer that is put in": (_put_in, r"with 'embeddings\.dropout\.0'"),
    "a norm that is taken out": (_take_out, r"without 'embeddings\.LayerNorm'"),
    "heads that are pruned": (lambda base: base.prune_heads({0: [1]}), r"without '1 heads of layer 0'"),
}


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_transformer_that_is_not_what_its_config_says_is_not_trained(
    change: Callable[[PreTrainedModel], None], words: str, base: Base, tmp_path: Path
) -> None:
    """No training begins that would end in a file that nothing loads; not even after a save."""
    model = make(CLASSIFIER, base("bert"), lora(target_modules=["value"]))
    model.save(tmp_path / "before.pt")
    change(model.embeddings.base_model)
    with pytest.raises(UnsupportedStateError, match=words):
        ModelTrainer(model, CLASSIFIER.corpus()).fine_tune(tmp_path / "training", max_epochs=1)
    assert not list(tmp_path.glob("training/*.pt"))


@pytest.mark.parametrize(("change", "words"), CHANGES.values(), ids=CHANGES)
def test_transformer_that_was_changed_by_then_is_saved_with_a_word(
    change: Callable[[PreTrainedModel], None],
    words: str,
    base: Base,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What was trained is not lost, and nothing loads it as something else."""
    model = make(CLASSIFIER, base("bert"), lora(target_modules=["value"]))
    change(model.embeddings.base_model)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        model.save(tmp_path / "after.pt")
    assert re.search(rf"is saved {words}.*nothing would load the file", caplog.text)
    with pytest.raises(StateMismatchError):
        flair_peft.from_pretrained(tmp_path / "after.pt")


def test_transformer_that_cannot_be_made_without_values_is_stored(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Some classes ask tensors for numbers when they are made."""
    model = make(CLASSIFIER, base("bert"), lora()).eval()

    def build(*_: Any, **__: Any) -> None:
        torch.linspace(0, 1, 2, device="meta").sum().item()

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "flair_peft"):
        patched.setattr(like_config.transformer, "build_model", build)
        model.save(tmp_path / "model.pt")
    assert not caplog.records
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    assert CLASSIFIER.predict(flair_peft.from_pretrained(tmp_path / "model.pt"), CLASSIFIER.corpus()) == expected


def test_transformer_of_fewer_layers_is_stored_where_its_config_says_so(base: Base, tmp_path: Path) -> None:
    """As the error says; and whatever became of a pooler, which no hidden state depends on."""
    model = make(CLASSIFIER, base("bert"), lora(), transformers_config_kwargs={"num_hidden_layers": 1}).eval()
    assert len(model.embeddings.base_model.encoder.layer) == 1
    model.embeddings.base_model.pooler = None
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    model.save(tmp_path / "model.pt")
    assert CLASSIFIER.predict(flair_peft.from_pretrained(tmp_path / "model.pt"), CLASSIFIER.corpus()) == expected
