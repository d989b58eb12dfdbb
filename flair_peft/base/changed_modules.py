"""Modules that compute something else than their class does: with hooks, or with a method that was put into them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

_PLAIN = frozenset({bool, int, float, str, type(None), torch.dtype})

OF_TORCH = frozenset(vars(torch.nn.Module()))
"""Attributes that every module has."""

# These and what makes no difference without a gradient.
_BESIDE = OF_TORCH | {"gradient_checkpointing"}

LIBRARIES = frozenset(
    {"torch", "transformers", "transformers_modules", "peft", "accelerate", "bitsandbytes", "flair_peft"}
)
"""Where what computes in a transformer comes from. What others put in can do something else from batch to batch."""


class Computation(NamedTuple):
    """What a module computes with, beside its weights: its class, and its plain settings."""

    kind: type[torch.nn.Module]
    settings: Mapping[str, Any]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Computation:
        """Return that of a module."""
        own = vars(module).items()
        return cls(type(module), {key: each for key, each in own if type(each) in _PLAIN and key not in _BESIDE})

    def is_of(self, module: torch.nn.Module) -> bool:
        """Whether a module computes with the same."""
        own = module.__dict__
        return type(module) is self.kind and all(key in own and own[key] == each for key, each in self.settings.items())


def is_of_libraries(thing: Any) -> bool:
    """Whether a class of modules, or a hook, is of torch, transformers, PEFT, or a library that they build on."""
    while isinstance(thing, functools.partial):
        thing = thing.func
    module = getattr(thing, "__module__", None) or type(thing).__module__
    return str(module).partition(".")[0] in LIBRARIES


def is_changed(module: torch.nn.Module) -> bool:
    """Whether the module has hooks around its forward method, or one that its class does not have."""
    own = module.__dict__  # to find an attribute of a module takes longer
    if own["_forward_hooks"] or own["_forward_pre_hooks"]:
        return True
    return "forward" in own and method_of_others(module) is not None


def method_of_others(module: torch.nn.Module) -> Any:
    """Return the forward method that was put into a module, ``None`` if it is that of its class.

    While a model runs, in another thread maybe, transformers wraps those of layers; then it puts them back.
    """
    forward, own = module.__dict__["forward"], type(module).forward
    while getattr(forward, "__func__", None) is not own:
        is_of_transformers = getattr(forward, "__globals__", {}).get("__name__", "").startswith("transformers.")
        if not is_of_transformers or not hasattr(forward, "__wrapped__"):
            return getattr(forward, "__func__", forward)
        forward = forward.__wrapped__
    return None
