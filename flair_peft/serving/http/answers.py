"""Answers: what Flair wrote to a data point, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from flair.data import DataPoint, Label, Relation, Span, Token

from flair_peft.serving.http.model_forms import ModelForm
from flair_peft.serving.http.requests import Item


def answer_of(point: DataPoint, item: Item, form: ModelForm, *, most_labels: int | None = None) -> Any:
    """Return what a model says of one item, in the form of its kind."""
    if form.kind == "tasks":
        return {name: answer_of(point, item, task, most_labels=most_labels) for name, task in form.tasks.items()}
    labels = point.get_labels(form.label_type)
    if form.kind == "labels":
        best_first = sorted(labels, key=lambda label: label.score, reverse=True)
        return [{"label": label.value, "score": _number(label.score)} for label in best_first[:most_labels]]
    if form.kind == "number":
        return {"value": _number(labels[0].value) if labels else None}
    if form.kind == "relations":
        relations = [_relation(label, item, form) for label in labels if isinstance(label.data_point, Relation)]
        return sorted(relations, key=lambda relation: (relation["head"]["start"], relation["tail"]["start"]))
    kind = Token if form.kind == "tokens" else Span
    found = [_span(label, _tokens(label.data_point), item) for label in labels if isinstance(label.data_point, kind)]
    return sorted(found, key=lambda span: (span["start"], span["end"]))


def _tokens(part: Token | Span) -> Sequence[Token]:
    return [part] if isinstance(part, Token) else part.tokens


def _span(label: Label, tokens: Sequence[Token], item: Item) -> dict[str, Any]:
    start, end = item.positions.span_of(tokens)
    found = {
        "entity_group": label.value,
        "score": _number(label.score),
        "word": item.positions.text[start:end],
        "start": start,
        "end": end,
    }
    if item.tokens is not None:
        sent = [index for index, word in enumerate(item.tokens) if word]  # Flair leaves empty words out
        found.update(first_token=sent[tokens[0].idx - 1], last_token=sent[tokens[-1].idx - 1])
    return found


def _relation(label: Label, item: Item, form: ModelForm) -> dict[str, Any]:
    relation = label.data_point
    return {
        "label": label.value,
        "score": _number(label.score),
        "head": _end(relation.first, item, form),
        "tail": _end(relation.second, item, form),
    }


def _end(span: Span, item: Item, form: ModelForm) -> dict[str, Any]:
    given = next(label for label_type in form.entity_types for label in span.get_labels(label_type))
    return _span(given, span.tokens, item)


def _number(value: Any) -> float | None:
    """Return a number that JSON has; ``None`` for infinity and for what is no number."""
    number = float(value)
    return number if math.isfinite(number) else None
