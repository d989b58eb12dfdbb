"""Where in a state a value stands, and the errors that say so."""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote

from flair_peft.errors import ModelFileError, UnsupportedStateError

Place = tuple[str, ...]
"""Keys and indices that lead to a value, from the outside in."""


def show(place: Place) -> str:
    """Return a place as text for messages."""
    return ".".join(part for part in place if part) or "the value"


def group_of(state: dict[str, Any], prefix: str) -> tuple[dict[str, Any], str]:
    """Return the state dict in which tensors of this prefix are, and what they begin with there.

    Args:
        state: of a model.
        prefix: of the names that tensors have beside the JSON of the state, such as "state_dict/embeddings.model.".
    """
    first, _, rest = prefix.partition("/")
    inside = state[unquote(first)]
    return (inside, rest) if first == "state_dict" else group_of(inside, rest)


def class_name(value: Any) -> str:
    """Return the full name of the class of a value; that of a built-in alone."""
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def refusal(place: Place, what: str) -> UnsupportedStateError:
    """Return the error that says why a value cannot be stored."""
    return UnsupportedStateError(
        f"Cannot store '{show(place[:20])}': it {what}. Files hold JSON and tensors only, so that no code runs from "
        "them. Replace it by numbers, text, containers, tensors, Flair's own objects or modules of torch.nn such as "
        "Linear and Sequential, each of exactly that class: a subclass may have settings and code of its own."
    )


def damage(place: Place, what: str) -> ModelFileError:
    """Return the error that says what is damaged in a file."""
    return ModelFileError(
        f"Cannot read the model: at '{show(place[:20])}', {what}. The file is damaged, or was not written by "
        "flair_peft. Copy or save it again."
    )
