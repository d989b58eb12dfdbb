"""Bodies that are no requests: the answer says where, and what may stand there."""

from __future__ import annotations

import json
from typing import Any

import pytest

from flair_peft.errors import RequestError
from flair_peft.serving.http.requests import PredictionRequest, parse

WRONG: dict[str, tuple[Any, str]] = {
    "a number": ({"inputs": 3}, "at 'inputs': it has to be a text, an object such as .*, or a list of these"),
    "nothing": ({"inputs": None}, "at 'inputs': it has to be a text, an object"),
    "words without a name": ({"inputs": [["a", "b"]]}, r"at 'inputs\.0': it has to be a text, an object .*\]}\."),
    "no models": ({"inputs": "x", "model": []}, "at 'model': it has to be a name, or a list of names"),
    "a word for a number": (
        {"inputs": "x", "parameters": {"top_k": "alll"}},
        r"at 'parameters\.top_k': it has to be a number from 1 on, \"all\" or null",
    ),
    "misspelt in an input": ({"inputs": {"txt": "x"}}, r"at 'inputs\.txt': there is no such name"),
    "misspelt": ({"input": "x"}, "at 'inputs': it is missing; at 'input': there is no such name"),
    "a list": ([1], "request: it is no object"),
    "parameters that are none": ({"inputs": "x", "parameters": 3}, "at 'parameters': it is no object"),
    "a half entity": (
        {"inputs": [{"text": "a", "entities": [{"start": 0, "end": 1}]}]},
        r"at 'inputs\.0\.entities\.0\.entity_group': it is missing",
    ),
    "a number as a text": ({"inputs": [{"text": 3}]}, r"at 'inputs\.0\.text': Input should be a valid string"),
}


@pytest.mark.parametrize("name", WRONG)
def test_message_says_what_may_stand_where(name: str) -> None:
    """Also where a value may be of several kinds, of which pydantic names one."""
    body, words = WRONG[name]
    with pytest.raises(RequestError, match=words):
        parse(json.dumps(body).encode(), PredictionRequest)
