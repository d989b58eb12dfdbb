"""Requests for predictions: JSON, checked and made data points of Flair's."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any, Literal

from flair.data import DataPair, DataPoint, DataTriple, Sentence
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from flair_peft.errors import RequestError
from flair_peft.primitives import strict_json
from flair_peft.serving.http.model_forms import ModelForm
from flair_peft.serving.http.text_positions import TextPositions

Name = Annotated[str, StringConstraints(min_length=1, max_length=200)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, hide_input_in_errors=True)


class Entity(_Part):
    """A span that is given: positions in the text, in code points, and its type."""

    start: int = Field(ge=0)
    end: int = Field(ge=1)
    entity_group: Name


class Item(_Part):
    """One text, or what belongs together: a text and its pair, several texts, words, a text and its entities."""

    text: str | None = None
    text_pair: str | None = None
    texts: list[str] | None = Field(default=None, min_length=2, max_length=3)
    tokens: list[str] | None = None
    entities: list[Entity] | None = None

    @property
    def parts(self) -> list[str]:
        """The texts of this item; words are one text."""
        if self.tokens is not None:
            return [" ".join(self.tokens)]
        return self.texts or [text for text in (self.text, self.text_pair) if text is not None]

    @cached_property
    def positions(self) -> TextPositions:
        """Of the words in the (first) text."""
        return TextPositions(self.parts[0], is_split=self.tokens is not None)


class Parameters(_Part):
    """How to predict."""

    top_k: int | Literal["all"] | None = Field(default=1, description="labels for a text; null or 'all': all of them")
    adapter: bool = Field(default=True, description="false: the heads on the base without its adapter, to compare")


class PredictionRequest(_Part):
    """What is asked of one model or several."""

    inputs: str | Item | list[str | Item]
    model: Name | Annotated[list[Name], Field(min_length=1, max_length=64)] | None = None
    adapter_id: Name | Annotated[list[Name], Field(min_length=1, max_length=64)] | None = None
    parameters: Parameters = Parameters()

    @cached_property
    def items(self) -> list[Item]:
        """The inputs, one by one."""
        given = self.inputs if isinstance(self.inputs, list) else [self.inputs]
        return [Item(text=each) if isinstance(each, str) else each for each in given]

    @property
    def wants_all_scores(self) -> bool:
        """Whether more labels are asked for than a model gives by itself."""
        return "top_k" in self.parameters.model_fields_set

    @property
    def most_labels(self) -> int | None:
        """How many labels an answer has at most; ``None``: all."""
        most = self.parameters.top_k
        return most if isinstance(most, int) and self.wants_all_scores else None

    @property
    def asked_models(self) -> str | list[str] | None:
        """The name or names of models."""
        return self.model if self.model is not None else self.adapter_id


class LoadRequest(_Part):
    """A model to load, and the name to serve it by."""

    name: Name
    source: Annotated[str, StringConstraints(min_length=1, max_length=4096)]
    revision: Name | None = None


def parse(body: bytes, kind: type[_Part]) -> Any:
    """Return the request that a body holds.

    Raises:
        RequestError: it is no JSON, or none of this form.
    """
    try:
        text = body.decode("utf-8")
        request = kind.model_validate(strict_json.loads(text))
    except ValidationError as error:
        raise _malformed(_first_problem(error)) from None
    except UnicodeDecodeError:
        raise _malformed("it is not in UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise _malformed(f"it is no JSON ({_in_short(error)})") from None
    if isinstance(request, PredictionRequest):
        _check(request)
    return request


def _in_short(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos}"
    return str(error) if isinstance(error, ValueError) else type(error).__name__


# What may stand in a place where several kinds of values may.
_KINDS = {
    "inputs": 'a text, an object such as {"text": …} or {"tokens": […]}, or a list of these',
    "model": "a name, or a list of names",
    "adapter_id": "a name, or a list of names",
    "top_k": 'a number from 1 on, "all" or null',
}
_FIELDS = {name for kind in (Entity, Item, Parameters, PredictionRequest, LoadRequest) for name in kind.model_fields}
_WORDS = {"missing": "it is missing", "extra_forbidden": "there is no such name", "model_type": "it is no object"}


def _first_problem(error: ValidationError) -> str:
    found = error.errors(include_url=False, include_input=False, include_context=False)
    # Of the kinds that a value may be of, the one that came furthest says what is wrong.
    furthest = max(len(each["loc"]) for each in found)
    problems = {_place(each): _words(each) for each in reversed(found) if len(each["loc"]) == furthest}
    said = [f"at '{place[:100]}': {words[:200]}" if place else words[:200] for place, words in problems.items()]
    return "; ".join(said[-2:][::-1])


def _place(problem: Any) -> str:
    """Return where it is, without the names of kinds that the value could have been of."""
    way = list(problem["loc"])
    parts = [part for part in way if isinstance(part, int) or part in _FIELDS]
    is_unknown = problem["type"] == "extra_forbidden" and str(way[-1]).isidentifier()
    return ".".join(map(str, parts + way[-1:] if is_unknown else parts))


def _words(problem: Any) -> str:
    before, last = list(problem["loc"])[:-1], ("", *problem["loc"])[-1]
    names = [part for part in before if part in _KINDS]
    if names and not isinstance(last, int) and last not in _FIELDS and problem["type"] != "extra_forbidden":
        kinds = _KINDS[names[-1]]
        return f"it has to be {kinds.rpartition(', or ')[0] if isinstance(before[-1], int) else kinds}"
    return str(_WORDS.get(problem["type"], problem["msg"]))


def _check(request: PredictionRequest) -> None:
    if request.model is not None and request.adapter_id is not None and request.model != request.adapter_id:
        raise _malformed("'model' and 'adapter_id' mean the same, and name different models")
    names = request.asked_models
    if isinstance(names, list) and len(set(names)) < len(names):
        raise _malformed("it names a model twice")
    top_k = request.parameters.top_k
    if isinstance(top_k, int) and top_k < 1:
        raise _malformed("'top_k' counts labels, from 1 on")
    for number, item in enumerate(request.items):
        _check_item(item, number)


def _check_item(item: Item, number: int) -> None:
    forms = [item.text is not None, item.texts is not None, item.tokens is not None]
    if sum(forms) != 1 or (item.text_pair is not None and item.text is None):
        raise _malformed(f"input {number} has none, or several, of 'text', 'texts' and 'tokens'")
    for text in item.parts:
        if "\0" in text:
            raise _malformed(f"input {number} holds the character NUL, which no text has")


def _malformed(why: str) -> RequestError:
    return RequestError(
        f"Cannot read the request: {why}. Bodies are JSON as /docs describes them. Correct it and send it again."
    )


def points_of(items: Sequence[Item], form: ModelForm) -> list[DataPoint]:
    """Return new data points for a model, each with the others of its request as context, and with no other text.

    Raises:
        RequestError: an item is not what the model takes.
    """
    points = [_point_of(item, form, number) for number, item in enumerate(items)]
    # Whoever predicts them in parts, or beside those of other requests, finds the context set.
    Sentence.set_context_for_sentences([point for point in points if isinstance(point, Sentence)])
    return points


def _point_of(item: Item, form: ModelForm, number: int) -> DataPoint:
    expected = {"pair": 2, "triple": 3}.get(form.takes, 1)
    if len(item.parts) != expected:
        raise _unfit(number, form.takes, f"it has {len(item.parts)} texts")
    if (item.entities is not None) != (form.takes == "entities"):
        raise _unfit(number, form.takes, "it has no 'entities'" if item.entities is None else "it has 'entities'")
    sentences = [_sentence(item.tokens if item.tokens is not None else text, number) for text in item.parts]
    if form.takes == "entities":
        _add_entities_(sentences[0], item, form, number)
    if expected == 1:
        return sentences[0]
    return DataPair(*sentences) if expected == 2 else DataTriple(*sentences)


def _sentence(text: str | list[str], number: int) -> Sentence:
    try:
        return Sentence(text or " ")  # Flair warns of each text that is empty
    except Exception as error:
        raise RequestError(
            f"Cannot split the text of input {number} into words: {type(error).__name__}. Flair's tokenizer does not "
            "find its words in it again. Leave out its control characters, or send 'tokens'.",
            code="unreadable_text",
        ) from error


def _add_entities_(sentence: Sentence, item: Item, form: ModelForm, number: int) -> None:
    places = [item.positions.span_of([token]) for token in sentence]
    starts, ends = ({place[side]: index for index, place in enumerate(places)} for side in (0, 1))
    for entity in item.entities or ():
        first, last = starts.get(entity.start), ends.get(entity.end)
        if first is None or last is None or last < first:
            raise RequestError(
                f"Cannot use the entity from {entity.start} to {entity.end} of input {number}: it does not begin and "
                "end where words do. Positions count code points of the text as it is sent. Correct them, or send "
                "'tokens'.",
                code="unfit_entity",
            )
        for label_type in form.entity_types:
            sentence[first : last + 1].add_label(label_type, entity.entity_group)


def _unfit(number: int, takes: str, why: str) -> RequestError:
    wanted = {
        "text": "a text, or 'tokens'",
        "pair": "{'text': …, 'text_pair': …}",
        "triple": "{'texts': [three of them]}",
        "entities": "{'text': …, 'entities': [{'start', 'end', 'entity_group'}]}",
    }[takes]
    return RequestError(
        f"Cannot predict for input {number}: {why}. The model takes {wanted}. /info says what each model takes.",
        code="unfit_input",
    )
