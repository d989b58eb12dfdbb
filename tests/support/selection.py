"""Which cases run by default; the others bear the mark of the matrix."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest

ONE_OF_A_KIND = frozenset(
    {
        "text-classifier",
        "text-classifier-prototypes",
        "sequence-tagger",
        "sequence-tagger-rnn-crf",
        "sequence-tagger-stacked",
        "token-classifier-spans",
        "relation-classifier",
        "relation-extractor",
        "text-pair-regressor",
        "text-regressor",
        "tars-classifier",
        "tars-tagger",
        "prefixed-sequence-tagger",
        "lemmatizer",
        "multitask",
        "multitask-word-and-document",
    }
)
"""Models of the zoo that differ in how they read, decode or hold their parts."""

OF_THEIR_OWN_KIND = frozenset(
    {"bert", "bert-slow", "deberta-v2", "modernbert", "xlnet", "t5", "layoutlmv3", "gpt2", "llama"}
)
"""Architectures that differ in how they tokenize, pad, count positions, mask, or name and build their layers."""


def few(values: Iterable[Any], always: Collection[Any]) -> list[Any]:
    """Return the values as parameters: those of ``always`` as they are, the others for the matrix."""
    values = list(values)
    assert all(value in values for value in always), "a value to run always is none of them"
    return [value if value in always else pytest.param(value, marks=pytest.mark.matrix) for value in values]
