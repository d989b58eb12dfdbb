"""Digests of weights: one that is quick to take from mapped files, and one that reads every byte."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from flair_peft.primitives import mapped_memory, progress
from flair_peft.primitives.mapped_memory import FilePages

# Of each tensor this many runs of this many elements are read, spread evenly: training changes nearly every element.
_RUNS, _RUN_LENGTH = 16, 64
_PIECE = 1 << 24

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.int64}

Tensors = Mapping[str, torch.Tensor]


def sampled(tensors: Tensors) -> str:
    """Return a digest of all names, shapes and dtypes, and of a sample of each tensor's elements.

    It reads a few pages of each tensor, so weights mapped from a file stay on disk. It tells re-trained weights, not a
    single changed one; :func:`full` does.
    """
    return sampled_and_part(tensors, ())[0]


def full(tensors: Tensors) -> str:
    """Return a digest of all names, shapes, dtypes and elements."""
    return full_and_part(tensors, ())[0]


def sampled_and_part(tensors: Tensors, names: Collection[str]) -> tuple[str, str]:
    """Return what :func:`sampled` does, and the same of the tensors named alone; each is read once."""
    return _digests(tensors, names, lambda tensor: [_sample(tensor)])


def full_and_part(tensors: Tensors, names: Collection[str]) -> tuple[str, str]:
    """Return what :func:`full` does, and the same of the tensors named alone; each is read once."""
    return _digests(tensors, names, _pieces)


def of_tensor(tensor: torch.Tensor) -> str:
    """Return a digest of shape, dtype and all elements of one tensor."""
    return full({"": tensor})


def of_file(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def not_finite(tensors: Tensors) -> list[str]:
    """Return the names of the tensors that hold NaN or infinite numbers."""
    return [name for name, tensor in tensors.items() if not all(map(_is_finite, _pieces(tensor.detach())))]


def _digests(
    tensors: Tensors, names: Collection[str], parts: Callable[[torch.Tensor], Iterable[torch.Tensor]]
) -> tuple[str, str]:
    of_all, of_part = hashlib.sha256(), hashlib.sha256()
    for name in sorted(tensors):
        tensor, digests = tensors[name].detach(), [of_all, of_part] if name in names else [of_all]
        for digest in digests:
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        for part in parts(tensor):
            _feed(digests, part)
            progress.advance(part.nbytes)
        mapped_memory.let_go(tensor)
    return of_all.hexdigest(), of_part.hexdigest()


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor.reshape(-1)
    if flat.numel() <= _RUNS * _RUN_LENGTH:
        return flat
    step = (flat.numel() - _RUN_LENGTH) // (_RUNS - 1)
    return flat.as_strided((_RUNS, _RUN_LENGTH), (step, 1), flat.storage_offset()).reshape(-1)


def _pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.reshape(-1)
    for start in range(0, flat.numel(), _PIECE):
        yield flat[start : start + _PIECE]


def _is_finite(flat: torch.Tensor) -> bool:
    # torch cannot tell it of all numbers of 8 bits.
    return bool((flat.float() if flat.itemsize == 1 else flat).isfinite().all())


def _feed(digests: Iterable[Any], flat: torch.Tensor) -> None:
    plain = flat.contiguous().cpu()
    if plain.nbytes:
        # NumPy's view could be written to, and for that torch would copy memory that is copied on write.
        content = (ctypes.c_char * plain.nbytes).from_address(mapped_memory.address(plain))
        for digest in digests:
            digest.update(content)


def comparer(pages: FilePages) -> Callable[[torch.Tensor, torch.Tensor], bool]:
    """Return :func:`are_same_bits`, but one that does not read what two tensors show of the same file."""

    def are_same(first: torch.Tensor, second: torch.Tensor) -> bool:
        is_same = pages.is_same_part(first, second)
        return are_same_bits(first, second) if is_same is None else is_same

    return are_same


def are_same_bits(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bits."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    second = second.to(first.device)
    if first.dim() == 0 or not first.numel():
        return bool((first == second).all())
    as_integers = _INTEGERS[first.itemsize]
    return torch.equal(first.detach().contiguous().view(as_integers), second.detach().contiguous().view(as_integers))
