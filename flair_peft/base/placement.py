"""Bases whose weights nobody may move: quantisation, or a device map, says where they are."""

from __future__ import annotations

import torch

# What says how the weights are quantised, and where they go.
QUANTISING = frozenset({"load_in_4bit", "load_in_8bit", "quantization_config"})
PLACING = QUANTISING | {"device_map", "max_memory", "offload_folder"}


def is_placed(model: torch.nn.Module) -> bool:
    """Whether quantisation or a device map says where the weights are, so that nobody may move them."""
    return bool(getattr(model, "quantization_method", None)) or is_dispatched(model)


def is_dispatched(model: torch.nn.Module) -> bool:
    """Whether accelerate spread the weights over devices, or to the disk."""
    places = set((getattr(model, "hf_device_map", None) or {}).values())
    return len(places) > 1 or "disk" in places
