"""The labels that a model predicts: Flair's dictionaries, in JSON or pickled."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flair_peft.torchfile import state_tree
from flair_peft.torchfile.stand_ins import Made


@dataclass(frozen=True)
class Labels:
    """What a model predicts: the type, and the labels themselves."""

    type: str | None
    items: tuple[str, ...]


def find_labels(state: Mapping[Any, Any], task: str = "") -> Iterator[tuple[str, Labels]]:
    """Yield task and field, and the labels there, of a model and its tasks."""
    kinds = [state.get(name) for name in ("label_type", "tag_type")]
    kind = next((value for value in kinds if isinstance(value, str)), None)
    for name, value in state.items():
        found = dictionary_in(value) if isinstance(name, str) and name.endswith("dictionary") else None
        if found is not None:
            marks = state_tree.MARKS if name == "tag_dictionary" else ()
            yield f"{task}{name}", Labels(kind, tuple(item for item in found.items if item not in marks))
    tasks = state.get("model_states")
    for name, part in tasks.items() if isinstance(tasks, dict) and not task else ():
        if isinstance(part, dict):
            yield from find_labels(part, f"{name}.")


@dataclass(frozen=True)
class StoredDictionary:
    """A dictionary of Flair's in a file.

    Attributes:
        items: by number.
        settings: what else it holds.
    """

    items: list[str]
    settings: Mapping[str, Any]


def dictionary_in(value: Any) -> StoredDictionary | None:
    """Return the dictionary of Flair's that a value is, in JSON or pickled; ``None`` for all other values."""
    if isinstance(value, dict) and value.get("$type") == "dictionary":
        held = {name: part for name, part in value.items() if name != "$type"}
    elif isinstance(value, Made) and value.name == "flair.data.Dictionary" and isinstance(value.state, dict):
        # The last is kept by Flair for itself once it has looked something up.
        left = ("idx2item", "item2idx_not_encoded")
        held = {name: part for name, part in value.state.items() if name not in left}
        held["items"] = value.state.get("idx2item")
        if _is_usual(held.get("item2idx"), held["items"]):
            del held["item2idx"]
    else:
        return None
    items = held.pop("items", None)
    items = items if isinstance(items, list) else []
    plain = (item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items)
    # Files of older versions of Flair lack the flags.
    named = {"multi_label": False, "span_labels": False, **{str(name): part for name, part in held.items()}}
    return StoredDictionary([item if isinstance(item, str) else repr(item) for item in plain], named)


def _is_usual(indices: Any, items: Any) -> bool:
    """Whether the numbers of items are their places."""
    if not isinstance(indices, dict) or not isinstance(items, list):
        return False
    return list(indices.items()) == [(item, index) for index, item in enumerate(items)]
