"""How far rounding moves what a model gives: what usual ones are allowed, and what one is that multiplies it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

# Largest distance of what is computed from what was, as a share of its norm: other machines sum in another order.
_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}

# Of a model that multiplies rounding, as adapters with large weights do: how many times what was measured, and at most
# how many times what others are allowed.
_TIMES_MEASURED, _TIMES_ALLOWED = 3, 6

_DRAWS = 4
_PRODUCTS = (torch.nn.functional.linear, torch.addmm)


def distance(vectors: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far apart two tensors are, as a share of the norm of the expected one."""
    if vectors.shape != expected.shape or not torch.equal(vectors.isnan(), expected.isnan()):
        return float("inf")
    vectors, expected = vectors.nan_to_num(), expected.float().nan_to_num()
    return float((vectors - expected).norm() / expected.norm().clamp_min(1e-12))


def tolerance(dtype: Any) -> float:
    """Return how far from what was stored vectors may be, as a share of their norm, by the name of their dtype."""
    return _TOLERANCE.get(dtype, 0.0) if isinstance(dtype, str) else 0.0


def explained(apart: float, allowed: float, measure: Callable[[], Iterable[float]]) -> float:
    """Return how far apart rounding explains: what is allowed, or more where what was measured moves a model farther.

    Args:
        apart: how far apart it is; nothing is measured where that decides nothing.
        allowed: of models of this dtype.
        measure: returns how far other rounding moves this one.
    """
    if not allowed < apart <= _TIMES_ALLOWED * allowed:
        return allowed
    return max(allowed, min(_TIMES_MEASURED * max(measure()), _TIMES_ALLOWED * allowed))


def rounded_otherwise(give: Callable[[], T], dtype: str) -> Iterator[T]:
    """Yield what ``give`` returns where the products of linear layers are off by up to a last place of a dtype.

    Other threads compute as ever, and the random numbers of the process are left alone.
    """
    for seed in range(_DRAWS):
        with _Rounded(getattr(torch, dtype), seed):
            given = give()
        yield given


class _Rounded(TorchFunctionMode):
    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        self._last_place = torch.finfo(dtype).eps
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = function(*args, **(kwargs or {}))
        if function not in _PRODUCTS or type(given) is not torch.Tensor:  # such as one that lies on several devices
            return given
        noise = torch.rand(given.shape, generator=self._generator, dtype=torch.float64)
        return given * (1 + self._last_place * (2 * noise - 1)).to(given)
