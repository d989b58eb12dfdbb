"""What stands in for the values of a torch file while it is read without being loaded: plain data that does nothing.

A tensor is its dtype, its shape and the place of its bytes; any other object is its class's name and what it would be
given. Dtypes go by torch's names, so that torch need not be imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from flair_peft.errors import ModelFileError

ITEM_BYTES = {
    **dict.fromkeys(("bool", "int8", "uint8", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2"), 1),
    **dict.fromkeys(("float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn_x2", "qint8", "quint8", "bits8"), 1),
    **dict.fromkeys(("bits1x8", "bits2x4", "bits4x2", "quint2x4", "quint4x2"), 1),
    **{f"{name}{bits}": 1 for name in ("int", "uint") for bits in range(1, 8)},
    **dict.fromkeys(("int16", "uint16", "float16", "bfloat16", "bits16"), 2),
    **dict.fromkeys(("int32", "uint32", "float32", "complex32", "qint32"), 4),
    **dict.fromkeys(("int64", "uint64", "float64", "complex64"), 8),
    "complex128": 16,
}
"""Torch's name of a dtype → bytes of an element."""

_DTYPES_OF_STORAGES = {
    f"torch.{name}Storage": dtype
    for name, dtype in (
        *(("Double", "float64"), ("Float", "float32"), ("Half", "float16"), ("BFloat16", "bfloat16")),
        *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8"), ("Byte", "uint8")),
        *(("Bool", "bool"), ("ComplexFloat", "complex64"), ("ComplexDouble", "complex128")),
    )
}


class MalformedPickleError(ModelFileError):
    """What is wrong with a pickle; whoever knows the file names it."""


@dataclass(frozen=True, eq=False)
class Name:
    """The name of a function or class."""

    text: str


@dataclass(frozen=True, eq=False)
class Blob:
    """Bytes or text too long to be read, of this length and checksum; that of an archive is of its files."""

    length: int
    checksum: int = 0


@dataclass(eq=False)
class Made:
    """An object that a pickle would make: by whom, of what, and what it would be given afterwards."""

    name: str
    arguments: tuple[Any, ...] = ()
    state: Any = None
    items: list[Any] = field(default_factory=list)
    entries: dict[Any, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Storage:
    """The bytes of tensors in the file: kind, key and number of elements."""

    kind: str
    key: str
    count: int

    @property
    def dtype(self) -> str:
        """Of its elements; bytes where the storage does not say."""
        return _DTYPES_OF_STORAGES.get(self.kind, "uint8")


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in the file, of which no element was read."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]
