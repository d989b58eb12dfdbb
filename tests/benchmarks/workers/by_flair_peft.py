"""This package: Flair's text classifier on embeddings with an adapter, and a shared base for many."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert_fast  # noqa: F401 - imported before a clock starts
from flair.models import TextClassifier

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from tests.benchmarks.workers.flair_models import FlairPeer
from tests.benchmarks.workers.peer import Texts


class ByFlairPeft(FlairPeer):
    """What the README of this package shows."""

    def build(self, number: int) -> TextClassifier:
        embeddings = PeftTransformerDocumentEmbeddings.from_adapter(self.material(number), base_model=self.base)
        return self.classifier(embeddings, number)

    def save(self, model: TextClassifier, path: Path) -> None:
        flair_peft.save_pretrained(model, path)

    def load(self, path: Path, *, prove: bool) -> TextClassifier:
        return flair_peft.from_pretrained(path, verify=prove)

    def open(self) -> SharedBase:
        return SharedBase(self.base)

    def add(self, many: SharedBase, path: Path, *, prove: bool) -> TextClassifier:
        return many.load(path, verify=prove)

    def scores_of(self, many: SharedBase, key: TextClassifier, texts: Texts) -> torch.Tensor:
        return self.scores(key, texts)

    def scores_of_mixed(self, many: SharedBase, parts: Mapping[TextClassifier, Texts]) -> list[torch.Tensor]:
        given = {model: self.sentences(texts) for model, texts in parts.items()}
        count = sum(len(sentences) for sentences in given.values())
        many.predict(given, mini_batch_size=count, return_probabilities_for_all_classes=True)
        return [self.read(sentences) for sentences in given.values()]


PEER = ByFlairPeft
