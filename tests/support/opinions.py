"""A classifier of opinions on films, which learns its task in two epochs, and how it is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.models import TextClassifier
from flair.trainers import ModelTrainer

from flair_peft import PeftTransformerDocumentEmbeddings
from tests.support.configs import lora

_WORDS = {"positive": ["good", "great", "wonderful", "love"], "negative": ["bad", "terrible", "hated", "awful"]}
_FRAMES = ["this movie is {} !", "I think the film was {} .", "{} , that is what it is", "so {} that she sold the book"]


def opinions() -> list[Sentence]:
    sentences = []
    for label, words in _WORDS.items():
        for frame in _FRAMES:
            for word in words:
                sentences.append(Sentence(frame.format(word)).add_label("opinion", label))
    return sentences


def opinion_corpus() -> Corpus:
    parts = [FlairDatapointDataset(opinions()) for _ in range(3)]
    return Corpus(train=parts[0], dev=parts[1], test=parts[2], name="opinions")


def classifier(base: str, **options: Any) -> TextClassifier:
    torch.manual_seed(1)
    embeddings = PeftTransformerDocumentEmbeddings(base, **{"peft_config": lora(), **options})
    dictionary = opinion_corpus().make_label_dictionary("opinion", add_unk=False)
    return TextClassifier(embeddings, label_dictionary=dictionary, label_type="opinion")


def train(model: TextClassifier, directory: Path, **options: Any) -> dict[str, Any]:
    settings = {"learning_rate": 4e-3, "max_epochs": 2, "mini_batch_size": 8, **options}
    return ModelTrainer(model, opinion_corpus()).fine_tune(directory, **settings)
