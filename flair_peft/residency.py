"""Memory of tensors that are mapped from files: what was read once need not stay in it."""

from __future__ import annotations

import contextvars
import ctypes
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager

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


def page_out(tensor: torch.Tensor) -> None:
    """Give the memory back that a mapped tensor takes until it is read again; see :func:`let_go`."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    first = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first and tensor.is_contiguous():
        # What the kernel cannot reclaim stays, which is no error.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_PAGEOUT)
