"""Adapters on quantised bases: trained, saved without a weight of the base, and loaded to the same bits."""

from __future__ import annotations

import copy
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.base import quantisation
from flair_peft.errors import AdapterConfigError, BaseMismatchError, ModelFileError
from tests.support.methods import perturb_
from tests.support.opinions import classifier, train
from tests.support.quantised import METHODS, SETTINGS, quantised_classifier, vectors
from tests.support.vectors import is_same

Base = Callable[[str], str]

# PEFT warns of the very targets that LN tuning is for.
pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")

BY_DEFAULT = [n if n in ("nf4", "int8") else pytest.param(n, marks=pytest.mark.matrix) for n in SETTINGS]
LAYERS = {"nf4": Linear4bit, "nf4-double": Linear4bit, "fp4": Linear4bit, "int8": Linear8bitLt}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", BY_DEFAULT)
def test_what_was_saved_is_quantised_again_and_gives_the_same_bits(
    settings: str, method: str, base: Base, tmp_path: Path
) -> None:
    """Files hold the settings and what was learned; the weights come from the source, quantised in the same way."""
    live = quantised_classifier(base("bert"), settings, method)
    before = vectors(live)
    flair_peft.save_pretrained(live, tmp_path / "directory")
    live.save(tmp_path / "model.pt")
    assert is_same(vectors(live), before)
    for path in (tmp_path / "directory", tmp_path / "model.pt"):
        loaded = TextClassifier.load(path)
        assert is_same(vectors(loaded), before)
        base_model = loaded.embeddings.base_model
        assert sum(isinstance(module, LAYERS[settings]) for module in base_model.modules()) == 12
        recorded = loaded.embeddings.base_record.quantization
        assert recorded == quantisation.settings_of(live.embeddings.base_model.config)
        assert recorded["quant_method"] == "bitsandbytes"
        loaded.save(tmp_path / "again.pt")
        assert is_same(vectors(TextClassifier.load(tmp_path / "again.pt")), before)
    stored = load_file(tmp_path / "directory" / "adapter_model.safetensors")
    whole = sum(tensor.nbytes for tensor in stored.values())
    assert whole < 30_000
    assert not [name for name in stored if name.endswith((".SCB", ".absmax", "query.weight"))]


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ("nf4", "lora"),
        ("nf4", "prefix"),
        ("int8", "lora"),
        *(pytest.param(name, "lora", marks=pytest.mark.matrix) for name in ("nf4-double", "fp4")),
    ],
)
def test_training_runs_through_and_its_best_model_is_the_one_loaded(
    settings: str, method: str, base: Base, tmp_path: Path
) -> None:
    """Flair's own training: evaluation between epochs, the best model's reload, the final file.

    A prefix does not pass gradient checkpointing, which is on for all other methods.
    """
    model = quantised_classifier(base("bert"), settings, method)
    assert model.embeddings.base_model.is_gradient_checkpointing == (method != "prefix")
    start = {name: p.detach().clone() for name, p in model.embeddings.model.named_parameters() if p.requires_grad}
    train(model, tmp_path, max_epochs=2)
    trained = dict(model.embeddings.model.named_parameters())
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in start.items())
    model.eval()
    loaded = TextClassifier.load(tmp_path / "final-model.pt")
    assert is_same(vectors(loaded), vectors(model))


@pytest.mark.parametrize("settings", ["nf4", "int8"])
def test_training_goes_on_from_a_file_as_it_would_have(settings: str, base: Base, tmp_path: Path) -> None:
    """The next batch has the same loss and gradients, with checkpointing as it was chosen."""
    live = quantised_classifier(
        base("bert"), settings, peft_gradient_checkpointing_kwargs={"use_gradient_checkpointing": False}
    )
    live.save(tmp_path / "model.pt")
    loaded = TextClassifier.load(tmp_path / "model.pt")
    losses = []
    for model in (live, loaded):
        assert not model.embeddings.base_model.is_gradient_checkpointing
        sentence = Sentence("a wonderful film")
        sentence.add_label("opinion", "positive")
        model.train()
        torch.manual_seed(3)
        loss, _ = model.forward_loss([sentence])
        loss.backward()
        gradients = {n: p.grad for n, p in model.embeddings.model.named_parameters() if p.requires_grad}
        losses.append((loss, gradients))
    (loss, gradients), (again, found) = losses
    assert torch.equal(loss, again)
    assert gradients.keys() == found.keys()
    assert all(torch.equal(gradient, found[name]) for name, gradient in gradients.items())


def test_frozen_vectors_are_those_of_stock_flair(base: Base) -> None:
    """With the adapter off, the quantised base embeds as Flair's own class does with an adapter that does nothing."""
    nothing_yet = LoraConfig(r=4, lora_alpha=12, target_modules=["query", "value"])
    stock = TransformerDocumentEmbeddings(
        base("bert"), transformers_model_kwargs={"quantization_config": SETTINGS["int8"]()}, peft_config=nothing_yet
    )
    ours = quantised_classifier(base("bert"), "int8", dtype=None).embeddings
    first, second = Sentence("Berlin is large"), Sentence("Berlin is large")
    stock.embed(first)
    with ours.model.disable_adapter():
        ours.embed(second)
    assert torch.allclose(first.embedding, second.embedding, atol=1e-5)


def test_peft_alone_loads_the_directory(base: Base, tmp_path: Path) -> None:
    """The directory is PEFT's own, on a base quantised by hand."""
    live = quantised_classifier(base("bert"), "nf4")
    flair_peft.save_pretrained(live, tmp_path)
    bare = AutoModel.from_pretrained(base("bert"), quantization_config=SETTINGS["nf4"](), dtype=torch.bfloat16)
    for module in bare.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
    theirs = PeftModel.from_pretrained(quantisation.prepare_model_for_kbit_training(bare), tmp_path).eval()
    inputs = live.embeddings.tokenizer("Berlin is large", return_tensors="pt")
    inputs.pop("token_type_ids", None)
    with torch.no_grad():
        expected = live.embeddings.model(**inputs).last_hidden_state
        assert torch.equal(theirs(**inputs).last_hidden_state, expected)


def test_base_that_is_another_one_is_refused(base: Base, tmp_path: Path) -> None:
    """The source is what proves a quantised base: a re-trained one at the load, a single weight by ``verify``."""
    here = tmp_path / "base"
    AutoModel.from_pretrained(base("bert")).save_pretrained(here)
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(here)
    live = quantised_classifier(str(here), "nf4")
    flair_peft.save_pretrained(live, tmp_path / "model")
    flair_peft.verify(tmp_path / "model")
    weights = load_file(here / "model.safetensors")
    name = "encoder.layer.0.attention.self.key.weight"
    one = {**weights, name: weights[name].clone()}
    one[name].view(-1)[1] += 1e-7  # too little for any rounding to show
    retrained = {name: tensor + 1e-3 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(one, here / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="weights differ"):
        flair_peft.verify(tmp_path / "model")
    save_file(retrained, here / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="its weights differ"):
        TextClassifier.load(tmp_path / "model")


def test_base_that_went_away_does_not_stop_a_save(base: Base, tmp_path: Path) -> None:
    """What was learned is saved all the same, and loads from where the base is now."""
    here = tmp_path / "base"
    AutoModel.from_pretrained(base("bert")).save_pretrained(here)
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(here)
    live = quantised_classifier(str(here), "nf4")
    here.rename(tmp_path / "moved")
    live.save(tmp_path / "model.pt")
    loaded = flair_peft.from_pretrained(tmp_path / "model.pt", base_model=str(tmp_path / "moved"))
    assert is_same(vectors(loaded), vectors(live))


def test_what_no_file_holds_is_refused(base: Base, tmp_path: Path) -> None:
    """Merging rounds quantised weights for good, and neither files nor pickles hold them."""
    live = quantised_classifier(base("bert"), "nf4")
    with pytest.raises(AdapterConfigError, match="save_base"):
        live.save(tmp_path / "model.pt", save_base=True)
    with pytest.raises(AdapterConfigError, match="quantised"):
        pickle.dumps(live.embeddings)
    with pytest.warns(UserWarning, match="Merge lora module to 4-bit"):
        live.embeddings.model.merge_adapter()
    with pytest.warns(UserWarning, match="Unmerge lora module to 4-bit"):
        live.embeddings.model.unmerge_adapter()
    with pytest.raises(AdapterConfigError, match="changed since they were read"):
        live.save(tmp_path / "model.pt")
    with pytest.raises(AdapterConfigError, match="changed since they were read"):
        train(live, tmp_path / "training")
    assert not (tmp_path / "model.pt").exists()


def test_engine_whose_settings_no_file_holds_is_refused_before_the_training(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = classifier(base("bert"))
    monkeypatch.setattr(model.embeddings.base_model, "quantization_method", "quanto", raising=False)
    for store in (lambda: train(model, tmp_path), lambda: model.save(tmp_path / "model.pt")):
        with pytest.raises(AdapterConfigError, match="quantised by quanto"):
            store()


@pytest.mark.parametrize(
    "change",
    [
        {"quant_method": "quanto"},
        {"quant_method": ["bitsandbytes"]},
        {"quant_method": None},
        {"bnb_4bit_compute_dtype": "load"},
        {"bnb_4bit_compute_dtype": 3},
        {"bnb_4bit_quant_storage": "os"},
        {"load_in_4bit": "yes"},
        {"load_in_8bit": True},
        {"llm_int8_threshold": "high"},
        {"llm_int8_skip_modules": 3},
        {"llm_int8_skip_modules": [3]},
    ],
    ids=str,
)
def test_settings_that_are_damaged_are_refused(change: dict[str, Any]) -> None:
    stored = quantisation.settings_of(_config(SETTINGS["nf4"]()))
    assert quantisation.read_settings(stored).to_dict() == SETTINGS["nf4"]().to_dict()
    with pytest.raises(ModelFileError, match="quantise the base"):
        quantisation.read_settings({**stored, **change})


@pytest.mark.parametrize("engine", ["bitsandbytes", "torchao"])
def test_engine_that_is_not_installed_is_named(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not the file that is at fault."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelFileError, match=f"pip install {engine}"):
        quantisation.read_settings({"quant_method": engine})


def test_file_that_asks_for_another_engine_is_refused(base: Base, tmp_path: Path) -> None:
    """A file chooses between known settings; it brings in no other engine."""
    live = quantised_classifier(base("bert"), "nf4")
    flair_peft.save_pretrained(live, tmp_path)
    text = (tmp_path / "flair_peft.json").read_text()
    assert '"bitsandbytes"' in json.dumps(json.loads(text))
    (tmp_path / "flair_peft.json").write_text(text.replace('"bitsandbytes"', '"evil_payload"'))
    with pytest.raises(ModelFileError):
        flair_peft.from_pretrained(tmp_path)


def test_base_that_lies_quantised_in_its_directory(base: Base, tmp_path: Path) -> None:
    """Its own settings count; two embeddings on it are two models, and what is saved loads."""
    here = tmp_path / "base"
    AutoModel.from_pretrained(
        base("bert"), quantization_config=SETTINGS["nf4"](), dtype=torch.bfloat16
    ).save_pretrained(here)
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(here)
    live = classifier(str(here), peft_config=METHODS["lora"]())
    other = PeftTransformerWordEmbeddings(str(here), peft_config=METHODS["lora"]())
    assert other.base_model is not live.embeddings.base_model
    before = vectors(live)
    live.save(tmp_path / "model.pt")
    loaded = TextClassifier.load(tmp_path / "model.pt")
    assert is_same(vectors(loaded), before)
    assert any(isinstance(module, Linear4bit) for module in loaded.embeddings.base_model.modules())


def test_copy_is_its_own(base: Base) -> None:
    live = quantised_classifier(base("bert"), "nf4")
    before = vectors(live)
    clone = copy.deepcopy(live)
    assert is_same(vectors(clone), before)
    perturb_(clone.embeddings.model, 1)
    assert not is_same(vectors(clone), before)
    assert is_same(vectors(live), before)


def test_settings_may_be_given_as_flair_takes_them(base: Base, tmp_path: Path) -> None:
    """Flair hands keywords on to transformers: ``quantization_config`` is one of them."""
    embeddings = PeftTransformerDocumentEmbeddings(
        base("bert"), peft_config=METHODS["lora"](), quantization_config=SETTINGS["nf4"]()
    )
    assert embeddings.is_quantised
    assert embeddings.base_record.quantization["bnb_4bit_quant_type"] == "nf4"
    perturb_(embeddings.model, 0)
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    live = TextClassifier(embeddings, label_type="opinion", label_dictionary=labels).eval()
    live.save(tmp_path / "model.pt")
    assert is_same(vectors(TextClassifier.load(tmp_path / "model.pt")), vectors(live))


@pytest.mark.skipif(not bitsandbytes.functional.has_avx512bf16(), reason="only CPUs with AVX512-BF16 are affected")
def test_bitsandbytes_still_repacks_what_cannot_be_trained_then() -> None:
    """Why repacking is switched off; a release of bitsandbytes that can train after it ends this test."""
    layer = Linear4bit(64, 64, compute_dtype=torch.bfloat16).to("cpu").eval()
    inputs = torch.randn(2, 64)
    layer(inputs)
    layer.train()
    with pytest.raises(RuntimeError):
        layer(inputs.requires_grad_()).sum().backward()


def _config(settings: BitsAndBytesConfig) -> Any:
    class Config:
        quantization_config = settings

    return Config()
