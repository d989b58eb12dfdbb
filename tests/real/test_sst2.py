"""Real weights on real text: MiniLM on 2,000 sentences of SST-2."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import pytest
import torch
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.models import TextClassifier
from flair.nn import Classifier
from flair.trainers import ModelTrainer
from peft import LoraConfig

from flair_peft import PeftTransformerDocumentEmbeddings
from tests.support.minilm import PACKAGE, find_minilm

TRAINING_SENTENCES = 2_000
REQUIRED_ACCURACY = 0.85

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def minilm() -> str:
    """Return the directory of MiniLM's weights, checked by their hash, or skip where the package is absent."""
    try:
        return find_minilm()
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"the package {PACKAGE} is not installed")


def read_sst2(path: Path, count: int | None = None) -> list[Sentence]:
    lines = path.read_text(encoding="utf-8").splitlines()[:count]
    pairs = (line.split("\t") for line in lines)
    return [Sentence(text.split(" ")).add_label("sentiment", label) for text, label in pairs]


def test_lora_on_sst2_reaches_the_reference_and_predicts_the_same_after_loading(
    minilm: str, shared_data: Path, tmp_path: Path
) -> None:
    """Test accuracy is at least 0.85 (full fine-tuning on the same schedule: 0.858), and a loaded model agrees."""
    torch.manual_seed(1)
    test = read_sst2(shared_data / "sst2" / "test.tsv")
    corpus = Corpus(
        train=FlairDatapointDataset(read_sst2(shared_data / "sst2" / "train.tsv", TRAINING_SENTENCES)),
        test=FlairDatapointDataset(test),
        sample_missing_splits=False,
    )
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    embeddings = PeftTransformerDocumentEmbeddings(minilm, peft_config=config, cls_pooling="mean")
    dictionary = corpus.make_label_dictionary("sentiment", add_unk=False)
    model = TextClassifier(embeddings, label_dictionary=dictionary, label_type="sentiment")
    schedule = {"learning_rate": 1e-3, "mini_batch_size": 16, "max_epochs": 2, "eval_batch_size": 64}
    accuracy = ModelTrainer(model, corpus).fine_tune(tmp_path, **schedule)["test_score"]

    loaded = Classifier.load(tmp_path / "final-model.pt")
    sample = test[:200]
    for predictor, name in ((model, "live"), (loaded, "loaded")):
        predictor.predict(sample, label_name=name, return_probabilities_for_all_classes=True)
    live = [[(label.value, label.score) for label in s.get_labels("live")] for s in sample]
    assert live == [[(label.value, label.score) for label in s.get_labels("loaded")] for s in sample]
    assert accuracy >= REQUIRED_ACCURACY
