"""The hook: put in, taken out, and what loads through it."""

from __future__ import annotations

import copy
import errno
import functools
import importlib
import itertools
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import flair
import pytest
import torch
import transformers
from flair.data import Dictionary
from flair.embeddings import TransformerDocumentEmbeddings
from flair.embeddings.base import Embeddings
from flair.models import MultitaskModel, SequenceTagger, TextClassifier
from flair.nn import Classifier, Model
from flair.trainers import ModelTrainer
from peft import OSFConfig, PeftConfig, PeftModel, PsoftConfig, get_peft_model
from peft.tuners.lora import LoraLayer

import flair_peft
from flair_peft import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
    patch,
)
from flair_peft.errors import (
    FlairPeftError,
    MissingConfigError,
    ModelFileError,
    SaveError,
    StateMismatchError,
    UnsupportedHostError,
)
from flair_peft.torchfile import scan, unpickle
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, TAGGER, make
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO, Entry

Base = Callable[[str], str]
Found = dict[tuple[type, str], Any]


def save(model: Model, directory: Path, **options: Any) -> Path:
    """Save the model the way Flair does and return the file."""
    path = directory / "model.pt"
    model.save(path, **options)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return what a file holds."""
    return torch.load(path, map_location="cpu", weights_only=False)


def snapshot() -> Found:
    """Return every attribute of Flair's trainer and classes that the hook could touch, as the object there."""
    roots = (Model, Embeddings, ModelTrainer, torch.nn.Module)
    owners = [flair.trainers.trainer, *roots[2:], *(c for root in roots[:2] for c in [root, *_subclasses(root)])]
    return {(owner, name): value for owner in owners for name, value in vars(owner).items()}


def _subclasses(root: type) -> Iterator[type]:
    for subclass in root.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _short(owner: Any) -> str:
    return owner.__name__.split(".")[-1]


def differences(first: Found, second: Found) -> set[str]:
    """Return the attributes that are not the same object on both sides."""
    nothing = object()
    return {
        f"{_short(owner)}.{name}"
        for owner, name in first.keys() | second.keys()
        if first.get((owner, name), nothing) is not second.get((owner, name), nothing)
    }


@pytest.fixture
def stock() -> Found:
    """Return Flair as it is without the hook, and put the hook in afterwards."""
    flair_peft.uninstall()
    found = snapshot()
    flair_peft.install()
    return found


def test_install_replaces_what_the_module_says_and_nothing_else(stock: Found) -> None:
    """The attributes that change are the ones in the table of patch.py."""
    changed = differences(stock, snapshot())
    assert {"Model.load", "TextClassifier.load", "SequenceTagger.load", "Classifier.load"} <= changed
    documented = patch.__doc__ or ""
    for attribute in changed:
        owner, name = attribute.split(".")
        is_named = attribute in documented or f"``{name}`` of ``Model`` and its subclasses" in documented
        assert is_named or (owner == "TokenEmbeddings" and f"Embeddings.{name}" in documented), attribute


def test_uninstall_gives_back_the_very_same_objects(stock: Found) -> None:
    """Every owner and attribute is what it was, by identity; what was inherited is inherited again."""
    flair_peft.uninstall()
    assert not differences(stock, snapshot())
    assert not flair_peft.is_installed()
    assert "train" not in vars(Model)


@pytest.mark.parametrize(
    "steps", [s for n in (1, 2, 3, 4) for s in itertools.product((True, False), repeat=n)], ids=str
)
def test_install_and_uninstall_in_any_order_leave_what_the_last_one_says(steps: tuple[bool, ...], stock: Found) -> None:
    """Twice is once, and no order leaves a wrapper around a wrapper."""
    installed = snapshot()
    touched = differences(stock, installed)
    for wanted in steps:
        (flair_peft.install if wanted else flair_peft.uninstall)()
        assert flair_peft.is_installed() is wanted
        assert differences(stock, snapshot()) == (touched if wanted else set())
    for owner, name in installed:
        replaced = getattr(vars(owner).get(name), "__func__", vars(owner).get(name))
        inner = getattr(replaced, "__wrapped__", None)
        if f"{_short(owner)}.{name}" in touched and inner is not None:
            assert getattr(inner, "__module__", "") != patch.__name__


def test_install_on_another_flair_version_changes_nothing(stock: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Flair that the hook was not written for is refused by name and left untouched."""
    flair_peft.uninstall()
    monkeypatch.setattr(flair, "__version__", "0.16.0")
    with pytest.raises(UnsupportedHostError, match=r"0\.16\.0"):
        flair_peft.install()
    assert not differences(stock, snapshot())
    assert not flair_peft.is_installed()


@pytest.mark.parametrize("version", ["0.14.0", "0.15.0", "1.0", "0.16.0.dev1"])
def test_install_on_versions_that_were_never_tried_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither older nor newer versions are hooked."""
    flair_peft.uninstall()
    monkeypatch.setattr(flair, "__version__", version)
    with pytest.raises(UnsupportedHostError):
        flair_peft.install()


def test_install_where_a_signature_differs_changes_nothing(stock: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced ``Model.save`` with other parameters is noticed before anything is written."""
    flair_peft.uninstall()
    monkeypatch.setattr(Model, "save", lambda self, somewhere: None)
    with pytest.raises(UnsupportedHostError, match="save"):
        flair_peft.install()
    assert differences(stock, snapshot()) == {"Model.save"}


def _save_as_development_versions_do(self: Any, model_file: Any, save_optimizer_state: bool = False) -> None:
    """Do nothing, under their parameters."""


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (ModelTrainer, "_save_model", _save_as_development_versions_do),
        (ModelTrainer, "_load_model", lambda self, model_file, strict: None),
        (Model, "tokenizer", property(lambda self: None)),
    ],
)
def test_install_on_a_development_version_is_refused_by_what_it_is(
    owner: Any, name: str, value: Any, stock: Found, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flair's development version calls itself as the last release: a training would end at its first save."""
    flair_peft.uninstall()
    found = snapshot()
    monkeypatch.setattr(owner, name, value, raising=False)
    with pytest.raises(UnsupportedHostError, match=f"{name}.*release"):
        flair_peft.install()
    assert differences(found, snapshot()) <= {f"{owner.__name__}.{name}"}


def test_install_that_fails_midway_is_taken_back(stock: Found, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flair is changed whole or not at all."""
    flair_peft.uninstall()
    count = itertools.count()
    put = patch._Replacement.put

    def put_some(self: patch._Replacement) -> None:
        if next(count) == 5:
            raise KeyboardInterrupt
        put(self)

    monkeypatch.setattr(patch._Replacement, "put", put_some)
    with pytest.raises(KeyboardInterrupt):
        flair_peft.install()
    assert not differences(stock, snapshot())


def test_import_on_another_flair_version_offers_only_what_works(monkeypatch: pytest.MonkeyPatch) -> None:
    """If the message says that the embeddings work without the hook, importing them works."""
    flair_peft.uninstall()
    monkeypatch.setattr(flair, "__version__", "0.16.0")
    message = ""
    try:
        importlib.reload(flair_peft)
    except UnsupportedHostError as error:
        message = str(error)
    assert "without the hook" not in message


@pytest.fixture
def foreign(stock: Found) -> Iterator[list[str]]:
    """Wrap ``Model.load`` on top of ours, as another package might; return the calls that it saw."""
    ours, calls = vars(Model)["load"], []

    @functools.wraps(ours.__func__)
    def load(cls: type[Model], model_path: Any, **kwargs: Any) -> Model:
        calls.append(cls.__name__)
        return ours.__get__(None, cls)(model_path, **kwargs)

    Model.load = classmethod(load)
    yield calls
    flair_peft.uninstall()
    Model.load = stock[Model, "load"]


def test_uninstall_under_a_foreign_wrapper_leaves_it_and_says_so(
    stock: Found, foreign: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    """What others put on top of ours is theirs to remove; everything else is given back."""
    wrapper = vars(Model)["load"]
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        flair_peft.uninstall()
    assert vars(Model)["load"] is wrapper
    assert differences(stock, snapshot()) == {"Model.load"}
    assert "Model.load" in caplog.text


def test_load_through_a_foreign_wrapper_after_uninstall_is_stock(
    foreign: list[str], base: Base, tmp_path: Path
) -> None:
    """Ours passes through below the foreign wrapper, without what only the hook does."""
    path = save(make(CLASSIFIER, base("bert"), lora(), dtype="bfloat16"), tmp_path)
    flair_peft.uninstall()
    loaded = TextClassifier.load(path)
    assert foreign == ["TextClassifier"]
    assert loaded.decoder.weight.dtype == torch.float32
    flair_peft.install()
    assert TextClassifier.load(path).decoder.weight.dtype == torch.bfloat16


def test_load_through_a_foreign_wrapper_after_uninstall_does_not_swallow_the_config(
    foreign: list[str], base: Base, tmp_path: Path
) -> None:
    """A config that nobody will use is refused, as stock Flair refuses it."""
    path = save(make(CLASSIFIER, base("bert"), None, is_stock=True), tmp_path)
    flair_peft.uninstall()
    with pytest.raises((TypeError, FlairPeftError)):
        Model.load(path, peft_config=lora())


@pytest.mark.parametrize("loader", [TextClassifier, Classifier, Model])
def test_load_of_a_model_without_adapters_is_what_stock_loads(loader: type[Model], base: Base, tmp_path: Path) -> None:
    """Models without adapters pass through: equal state, equal predictions, given as text, path or dictionary."""
    live = make(CLASSIFIER, base("bert"), None, is_stock=True)
    path, corpus = save(live, tmp_path), CLASSIFIER.corpus()
    flair_peft.uninstall()
    expected = loader.load(path)
    flair_peft.install()
    for source in (path, str(path), read(path)):
        loaded = loader.load(source)
        assert type(loaded) is type(expected)
        assert type(loaded.embeddings) is TransformerDocumentEmbeddings
        assert_equal_states(loaded, expected)
        assert CLASSIFIER.predict(loaded, corpus) == CLASSIFIER.predict(live, corpus)


@pytest.mark.parametrize("loader", [TextClassifier, Classifier, Model])
def test_load_of_a_model_without_adapters_refuses_a_config(loader: type[Model], base: Base, tmp_path: Path) -> None:
    """A new adapter on a plain model would predict with random weights."""
    path = save(make(CLASSIFIER, base("bert"), None, is_stock=True), tmp_path)
    for source in (path, str(path), read(path)):
        with pytest.raises(FlairPeftError, match="Leave out peft_config"):
            loader.load(source, peft_config=lora())


def test_load_of_nothing_with_a_config_does_not_claim_to_have_read_it() -> None:
    """A file that is not there holds neither adapters nor no adapters."""
    with pytest.raises(Exception, match="nowhere") as error:
        TextClassifier.load("nowhere/model.pt", peft_config=lora())
    assert "holds no adapter" not in str(error.value)


@pytest.mark.parametrize("loader", [TextClassifier, Classifier, Model])
def test_load_of_our_model_by_any_class_and_spelling_predicts_the_same(
    loader: type[Model], base: Base, tmp_path: Path
) -> None:
    """Text, path and dictionary, concrete and abstract class: all give the model that was saved."""
    live, corpus = make(CLASSIFIER, base("bert"), lora()), CLASSIFIER.corpus()
    path, expected = save(live, tmp_path), CLASSIFIER.predict(live, corpus)
    for source in (path, str(path), read(path)):
        loaded = loader.load(source)
        assert type(loaded.embeddings) is PeftTransformerDocumentEmbeddings
        assert not loaded.training
        assert_equal_states(loaded, live)
        assert CLASSIFIER.predict(loaded, corpus) == expected


def assert_equal_states(first: torch.nn.Module, second: torch.nn.Module) -> None:
    """Assert that two modules hold the same names and the same values."""
    ours, theirs = first.state_dict(), second.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def shape_of(value: Any) -> Any:
    """Return keys and identities of all that a state holds, all the way down."""
    if isinstance(value, dict):
        return {key: shape_of(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape_of(item) for item in value]
    return id(value)


@pytest.mark.parametrize("loader", ["own", "abstract"])
@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger-stacked", "tars-classifier", "multitask"])
def test_load_of_a_dictionary_leaves_it_as_it_was(name: str, loader: str, base: Base, tmp_path: Path) -> None:
    """The caller's state keeps its keys, all the way down, and can be loaded again with the same result."""
    entry = ZOO[name]
    state = read(save(make(entry, base("bert"), lora()), tmp_path))
    before = shape_of(state)
    load = (entry.model_class if loader == "own" else Model).load
    first, second = load(state), load(state)
    assert shape_of(state) == before
    assert_equal_states(first, second)


def test_load_of_a_dictionary_with_a_config_leaves_both_as_they_were(base: Base, tmp_path: Path) -> None:
    """Neither the state nor the user's config is written into."""
    state = read(stock_file(CLASSIFIER, base("bert"), tmp_path)[1])
    config = lora()
    before, settings = shape_of(state), copy.deepcopy(vars(config))
    first, second = (TextClassifier.load(state, peft_config=config) for _ in range(2))
    assert shape_of(state) == before
    assert vars(config) == settings
    assert_equal_states(first, second)


def stock_file(entry: Entry, base: str, directory: Path, config: PeftConfig | None = None) -> tuple[Model, Path]:
    """Return a stock model with an adapter and the file that stock Flair makes of it, without the hook."""
    flair_peft.uninstall()
    live = make(entry, base, config or lora(), is_stock=True)
    path = save(live, directory)
    flair_peft.install()
    return live, path


# A stock file of the others cannot be read by any means.
READABLE = [name for name, entry in ZOO.items() if entry.loads_in_stock is True]

HOOKED = [("text-classifier", PeftTransformerDocumentEmbeddings), ("token-classifier", PeftTransformerWordEmbeddings)]


@pytest.mark.parametrize(("name", "expected"), HOOKED)
def test_stock_embeddings_trained_with_the_hook_save_load_and_predict(
    name: str, expected: type, base: Base, tmp_path: Path
) -> None:
    """A script that still uses Flair's own classes works too; they come back as the classes with an adapter."""
    entry = ZOO[name]
    live, corpus = make(entry, base("bert"), lora(), is_stock=True), entry.corpus()
    entry.train(live, corpus, tmp_path)
    loaded = Model.load(tmp_path / "final-model.pt")
    assert type(loaded.embeddings) is expected
    assert loaded.embeddings.adapter_config.lora_alpha == 12
    assert entry.predict(loaded, corpus) == entry.predict(live, corpus)
    again = Model.load(save(loaded, tmp_path))
    assert entry.predict(again, corpus) == entry.predict(live, corpus)


@pytest.mark.parametrize(("name", "expected"), HOOKED)
def test_stock_embeddings_in_bfloat16_save_load_and_predict_with_the_hook(
    name: str, expected: type, base: Base, tmp_path: Path
) -> None:
    """A bf16 base whose head was converted by hand predicts the same; stock Flair could not train it."""
    entry, options = ZOO[name], {"transformers_model_kwargs": {"torch_dtype": torch.bfloat16}}
    live, corpus = make(entry, base("bert"), lora(), is_stock=True, **options), entry.corpus()
    live.decoder.to(torch.bfloat16)
    expected_labels = entry.predict(live, corpus)
    loaded = Model.load(save(live, tmp_path))
    assert type(loaded.embeddings) is expected
    assert loaded.embeddings.base_dtype == torch.bfloat16
    assert entry.predict(loaded, corpus) == expected_labels


@pytest.mark.parametrize("name", few(READABLE, ONE_OF_A_KIND & {*READABLE}))
def test_stock_file_without_a_config_is_refused_for_every_model_class(name: str, base: Base, tmp_path: Path) -> None:
    """A lost config is asked for, in words that hold the rank, the targets and the call to make."""
    entry = ZOO[name]
    _, path = stock_file(entry, base("bert"), tmp_path)
    with pytest.raises(MissingConfigError) as error:
        entry.model_class.load(path)
    message = str(error.value)
    assert "rank 4" in message
    assert "'query', 'value'" in message
    assert f"load('{path}', peft_config=LoraConfig(r=4, lora_alpha=…, target_modules=['query', 'value']))" in message


@pytest.mark.parametrize("name", few(READABLE, ONE_OF_A_KIND & {*READABLE}))
def test_stock_file_with_its_config_predicts_like_the_live_model(name: str, base: Base, tmp_path: Path) -> None:
    """With the config it was trained with, a file of stock Flair gives the model that was saved, of any class."""
    entry = ZOO[name]
    live, path = stock_file(entry, base("bert"), tmp_path)
    corpus = entry.corpus()
    loaded = entry.model_class.load(path, peft_config=lora())
    assert any(isinstance(module, PeftTransformerEmbeddings) for module in loaded.modules())
    assert entry.predict(loaded, corpus) == entry.predict(live, corpus)


def _add_another(model: PeftModel) -> None:
    model.add_adapter("second", lora(lora_alpha=20))


CHANGES: dict[str, Callable[[PeftModel], Any]] = {
    "merged": lambda model: model.merge_adapter(),
    "switched off": lambda model: model.base_model.disable_adapter_layers(),
    "scaled": lambda model: [m.scale_layer(0.25) for m in model.modules() if isinstance(m, LoraLayer)],
    "one of several": _add_another,
}


@pytest.mark.parametrize("change", CHANGES)
def test_stock_embeddings_whose_adapter_no_config_gives_back_are_stored_without_it(
    change: str, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The file is that of stock Flair, with a word about it; loading it asks for the config."""
    live = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    CHANGES[change](live.embeddings.model)
    path = save(live, tmp_path)
    assert "is stored without its PEFT config, which a load will ask for" in caplog.text
    assert "Undo that on embeddings.model" in caplog.text
    with pytest.raises(FlairPeftError):
        Model.load(path)


def test_stock_embeddings_with_an_adapter_of_another_name_are_stored_without_its_config(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in stock Flair, they can be saved; with the config, the file gives the model that was saved."""
    live = make(CLASSIFIER, base("bert"), None, is_stock=True)
    live.embeddings.model = get_peft_model(live.embeddings.model, lora(), adapter_name="mine")
    path = save(live, tmp_path)
    assert "is stored without its PEFT config, which a load will ask for" in caplog.text
    with pytest.raises(MissingConfigError, match="rank 4"):
        Model.load(path)
    corpus = CLASSIFIER.corpus()
    assert CLASSIFIER.predict(Model.load(path, peft_config=lora()), corpus) == CLASSIFIER.predict(live, corpus)


@pytest.mark.parametrize("loader", [Classifier, Model])
def test_stock_file_loaded_by_an_abstract_class_takes_the_config(
    loader: type[Model], base: Base, tmp_path: Path
) -> None:
    """The loop over subclasses on abstract classes loses neither the config nor the error that asks for it."""
    live, path = stock_file(CLASSIFIER, base("bert"), tmp_path)
    with pytest.raises(MissingConfigError, match="rank 4"):
        loader.load(path)
    corpus = CLASSIFIER.corpus()
    assert CLASSIFIER.predict(loader.load(path, peft_config=lora()), corpus) == CLASSIFIER.predict(live, corpus)


def test_stock_file_with_another_rank_is_refused_with_both(base: Base, tmp_path: Path) -> None:
    """The error names both ranks and the shapes of file and model."""
    _, path = stock_file(CLASSIFIER, base("bert"), tmp_path)
    with pytest.raises(StateMismatchError) as error:
        TextClassifier.load(path, peft_config=lora(r=8))
    assert "(4, 32) instead of (8, 32)" in str(error.value)
    assert "r=8" in str(error.value)
    assert "LoraConfig(r=4" in str(error.value)


def test_stock_file_with_another_alpha_predicts_something_else(base: Base, tmp_path: Path) -> None:
    """The scale comes from the config that is given, and a wrong one shows: this is why it is asked for."""
    live, path = stock_file(CLASSIFIER, base("bert"), tmp_path)
    corpus = CLASSIFIER.corpus()
    other = TextClassifier.load(path, peft_config=lora(lora_alpha=1))
    assert CLASSIFIER.predict(other, corpus) != CLASSIFIER.predict(live, corpus)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(lora(target_modules=["query"]), id="fewer targets"),
        pytest.param(lora(target_modules=["query", "value", "key"]), id="more targets"),
        pytest.param(lora(bias="all", modules_to_save=["pooler"]), id="modules to save"),
    ],
)
def test_stock_file_with_other_targets_is_refused(config: PeftConfig, base: Base, tmp_path: Path) -> None:
    """Adapter weights without a place, or places without weights, are an error."""
    _, path = stock_file(CLASSIFIER, base("bert"), tmp_path)
    with pytest.raises(StateMismatchError, match=r"missing in the file|not known to the model"):
        TextClassifier.load(path, peft_config=config)


@pytest.mark.parametrize("owner", ["ours", "stock"])
def test_file_with_a_config_does_not_ignore_another_one(owner: str, base: Base, tmp_path: Path) -> None:
    """A config that contradicts the one in the file is used or refused, never silently dropped."""
    path = save(make(CLASSIFIER, base("bert"), lora(), is_stock=owner == "stock"), tmp_path)
    corpus = CLASSIFIER.corpus()
    expected = CLASSIFIER.predict(TextClassifier.load(path), corpus)
    try:
        loaded = TextClassifier.load(path, peft_config=lora(lora_alpha=1))
    except FlairPeftError:
        return
    assert CLASSIFIER.predict(loaded, corpus) != expected


QUERY_A = "attention.self.query.lora_A.default.weight"


def respelled(path: Path, respell: Callable[[str], str]) -> Path:
    """Write the file again with its adapter's keys spelled otherwise, and return the new file."""
    state = read(path)
    tensors = state["state_dict"]
    prefix = "embeddings.model."
    renamed = {
        prefix + respell(key.removeprefix(prefix)) if key.startswith(prefix) else key: tensor
        for key, tensor in tensors.items()
    }
    assert len(renamed) == len(tensors)
    assert renamed.keys() != tensors.keys()
    state["state_dict"] = renamed
    other = path.with_name("respelled.pt")
    torch.save(state, other)
    return other


SPELLINGS: dict[str, Callable[[str], str]] = {
    "no wrapper": lambda key: key.removeprefix("base_model.model."),
    "other adapter name": lambda key: key.replace(".default.", ".sentiment."),
    "no adapter name": lambda key: key.replace(".default.", "."),
    "no base_layer": lambda key: key.replace(".base_layer.", "."),
    "all of them": lambda key: (
        key.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".default.", ".")
    ),
    "data parallel": lambda key: f"module.{key}",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_file_with_other_key_spellings_predicts_the_same(
    spelling: str, writer: str, base: Base, tmp_path: Path
) -> None:
    """However a file spells PEFT's names, every tensor finds its place and predictions are equal to the last bit."""
    live = make(CLASSIFIER, base("bert"), lora(), is_stock=writer == "stock")
    corpus = CLASSIFIER.corpus()
    loaded = TextClassifier.load(respelled(save(live, tmp_path, save_base=True), SPELLINGS[spelling]))
    assert CLASSIFIER.predict(loaded, corpus) == CLASSIFIER.predict(live, corpus)


def _add(state: dict[str, torch.Tensor], key: str) -> str:
    state[key] = torch.zeros(1)
    return key


def _damage_missing(state: dict[str, torch.Tensor]) -> list[str]:
    key = next(key for key in state if key.endswith(QUERY_A))
    del state[key]
    return [key.removeprefix("embeddings.model.")]


def _damage_missing_base(state: dict[str, torch.Tensor]) -> list[str]:
    key = next(key for key in state if key.endswith("word_embeddings.weight"))
    del state[key]
    return [key.removeprefix("embeddings.model.")]


def _damage_extra(state: dict[str, torch.Tensor]) -> list[str]:
    return [_add(state, "embeddings.model.base_model.model.extra.weight").removeprefix("embeddings.model.")]


def _damage_second_adapter(state: dict[str, torch.Tensor]) -> list[str]:
    key = next(key for key in state if key.endswith(QUERY_A))
    other = key.replace(".default.", ".other.")
    state[other] = state[key].clone()
    return [other.removeprefix("embeddings.model.")]


def _damage_ambiguous(state: dict[str, torch.Tensor]) -> list[str]:
    key = next(key for key in state if key.endswith(QUERY_A))
    tensor = state.pop(key)
    others = [key.replace(".default.", f".{name}.") for name in ("first", "second")]
    state.update({other: tensor.clone() for other in others})
    return [other.removeprefix("embeddings.model.") for other in others]


def _damage_shape(state: dict[str, torch.Tensor]) -> list[str]:
    key = next(key for key in state if key.endswith(QUERY_A))
    state[key] = state[key][:, :16].clone()
    return [key.removeprefix("embeddings.model."), "(4, 16) instead of (4, 32)"]


def _damage_head_missing(state: dict[str, torch.Tensor]) -> list[str]:
    del state["decoder.bias"]
    return ["decoder.bias"]


def _damage_head_extra(state: dict[str, torch.Tensor]) -> list[str]:
    return [_add(state, "decoder.extra")]


def _damage_head_shape(state: dict[str, torch.Tensor]) -> list[str]:
    state["decoder.bias"] = torch.zeros(7)
    return ["decoder.bias", "7"]


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("_damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_file_with_tensors_that_do_not_fit_is_refused_with_their_names(
    damage: Callable[[dict[str, torch.Tensor]], list[str]], base: Base, tmp_path: Path
) -> None:
    """Every tensor in a file is used exactly once, or an error says which and names the file or the embeddings."""
    path = save(make(CLASSIFIER, base("bert"), lora()), tmp_path, save_base=True)
    state = read(path)
    named = damage(state["state_dict"])
    torch.save(state, path)
    for loader in (TextClassifier, Model):
        with pytest.raises(StateMismatchError) as error:
            loader.load(path)
        for name in named:
            assert name in str(error.value)


@pytest.mark.parametrize("name", [name for name in ZOO if "multitask" in name])
def test_multitask_model_with_shared_embeddings_has_one_object_after_loading(
    name: str, base: Base, tmp_path: Path
) -> None:
    """What the tasks shared before saving they share again, so training on moves one adapter, not two."""
    entry = ZOO[name]
    live, corpus = make(entry, base("bert"), lora()), entry.corpus()
    loaded = MultitaskModel.load(save(live, tmp_path))
    assert live.tasks["first"].embeddings is live.tasks["second"].embeddings
    assert loaded.tasks["first"].embeddings is loaded.tasks["second"].embeddings
    assert len({id(m) for m in loaded.modules() if isinstance(m, PeftModel)}) == 1
    assert entry.predict(loaded, corpus) == entry.predict(live, corpus)


def test_multitask_model_with_two_embeddings_keeps_them_apart(base: Base, tmp_path: Path) -> None:
    """Embeddings that were two objects stay two."""
    tasks = [make(TAGGER, base("bert"), lora()) for _ in range(2)]
    live = MultitaskModel(tasks, task_ids=["first", "second"])
    loaded = MultitaskModel.load(save(live, tmp_path))
    assert loaded.tasks["first"].embeddings is not loaded.tasks["second"].embeddings
    assert loaded.tasks["first"].embeddings.name != loaded.tasks["second"].embeddings.name


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", ["psoft", "osf"])
def test_file_of_a_method_derived_from_the_base_with_a_saved_module_predicts_the_same(
    method: str, base: Base, tmp_path: Path
) -> None:
    """A base that is filled before its adapter is added is filled also where a module is kept beside a copy."""
    settings: dict[str, Any] = {"target_modules": ["query"], "modules_to_save": ["LayerNorm"]}
    config = (
        PsoftConfig(r=4, psoft_alpha=6, **settings) if method == "psoft" else OSFConfig(effective_rank=8, **settings)
    )
    live, corpus = make(CLASSIFIER, base("bert"), config), CLASSIFIER.corpus()
    loaded = TextClassifier.load(save(live, tmp_path))
    assert CLASSIFIER.predict(loaded, corpus) == CLASSIFIER.predict(live, corpus)


@pytest.mark.filterwarnings("default")
def test_load_in_eight_threads_at_once_gives_eight_equal_models(base: Base, tmp_path: Path) -> None:
    """Loads do not disturb each other, whether the hook prepares the state or the file is stock."""
    live, corpus = make(CLASSIFIER, base("bert"), lora()), CLASSIFIER.corpus()
    path = save(live, tmp_path)
    start = threading.Barrier(8)

    def load(number: int) -> Model:
        start.wait(timeout=60)
        return (TextClassifier, Classifier, Model)[number % 3].load(path)

    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(load, range(8)))
    expected = CLASSIFIER.predict(live, corpus)
    for model in models:
        assert_equal_states(model, live)
        assert CLASSIFIER.predict(model, corpus) == expected


def test_load_in_two_threads_leaves_random_initialisation_on(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overlapping loads do not leave transformers building models from uninitialised memory ever after.

    Building without initialisation is a switch of the process in transformers. If one thread finds it off and leaves
    last, it stays off.
    """
    # A file with its base builds the model anew; others of the same base share one.
    path = save(make(CLASSIFIER, base("bert"), lora()), tmp_path, save_base=True)
    first_is_in, second_is_in, first_is_out = threading.Event(), threading.Event(), threading.Event()
    original = transformers.AutoModel.from_config

    def from_config(*args: Any, **kwargs: Any) -> Any:
        if threading.current_thread().name == "first":
            first_is_in.set()
            second_is_in.wait(timeout=1)
        else:
            second_is_in.set()
            first_is_out.wait(timeout=1)
        return original(*args, **kwargs)

    def load_first() -> None:
        Model.load(path)
        first_is_out.set()

    def load_second() -> None:
        first_is_in.wait(timeout=5)
        Model.load(path)

    monkeypatch.setattr(transformers.AutoModel, "from_config", from_config)
    threads = [threading.Thread(target=load_first, name="first"), threading.Thread(target=load_second, name="second")]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
        assert all(event.is_set() for event in (first_is_in, second_is_in, first_is_out))
        assert transformers.modeling_utils._init_weights is True
    finally:
        transformers.modeling_utils._init_weights = True


def test_load_of_a_model_class_defined_after_install_works(base: Base, tmp_path: Path) -> None:
    """A subclass that a user writes later loads through the hook of its parent."""

    class MyClassifier(TextClassifier):
        pass

    live = make(CLASSIFIER, base("bert"), lora(), dtype="bfloat16")
    loaded = MyClassifier.load(save(live, tmp_path))
    assert type(loaded) is MyClassifier
    assert loaded.decoder.weight.dtype == torch.bfloat16


_LOAD_AND_PREDICT = """
def predict(model, layer):
    sentences = [Sentence("I love this wonderful movie"), Sentence("Berlin and Paris are large")]
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return [[(label.value, label.score) for label in s.labels] for s in sentences]
"""

_KNOWING_ONLY_FLAIR = f"""
import json, os, sys, warnings
warnings.simplefilter("ignore")
import flair
from flair.data import Sentence
from flair.models import TextClassifier
from flair.nn import Model
{_LOAD_AND_PREDICT}
assert not any(name.startswith("flair_peft") for name in sys.modules)
report = {{}}
"""

FLAIR_ONLY = """
report["first"] = predict(TextClassifier.load(sys.argv[1]), "sentiment")
import flair_peft
report["installed"] = flair_peft.is_installed()
report["second"] = predict(TextClassifier.load(sys.argv[1]), "sentiment")
flair_peft.uninstall()
report["uninstalled"] = predict(TextClassifier.load(sys.argv[1]), "sentiment")
for name, path in (("hooked", sys.argv[2]), ("legacy", sys.argv[3])):
    try:
        TextClassifier.load(path)
        report[name] = "loaded"
    except Exception as error:
        report[name] = f"{type(error).__name__}: {error}"
"""

STOCK_CLASS_FIRST = """
report["first"] = predict(Model.load(sys.argv[2]), "sentiment")
report["second"] = predict(TextClassifier.load(sys.argv[2]), "sentiment")
report["imported"] = "flair_peft" in sys.modules
"""

# Importing Flair takes most of the time: two processes are copies of one that has done no more than that.
FORKED = (
    _KNOWING_ONLY_FLAIR
    + f"""
scripts = {[FLAIR_ONLY, STOCK_CLASS_FIRST]!r}
for script in scripts:
    child = os.fork()
    if child == 0:
        exec(script)
        print(json.dumps(report), flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""
)

OURS_FIRST = f"""
import json, sys, warnings
warnings.simplefilter("ignore")
import flair_peft
import flair
from flair.data import Sentence
from flair.models import TextClassifier
{_LOAD_AND_PREDICT}
report = {{"first": predict(TextClassifier.load(sys.argv[1]), "sentiment"), "installed": flair_peft.is_installed()}}
print(json.dumps(report))
"""


@pytest.fixture(scope="module")
def processes(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return a function from a script to what it reported; all scripts run side by side in new processes."""
    directory = tmp_path_factory.mktemp("processes")
    live = make(CLASSIFIER, base("bert"), lora())
    ours, hooked = directory / "ours.pt", directory / "hooked.pt"
    live.save(ours)
    hooked_live = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    hooked_live.save(hooked)
    _, legacy = stock_file(CLASSIFIER, base("bert"), directory)
    sentences = {}
    exec("from flair.data import Sentence\n" + _LOAD_AND_PREDICT, sentences)
    expected = {"ours": sentences["predict"](live, ""), "hooked": sentences["predict"](hooked_live, "")}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(flair_peft.__file__).parents[1])}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", script, *map(str, (ours, hooked, legacy))],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for script in (FORKED, OURS_FIRST)
    ]
    outputs = [process.communicate(timeout=300) for process in running]
    assert [process.returncode for process in running] == [0, 0], [errors[-2000:] for _, errors in outputs]
    lines = [line for output, _ in outputs for line in output.splitlines() if line.startswith("{")]
    reports = [{**json.loads(line), "expected": json.loads(json.dumps(expected))} for line in lines]
    return dict(zip((FLAIR_ONLY, STOCK_CLASS_FIRST, OURS_FIRST), reports, strict=True)).__getitem__


@pytest.mark.matrix
def test_file_of_ours_in_a_process_that_knows_only_flair_loads_and_predicts_the_same(
    processes: Callable[[str], dict[str, Any]],
) -> None:
    """Reading the file imports the package; the first load is as good as the next, and as one after uninstall."""
    report = processes(FLAIR_ONLY)
    assert report["installed"] is True
    assert report["first"] == report["second"] == report["uninstalled"] == report["expected"]["ours"]


def test_file_of_stock_classes_in_a_process_that_knows_only_flair_loads_and_predicts_the_same(
    processes: Callable[[str], dict[str, Any]],
) -> None:
    """A file that the hook completed brings the hook with it, also through an abstract class."""
    report = processes(STOCK_CLASS_FIRST)
    assert report["imported"] is True
    assert report["first"] == report["second"] == report["expected"]["hooked"]


def test_file_of_ours_in_a_process_that_imports_us_before_flair_predicts_the_same(
    processes: Callable[[str], dict[str, Any]],
) -> None:
    """The order of imports does not matter."""
    report = processes(OURS_FIRST)
    assert report["installed"] is True
    assert report["first"] == report["expected"]["ours"]


@pytest.mark.parametrize("name", ["hooked", "legacy"])
def test_file_that_needs_the_hook_fails_after_uninstall_without_giving_a_model(
    name: str, processes: Callable[[str], dict[str, Any]]
) -> None:
    """Without the hook, a file that needs it is refused in words that lead to the adapter; nothing is loaded."""
    message = processes(FLAIR_ONLY)[name]
    assert message != "loaded"
    assert "peft" in message.lower() or "lora" in message.lower()


WORDS = "runs/v1.lora_off"


def rename_first_label(labels: Dictionary, name: str) -> None:
    del labels.item2idx[labels.idx2item[0]]
    labels.idx2item[0] = name.encode()
    labels.item2idx[name.encode()] = 0


WITH_WORDS: dict[str, Callable[[Any], Any]] = {
    "model card": lambda model: vars(model).update(
        model_card={"training_parameters": {"base_path": Path(WORDS), "peft_config": None, "counts": Counter(["a"])}}
    ),
    "label": lambda model: rename_first_label(model.label_dictionary, f"{WORDS}.weight"),
    "label type": lambda model: vars(model).update(_label_type="peft_config"),
    "parameter of the head": lambda model: model.decoder.register_parameter(
        "lora_A", torch.nn.Parameter(torch.ones(2))
    ),
}


@pytest.mark.parametrize("name", WITH_WORDS)
def test_load_of_a_plain_model_with_words_of_adapters_is_left_to_flair(
    name: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells an adapter is a tensor of the embeddings' transformer, or a config of theirs, and no other string."""
    live = make(CLASSIFIER, base("bert"), None, is_stock=True)
    WITH_WORDS[name](live)
    path = save(live, tmp_path)
    assert bool(scan.read_contents(path).marks) is (name != "label")  # Flair keeps labels as bytes
    read = list[str]()
    stock_function = unpickle.load_torch_state
    monkeypatch.setattr(unpickle, "load_torch_state", lambda path: (read.append(path), stock_function(path))[1])
    if name == "parameter of the head":
        # Flair itself does not make it anew, and says so.
        with pytest.raises(RuntimeError, match="Unexpected key"):
            TextClassifier.load(path)
    else:
        loaded = TextClassifier.load(path)
        assert getattr(loaded, "model_card", None) == getattr(live, "model_card", None)
        assert loaded.label_dictionary.get_items() == live.label_dictionary.get_items()
        assert loaded.label_type == live.label_type
    assert len(read) == 1


@pytest.fixture
def mounted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the path of a file that no other can take the place of, as one that docker mounts."""
    place = tmp_path / "place"
    place.mkdir()
    path, replace = place / "model.pt", os.replace

    def refuse(source: Any, target: Any, **options: Any) -> None:
        if Path(target) == path:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        replace(source, target, **options)

    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(Path, "replace", refuse)  # Python 3.10 took the function when it was imported
    return path


def test_save_of_a_plain_model_is_flairs_own(base: Base, tmp_path: Path, mounted: Path) -> None:
    """It writes into the file that is there, mounted or linked, and makes nothing beside it."""
    model, corpus = make(CLASSIFIER, base("bert"), None, is_stock=True), CLASSIFIER.corpus()
    mounted.write_bytes(b"old")
    (tmp_path / "link").hardlink_to(mounted)
    model.save(mounted)
    assert (tmp_path / "link").samefile(mounted)
    assert CLASSIFIER.predict(TextClassifier.load(mounted), corpus) == CLASSIFIER.predict(model, corpus)
    assert [path.name for path in mounted.parent.iterdir()] == ["model.pt"]
    for target, error in ((tmp_path, RuntimeError), (tmp_path / "absent" / "x.pt", RuntimeError)):
        with pytest.raises(error) as raised:
            model.save(target)
        assert not isinstance(raised.value, FlairPeftError)


@pytest.mark.parametrize("is_merged", [False, True], ids=["plain", "merged"])
def test_save_over_a_mounted_file_with_an_adapter_writes_into_it_unless_a_model_is_mapped_from_it(
    is_merged: bool, base: Base, mounted: Path
) -> None:
    """A plain model arrives there as stock Flair's save would have it; a live model keeps its weights."""
    adapted, corpus = make(CLASSIFIER, base("bert"), lora()), CLASSIFIER.corpus()
    model = flair_peft.merge(adapted) if is_merged else make(CLASSIFIER, base("bert"), None, is_stock=True)
    adapted.save(mounted.with_name("source"), save_base=True)
    shutil.copyfile(mounted.with_name("source"), mounted)
    live = TextClassifier.load(mounted)
    expected = CLASSIFIER.predict(live, corpus)
    if sys.platform == "linux":
        with pytest.raises(SaveError, match="mount"):
            model.save(mounted)
        assert CLASSIFIER.predict(live, corpus) == expected
    with pytest.raises(SaveError, match="mount the folder"):
        adapted.save(mounted)
    mounted.unlink()
    mounted.write_bytes(mounted.with_name("source").read_bytes())  # another file, from which nothing is mapped
    del live
    model.save(mounted)
    assert CLASSIFIER.predict(TextClassifier.load(mounted), corpus) == CLASSIFIER.predict(model, corpus)
    assert sorted(path.name for path in mounted.parent.iterdir()) == ["model.pt", "source"]


@pytest.mark.parametrize("stock", [False, True], ids=["ours", "stock"])
def test_load_by_a_class_that_the_file_does_not_hold_names_the_one_it_holds(
    stock: bool, base: Base, tmp_path: Path
) -> None:
    """A tagger is no classifier; a class and one that derives from it read each other's files, as in Flair."""
    path = save(make(CLASSIFIER, base("bert"), lora(), is_stock=stock), tmp_path)
    with pytest.raises(ModelFileError, match=r"holds a TextClassifier.*Use TextClassifier\.load"):
        SequenceTagger.load(path)

    class OwnClassifier(TextClassifier):
        pass

    assert type(OwnClassifier.load(path)) is OwnClassifier


@pytest.mark.parametrize("load", [TextClassifier.load, Model.load, flair_peft.from_pretrained, flair_peft.verify])
def test_load_of_an_adapter_folder_names_the_way_to_use_it(load: Any, base: Base, tmp_path: Path) -> None:
    """What PEFT wrote has no head: the message says what can be made of it."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    embeddings.model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(ModelFileError, match="from_adapter") as raised:
        load(str(tmp_path / "adapter"))
    assert str(raised.value).count(". ") >= 2


def test_import_leaves_logging_as_it_is_and_says_nothing_of_kernels() -> None:
    """The line of bitsandbytes on a kernel is kept away from who imports this package, and nothing else is."""
    code = """
import logging, sys
logging.basicConfig(level=logging.WARNING)
before = [*logging.getLogger().handlers], [*logging.getLogger().filters], logging.getLogger().level
import flair_peft
import peft
assert before == (logging.getLogger().handlers, logging.getLogger().filters, logging.getLogger().level)
ours = logging.getLogger("bitsandbytes.backends.cpu.ops")
assert not ours.filters and ours.isEnabledFor(logging.WARNING)
ours.warning("kernels-community is still heard of")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert said.count("kernels") == 1
