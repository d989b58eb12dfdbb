"""A pickle's opcodes, followed one by one to stand-ins for what they would make.

Nothing that they name is imported or called.
"""

from __future__ import annotations

import contextlib
import io
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from flair_peft.torchfile import scan
from flair_peft.torchfile.stand_ins import ITEM_BYTES, Blob, Made, MalformedPickleError, Name, Storage, Tensor

# A vocabulary of a million words takes three million operations; each takes at most a few hundred bytes here.
_MOST_OPERATIONS = 4_000_000

# Longer texts and bytes are tokenizers and the like, of which the length says enough; the text of a model's state is
# wanted as it is.
_LONGEST_BYTES = 10_000
LONGEST_TEXT = 64 << 20
_LONGEST_NUMBER = 16
_MOST_DIMENSIONS = 64

_DTYPES = {f"torch.{dtype}": dtype for dtype in ITEM_BYTES}
_DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
_TENSORS = frozenset({"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"})


def follow(operations: scan.Operations, buffer: scan.Buffer) -> Any:
    """Return what one pickle would make; the operations are consumed to their end.

    Raises:
        MalformedPickleError: it has no end, is longer than that of any model, or does what torch's do not.
    """
    machine = _Machine(buffer)
    for count, (code, start, stop) in enumerate(operations):
        if count > _MOST_OPERATIONS:
            raise MalformedPickleError(
                f"its pickle has more than {_MOST_OPERATIONS} operations, as no model of Flair has"
            )
        handle = _HANDLERS.get(code)
        if handle is None:
            raise MalformedPickleError("it holds an opcode that torch does not write")
        handle(machine, start, stop)
    if not operations.is_whole:
        raise MalformedPickleError("its pickle has no end")
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
            raise MalformedPickleError("it takes more than there is")
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
        raise MalformedPickleError("something is called that is no function")
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
    if content.startswith(scan.ZIP_START):
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
        raise MalformedPickleError("a tensor does not say how it lies in its storage")
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in numbers):
        raise MalformedPickleError("a tensor has a size that none has")
    dtype = _DTYPES[more[2].text] if len(more) > 2 else storage.dtype
    last = sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    held = storage.count * ITEM_BYTES[storage.dtype]
    if 0 not in shape and (offset + last + 1) * ITEM_BYTES[dtype] > held:
        raise MalformedPickleError("a tensor is larger than its storage")
    return Tensor(storage, dtype, offset, shape, strides)


def _refer(machine: _Machine, *_: int) -> None:
    (reference,) = machine.take(1)
    if reference[0] == "module" and isinstance(reference[1], Name):  # the class of a module, with its source code
        machine.push(reference[1])
        return
    kind, storage, key, _, count = reference[:5]
    if kind != "storage" or not isinstance(storage, Name) or not isinstance(key, str) or type(count) is not int:
        raise MalformedPickleError("it refers to something that is not a tensor's storage")
    machine.push(Storage(storage.text, key, count))


def _create(machine: _Machine, *_: int) -> None:
    cls, arguments = machine.take(2)
    if not isinstance(cls, Name) or not isinstance(arguments, tuple):
        raise MalformedPickleError("something is made of what is no class")
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
        raise MalformedPickleError("something is given a state that has none")


def _append(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    (target.items if isinstance(target, Made) else target).extend(items)


def _set(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    _set_items(target.entries if isinstance(target, Made) else target, items)


def _set_items(entries: Any, items: Sequence[Any]) -> Any:
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Others could take for ever to compare; under a name of its own, no entry hides another.
        entries[key if isinstance(key, (str, bytes, int, float, bool, type(None))) else Blob(0)] = value
    return entries


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
        raise MalformedPickleError("a number or text in it has no end")
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


def _unsigned(machine: _Machine, start: int, stop: int) -> int:
    return int.from_bytes(machine.buffer[start:stop], "little")


_BY_OPCODES: dict[str, Callable[[_Machine, int, int], object]] = {
    "PROTO FRAME STOP": lambda *_: None,
    "MARK": lambda machine, *_: machine.mark(),
    "POP": _pop,
    "POP_MARK": lambda machine, *_: machine.take_marked(),
    "DUP": lambda machine, *_: machine.push(machine.stack[-1]),
    "NONE": lambda machine, *_: machine.push(None),
    "NEWTRUE": lambda machine, *_: machine.push(True),
    "NEWFALSE": lambda machine, *_: machine.push(False),
    "INT LONG": _push_int_line,
    "BININT LONG1 LONG4": _push_number,
    "BININT1 BININT2": lambda machine, start, stop: machine.push(_unsigned(machine, start, stop)),
    "FLOAT": lambda machine, start, stop: machine.push(float(_line(machine, start, stop))),
    "BINFLOAT": lambda machine, start, stop: machine.push(struct.unpack(">d", machine.buffer[start:stop])[0]),
    "STRING": lambda machine, start, stop: machine.push(_line(machine, start, stop).strip("\"'")),
    "BINSTRING SHORT_BINSTRING": lambda machine, start, stop: machine.push(machine.text(start, stop, "latin-1")),
    "UNICODE": lambda machine, start, stop: machine.push(machine.text(start, stop - 1, "raw-unicode-escape")),
    "SHORT_BINUNICODE BINUNICODE BINUNICODE8": lambda machine, start, stop: machine.push(machine.text(start, stop)),
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8": _push_bytes,
    "EMPTY_LIST": lambda machine, *_: machine.push([]),
    "LIST": lambda machine, *_: machine.push(machine.take_marked()),
    "APPEND": lambda machine, *_: _append(machine, machine.take(1)),
    "APPENDS ADDITEMS": lambda machine, *_: _append(machine, machine.take_marked()),
    "EMPTY_TUPLE": lambda machine, *_: machine.push(()),
    "TUPLE": lambda machine, *_: machine.push(tuple(machine.take_marked())),
    "TUPLE1": lambda machine, *_: machine.push(machine.take(1)),
    "TUPLE2": lambda machine, *_: machine.push(machine.take(2)),
    "TUPLE3": lambda machine, *_: machine.push(machine.take(3)),
    "EMPTY_DICT": lambda machine, *_: machine.push({}),
    "DICT": lambda machine, *_: machine.push(_set_items({}, machine.take_marked())),
    "SETITEM": lambda machine, *_: _set(machine, machine.take(2)),
    "SETITEMS": lambda machine, *_: _set(machine, machine.take_marked()),
    "EMPTY_SET": lambda machine, *_: machine.push(Made("builtins.set")),
    "FROZENSET": lambda machine, *_: machine.push(Made("builtins.frozenset", items=machine.take_marked())),
    "GET": lambda machine, start, stop: machine.push(machine.memo[int(_line(machine, start, stop))]),
    "BINGET LONG_BINGET": lambda machine, start, stop: machine.push(machine.memo[_unsigned(machine, start, stop)]),
    "PUT": lambda machine, start, stop: machine.remember(int(_line(machine, start, stop))),
    "BINPUT LONG_BINPUT": lambda machine, start, stop: machine.remember(_unsigned(machine, start, stop)),
    "MEMOIZE": lambda machine, *_: machine.remember(len(machine.memo)),
    "GLOBAL": _name,
    "STACK_GLOBAL": _name_of_stack,
    "REDUCE": lambda machine, *_: machine.push(_call(*machine.take(2))),
    "NEWOBJ": _create,
    "NEWOBJ_EX": _create_by_names,
    "BUILD": _build,
    "BINPERSID": _refer,
}
"""Opcodes → what they do; torch and Flair write no others."""

_HANDLERS = {
    ord(opcode.code): handle
    for names, handle in _BY_OPCODES.items()
    for opcode in pickletools.opcodes
    if opcode.name in names.split()
}
