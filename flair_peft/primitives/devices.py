"""The device that Flair computes on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside, Flair computes on this device."""
    import flair

    found, flair.device = flair.device, device
    try:
        yield
    finally:
        flair.device = found


@contextmanager
def same_random_numbers() -> Iterator[None]:
    """Inside, what is drawn does not count: what is done between two epochs must not change what the next one draws."""
    import flair
    import torch

    device = torch.device(flair.device)  # which may be given as a text
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
