"""What models read: words or sentences of their embeddings, and the data points that they predict for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flair.data import Corpus, DataPair, DataPoint, DataTriple, Sentence
from flair.embeddings import StackedEmbeddings
from flair.models import (
    RelationClassifier,
    RelationExtractor,
    SequenceTagger,
    SpanClassifier,
    TextClassifier,
    TextPairClassifier,
    TextPairRegressor,
    TextRegressor,
    TextTripleClassifier,
    TokenClassifier,
)
from flair.nn import Model
from torch.utils.data import Dataset

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, modules_around
from flair_peft.errors import AdapterConfigError, PredictionSetupError

_OF_WORDS = (RelationExtractor, SequenceTagger, SpanClassifier, TokenClassifier)
_OF_PAIRS = (TextPairClassifier, TextPairRegressor, TextTripleClassifier)
_READS: dict[tuple[type[Model], ...], type[DataPoint]] = {
    (SequenceTagger, TextClassifier, TextRegressor): Sentence,
    (TextPairClassifier, TextPairRegressor): DataPair,
    (TextTripleClassifier,): DataTriple,
}
_OF_SENTENCES = (RelationClassifier, TextClassifier, TextRegressor, *_OF_PAIRS)

_OF_TEXTS = "Pass Sentence(text) or a list of sentences; flair_peft.predict_stream takes texts."
_WAYS: dict[type[DataPoint], str] = {
    DataPoint: _OF_TEXTS,
    Sentence: _OF_TEXTS,
    DataPair: "Pass DataPair(Sentence(text), Sentence(other)) or a list of these.",
    DataTriple: "Pass DataTriple(Sentence(text), Sentence(second), Sentence(third)) or a list of these.",
}


def check_embeddings(model: Model) -> None:
    """Return if embeddings with an adapter embed what the model reads: words, or whole sentences.

    Raises:
        AdapterConfigError: they do not, so that the vectors that the model reads are not there.
    """
    for _, part in modules_around(model):
        if not type(part).__module__.startswith("flair."):
            continue  # a class of a user's own may read vectors in a way of its own
        for embeddings in _direct(part):
            if isinstance(part, _OF_WORDS) and not embeddings.token_embedding:
                raise _misread(part, embeddings, "sentences", "words", "PeftTransformerWordEmbeddings")
            if isinstance(part, _OF_SENTENCES) and not embeddings.document_embedding:
                raise _misread(part, embeddings, "words", "sentences", "PeftTransformerDocumentEmbeddings")


def _direct(part: Any) -> Iterator[PeftTransformerEmbeddings]:
    """Yield the embeddings with an adapter whose vectors a model reads as they are."""
    for child in part.children() if isinstance(part, (*_OF_WORDS, *_OF_SENTENCES)) else ():
        inside = child.embeddings if isinstance(child, StackedEmbeddings) else [child]
        yield from (embeddings for embeddings in inside if isinstance(embeddings, PeftTransformerEmbeddings))


def _misread(part: Any, embeddings: Any, given: str, read: str, wanted: str) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot use {type(embeddings).__name__} in a {type(part).__name__}: they embed {given}, and this model reads "
        f"{read}. It would find no vectors there. Make the model with {wanted}."
    )


def check_points(model: Model, given: Any) -> None:
    """Return if a model can predict for what it is given: a data point, or a list of them.

    Raises:
        PredictionSetupError: it is something else, such as a text.
    """
    points = given if isinstance(given, list) else [given]
    kind = next((kind for classes, kind in _READS.items() if type(model) in classes), DataPoint)
    is_data_set = isinstance(given, Dataset) and (kind is DataPoint or isinstance(model, SequenceTagger))
    wrong = next((point for point in points if not isinstance(point, kind) and not is_data_set), points)
    if wrong is not points:
        of_a_corpus = isinstance(wrong, (Corpus, Dataset))
        raise PredictionSetupError(
            f"Cannot predict for {ascii(wrong)[:60]}, a {type(wrong).__name__}: this {type(model).__name__} labels "
            f"data points, each a {kind.__name__}. Flair makes none of what it is given. "
            + ("Pass list(corpus.test), for example." if of_a_corpus else _WAYS[kind])
        )


def check_sizes(**sizes: Any) -> None:
    """Return if these count items or mini-batches.

    Raises:
        PredictionSetupError: one of them does not.
    """
    for name, value in sizes.items():
        if not isinstance(value, int) or value < 1:
            raise PredictionSetupError(
                f"Cannot predict with {name}={value!r}. It counts items or mini-batches. Pass an integer from 1 on."
            )
