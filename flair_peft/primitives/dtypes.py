"""Names of dtypes: as users and files spell them, and torch's own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from flair_peft.errors import AdapterConfigError

DtypeLike = str | torch.dtype


# The keywords by which transformers takes the dtype of a model's weights.
SPELLINGS = ("dtype", "torch_dtype")


def parse_dtype(dtype: DtypeLike) -> torch.dtype:
    """Return the floating-point dtype that is meant by ``"bfloat16"``, ``"torch.bfloat16"`` or the dtype itself.

    Raises:
        AdapterConfigError: it names none of torch, or one of 8 bits or fewer, which only stores numbers.
    """
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point or found.itemsize < 2:
        raise AdapterConfigError(
            f"Cannot use dtype {dtype!r}. It names no floating-point dtype that models compute in. Pass 'float32', "
            "'bfloat16' or 'float16', or the torch.dtype itself."
        )
    return found


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """Return ``"bfloat16"`` for ``torch.bfloat16``, the spelling that files hold; ``None`` stays ``None``."""
    return None if dtype is None else str(dtype).removeprefix("torch.")


def requested_dtype(dtype: DtypeLike | None, *keyword_arguments: Mapping[str, Any]) -> DtypeLike | None:
    """Return the dtype asked for, whether as ``dtype=`` or as transformers' ``torch_dtype`` in keyword arguments.

    Raises:
        AdapterConfigError: two different dtypes are asked for.
    """
    spellings = [(kwargs, name) for kwargs in keyword_arguments for name in SPELLINGS]
    asked: list[DtypeLike | None] = [dtype, *(kwargs.get(name) for kwargs, name in spellings)]
    distinct = {value if value == "auto" else parse_dtype(value) for value in asked if value is not None}
    if len(distinct) > 1:
        raise AdapterConfigError(
            f"Cannot choose the base's dtype: {' and '.join(sorted(map(str, distinct)))} are both asked for. `dtype=` "
            "and transformers' `torch_dtype` mean the same. Pass one of them."
        )
    return distinct.pop() if distinct else None
