"""Products of fp32 matrices in fp32, whatever the process chose for speed: what is compared must not depend on it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch

_mkldnn: Any = torch.backends.mkldnn  # has no annotations
_OPERATIONS: tuple[Any, ...] = (torch.backends.cuda.matmul, _mkldnn.matmul, _mkldnn.conv, _mkldnn.rnn)
"""What ``torch.set_float32_matmul_precision`` and ``torch.backends.fp32_precision`` reach; convolutions of cuDNN are of
TF32 in everything that was ever compared."""

_lock = threading.Lock()
_before: list[str] = []
_inside = 0


@contextlib.contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Inside, neither autocast nor torch's settings for fp32 make a product coarser than its operands.

    Args:
        device_type: whose autocast is off, of this thread.
    """
    with exact_products(), torch.autocast(device_type, enabled=False):
        yield


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Inside, torch's settings for fp32 make no product coarser than its operands; autocast stays as it is.

    The settings are those of the process: other threads compute as exactly meanwhile.
    """
    global _inside
    with _lock:
        if not _inside:
            _before[:] = [operation.fp32_precision for operation in _OPERATIONS]
            for operation, chosen in zip(_OPERATIONS, _before, strict=True):
                if chosen != "none":
                    operation.fp32_precision = "ieee"
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                for operation, chosen in zip(_OPERATIONS, _before, strict=True):
                    _restore(operation, chosen)


def _restore(operation: Any, chosen: str) -> None:
    """Give the operation what it had, as something of its own only where that is not what it would have anyway."""
    if operation.fp32_precision != chosen:
        operation.fp32_precision = "none"
    if operation.fp32_precision != chosen:
        operation.fp32_precision = chosen
