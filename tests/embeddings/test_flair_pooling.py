"""Vectors that are selected by their numbers are, bit by bit, those that Flair's pooling copies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerEmbeddings
from flair_peft.embeddings import flair_pooling
from flair_peft.errors import AdapterConfigError
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, make

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


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_sentence_beside_one_of_several_windows_has_the_vector_that_it_has_alone(
    pooling: str, base: Callable[[str], str]
) -> None:
    """Flair 0.15.1 hands its windows to the sentences behind it; in training, too."""
    settings = {"allow_long_sentences": True, "cls_pooling": pooling, "peft_config": lora(init_lora_weights=False)}
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), **settings).eval()
    texts = [TEXTS[0], " ".join([TEXTS[1]] * 30), *TEXTS[1:]]

    def embed(given: list[str]) -> list[torch.Tensor]:
        embeddings.embed(sentences := [Sentence(text) for text in given])
        return [sentence.embedding.detach() for sentence in sentences]

    alone = [embed([text])[0] for text in texts]
    for found, expected in zip(embed(texts), alone, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(alone[1], alone[2], atol=1e-3)


def test_flair_still_takes_windows_for_the_sentences_behind_them(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it does not, nothing has to be said of a merged model, and nothing to be refused."""
    stock = TransformerDocumentEmbeddings(base("bert"), allow_long_sentences=True)
    long, short = " ".join([TEXTS[1]] * 30), TEXTS[0]
    stock.embed(sentences := [Sentence(long), Sentence(short)])
    stock.embed(alone := Sentence(short))
    assert not torch.allclose(sentences[1].embedding, alone.embedding, atol=1e-3)
    model = make(CLASSIFIER, base("bert"), lora(), allow_long_sentences=True)
    flair_peft.merge(model)
    assert "the merged '" in caplog.text
    with pytest.raises(AdapterConfigError, match="mixes the windows of several texts up"):
        flair_peft.export_onnx(model, tmp_path / "model.onnx")
