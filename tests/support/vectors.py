"""How two lists of embedding vectors are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def is_same(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor]) -> bool:
    """Whether all vectors have equal dtypes and bits; two empty lists are no answer."""
    assert len(first) == len(second) > 0
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, second, strict=True))


def is_close(first: Sequence[torch.Tensor], second: Sequence[torch.Tensor], tolerance: float = 1e-5) -> bool:
    """Whether all vectors agree to an absolute and relative tolerance; two empty lists are no answer."""
    assert len(first) == len(second) > 0
    return all(torch.allclose(a, b, atol=tolerance, rtol=tolerance) for a, b in zip(first, second, strict=True))
