"""What a torch file would become if it were loaded, as plain containers and stand-ins that do nothing."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flair_peft.errors import ModelFileError
from flair_peft.primitives.held_file import AnyFile, HeldFile, held
from flair_peft.torchfile import scan
from flair_peft.torchfile.pickle_opcodes import follow
from flair_peft.torchfile.stand_ins import ITEM_BYTES, Made, MalformedPickleError, Storage, Tensor

if TYPE_CHECKING:
    import torch

_LARGEST_PICKLE = 256 << 20
_MOST_TENSORS = 100_000
_LONGEST_PLACE = 1_000
_END = object()

_OLD_MAGIC = 0x1950A86A20F9469CFC6C
_PICKLES_OF_OLD_FILES = 5


@dataclass(frozen=True)
class Outline:
    """What a torch file would become if it were loaded, with stand-ins for tensors and objects.

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
        import torch

        size, dtype = ITEM_BYTES[tensor.dtype], getattr(torch, tensor.dtype)
        last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.strides, strict=True))
        count = 0 if 0 in tensor.shape else last + 1
        start, stop = self.places.get(tensor.storage.key, (0, 0))
        begin = start + tensor.offset * size
        if begin + count * size > stop:
            raise scan.unreadable(self.path, f"the bytes of the tensor '{tensor.storage.key}' are not all there")
        if not count:
            return torch.empty(tensor.shape, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(begin)
            content = bytearray(file.read(count * size))
        if len(content) != count * size:
            raise scan.unreadable(self.path, "it was cut off while it was read")
        return torch.frombuffer(content, dtype=dtype).as_strided(tensor.shape, tensor.strides)


def read_outline(path: AnyFile) -> Outline:
    """Return what a torch file, zipped or old-style, would become; the bytes of its tensors are not read.

    Raises:
        ModelFileError: it is no torch file, is damaged, or is larger than any model.
    """
    path = held(path)
    try:
        return _read_zipped(path) if scan.is_zip(path) else _read_old(path)
    except MalformedPickleError as error:
        raise scan.unreadable(path, str(error)) from error
    except ModelFileError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError, struct.error) as error:
        raise scan.unreadable(
            path, f"its pickle does not make sense ({type(error).__name__}: {str(error)[:80]})"
        ) from error


def _read_zipped(path: HeldFile) -> Outline:
    members = {member.name.partition("/")[2]: member for member in scan.stored_members(path)}
    pickled = members.get("data.pkl")
    if pickled is None or pickled.stop - pickled.start > _LARGEST_PICKLE:
        raise scan.unreadable(path, "there is no pickle of a model in it")
    _check_order(path, members.get("byteorder"))
    with path.open("rb") as file:
        file.seek(pickled.start)
        buffer = file.read(pickled.stop - pickled.start)
    places = {name[5:]: (member.start, member.stop) for name, member in members.items() if name.startswith("data/")}
    return Outline(path, follow(scan.Operations(buffer, 0), buffer), places)


def _check_order(path: AnyFile, member: scan.Member | None) -> None:
    if member is not None:
        with path.open("rb") as file:
            file.seek(member.start)
            if file.read(min(member.stop - member.start, 10)) != b"little":
                raise scan.unreadable(path, "its numbers are in another byte order than this machine's")


def _read_old(path: HeldFile) -> Outline:
    if path.stat().st_size == 0:
        raise scan.unreadable(path, "it is empty")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        found, end = [], 0
        for _ in range(_PICKLES_OF_OLD_FILES):
            operations = scan.Operations(mapped, end)
            found.append(follow(operations, mapped))
            end = operations.end
            if found[0] != _OLD_MAGIC:  # one pickle alone
                return Outline(path, found[0], {})
        value, keys = found[3:]
        known = {tensor.storage.key: tensor.storage for tensor in tensors_in(value).values()}
        return Outline(path, value, _places_in_row(mapped, end, keys, known))


def _places_in_row(mapped: mmap.mmap, end: int, keys: Any, known: Mapping[str, Storage]) -> dict[str, tuple[int, int]]:
    """Return where the storages of an old-style file lie: each is its number of elements and then these."""
    places = {}
    for key in keys:
        (count,) = struct.unpack_from("<q", mapped, end)
        start = end + 8
        end = start + count * ITEM_BYTES[known[key].dtype]
        if count < 0 or end > len(mapped):
            raise MalformedPickleError("the file ends before its tensors do")
        places[key] = (start, end)
    return places


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
            raise MalformedPickleError("it has more tensors, or more levels, than any model of Flair")
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
                    raise MalformedPickleError("the name of a tensor in it is longer than any")
                yield f"{around}{key}", item
