"""Items of a stream that cannot be predicted: a batch that fails is halved until they alone are left out."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flair.data import Sentence

from flair_peft.errors import PredictionError
from flair_peft.serving.sentence_context import is_unicode

log = logging.getLogger("flair_peft")


@dataclass
class Item:
    """One data point of a stream, its number in it, and why it could not be predicted, if so."""

    index: int
    point: Any
    error: PredictionError | None = None


def attempt(predict: Callable[[list[Any]], object], items: Sequence[Item]) -> None:
    """Label the points of ``items``; one that cannot be predicted gets an error, the others their labels.

    What fails together is tried in halves: a mini-batch that is too large for the memory there is comes out as well.
    """
    undo = [_labels_kept(item.point) for item in items]
    try:
        predict([item.point for item in items])
        return
    except Exception as cause:
        traceback.clear_frames(cause.__traceback__)  # they hold the tensors of the batch
        for give_back in undo:
            give_back()
        if len(items) == 1:
            items[0].error = prediction_error(items[0].index, items[0].point, cause)
            return
        log.info("%d items cannot be predicted at once (%s); trying their halves.", len(items), _one_line(cause))
    middle = len(items) // 2
    attempt(predict, items[:middle])
    attempt(predict, items[middle:])


def prediction_error(index: int, given: Any, cause: Exception) -> PredictionError:
    """Return the error that says which item of the stream could not be predicted, and why."""
    text = str(given)
    shown = ascii(text if len(text) <= 80 else f"{text[:80]}…")
    advice = "Repair it, or leave it out"
    if not is_unicode(text):
        advice = "Its text holds half of a surrogate pair: decode the source with errors='replace'"
    error = PredictionError(
        f"Cannot predict item {index} of the stream, {shown}: {_one_line(cause)}. The items around it are predicted "
        f"without it. {advice}.",
        index,
    )
    error.__cause__ = cause
    return error


def _one_line(cause: Exception) -> str:
    text = " ".join(str(cause).split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return f"{type(cause).__name__}: {text[:200].rstrip('.')}" if text else type(cause).__name__


def forget_frames_(error: BaseException | None) -> None:
    """Leave out of an error and its causes what keeps the whole window in memory."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _labels_kept(point: Any) -> Callable[[], None]:
    """Return what gives ``point`` and its parts the labels back that they have now."""
    tokens = point.tokens if isinstance(point, Sentence) else []
    spans = dict(point._known_spans) if isinstance(point, Sentence) else {}
    parts = [point, *spans.values(), *(token for token in tokens if token.annotation_layers)]
    layers = [{name: list(labels) for name, labels in part.annotation_layers.items()} for part in parts]

    def give_back() -> None:
        for token in tokens:
            token.annotation_layers = {}
        for part, kept in zip(parts, layers, strict=True):
            part.annotation_layers = kept
        if isinstance(point, Sentence):
            point._known_spans = spans

    return give_back
