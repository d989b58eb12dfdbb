"""Vectors that are selected by their numbers are, bit by bit, those that Flair's pooling copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from flair.data import Sentence

from flair_peft import PeftTransformerEmbeddings
from flair_peft.embeddings import flair_pooling
from tests.support.configs import lora

TEXTS = ("I love it", "Berlin and Paris are large cities in Europe .", "Who wrote the book ?")


@pytest.mark.parametrize("length", [1, 4], ids=["short", "in windows"])
@pytest.mark.parametrize("layers", [{}, {"layers": "all"}, {"layers": "0,-1", "layer_mean": False}], ids=str)
@pytest.mark.parametrize("pooling", ["first", "last", "first_last"])
def test_selection_gives_the_bits_and_gradients_of_flairs_pooling(
    pooling: str, layers: dict[str, Any], length: int, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For words and sentences at once, in windows too, and for words of which no subtoken is left."""
    settings = {"allow_long_sentences": True, "subtoken_pooling": pooling, **layers}
    embeddings = PeftTransformerEmbeddings(base("bert"), peft_config=lora(), **settings)
    sentences = [Sentence(text) for text in (*TEXTS, "\u200b is " + " ".join([TEXTS[1]] * length))]
    tensors = embeddings.prepare_tensors(sentences)
    found = []
    for only_selects in (flair_pooling._only_selects, lambda _: False):
        monkeypatch.setattr(flair_pooling, "_only_selects", only_selects)
        embeddings.zero_grad()
        pooled = embeddings(**tensors)
        sum(vectors.square().sum() for vectors in pooled.values()).backward()
        found.append((pooled, [p.grad for p in embeddings.parameters() if p.grad is not None]))
    (selected, gradients), (copied, expected) = found
    assert selected.keys() == copied.keys() == {"document_embeddings", "token_embeddings"}
    assert all(torch.equal(selected[name], copied[name]) for name in copied)
    assert gradients
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
