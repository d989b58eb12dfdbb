"""Slips of the pen of those who are new: each error names the slip, and what to do."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flair.models import SequenceTagger, TextClassifier
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import AutoModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.errors import (
    AdapterConfigError,
    BaseModelNotFoundError,
    FlairPeftError,
    MissingFileError,
    ModelFileError,
    TrainingSetupError,
    UnknownArgumentError,
)
from flair_peft.inspection.file_contents import read_contents
from tests.support.files import save_as
from tests.support.models import save_random
from tests.support.opinions import classifier, train

Embeddings = PeftTransformerDocumentEmbeddings
Slip = Callable[[str, Path], Any]


def saved_in(folder: Path, base: str) -> Path:
    """Return the folder of a training: files of models are in it, and it is no model itself."""
    (folder / "out").mkdir()
    classifier(base).save(folder / "out" / "final-model.pt")
    return folder / "out"


def with_base_elsewhere(folder: Path, base: str, form: str) -> str:
    """Return the path of a saved model whose base is not any more where it was."""
    copied = shutil.copytree(base, folder / "base")
    saved = save_as(form, classifier(str(copied)), folder)
    shutil.move(copied, folder / "moved")
    return str(saved)


SLIPS: dict[str, tuple[Slip, type[FlairPeftError], str]] = {
    "keyword": (lambda b, _: Embeddings(b, peft_cofig=IA3Config()), UnknownArgumentError, r"'peft_cofig'.* spelling"),
    "keyword of Flair's": (lambda b, _: Embeddings(b, fine_tun=False), UnknownArgumentError, r"'fine_tun'.* spelling"),
    "keyword of a base": (lambda b, _: SharedBase(b, device="cuda"), UnknownArgumentError, r"'device'.* spelling"),
    "option of a load": (
        lambda b, _: TextClassifier.load("model.pt", base=b),
        UnknownArgumentError,
        r"Cannot load with 'base'.*base_model, verify.* spelling",
    ),
    "live base": (lambda b, _: Embeddings(AutoModel.from_pretrained(b)), AdapterConfigError, r"on a BertModel.*path"),
    "no base": (lambda b, _: Embeddings(None), AdapterConfigError, r"on a NoneType.*path"),
    "file as base": (
        lambda b, folder: Embeddings(str(saved_in(folder, b) / "final-model.pt")),
        BaseModelNotFoundError,
        r"that is a file.*whole Flair model is loaded by",
    ),
    "layers": (
        lambda b, _: Embeddings(b, peft_config=LoraConfig(target_modules=["query"], layers_to_transform=[99])),
        AdapterConfigError,
        r"layers_to_transform=\[99\] chooses it has no 'query'.*it has 2\. Choose others",
    ),
    "name that Flair does not know": (
        lambda *_: TextClassifier.load("my-tager"),
        MissingFileError,
        r"'my-tager': there is no such file or directory here, and Flair knows no model.*Check the path",
    ),
    "name of a tagger that Flair does not know": (
        lambda *_: SequenceTagger.load("my-tager"),
        MissingFileError,
        r"'my-tager': there is no such file or directory here, and Flair knows no model.*Check the path",
    ),
    "learning rate as YAML reads it": (
        lambda b, folder: train(classifier(b), folder, learning_rate="5e-4"),
        TrainingSetupError,
        r"learning_rate='5e-4': it is text.*5\.0e-4",
    ),
    "hidden states by name": (
        lambda b, _: Embeddings(b, layers="last"),
        AdapterConfigError,
        r"layers='last': it is no string of numbers.*'-1'",
    ),
    "hidden states as a list": (
        lambda b, _: Embeddings(b, layers=[-1]),
        AdapterConfigError,
        r"layers=\[-1\]: it is no string of numbers.*'-1'",
    ),
    "config in second place": (
        lambda b, _: Embeddings(b, LoraConfig()),
        AdapterConfigError,
        r"layers=LoraConfig\(…\): the second argument.*peft_config=…",
    ),
    "file whose base moved": (
        lambda b, folder: TextClassifier.load(with_base_elsewhere(folder, b, "pt")),
        BaseModelNotFoundError,
        r"from '.*pt\.pt': its base model .*Pass base_model=",
    ),
    "directory whose base moved": (
        lambda b, folder: TextClassifier.load(with_base_elsewhere(folder, b, "directory")),
        BaseModelNotFoundError,
        r"from '.*directory': its base model .*Pass base_model=",
    ),
    "prompt of no length": (
        lambda b, _: Embeddings(b, peft_config=PromptTuningConfig()),
        AdapterConfigError,
        r"num_virtual_tokens=None.*Pass one",
    ),
    "prefix of no length": (
        lambda b, _: Embeddings(b, peft_config=PrefixTuningConfig()),
        AdapterConfigError,
        r"num_virtual_tokens=None.*Pass one",
    ),
    "prompt that is too long": (
        lambda b, _: Embeddings(b, peft_config=PromptTuningConfig(num_virtual_tokens=5000)),
        AdapterConfigError,
        r"num_virtual_tokens=5000.*128 positions at most.*Take fewer",
    ),
    "arguments of a save": (
        lambda b, folder: flair_peft.save_pretrained(str(folder / "model"), classifier(b)),
        AdapterConfigError,
        r"Cannot save this str.*and then where",
    ),
    "arguments of an export": (
        lambda b, folder: flair_peft.to_transformers(str(folder / "model"), classifier(b)),
        AdapterConfigError,
        r"of this str: it is no Flair model.*and then the directory",
    ),
    "device map": (
        lambda b, folder: flair_peft.from_pretrained(
            save_random("text-classifier", b, folder / "model", config=LoraConfig())[0], device_map="nonsense"
        ),
        BaseModelNotFoundError,
        r"Cannot load the base model from '.*': ValueError: .*device_map",
    ),
    "file of a checkpoint": (
        lambda b, folder: read_contents(
            Path(save_random("text-classifier", b, folder / "model", config=LoraConfig())[0]) / "flair_peft.json"
        ),
        ModelFileError,
        r"one file of several.*Pass '.*model'",
    ),
    "file of a checkpoint that is loaded": (
        lambda b, folder: flair_peft.from_pretrained(
            Path(save_random("text-classifier", b, folder / "model", config=LoraConfig())[0]) / "flair_peft.json"
        ),
        ModelFileError,
        r"one file of several.*Pass '.*model'",
    ),
    "folder of a training": (
        lambda b, folder: read_contents(saved_in(folder, b)),
        ModelFileError,
        r"a directory that holds 'final-model\.pt'",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slip_is_named(slip: str, base: Callable[[str], str], tmp_path: Path) -> None:
    """Not another library's words for what follows from it."""
    make, error, words = SLIPS[slip]
    with pytest.raises(error, match=words) as caught:
        make(base("bert"), tmp_path)
    assert caught.value.__cause__ is not caught.value
