"""Stock Flair: whole models, all of which is trained and saved. No adapter is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert_fast  # noqa: F401 - imported before a clock starts
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier

from tests.benchmarks.workers.flair_models import FlairPeer
from tests.benchmarks.workers.peer import Texts


class ByFlair(FlairPeer):
    """What Flair's tutorials show."""

    def build(self, number: int) -> TextClassifier:
        return self.classifier(TransformerDocumentEmbeddings(self.base, fine_tune=True), number)

    def save(self, model: TextClassifier, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        model.save(path / "model.pt")

    def load(self, path: Path, *, prove: bool) -> TextClassifier:
        return TextClassifier.load(path / "model.pt")

    def open(self) -> None:
        return None

    def add(self, many: Any, path: Path, *, prove: bool) -> TextClassifier:
        return self.load(path, prove=prove)

    def scores_of(self, many: Any, key: TextClassifier, texts: Texts) -> torch.Tensor:
        return self.scores(key, texts)


PEER = ByFlair
