"""Whether a value can be a setting: the checks that settings of objects from a file must pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from flair.data import Dictionary
from torch import nn

Check = Callable[[Any], bool]


def is_size(value: Any) -> bool:
    """Whether a value is a whole number, of any library, that is not negative."""
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def is_number(value: Any) -> bool:
    """Whether a value is a real number, of any library."""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_named_modules(value: Any) -> bool:
    """Whether a value is a dictionary of torch modules by name."""
    return type(value) is dict and is_names(list(value)) and is_modules(list(value.values()))


def is_index(value: Any) -> bool:
    """Whether a value is a dictionary from texts to sizes."""
    return type(value) is dict and all(isinstance(k, str) and is_size(v) for k, v in value.items())


def is_a(cls: type | tuple[type, ...], value: Any) -> bool:
    """Whether a value is an instance of a class, or of one of several."""
    return isinstance(value, cls)


def is_exactly(cls: type, value: Any) -> bool:
    """Whether a value is an instance of a class, and of no subclass."""
    return type(value) is cls


def optional(check: Check) -> Check:
    """Return the check that lets ``None`` pass, too."""
    return lambda value: value is None or check(value)


def each(container: Any, check: Check) -> Check:
    """Return the check that lets containers pass all of whose items pass a check."""
    return lambda value: isinstance(value, container) and all(map(check, value))


is_flag, is_text = partial(is_a, bool), partial(is_a, str)
is_sizes, is_names, is_words = each(tuple, is_size), each(list, is_text), each((list, tuple), is_text)
is_modules = each(list, partial(is_a, nn.Module))
is_dtype, is_dictionary = partial(is_a, torch.dtype), partial(is_exactly, Dictionary)
