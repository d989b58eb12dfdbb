"""Memory that is mapped from files: which file a tensor is in, mapping it once more, and giving its pages back.

What is known of mappings is known on Linux; elsewhere no tensor counts as mapped.
"""

from __future__ import annotations

import bisect
import ctypes
import math
import mmap
import os
import re
import sys
from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch

from flair_peft.primitives import host_internals
from flair_peft.primitives.load_context import load_options

# Of Linux 5.4 and later: reclaims pages without changing what is in them.
_MADV_PAGEOUT = 21

# Of an entry in Linux's list of pages: the page is in memory or swapped out, and it is the file's own.
_PAGE_EXISTS, _PAGE_IS_OF_FILE = np.uint64(3 << 62), np.uint64(1 << 61)

# Of the entries of so many pages: they stay in the processor's cache.
_PAGES_AT_ONCE = 1 << 13

# A line of Linux's list of mappings that is of a file.
_LISTED = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (\S+ [1-9][0-9]*) +(.+)")


def let_go(tensor: torch.Tensor) -> None:
    """Give the memory back that reading a mapped tensor took, where that is asked for; its values stay.

    They are read from the file again when they are needed. Elsewhere than on Linux nothing happens.
    """
    if load_options().is_sparing:
        page_out(tensor)


class _Mapping(NamedTuple):
    """A part of this process's memory that is a part of a file, which its device and number name."""

    first: int
    last: int
    offset: int
    file: bytes
    path: str


class _Mappings:
    """This process's memory as Linux listed it when this was made; empty elsewhere.

    Of some thousand lines few are asked for, so that each is read when it is.
    """

    def __init__(self) -> None:
        listed = Path("/proc/self/maps").read_bytes() if sys.platform == "linux" else b""
        self._lines = [line for line in listed.split(b"\n") if line]  # a name may have other ends of lines in it
        self._last: _Mapping | None = None

    def __iter__(self) -> Iterator[_Mapping]:
        """Return an iterator over all parts that are parts of files."""
        return filter(None, map(_read, self._lines))

    def of(self, tensor: torch.Tensor) -> _Mapping | None:
        """Return the part of a file that a tensor's memory is."""
        if tensor.device.type != "cpu" or not tensor.numel():
            return None
        start = address(tensor)
        found = self.at(start)
        return found if found is not None and start + tensor.nbytes <= found.last else None

    def at(self, place: int) -> _Mapping | None:
        """Return the part of a file that begins at an address or last before it."""
        if self._last is None or not self._last.first <= place < self._last.last:
            index = bisect.bisect_right(self._lines, place, key=_start) - 1
            self._last = _read(self._lines[index]) if index >= 0 else None
        return self._last


def _start(line: bytes) -> int:
    return int(line[: line.index(b"-")], 16)


def _read(line: bytes) -> _Mapping | None:
    found = _LISTED.fullmatch(line)
    if found is None:
        return None
    first, last, offset, file, path = found.groups()
    return _Mapping(int(first, 16), int(last, 16), int(offset, 16), file, os.fsdecode(path))


def address(tensor: torch.Tensor) -> int:
    """Return where a tensor's memory starts. ``data_ptr`` would first copy memory that is copied once it is written."""
    return host_internals.storage_address(tensor) + int(tensor.storage_offset()) * tensor.itemsize


def place_of(tensor: torch.Tensor) -> Hashable:
    """Return what only tensors have in common that hold the same elements in the same memory, as long as they live."""
    return address(tensor), tensor.device, tensor.dtype, tensor.shape, tensor.stride()


def lent(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor for somebody who reads it as if he might write: what is copied on write stays as it is."""
    return host_internals.lazy_clone(tensor.detach()) if host_internals.is_copied_on_write(tensor) else tensor


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is that of a file, which the system can drop and read again; known on Linux only."""
    return tensor.device.type == "cpu" and _Mappings().of(tensor) is not None


def map_again(tensors: Sequence[torch.Tensor], *, more_rows: int = 0) -> list[torch.Tensor | None]:
    """Return each tensor as another private mapping of the file that it is mapped from; ``None`` where it is not.

    The system holds the pages of the file once, for all mappings, and copies one when it is written to, whoever writes.
    What was written to the tensors before is written to the new ones.

    Args:
        tensors: on any device.
        more_rows: that the new ones have behind those of the old; what follows in the file shows there until they are
            written, and where the file ends too early there is no mapping.
    """
    known = _Mappings()
    found = [known.of(tensor) for tensor in tensors]
    # One for each old one: of two mappings of a file, one can show in a place what the other does not.
    anew = {each: _map(each.path) for each in set(found) if each is not None}
    now = _Mappings() if anew else known
    # Another file can have the name now.
    same = {old: new for old, new in anew.items() if new is not None and _file_at(new.data_ptr(), now) == old.file}
    # The limits of what is built from a file look at each call of torch, and nothing is made here.
    with _page_table() as table, torch._C.DisableTorchFunction():
        return [
            _again(tensor, each, same[each], table, more_rows) if each is not None and each in same else None
            for tensor, each in zip(tensors, found, strict=True)
        ]


def to_read_once(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return the tensors for somebody who reads them once: the pages of a file that he reads go with what is returned.

    Of a mapping that stays, pages stay too, and the system counts them for each mapping.
    """
    mapped = map_again([tensor.detach() for tensor in tensors])
    return [tensor if again is None else again for tensor, again in zip(tensors, mapped, strict=True)]


class FilePages:
    """The memory of this process that shows files, as Linux has it by now; each mapping is asked about once."""

    def __init__(self) -> None:
        self._known = _Mappings()
        self._written: dict[_Mapping, list[int] | None] = {}

    def show(self, tensors: Iterable[torch.Tensor], files: Iterable[Path]) -> bool:
        """Whether all tensors show these files, which are where they were, and nobody has written to any of them since.

        It is Linux that says so, page by page, whoever wrote and however; nothing else proves it, and nothing is read.
        """
        found, paths = [(self._known.of(t), t) for t in tensors], {os.path.realpath(file) for file in files}
        are_there = (each is not None and each.path in paths and Path(each.path).exists() for each in dict(found))
        return all(are_there) and all(each and self._written_in(t, each) == [] for each, t in found)

    def is_same_part(self, first: torch.Tensor, second: torch.Tensor) -> bool | None:
        """Whether two tensors that show the same part of a file have the same bits; ``None`` if they show others.

        Nothing is read but the pages that were written to.
        """
        mapped = (self._known.of(first), self._known.of(second))
        if mapped[0] is None or mapped[1] is None or _part_of(first, mapped[0]) != _part_of(second, mapped[1]):
            return None
        written = (self._written_in(first, mapped[0]), self._written_in(second, mapped[1]))
        if written[0] is None or written[1] is None or not first.is_contiguous():
            return None
        one, other = (tensor.view(-1).view(torch.uint8) for tensor in (first, second))
        return all(torch.equal(one[start:end], other[start:end]) for start, end in {*written[0], *written[1]})

    def _written_in(self, tensor: torch.Tensor, mapping: _Mapping) -> list[tuple[int, int]] | None:
        """Return the parts of a tensor that are not its file's any more, in bytes; ``None`` if nobody can say."""
        if mapping not in self._written:
            with _page_table() as table:
                self._written[mapping] = _pages_written(mapping.first, mapping.last, table)
        return _parts_in(tensor, self._written[mapping])


def _part_of(tensor: torch.Tensor, mapping: _Mapping) -> Any:
    """Return which file shows in a tensor, from where on and how."""
    offset = address(tensor) - mapping.first + mapping.offset
    return mapping.file, offset, tensor.dtype, tensor.shape, tensor.stride()


def _file_at(place: int, known: _Mappings) -> bytes | None:
    found = known.at(place)
    return found.file if found is not None and found.first == place else None


def _map(path: str) -> torch.UntypedStorage | None:
    try:
        return cast("torch.UntypedStorage", torch.UntypedStorage.from_file(path, False, Path(path).stat().st_size))
    except (OSError, RuntimeError):
        return None


@contextmanager
def _page_table() -> Iterator[int | None]:
    """Yield a descriptor of Linux's list of this process's pages; ``None`` where there is none to be read."""
    try:
        descriptor = os.open("/proc/self/pagemap", os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _again(
    tensor: torch.Tensor, old: _Mapping, whole: torch.UntypedStorage, table: int | None, more_rows: int
) -> torch.Tensor | None:
    start, first = address(tensor), address(tensor) - old.first + old.offset
    written = _parts_in(tensor, _pages_written(start, start + tensor.nbytes, table))
    shape = (len(tensor) + more_rows, *tensor.shape[1:]) if more_rows else tensor.shape
    last = first + math.prod(shape) * tensor.itemsize
    if written is None or not tensor.is_contiguous() or last > len(whole):
        return None
    again = torch.empty(0, dtype=tensor.dtype).set_(whole[first:last], 0, shape, tensor.stride())
    for start, end in written:
        again.view(-1).view(torch.uint8)[start:end] = tensor.view(-1).view(torch.uint8)[start:end]
    return again


def _parts_in(tensor: torch.Tensor, pages: list[int] | None) -> list[tuple[int, int]] | None:
    """Return first and last byte, in a tensor, of those of the pages that it is on."""
    start, end, size = address(tensor), address(tensor) + tensor.nbytes, mmap.PAGESIZE
    if pages is None:
        return None
    own = pages[bisect.bisect_left(pages, start // size) : bisect.bisect_left(pages, -(-end // size))]
    return [(max(start, page * size) - start, min((page + 1) * size, end) - start) for page in own]


def _pages_written(start: int, end: int, table: int | None) -> list[int] | None:
    """Return the numbers of those pages of mapped memory that are not the file's any more; ``None`` if unknown."""
    first, last = start // mmap.PAGESIZE, -(-end // mmap.PAGESIZE)
    entries, found = np.empty(min(_PAGES_AT_ONCE, last - first), dtype=np.uint64), list[int]()
    for page in range(first, last, _PAGES_AT_ONCE):
        some = entries[: last - page]
        try:
            size = 0 if table is None else os.preadv(table, [some.data], 8 * page)
        except OSError:
            return None
        if size != some.nbytes:
            return None
        is_written = (some & _PAGE_EXISTS != 0) & (some & _PAGE_IS_OF_FILE == 0)
        found += (page + np.flatnonzero(is_written)).tolist()
    return found


def is_file_mapped(path: Path) -> bool:
    """Whether memory of this process may be that of a file, so that writing into the file would change it."""
    if sys.platform != "linux":
        return True
    # Overlays show the number of another file, and some file systems another path.
    marks = {b"%d" % path.stat().st_ino, os.path.realpath(path)}
    return any(not marks.isdisjoint((mapping.file.split()[1], mapping.path)) for mapping in _Mappings())


def give_back_freed() -> None:
    """Give back what was freed and what the C library keeps for later: a copy of a base, layer by layer, is much.

    Elsewhere than with glibc nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def page_out(tensor: torch.Tensor) -> None:
    """Give the memory back that a mapped tensor takes until it is read again; see :func:`let_go`."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = -(-address(tensor) // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address(tensor) + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and tensor.is_contiguous():
        # What the kernel cannot reclaim stays, which is no error.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)
