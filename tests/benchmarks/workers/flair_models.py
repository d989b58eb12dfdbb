"""What Flair models do alike, with and without an adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from flair.training_utils import store_embeddings

from tests.benchmarks.workers.peer import LABELS, Peer, Texts

TYPE = "sentiment"


class FlairPeer(Peer):
    """Flair's text classifier on any document embeddings."""

    def __init__(self, folder: Any, device: str) -> None:
        super().__init__(folder, device)
        flair.device = torch.device(device)

    def classifier(self, embeddings: Any, number: int) -> TextClassifier:
        """Return a classifier with this head."""
        labels = Dictionary(add_unk=False)
        for label in LABELS:
            labels.add_item(label)
        model = TextClassifier(embeddings, label_type=TYPE, label_dictionary=labels)
        model.decoder.load_state_dict({name: torch.tensor(values) for name, values in self.head(number).items()})
        return model

    def scores(self, model: TextClassifier, texts: Texts) -> torch.Tensor:
        given = self.sentences(texts)
        model.predict(given, mini_batch_size=len(given), return_probabilities_for_all_classes=True)
        return self.read(given)

    def sentences(self, texts: Texts) -> list[Sentence]:
        """Return sentences of these words."""
        return [Sentence(text.split(), use_tokenizer=False) for text in texts]

    def read(self, sentences: Sequence[Sentence]) -> torch.Tensor:
        """Return the predicted scores, (sentences, labels)."""
        found = [{label.value: label.score for label in sentence.get_labels(TYPE)} for sentence in sentences]
        return torch.tensor([[scores[label] for label in LABELS] for scores in found])

    def batch(self, texts: Texts, targets: Sequence[int]) -> list[Sentence]:
        given = self.sentences(texts)
        for sentence, target in zip(given, targets, strict=True):
            sentence.add_label(TYPE, LABELS[target])
        return given

    def loss(self, model: TextClassifier, batch: list[Sentence]) -> torch.Tensor:
        total, count = model.forward_loss(batch)
        return total / count

    def forget(self, batch: list[Sentence]) -> None:
        store_embeddings(batch, "none")

    def modules(self, model: TextClassifier) -> list[torch.nn.Module]:
        return [model]
