"""JSON that says one thing: no name stands twice in an object, and no number is one that JSON has not."""

from __future__ import annotations

import json
from typing import Any


def loads(text: str) -> Any:
    """Return what a text says.

    Raises:
        ValueError: it is no JSON, or not only one thing; what it says of that quotes nothing of the text.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_object_of, parse_constant=_refuse_constant)


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
