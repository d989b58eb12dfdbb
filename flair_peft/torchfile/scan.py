"""What a torch file holds, read without loading it: the opcodes of its pickles, the places of its tensors.

A pickle is a program, and loading it runs it. Its opcodes can be read like any other bytes: which objects of which
modules it can get hold of, and which strings it holds. Nothing here unpickles, imports or calls what a file names.
"""

from __future__ import annotations

import contextlib
import mmap
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass

from flair_peft.adapter import keys
from flair_peft.errors import ModelFileError
from flair_peft.primitives.held_file import AnyFile

UNRESOLVED = "<a name that the file computes>"
"""Stands among the globals for what only a run of the file could tell; no allow-list holds it."""

Buffer = bytes | mmap.mmap

ZIP_START = b"PK\x03\x04"

# Old-style torch files are a magic number, a protocol, the system, the object and the storage keys, one pickle each;
# the bytes of the tensors follow, and they may look like anything.
_PICKLES_IN_A_ROW = 5

# Far beyond any Flair model (a vocabulary of a million words takes three million), and about a gigabyte of memory here.
_MOST_OPCODES = 10_000_000

# Names beyond these are no names: a damaged or hostile file should not fill the memory with them.
_LONGEST_NAME = 2_000
_MOST_NAMES = 10_000

# What a compressed member may unpack to; stored ones cannot be larger than their file.
_MOST_UNPACKED = 1 << 30

_LENGTHS = {
    pickletools.TAKEN_FROM_ARGUMENT1: struct.Struct("<B"),
    pickletools.TAKEN_FROM_ARGUMENT4: struct.Struct("<i"),
    pickletools.TAKEN_FROM_ARGUMENT4U: struct.Struct("<I"),
    pickletools.TAKEN_FROM_ARGUMENT8U: struct.Struct("<Q"),
}
_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_CODES = {opcode.name: ord(opcode.code) for opcode in pickletools.opcodes}
_ARGUMENTS = {code: opcode.arg.n if opcode.arg else 0 for code, opcode in _OPCODES.items()}


def _codes(*names: str) -> frozenset[int]:
    return frozenset(_CODES[name] for name in names)


_STOP, _MEMOIZE, _STACK_GLOBAL = (_CODES[name] for name in ("STOP", "MEMOIZE", "STACK_GLOBAL"))
_UNICODE = _codes("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_OLD_STRINGS = _codes("UNICODE", "STRING", "BINSTRING", "SHORT_BINSTRING")
_STRINGS = _UNICODE | _OLD_STRINGS

# Whoever names something of this package wrote a model with an adapter, whatever its tensors are called.
_OWN = b"flair_peft."
_NAMES_IN_PLACE = _codes("GLOBAL", "INST")
_MARKING = _STRINGS | _NAMES_IN_PLACE
_EXTENSIONS = _codes("EXT1", "EXT2", "EXT4")
_GETS = _codes("GET", "BINGET", "LONG_BINGET")
_PUTS = _codes("PUT", "BINPUT", "LONG_BINPUT")
_WITHOUT_EFFECT_ON_THE_STACK = _PUTS | _codes("PROTO", "FRAME")
_TELLING = _MARKING | _GETS | _WITHOUT_EFFECT_ON_THE_STACK | _EXTENSIONS | {_STACK_GLOBAL}
_UNKNOWN: tuple[str | None, str | None] = (None, None)


@dataclass(frozen=True)
class PickleContents:
    """What the pickles of a file name and hold.

    Attributes:
        globals: "module.qualname" of all that they can get hold of, as written; ``UNRESOLVED`` where that is unknown.
        marks: the strings that files with adapters hold: keys of adapter tensors, "peft_config", and names of this
            package. These are words, and a model without an adapter can hold them too: as a label, or in the path of
            its training.
        is_whole: whether every pickle was read to its end. A damaged one is listed up to the damage.
    """

    globals: frozenset[str]
    marks: frozenset[str]
    is_whole: bool


def read_contents(path: AnyFile) -> PickleContents | None:
    """Return what the pickles of a torch file, zipped or old-style, name and hold; ``None`` if there are none.

    This takes no memory beyond that of the pickle, and no longer than Python needs to unpickle it.

    Raises:
        ModelFileError: the file is a zip file that cannot be read.
    """
    with _pickles_of(path) as buffers:
        found = [contents for buffer in buffers for contents in _read_pickles(buffer)]
    if not found:
        return None
    return PickleContents(
        globals=frozenset().union(*(contents.globals for contents in found)),
        marks=frozenset().union(*(contents.marks for contents in found)),
        is_whole=all(contents.is_whole for contents in found),
    )


def is_zip(path: AnyFile) -> bool:
    """Whether torch reads the file as a zip file: it looks at the first four bytes only."""
    with path.open("rb") as file:
        return file.read(4) == ZIP_START


@contextlib.contextmanager
def _pickles_of(path: AnyFile) -> Iterator[Iterator[Buffer]]:
    if is_zip(path):
        yield _zipped_pickles(path)
    elif path.stat().st_size == 0:
        yield iter(())
    else:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            yield iter((mapped,))


def _zipped_pickles(path: AnyFile) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(path) as archive:
            members = [member for member in archive.infolist() if member.filename.endswith(".pkl")]
            unpacked = sum(member.file_size for member in members if member.compress_type != zipfile.ZIP_STORED)
            if unpacked > _MOST_UNPACKED:
                raise unreadable(path, f"its pickles unpack to {unpacked} bytes")
            for member in members:
                with archive.open(member) as file:
                    yield file.read(member.file_size)
    except ModelFileError:
        raise
    except Exception as error:  # zipfile raises half a dozen kinds, down to struct.error, for what is damaged
        raise unreadable(path, f"{type(error).__name__}: {error}") from error


def unreadable(path: AnyFile, reason: str) -> ModelFileError:
    """Return the error for a file whose structure is not that of a torch file."""
    return ModelFileError(
        f"Cannot read '{path}' ({path.stat().st_size} bytes): {reason}. It is truncated or damaged, or it was never "
        "written by Flair. Copy or save it again."
    )


def _read_pickles(buffer: Buffer) -> Iterator[PickleContents]:
    for operations in _pickles_in(buffer):
        names, marks, code = _Names(), set[str](), None
        remember, left = names.remember_top, _MOST_OPCODES
        for code, start, stop in operations:
            left -= 1
            # Of the million words of a vocabulary, nearly all are one of the first two.
            if code == _MEMOIZE:
                remember()
            elif code not in _TELLING:
                names.top = _UNKNOWN
            else:
                if left > 0 and len(names.found) <= _MOST_NAMES:
                    names.follow(code, buffer, start, stop)
                if code in _MARKING and stop - start <= _LONGEST_NAME and _is_mark(buffer[start:stop], code):
                    marks.update([_text(buffer[start:stop], code)] if len(marks) < _MOST_NAMES else [])
        is_whole = code == _STOP and left > 0 and len(names.found) <= _MOST_NAMES
        yield PickleContents(frozenset(names.found), frozenset(marks), is_whole)


def _pickles_in(buffer: Buffer) -> Iterator[Iterator[tuple[int, int, int]]]:
    """Yield the operations of each pickle in turn; each has to be consumed before the next is asked for."""
    end = 0
    for _ in range(_PICKLES_IN_A_ROW):
        if end >= len(buffer):
            return
        reading = Operations(buffer, end)
        yield iter(reading)
        if not reading.is_whole:
            return
        end = reading.end


class Operations:
    """The operations of the pickle that begins at ``start``: opcode, and where its argument starts and stops.

    Attributes:
        end: where the pickle ends, once all were consumed and ``is_whole`` says that it has an end.
    """

    def __init__(self, buffer: Buffer, start: int) -> None:
        self._buffer, self.end, self.is_whole = buffer, start, False

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        buffer, end, size = self._buffer, self.end, len(self._buffer)
        while end < size:
            code = buffer[end]
            start = stop = end + 1
            length = _ARGUMENTS.get(code)
            if length is None:
                return
            if length > 0:
                stop += length
            elif length < 0:
                start, stop = _measure(buffer, code, start)
            if stop > size or stop < start:
                return
            yield code, start, stop
            end = stop
            if code == _STOP:
                self.is_whole, self.end = True, end
                return


def _measure(buffer: Buffer, code: int, start: int) -> tuple[int, int]:
    """Return where an argument of variable length starts and stops; it stops before it starts if it is cut off."""
    kind = _ARGUMENTS[code]
    if kind == pickletools.UP_TO_NEWLINE:
        stop = start
        for _ in range(2 if code in _NAMES_IN_PLACE else 1):
            stop = buffer.find(b"\n", stop) + 1
            if stop == 0:
                break
        return start, stop
    stored = _LENGTHS[kind]
    if start + stored.size > len(buffer):
        return start, 0
    (length,) = stored.unpack_from(buffer, start)
    return start + stored.size, start + stored.size + length


class _Names:
    """Follows the opcodes of one pickle to know what STACK_GLOBAL names.

    It takes its two names from the stack. Known are only the two uppermost entries, and only if strings or memo
    entries were pushed one after the other with nothing else in between, as every pickler does it. What was put on
    the stack in another way is unknown, and a name of which a part is unknown is unresolved.
    """

    def __init__(self) -> None:
        self.found: set[str] = set()
        self.top = _UNKNOWN
        self._memo: list[str | None] = []
        self._is_numbered_by_hand = False

    def follow(self, code: int, buffer: Buffer, start: int, stop: int) -> None:
        """Take note of one operation."""
        is_long = stop - start > _LONGEST_NAME
        if code in _UNICODE:
            self.top = (self.top[1], None if is_long else buffer[start:stop].decode("utf-8", "replace"))
        elif code in _GETS:
            self.top = (self.top[1], self._remembered(code, buffer[start:stop]))
        elif code in _WITHOUT_EFFECT_ON_THE_STACK:
            # No pickler numbers entries itself and has them numbered too; where both happen, numbers tell nothing.
            self._is_numbered_by_hand |= code in _PUTS
        else:
            if code in _EXTENSIONS or (code in _NAMES_IN_PLACE and is_long):
                self.found.add(UNRESOLVED)
            elif code in _NAMES_IN_PLACE:
                self.found.add(_joined(*buffer[start : stop - 1].decode("utf-8", "replace").split("\n")))
            elif code == _STACK_GLOBAL:
                self.found.add(_joined(*self.top))
            self.top = _UNKNOWN

    def remember_top(self) -> None:
        """Take note that the uppermost entry was put into the memo."""
        self._memo.append(self.top[1])

    def _remembered(self, code: int, argument: bytes) -> str | None:
        if self._is_numbered_by_hand or code == _CODES["GET"]:
            return None
        index = int.from_bytes(argument, "little")
        return self._memo[index] if index < len(self._memo) else None


def _joined(module: str | None, name: str | None) -> str:
    return UNRESOLVED if module is None or name is None else f"{module}.{name}"


def _is_mark(raw: bytes, code: int) -> bool:
    if code in _OLD_STRINGS:
        raw = _text(raw, code).encode("utf-8", "replace")
    if b"." not in raw:  # of the million words of a vocabulary, nearly all
        return raw == b"peft_config"
    return raw.startswith(_OWN) or keys.is_adapter_key(raw.decode("utf-8", "replace"))


def _text(raw: bytes, code: int) -> str:
    if code == _CODES["UNICODE"]:
        return raw.rstrip(b"\n").decode("raw-unicode-escape", "replace")
    if code == _CODES["STRING"]:
        return raw.strip(b"\n\"'").decode("unicode-escape", "replace")
    return raw.decode("utf-8", "replace")


@dataclass(frozen=True)
class Member:
    """One member of a zip file, stored as it is: its bytes are those of the file from ``start`` to ``stop``."""

    name: str
    start: int
    stop: int
    checksum: int


def stored_members(path: AnyFile) -> list[Member]:
    """Return the members of a torch zip file in the order in which they lie.

    A zip file says everything twice, and two readers can see two different files in it: torch's, which reads the
    tensors, and Python's, which reads the opcodes and checksums. What is returned here both see in the same way.

    Raises:
        ModelFileError: the file is not a zip file as torch writes them, or can be read in two ways.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            return _stored_members(mapped, path)
    except ModelFileError:
        raise
    except Exception as error:  # as in _zipped_pickles
        raise unreadable(path, f"{type(error).__name__}: {error}") from error


def _stored_members(mapped: mmap.mmap, path: AnyFile) -> list[Member]:
    with zipfile.ZipFile(path) as archive:
        listed = archive.infolist()
        if _directory(mapped) != (archive.start_dir, len(listed)):
            raise _ambiguous(path, "its directory is not where its end says")
    # torch takes the folder of the first member for that of all, and does not tell upper case from lower case.
    folder = listed[0].filename.split("/")[0] + "/" if listed else ""
    names = {member.orig_filename.lower() for member in listed}
    if len(names) < len(listed) or not all(member.filename.startswith(folder) for member in listed):
        raise _ambiguous(path, "two members have the same name, or they lie in several folders")
    members = sorted((_locate(mapped, member, path) for member in listed), key=lambda member: member.start)
    ends = [member.start for member in members[1:]] + [archive.start_dir]
    if any(member.stop > end for member, end in zip(members, ends, strict=True)):
        raise _ambiguous(path, "its members overlap")
    return members


def _directory(mapped: mmap.mmap) -> tuple[int, int]:
    """Return the offset and the number of entries that the last bytes of a zip file without a comment state."""
    end = len(mapped) - 22
    signature, entries, offset, comment = struct.unpack_from("<4s6xH4xIH", mapped, end)
    if signature != b"PK\x05\x06" or comment:
        return -1, 0
    locator, where = struct.unpack_from("<4s4xQ", mapped, max(end - 20, 0))
    if locator != b"PK\x06\x07":
        return offset, entries
    record, entries, offset = struct.unpack_from("<4s28xQ8xQ", mapped, end - 76)
    return (offset, entries) if record == b"PK\x06\x06" and where == end - 76 else (-1, 0)


def _locate(mapped: mmap.mmap, listed: zipfile.ZipInfo, path: AnyFile) -> Member:
    """Return where the bytes of a member lie, if its own header agrees with the directory."""
    if listed.compress_type != zipfile.ZIP_STORED or listed.flag_bits & 1:
        raise _ambiguous(path, f"'{listed.filename}' is compressed or encrypted")
    header = listed.header_offset
    signature, flags, method, checksum, packed, unpacked, name_size, extra_size = struct.unpack_from(
        "<4s2xHH4xIIIHH", mapped, header
    )
    start = header + 30 + name_size + extra_size
    name = mapped[header + 30 : header + 30 + name_size]
    # Sizes and checksum follow the bytes where bit 3 is set; sizes beyond 4 GB stand in the directory only.
    is_deferred = bool(flags & 8)
    sizes_agree = {packed, unpacked} <= {listed.file_size, 0xFFFFFFFF} and checksum == listed.CRC
    if (
        signature != ZIP_START
        or method != zipfile.ZIP_STORED
        or name != listed.orig_filename.encode()
        or listed.compress_size != listed.file_size
        or not (is_deferred or sizes_agree)
    ):
        raise _ambiguous(path, f"the header of '{listed.filename}' and the directory differ")
    return Member(listed.filename, start, start + listed.file_size, listed.CRC)


def _ambiguous(path: AnyFile, reason: str) -> ModelFileError:
    return ModelFileError(
        f"Cannot load '{path}' ({path.stat().st_size} bytes): {reason}. torch does not write such files: it was "
        "damaged or packed again by another program. Copy or save it again."
    )
