"""What a model's own ``predict`` says, in the form that answers have: the oracle for what is served."""

from __future__ import annotations

from typing import Any

from flair.data import DataPair, DataPoint, DataTriple, Relation, Sentence, Span, Token
from flair.nn import Model

from tests.support.round_trip import largest_difference

ROUNDING = 2e-5


def point_of(given: Any, entity_types: tuple[str, ...] = ()) -> DataPoint:
    """Return a data point of what a request sends; texts have no characters that Flair leaves out."""
    if isinstance(given, str):
        return Sentence(given)
    if "tokens" in given:
        return Sentence(given["tokens"])
    texts = given.get("texts") or [given[name] for name in ("text", "text_pair") if name in given]
    sentences = [Sentence(text) for text in texts]
    for entity in given.get("entities", ()):
        first = next(index for index, token in enumerate(sentences[0]) if token.start_position == entity["start"])
        last = next(index for index, token in enumerate(sentences[0]) if token.end_position == entity["end"])
        for label_type in entity_types:
            sentences[0][first : last + 1].add_label(label_type, entity["entity_group"])
    return {1: lambda s: s, 2: DataPair, 3: DataTriple}[len(sentences)](*sentences)


def direct(
    model: Model, given: list[Any], kind: str, *, label_type: str, entity_types: tuple[str, ...] = (), **options: Any
) -> list[Any]:
    """Return the answers to a list of inputs: their labels, with positions in the text that is joined by Flair."""
    points = [point_of(each, entity_types) for each in given]
    model.predict(points, **options)
    return [_answer(point, kind, label_type, entity_types) for point in points]


def _answer(point: DataPoint, kind: str, label_type: str, entity_types: tuple[str, ...]) -> Any:
    labels = point.get_labels(label_type)
    if kind == "number":
        return [float(labels[0].value)]
    if kind == "labels":
        return sorted(([label.value, float(label.score)] for label in labels), key=lambda each: -each[1])
    if kind == "relations":
        found = [label for label in labels if isinstance(label.data_point, Relation)]
        ends = [(label.data_point.first, label.data_point.second) for label in found]
        return sorted(
            [label.value, float(label.score), *_place(first), *_place(second)]
            for label, (first, second) in zip(found, ends, strict=True)
        )
    part = Token if kind == "tokens" else Span
    return sorted(
        [*_place(label.data_point), label.value, float(label.score)]
        for label in labels
        if isinstance(label.data_point, part)
    )


def _place(part: Any) -> tuple[int, int]:
    return part.start_position, part.end_position


def plain(answer: Any, kind: str) -> Any:
    """Return an answer of the server in the oracle's form."""
    if kind == "number":
        return [answer["value"]]
    if kind == "labels":
        return [[each["label"], each["score"]] for each in answer]
    if kind == "relations":
        return sorted(
            [each["label"], each["score"]] + [each[end][side] for end in ("head", "tail") for side in ("start", "end")]
            for each in answer
        )
    return sorted([each["start"], each["end"], each["entity_group"], each["score"]] for each in answer)


def assert_same(answers: list[Any], expected: list[Any], kind: str) -> None:
    """Return if answers are the expected ones up to the rounding of scores."""
    assert len(answers) == len(expected)
    found = [plain(answer, kind) for answer in answers]
    assert largest_difference(expected, found) < ROUNDING, (expected, found)
