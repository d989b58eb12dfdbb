"""A load proves itself: the base is the one, the vectors are the ones, every tensor is used, and no code is run."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.embeddings.base import load_embeddings
from flair.models import TextClassifier
from huggingface_hub import CommitOperationAdd, HfApi
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftConfig
from transformers import AutoConfig, AutoModel, AutoTokenizer, T5Model, dynamic_module_utils

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.base import base_cache, check_base
from flair_peft.embeddings import vector_probe
from flair_peft.errors import (
    AdapterConfigError,
    BaseMismatchError,
    BaseModelNotFoundError,
    FlairPeftError,
    ModelFileError,
    StateMismatchError,
)
from flair_peft.primitives import rounding
from flair_peft.storage import manifest
from tests.support import tiny
from tests.support.configs import lora
from tests.support.files import save_stock
from tests.support.hub_stand_in import HubStandIn, online
from tests.support.methods import perturb_
from tests.support.models import save_random
from tests.support.round_trip import Factories
from tests.support.selection import few
from tests.support.zoo import ZOO

Base = Callable[[str], str]
Tensors = dict[str, torch.Tensor]

CLASSIFIER = ZOO["text-classifier"]
QUERY = "base_model.model.encoder.layer.0.attention.self.query.lora_A.weight"
DECODER = "state_dict/decoder.weight"
DOCUMENT, HEAD, ADAPTER = "flair_peft.json", "head.safetensors", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test reads bases from their files, as a process does that holds no other model."""
    monkeypatch.setattr(base_cache, "_cache", weakref.WeakValueDictionary())


@pytest.fixture
def own(base: Base, tmp_path: Path) -> Path:
    """Return a base that a test may change."""
    return Path(shutil.copytree(base("bert"), tmp_path / "base"))


def load(source: Path, **options: Any) -> Any:
    base_cache._cache.clear()
    if source.is_file():
        return TextClassifier.load(source, **options)
    return flair_peft.from_pretrained(source, **options)


def classifier(base: Any, config: PeftConfig | None = None, **options: Any) -> TextClassifier:
    factories = Factories(str(base), config or lora(), **options)
    return CLASSIFIER.build(factories.words, factories.documents)


def predict(model: Any) -> Any:
    return CLASSIFIER.predict(model, CLASSIFIER.corpus())


def save(model: TextClassifier, place: Path) -> Path:
    """Save as a directory, or as a file where the name ends in .pt."""
    if place.suffix == ".pt":
        model.save(place)
    else:
        flair_peft.save_pretrained(model, place)
    return place


forms = pytest.mark.parametrize("form", ["model", "model.pt"])


def resign(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda _: None) -> None:
    """Change the document, and make all hashes right again: what hashes tell is not what is tested here."""
    document = json.loads((directory / DOCUMENT).read_text())
    change(document)
    for name in document["files"]:
        entry = manifest.entry_of((directory / name).read_bytes())
        document["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    document["sha256"] = manifest.hash_of(document)
    (directory / DOCUMENT).write_text(json.dumps(document))


def params_of(document: dict[str, Any]) -> dict[str, Any]:
    return document["model"]["document_embeddings"]


def record_of(document: dict[str, Any]) -> dict[str, Any]:
    return params_of(document)["stored_base"]["record"]


def edit(directory: Path, name: str, change: Callable[[Tensors], Any]) -> None:
    tensors = safetensors.torch.load_file(directory / name)
    change(tensors)
    safetensors.torch.save_file(tensors, directory / name, {"format": "pt"})


def retrain(base: Path) -> None:
    shutil.rmtree(base)
    tiny.build("bert", base, seed=5)


def train_one_matrix(base: Path) -> None:
    edit(base, "model.safetensors", lambda t: t["encoder.layer.1.output.dense.weight"].mul_(1.001))


def convert(base: Path) -> None:
    AutoModel.from_pretrained(base).to(torch.bfloat16).save_pretrained(base)


def lengthen(base: Path) -> None:
    model = AutoModel.from_pretrained(base)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(base)


def widen(base: Path) -> None:
    model = AutoModel.from_pretrained(base)
    config = model.config
    config.intermediate_size = 128
    type(model)(config).save_pretrained(base)


def shorten(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    edit(base, "model.safetensors", lambda t: [t.pop(name) for name in list(t) if "layer.1." in name])
    (base / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))


def replace_by_roberta(base: Path) -> None:
    shutil.rmtree(base)
    tiny.build("roberta", base)


def replace_by_llama(base: Path) -> None:
    shutil.rmtree(base)
    tiny.build("llama", base)


@forms
@pytest.mark.parametrize(
    "change",
    [retrain, train_one_matrix, convert, lengthen, widen, shorten, replace_by_roberta, replace_by_llama],
)
def test_base_that_was_replaced_is_refused_by_name(
    change: Callable[[Path], None], form: str, own: Path, tmp_path: Path
) -> None:
    """Whatever stands where the base was, of other weights, precision or shape, is not used."""
    place = save(classifier(own), tmp_path / form)
    change(own)
    with pytest.raises(BaseMismatchError) as caught:
        load(place)
    assert f"'{own}'" in str(caught.value)
    assert "base_model=" in str(caught.value)


@forms
def test_base_that_is_gone_is_named_with_the_way_out(form: str, own: Path, tmp_path: Path) -> None:
    """The error says what the file lacks and which argument gives it."""
    place = save(classifier(own), tmp_path / form)
    shutil.rmtree(own)
    with pytest.raises(BaseModelNotFoundError, match=r"Pass base_model=") as caught:
        load(place)
    assert f"'{own}'" in str(caught.value)


@forms
def test_base_in_another_place_is_taken_if_it_is_the_same(form: str, own: Path, tmp_path: Path) -> None:
    """``base_model`` names a copy elsewhere, also by the recorded name; another model is refused, unless unverified."""
    model = classifier(own)
    place, before = save(model, tmp_path / form), predict(model)
    moved = own.rename(tmp_path / "moved")
    other = tiny.build("bert", tmp_path / "other", seed=5)
    for given in (str(moved), moved, {str(own): str(moved)}):
        assert predict(load(place, base_model=given)) == before
    with pytest.raises(BaseMismatchError, match=r"weights differ from those that the model was trained on\. Another"):
        load(place, base_model=str(other))
    with pytest.raises(AdapterConfigError, match="Cannot tell which base model stands for"):
        load(place, base_model={"another": str(moved)})
    with pytest.raises(BaseModelNotFoundError):
        load(place)


@forms
def test_load_without_verifying_says_what_was_not_checked(
    form: str, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``verify=False`` takes another base, and names base and vectors as unchecked."""
    place = save(classifier(own), tmp_path / form)
    other = tiny.build("bert", tmp_path / "other", seed=5)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        loaded = load(place, base_model=str(other), verify=False)
    assert "whether the base model is the one it was trained on" in caplog.text
    assert "whether it gives the vectors that it gave when it was saved" in caplog.text
    own_name = "encoder.layer.0.attention.output.dense.weight"
    expected = safetensors.torch.load_file(other / "model.safetensors")[own_name]
    assert torch.equal(loaded.embeddings.base_model.get_parameter(own_name), expected)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "flair_peft"):
        load(place)
    assert caplog.text == ""


@forms
def test_loaded_from_a_base_elsewhere_is_saved_with_that_place(form: str, own: Path, tmp_path: Path) -> None:
    """What was found by ``base_model`` is where the next file says the base is."""
    place = save(classifier(own), tmp_path / form)
    moved = own.rename(tmp_path / "moved")
    loaded = load(place, base_model=str(moved))
    again = save(loaded, tmp_path / f"again-{form}")
    assert loaded.embeddings.base_record.name == str(moved)
    assert predict(load(again)) == predict(loaded)
    assert again.is_file() or not (again / "base.safetensors").exists()


@forms
def test_base_beside_a_moved_checkpoint_is_found_by_its_relative_name(
    form: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder that holds checkpoint and base can be moved as a whole, if the record is relative."""
    work = tmp_path / "work"
    place = work / form
    beside = work if place.suffix == ".pt" else place
    shutil.copytree(base("bert"), beside / "base")
    monkeypatch.chdir(beside)
    model = classifier("base")
    model.embeddings.base_source.record = dataclasses.replace(model.embeddings.base_record, name="base")
    save(model, place)
    assert (beside / "base").is_dir()
    monkeypatch.chdir("/")
    moved = work.rename(tmp_path / "elsewhere")
    assert predict(load(moved / form)) == predict(model)
    retrain((moved if place.suffix == ".pt" else moved / form) / "base")
    with pytest.raises(BaseMismatchError):
        load(moved / form)


def change_one_weight(base: Path) -> None:
    """Change one element that the sample of the quick check does not hold."""

    def change(tensors: Tensors) -> None:
        matrix = tensors["embeddings.word_embeddings.weight"]
        rare = matrix.reshape(-1)
        rare[100] += 1e-3

    edit(base, "model.safetensors", change)


@forms
def test_single_changed_weight_is_found_by_a_full_verification_only(form: str, own: Path, tmp_path: Path) -> None:
    """The quick check reads a sample; ``verify`` and ``verify="full"`` read every weight."""
    model = classifier(own)
    place = save(model, tmp_path / form)
    flair_peft.verify(place)
    assert predict(load(place, verify="full")) == predict(model)
    change_one_weight(own)
    load(place)
    with pytest.raises(BaseMismatchError, match="some of its weights differ"):
        load(place, verify="full")
    base_cache._cache.clear()
    with pytest.raises(BaseMismatchError, match="some of its weights differ"):
        flair_peft.verify(place)


@forms
def test_base_of_a_label_encoder_is_found_and_verified_as_that_of_the_model(
    form: str, own: Path, tmp_path: Path
) -> None:
    """What the user says of a load holds for embeddings inside a decoder, too."""
    entry = ZOO["text-classifier-label-verbalizer"]

    def make(**kwargs: Any) -> PeftTransformerDocumentEmbeddings:
        return PeftTransformerDocumentEmbeddings(str(own), peft_config=lora(target_modules=None), **kwargs)

    model = entry.build(None, make)
    place, expected = save(model, tmp_path / form), entry.predict(model, entry.corpus())
    moved = own.rename(tmp_path / "moved")
    for load_it in (flair_peft.from_pretrained, TextClassifier.load):
        for base_model in (str(moved), {str(own): str(moved)}):
            loaded = load_it(place, base_model=base_model, verify="full")
            assert entry.predict(loaded, entry.corpus()) == expected
    with pytest.raises(BaseModelNotFoundError):
        load(place)


def test_what_holds_nothing_to_prove_is_not_called_verified(base: Base, tmp_path: Path) -> None:
    """Files of stock Flair, with an adapter or without one, load, and that is all that can be said of them."""
    adapter = lora(target_modules=None, task_type="FEATURE_EXTRACTION")
    for config in (None, adapter):
        make = functools.partial(TransformerDocumentEmbeddings, base("bert"), peft_config=config)
        CLASSIFIER.build(None, make).save(tmp_path / "x.pt")
        flair_peft.from_pretrained(tmp_path / "x.pt")
        with pytest.raises(ModelFileError, match="no probe"):
            flair_peft.verify(tmp_path / "x.pt")


@forms
def test_base_model_that_would_not_be_read_is_refused(form: str, own: Path, base: Base, tmp_path: Path) -> None:
    """A file that holds the base needs none, and is not compared with one."""
    place = tmp_path / form
    model = classifier(own)
    model.save(place, save_base=True) if place.suffix else flair_peft.save_pretrained(model, place, save_base=True)
    flair_peft.verify(place)
    for read in (load, flair_peft.verify, TextClassifier.load):
        with pytest.raises(AdapterConfigError, match="holds all weights"):
            read(place, base_model=base("roberta"))


def test_full_verification_without_a_digest_says_that_it_cannot(own: Path, tmp_path: Path) -> None:
    """Nothing is called verified that was not."""
    place = save(classifier(own), tmp_path / "model")
    resign(place, lambda document: record_of(document).update(full_fingerprint=None))
    load(place)
    with pytest.raises(ModelFileError, match="holds no digest of all its weights"):
        load(place, verify="full")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
def test_base_in_bf16_is_recognised_whatever_its_files_hold(
    stored: torch.dtype, base: Base, own: Path, tmp_path: Path
) -> None:
    """What counts is the precision that the adapter was trained on: the same bits are the same base."""
    model = classifier(base("bert"), dtype="bfloat16")
    place = save(model, tmp_path / "model")
    if stored == torch.bfloat16:
        convert(own)
    loaded = load(place, base_model=str(own), verify="full")
    assert loaded.embeddings.base_dtype == torch.bfloat16
    loaded.train()  # gives the head, which is cast after loading, its fp32 values back
    assert predict(loaded) == predict(model)


SENSITIVE = pytest.mark.parametrize(
    ("architecture", "model", "seed"),
    [("bert", "text-classifier", 0), ("t5", "text-classifier", 7), ("llama", "sequence-tagger-rnn-crf", 5)],
)


def save_sensitive(architecture: str, model: str, seed: int, base: Base, place: Path, **options: Any) -> Path:
    """Write a model whose random adapter multiplies what rounding does."""
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture])
    save_random(model, base(architecture), place, config=config, seed=seed, **options)
    return place


@SENSITIVE
def test_model_that_multiplies_rounding_loads_on_another_processor(
    architecture: str, model: str, seed: int, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What rounding explains is measured where what usual models are allowed does not suffice, by vectors and head."""
    place = save_sensitive(architecture, model, seed, base, tmp_path / "model", dtype="bfloat16")
    with rounding._Rounded(torch.bfloat16, seed=99):
        load(place)
        monkeypatch.setattr(rounding, "_TIMES_ALLOWED", 1)
        with pytest.raises(StateMismatchError, match=r"(where|and) rounding explains"):
            load(place)


@SENSITIVE
def test_other_weights_are_refused_where_rounding_is_multiplied(
    architecture: str, model: str, seed: int, base: Base, tmp_path: Path
) -> None:
    """More than rounding explains."""
    place = save_sensitive(architecture, model, seed, base, tmp_path / "model", dtype="bfloat16")
    edit(place, ADAPTER, lambda tensors: [tensor.neg_() for name, tensor in tensors.items() if "lora_B" in name])
    resign(place)
    with pytest.raises(StateMismatchError, match="vectors of a probe sentence"):
        load(place)


@pytest.mark.parametrize(("architecture", "seed"), [("llama", 3), ("llama", 6), ("t5", 7), ("t5", 8)])
def test_model_that_multiplies_rounding_loads_on_a_narrowed_base(
    architecture: str, seed: int, base: Base, tmp_path: Path
) -> None:
    """Trained in fp32, its vectors on a base in bf16 are farther away than those of usual models."""
    place = save_sensitive(architecture, "text-classifier", seed, base, tmp_path / "model")
    model = SharedBase(base(architecture), dtype="bfloat16").load(place)
    stored = safetensors.torch.load_file(place / HEAD)
    [vectors] = [tensor for name, tensor in stored.items() if name.endswith("/vectors")]
    states = vector_probe.probe_states(model.embeddings, vector_probe.probe_ids(model.embeddings))
    assert rounding.distance(vector_probe._means(states), vectors) > rounding.tolerance("bfloat16")


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubStandIn]:
    """Yield a stand-in for the Hub that everything in this process uses."""
    with HubStandIn() as server, online(server, None, tmp_path / "cache"):
        yield server


def test_base_on_the_hub_is_pinned_and_another_revision_refused(hub: HubStandIn, base: Base, tmp_path: Path) -> None:
    """A base that goes on being trained there is loaded as it was; the record's revision is not taken on trust."""
    files = {path.name: path.read_bytes() for path in Path(base("bert")).iterdir()}
    first = hub.add_repo("me/base", files)
    model = classifier("me/base")
    assert model.embeddings.base_revision == first
    place, before = save(model, tmp_path / "model"), predict(model)
    assert not (place / "base.safetensors").exists()
    other = tiny.build("bert", tmp_path / "other", seed=5) / "model.safetensors"
    second = (
        HfApi(endpoint=hub.endpoint, token=hub.token)
        .create_commit("me/base", [CommitOperationAdd("model.safetensors", other.read_bytes())], commit_message="x")
        .oid
    )
    assert second != first
    for options in ({}, {"base_model": "me/base"}, {"local_files_only": True}):
        loaded = load(place, **options)
        assert predict(loaded) == before
        assert loaded.embeddings.base_revision == first
    resign(place, lambda document: record_of(document).update(revision=second))
    with pytest.raises(BaseMismatchError, match=f"'me/base' at revision {second}"):
        load(place)
    resign(place, lambda document: record_of(document).update(revision="0" * 40))
    with pytest.raises(BaseModelNotFoundError, match=f"'me/base', revision {'0' * 40}"):
        load(place)


@pytest.mark.parametrize("setting", ["lora_alpha", "use_rslora"])
def test_probe_finds_a_changed_adapter_config(setting: str, own: Path, tmp_path: Path) -> None:
    """An alpha that was edited fits every shape and every hash, and is found by what the model gives."""
    place = save(classifier(own), tmp_path / "model")
    config = json.loads((place / "adapter_config.json").read_text())
    config.update({"lora_alpha": 13} if setting == "lora_alpha" else {"use_rslora": True})
    (place / "adapter_config.json").write_text(json.dumps(config))
    resign(place)
    with pytest.raises(StateMismatchError, match="its vectors of a probe sentence are"):
        load(place)
    assert load(place, verify=False).embeddings.adapter_config.lora_alpha == config["lora_alpha"]


def test_probe_finds_a_changed_tokenizer(own: Path, tmp_path: Path) -> None:
    """Two tokens that changed places are found before any weight is read."""
    place = save(classifier(own), tmp_path / "model")
    path = place / "tokenizer" / "tokenizer.json"
    settings = json.loads(path.read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["berlin"], vocabulary["."] = vocabulary["."], vocabulary["berlin"]
    path.write_text(json.dumps(settings))
    resign(place)
    with pytest.raises(StateMismatchError, match="vocabulary"):
        load(place)


@pytest.mark.parametrize("change", ["head", "adapter"])
def test_probe_finds_changed_weights(change: str, own: Path, tmp_path: Path) -> None:
    """A signed change of the adapter is found by what the embeddings give, one of the head by what that gives."""
    place = save(classifier(own), tmp_path / "model")
    file, name = (HEAD, DECODER) if change == "head" else (ADAPTER, QUERY)
    edit(place, file, lambda tensors: tensors[name].mul_(2))
    resign(place)
    with pytest.raises(StateMismatchError, match="probe sentence"):
        load(place)


def never_updated(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "were never updated" in record.getMessage()]


def untrained(
    base: Path, config: PeftConfig, directory: Path, train: Callable[[Any], None] | None = None, **options: Any
) -> Path:
    embeddings = PeftTransformerDocumentEmbeddings(str(base), peft_config=config, **options)
    labels = CLASSIFIER.corpus().make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
    if train is not None:
        train(embeddings.model)
    return save(model, directory)


def fresh_lora(init: bool) -> LoraConfig:
    """Return LoRA as PEFT starts it, a no-op, or with a random B."""
    return LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"], init_lora_weights=init)


@pytest.mark.parametrize("init", [True, False], ids=["no-op", "random"])
@forms
def test_adapter_that_was_never_trained_is_reported_at_load(
    form: str, init: bool, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it starts from, an adapter that nothing moved is said to be untrained, with a count; so are copies."""
    place = untrained(own, fresh_lora(init), tmp_path / form)
    loaded = load(place)
    (message,) = never_updated(caplog)
    assert message.startswith("8 of 8 parameters of the adapter")
    caplog.clear()
    load(save(loaded, tmp_path / f"again-{form}"))
    assert len(never_updated(caplog)) == 1


@pytest.mark.parametrize(
    ("config", "zero"),
    [
        (fresh_lora(True), 4),
        (AdaLoraConfig(init_r=4, target_r=2, total_step=10, lora_alpha=12, target_modules=["query", "value"]), 4),
        (fresh_lora(False), 0),
        (IA3Config(target_modules=["query", "value"], feedforward_modules=[]), 0),
    ],
    ids=["LoRA", "AdaLoRA", "random LoRA", "IA3"],
)
def test_stock_file_whose_adapter_changes_nothing_is_reported_at_load(
    config: PeftConfig, zero: int, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Stock Flair does not write what was trained; matrices that make every product zero tell, where there are some."""
    embeddings = TransformerDocumentEmbeddings(str(own), peft_config=config)
    labels = CLASSIFIER.corpus().make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
    load(save_stock(model, tmp_path / "stock.pt"), peft_config=config)
    assert [message.split(" of ")[0] for message in never_updated(caplog)] == [str(zero)] * bool(zero)


@forms
def test_adapter_that_was_trained_is_not_reported(
    form: str, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A step of an optimiser is enough, and one after loading too."""
    trained = untrained(own, lora(), tmp_path / form, train=lambda model: perturb_(model, seed=1))
    load(trained)
    assert never_updated(caplog) == []
    fresh = load(untrained(own, fresh_lora(True), tmp_path / f"fresh-{form}"))
    assert len(never_updated(caplog)) == 1
    caplog.clear()
    CLASSIFIER.train(fresh, CLASSIFIER.corpus(), tmp_path / "training", learning_rate=0.01, max_epochs=2)
    load(tmp_path / "training" / "final-model.pt")
    assert never_updated(caplog) == []


def test_adapter_of_which_a_part_was_trained_names_the_rest(
    own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The parameters that stayed are counted and named."""

    def train(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "layer.1" in name and "lora_" in name:
                parameter.data.add_(0.1)

    load(untrained(own, lora(), tmp_path / "model", train=train))
    (message,) = never_updated(caplog)
    assert message.startswith("4 of 8 parameters of the adapter")
    assert "layer.0" in message
    assert "layer.1" not in message


@pytest.mark.parametrize(
    ("targets", "options"),
    [(["query", "pooler.dense"], {}), (["query"], {"layers": "-2"})],
    ids=["pooler", "last layer unread"],
)
def test_weights_that_no_gradient_reaches_do_not_count_as_untrained(
    targets: list[str], options: dict[str, Any], own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapters of a pooler, or of layers behind those that are read, cannot learn and are not reported."""
    embeddings = PeftTransformerDocumentEmbeddings(str(own), peft_config=lora(target_modules=targets), **options)
    labels = CLASSIFIER.corpus().make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)
    model.train()
    model.forward_loss([CLASSIFIER.corpus().test[0]])[0].backward()
    unreached = [n for n, p in embeddings.model.named_parameters() if p.requires_grad and p.grad is None]
    assert unreached
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    load(save(model, tmp_path / "model"))
    assert never_updated(caplog) == []


@pytest.mark.parametrize("is_trained", [True, False])
def test_trained_token_rows_count_as_learned(
    is_trained: bool, own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Rows of tokens that the probe does not hold have learned if they changed, and only then."""
    tokenizer = AutoTokenizer.from_pretrained(own)
    tokens = tokenizer("zwq", add_special_tokens=False)["input_ids"]
    assert not set(tokens) & set(tokenizer("Berlin is large, isn't it? 3 of 4 say so.")["input_ids"])

    def train(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and (is_trained or "lora_" in name):
                parameter.data.add_(0.1)

    place = untrained(own, lora(trainable_token_indices=tokens), tmp_path / "model", train=train)
    loaded = load(place)
    messages = never_updated(caplog)
    assert len(messages) == (0 if is_trained else 1)
    assert all("trainable_tokens_delta" in message and "lora_" not in message for message in messages)
    matrix = loaded.embeddings.base_model.get_input_embeddings()
    assert (next(iter(matrix.token_adapter.trainable_tokens_delta.values())) != 0).any()


def drop(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.pop(name)


def rename(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{name}_x": tensors.pop(name)})


def add(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({f"{name}_x": tensors[name].clone()})


def reshape(name: str) -> Callable[[Tensors], Any]:
    return lambda tensors: tensors.update({name: torch.zeros(3, 5)})


@pytest.mark.parametrize("change", [drop, rename, add, reshape])
@pytest.mark.parametrize(("file", "name"), [(ADAPTER, QUERY), (HEAD, DECODER)], ids=["adapter", "head"])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
def test_tensor_that_is_missing_added_renamed_or_of_another_shape_is_named(
    verify: bool, file: str, name: str, change: Callable[[str], Callable[[Tensors], Any]], own: Path, tmp_path: Path
) -> None:
    """Every tensor of a file is used exactly once, whatever the hashes say, and whether or not it is verified."""
    place = save(classifier(own), tmp_path / "model")
    edit(place, file, change(name))
    resign(place)
    with pytest.raises((StateMismatchError, ModelFileError)) as caught:
        load(place, verify=verify)
    wanted = name.removeprefix("state_dict/").removesuffix(".weight")
    assert wanted in str(caught.value)


def test_tensors_of_two_checkpoints_are_not_mixed(own: Path, tmp_path: Path) -> None:
    """A folder for an adapter that the document does not know is no part of it, and a listed one is refused."""
    place = save(classifier(own), tmp_path / "model")
    shutil.copy(place / ADAPTER, place / "other.safetensors")
    load(place)
    resign(place, lambda document: document["files"].update({"other.safetensors": {}}))
    with pytest.raises(ModelFileError, match=r"nothing uses 'other\.safetensors'"):
        load(place)


_OWN_CODE = """
from pathlib import Path
from transformers import BertConfig, BertModel

Path({marker!r}).touch()


class OwnConfig(BertConfig):
    model_type = "own-architecture"


class OwnModel(BertModel):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output["last_hidden_state"] = output["last_hidden_state"] + 1
        return output
"""


@pytest.fixture
def with_code(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a base that comes with code of its own, which leaves a trace when it runs."""
    modules = tmp_path / "modules"
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    (own / "own_code.py").write_text(_OWN_CODE.format(marker=str(tmp_path / "ran")))
    config = json.loads((own / "config.json").read_text())
    names = {"AutoConfig": "own_code.OwnConfig", "AutoModel": "own_code.OwnModel"}
    config.update(model_type="own-architecture", architectures=["OwnModel"], auto_map=names)
    (own / "config.json").write_text(json.dumps(config))
    before = set(sys.modules)
    yield own
    for name in set(sys.modules) - before:
        if name.startswith("transformers_modules"):
            del sys.modules[name]


def forget_code(tmp_path: Path) -> None:
    """Leave no trace of code that ran: what is imported already runs no more."""
    (tmp_path / "ran").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "modules", ignore_errors=True)
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@forms
def test_base_with_code_of_its_own_loads_only_if_that_is_allowed_again(
    form: str, with_code: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It trains and is saved with trust_remote_code=True; no file can switch that on, and no load runs it before."""
    with pytest.raises(BaseModelNotFoundError):
        classifier(with_code)
    assert not (tmp_path / "ran").exists()
    model = classifier(with_code, transformers_model_kwargs={"trust_remote_code": True}, trust_remote_code=True)
    assert type(model.embeddings.base_model).__name__ == "OwnModel"
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        CLASSIFIER.train(model, CLASSIFIER.corpus(), tmp_path / "training", learning_rate=1e-3)
    assert "does not load" not in caplog.text
    place, before = save(model, tmp_path / form), predict(model)
    forget_code(tmp_path)
    for options in ({}, {"verify": False}, {"base_model": str(with_code)}):
        with pytest.raises(ModelFileError, match=r"comes with code of its own.*trust_remote_code=True"):
            load(place, **options)
    assert not (tmp_path / "ran").exists()
    loaded = load(place, trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert type(loaded.embeddings.base_model).__name__ == "OwnModel"
    assert predict(loaded) == before
    assert predict(load(tmp_path / "training" / "final-model.pt", trust_remote_code=True)) == before
    again = save(loaded, tmp_path / f"again-{form}")
    with pytest.raises(ModelFileError, match="comes with code of its own"):
        load(again)
    assert predict(load(again, trust_remote_code=True)) == before


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@pytest.mark.parametrize("save_base", [False, True])
@forms
def test_base_with_code_that_is_gone_is_named(form: str, save_base: bool, with_code: Path, tmp_path: Path) -> None:
    """Code is in no file, so that even one with all weights needs the base; the error says so as for any other base."""
    model = classifier(with_code, trust_remote_code=True, save_base=save_base)
    place, before = save(model, tmp_path / form), predict(model)
    forget_code(tmp_path)
    assert predict(load(place, trust_remote_code=True)) == before
    moved = with_code.rename(tmp_path / "moved")
    forget_code(tmp_path)
    with pytest.raises(BaseModelNotFoundError, match=re.escape(f"'{with_code}'")):
        load(place, trust_remote_code=True)
    assert predict(load(place, trust_remote_code=True, base_model=str(moved))) == before


@pytest.mark.parametrize("save_base", [False, True])
@forms
def test_base_without_code_loads_whatever_was_allowed(
    form: str, save_base: bool, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Code that is allowed, but not there, is not asked for; files of 0.2.0 that ask for it load if it is allowed."""
    model = classifier(base("bert"), trust_remote_code=True, save_base=save_base)
    place, before = save(model, tmp_path / form), predict(model)
    assert predict(load(place)) == predict(load(place, trust_remote_code=True)) == before
    assert type(flair_peft.merge(model).embeddings) is TransformerDocumentEmbeddings
    model.embeddings.base_source.record = dataclasses.replace(model.embeddings.base_record, needs_remote_code=True)
    place = save(model, tmp_path / f"old-{form}")
    with pytest.raises(ModelFileError, match="comes with code of its own"):
        load(place)
    assert predict(load(place, trust_remote_code=True)) == before


def test_record_that_hides_its_need_of_code_runs_none(with_code: Path, tmp_path: Path) -> None:
    """A file that says its base needs no code, or a base that gets code later, does not make it run."""
    model = classifier(with_code, trust_remote_code=True)
    place = save(model, tmp_path / "model")
    forget_code(tmp_path)
    resign(place, lambda document: record_of(document).update(needs_remote_code=False))
    with pytest.raises(FlairPeftError):
        load(place)
    assert not (tmp_path / "ran").exists()


_EVIL = """
from pathlib import Path
from transformers import BertTokenizer, BertTokenizerFast
Path({marker!r}).touch()
class Evil(BertTokenizer):
    pass
class EvilFast(BertTokenizerFast):
    pass
"""


@pytest.mark.parametrize("trust", [False, True])
@pytest.mark.parametrize("tokenizer_class", ["kept", "evil", "none"])
@pytest.mark.parametrize("place_of_code", ["beside", "another repository"])
def test_code_beside_the_tokenizer_of_a_checkpoint_is_never_run(
    place_of_code: str, tokenizer_class: str, trust: bool, own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever trusts the code of a base does not trust that of a checkpoint: a tokenizer's settings can name any."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    model = classifier(own)
    place = save(model, tmp_path / "model")
    code = _EVIL.format(marker=str(tmp_path / "ran"))
    (tmp_path / "evil").mkdir()
    for folder in (place / "tokenizer", tmp_path / "evil"):
        (folder / "evil.py").write_text(code)
    source = "" if place_of_code == "beside" else f"{tmp_path / 'evil'}--"
    settings = json.loads((place / "tokenizer" / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [f"{source}evil.Evil", f"{source}evil.EvilFast"]}
    if tokenizer_class == "evil":
        settings["tokenizer_class"] = "Evil"
    elif tokenizer_class == "none":
        settings.pop("tokenizer_class")
    (place / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    resign(place, lambda document: document["files"].update({"tokenizer/evil.py": {}}))
    try:
        assert predict(load(place, trust_remote_code=trust)) == predict(model)
    except FlairPeftError:
        assert tokenizer_class != "kept"
    assert not (tmp_path / "ran").exists()


FORMATS: dict[str, dict[str, Any]] = {
    "whole": {},
    "sharded": {"max_shard_size": "40KB"},
    "pickled": {"safe_serialization": False},
}


def copied(base: str, folder: Path, **options: Any) -> str:
    """Write a copy as transformers' users do for machines without a network; it draws what the base lacks."""
    AutoModel.from_pretrained(base).save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


def on(base: str) -> TextClassifier:
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=lora(target_modules=None))
    return TextClassifier(embeddings, label_dictionary=copied_labels(), label_type="kind")


def copied_labels() -> Dictionary:
    labels = Dictionary(add_unk=False)
    for label in ("A", "B"):
        labels.add_item(label)
    return labels


def vector_of(model: Any) -> torch.Tensor:
    sentence = Sentence("Berlin is large .")
    model.eval().embeddings.embed(sentence)
    return sentence.embedding.detach().clone()


@pytest.mark.parametrize("written", few(FORMATS, ["whole"]))
@pytest.mark.parametrize("architecture", ["bert-mlm", "bert"])
def test_offline_copy_of_a_base_stands_for_it_and_it_for_the_copy(
    architecture: str, written: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Only a pooler that nobody reads was drawn anew: equal vectors, each way, also for `verify` and a SharedBase."""
    original = base(architecture)
    bases = [original, *(copied(original, tmp_path / name, **FORMATS[written]) for name in ("first", "second"))]
    for number, (trained, other) in enumerate([bases[:2], bases[:0:-1], bases[1::-1]]):
        model = on(trained)
        expected = vector_of(model)
        source = tmp_path / f"{number}.pt"
        model.save(source)
        assert torch.equal(vector_of(TextClassifier.load(source, base_model=other)), expected)
        flair_peft.verify(source, base_model=other)
        assert torch.equal(vector_of(SharedBase(other).load(source)), expected)


def test_file_without_digests_of_what_is_read_loads_on_a_copy(base: Callable[[str], str], tmp_path: Path) -> None:
    """Files of earlier versions know the weights that the base had, which are those that are read."""
    model = on(base("bert-mlm"))
    expected = vector_of(model)
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    resign(tmp_path / "checkpoint", lambda document: params_of(document)["stored_base"].pop("read"))
    other = copied(base("bert-mlm"), tmp_path / "copy")
    assert torch.equal(vector_of(flair_peft.from_pretrained(tmp_path / "checkpoint", base_model=other)), expected)


def test_copy_whose_read_weights_differ_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """A pooler may differ, and nothing else."""
    on(base("bert-mlm")).save(tmp_path / "model.pt")
    changed = AutoModel.from_pretrained(base("bert-mlm"))
    changed.encoder.layer[1].output.dense.weight.data[0, 0] += 1
    changed.save_pretrained(tmp_path / "copy")
    with pytest.raises(BaseMismatchError, match="its weights differ"):
        TextClassifier.load(tmp_path / "model.pt", base_model=str(tmp_path / "copy"))


def _changed_base(base: Base, architecture: str, folder: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Return a copy of a tiny base whose file of weights is another."""
    shutil.copytree(base(architecture), folder)
    file = folder / "model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(file)), file, metadata={"format": "pt"})
    return folder


LACKING: dict[str, tuple[Callable[[str], str | None], str]] = {
    "other-prefix": ("student.{}".format, "'embeddings.LayerNorm.bias'.* and hold .*'student.embeddings"),
    "wrapped": ("module.{}".format, "'embeddings.LayerNorm.bias'.* and hold .*'module.embeddings"),
    "one-bias": (
        lambda name: None if name == "encoder.layer.1.output.LayerNorm.bias" else name,
        r"describes, 'encoder\.layer\.1\.output\.LayerNorm\.bias'\. They",
    ),
    "renamed-norm": (
        lambda name: name.replace("attention.output.LayerNorm", "attention.ln"),
        r"'encoder\.layer\.0\.attention\.output\.LayerNorm\.bias'.* and hold .*'encoder\.layer\.0\.attention\.ln",
    ),
}


@pytest.mark.parametrize("case", LACKING)
@pytest.mark.parametrize("entry", few(["embeddings", "shared"], ["embeddings"]))
def test_base_whose_file_lacks_weights_is_refused_by_their_names(
    base: Base, tmp_path: Path, case: str, entry: str
) -> None:
    """Nothing that hidden states depend on is drawn at random without a word."""
    rename, message = LACKING[case]
    folder = _changed_base(
        base, "bert", tmp_path / "base", lambda w: {rename(name): t for name, t in w.items() if rename(name)}
    )
    make = PeftTransformerDocumentEmbeddings if entry == "embeddings" else SharedBase
    with pytest.raises(BaseModelNotFoundError, match=message):
        make(str(folder))


@pytest.mark.parametrize("form", few(["bin", "sharded"], ["sharded"]))
def test_base_in_other_files_that_lack_weights_is_refused_by_their_names(base: Base, tmp_path: Path, form: str) -> None:
    """Pickled and sharded weights are judged as others are."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    weights = {
        f"student.{name}": tensor for name, tensor in safetensors.torch.load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    if form == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        safetensors.torch.save_file(weights, folder / "model-00001-of-00001.safetensors", metadata={"format": "pt"})
        index = {"metadata": {}, "weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BaseModelNotFoundError, match=r"'embeddings\.LayerNorm.* and hold .*'student\.embeddings"):
        PeftTransformerDocumentEmbeddings(str(folder))


def test_base_with_fewer_layers_or_other_shapes_in_its_file_than_in_its_config_is_refused(
    base: Base, tmp_path: Path
) -> None:
    """A config may not ask for layers that are nowhere, nor a user let shapes differ unseen."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(BaseModelNotFoundError, match=r"'encoder\.layer\.2\.attention"):
        PeftTransformerDocumentEmbeddings(str(folder))
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(BaseModelNotFoundError, match=r"'encoder\.layer\.0\.intermediate"):
        PeftTransformerDocumentEmbeddings(str(folder), transformers_model_kwargs={"ignore_mismatched_sizes": True})


def test_base_that_lacks_only_what_no_vector_depends_on_is_taken(base: Base, tmp_path: Path) -> None:
    """A parameter that only a pretraining task reads may be missing, and the encoder of a larger file is enough."""
    without = _changed_base(
        base, "xlnet", tmp_path / "xlnet", lambda w: {name: t for name, t in w.items() if name != "mask_emb"}
    )
    assert PeftTransformerDocumentEmbeddings(str(without)).embed(Sentence("Berlin"))
    whole = Path(shutil.copytree(base("t5"), tmp_path / "t5"))
    torch.manual_seed(0)
    T5Model(AutoConfig.from_pretrained(whole)).save_pretrained(whole)
    assert PeftTransformerDocumentEmbeddings(str(whole)).embed(Sentence("Berlin"))


def vector_from(embeddings: PeftTransformerDocumentEmbeddings) -> torch.Tensor:
    (sentence,) = embeddings.embed(Sentence("Berlin is large"))
    return sentence.embedding


def test_file_that_holds_what_its_base_lacks_loads_all_the_same(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base is only judged when a training may start from it: older files hold the weights that were random."""
    folder = _changed_base(
        base,
        "bert",
        tmp_path / "base",
        lambda w: {n: t for n, t in w.items() if n != "encoder.layer.0.output.dense.bias"},
    )
    with monkeypatch.context() as patched:
        patched.setattr(check_base, "check_complete", lambda *_: None)
        embeddings = PeftTransformerDocumentEmbeddings(str(folder))
    expected = vector_from(embeddings)
    stored = embeddings.save_embeddings()
    del embeddings
    assert torch.equal(vector_from(load_embeddings(stored)), expected)
