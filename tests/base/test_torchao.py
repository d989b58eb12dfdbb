"""Adapters on bases that torchao quantises: trained, saved without a weight of the base, loaded to the same bits."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.models import TextClassifier
from safetensors.torch import load_file
from transformers import TorchAoConfig

import flair_peft
from flair_peft.base import quantisation
from flair_peft.errors import AdapterConfigError, ModelFileError
from tests.support.methods import perturb_
from tests.support.opinions import classifier, train
from tests.support.quantised import METHODS
from tests.support.quantised import vectors as vectors_for_the_head
from tests.support.vectors import is_same

Base = Callable[[str], str]

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed"),
    # PEFT warns of the very targets that LN tuning is for.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    # Of torchao 0.18 with torch 2.13, at its import.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _float8() -> Any:
    from torchao.quantization import Float8WeightOnlyConfig

    return Float8WeightOnlyConfig()


def _int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig
    from torchao.quantization.granularity import PerGroup

    return IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(8))


def _dynamic() -> Any:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return Int8DynamicActivationInt8WeightConfig()


SETTINGS: dict[str, Callable[[], Any]] = {"int8": _int8, "float8": _float8, "int4": _int4}


def vectors(model: TextClassifier) -> list[torch.Tensor]:
    """Return vectors in fp32: a head that is loaded wants them in the base's dtype, and one that trains in fp32."""
    return [vector.float() for vector in vectors_for_the_head(model)]


def torchao_classifier(base: str, settings: Callable[[], Any], method: str = "lora", **options: Any) -> TextClassifier:
    model = classifier(
        base,
        peft_config=METHODS[method](),
        transformers_model_kwargs={"quantization_config": TorchAoConfig(quant_type=settings())},
        **options,
    )
    perturb_(model.embeddings.model, 0)
    return model


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("settings", SETTINGS)
def test_what_was_saved_is_quantised_again_and_gives_the_same_bits(
    settings: str, method: str, dtype: str | None, base: Base, tmp_path: Path
) -> None:
    """Files hold the settings and what was learned; the weights come from the source, quantised in the same way."""
    live = torchao_classifier(base("bert"), SETTINGS[settings], method, dtype=dtype)
    before = vectors(live)
    flair_peft.save_pretrained(live, tmp_path / "directory")
    live.save(tmp_path / "model.pt")
    for path in (tmp_path / "directory", tmp_path / "model.pt"):
        loaded = TextClassifier.load(path)
        assert is_same(vectors(loaded), before)
        weights = [type(parameter).__name__ for parameter in loaded.embeddings.base_model.parameters()]
        assert sum(kind not in ("Parameter", "Tensor") for kind in weights) == 12
        recorded = loaded.embeddings.base_record.quantization
        assert recorded == quantisation.settings_of(live.embeddings.base_model.config)
        assert recorded["quant_method"] == "torchao"
        loaded.save(tmp_path / "again.pt")
        assert is_same(vectors(TextClassifier.load(tmp_path / "again.pt")), before)
    stored = load_file(tmp_path / "directory" / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in stored.values()) < 30_000
    flair_peft.verify(tmp_path / "directory")


@pytest.mark.parametrize("settings", SETTINGS)
def test_training_runs_through_and_its_best_model_is_the_one_loaded(settings: str, base: Base, tmp_path: Path) -> None:
    """Flair's own training: evaluation between epochs, the best model's reload, the final file."""
    model = torchao_classifier(base("bert"), SETTINGS[settings])
    start = {name: p.detach().clone() for name, p in model.embeddings.model.named_parameters() if p.requires_grad}
    train(model, tmp_path, max_epochs=2)
    trained = dict(model.embeddings.model.named_parameters())
    assert all(not torch.equal(tensor, trained[name]) for name, tensor in start.items())
    model.eval()
    assert is_same(vectors(TextClassifier.load(tmp_path / "final-model.pt")), vectors(model))


def test_what_no_file_holds_is_refused(base: Base, tmp_path: Path) -> None:
    """Merging rounds quantised weights for good; quantised inputs let no gradient pass."""
    live = torchao_classifier(base("bert"), _int8)
    with pytest.raises(AdapterConfigError, match="quantised by torchao"):
        flair_peft.merge(live)
    live.embeddings.model.merge_adapter()
    live.embeddings.model.unmerge_adapter()
    with pytest.raises(AdapterConfigError, match="changed since they were read"):
        live.save(tmp_path / "model.pt")
    dynamic = torchao_classifier(base("bert"), _dynamic)
    for store in (lambda: train(dynamic, tmp_path), lambda: dynamic.save(tmp_path / "model.pt")):
        with pytest.raises(AdapterConfigError, match="Int8DynamicActivationInt8WeightConfig"):
            store()


@pytest.mark.parametrize(
    "change",
    [
        {"_type": "AOPerModuleConfig"},
        {"_type": "quantize_"},
        {"_type": ["Int8WeightOnlyConfig"]},
        {"_data": {"granularity": {"_type": "quantize_", "_data": {}}}},
        {"_data": {"granularity": {"_type": "PerRow", "_data": {"dim": {"_type": "PerRow", "_data": {}}}}}},
        {"_data": {"group_size": {"_type": "torch.dtype", "_data": "load"}}},
        {"_data": {"group_size": {"_type": "MappingType", "_data": "__class__"}}},
        {"_data": {"group_size": ["x"]}},
        {"_data": {"unknown": 1}},
        {"_data": None},
    ],
    ids=str,
)
def test_settings_that_are_damaged_are_refused(change: dict[str, Any]) -> None:
    """A file chooses between known settings, whatever else torchao would look up by name."""

    class Config:
        quantization_config = TorchAoConfig(quant_type=_int8())

    stored = quantisation.settings_of(Config())  # type: ignore[arg-type]
    assert quantisation.read_settings(stored).to_dict() == Config.quantization_config.to_dict()
    described = {**stored["quant_type"]["default"], **change}
    with pytest.raises(ModelFileError, match="quantise the base"):
        quantisation.read_settings({**stored, "quant_type": {"default": described}})
