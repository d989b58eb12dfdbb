"""JSON is read where it says one thing, and refused in words that quote nothing of it."""

from __future__ import annotations

import json

import pytest

from flair_peft.primitives import strict_json


def test_what_json_says_is_read_as_python_reads_it() -> None:
    """Names that stand twice in different objects are no matter."""
    text = '{"a": [1, 2.5, null, {"a": "ä"}], "b": true}'
    assert strict_json.loads(text) == json.loads(text)


@pytest.mark.parametrize(
    "text", ['{"secret": 1, "secret": 1}', '[{"b": {"secret": 1, "secret": 2}}]', "NaN", "-Infinity"]
)
def test_what_says_two_things_or_no_number_is_refused(text: str) -> None:
    """Readers would disagree about it."""
    with pytest.raises(ValueError, match=r"twice in one object|no number of JSON") as caught:
        strict_json.loads(text)
    assert "secret" not in str(caught.value)
