"""Files of stock Flair with an adapter: loaded with their config, and converted to checkpoints."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.nn import Model
from peft import IA3Config, PeftConfig
from safetensors import safe_open
from transformers import AutoModel

import flair_peft
from flair_peft.base import frozen_base
from flair_peft.errors import (
    BaseMismatchError,
    BaseModelNotFoundError,
    ConfigMismatchError,
    MissingConfigError,
    ModelFileError,
    StateMismatchError,
    UnsafeFileError,
)
from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.models import CLASSIFIER, make
from tests.support.zoo import ZOO, Entry

Base = Callable[[str], str]


def stock_file(
    base: str, path: Path, config: PeftConfig | None = None, *, entry: Entry = CLASSIFIER, **options: Any
) -> tuple[Any, Any]:
    """Write the file that Flair writes without the hook; return what the live model predicts, and the model."""
    flair_peft.uninstall()
    try:
        model = make(entry, base, config or lora(), is_stock=True, **options)
        for embeddings in model.modules():
            if hasattr(embeddings, "base_model_name"):
                perturb_(embeddings.model, 5)
        model.save(path)
        return entry.predict(model, entry.corpus()), model
    finally:
        flair_peft.install()


@pytest.fixture
def own_base(base: Base, tmp_path: Path) -> Path:
    """Return a base that a test may move, change and delete."""
    return Path(shutil.copytree(base("bert"), tmp_path / "own-base"))


def stored_names(directory: Path) -> set[str]:
    names = set()
    for path in directory.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


def base_names(directory: Path) -> set[str]:
    """Return the stored weights that the base has too."""
    return {name for name in stored_names(directory) if name.endswith(("dense.weight", "word_embeddings.weight"))}


@pytest.mark.parametrize("hook", [True, False], ids=["with hook", "without hook"])
@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger", "multitask", "tars-classifier"])
def test_file_loads_with_its_config_whether_or_not_the_hook_is_in(
    name: str, hook: bool, base: Base, tmp_path: Path
) -> None:
    entry = ZOO[name]
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt", entry=entry)
    if not hook:
        flair_peft.uninstall()
    loaded = flair_peft.load_legacy(tmp_path / "old.pt", peft_config=lora())
    assert entry.predict(loaded, entry.corpus()) == expected


def test_file_without_a_config_prints_the_one_that_it_implies(base: Base, tmp_path: Path) -> None:
    stock_file(base("bert"), tmp_path / "old.pt", lora(use_dora=True, r=2))
    text = r"peft_config=LoraConfig\(r=2, lora_alpha=…, target_modules=\['query', 'value'\], use_dora=True\)"
    for call in (flair_peft.load_legacy, lambda path: flair_peft.convert_legacy(path, tmp_path / "new")):
        with pytest.raises(MissingConfigError, match=text):
            call(tmp_path / "old.pt")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "error"),
    [("nowhere", BaseModelNotFoundError), ("roberta", BaseModelNotFoundError), ("distilbert", BaseMismatchError)],
)
def test_conversion_with_another_base_than_the_one_trained_on_is_refused(
    given: str, error: type[Exception], base: Base, tmp_path: Path
) -> None:
    """What was asked for is named, and no checkpoint is written that silently does without it."""
    stock_file(base("bert"), tmp_path / "old.pt")
    path = str(tmp_path / given) if given == "nowhere" else base(given)
    with pytest.raises(error, match=re.escape(path)):
        flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora(), base_model=path)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (lora(r=8), "r=8"),
        (lora(target_modules=["query", "key"]), "'key', 'query'"),
        (lora(use_dora=True), "LoraConfig"),
        (lora(modules_to_save=["pooler"]), "LoraConfig"),
        (IA3Config(target_modules=["query"], feedforward_modules=[]), "IA3Config(target_modules=['query'])"),
    ],
    ids=["rank", "targets", "dora", "modules to save", "method"],
)
def test_config_that_does_not_fit_is_named_beside_the_one_that_does(
    given: PeftConfig, says: str, base: Base, tmp_path: Path
) -> None:
    """Both are in the message, and both the hook and the function raise it."""
    stock_file(base("bert"), tmp_path / "old.pt")
    for load in (flair_peft.load_legacy, TextClassifier.load):
        with pytest.raises(ConfigMismatchError) as caught:
            load(tmp_path / "old.pt", peft_config=given)
        assert "LoraConfig(r=4, lora_alpha=…, target_modules=['query', 'value'])" in str(caught.value)
        assert says in str(caught.value)
        assert len(str(caught.value).replace(str(tmp_path), "")) < 500


def test_head_that_does_not_fit_is_not_blamed_on_the_config(base: Base, tmp_path: Path) -> None:
    """With the right config, the error is that of the head."""
    stock_file(base("bert"), tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt", weights_only=False)
    state["state_dict"]["decoder.weight"] = torch.zeros(7, 5)
    torch.save(state, tmp_path / "old.pt")
    with pytest.raises(StateMismatchError, match=r"decoder\.weight") as caught:
        TextClassifier.load(tmp_path / "old.pt", peft_config=lora())
    assert not isinstance(caught.value, ConfigMismatchError)


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger", "sequence-tagger-stacked", "multitask"])
def test_conversion_leaves_out_what_is_the_base_models_own(name: str, base: Base, tmp_path: Path) -> None:
    """The checkpoint is small, predicts what the old file's model predicted, and proves itself."""
    entry = ZOO[name]
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt", entry=entry)
    converted = flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert entry.predict(converted, entry.corpus()) == expected
    assert base_names(tmp_path / "new") == set()
    flair_peft.verify(tmp_path / "new")
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert entry.predict(loaded, entry.corpus()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_conversion_of_a_file_in_half_precision_predicts_at_once(
    dtype: torch.dtype, base: Base, tmp_path: Path
) -> None:
    """Stock Flair cannot even predict with such a model; the head is cast when it is loaded."""
    flair_peft.uninstall()
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True, transformers_model_kwargs={"dtype": dtype})
    model.save(tmp_path / "old.pt")
    flair_peft.install()
    converted = flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert converted.embeddings.base_dtype == dtype
    assert base_names(tmp_path / "new") == set()
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    corpus = CLASSIFIER.corpus()
    assert CLASSIFIER.predict(loaded, corpus) == CLASSIFIER.predict(converted, corpus)


def test_conversion_keeps_weights_that_differ_and_says_so(
    own_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A base that was trained on, or another one of the same name, is not mistaken for the one in the file."""
    expected, _ = stock_file(str(own_base), tmp_path / "old.pt")
    model = AutoModel.from_pretrained(own_base)
    model.encoder.layer[1].output.dense.weight.data += 0.01
    model.save_pretrained(own_base)
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert "1 of " in caplog.text
    assert "encoder.layer.1.output.dense.weight" in caplog.text
    assert len(base_names(tmp_path / "new")) == 1
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected


def test_conversion_without_the_base_holds_it_and_says_so(
    own_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected, _ = stock_file(str(own_base), tmp_path / "old.pt")
    own_base.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "whole", peft_config=lora())
    assert "holds all of them. Pass base_model=" in caplog.text
    assert base_names(tmp_path / "whole")
    flair_peft.convert_legacy(
        tmp_path / "old.pt", tmp_path / "slim", peft_config=lora(), base_model=str(tmp_path / "moved")
    )
    assert not base_names(tmp_path / "slim")
    for directory in ("whole", "slim"):
        loaded = flair_peft.from_pretrained(tmp_path / directory)
        assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected


def test_conversion_holds_the_base_where_that_is_asked_for(base: Base, tmp_path: Path) -> None:
    stock_file(base("bert"), tmp_path / "old.pt")
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora(), save_base=True)
    assert base_names(tmp_path / "new")


@pytest.mark.parametrize(("trained", "given"), [("all", "none"), ("lora_only", "none"), ("none", "all")])
def test_biases_that_the_config_does_not_explain_are_an_error(
    trained: str, given: str, base: Base, tmp_path: Path
) -> None:
    """Against the base's own biases, those in the file say whether they were trained; the message names both."""
    stock_file(base("bert"), tmp_path / "old.pt", lora(bias=trained))
    with pytest.raises(ConfigMismatchError) as caught:
        flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora(bias=given))
    assert f"bias='{given}'" in str(caught.value)
    assert f"bias='{trained}'" in str(caught.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_kept(bias: str, base: Base, tmp_path: Path) -> None:
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt", lora(bias=bias))
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora(bias=bias))
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected
    assert base_names(tmp_path / "new") == set()


@pytest.mark.parametrize("architecture", ["modernbert", "t5"])
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_biases_that_a_base_does_not_have_are_no_reason_to_refuse(
    bias: str, architecture: str, base: Base, tmp_path: Path
) -> None:
    """Where there is none to train, the config of the training may say what it likes of them."""
    config = lora(bias=bias, target_modules="all-linear")
    expected, _ = stock_file(base(architecture), tmp_path / "old.pt", config)
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=config)
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected


def with_payload(path: Path, ran: Path) -> None:
    """Write a file again with something in it that writes a file when it is unpickled."""
    state = torch.load(path, map_location="cpu", weights_only=False)
    state["payload"] = _Payload(str(ran))
    torch.save(state, path)


@pytest.mark.parametrize(("name", "count"), [("sequence-tagger-stacked", 2), ("multitask", 1), ("text-classifier", 1)])
@pytest.mark.parametrize("is_converted", [False, True])
def test_config_that_is_used_for_several_adapters_is_reported(
    is_converted: bool, name: str, count: int, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One config is given, and a file of several adapters does not say that all were trained with it."""
    stock_file(base("bert"), tmp_path / "old.pt", entry=ZOO[name])
    with caplog.at_level(logging.WARNING, "flair_peft"):
        if is_converted:
            flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
        else:
            flair_peft.load_legacy(tmp_path / "old.pt", peft_config=lora())
    assert ("holds 2 adapters without a config" in caplog.text) == (count > 1)
    assert ("list_embedding_1" in caplog.text) == (count > 1)


class _Payload:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def test_what_a_file_names_runs_only_if_the_user_trusts_it(base: Base, tmp_path: Path) -> None:
    """The error names what the file names; the way out is asked for in so many words."""
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt")
    with_payload(tmp_path / "old.pt", tmp_path / "ran")
    with pytest.raises(UnsafeFileError, match="trust_pickle=True"):
        flair_peft.load_legacy(tmp_path / "old.pt", peft_config=lora())
    with pytest.raises(UnsafeFileError):
        flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert not (tmp_path / "ran").exists()
    loaded = flair_peft.load_legacy(tmp_path / "old.pt", peft_config=lora(), trust_pickle=True)
    assert (tmp_path / "ran").exists()
    assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected


@pytest.mark.parametrize("name", ["n" * 300, "a" * 5000 + "/b", "a\0b.pt"], ids=["file", "path", "nul"])
def test_name_that_no_file_can_have_is_refused_in_sentences(name: str) -> None:
    """Every way in says it, instead of an OSError or a ValueError of the system."""
    ways = [Model.load, TextClassifier.load, flair_peft.from_pretrained, flair_peft.verify, flair_peft.load_legacy]
    said = r"^Cannot load '.*a name of \d+ characters: .*, and no repository is called so\. Pass a path or a Hub id"
    for load in (*ways, flair_peft.PeftTransformerDocumentEmbeddings.from_adapter):
        with pytest.raises(ModelFileError, match=said):
            load(name)


def test_what_is_no_file_of_flair_is_said(base: Base, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="there is no file"):
        flair_peft.load_legacy(tmp_path / "nothing.pt", peft_config=lora())
    with pytest.raises(ModelFileError, match="there is no file"):
        flair_peft.convert_legacy(tmp_path / "nothing.pt", tmp_path / "new", peft_config=lora())
    stock_file(base("bert"), tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt", map_location="cpu", weights_only=False)
    torch.save({**state, "__cls__": "Unheard"}, tmp_path / "old.pt")
    with pytest.raises(ModelFileError, match="'Unheard'"):
        flair_peft.load_legacy(tmp_path / "old.pt", peft_config=lora())


def test_model_without_an_adapter_loads_as_it_is_and_takes_no_config(base: Base, tmp_path: Path) -> None:
    model = make(CLASSIFIER, base("bert"), None, is_stock=True)
    model.save(tmp_path / "plain.pt")
    loaded = flair_peft.load_legacy(tmp_path / "plain.pt")
    assert type(loaded.embeddings) is TransformerDocumentEmbeddings
    with pytest.raises(ValueError, match="holds no adapter"):
        flair_peft.load_legacy(tmp_path / "plain.pt", peft_config=lora())


SPELLINGS: dict[str, Callable[[str, int], str]] = {
    "no wrapper": lambda key, _: key.replace("base_model.model.", ""),
    "half converted": lambda key, number: key.replace("base_model.model.", "") if number % 2 else key,
    "base_layer half gone": lambda key, number: key.replace(".base_layer.", ".") if number % 2 else key,
    "another adapter name": lambda key, _: key.replace(".default.", ".opinions."),
    "old text classifier": lambda key, _: key.replace("embeddings.model.", "document_embeddings.model.", 1),
    "old text classifier without wrapper": lambda key, _: key.replace(
        "embeddings.model.base_model.model.", "document_embeddings.model.", 1
    ),
    "data parallel": lambda key, _: key.replace("embeddings.model.", "embeddings.model.module.", 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_keys_as_they_are_found_in_the_wild_are_brought_to_those_of_the_model(
    spelling: str, base: Base, tmp_path: Path
) -> None:
    """Every tensor finds its place, and the implied config is read from any of these spellings."""
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt")
    state = torch.load(tmp_path / "old.pt", map_location="cpu", weights_only=False)
    respelled = {SPELLINGS[spelling](key, n): t for n, (key, t) in enumerate(state["state_dict"].items())}
    assert respelled.keys() != state["state_dict"].keys()
    torch.save({**state, "state_dict": respelled}, tmp_path / "old.pt")
    with pytest.raises(MissingConfigError, match=r"LoraConfig\(r=4, lora_alpha=…, target_modules=\['query', 'value'\]"):
        flair_peft.load_legacy(tmp_path / "old.pt")
    converted = flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert CLASSIFIER.predict(converted, CLASSIFIER.corpus()) == expected
    assert base_names(tmp_path / "new") == set()
    loaded = flair_peft.from_pretrained(tmp_path / "new")
    assert CLASSIFIER.predict(loaded, CLASSIFIER.corpus()) == expected


def test_conversion_shows_how_far_it_is(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bar moves by bytes, and ends about where it said that it would."""
    moved: list[int] = []
    totals: list[int] = []

    class Bar:
        disable = True  # nothing of it is shown

        def __init__(self, *, total: int, **_: Any) -> None:
            totals.append(total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            moved.append(count)

    monkeypatch.setattr("flair_peft.primitives.progress.tqdm", Bar)
    monkeypatch.setattr(frozen_base, "_full_fingerprints", {})  # what another test hashed would not be read again
    stock_file(base("bert"), tmp_path / "old.pt")
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=lora())
    assert len(moved) > 10
    assert totals == [3 * (tmp_path / "old.pt").stat().st_size]
    assert 0.8 * totals[0] < sum(moved) < 1.3 * totals[0]


@pytest.mark.parametrize("is_known", [True, False])
def test_conversion_keeps_layers_that_a_replication_made(is_known: bool, base: Base, tmp_path: Path) -> None:
    """Also where the config given does not say that they were made of others."""
    config = lora(layer_replication=[(0, 2), (0, 2)])
    expected, _ = stock_file(base("bert"), tmp_path / "old.pt", config)
    flair_peft.convert_legacy(tmp_path / "old.pt", tmp_path / "new", peft_config=config if is_known else lora())
    assert CLASSIFIER.predict(flair_peft.from_pretrained(tmp_path / "new"), CLASSIFIER.corpus()) == expected


def test_conversion_of_our_own_file_takes_its_base_from_where_it_is_now(base: Base, tmp_path: Path) -> None:
    """A file without the base needs it to be read at all."""
    before, now = tmp_path / "before", tmp_path / "now"
    shutil.copytree(base("bert"), before)
    model = make(CLASSIFIER, str(before), lora())
    perturb_(model.embeddings.model, 5)
    model.eval().save(tmp_path / "slim.pt")
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    before.rename(now)
    flair_peft.convert_legacy(tmp_path / "slim.pt", tmp_path / "new", base_model=str(now))
    assert not base_names(tmp_path / "new")
    assert CLASSIFIER.predict(flair_peft.from_pretrained(tmp_path / "new"), CLASSIFIER.corpus()) == expected
