"""Rows added to an embedding matrix, without copying the matrix where it is mapped from a file."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from flair_peft import fingerprint

_HEADER_LENGTH = struct.Struct("<Q")


def mean_rows(matrix: torch.Tensor, count: int) -> torch.Tensor:
    """Return ``count`` new rows for a matrix of shape (rows, length): each is the mean of all rows.

    transformers draws new rows from a normal distribution around that mean whose covariance, over all rows, takes
    seconds to compute and is scaled to nearly nothing.
    """
    with torch.no_grad():
        return matrix.float().mean(dim=0).to(matrix.dtype).repeat(count, 1)


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
        model.resize_token_embeddings(len(old) + len(rows), mean_resizing=False)
        model.get_input_embeddings().weight.data[len(old) :] = rows
        return
    new = torch.nn.Parameter(_extended(old.detach(), rows, folder), requires_grad=old.requires_grad)
    for module in holders:
        module.weight, module.num_embeddings = new, len(new)
    model.config.get_text_config().vocab_size = len(new)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(new)


def _extended(matrix: torch.Tensor, rows: torch.Tensor, folder: Path | None) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")) if folder is not None and matrix.device.type == "cpu" else ():
        for offset in _offsets(path, matrix):
            mapped = _map(path, offset, matrix, len(rows))
            if mapped is not None and fingerprint.sampled({"": mapped[: len(matrix)]}) == fingerprint.sampled(
                {"": matrix}
            ):
                mapped[len(matrix) :] = rows
                return mapped
    return torch.cat([matrix, rows.to(matrix.device, matrix.dtype)])


def _offsets(path: Path, matrix: torch.Tensor) -> Iterator[int]:
    """Yield where in a safetensors file there are tensors of the shape and size of the matrix."""
    with path.open("rb") as file:
        (length,) = _HEADER_LENGTH.unpack(file.read(_HEADER_LENGTH.size))
        entries = json.loads(file.read(length))
    for name, entry in entries.items():
        if name != "__metadata__" and entry["shape"] == list(matrix.shape):
            start, end = entry["data_offsets"]
            if end - start == matrix.nbytes:
                yield _HEADER_LENGTH.size + length + start


def _map(path: Path, offset: int, matrix: torch.Tensor, count: int) -> torch.Tensor | None:
    """Map the matrix from its file, longer by ``count`` rows, or return ``None`` where the file ends too early.

    What follows the matrix in the file shows as the new rows until they are written. The mapping is private: writing
    changes neither the file nor the other tensors, which were mapped apart.
    """
    rows, length = matrix.shape[0] + count, matrix.shape[1]
    size = path.stat().st_size
    if offset % matrix.itemsize or offset + rows * length * matrix.itemsize > size:
        return None
    storage: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=size)
    tensor = torch.empty(0, dtype=matrix.dtype)
    return tensor.set_(storage, offset // matrix.itemsize, (rows, length), (length, 1))
