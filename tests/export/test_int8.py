"""Exported models in int8: smaller, close, and with their cost said."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from flair.data import Dictionary, Sentence
from flair.embeddings import StackedEmbeddings
from flair.embeddings.transformer import TransformerOnnxEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Model

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings
from flair_peft.errors import AdapterConfigError, SaveError
from flair_peft.export import int8
from tests.regression.make import labels
from tests.support.configs import lora
from tests.support.models import save_random
from tests.support.predictions import labels_of, points_of
from tests.support.round_trip import largest_difference


@pytest.mark.parametrize(
    "name",
    [
        "text-classifier",
        "sequence-tagger-crf",
        "token-classifier",
        "text-regressor",
        "text-pair-classifier-separate",
        "multitask",
    ],
)
def test_exported_model_in_int8_is_smaller_and_says_what_changed(
    name: str, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The cost that is returned is the one that shows, and the file of stock Flair holds the int8 model."""
    _, live = save_random(name, base("bert"), tmp_path / "model")
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")
    points, before, after = points_of(name), points_of(name), points_of(name)
    given = labels_of(points)
    exported.predict(before)
    with caplog.at_level(logging.INFO, logger="flair_peft"):
        cost = flair_peft.quantize_onnx(exported, points)
    assert f"int8: {cost}." in caplog.messages
    assert labels_of(points) == given
    exported.predict(after)
    changed = largest_difference(labels_of(before), labels_of(after))
    tasks = len(getattr(exported, "tasks", [1]))
    assert cost.data_points == tasks * len(points)
    if cost.equal == cost.data_points:
        assert changed == pytest.approx(cost.largest_change, abs=1e-6)
    assert 0 < cost.largest_change < 0.5
    assert cost.bytes[1] < cost.bytes[0]
    assert cost.bytes[1] == sum(path.stat().st_size for path in tmp_path.glob("*-int8.onnx"))
    flair_peft.uninstall()
    exported.save(tmp_path / "model.pt")
    loaded, again = Model.load(tmp_path / "model.pt"), points_of(name)
    loaded.predict(again)
    flair_peft.install()
    assert labels_of(again) == labels_of(after)


def test_quantisation_leaves_logging_as_it_was(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnxruntime gives advice that nobody can follow here, and would set up logging for the whole process."""
    _, live = save_random("text-classifier", base("bert"), tmp_path / "model")
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")
    flair_peft.quantize_onnx(exported, points_of("text-classifier"))
    assert not [message for message in caplog.messages if "pre-processing" in message]
    root = logging.getLogger()
    assert not root.filters
    monkeypatch.setattr(root, "handlers", [])
    exported = flair_peft.export_onnx(live, tmp_path / "again.onnx")
    flair_peft.quantize_onnx(exported, points_of("text-classifier"))
    assert root.handlers == []


def test_quantisation_that_fails_leaves_all_transformers_as_they_were(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also the one that was done already: a model that computes partly in int8 is none that anybody asked for."""
    both = [PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(), layers=layers) for layers in ("-1", "-2")]
    options = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False}
    live = SequenceTagger(StackedEmbeddings(both), tag_dictionary=labels("PER", "LOC"), tag_type="ner", **options)
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")
    embedded = [module for module in exported.modules() if isinstance(module, TransformerOnnxEmbeddings)]
    assert len(embedded) == 2
    points, before, after = (points_of("sequence-tagger") for _ in range(3))
    exported.predict(before)
    files, quantise = [each.onnx_model for each in embedded], embedded[1].quantize_model

    def fail(path: str, **_: Any) -> None:
        quantise(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(embedded[1], "quantize_model", fail)
    with pytest.raises(SaveError, match="No space left on device"):
        flair_peft.quantize_onnx(exported, points)
    assert [each.onnx_model for each in embedded] == files
    exported.predict(after)
    assert labels_of(after) == labels_of(before)
    assert not [*tmp_path.glob("*-inferred*"), *tmp_path.glob("*.tmp")]


def test_cost_counts_evaluations_where_gold_labels_are_named(base: Callable[[str], str], tmp_path: Path) -> None:
    """Flair's own evaluation, before and after."""
    _, live = save_random("text-classifier", base("bert"), tmp_path / "model")
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")
    points = points_of("text-classifier")
    expected = exported.evaluate(points_of("text-classifier"), "sentiment").main_score
    cost = flair_peft.quantize_onnx(exported, points, gold_label_type="sentiment")
    assert cost.scores is not None
    assert cost.scores[0] == expected
    assert cost.scores[1] == exported.evaluate(points_of("text-classifier"), "sentiment").main_score
    assert f"score {expected:.4f} → " in str(cost)
    assert not any(point.get_labels("predicted") for point in points)


def test_model_that_is_no_export_or_no_text_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """Both are needed, and the message says which is missing."""
    _, live = save_random("text-classifier", base("bert"), tmp_path / "model")
    with pytest.raises(AdapterConfigError, match="none of its transformers is an ONNX file"):
        flair_peft.quantize_onnx(live, [Sentence("Berlin")])
    with pytest.raises(AdapterConfigError, match="there are no data points"):
        flair_peft.quantize_onnx(flair_peft.export_onnx(live, tmp_path / "model.onnx"), [])


def test_classes_that_are_called_by_numbers_are_labels(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A label "1" that becomes a "0" is another label, not a score that changes."""
    labels = Dictionary(add_unk=False)
    for label in ("0", "1"):
        labels.add_item(label)
    embeddings = flair_peft.PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    live = TextClassifier(embeddings, label_dictionary=labels, label_type="sentiment").eval()
    exported = flair_peft.export_onnx(live, tmp_path / "model.onnx")

    def turn_around(_: object) -> None:
        for parameter in exported.decoder.parameters():
            parameter.data.neg_()

    monkeypatch.setattr(int8, "_quantize_", turn_around)
    cost = flair_peft.quantize_onnx(exported, [Sentence("good"), Sentence("a bad film")])
    assert (cost.data_points, cost.equal, cost.largest_change) == (2, 0, 0.0)
