"""Which cases run by default; the others bear the mark of the matrix."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import pytest

ONE_OF_A_KIND = frozenset(
    {
        "text-classifier",
        "text-classifier-multi-label",
        "text-classifier-prototypes",
        "text-classifier-rnn",
        "sequence-tagger",
        "sequence-tagger-rnn-crf",
        "sequence-tagger-stacked",
        "token-classifier-spans",
        "relation-extractor",
        "text-pair-classifier",
        "text-regressor",
        "tars-classifier",
        "lemmatizer",
        "multitask",
        "multitask-word-and-document",
    }
)
"""Models of the zoo that differ in how they read, decode or hold their parts."""


def few(values: Iterable[Any], always: Container[Any]) -> list[Any]:
    """Return the values as parameters: those of ``always`` as they are, the others for the matrix."""
    return [value if value in always else pytest.param(value, marks=pytest.mark.matrix) for value in values]
