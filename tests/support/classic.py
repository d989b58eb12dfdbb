"""Small models of Flair with embeddings of its own."""

from __future__ import annotations

from typing import Any

from flair.data import Dictionary
from flair.embeddings import FlairEmbeddings
from flair.models import LanguageModel, SequenceTagger

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?"


def dictionary(*items: str, add_unk: bool = False, span_labels: bool = False) -> Dictionary:
    made = Dictionary(add_unk=add_unk)
    made.span_labels = span_labels
    for item in items:
        made.add_item(item)
    return made


def characters(recurrent_type: str = "LSTM", **options: Any) -> FlairEmbeddings:
    made = LanguageModel(
        dictionary(*LETTERS, add_unk=True),
        True,
        hidden_size=16,
        nlayers=1,
        embedding_size=8,
        recurrent_type=recurrent_type,
    )
    return FlairEmbeddings(made, name="characters", **options)


def tagger(embeddings: Any, **options: Any) -> SequenceTagger:
    heads = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False, **options}
    return SequenceTagger(embeddings, dictionary("O", "S-PER", "S-LOC"), "ner", **heads)
