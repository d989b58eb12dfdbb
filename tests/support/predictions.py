"""What models are asked, and what they have written to it."""

from __future__ import annotations

from typing import Any

from flair.data import DataPoint

from tests.support.zoo import ZOO, copy_point

TEXTS = ["Berlin is large .", "I love this wonderful movie , it is great !", "George Washington went to Washington ."]


def points_of(name: str) -> list[Any]:
    return [copy_point(point) for point in ZOO[name].corpus().test]


def labels_of(points: list[DataPoint]) -> list[Any]:
    """Return what is written to each data point, of all its label types; numbers as such."""
    return [
        sorted((layer, label.unlabeled_identifier, _number(label.value), float(label.score))
               for layer in point.annotation_layers for label in point.get_labels(layer))
        for point in points
    ]  # fmt: skip


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value
