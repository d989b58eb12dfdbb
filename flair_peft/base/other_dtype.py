"""A base in another dtype than that of its files, whose weights are converted one by one when they are read."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping

import torch

from flair_peft.base import transformer
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.primitives import mapped_memory
from flair_peft.primitives.base_record import BaseRecord
from flair_peft.primitives.dtypes import dtype_name


class ConvertedBase(FrozenBase):
    """A source in its own dtype, mapped from its files, whose weights are converted one by one when they are read."""

    def __init__(self, source: FrozenBase, dtype: torch.dtype) -> None:
        super().__init__(source._model, source.record, source.random_names)
        self._dtype = dtype

    def own_weights(self) -> Mapping[str, torch.Tensor]:
        """Return name → tensor of all weights that the source has, as a load in the dtype gives them."""
        kept = transformer.names_kept_in_fp32(self._model, self._dtype)
        return _Conversion(super().own_weights(), self._dtype, kept)

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record of the base as a load in the dtype has it."""
        return dataclasses.replace(super().known_record, dtype=dtype_name(self._dtype))


class _Conversion(Mapping[str, torch.Tensor]):
    """Weights in another dtype; nothing holds a tensor that was converted."""

    def __init__(self, weights: Mapping[str, torch.Tensor], dtype: torch.dtype, kept: frozenset[str]) -> None:
        self._weights, self._dtype, self._kept = weights, dtype, kept

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._weights[name]
        wanted = torch.float32 if name in self._kept else self._dtype
        if tensor.dtype == wanted or not tensor.is_floating_point():
            return tensor
        converted = tensor.to(wanted)
        mapped_memory.let_go(tensor)
        return converted

    def __contains__(self, name: object) -> bool:
        return name in self._weights

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
