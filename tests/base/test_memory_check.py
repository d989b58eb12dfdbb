"""A base that does not fit the free memory is refused before it is loaded, with both numbers."""

from __future__ import annotations

import gc
import shutil
from collections import namedtuple
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.base import base_cache, memory_check, transformer
from flair_peft.errors import InsufficientMemoryError
from flair_peft.primitives.base_record import BaseRecord
from tests.support.configs import lora
from tests.support.zoo import ZOO

Memory = namedtuple("Memory", "available")


def size_of(base: str, dtype: torch.dtype = torch.float32) -> int:
    """Return the bytes of the weights, counted in the model itself."""
    return sum(p.numel() for p in AutoModel.from_pretrained(base).parameters()) * dtype.itemsize


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: Memory(size))


def make(base: str, **options: Any) -> PeftTransformerDocumentEmbeddings:
    return PeftTransformerDocumentEmbeddings(base, peft_config=lora(), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_larger_than_the_free_memory_is_refused_before_it_is_loaded(
    dtype: torch.dtype, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The limit is the size in the dtype asked for, to the byte, and the message has both sizes."""
    own = str(shutil.copytree(base("bert"), tmp_path / "own"))  # which no model of another test stands on
    size = size_of(own, dtype)
    free(monkeypatch, size)
    make(own, dtype=dtype)
    gc.collect()  # it would be there already
    free(monkeypatch, size - 1)
    monkeypatch.setattr(transformer, "find_model", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(InsufficientMemoryError, match=f"take {size:,} bytes .* and {size - 1:,} bytes"):
        make(own, dtype=dtype)
    with pytest.raises(MemoryError):
        SharedBase(own, dtype=dtype)


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
        memory_check.check_fits(base("bert"), config, dtype=dtype, kwargs=kwargs, device="cpu")
    free(monkeypatch, int(size * share) + 1)
    memory_check.check_fits(base("bert"), config, dtype=dtype, kwargs=kwargs, device="cpu")


def test_sharded_base_is_counted_whole_and_t5_by_its_encoder(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All files of an index count; of T5, what Flair reads."""
    AutoModel.from_pretrained(base("bert")).save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    free(monkeypatch, size_of(base("bert")) - 1)
    with pytest.raises(InsufficientMemoryError):
        memory_check.check_fits(
            str(tmp_path), AutoConfig.from_pretrained(tmp_path), dtype=None, kwargs={}, device="cpu"
        )
    embeddings = make(base("bert"), dtype="bfloat16")
    assert embeddings.base_dtype == torch.bfloat16


@pytest.mark.parametrize("kwargs", [{"device_map": "auto"}, {"variant": "fp16"}, {"use_safetensors": False}])
def test_base_that_others_place_or_that_is_no_safetensors_is_left_to_them(
    kwargs: dict[str, Any], base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """accelerate counts for itself, and pickles have no header."""
    free(monkeypatch, 0)
    config = AutoConfig.from_pretrained(base("bert"))
    memory_check.check_fits(base("bert"), config, dtype=None, kwargs=kwargs, device="cpu")
    memory_check.check_fits("nobody/nothing", config, dtype=None, kwargs={}, device="cpu")


SPREAD = {"embeddings": "cpu", "encoder": "disk", "pooler": "disk"}
PLACES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "whole": lambda _: {},
    "half": lambda _: {"dtype": "bfloat16", "head_dtype": "float32"},
    "spread": lambda folder: {"device_map": SPREAD, "offload_folder": str(folder)},
    "4bit": lambda _: {"load_in_4bit": True, "dtype": "float32"},
}


@pytest.mark.filterwarnings("ignore::UserWarning:bitsandbytes", "ignore:.*quantization_config:UserWarning")
@pytest.mark.parametrize("place", PLACES)
def test_training_that_began_saves_and_loads_without_any_free_memory(
    place: str, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best model is saved and comes back, a checkpoint is written, and its models are found equal."""
    entry = ZOO["text-classifier"]
    config = lora()
    options = {"fine_tune": True, "peft_config": config, **PLACES[place](tmp_path / "offload")}
    size = size_of(base("bert")) if place in ("whole", "half") else 1 << 30
    free(monkeypatch, size)
    model = entry.build(
        lambda **own: pytest.fail("no words"),
        lambda **own: PeftTransformerDocumentEmbeddings(base("bert"), **own, **options),
    )
    free(monkeypatch, 0)
    entry.train(model, entry.corpus(), tmp_path / "out", max_epochs=2, use_final_model_for_eval=False)
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    expected = entry.predict(model, entry.corpus())
    assert (tmp_path / "out" / "best-model.pt").stat().st_size < size_of(base("bert")), "it holds no base"
    if place in ("4bit", "spread"):
        free(monkeypatch, 1 << 30)  # what is quantised, or loaded without a device_map, is held once more
    for source in (tmp_path / "checkpoint", tmp_path / "out" / "best-model.pt"):
        assert entry.predict(flair_peft.from_pretrained(source), entry.corpus()) == expected


@pytest.mark.parametrize("architecture", ["bert", "t5", "xlnet"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_that_is_compared_is_mapped_and_converted_weight_by_weight(
    dtype: torch.dtype, architecture: str, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit what a load in the dtype gives, parts that stay in fp32 included; only the file's dtype is held."""
    config = transformer.find_config(base(architecture), {})
    live = base_cache.find(BaseRecord(base(architecture)), config, dtype=dtype, kwargs={})
    expected = live.own_weights()
    free(monkeypatch, 0)
    found = base_cache.read_again(live.known_record, live.config, dtype=dtype, kwargs={})
    weights = found.own_weights()
    assert {p.dtype for p in found._model.parameters()} == {torch.float32}
    assert list(weights) == list(expected)
    assert all(weights[n].dtype == t.dtype and torch.equal(weights[n], t) for n, t in expected.items())
    assert found.known_record == live.known_record
    assert found.full_digests[0] == live.full_digests[0]


def test_base_that_was_written_to_is_read_whole_and_told_from_the_one_recorded(
    base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another fingerprint than the one recorded is never taken for it."""
    config = transformer.find_config(base("bert"), {})
    live = base_cache.find(BaseRecord(base("bert")), config, dtype=torch.bfloat16, kwargs={})
    record = replace(live.known_record, fingerprint="0" * 64)
    free(monkeypatch, 0)
    found = base_cache.read_again(record, live.config, dtype=torch.bfloat16, kwargs={})
    assert found.sampled_digests[0] == live.sampled_digests[0] != record.fingerprint


def test_shared_base_takes_models_of_another_dtype_without_memory_for_a_second_base(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source is compared in the dtype that the file was trained in, and not held."""
    entry = ZOO["text-classifier"]
    model = entry.build(lambda **own: pytest.fail("no words"), lambda **own: make(base("bert"), **own))
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    shared = SharedBase(base("bert"), dtype="bfloat16")
    free(monkeypatch, 0)
    assert shared.load(tmp_path / "checkpoint").embeddings.base_dtype == torch.bfloat16
