"""Models of the zoo on a tiny base, with the embeddings of this package or of Flair."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import TextClassifier
from flair.nn import Model
from peft import PeftConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.predictions import TEXTS
from tests.support.round_trip import Factories
from tests.support.zoo import ZOO, Entry

CLASSIFIER, TAGGER = ZOO["text-classifier"], ZOO["sequence-tagger"]


def make(entry: Entry, base: str, config: PeftConfig | None, *, is_stock: bool = False, **options: Any) -> Model:
    """Return a new model whose embeddings are ours, or Flair's own with the same settings."""
    word, document = (
        (TransformerWordEmbeddings, TransformerDocumentEmbeddings)
        if is_stock
        else (PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings)
    )
    torch.manual_seed(2)
    settings = {**options} if config is None else {"peft_config": copy.deepcopy(config), **options}
    return entry.build(
        lambda **kwargs: word(base, **{**settings, **kwargs}), lambda **kwargs: document(base, **{**settings, **kwargs})
    )


def save_random(
    name: str, base: str, directory: Path, *, config: Any = None, seed: int = 0, **options: Any
) -> tuple[str, Model]:
    """Write a model of the zoo with a random adapter and head, and return where it lies and the live one."""
    torch.manual_seed(seed)
    config = config or lora(target_modules=None)
    factories = Factories(base, config, **options)
    model = ZOO[name].build(factories.words, factories.documents)
    perturb_(model, seed=seed, scale=0.3)
    model.eval()  # TARS models return nothing
    flair_peft.save_pretrained(model, directory)
    return str(directory), model


def train_a_step(model: TextClassifier, label_type: str) -> None:
    """Change every trained parameter by its gradient for some sentences."""
    sentences = [Sentence(text).add_label(label_type, "positive") for text in TEXTS]
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = [parameter.detach().clone() for parameter in parameters]
    model.forward_loss(sentences)[0].backward()
    optimizer.step()
    model.eval()
    assert any(not torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def classifier(base: str, config: PeftConfig | None = None, **options: Any) -> TextClassifier:
    """Return the plain classifier of the zoo with an adapter: LoRA, if no other is given."""
    return make(CLASSIFIER, base, config or lora(), **options)
