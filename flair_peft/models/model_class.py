"""The class of a stored Flair model: named by what is stored, and no other than the one asked for."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from flair.nn import Model

from flair_peft.errors import ModelFileError
from flair_peft.models.stored import Stored


def subclasses(root: type[Any]) -> Iterator[type[Any]]:
    """Yield all classes that derive from ``root``, once for each way in which they do."""
    for subclass in root.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def class_of_directory(stored: Any, source: str) -> type[Model]:
    """Return the model class of that name among those that are imported; nothing is imported because of a file."""
    known = {f"{found.__module__}.{found.__qualname__}": found for found in subclasses(Model)}
    if not isinstance(stored, str) or stored not in known:
        raise ModelFileError(
            f"Cannot load '{source}': it holds a {stored!r:.200}, and no such model class is imported. Files import "
            "nothing. Import the module that defines it first."
        )
    return known[stored]


def class_of_file(stored: Stored) -> type[Model]:
    """Return the model class that a ``.pt`` file names, among those that are imported."""
    name = stored.state.get("__cls__")
    if name is None:
        raise ModelFileError(
            f"Cannot load '{stored.source}': it names no model class, as a character language model does not, nor what "
            "Flair wrote before 0.11. No class says how to read it. Give a language model to FlairEmbeddings, and load "
            "an old file with its class."
        )
    model_class = next((each for each in subclasses(Model) if each.__name__ == name), None)
    if model_class is None:
        raise ModelFileError(
            f"Cannot load '{stored.source}': it holds a {name!r:.200}, and no such model class is imported. Import the "
            "module that defines it, or load the file with its class."
        )
    return model_class


def check_class(asked: type[Model], stored: Stored) -> None:
    """Return unless the model is of another class than the one asked for, which would read its settings otherwise.

    An abstract class would try all others.
    """
    source, cls, name = stored.source, asked.__name__, stored.state.get("__cls__")
    if stored.model_class is not None:
        if not issubclass(stored.model_class, asked):
            name = stored.model_class.__name__
            raise ModelFileError(
                f"Cannot load '{source}' as a {cls}: it holds a {name}. Another class would read it as something that "
                f"it is not. Use {name}.load or flair_peft.from_pretrained."
            )
    elif not inspect.isabstract(asked):
        named = [each for each in subclasses(Model) if each.__name__ == name]
        if named and not any(issubclass(asked, each) or issubclass(each, asked) for each in named):
            raise ModelFileError(
                f"Cannot load '{source}' as a {cls}: it holds a {name}. Another class would read it as something that "
                f"it is not. Use {name}.load."
            )
    elif name is not None and name not in {each.__name__ for each in subclasses(asked)}:
        raise ModelFileError(
            f"Cannot load '{source}' as a {cls}: it holds a {name}. {cls}.load finds only classes that derive from "
            f"{cls}. Use {name}.load, after importing the module that defines it, or flair.nn.Model.load."
        )
