"""Slots of a PEFT model, in which it computes with the tensors of adapters that other models have."""

from __future__ import annotations

import functools
import json
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter import config as configs

# Of an adapter's config, what says nothing of its tensors.
_APART = {"base_model_name_or_path": None, "revision": None, "inference_mode": None}

# Of a path in a model, where PEFT has the module that it wraps.
_WRAPPED = frozenset({"base_layer", "original_module"})


@dataclass(eq=False)
class AdapterSlot:
    """One adapter of a PEFT model, by the places where its tensors and settings are.

    Attributes:
        model: PEFT's.
        name: of the adapter in it.
        parameters: name, without that of the adapter → module and name in it.
        settings: name → dictionary of a layer that has the setting of each adapter, such as its scaling.
        layers: those of adapters.
        entries: dictionary of modules that has one for each adapter, and the module of this one.
        others: parameters that are not of this adapter.
        classes: of all modules.
    """

    model: PeftModel
    name: str
    parameters: dict[str, tuple[torch.nn.Module, str]] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    layers: list[BaseTunerLayer] = field(default_factory=list)
    entries: list[tuple[torch.nn.ModuleDict, torch.nn.Module]] = field(default_factory=list)
    others: list[torch.nn.Parameter] = field(default_factory=list)
    classes: list[type[torch.nn.Module]] = field(default_factory=list)

    def __post_init__(self) -> None:
        for path, module in self.model.named_modules():
            self.classes.append(type(module))
            self._take_parameters(path.split("."), module)
            if isinstance(module, torch.nn.ModuleDict) and self.name in module:
                self.entries.append((module, module[self.name]))
            if isinstance(module, BaseTunerLayer):
                self.layers.append(module)
                by_adapter = ((key, getattr(module, key, None)) for key in module.other_param_names)
                has_mine = ((key, each) for key, each in by_adapter if isinstance(each, dict) and self.name in each)
                self.settings.update({f"{path}:{key}": each for key, each in has_mine})

    def _take_parameters(self, path: list[str], module: torch.nn.Module) -> None:
        for key, parameter in module._parameters.items():
            if parameter is not None and self.name in (*path, key):
                parts = ("" if part == self.name else part for part in (*path, key))
                self.parameters[".".join(parts)] = (module, key)
            elif parameter is not None:
                self.others.append(parameter)

    @functools.cached_property
    def kind(self) -> Hashable:
        """What adapters have in common that can take each other's place: shapes, targets, settings, and modules."""
        config = configs.encode_config(self.model.peft_config[self.name])
        return json.dumps({**config, **_APART}, sort_keys=True, default=str), tuple(self.classes)

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """Path in the base → module; those that PEFT wraps, without its own."""
        named = self.model.get_base_model().named_modules()
        return {".".join(part for part in path.split(".") if part not in _WRAPPED): module for path, module in named}

    def fits(self, other: AdapterSlot) -> bool:
        """Whether both have tensors and settings of the same names."""
        return self.parameters.keys() == other.parameters.keys() and self.settings.keys() == other.settings.keys()

    def fill_(self, source: AdapterSlot) -> None:
        """Compute, from now on, with the tensors and settings that another model's adapter has; they are not copied."""
        for holder, entry in self.entries:
            holder[self.name] = entry
        for key, (module, name) in self.parameters.items():
            theirs, their_name = source.parameters[key]
            parameter, tensor = module._parameters[name], theirs._parameters[their_name]
            assert parameter is not None
            assert tensor is not None
            if parameter.device == tensor.device:
                parameter.data = tensor.data
            else:
                module._parameters[name] = torch.nn.Parameter(tensor.data, requires_grad=False)
        for key, setting in self.settings.items():
            setting[self.name] = source.settings[key][source.name]

    def empty_(self) -> None:
        """Hold no tensor of another model, and be no part of the tree, which PEFT walks through in each pass."""
        for holder, _ in self.entries:
            if self.name in holder:
                del holder[self.name]
        for module, name in self.parameters.values():
            parameter = module._parameters[name]
            if parameter is not None and not parameter.is_meta:
                parameter.data = parameter.data.new_empty(0)
