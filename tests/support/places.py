"""Which tensors are held once in memory, although each can be written to on its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from flair_peft.primitives import mapped_memory


def places_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return name → where the values are: tensors with one place take memory once, unless they were written to.

    A private mapping shows the pages of its file, so that a place is one in the file, or else an address in memory.
    """
    known = mapped_memory._Mappings()
    return {name: _place(tensor, known.of(tensor)) for name, tensor in tensors.items()}


def _place(tensor: torch.Tensor, mapping: mapped_memory._Mapping | None) -> Any:
    start = mapped_memory.address(tensor)
    return start if mapping is None else (mapping.file, mapping.offset + start - mapping.first)


def frozen_places(model: torch.nn.Module) -> dict[str, Any]:
    """Return name → place of each frozen parameter."""
    return places_of({name: p for name, p in model.named_parameters() if not p.requires_grad})


def addresses_of(tensors: Iterable[torch.Tensor]) -> set[int]:
    """Return where tensors begin in this process's memory; ``data_ptr`` would copy what is copied on write."""
    return {mapped_memory.address(tensor) for tensor in tensors}
