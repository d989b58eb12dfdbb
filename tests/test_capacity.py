"""A base that does not fit the free memory is refused before it is loaded, with both numbers."""

from __future__ import annotations

import gc
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase, backbone, capacity
from flair_peft.errors import InsufficientMemoryError

Memory = namedtuple("Memory", "available")


def size_of(base: str, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of the weights, counted in the model itself."""
    return sum(p.numel() for p in AutoModel.from_pretrained(base).parameters()) * dtype.itemsize


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(size))


def make(base: str, **options: Any) -> PeftTransformerDocumentEmbeddings:
    return PeftTransformerDocumentEmbeddings(base, peft_config=LoraConfig(init_lora_weights=False), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_larger_than_the_free_memory_is_refused_before_it_is_loaded(
    dtype: torch.dtype, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit is the size in the dtype asked for, to the byte, and the message has both sizes."""
    size = size_of(base("bert"), dtype)
    free(monkeypatch, size)
    make(base("bert"), dtype=dtype)
    gc.collect()  # it would be there already
    free(monkeypatch, size - 1)
    monkeypatch.setattr(backbone, "find_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(InsufficientMemoryError, match=f"take {size:,} bytes .* and {size - 1:,} bytes"):
        make(base("bert"), dtype=dtype)
    with pytest.raises(MemoryError):
        SharedBase(base("bert"), dtype=dtype)


def test_base_that_is_there_already_needs_no_memory(
    base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second model on a base adds its adapter only."""
    kept = make(base("bert"))
    free(monkeypatch, 1000)
    assert make(base("bert")).name != kept.name


@pytest.mark.parametrize(
    ("kwargs", "dtype", "share"),
    [
        ({}, None, 1.0),
        ({}, "auto", 1.0),
        ({}, "float16", 0.5),
        ({"load_in_4bit": True}, None, 0.125),
        ({"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}, None, 0.125),
        ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, None, 0.25),
    ],
)
def test_size_follows_dtype_and_quantisation(
    kwargs: dict[str, Any], dtype: str | None, share: float, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quantised bases are counted as if all of their weights were, which they are at least."""
    config, size = AutoConfig.from_pretrained(base("bert")), size_of(base("bert"))
    free(monkeypatch, int(size * share) - 1)
    with pytest.raises(InsufficientMemoryError):
        capacity.check_fits(base("bert"), config, dtype=dtype, kwargs=kwargs, device="cpu")
    free(monkeypatch, int(size * share) + 1)
    capacity.check_fits(base("bert"), config, dtype=dtype, kwargs=kwargs, device="cpu")


def test_sharded_base_is_counted_whole_and_t5_by_its_encoder(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of an index count; of T5, what Flair reads."""
    AutoModel.from_pretrained(base("bert")).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    free(monkeypatch, size_of(base("bert")) - 1)
    with pytest.raises(InsufficientMemoryError):
        capacity.check_fits(str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype=None, kwargs={}, device="cpu")
    embeddings = make(base("bert"), dtype="bfloat16")
    assert embeddings.base_dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs", [{"device_map": "auto"}, {"variant": "fp16"}, {"use_safetensors": False}])
def test_base_that_others_place_or_that_is_no_safetensors_is_left_to_them(
    kwargs: dict[str, Any], base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate counts for itself, and pickles have no header."""
    free(monkeypatch, 0)
    config = AutoConfig.from_pretrained(base("bert"))
    capacity.check_fits(base("bert"), config, dtype=None, kwargs=kwargs, device="cpu")
    capacity.check_fits("nobody/nothing", config, dtype=None, kwargs={}, device="cpu")
