"""Rows added to an embedding matrix, without copying the matrix where it is mapped from a file."""

from __future__ import annotations

import json
import logging
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flair_peft.base import transformer
from flair_peft.errors import AdapterConfigError
from flair_peft.primitives import fingerprint, mapped_memory

log = logging.getLogger("flair_peft")

_ROWS_AT_ONCE = 4096
_HEADER_LENGTH = struct.Struct("<Q")


def mean_rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` new rows for a matrix of shape (rows, length): each is the mean of all rows.

    transformers draws new rows from a normal distribution around that mean whose covariance, over all rows, takes
    seconds to compute and is scaled to nearly nothing. Of a matrix that is mapped from a file, a piece at a time is in
    memory.
    """
    is_mapped, total = mapped_memory.is_mapped(matrix), torch.zeros((), device=matrix.device)
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        total = total + matrix[start:end].detach().sum(dim=0, dtype=torch.float32)
        if is_mapped:
            mapped_memory.page_out(matrix[:end])  # from the start: pages can be reclaimed in large groups only
    return (total / len(matrix)).to(matrix.dtype).repeat(count, 1)


def append_rows_(model: PreTrainedModel, rows: torch.Tensor, folder: Path | None) -> None:
    """Append rows, of shape (count, length), to the input embeddings, in place.

    Args:
        model: its other parameters keep their storage.
        rows: for the tokens beyond the vocabulary of the source.
        folder: where the weights were read from, if they were.
    """
    old = model.get_input_embeddings().weight
    holders = [module for module in model.modules() if module._parameters.get("weight") is old]
    if any(type(module) is not torch.nn.Embedding for module in holders):
        start = len(old)  # resizing makes this very parameter longer
        try:
            model.resize_token_embeddings(start + len(rows), mean_resizing=False)
        except (TypeError, NotImplementedError) as error:
            raise AdapterConfigError(
                f"Cannot add a row to the input embeddings of {type(model).__name__}: {transformer.first_line(error)}. "
                "Flair's context separator needs one. Pass use_context_separator=False."
            ) from error
        model.get_input_embeddings().weight.data[start:] = rows
        return
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is old]
    mapped = _mapped(folder, names, old.detach(), rows) if folder is not None and old.device.type == "cpu" else None
    longer = torch.cat([old.detach(), rows.to(old.device, old.dtype)]) if mapped is None else mapped
    new = torch.nn.Parameter(longer, requires_grad=old.requires_grad)
    for module in holders:
        module.weight, module.num_embeddings = new, len(new)
    transformer.text_config(model.config).vocab_size = len(new)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(new)


def _mapped(folder: Path, names: list[str], matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """Return the matrix with the rows, mapped from the file that it was read from, or ``None`` if that is not sure."""
    for path in _weight_files(folder):
        try:
            for offset in _offsets(path, names, matrix):
                mapped = _map(path, offset, matrix, len(rows))
                if mapped is not None and _is_same(mapped[: len(matrix)], matrix):
                    mapped[len(matrix) :] = rows
                    return mapped
        except (OSError, ValueError, LookupError, TypeError, RecursionError, struct.error) as error:
            log.debug("Not mapped from '%s': %s", path, error)  # a copy serves as well
    return None


def _weight_files(folder: Path) -> list[Path]:
    """Return the files that transformers reads the weights from, if these are safetensors."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if not index.is_file():
        return []
    return sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})


def _offsets(path: Path, names: list[str], matrix: torch.Tensor) -> Iterator[int]:
    """Yield where in a safetensors file the matrix stands, under one of its names or one behind a prefix."""
    with path.open("rb") as file:
        (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
        if length > path.stat().st_size:
            return
        entries = json.loads(file.read(length))
    for found, entry in entries.items():
        is_meant = any(found == name or found.endswith(f".{name}") for name in names)
        if is_meant and entry["shape"] == list(matrix.shape):
            start, end = entry["data_offsets"]
            if end - start == matrix.nbytes:
                yield _HEADER_LENGTH.size + length + start


def _is_same(mapped: torch.Tensor, matrix: torch.Tensor) -> bool:
    # The file and the name are right; a sample shows whether the dtype is, without reading a gigabyte.
    return fingerprint.sampled({"": mapped}) == fingerprint.sampled({"": matrix})


def _map(path: Path, offset: int, matrix: torch.Tensor, count: int) -> torch.Tensor | None:
    """Map the matrix from its file, longer by ``count`` rows, or return ``None`` where the file ends too early.

    What follows the matrix in the file shows as the new rows until they are written. The mapping is private: writing
    changes neither the file nor the other tensors, which were mapped apart.
    """
    rows, length = matrix.shape[0] + count, matrix.shape[1]
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    if offset % matrix.itemsize or offset + rows * length * matrix.itemsize > len(mapped):
        return None
    return torch.frombuffer(mapped, dtype=matrix.dtype, count=rows * length, offset=offset).view(rows, length)
