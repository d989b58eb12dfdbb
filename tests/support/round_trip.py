"""Train, save, load and predict: the journey that most tests make, and how its two ends are compared."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from flair.data import Corpus
from flair.nn import Model
from peft import PeftConfig

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from tests.support.methods import perturb_
from tests.support.zoo import ZOO, Entry

# A head that is cast to bf16 after loading rounds its scores to 8 bits; a head that stays in fp32 changes nothing.
SCORE_TOLERANCE = {torch.float32: 0.0, torch.float16: 4e-3, torch.bfloat16: 3e-2}

# Of scores that come of the same sums in another order.
ROUNDING = 1e-4


class Factories:
    """Makes embeddings with an adapter that does something, and remembers them."""

    def __init__(self, base: str, peft_config: PeftConfig, **options: Any) -> None:
        self.base, self.peft_config, self.options = base, peft_config, options
        self.made: list[PeftTransformerEmbeddings] = []

    def words(self, **kwargs: Any) -> PeftTransformerWordEmbeddings:
        return self._remember(PeftTransformerWordEmbeddings, kwargs)

    def documents(self, **kwargs: Any) -> PeftTransformerDocumentEmbeddings:
        return self._remember(PeftTransformerDocumentEmbeddings, kwargs)

    def _remember(self, embeddings_class: type, kwargs: dict[str, Any]) -> Any:
        embeddings = embeddings_class(self.base, peft_config=self.peft_config, **{**self.options, **kwargs})
        perturb_(embeddings.model, seed=len(self.made))
        self.made.append(embeddings)
        return embeddings


def train_and_save(entry_name: str, factories: Factories, directory: Path) -> tuple[Model, Corpus, Entry]:
    """Return the live model after an epoch of training, saved as ``directory/final-model.pt``."""
    entry = ZOO[entry_name]
    torch.manual_seed(1)
    model, corpus = entry.build(factories.words, factories.documents), entry.corpus()
    entry.train(model, corpus, directory, learning_rate=1e-3)
    return model, corpus, entry


def load(directory: Path) -> Model:
    """Return what Flair loads when asked for any model; no part is in training mode, which Flair's predict keeps."""
    loaded = Model.load(directory / "final-model.pt")
    assert not [name for name, module in loaded.named_modules() if module.training]
    return loaded


def largest_difference(before: Any, after: Any) -> float:
    """Return the largest difference between two numbers that stand in the same place of two predictions.

    Anything else that differs, a label, a length, a type, gives infinity.
    """
    if isinstance(before, float) and isinstance(after, float):
        return abs(before - after) if math.isfinite(before) and math.isfinite(after) else math.inf
    if isinstance(before, (list, tuple)) and type(before) is type(after) and len(before) == len(after):
        return max((largest_difference(*pair) for pair in zip(before, after, strict=True)), default=0.0)
    return 0.0 if before == after else math.inf
