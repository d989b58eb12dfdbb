"""How far rounding moves what a model gives, measured: some models hardly feel a last place, others multiply it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

T = TypeVar("T")

_DRAWS = 4
_PRODUCTS = (torch.nn.functional.linear, torch.addmm)


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
