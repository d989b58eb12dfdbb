"""What a torch file would become if it were loaded, as plain containers and inert stand-ins.

The opcodes of its pickle are followed one by one, but nothing that they name is imported or called: a tensor is its
dtype, its shape and the place of its bytes, and any other object is its class's name and what it was given.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flair_peft.errors import ModelFileError
from flair_peft.primitives.held_file import AnyFile, HeldFile, held
from flair_peft.torchfile import scan

# A vocabulary of a million words takes three million operations; each takes at most a few hundred bytes here.
_MOST_OPERATIONS = 4_000_000
_LARGEST_PICKLE = 256 << 20

# Longer texts and bytes are tokenizers and the like, of which the length says enough; the text of a model's state is
# wanted as it is.
_LONGEST_BYTES = 10_000
LONGEST_TEXT = 64 << 20
_LONGEST_NUMBER = 16
_MOST_DIMENSIONS = 64
_MOST_TENSORS = 100_000
_LONGEST_PLACE = 1_000
_END = object()
_ZIP = b"PK\x03\x04"

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLES_OF_OLD_FILES = 5

_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_DTYPES = {f"torch.{name}Storage": dtype for name, dtype in _STORAGES.items()}
_DTYPES_BY_NAME = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}

_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
_TENSORS = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"})


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
    def dtype(self) -> torch.dtype:
        """Of its elements; bytes where the storage does not say."""
        return _DTYPES.get(self.kind, torch.uint8)


@dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor in the file, of which no element was read."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its elements."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Outline:
    """A torch file.

    Attributes:
        path: of the file, held open for what is read of it later.
        value: what it would become.
        places: key of a storage → where its bytes start and stop in the file.
    """

    path: HeldFile
    value: Any
    places: Mapping[str, tuple[int, int]]

    def read(self, tensor: Tensor) -> torch.Tensor:
        """Return the elements of a tensor, copied out of the file.

        Raises:
            ModelFileError: the file does not hold them.
        """
        size = tensor.dtype.itemsize
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
        count = 0 if 0 in tensor.shape else last + 1
        start, stop = self.places.get(tensor.storage.key, (0, 0))
        begin = start + tensor.offset * size
        if begin + count * size > stop:
            raise _damaged(self.path, f"the bytes of the tensor '{tensor.storage.key}' are not all there")
        if not count:
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        with self.path.open("rb") as file:
            file.seek(begin)
            content = bytearray(file.read(count * size))
        if len(content) != count * size:
            raise _damaged(self.path, "it was cut off while it was read")
        return torch.frombuffer(content, dtype=tensor.dtype).as_strided(tensor.shape, tensor.strides)


def read_outline(path: AnyFile) -> Outline:
    """Return what a torch file, zipped or old-style, would become; the bytes of its tensors are not read.

    Raises:
        ModelFileError: it is no torch file, is damaged, or is larger than any model.
    """
    path = held(path)
    try:
        return _read_zipped(path) if scan.is_zip(path) else _read_old(path)
    except _Odd as error:
        raise _damaged(path, str(error)) from error
    except ModelFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise _damaged(path, f"its pickle does not make sense ({type(error).__name__}: {str(error)[:80]})") from error


class _Odd(ModelFileError):
    """What is wrong with a pickle; whoever knows the file names it."""


def _read_zipped(path: HeldFile) -> Outline:
    members = {member.name.partition("/")[2]: member for member in scan.stored_members(path)}
    pickled = members.get("data.pkl")
    if pickled is None or pickled.stop - pickled.start > _LARGEST_PICKLE:
        raise _damaged(path, "there is no pickle of a model in it")
    _check_order(path, members.get("byteorder"))
    with path.open("rb") as file:
        file.seek(pickled.start)
        buffer = file.read(pickled.stop - pickled.start)
    places = {name[5:]: (member.start, member.stop) for name, member in members.items() if name.startswith("data/")}
    return Outline(path, _follow(scan.Operations(buffer, 0), buffer, path), places)


def _check_order(path: AnyFile, member: scan.Member | None) -> None:
    if member is not None:
        with path.open("rb") as file:
            file.seek(member.start)
            if file.read(min(member.stop - member.start, 10)) != b"little":
                raise _damaged(path, "its numbers are in another byte order than this machine's")


def _read_old(path: HeldFile) -> Outline:
    if path.stat().st_size == 0:
        raise _damaged(path, "it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found, end = [], 0
        for _ in range(_PICKLES_OF_OLD_FILES):
            operations = scan.Operations(mapped, end)
            found.append(_follow(operations, mapped, path))
            end = operations.end
            if found[0] != _OLD_MAGIC:  # one pickle alone
                return Outline(path, found[0], {})
        value, keys = found[3:]
        return Outline(path, value, _places_in_row(mapped, end, keys, _storages_in(value)))


def _places_in_row(mapped: mmap.mmap, end: int, keys: Any, known: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    """Return where the storages of an old-style file lie: each is its number of elements and then these."""
    places = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", mapped, end)
        start = end + 8
        end = start + count * known[key].dtype.itemsize
        if count < 0 or end > len(mapped):
            raise _Odd("the file ends before its tensors do")
        places[key] = (start, end)
    return places


def _storages_in(value: Any) -> dict[str, Storage]:
    return {tensor.storage.key: tensor.storage for tensor in tensors_in(value).values()}


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Return the tensors in nested containers, each under the names on the way to it, joined by ``/``.

    A container that is in several places is entered in the first of them.

    Raises:
        ModelFileError: there are more of them, or they have longer names, than in any model.
    """
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    pending = [_parts_of(value, "")]
    while pending:
        place, item = next(pending[-1], ("", _END))
        if item is _END:
            pending.pop()
        elif len(place) > _LONGEST_PLACE or len(found) > _MOST_TENSORS:
            raise _Odd("it has more tensors, or more levels, than any model of Flair")
        elif isinstance(item, Tensor):
            found[place] = item
        elif id(item) not in seen:
            seen.add(id(item))
            pending.append(_parts_of(item, place))
    return found


def _parts_of(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    """Yield what is in a container and may hold tensors; one at a time, for a file can say the same thing often."""
    around = f"{place}/" if place else ""
    if isinstance(value, Made):
        yield from ((f"{around}{part}", getattr(value, part)) for part in ("arguments", "state", "items", "entries"))
    elif isinstance(value, (dict, list, tuple)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if isinstance(item, (dict, list, tuple, Made, Tensor)) and isinstance(key, (str, int)):
                if isinstance(key, str) and len(key) > _LONGEST_PLACE:
                    raise _Odd("the name of a tensor in it is longer than any")
                yield f"{around}{key}", item


def _follow(operations: scan.Operations, buffer: scan.Buffer, path: AnyFile) -> Any:
    """Return what one pickle would make; the operations are consumed to their end."""
    machine = _Machine(buffer)
    for count, (code, start, stop) in enumerate(operations):
        if count > _MOST_OPERATIONS:
            raise _damaged(path, f"its pickle has more than {_MOST_OPERATIONS} operations, as no model of Flair has")
        handle = _HANDLERS.get(code)
        if handle is None:
            raise _damaged(path, "it holds an opcode that torch does not write")
        handle(machine, start, stop)
    if not operations.is_whole:
        raise _damaged(path, "its pickle has no end")
    return machine.stack[-1]


class _Machine:
    """The stack and the memo of an unpickler, over values that do nothing."""

    def __init__(self, buffer: scan.Buffer) -> None:
        self.buffer = buffer
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self._room = LONGEST_TEXT

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def take(self, count: int) -> tuple[Any, ...]:
        """Return so many values from the top of the stack, the lowest first."""
        if count > len(self.stack):
            raise _Odd("it takes more than there is")
        taken = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        return taken

    def take_marked(self) -> list[Any]:
        """Return all values since the last mark."""
        taken, self.stack = self.stack, self.marks.pop()
        return taken

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def text(self, start: int, stop: int, encoding: str = "utf-8") -> Any:
        """Return a text; of all texts together only so much is decoded as the largest model holds."""
        if stop - start > self._room:
            return _blob(self.buffer[start:stop])
        self._room -= stop - start
        return self.buffer[start:stop].decode(encoding, "surrogatepass" if encoding == "utf-8" else "replace")

    def remember(self, index: int) -> None:
        self.memo[index] = self.stack[-1]


def _call(function: Any, arguments: Any) -> Any:
    """Return the stand-in for what a call would return."""
    if isinstance(function, Made) and isinstance(arguments, tuple):  # a partial function, for example
        return Made(function.name, arguments)
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        raise _Odd("something is called that is no function")
    name = function.text
    if name in _TENSORS:
        return _tensor(*arguments)
    if name == "torch._utils._rebuild_parameter" and isinstance(arguments[0], Tensor):
        return arguments[0]
    if name in _DICTIONARIES and not any(isinstance(value, list) for value in arguments):
        return next((value for value in arguments if isinstance(value, dict)), {})
    if name == "_codecs.encode" and isinstance(arguments[0], (str, Blob)):
        return _bytes_of(arguments[0])
    return Made(name, arguments)


def _blob(content: bytes) -> Blob:
    marked = content
    if content.startswith(_ZIP):
        # An archive also says when its files were written.
        with contextlib.suppress(zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OSError):
            members = zipfile.ZipFile(io.BytesIO(content)).infolist()
            marked = repr(sorted((member.filename, member.file_size, member.CRC) for member in members)).encode()
    return Blob(len(content), zlib.crc32(marked))


def _bytes_of(text: str | Blob) -> bytes | Blob:
    """Return the bytes that protocol 2 writes as a text."""
    if isinstance(text, Blob) or len(text) > _LONGEST_BYTES:
        return text if isinstance(text, Blob) else _blob(text.encode("latin-1", "replace"))
    return text.encode("latin-1", "replace")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Tensor:
    """Return the tensor that torch would make of a storage."""
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides) or len(shape) > _MOST_DIMENSIONS:
        raise _Odd("a tensor does not say how it lies in its storage")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise _Odd("a tensor has a size that none has")
    dtype = _DTYPES_BY_NAME[more[2].text] if len(more) > 2 else storage.dtype
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    held = storage.count * storage.dtype.itemsize
    if 0 not in shape and (offset + last + 1) * dtype.itemsize > held:
        raise _Odd("a tensor is larger than its storage")
    return Tensor(storage, dtype, offset, shape, strides)


def _refer(machine: _Machine, *_: int) -> None:
    (reference,) = machine.take(1)
    if reference[0] == "module" and isinstance(reference[1], Name):  # the class of a module, with its source code
        machine.push(reference[1])
        return
    kind, storage, key, _, count = reference[:5]
    if kind != "storage" or not isinstance(storage, Name) or not isinstance(key, str) or type(count) is not int:
        raise _Odd("it refers to something that is not a tensor's storage")
    machine.push(Storage(storage.text, key, count))


def _reduce(machine: _Machine, *_: int) -> None:
    machine.push(_call(*machine.take(2)))


def _create(machine: _Machine, *_: int) -> None:
    cls, arguments = machine.take(2)
    if not isinstance(cls, Name) or not isinstance(arguments, tuple):
        raise _Odd("something is made of what is no class")
    machine.push(Made(cls.text, arguments))


def _create_by_names(machine: _Machine, *_: int) -> None:
    cls, arguments, named = machine.take(3)
    machine.stack.extend((cls, (*arguments, named)))
    _create(machine)


def _build(machine: _Machine, *_: int) -> None:
    (state,) = machine.take(1)
    if isinstance(machine.stack[-1], Made):
        machine.stack[-1].state = state
    elif not isinstance(machine.stack[-1], dict):  # dictionaries of tensors have metadata, which nobody needs
        raise _Odd("something is given a state that has none")


def _append(machine: _Machine, items: list[Any]) -> None:
    target = machine.stack[-1]
    (target.items if isinstance(target, Made) else target).extend(items)


def _set_items(target: Any, items: list[Any]) -> Any:
    entries = target.entries if isinstance(target, Made) else target
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Others could take for ever to compare; under a name of its own, no entry hides another.
        entries[key if isinstance(key, (str, bytes, int, float, bool, type(None))) else Blob(0)] = value
    return target


def _append_marked(machine: _Machine, *_: int) -> None:
    items = machine.take_marked()
    _append(machine, items)


def _append_one(machine: _Machine, *_: int) -> None:
    _append(machine, list(machine.take(1)))


def _set_marked(machine: _Machine, *_: int) -> None:
    items = machine.take_marked()
    _set_items(machine.stack[-1], items)


def _set_one(machine: _Machine, *_: int) -> None:
    items = list(machine.take(2))
    _set_items(machine.stack[-1], items)


def _pop(machine: _Machine, *_: int) -> None:
    if machine.stack:
        machine.stack.pop()
    else:
        machine.take_marked()


def _name(machine: _Machine, start: int, stop: int) -> None:
    machine.push(Name(".".join(machine.buffer[start : stop - 1].decode().split("\n"))))


def _name_of_stack(machine: _Machine, *_: int) -> None:
    module, name = machine.take(2)
    machine.push(Name(".".join((module, name))))


def _line(machine: _Machine, start: int, stop: int) -> str:
    if stop - start > 1_000:
        raise _Odd("a number or text in it has no end")
    return machine.buffer[start : stop - 1].decode("latin-1")


def _push_int_line(machine: _Machine, start: int, stop: int) -> None:
    line = _line(machine, start, stop)
    machine.push({"00": False, "01": True}.get(line) if line in ("00", "01") else int(line.rstrip("L")))


def _push_number(machine: _Machine, start: int, stop: int) -> None:
    is_long = stop - start > _LONGEST_NUMBER
    machine.push(
        _blob(machine.buffer[start:stop])
        if is_long
        else int.from_bytes(machine.buffer[start:stop], "little", signed=True)
    )


def _push_bytes(machine: _Machine, start: int, stop: int) -> None:
    content = machine.buffer[start:stop]
    machine.push(_blob(content) if len(content) > _LONGEST_BYTES else content)


def _pushing(make: Callable[[], Any]) -> _Handler:
    return lambda machine, *_: machine.push(make())


def _pushing_taken(make: Callable[[Any], Any], count: int) -> _Handler:
    return lambda machine, *_: machine.push(make(machine.take(count)))


def _pushing_marked(make: Callable[[list[Any]], Any]) -> _Handler:
    def handle(machine: _Machine, *_: int) -> None:
        items = machine.take_marked()
        machine.push(make(items))

    return handle


_Handler = Callable[[_Machine, int, int], None]


def _nothing(*_: Any) -> None:
    return None


def _unsigned(machine: _Machine, start: int, stop: int) -> int:
    return int.from_bytes(machine.buffer[start:stop], "little")


_BY_OPCODE: dict[str, _Handler] = {
    "PROTO": _nothing,
    "FRAME": _nothing,
    "STOP": _nothing,
    "MARK": lambda machine, *_: machine.mark(),
    "POP": _pop,
    "POP_MARK": lambda machine, *_: _nothing(machine.take_marked()),
    "DUP": lambda machine, *_: machine.push(machine.stack[-1]),
    "NONE": _pushing(lambda: None),
    "NEWTRUE": _pushing(lambda: True),
    "NEWFALSE": _pushing(lambda: False),
    "INT": _push_int_line,
    "LONG": _push_int_line,
    "BININT": _push_number,
    "BININT1": lambda machine, start, stop: machine.push(_unsigned(machine, start, stop)),
    "BININT2": lambda machine, start, stop: machine.push(_unsigned(machine, start, stop)),
    "LONG1": _push_number,
    "LONG4": _push_number,
    "FLOAT": lambda machine, start, stop: machine.push(float(_line(machine, start, stop))),
    "BINFLOAT": lambda machine, start, stop: machine.push(struct.unpack(">d", machine.buffer[start:stop])[0]),
    "STRING": lambda machine, start, stop: machine.push(_line(machine, start, stop).strip("\"'")),
    "BINSTRING": lambda machine, start, stop: machine.push(machine.text(start, stop, "latin-1")),
    "SHORT_BINSTRING": lambda machine, start, stop: machine.push(machine.text(start, stop, "latin-1")),
    "UNICODE": lambda machine, start, stop: machine.push(machine.text(start, stop - 1, "raw-unicode-escape")),
    "SHORT_BINUNICODE": lambda machine, start, stop: machine.push(machine.text(start, stop)),
    "BINUNICODE": lambda machine, start, stop: machine.push(machine.text(start, stop)),
    "BINUNICODE8": lambda machine, start, stop: machine.push(machine.text(start, stop)),
    "BINBYTES": _push_bytes,
    "SHORT_BINBYTES": _push_bytes,
    "BINBYTES8": _push_bytes,
    "BYTEARRAY8": _push_bytes,
    "EMPTY_LIST": _pushing(list),
    "LIST": _pushing_marked(list),
    "APPEND": _append_one,
    "APPENDS": _append_marked,
    "EMPTY_TUPLE": _pushing(tuple),
    "TUPLE": _pushing_marked(tuple),
    "TUPLE1": _pushing_taken(tuple, 1),
    "TUPLE2": _pushing_taken(tuple, 2),
    "TUPLE3": _pushing_taken(tuple, 3),
    "EMPTY_DICT": _pushing(dict),
    "DICT": _pushing_marked(lambda items: _set_items({}, items)),
    "SETITEM": _set_one,
    "SETITEMS": _set_marked,
    "EMPTY_SET": _pushing(lambda: Made("builtins.set")),
    "ADDITEMS": _append_marked,
    "FROZENSET": _pushing_marked(lambda items: Made("builtins.frozenset", items=items)),
    "GET": lambda machine, start, stop: machine.push(machine.memo[int(_line(machine, start, stop))]),
    "BINGET": lambda machine, start, stop: machine.push(machine.memo[_unsigned(machine, start, stop)]),
    "LONG_BINGET": lambda machine, start, stop: machine.push(machine.memo[_unsigned(machine, start, stop)]),
    "PUT": lambda machine, start, stop: machine.remember(int(_line(machine, start, stop))),
    "BINPUT": lambda machine, start, stop: machine.remember(_unsigned(machine, start, stop)),
    "LONG_BINPUT": lambda machine, start, stop: machine.remember(_unsigned(machine, start, stop)),
    "MEMOIZE": lambda machine, *_: machine.remember(len(machine.memo)),
    "GLOBAL": _name,
    "STACK_GLOBAL": _name_of_stack,
    "REDUCE": _reduce,
    "NEWOBJ": _create,
    "NEWOBJ_EX": _create_by_names,
    "BUILD": _build,
    "BINPERSID": _refer,
}
"""Opcode → what it does; torch and Flair write no others."""

_HANDLERS = {ord(opcode.code): _BY_OPCODE[opcode.name] for opcode in pickletools.opcodes if opcode.name in _BY_OPCODE}


def _damaged(path: AnyFile, reason: str) -> ModelFileError:
    return scan.unreadable(path, reason)
