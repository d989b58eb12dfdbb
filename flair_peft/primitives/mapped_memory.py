"""Memory that nobody needs any more, and that stays with the process until it is given back."""

from __future__ import annotations

import bisect
import ctypes
import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch

from flair_peft.primitives.load_context import load_options

# Of Linux 5.4 and later: reclaims pages without changing what is in them.
_MADV_PAGEOUT = 21

# Of an entry in Linux's list of pages: the page is in memory or swapped out, and it is the file's own.
_PAGE_EXISTS, _PAGE_IS_OF_FILE = np.uint64(3 << 62), np.uint64(1 << 61)


def let_go(tensor: torch.Tensor) -> None:
    """Give the memory back that reading a mapped tensor took, where that is asked for; its values stay.

    They are read from the file again when they are needed. Elsewhere than on Linux nothing happens.
    """
    if load_options().is_sparing:
        page_out(tensor)


class _Mapping(NamedTuple):
    """A part of this process's memory that is a part of a file: Linux lists these in the order of their places."""

    first: int
    last: int
    offset: int
    file: tuple[str, str]
    path: str


def address(tensor: torch.Tensor) -> int:
    """Return where a tensor's memory starts. ``data_ptr`` would first copy memory that is copied once it is written."""
    of_storage = torch._C._data_address(tensor)  # type: ignore[attr-defined]
    return int(of_storage + tensor.storage_offset() * tensor.itemsize)


def is_copied_on_write(tensor: torch.Tensor) -> bool:
    """Whether torch copies the tensor's memory before it is written to, or read by what might write."""
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def lent(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor for somebody who reads it as if he might write: what is copied on write stays as it is."""
    return tensor.detach()._lazy_clone() if is_copied_on_write(tensor) else tensor


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is that of a file, which the system can drop and read again; known on Linux only."""
    return tensor.device.type == "cpu" and _mapping_of(tensor, _mappings()) is not None


def map_again(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return each tensor as another private mapping of the file that it is mapped from; ``None`` where it is not.

    The system holds the pages of the file once, for all mappings, and copies one when it is written to, whoever writes.
    What was written to the tensors before is written to the new ones.
    """
    known = _mappings()
    found = [_mapping_of(tensor, known) for tensor in tensors]
    # One for each old one: of two mappings of a file, one can show in a place what the other does not.
    anew = {each: _map(each.path) for each in set(found) if each is not None}
    files = {each.first: each.file for each in _mappings()}
    # Another file can have the name now.
    same = {old: new for old, new in anew.items() if new is not None and files.get(new.data_ptr()) == old.file}
    return [
        _again(tensor, each, same[each]) if each is not None and each in same else None
        for tensor, each in zip(tensors, found, strict=True)
    ]


def _mappings() -> list[_Mapping]:
    if sys.platform != "linux":
        return []
    lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    fields = (line.split(maxsplit=5) for line in lines)
    spans = ((each[0].split("-"), each) for each in fields if len(each) == 6 and each[4] != "0")
    return [
        _Mapping(int(first, 16), int(last, 16), int(each[2], 16), (each[3], each[4]), each[5])
        for (first, last), each in spans
    ]


def _mapping_of(tensor: torch.Tensor, known: Sequence[_Mapping]) -> _Mapping | None:
    if tensor.device.type != "cpu" or not tensor.numel():
        return None
    index = bisect.bisect_right(known, address(tensor), key=lambda each: each.first) - 1
    is_inside = index >= 0 and address(tensor) + tensor.nbytes <= known[index].last
    return known[index] if is_inside else None


def _map(path: str) -> torch.UntypedStorage | None:
    try:
        return cast("torch.UntypedStorage", torch.UntypedStorage.from_file(path, False, Path(path).stat().st_size))
    except (OSError, RuntimeError):
        return None


def _again(tensor: torch.Tensor, old: _Mapping, whole: torch.UntypedStorage) -> torch.Tensor | None:
    written, first = _written(tensor), address(tensor) - old.first + old.offset
    if written is None or not tensor.is_contiguous() or first + tensor.nbytes > len(whole):
        return None
    part: torch.UntypedStorage = whole[first : first + tensor.nbytes]
    again = torch.empty(0, dtype=tensor.dtype).set_(part, 0, tensor.shape, tensor.stride())
    for start, end in written:
        again.view(-1).view(torch.uint8)[start:end] = tensor.view(-1).view(torch.uint8)[start:end]
    return again


def _written(tensor: torch.Tensor) -> list[tuple[int, int]] | None:
    """Return first and last byte of those pages of a mapped tensor that are not the file's any more."""
    start, size = address(tensor), mmap.PAGESIZE
    first, last = start // size, -(-(start + tensor.nbytes) // size)
    try:
        with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (last - first)), dtype=np.uint64)
    except OSError:
        return None
    if len(entries) != last - first:
        return None
    pages = np.flatnonzero((entries & _PAGE_EXISTS != 0) & (entries & _PAGE_IS_OF_FILE == 0))
    spans = ((int(first + page) * size - start, int(first + page + 1) * size - start) for page in pages)
    return [(max(0, begin), min(end, tensor.nbytes)) for begin, end in spans]


def is_file_mapped(path: Path) -> bool:
    """Whether memory of this process may be that of a file, so that writing into the file would change it."""
    if sys.platform != "linux":
        return True
    # Overlays show the number of another file, and some file systems another path.
    marks = {str(path.stat().st_ino), os.path.realpath(path)}
    return any(not marks.isdisjoint((mapping.file[1], mapping.path)) for mapping in _mappings())


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
