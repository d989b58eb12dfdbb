"""Digests of weights: what they are of, wherever in memory the weights lie."""

from __future__ import annotations

import hashlib

import pytest
import torch

from flair_peft.primitives import fingerprint, host_internals


def expected(tensors: dict[str, torch.Tensor]) -> str:
    """Return the digest by its definition, of bytes that torch copies out."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
        digest.update(bytes(tensor.clone().contiguous().view(torch.uint8).flatten().tolist()))
    return digest.hexdigest()


WHERE = {
    "alone": lambda matrix: matrix.clone(),
    "behind others": lambda matrix: torch.cat([matrix, matrix + 1])[len(matrix) :],
    "transposed": lambda matrix: matrix.T,
    "copied on write": torch._lazy_clone,
    "a part of what is copied on write": lambda matrix: torch._lazy_clone(matrix)[2:],
}


@pytest.mark.parametrize("piece", [7, 1 << 24])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
@pytest.mark.parametrize("where", WHERE)
def test_full_digest_is_of_every_byte_wherever_a_tensor_lies(
    where: str, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Views of a larger tensor, and tensors that are read in several pieces, are read from where they begin."""
    monkeypatch.setattr(fingerprint, "_PIECE", piece)
    matrix = WHERE[where](torch.arange(60).reshape(6, 10).to(dtype))
    tensors = {"b": matrix, "a": torch.ones(3, dtype=dtype)}
    assert fingerprint.full(tensors) == expected(tensors)
    of_all, of_part = fingerprint.full_and_part(tensors, {"a"})
    assert (of_all, of_part) == (expected(tensors), expected({"a": tensors["a"]}))
    assert host_internals.is_copied_on_write(matrix) == ("copied" in where)  # reading copies nothing


def test_sampled_digest_of_a_view_is_that_of_its_copy() -> None:
    """Where in memory a tensor lies is no part of it."""
    whole = torch.arange(40_000.0)
    assert fingerprint.sampled({"": whole[10_000:30_000]}) == fingerprint.sampled({"": whole[10_000:30_000].clone()})
