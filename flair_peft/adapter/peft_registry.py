"""PEFT's methods and their settings: known without importing PEFT, which takes seconds.

``peft_registry.json`` holds what the versions of PEFT say that it names, and ``python resources/list_peft_methods.py``
writes it. It is read where PEFT is not imported yet and is of such a version; else PEFT itself is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TABLE = Path(__file__).with_suffix(".json")


@dataclass(frozen=True)
class PeftMethods:
    """What PEFT says of all of its methods.

    Attributes:
        defaults: PEFT's name of a method, such as "LORA" → setting → default, as JSON has it; ``None`` for objects.
        shared_settings: those that the configs of all methods have.
    """

    defaults: Mapping[str, Mapping[str, Any]]
    shared_settings: frozenset[str]


def peft_methods() -> PeftMethods:
    """Return what the installed PEFT says of its methods, and of those that others registered with it."""
    return _read(is_imported="peft" in sys.modules)


@functools.cache
def _read(*, is_imported: bool) -> PeftMethods:
    if not is_imported:
        table = json.loads(_TABLE.read_text(encoding="utf-8"))
        if importlib.metadata.version("peft") in table["versions"]:
            return PeftMethods(table["defaults"], frozenset(table["shared_settings"]))
    return ask_peft()


def ask_peft() -> PeftMethods:
    """Return what PEFT itself says of its methods; PEFT is imported."""
    from peft import PeftConfig
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    defaults = {
        str(getattr(method, "value", method)): {field.name: _default(field) for field in dataclasses.fields(config)}
        for method, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
    }
    return PeftMethods(defaults, frozenset(field.name for field in dataclasses.fields(PeftConfig)))


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default is not dataclasses.MISSING:
        return getattr(field.default, "value", field.default)
    made = None if field.default_factory is dataclasses.MISSING else field.default_factory()
    return made if isinstance(made, (dict, list)) else None
