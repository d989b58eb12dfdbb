"""Models whose transformer, with the adapter merged into it, runs in onnxruntime."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.embeddings.transformer import TransformerOnnxEmbeddings
from peft import PromptTuningConfig

import flair_peft
from flair_peft.errors import AdapterConfigError, StateMismatchError, UnsupportedMethodError
from tests.support import tiny
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, classifier, make
from tests.support.round_trip import ROUNDING, largest_difference
from tests.support.zoo import ZOO

Base = Callable[[str], str]


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger", "multitask-word-and-document", "multitask"])
def test_exported_model_predicts_the_same_and_stock_flair_loads_it(name: str, base: Base, tmp_path: Path) -> None:
    entry = ZOO[name]
    live = make(entry, base("bert"), lora())
    corpus = entry.corpus()
    expected = entry.predict(live, corpus)
    exported = flair_peft.export_onnx(live, tmp_path / "onnx" / "model.onnx")
    assert (tmp_path / "onnx" / "model.onnx").is_file()
    assert any(isinstance(module, TransformerOnnxEmbeddings) for module in exported.modules())
    assert largest_difference(expected, entry.predict(exported, corpus)) < ROUNDING
    flair_peft.uninstall()
    exported.save(tmp_path / "model.pt")
    loaded = entry.model_class.load(tmp_path / "model.pt")
    found = entry.predict(loaded, corpus)
    flair_peft.install()
    assert largest_difference(expected, found) < ROUNDING
    assert entry.predict(live, corpus) == expected


@pytest.mark.parametrize("architecture", ["roberta", "distilbert", "electra", "albert"])
def test_architecture_gives_the_same_vectors(architecture: str, base: Base, tmp_path: Path) -> None:
    live = classifier(base(architecture), lora(target_modules=tiny.ATTENTION_TARGETS[architecture]))
    corpus = CLASSIFIER.corpus()
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")
    assert largest_difference(CLASSIFIER.predict(live, corpus), CLASSIFIER.predict(exported, corpus)) < ROUNDING


def test_graph_that_computes_something_else_is_an_error(base: Base, tmp_path: Path) -> None:
    """Traced, Flair's mean of subtokens takes lengths for constants; a Flair that mends it ends this test."""
    live = make(ZOO["sequence-tagger"], base("bert"), lora(), subtoken_pooling="mean")
    with pytest.raises(StateMismatchError, match="took something for a constant"):
        flair_peft.export_onnx(live, tmp_path / "model.onnx")


@pytest.mark.parametrize("is_there", [True, False])
def test_graph_that_is_refused_replaces_nothing(is_there: bool, base: Base, tmp_path: Path) -> None:
    """A model that names the path goes on running the graph that it was exported with."""
    live = make(ZOO["sequence-tagger"], base("bert"), lora(), subtoken_pooling="mean")
    if is_there:
        (tmp_path / "x.onnx").write_bytes(b"earlier")
    with pytest.raises(StateMismatchError):
        flair_peft.export_onnx(live, tmp_path / "x.onnx")
    found = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert found == ({"x.onnx": b"earlier"} if is_there else {})


def test_what_cannot_be_merged_is_refused(base: Base, tmp_path: Path) -> None:
    config = PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3)
    with pytest.raises(UnsupportedMethodError, match="PROMPT_TUNING"):
        flair_peft.export_onnx(classifier(base("bert"), config), tmp_path / "model.onnx")


def test_missing_packages_are_named(base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(AdapterConfigError, match="pip install onnx onnxruntime"):
        flair_peft.export_onnx(classifier(base("bert")), tmp_path / "model.onnx")


def test_flairs_export_still_leaves_the_exporter_to_torch(base: Base, tmp_path: Path) -> None:
    """A Flair that hands arguments on to torch's exporter ends this test, and the detour with it."""
    assert "dynamo" not in inspect.signature(TransformerOnnxEmbeddings.export_from_embedding).parameters
    plain = TransformerDocumentEmbeddings(base("bert"))
    with pytest.raises(Exception, match=r"onnxscript|dynam|tuple|export"):
        plain.export_onnx(tmp_path / "model.onnx", [Sentence("Berlin is large ."), Sentence("a")])


@pytest.mark.parametrize("name", ["text-pair-classifier", "text-pair-regressor", "text-triple-classifier"])
def test_model_that_stock_flair_would_read_with_another_separator_is_refused(
    name: str, base: Base, tmp_path: Path
) -> None:
    """Flair chooses the separator by the class of the embeddings, and forgets it for ONNX files."""
    with pytest.raises(AdapterConfigError, match="joins texts by ' \\[SEP\\] '"):
        flair_peft.export_onnx(make(ZOO[name], base("bert"), lora()), tmp_path / "model.onnx")
    separate = make(ZOO["text-pair-classifier-separate"], base("bert"), lora())
    assert flair_peft.export_onnx(separate, tmp_path / "model.onnx")


def test_decoder_that_torch_cannot_trace_is_named(base: Base, tmp_path: Path) -> None:
    """The exporter's own error says nothing to a user; a torch that can do it ends this test."""
    config = lora(target_modules=tiny.ATTENTION_TARGETS["llama"])
    with pytest.raises(UnsupportedMethodError, match="ONNX exporter fails on LlamaModel"):
        flair_peft.export_onnx(classifier(base("llama"), config), tmp_path / "model.onnx")
