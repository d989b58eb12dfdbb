"""Flair constructor state ⇄ JSON + tensors.

``None``, ``bool``, ``int``, ``str``, finite floats, lists, and dictionaries whose keys are strings without a leading
"$" are JSON's own. Everything else is a tagged object, ``{"$type": "tuple", "items": […]}``: the plain types are those
of :mod:`flair_peft.codec.plain_types`, the objects those of ``KINDS``. Only these are built; nothing is imported by a
name from a file. Tensors stand beside the JSON, named by the path of the value that holds them. A dictionary of nothing
but tensors is ``{"$type": "tensors", "prefix": "state_dict/", "count": 211}``: its tensors are named prefix + key.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch.torch_version import TorchVersion

from flair_peft.codec import flair_objects, objects, state_positions, torch_modules, trust
from flair_peft.codec.plain_types import BY_CLASS, BY_NAME, SCALAR
from flair_peft.codec.state_positions import Place
from flair_peft.errors import FlairPeftError, name_some
from flair_peft.primitives import strict_json

Tensors = dict[str, torch.Tensor]

MAX_DEPTH = 100  # Flair's states have about ten levels; Python's stack must not overflow before
MAX_INT_BITS = 10_000  # Python refuses to read longer ones from text

_TAG = "$type"
_GROUP = "tensors"

_STORED_DTYPES = frozenset(
    getattr(torch, name)
    for name in (
        *("bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64"),
        *("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"),
    )
)
"""What safetensors holds in every version; complex tensors are stored as pairs of real numbers."""


def encode(
    value: Any, *, where: str = "", complete: Callable[[dict[str, Any]], dict[str, Any]] | None = None
) -> tuple[Any, Tensors]:
    """Return ``value`` as plain JSON values, and the tensors that it holds by name.

    The tensors share memory with those of ``value``, detached. Bytes become uint8 tensors, equal ones a single one.
    Subclasses are refused, but for strings of numpy and torch, which become plain. An object that is referenced twice
    comes back as two equal ones.

    Args:
        value: what ``_get_state_dict()`` of a Flair model or ``state_dict()`` of an optimiser returns; not modified.
        where: names the value in errors, and is the first part of the names of its tensors.
        complete: returns what is stored in the place of a dictionary with names for keys, also of one that an object
            gives of itself.

    Raises:
        UnsupportedStateError: ``value`` holds something of another type, or itself.
    """
    encoder = _Encoder(complete or (lambda settings: settings))
    try:
        return encoder.encode(value, (where,) if where else ()), encoder.tensors
    except RecursionError as error:
        raise state_positions.refusal((where,), "has too many levels") from error


def decode(document: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Return what :func:`encode` was given, equal in every type and bit, but for what its description names.

    Dictionaries of tensors come back as ``dict``, in the order of ``tensors``. Modules wait for ``load_state_dict``, on
    the device that their constructors choose. The returned containers are new; tensors are those of ``tensors``.

    Args:
        document: JSON values; not modified.
        tensors: by name; all of them must be used, and none but those that hold bytes twice.

    Raises:
        ModelFileError: the document or the tensors are damaged, do not fit each other, or ask for too much memory.
        FlairPeftError: the label encoder of a decoder cannot be built, its base model is not found for example.
    """
    try:
        decoder = _Decoder(tensors)
        value = decoder.decode(document, ())
    except RecursionError as error:
        raise state_positions.damage((), "it has too many levels") from error
    unused = tensors.keys() - decoder.used
    if unused:
        raise state_positions.damage((), f"nothing uses the tensors {name_some(unused)}")
    return value


def restore_state(text: str, tensors: Tensors) -> Any:
    """Return what was encoded as ``json.dumps(document)`` and tensors.

    Files that torch writes name this function, so that ``torch.load`` has one name to allow.

    Raises:
        ModelFileError: the text is no JSON, or as for :func:`decode`.
    """
    try:
        document = strict_json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:
        raise state_positions.damage((), f"it is not JSON ({type(error).__name__}: {str(error)[:80]})") from error
    return decode(document, tensors)


class _Encoder:
    """Collects the tensors of one value while it is encoded."""

    def __init__(self, complete: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        self.tensors: Tensors = {}
        self._complete = complete
        self._open: set[int] = set()
        self._blobs: dict[bytes, str] = {}
        self._parameters: set[int] = set()

    def encode(self, value: Any, place: Place) -> Any:
        if value is None or type(value) is bool or type(value) is str:
            return value
        if len(place) > MAX_DEPTH:
            raise state_positions.refusal(place, f"has more than {MAX_DEPTH} levels")
        if id(value) in self._open:
            raise state_positions.refusal(place, f"is a {state_positions.class_name(value)} that holds itself")
        self._open.add(id(value))
        try:
            return self._encode_open(value, place)
        finally:
            self._open.discard(id(value))

    def _encode_open(self, value: Any, place: Place) -> Any:
        cls = type(value)
        if (cls is int and value.bit_length() <= MAX_INT_BITS) or (cls is float and math.isfinite(value)):
            return value
        if cls is list:
            return self.encode_items(value, place)
        if cls in (dict, OrderedDict) and _is_group(value):
            return self._encode_group(value, place)
        if cls is dict and all(type(key) is str and not key.startswith("$") for key in value):
            value = self._complete(value)
            self._check_settings(value, place)
            return {key: self.encode(item, (*place, key)) for key, item in value.items()}
        if cls in _STAND_INS:
            return self.encode(_STAND_INS[cls](value), place)
        if cls in _KINDS:
            return self._encode_object(_KINDS[cls], value, place)
        if cls in BY_CLASS or isinstance(value, np.generic):
            entry = BY_CLASS.get(cls, SCALAR)
            return {_TAG: entry.name, **entry.encode(self, value, place)}
        raise state_positions.refusal(
            place, f"is a {state_positions.class_name(value)}" if cls is not int else "is a number of too many digits"
        )

    def encode_items(self, items: Iterable[Any], place: Place) -> list[Any]:
        return [self.encode(item, (*place, str(index))) for index, item in enumerate(items)]

    def encode_pairs(self, value: Mapping[Any, Any], place: Place) -> list[Any]:
        self._check_settings(value, place)
        return [
            [self.encode(key, (*place, f"{index}:key")), self.encode(item, (*place, str(index)))]
            for index, (key, item) in enumerate(value.items())
        ]

    def add(self, tensor: torch.Tensor, place: Place) -> str:
        """Return the name under which the tensor is stored."""
        name = _tensor_name(place)
        assert name not in self.tensors
        self.tensors[name] = _plain_tensor(tensor, place)
        return name

    def add_bytes(self, data: bytes, place: Place) -> str:
        """Return the name under which these bytes are stored, the first place where they were found."""
        if data not in self._blobs:
            empty = torch.empty(0, dtype=torch.uint8)
            self._blobs[data] = self.add(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else empty, place)
        return self._blobs[data]

    def _encode_group(self, tensors: Mapping[str, torch.Tensor], place: Place) -> dict[str, Any]:
        prefix = _tensor_name(place) + "/"
        for name, tensor in tensors.items():
            self.tensors[prefix + name] = _plain_tensor(tensor, (*place, name))
        return {_TAG: _GROUP, "prefix": prefix, "count": len(tensors)}

    def _encode_object(self, kind: objects.Kind, value: Any, place: Place) -> dict[str, Any]:
        if kind.is_module:
            self._check_shared(kind, value, place)
        fields = objects.read_fields(kind, value, state_positions.show(place))
        return {_TAG: kind.name, **{name: self.encode(item, (*place, name)) for name, item in fields.items()}}

    def _check_shared(self, kind: objects.Kind, module: torch.nn.Module, place: Place) -> None:
        for name, parameter in objects.own_parameters(kind, module):
            if id(parameter) in self._parameters:
                raise state_positions.refusal((*place, name), "is a weight of two modules at once")
            self._parameters.add(id(parameter))

    def _check_settings(self, settings: Mapping[Any, Any], place: Place) -> None:
        danger = trust.unsafe_part(settings)
        if danger:
            raise state_positions.refusal(place, f"is embeddings that need {danger}")


class _Decoder:
    """Hands out the tensors of one document while it is decoded."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self.tensors = tensors
        self.used: set[str] = set()
        self._blobs: dict[str, bytes] = {}
        self._room = _bytes_held(tensors)

    def decode(self, document: Any, place: Place) -> Any:
        cls = type(document)
        if document is None or cls in (bool, int, str) or (cls is float and math.isfinite(document)):
            return document
        if len(place) > MAX_DEPTH:
            raise state_positions.damage(place[:5], f"it has more than {MAX_DEPTH} levels")
        if cls is list:
            return self.decode_items(document, place)
        if cls is not dict:
            raise state_positions.damage(place, f"there is a {cls.__name__}: {document!r:.40}")
        if _TAG in document:
            return self._decode_tagged(document, place)
        return self._decode_plain(document, place)

    def decode_items(self, items: Any, place: Place) -> list[Any]:
        return [self.decode(item, (*place, str(index))) for index, item in enumerate(_list(items, place))]

    def decode_pairs(self, pairs: Any, place: Place) -> dict[Any, Any]:
        decoded: dict[Any, Any] = {}
        for index, pair in enumerate(_list(pairs, place)):
            key, item = _list(pair, place)
            decoded[self.decode(key, (*place, f"{index}:key"))] = self.decode(item, (*place, str(index)))
        if len(decoded) != len(pairs):
            raise state_positions.damage(place, "a key is there twice")
        self._check_settings(decoded, place)
        return decoded

    def take(self, name: Any, place: Place) -> torch.Tensor:
        """Return a tensor that only one value uses."""
        if type(name) is not str or name not in self.tensors or name in self.used:
            raise state_positions.damage(place, f"the tensor {name!r:.80} is missing or used twice")
        self.used.add(name)
        return self.tensors[name]

    def take_bytes(self, name: Any, place: Place) -> bytes:
        """Return the bytes of a tensor that several values may use, for all of them the same object."""
        if type(name) is str and name in self._blobs:
            return self._blobs[name]
        tensor = self.take(name, place)
        if tensor.dtype is not torch.uint8 or tensor.dim() != 1:
            raise state_positions.damage(place, f"the tensor '{name}' does not hold bytes")
        return self._blobs.setdefault(name, tensor.cpu().numpy().tobytes())

    def _decode_plain(self, document: dict[Any, Any], place: Place) -> dict[str, Any]:
        odd = [key for key in document if type(key) is not str or key.startswith("$")]
        if odd:
            raise state_positions.damage(place, f"there is the key {odd[0]!r:.40}")
        decoded = {key: self.decode(item, (*place, key)) for key, item in document.items()}
        self._check_settings(decoded, place)
        return decoded

    def _check_settings(self, settings: Mapping[Any, Any], place: Place) -> None:
        danger = trust.unsafe_part(settings)
        if danger:
            raise state_positions.damage(place, f"there are embeddings that need {danger}")

    def _decode_tagged(self, document: dict[Any, Any], place: Place) -> Any:
        fields = {key: item for key, item in document.items() if key != _TAG}
        name = document[_TAG]
        try:
            if name == _GROUP:
                return self._decode_group(place, **fields)
            if type(name) is str and name in _KINDS_BY_NAME:
                return self._decode_object(_KINDS_BY_NAME[name], fields, place)
            if type(name) is str and name in BY_NAME:
                return BY_NAME[name].decode(self, place, **fields)
        except (FlairPeftError, RecursionError):
            raise
        except Exception as error:  # constructors raise what they like when a file gives them nonsense
            raise state_positions.damage(place, f"{type(error).__name__}: {str(error)[:200]}") from error
        raise state_positions.damage(place, f"there is an object of the unknown type {name!r:.40}")

    def _decode_group(self, place: Place, *, prefix: str, count: int) -> Tensors:
        names = [name for name in self.tensors if name.startswith(prefix)]
        # Whoever loads weights into a model compares every name, and can say which is missing or left over.
        is_counted = len(names) == count or place[-1:] == ("state_dict",)
        if not prefix.endswith("/") or not is_counted or not names:
            raise state_positions.damage(place, f"{len(names)} tensors are named '{prefix:.80}…' instead of {count}")
        return {name.removeprefix(prefix): self.take(name, place) for name in names}

    def _decode_object(self, kind: objects.Kind, document: dict[str, Any], place: Place) -> Any:
        fields = {name: self.decode(item, (*place, name)) for name, item in document.items()}
        value, size = objects.build_object(kind, fields, room=self._room)
        self._room -= size
        return value


KINDS = (*flair_objects.KINDS, *torch_modules.KINDS)
"""Every class of objects that a file can hold, beside plain values and tensors."""

_KINDS = {kind.cls: kind for kind in KINDS}
_KINDS_BY_NAME = {kind.name: kind for kind in KINDS}

# Strings and bytes by another name: Flair's model card holds torch's version, labels can come out of numpy arrays.
_STAND_INS: dict[type, Callable[[Any], Any]] = {TorchVersion: str.__str__, np.str_: str.__str__, np.bytes_: bytes}


def _list(items: Any, place: Place) -> list[Any]:
    if type(items) is not list:
        raise state_positions.damage(place, f"there is no list but a {type(items).__name__}")
    return items


def _is_group(value: Mapping[Any, Any]) -> bool:
    """Whether these are named tensors that can be stored under their own names."""
    return bool(value) and all(
        type(key) is str and key.isascii() and type(item) is torch.Tensor and not item.is_complex()
        for key, item in value.items()
    )


def _plain_tensor(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """Return the tensor without its graph; its memory holds all of its elements."""
    if tensor.dtype not in _STORED_DTYPES or tensor.is_meta or not _is_dense(tensor):
        raise state_positions.refusal(place, f"is a tensor of {tensor.dtype}, {tensor.layout}, on {tensor.device}")
    plain = tensor.detach().resolve_neg()
    return plain if _is_held(plain) else plain.contiguous()


def _is_dense(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested


def _is_held(tensor: torch.Tensor) -> bool:
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _bytes_held(tensors: Any) -> int:
    """Return how much memory the tensors take, which bounds what can be asked for with them."""
    if not isinstance(tensors, Mapping):
        raise state_positions.damage((), f"there are no named tensors but a {state_positions.class_name(tensors)}")
    sizes: dict[int, int] = {}
    for name, tensor in tensors.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor):
            raise state_positions.damage((), f"{name!r:.80} is no tensor")
        if not _is_dense(tensor) or not _is_held(tensor):
            raise state_positions.damage((), f"the tensor '{name}' is larger than the memory that it was stored with")
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())


def _tensor_name(place: Place) -> str:
    # Escaped parts hold no "/", so that no two places have the same name; nor is a name empty.
    return "/".join(quote(part, safe="", errors="surrogatepass") or "%" for part in place) or "value"
