"""Memory that nobody needs any more, and that stays with the process until it is given back."""

from __future__ import annotations

import contextvars
import ctypes
import mmap
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

# Of Linux 5.4 and later: reclaims pages without changing what is in them.
_MADV_PAGEOUT = 21

_is_sparing: contextvars.ContextVar[bool] = contextvars.ContextVar("flair_peft_is_sparing", default=False)


@contextmanager
def sparing() -> Iterator[None]:
    """Inside, :func:`let_go` lets go: for work that reads gigabytes once, tensor by tensor."""
    token = _is_sparing.set(True)
    try:
        yield
    finally:
        _is_sparing.reset(token)


def let_go(tensor: torch.Tensor) -> None:
    """Give the memory back that reading a mapped tensor took, where that is asked for; its values stay.

    They are read from the file again when they are needed. Elsewhere than on Linux nothing happens.
    """
    if _is_sparing.get():
        page_out(tensor)


def is_mapped(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is that of a file, which the system can drop and read again; known on Linux only."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return False
    for span, _, _, _, inode, *_ in _mappings():
        first, last = (int(address, 16) for address in span.split("-"))
        if first <= tensor.data_ptr() < last:
            return inode != "0"
    return False


def is_file_mapped(path: Path) -> bool:
    """Whether memory of this process may be that of a file, so that writing into the file would change it."""
    if sys.platform != "linux":
        return True
    # Overlays show the number of another file, and some file systems another path.
    marks = {str(path.stat().st_ino), os.path.realpath(path)}
    return any(not marks.isdisjoint(mapping[4:]) for mapping in _mappings())


def _mappings() -> list[list[str]]:
    """Return address, permissions, offset, device, inode and path of all that is mapped into this process."""
    text = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace")
    return [line.split(maxsplit=5) for line in text.splitlines()]


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
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and tensor.is_contiguous():
        # What the kernel cannot reclaim stays, which is no error.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)
