"""The model card of a checkpoint: what people read in it, and what the Hub does."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from flair.data import Dictionary
from flair.models import TextClassifier, TextRegressor
from flair.nn import Model
from flair.trainers import ModelTrainer
from huggingface_hub import ModelCard
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, compat
from flair_peft.errors import spell_out
from flair_peft.models import card
from tests.support.methods import perturb_
from tests.support.round_trip import Factories
from tests.support.zoo import ZOO

Base = Callable[[str], str]

CLASSIFIER = ZOO["text-classifier"]


def lora() -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["query", "value", "dense"])


def classifier(base: str) -> TextClassifier:
    factories = Factories(base, lora())
    return CLASSIFIER.build(factories.words, factories.documents)


def predict(model: Model) -> Any:
    return CLASSIFIER.predict(model, CLASSIFIER.corpus())


def test_card_says_what_the_model_predicts_and_stands_on(base: Base, tmp_path: Path) -> None:
    """Metadata for the Hub, labels, method, base and versions are in README.md; it is rewritten while nobody edits."""
    live = classifier(base("bert"))
    flair_peft.save_pretrained(live, tmp_path)
    text = (tmp_path / "README.md").read_text()
    metadata, _, body = text.removeprefix("---\n").partition("---\n")
    assert "library_name: flair" in metadata
    assert all(f"- {tag}" in metadata for tag in ("flair", "flair_peft", "peft"))
    for label in live.label_dictionary.get_items():
        assert f"`{label}`" in body
    assert "`sentiment`" in body
    assert "LORA (r=4)" in body
    assert f"`{base('bert')}`" in body
    assert f"| peft version | {compat.versions()['peft']} |" in body
    assert "TextClassifier.load(" in body

    live.model_card = {"scores": {"epoch": 3, "dev score": 0.87654}}
    flair_peft.save_pretrained(live, tmp_path)
    assert "| dev score | 0.8765 |" in (tmp_path / "README.md").read_text()


def test_card_that_was_edited_stays(base: Base, tmp_path: Path) -> None:
    """Saving again leaves the words of a person, and the load does not mind them."""
    live = classifier(base("bert"))
    flair_peft.save_pretrained(live, tmp_path)
    (tmp_path / "README.md").write_text("# mine")
    perturb_(live.embeddings.model, seed=8)
    flair_peft.save_pretrained(live, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine"
    assert predict(flair_peft.from_pretrained(tmp_path)) == predict(live)


HOSTILE_TEXTS = (
    *(
        "a|b",
        "`c`",
        "d\n---\ne",
        "<script>alert(1)</script>",
        "# heading",
        "![x](http://x.y/z.png)",
        "[x](javascript:y)",
    ),
    *("\x1b[31mred", "a\rb", "\u202eturned", "a\u2028b", "```\ncode", "- item", "www.x.y", "", "\x00"),
)


def test_card_of_hostile_texts_has_the_rows_that_it_has(base: Base, tmp_path: Path) -> None:
    """Labels, types, names of scores and their values are literals in the card: no markup, no control characters."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    labels = Dictionary(add_unk=False)
    for label in HOSTILE_TEXTS:
        labels.add_item(label)
    live = TextClassifier(embeddings, label_type="x|y\n", label_dictionary=labels)
    flair_peft.save_pretrained(live, tmp_path / "usual")
    live.model_card = {"scores": {**{text: text for text in HOSTILE_TEXTS}, "f1": 0.5}}
    flair_peft.save_pretrained(live, tmp_path / "hostile")
    usual, text = ((tmp_path / name / "README.md").read_text() for name in ("usual", "hostile"))
    assert [number for number, line in enumerate(text.splitlines()) if line == "---"] == [0, 6]
    assert all(character.isprintable() or character == "\n" for character in text)
    scores = [line for line in text.split("## Scores in training")[1].split("##")[0].splitlines() if line]
    assert len(scores) == 2 + len(HOSTILE_TEXTS) + 1
    assert all(len(re.split(r"(?<!\\)\|", line)) == 4 for line in scores)
    assert headings_of(text) - headings_of(usual) == {"Scores in training"}
    bare = re.sub("`[^`]*`", "", text.replace("```python", "").partition("## Labels")[2])
    assert not re.search(r"<|!\[|\]\(|www", bare)
    assert flair_peft.from_pretrained(tmp_path / "hostile").label_dictionary.get_items() == labels.get_items()


def headings_of(text: str) -> set[str]:
    return {line.lstrip("# ") for line in text.splitlines() if line.startswith("#")}


@pytest.mark.parametrize("name", ["a\nlicense: mit", "x: y", "- a", "'quoted", "\x1b[31mx", "---"])
def test_card_names_its_base_as_a_value(name: str, base: Base, tmp_path: Path) -> None:
    """The metadata are YAML that gives the name back, and nothing beside it."""
    live = classifier(base("bert"))
    live.embeddings.base_model_name = name
    live.embeddings.base_source.record = dataclasses.replace(live.embeddings.base_source.record, revision="0" * 40)
    _, metadata, _ = card.write_card(live, [live.embeddings], size=1).split("---\n", 2)
    assert yaml.safe_load(metadata) == {
        "library_name": "flair",
        "base_model": spell_out(name),
        "tags": ["flair", "flair_peft", "peft"],
    }


@pytest.mark.parametrize("suffix", ["", ".pt"])
def test_card_gives_the_hub_the_scores_that_the_training_recorded(suffix: str, base: Base, tmp_path: Path) -> None:
    """As huggingface_hub reads them: task, split, metric and value; a file on the way loses nothing of it."""
    live, corpus = classifier(base("bert")), CLASSIFIER.corpus()
    result = ModelTrainer(live, corpus).fine_tune(tmp_path / "training", max_epochs=1, save_final_model=False)
    (flair_peft.save_pretrained if not suffix else type(live).save)(live, tmp_path / f"model{suffix}")
    flair_peft.save_pretrained(TextClassifier.load(tmp_path / f"model{suffix}"), tmp_path / "again")
    data = ModelCard.load(tmp_path / "again" / "README.md").data
    recorded = live.model_card["scores"]
    assert data.model_name == "TextClassifier"
    assert {(found.dataset_split, found.metric_value) for found in data.eval_results} == {
        ("dev", round(recorded["dev score"], 4)),
        ("test", round(float(result["test_score"]), 4)),
    }
    for found in data.eval_results:
        assert (found.task_type, found.metric_type) == ("text-classification", "f1")
        assert found.metric_name == "f1-score (micro avg)"


@pytest.mark.parametrize(
    "recorded",
    [
        None,
        {"scores": {"dev score": 0.5}},
        {"scores": {"dev score": 0.5}, "training_parameters": {"main_evaluation_metric": ["other", "f1-score"]}},
        {"scores": {"dev score": 0.5}, "training_parameters": {"main_evaluation_metric": [{}, []]}},
        {"scores": {"dev score": "0.5"}, "training_parameters": {"main_evaluation_metric": ("macro avg", "recall")}},
        {"scores": {"dev score": math.nan}, "training_parameters": {"main_evaluation_metric": ("macro avg", "recall")}},
        {"scores": {"train loss": 0.5}, "training_parameters": {"main_evaluation_metric": ("macro avg", "recall")}},
        {"scores": [0.5], "training_parameters": "none"},
    ],
)
def test_card_invents_no_scores(recorded: dict[str, Any] | None, base: Base) -> None:
    """What a score measures has to be on record as well, or the Hub gets none."""
    live = classifier(base("bert"))
    live.model_card = recorded
    assert ModelCard(card.write_card(live, [live.embeddings], size=1)).data.eval_results is None


def test_card_gives_no_scores_of_models_that_flair_measures_otherwise(base: Base) -> None:
    """Flair scores regressors by a correlation, whatever metric its trainer records."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    parameters = {"main_evaluation_metric": ("micro avg", "f1-score")}
    found = []
    for model in (TextRegressor(embeddings, label_name="sentiment"), classifier(base("bert"))):
        model.model_card = {"scores": {"test score": 0.5}, "training_parameters": parameters}
        found.append(ModelCard(card.write_card(model, [embeddings], size=1)).data.eval_results)
    assert found[0] is None
    assert [result.metric_value for result in found[1]] == [0.5]


def test_card_is_the_same_for_the_same_model(base: Base) -> None:
    """The manifest pins its hash, so a second writing of the same gives the same bytes."""
    live = classifier(base("bert"))
    live.model_card = {
        "scores": {"test score": 0.123456},
        "training_parameters": {"main_evaluation_metric": ("micro avg", "f1-score")},
    }
    written = {card.write_card(live, [live.embeddings], size=1) for _ in range(3)}
    assert len(written) == 1
    assert str(ModelCard(*written)) in written
