"""What a request asks of models that go into one call, and how parts of it are predicted and answered."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from flair.data import DataPair, DataPoint, DataTriple, Sentence

from flair_peft.errors import RequestError
from flair_peft.serving.http import requests, served_models
from flair_peft.serving.http.answers import answer_of
from flair_peft.serving.http.requests import Item
from flair_peft.serving.http.served_models import ServedModel

log = logging.getLogger("flair_peft")

Points = list[list[DataPoint]]
"""For each model of a work its data points; models that may read the same ones have the same list."""


@dataclass(eq=False)
class Work:
    """What one request asks of models that go into one call.

    Attributes:
        models: in the order in which they are asked for.
        items: as they were sent.
        options: of ``predict``.
        most_labels: in an answer.
        has_adapter: False: the models compute without theirs.
        answers: for each model its answers, one for each item that is done.
        future: gets the answers.
    """

    models: Sequence[ServedModel]
    items: Sequence[Item]
    options: Mapping[str, Any]
    most_labels: int | None = None
    has_adapter: bool = True
    answers: list[list[Any]] = field(default_factory=list)
    future: concurrent.futures.Future[list[list[Any]]] = field(default_factory=concurrent.futures.Future)

    def __post_init__(self) -> None:
        self.points = self.new_points()
        self.answers = [[] for _ in self.models]

    @property
    def group(self) -> tuple[Any, ...]:
        """What works have in common that go into one call."""
        first = self.models[0]
        alone = id(self) if first.form.is_alone else None
        is_mixed = first.shared is not None and self.has_adapter and alone is None
        return id(first.shared) if is_mixed else id(first), tuple(self.options.items()), self.has_adapter, alone

    @property
    def done(self) -> int:
        """How many items are answered."""
        return len(self.answers[0])

    @property
    def left(self) -> int:
        """How many sentences are not predicted yet, counted for each model."""
        return (len(self.items) - self.done) * len(self.models)

    def new_points(self) -> Points:
        """Return data points that nobody has predicted."""
        shared: list[tuple[list[DataPoint], set[str]]] = []
        found: Points = []
        for model in self.models:
            # Models that only read words, and write labels of other types, may read the same sentences: where their
            # adapters are on upper layers alone they share what lies below.
            label_type, is_reader = model.form.label_type, model.form.reads_words_only
            fit = next((entry for entry in shared if is_reader and label_type not in entry[1]), None)
            points, written = fit or (requests.points_of(self.items, model.form), set())
            if fit is None and is_reader:
                shared.append((points, written))
            written.add(label_type)
            found.append(points)
        return found


class Part(NamedTuple):
    """Items of a work, from ``start`` to before ``stop``."""

    work: Work
    start: int
    stop: int


def predict_together(parts: Sequence[Part], batch: int) -> None:
    """Have the models write what they predict to the data points of the parts."""
    points: dict[ServedModel, list[DataPoint]] = {}
    for work, start, stop in parts:
        for model, its_points in zip(work.models, work.points, strict=True):
            points.setdefault(model, []).extend(its_points[start:stop])
    first = parts[0].work
    options = {"mini_batch_size": batch, **first.options}
    shared = first.models[0].shared
    if shared is not None and first.has_adapter and len(points) > 1:
        shared.predict({model.model: its_points for model, its_points in points.items()}, **options)
        return
    for model, its_points in points.items():
        with contextlib.nullcontext() if first.has_adapter else model.without_adapter():
            model.model.predict(its_points, **options)


def answer(part: Part) -> None:
    """Add the answers of a part to its work, those that are not there yet, and all or none of them."""
    work, start, stop = part
    if work.done >= stop:
        return
    found = [
        [
            answer_of(point, item, model.form, most_labels=work.most_labels)
            for point, item in zip(points[start:stop], work.items[start:stop], strict=True)
        ]
        for model, points in zip(work.models, work.points, strict=True)
    ]
    for answers, new in zip(work.answers, found, strict=True):
        answers.extend(new)


def words_of(point: DataPoint) -> int:
    """Return how many words a data point has."""
    if isinstance(point, DataPair):
        return len(point.first) + len(point.second)
    if isinstance(point, DataTriple):
        return len(point.first) + len(point.second) + len(point.third)
    return len(point) if isinstance(point, Sentence) else 1


def explain(work: Work, cause: Exception) -> RequestError:
    """Return the error for a request that failed alone: whose fault it is shows in a plain text."""
    names = ", ".join(f"'{model.name}'" for model in work.models)
    # Neither its message nor its source lines: they may quote the text.
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(cause.__traceback__)[-3:]]
    log.warning("A request to %s failed with a %s at %s.", names, type(cause).__name__, ", ".join(places))
    try:
        for model in work.models:
            served_models.prove(model)
    except Exception:  # then it is the model, whatever it is
        return failure(work, cause)
    return RequestError(
        f"Cannot predict with {names} for this request: {type(cause).__name__}. A plain text has an answer, so that "
        "something in this one cannot be read. Leave out unusual characters, or send its parts one by one.",
        code="unreadable_text",
    )


def failure(work: Work, cause: Exception) -> RequestError:
    """Return the error for what is nobody's fault who asks."""
    names = ", ".join(f"'{model.name}'" for model in work.models)
    return RequestError(
        f"Cannot predict with {names}: {type(cause).__name__}. It is not the text: a plain one fails as well. The "
        "server's log says where; tell whoever runs it.",
        status=500,
        code="prediction_failed",
    )
