"""What a Flair model takes and what it gives: by its class, in the words of requests and answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from flair.models import (
    Lemmatizer,
    MultitaskModel,
    PrefixedSequenceTagger,
    RelationClassifier,
    RelationExtractor,
    SequenceTagger,
    SpanClassifier,
    TARSClassifier,
    TARSTagger,
    TextClassifier,
    TextPairClassifier,
    TextPairRegressor,
    TextRegressor,
    TextTripleClassifier,
    TokenClassifier,
)
from flair.nn import Model

from flair_peft.errors import AdapterConfigError, name_some
from flair_peft.serving.shared_base import READ_WORDS_ONLY

_LABELS = (TextClassifier, TextPairClassifier, TextTripleClassifier)
_RELATIONS = (RelationClassifier, RelationExtractor)
_NUMBERS = (TextRegressor, TextPairRegressor)

# What they say of a data point does not depend on what else their predict is given, once context is set.
_MAY_SHARE_CALLS = frozenset((*_LABELS, *_RELATIONS, *_NUMBERS, SequenceTagger, TokenClassifier, SpanClassifier))
_NO_LABELS = frozenset({"O", "<unk>", "<START>", "<STOP>", "_"})
_POSITION_IN_SPAN = re.compile("[BIES]-")


@dataclass(frozen=True, kw_only=True)
class ModelForm:
    """What one model, or one task of it, takes and gives.

    Attributes:
        kind: of its answers: "labels", "spans", "tokens", "relations", "number" or, of several tasks, "tasks".
        takes: "text", "pair", "triple", or "entities": a text with spans that are given.
        label_type: under which Flair writes what it predicts.
        labels: that it may give.
        is_multi_label: whether a data point may have several of them, or none.
        entity_types: label types under which it looks for the spans that are given.
        has_all_scores: whether it can give the scores of all labels.
        is_alone: whether what it says of a text depends on what else is in the same call of ``predict``.
        reads_words_only: whether other labels of a sentence make no difference to it.
        tasks: name → form.
    """

    kind: str
    takes: str = "text"
    label_type: str = ""
    labels: tuple[str, ...] = ()
    is_multi_label: bool = False
    entity_types: tuple[str, ...] = ()
    has_all_scores: bool = False
    is_alone: bool = True
    reads_words_only: bool = False
    tasks: Mapping[str, ModelForm] = field(default_factory=dict)


def form_of(model: Any) -> ModelForm:
    """Return what a model takes and gives.

    Raises:
        AdapterConfigError: it is no Flair model, or none whose answers have a form.
    """
    if isinstance(model, MultitaskModel):
        return _form_of_tasks(model)
    if isinstance(model, (TARSClassifier, TARSTagger)):
        is_classifier = isinstance(model, TARSClassifier)
        return ModelForm(
            kind="labels" if is_classifier else "spans",
            label_type=model.label_type,
            labels=_names(model.get_current_label_dictionary(), is_span=False),
            is_multi_label=is_classifier and bool(model.is_current_task_multi_label()),
        )
    if isinstance(model, Lemmatizer):
        return ModelForm(kind="tokens", label_type="predicted")  # the default of its predict
    kind, takes, entity_types = _kind_of(model)
    dictionary = getattr(model, "label_dictionary", None)
    return ModelForm(
        kind=kind,
        takes=takes,
        label_type=model.label_type,
        labels=() if dictionary is None else _names(dictionary, is_span=kind == "spans" and takes == "text"),
        is_multi_label=bool(getattr(model, "multi_label", False)),
        entity_types=entity_types,
        has_all_scores=kind == "labels",
        is_alone=type(model) not in _MAY_SHARE_CALLS,
        reads_words_only=type(model) in READ_WORDS_ONLY,
    )


def _kind_of(model: Any) -> tuple[str, str, tuple[str, ...]]:
    """Return kind, what it takes, and the label types of spans that are given."""
    if isinstance(model, (SequenceTagger, PrefixedSequenceTagger)):
        return ("spans" if model.predict_spans else "tokens"), "text", ()
    if isinstance(model, TokenClassifier):
        return ("spans" if model.span_prediction_problem else "tokens"), "text", ()
    if isinstance(model, SpanClassifier):
        return "spans", "entities", (model._span_label_type or model.label_type,)
    if isinstance(model, RelationExtractor):
        return "relations", "entities", (model.entity_label_type,)
    if isinstance(model, RelationClassifier):
        return "relations", "entities", tuple(model.entity_label_types)
    takes = {TextPairClassifier: "pair", TextPairRegressor: "pair", TextTripleClassifier: "triple"}
    wanted = next((value for key, value in takes.items() if isinstance(model, key)), "text")
    if isinstance(model, (*_LABELS, *_NUMBERS)):
        return ("number" if isinstance(model, _NUMBERS) else "labels"), wanted, ()
    what = "it is no Flair model" if not isinstance(model, Model) else "its predictions have no form that answers have"
    raise AdapterConfigError(
        f"Cannot serve a {type(model).__name__}: {what}. Taggers, classifiers, regressors, models of relations and "
        "spans, and multitask models of these are served. Leave this one out."
    )


def _form_of_tasks(model: Any) -> ModelForm:
    tasks = {str(name): form_of(task) for name, task in model.tasks.items()}
    types, takes = [form.label_type for form in tasks.values()], {form.takes for form in tasks.values()}
    if len(set(types)) < len(types):
        raise AdapterConfigError(
            f"Cannot serve this MultitaskModel: several of its tasks write to {name_some(set(types))}. In Flair's "
            "predict each of them removes what the one before has written. Serve the tasks as models of their own."
        )
    if len(takes) > 1:
        raise AdapterConfigError(
            f"Cannot serve this MultitaskModel: its tasks take {name_some(takes)}. A request has inputs of one form. "
            "Serve the tasks as models of their own."
        )
    entity_types = tuple(dict.fromkeys(name for form in tasks.values() for name in form.entity_types))
    is_alone = any(form.is_alone for form in tasks.values())
    return ModelForm(kind="tasks", takes=takes.pop(), entity_types=entity_types, is_alone=is_alone, tasks=tasks)


def _names(dictionary: Any, *, is_span: bool) -> tuple[str, ...]:
    """Return the labels in a dictionary of Flair's, each once, without its marks."""
    items = (item for item in dictionary.get_items() if item not in _NO_LABELS)
    names = (item[2:] if is_span and _POSITION_IN_SPAN.match(item) else item for item in items)
    return tuple(dict.fromkeys(names))
