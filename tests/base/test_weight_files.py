"""Which files hold the weights of a base, and what their headers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from flair_peft.base import weight_files

WEIGHTS = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.zeros(5, dtype=torch.int8)}


def write_weights(folder: Path, name: str) -> None:
    """Write a file of weights, or the index of one file for each."""
    folder.mkdir(exist_ok=True)
    if name.endswith(".json"):
        ending = "safetensors" if "safetensors" in name else "bin"
        files = {key: f"part-{key}.{ending}" for key in WEIGHTS}
        (folder / name).write_text(json.dumps({"weight_map": files}))
        for key, file in files.items():
            _write(folder / file, {key: WEIGHTS[key]})
    else:
        _write(folder / name, WEIGHTS)


def _write(path: Path, weights: dict[str, torch.Tensor]) -> None:
    if path.suffix == ".safetensors":
        save_file(weights, path, metadata={"format": "pt"})
    else:
        torch.save(weights, path)


@pytest.mark.parametrize(
    ("names", "kwargs", "expected"),
    [
        (weight_files.NAMES, {}, ["model.safetensors"]),
        (weight_files.NAMES[1:], {}, ["part-a.safetensors", "part-b.safetensors"]),
        (weight_files.NAMES[2:], {}, ["pytorch_model.bin"]),
        (weight_files.NAMES[3:], {}, ["part-a.bin", "part-b.bin"]),
        (weight_files.NAMES, {"use_safetensors": False}, ["pytorch_model.bin"]),
        (weight_files.NAMES[2:], {"use_safetensors": True}, []),
        (("model.fp16.safetensors", "model.safetensors"), {"variant": "fp16"}, ["model.fp16.safetensors"]),
        (("model.safetensors",), {"variant": "fp16"}, []),
        ((), {}, []),
    ],
)
@pytest.mark.parametrize("subfolder", [None, "inner"])
def test_weight_files_found_are_those_that_transformers_reads(
    names: tuple[str, ...], kwargs: dict[str, Any], expected: list[str], subfolder: str | None, tmp_path: Path
) -> None:
    """The first kind that is there is read, of the variant and in the folder that were asked for."""
    folder = tmp_path / (subfolder or "")
    for name in names:
        write_weights(folder, name)
    kwargs = {**kwargs, "subfolder": subfolder}
    assert weight_files.find(str(tmp_path), kwargs) == [folder / name for name in expected]
    assert weight_files.names_of_weights(str(tmp_path), kwargs) == (sorted(WEIGHTS) if expected else [])


def test_weight_files_that_are_damaged_name_no_weights(tmp_path: Path) -> None:
    """Who loads them says what is wrong with them."""
    (tmp_path / "model.safetensors").write_bytes(b"none")
    assert weight_files.names_of_weights(str(tmp_path), {}) == []


def test_header_says_of_each_tensor_what_the_tensor_is(tmp_path: Path) -> None:
    """Names, shapes and sizes of numbers are those of the tensors, which are not read."""
    dtypes = [torch.float64, torch.float32, torch.float16, torch.int16, torch.uint32, torch.bool, torch.float8_e4m3fn]
    weights = {**WEIGHTS, **{str(dtype): torch.zeros(4, 1, 2).to(dtype) for dtype in dtypes}}
    save_file(weights, tmp_path / "model.safetensors")
    found = {entry.name: entry for entry in weight_files.read_header(tmp_path / "model.safetensors")}
    assert found.keys() == weights.keys()
    for name, tensor in weights.items():
        assert (found[name].shape, found[name].itemsize) == (tuple(tensor.shape), tensor.itemsize)
        assert found[name].numbers == tensor.numel()
    assert weight_files.Entry("x", "F4", (8,)).itemsize == 0.5
