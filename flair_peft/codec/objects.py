"""Objects ⇄ named settings: how a class is described whose objects files can hold, and how one is read and rebuilt.

The classes stand in :mod:`flair_peft.codec.flair_objects` and :mod:`flair_peft.codec.torch_modules`. Weights are no
settings: Flair keeps them in the state dict of the model around, which fills the modules that are built here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn

from flair_peft.codec import setting_checks
from flair_peft.codec.setting_checks import Check
from flair_peft.errors import ModelFileError, UnsupportedStateError, name_some
from flair_peft.primitives import building

Fields = dict[str, Any]

# Caches that Flair and torch fill when they are needed.
_DERIVED_ATTRIBUTES = frozenset({"item2idx_not_encoded", "_compiled_call_impl"})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of objects that files can hold.

    Attributes:
        name: stands for the class in files.
        cls: the class itself; a subclass is another class, with settings and code of its own.
        fields: setting → whether a value can be one.
        derive: object → those of its settings that are no attributes of their names.
        build: settings as keyword arguments → a new object.
        size: settings → how many elements the weights have that ``build`` allocates.
        mold: as ``build``, but what it returns is only compared with the original; where building is costly.
        holds_modules: the modules inside are settings, and are stored as objects of their own.
    """

    name: str
    cls: type
    fields: Mapping[str, Check]
    build: Callable[..., Any]
    derive: Callable[[Any], Fields] = lambda _: {}
    size: Callable[[Fields], int] = lambda _: 0
    mold: Callable[..., Any] | None = None
    holds_modules: bool = False

    @property
    def is_module(self) -> bool:
        """Whether objects of this kind are torch modules."""
        return issubclass(self.cls, nn.Module)

    def read(self, value: Any) -> Fields:
        """Return the settings of an object, which may themselves be objects; they are shared with it."""
        derived = self.derive(value)
        return {name: derived[name] if name in derived else getattr(value, name) for name in self.fields}


def read_fields(kind: Kind, value: Any, where: str) -> Fields:
    """Return the settings from which :func:`build_object` makes an object like ``value``; they share its parts.

    Raises:
        UnsupportedStateError: the object has more to it than its class gives it: attributes, hooks, other parts.
    """
    fields = kind.read(value)
    odd = {name for name, check in kind.fields.items() if not check(fields[name])}
    if not odd:
        with building.anew():  # saving must not change what is drawn next in training
            odd = _differences(kind, value, (kind.mold or kind.build)(**fields))
    if odd:
        raise UnsupportedStateError(
            f"Cannot store '{where}', a {kind.cls.__name__}: it differs from what its class gives it in "
            f"{name_some(odd)}. Files hold settings, not objects, so that no code runs from them, and this would be "
            f"lost. Use a {kind.cls.__name__} as its constructor makes it."
        )
    return {**fields, **_read_modes(kind, value)} if kind.is_module else fields


def build_object(kind: Kind, fields: Fields, *, room: int) -> tuple[Any, int]:
    """Return a new object and how many elements its weights have; a state dict must fill these.

    Args:
        kind: of the object.
        fields: its settings, as :func:`read_fields` gave them; they become part of the object.
        room: how many elements the weights may have: those of a file fit into the file.

    Raises:
        ModelFileError: the settings are not those of the class, or would take more memory than ``room``.
    """
    expected = {**kind.fields, **dict.fromkeys(_MODES if kind.is_module else (), setting_checks.is_names)}
    odd = expected.keys() ^ fields.keys() or {name for name, check in expected.items() if not check(fields[name])}
    if odd:
        raise ModelFileError(
            f"Cannot build a {kind.cls.__name__}: its settings {name_some(odd)} are missing, unknown or of the wrong "
            "type. The file is damaged, or was not written by flair_peft. Copy or save it again."
        )
    settings = {name: fields[name] for name in kind.fields}
    size = kind.size(settings)
    if size > room:
        raise ModelFileError(
            f"Cannot build a {kind.cls.__name__} with {size} weights: the file holds {room} more bytes at most. It is "
            "damaged, or was not written by flair_peft. Copy or save it again."
        )
    with building.anew():
        built = kind.build(**settings)
    if kind.is_module:
        _set_modes_(kind, built, **{name: fields[name] for name in _MODES})
    return built, size


def own_parameters(kind: Kind, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module that belong to none of the modules among its settings."""
    for prefix, part in _own_modules(kind, module):
        for name, parameter in part.named_parameters(recurse=False):
            yield f"{prefix}.{name}".lstrip("."), parameter


# The state in which a module is, beside its settings: names of its own parts.
_MODES = ("training", "frozen")


def _read_modes(kind: Kind, module: nn.Module) -> Fields:
    return {
        "training": [name for name, part in _own_modules(kind, module) if part.training],
        "frozen": [name for name, parameter in own_parameters(kind, module) if not parameter.requires_grad],
    }


def _set_modes_(kind: Kind, module: nn.Module, *, training: list[str], frozen: list[str]) -> None:
    for name, part in _own_modules(kind, module):
        part.training = name in training
    for name, parameter in own_parameters(kind, module):
        parameter.requires_grad_(name not in frozen)


def _own_modules(kind: Kind, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [("", module)] if kind.holds_modules else list(module.named_modules())


def _differences(kind: Kind, value: Any, rebuilt: Any) -> set[str]:
    """Return what only one of two objects consists of; objects that differ in values only have none."""
    if not kind.is_module:
        # Objects that older versions of Flair stored may lack what their class has now.
        return vars(value).keys() - vars(rebuilt).keys() - _DERIVED_ATTRIBUTES
    first, second = (
        {f"{prefix}.{trait}".lstrip(".") for prefix, part in _own_modules(kind, module) for trait in _traits(part)}
        for module in (value, rebuilt)
    )
    return first ^ second


def _traits(module: nn.Module) -> Iterator[str]:
    yield type(module).__qualname__
    for name, value in vars(module).items():
        if name not in _DERIVED_ATTRIBUTES:
            yield f"{name} in use" if "hooks" in name and value else name
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{name} of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def plain_kind(name: str, cls: type, **fields: Check) -> Kind:
    """Return the kind of a class whose constructor takes what its attributes hold."""
    return Kind(name=name, cls=cls, fields=fields, build=cls)


def area(*sizes: Any) -> int:
    """Return the product of sizes, which can be numpy's: those overflow."""
    return prod(int(size) for size in sizes)


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the dtype of the parameters of a module; float32 if it has none."""
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)
