"""Plain types that JSON lacks, such as tuples, sets, bytes and tensors: how a value of each becomes JSON, and back."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from flair_peft.codec import state_positions
from flair_peft.codec.state_positions import Place
from flair_peft.compat import FormatVersion

_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_FACTORIES: dict[str, Callable[[], Any] | None] = {
    **{cls.__name__: cls for cls in (dict, float, int, list, set, str)},
    "None": None,
}


class Encoder(Protocol):
    """What encodes the parts of a value, and stores its tensors."""

    def encode_items(self, items: Iterable[Any], place: Place) -> list[Any]:
        """Return each item as JSON."""

    def encode_pairs(self, value: Mapping[Any, Any], place: Place) -> list[Any]:
        """Return each key and value as JSON."""

    def add(self, tensor: torch.Tensor, place: Place) -> str:
        """Return the name under which the tensor is stored."""

    def add_bytes(self, data: bytes, place: Place) -> str:
        """Return the name under which these bytes are stored."""


class Decoder(Protocol):
    """What decodes the parts of a value, and hands out its tensors."""

    def decode_items(self, items: Any, place: Place) -> list[Any]:
        """Return each item that was encoded."""

    def decode_pairs(self, pairs: Any, place: Place) -> dict[Any, Any]:
        """Return what was encoded as keys and values."""

    def take(self, name: Any, place: Place) -> torch.Tensor:
        """Return the tensor of that name."""

    def take_bytes(self, name: Any, place: Place) -> bytes:
        """Return the bytes of that name."""


@dataclass(frozen=True)
class PlainType:
    """A plain type that JSON lacks: value → fields of the tagged object, and back."""

    name: str
    cls: type
    encode: Callable[[Encoder, Any, Place], dict[str, Any]]
    decode: Callable[..., Any]


def _type_of_text(name: str, cls: type, write: Callable[[Any], str], read: Callable[[str], Any]) -> PlainType:
    """Return the entry of a type whose values are words, with the function that writes and the one that reads them."""

    def decode_text(_: Decoder, place: Place, *, value: str) -> Any:
        if type(value) is not str:
            raise state_positions.damage(place, f"there is no text but {value!r:.40}")
        return read(value)

    return PlainType(name, cls, lambda _, value, __: {"value": write(value)}, decode_text)


def _type_of_items(name: str, cls: type, order: Callable[[Any], Iterable[Any]] = list) -> PlainType:
    """Return the entry of a type that is made of a list."""

    def decode_items(decoder: Decoder, place: Place, *, items: Any) -> Any:
        decoded = decoder.decode_items(items, place)
        value = cls(decoded)
        if len(value) != len(decoded):
            raise state_positions.damage(place, "an item is there twice")
        return value

    return PlainType(
        name, cls, lambda encoder, value, at: {"items": encoder.encode_items(order(value), at)}, decode_items
    )


def _type_of_pairs(name: str, cls: type) -> PlainType:
    """Return the entry of a type that is made of keys and values."""
    return PlainType(
        name,
        cls,
        lambda encoder, value, place: {"items": encoder.encode_pairs(value, place)},
        lambda decoder, place, *, items: cls(decoder.decode_pairs(items, place)),
    )


def _in_order(items: Iterable[Any]) -> list[Any]:
    # The order of a set differs between processes; files of equal models should not.
    return sorted(items, key=repr)


def _encode_default_dict(encoder: Encoder, value: defaultdict[Any, Any], place: Place) -> dict[str, Any]:
    factory = next((name for name, known in _FACTORIES.items() if known is value.default_factory), None)
    if factory is None:
        raise state_positions.refusal(place, f"is a defaultdict of {value.default_factory!r:.80}")
    return {"factory": factory, "items": encoder.encode_pairs(value, place)}


def _decode_default_dict(decoder: Decoder, place: Place, *, factory: str, items: Any) -> defaultdict[Any, Any]:
    return defaultdict(_FACTORIES[factory], decoder.decode_pairs(items, place))


def _encode_bytes_io(encoder: Encoder, value: BytesIO, place: Place) -> dict[str, Any]:
    return {"tensor": encoder.add_bytes(value.getvalue(), place), "position": value.tell()}


def _decode_bytes_io(decoder: Decoder, place: Place, *, tensor: Any, position: int) -> BytesIO:
    stream = BytesIO(decoder.take_bytes(tensor, place))
    stream.seek(position)
    return stream


def _encode_tensor(encoder: Encoder, value: torch.Tensor, place: Place) -> dict[str, Any]:
    if value.is_complex():
        parts = torch.view_as_real(value.detach().resolve_conj())
        return {"tensor": encoder.add(parts, place), "is_complex": True}
    return {"tensor": encoder.add(value, place), "is_complex": False}


def _decode_tensor(decoder: Decoder, place: Place, *, tensor: Any, is_complex: bool) -> torch.Tensor:
    taken = decoder.take(tensor, place)
    return torch.view_as_complex(taken.contiguous()) if is_complex else taken


def _encode_parameter(encoder: Encoder, value: torch.nn.Parameter, place: Place) -> dict[str, Any]:
    return {**_encode_tensor(encoder, value.data, place), "requires_grad": value.requires_grad}


def _decode_parameter(decoder: Decoder, place: Place, *, requires_grad: bool, **fields: Any) -> torch.nn.Parameter:
    return torch.nn.Parameter(_decode_tensor(decoder, place, **fields), requires_grad=requires_grad)


def _encode_array(encoder: Encoder, value: Any, place: Place) -> dict[str, Any]:
    array = np.array(value)
    try:
        tensor = torch.from_numpy(array.astype(array.dtype.newbyteorder("=")))
    except TypeError as error:
        raise state_positions.refusal(place, f"is a numpy array of {array.dtype}") from error
    return _encode_tensor(encoder, tensor, place)


def _decode_array(decoder: Decoder, place: Place, **fields: Any) -> Any:
    return np.array(_decode_tensor(decoder, place, **fields).cpu().numpy())


def _decode_scalar(decoder: Decoder, place: Place, **fields: Any) -> Any:
    return _decode_array(decoder, place, **fields)[()]


def _decode_version(_: Decoder, place: Place, *, value: Any) -> FormatVersion:
    if type(value) is not int:
        raise state_positions.damage(place, f"there is no version but {value!r:.40}")
    return FormatVersion(value)


_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

SCALAR = PlainType("scalar", np.generic, _encode_array, _decode_scalar)

TYPES: tuple[PlainType, ...] = (
    _type_of_text("float", float, str, _NOT_FINITE.__getitem__),
    _type_of_items("tuple", tuple),
    _type_of_items("size", torch.Size),
    _type_of_items("set", set, _in_order),
    _type_of_items("frozenset", frozenset, _in_order),
    _type_of_pairs("dict", dict),
    _type_of_pairs("ordered_dict", OrderedDict),
    _type_of_pairs("counter", Counter),
    PlainType("default_dict", defaultdict, _encode_default_dict, _decode_default_dict),
    PlainType(
        "bytes",
        bytes,
        lambda encoder, value, place: {"tensor": encoder.add_bytes(value, place)},
        lambda decoder, place, *, tensor: decoder.take_bytes(tensor, place),
    ),
    PlainType("bytes_io", BytesIO, _encode_bytes_io, _decode_bytes_io),
    PlainType("tensor", torch.Tensor, _encode_tensor, _decode_tensor),
    PlainType("parameter", torch.nn.Parameter, _encode_parameter, _decode_parameter),
    PlainType("array", np.ndarray, _encode_array, _decode_array),
    SCALAR,
    _type_of_text("dtype", torch.dtype, lambda dtype: str(dtype).removeprefix("torch."), _DTYPES.__getitem__),
    _type_of_text("device", torch.device, str, torch.device),
    _type_of_text("path", type(Path()), str, Path),
    PlainType("format_version", FormatVersion, lambda _, value, __: {"value": int(value)}, _decode_version),
)

BY_CLASS = {entry.cls: entry for entry in TYPES}
BY_NAME = {entry.name: entry for entry in TYPES}
