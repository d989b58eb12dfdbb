"""Quantising exported models to int8 for a CPU, and measuring what that costs in accuracy."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flair.data import DataPoint, Sentence
from flair.embeddings.transformer import TransformerOnnxEmbeddings
from flair.models import MultitaskModel, TextPairRegressor, TextRegressor
from flair.nn import Model

from flair_peft.errors import AdapterConfigError, FlairPeftError, SaveError
from flair_peft.primitives import host_internals, progress
from flair_peft.storage import atomic

log = logging.getLogger("flair_peft")

_PREDICTED = "flair_peft_predicted"

Labels = dict[tuple[str, str], float]


@dataclass(frozen=True)
class AccuracyCost:
    """How predictions in int8 differ from those in fp32.

    Attributes:
        data_points: that were predicted, once for each task of a multitask model.
        equal: how many of them have the same labels.
        largest_change: of the score of a label that both give.
        scores: main score of Flair's evaluation before and after, where gold labels were named.
        bytes: of the transformers' files before and after.
    """

    data_points: int
    equal: int
    largest_change: float
    scores: tuple[float, float] | None
    bytes: tuple[int, int]

    def __str__(self) -> str:
        scores = "" if self.scores is None else f", score {self.scores[0]:.4f} → {self.scores[1]:.4f}"
        return (
            f"{self.equal} of {self.data_points} data points keep their labels, scores change by up to "
            f"{self.largest_change:.3f}{scores}, files {self.bytes[0] / 1e6:.1f} MB → {self.bytes[1] / 1e6:.1f} MB"
        )


@progress.shown("quantising")
def quantize_onnx(
    model: Model, data_points: Sequence[DataPoint], *, gold_label_type: str | None = None
) -> AccuracyCost:
    """The transformers of an exported model compute in int8, in place; return and log what that changes.

    Weights are rounded once, into files beside those of the export with ``-int8`` in their names; activations are
    rounded anew for each batch. onnxruntime's dynamic quantisation does it, through Flair's ``quantize_model``.

    Args:
        model: what :func:`flair_peft.export_onnx` returned.
        data_points: text like that for which the model is meant, such as Sentences. Labels that they have stay.
        gold_label_type: of labels that they have, to compare Flair's evaluations as well.

    Raises:
        AdapterConfigError: the model is no exported one, or there are no data points.
        SaveError: a file could not be written; the model computes as it did.
    """
    embedded = [module for module in model.modules() if isinstance(module, TransformerOnnxEmbeddings)]
    if not embedded or not data_points:
        reason = "none of its transformers is an ONNX file" if not embedded else "there are no data points"
        raise AdapterConfigError(
            f"Cannot quantise this {type(model).__name__} to int8: {reason}. An exported model is quantised, and what "
            "that costs is measured on text. Pass what export_onnx returned, and some of your sentences."
        )
    before, score = _predict(model, data_points), _evaluate(model, data_points, gold_label_type)
    sizes = sum(Path(embeddings.onnx_model).stat().st_size for embeddings in embedded)
    with host_internals.without_advice_on_quantising():
        _quantize_(embedded)
    after, score_after = _predict(model, data_points), _evaluate(model, data_points, gold_label_type)
    pairs = list(zip(before, after, strict=True))
    cost = AccuracyCost(
        data_points=len(pairs),
        equal=sum(one.keys() == other.keys() for one, other in pairs),
        largest_change=max((abs(one[k] - other[k]) for one, other in pairs for k in one.keys() & other), default=0.0),
        scores=None if score is None or score_after is None else (score, score_after),
        bytes=(sizes, sum(Path(embeddings.onnx_model).stat().st_size for embeddings in embedded)),
    )
    log.info("int8: %s.", cost)
    return cost


def _quantize_(embedded: Sequence[TransformerOnnxEmbeddings]) -> None:
    """All embeddings compute with files in int8 beside their own, or all as they did if one cannot be written."""
    given = [embeddings.onnx_model for embeddings in embedded]
    try:
        for embeddings in embedded:
            _quantize_one_(embeddings)
    except BaseException:
        for embeddings, path in zip(embedded, given, strict=True):
            embeddings.onnx_model = path
            embeddings.create_session()
        raise


def _quantize_one_(embeddings: TransformerOnnxEmbeddings) -> None:
    path = Path(embeddings.onnx_model)
    target = path.with_name(f"{path.stem}-int8{path.suffix}")
    try:
        atomic.write_file(target, lambda file: embeddings.quantize_model(file.name))
    except BaseException as error:
        path.with_name(f"{path.stem}-inferred{path.suffix}").unlink(missing_ok=True)  # which onnxruntime leaves behind
        if isinstance(error, FlairPeftError) or not isinstance(error, Exception):
            raise
        raise SaveError(
            f"Cannot save to '{target}': onnxruntime fails with {type(error).__name__}: {str(error)[:200]}. It "
            "does not say why; a full disk is a usual reason. Make room there, or go on with the model, which computes "
            "as it did."
        ) from error
    embeddings.onnx_model = str(target)


def _predict(model: Any, data_points: Sequence[DataPoint]) -> list[Labels]:
    """Return (place, label) → score for each data point; regressors have one label, and its score is the number."""
    if isinstance(model, MultitaskModel):
        return [labels for task in model.tasks.values() for labels in _predict(task, data_points)]
    points = list(data_points)
    model.predict(points, label_name=_PREDICTED)
    # Classes may be called "0" and "1": what a label says does not tell whether it is a number.
    is_regressor = isinstance(model, (TextRegressor, TextPairRegressor))
    found = [_numbers(point) if is_regressor else _labels(point) for point in points]
    for point in points:
        _forget(point, _PREDICTED)
    return found


def _labels(data_point: DataPoint) -> Labels:
    return {(label.unlabeled_identifier, label.value): label.score for label in data_point.get_labels(_PREDICTED)}


def _numbers(data_point: DataPoint) -> Labels:
    return {(label.unlabeled_identifier, ""): float(label.value) for label in data_point.get_labels(_PREDICTED)}


def _evaluate(model: Model, data_points: Sequence[DataPoint], gold_label_type: str | None) -> float | None:
    if gold_label_type is None:
        return None
    points = list(data_points)
    score = float(model.evaluate(points, gold_label_type, mini_batch_size=32).main_score)
    for point in points:
        _forget(point, "predicted")
    return score


def _forget(data_point: DataPoint, label_type: str) -> None:
    for part in (data_point, *_parts(data_point)):
        part.remove_labels(label_type)


def _parts(data_point: DataPoint) -> Iterator[Sentence]:
    yield from (part for part in vars(data_point).values() if isinstance(part, Sentence))
