"""A comparison finds what differs, and nothing where nothing does, across all kinds of files."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.nn import Model
from peft import get_peft_model
from transformers import AutoModel

import flair_peft
from flair_peft import keys
from flair_peft.comparison import Comparison, compare
from flair_peft.embeddings import PeftTransformerEmbeddings
from flair_peft.inspection import inspect
from tests.test_inspection import MODEL_NAMES, build, lora, save_as, save_stock

Base = Callable[[str], str]


def diff(first: Path, second: Path) -> Comparison:
    found = compare(inspect(first), inspect(second))
    json.dumps(found.to_dict())
    return found


def adapted(model: Model) -> PeftTransformerEmbeddings:
    return next(module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings))


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_comparison_of_a_model_with_itself_finds_nothing(name: str, base: Base, tmp_path: Path) -> None:
    """The same model is the same in a directory and in a file, with the base and without it."""
    model = build(name, base("bert"), lora(use_dora=True, bias="lora_only"))
    slim = [save_as("directory", model, tmp_path), save_as("file", model, tmp_path)]
    whole = [save_as("whole-directory", model, tmp_path), save_as("whole-file", model, tmp_path)]
    for paths in (slim, whole):
        for path in paths[1:]:
            found = diff(paths[0], path)
            assert found == Comparison(equal=found.equal)
            assert found.is_equal
            assert found.equal > 15


def test_comparison_with_a_model_that_was_loaded_and_saved_finds_the_same_tensors(base: Base, tmp_path: Path) -> None:
    """Loading and saving changes no setting, no label and no tensor."""
    first = save_as("file", build("text-classifier", base("bert"), lora(use_dora=True)), tmp_path)
    found = diff(first, save_as("directory", flair_peft.from_pretrained(first), tmp_path))
    assert found == Comparison(equal=found.equal, tokenizer=found.tokenizer)


def test_comparison_of_slim_and_whole_names_the_base(base: Base, tmp_path: Path) -> None:
    """What one file leaves out is what the other has more."""
    model = build("text-classifier", base("bert"), lora())
    found = diff(save_as("directory", model, tmp_path), save_as("whole-file", model, tmp_path))
    own = adapted(model).model.state_dict()
    left_out = {keys.canonical_key(key) for key in own if keys.base_key(key) is not None}
    assert set(found.added) == left_out
    assert not any((found.config, found.labels, found.values, found.reshaped))


def test_comparison_measures_how_far_values_differ(base: Base, tmp_path: Path) -> None:
    """The largest and the relative difference are those of the tensors."""
    model = build("text-classifier", base("bert"), lora())
    first = save_as("file", model, tmp_path)
    key, parameter = next((n, p) for n, p in adapted(model).model.named_parameters() if "lora_A" in n)
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter[1, 2] += 0.5
        parameter[0, 0] -= 0.25
    found = diff(first, save_as("directory", model, tmp_path))
    changed = {row.name: row for row in found.values}
    row = changed.pop(keys.canonical_key(key))
    assert set(changed) <= {"document_embeddings/probe/vectors"}
    assert row.largest == pytest.approx(0.5, rel=1e-5)
    assert row.relative == pytest.approx(float((parameter.detach() - before).norm() / before.norm()), rel=1e-5)
    assert not any((found.config, found.labels, found.added, found.removed))


def test_comparison_of_nothing_and_of_gaps_is_infinite_or_equal(base: Base, tmp_path: Path) -> None:
    """NaN in the same place is the same, and anywhere else it is infinitely far."""
    tensors = {"a": torch.tensor([math.nan, 1.0]), "b": torch.zeros(2), "c": torch.tensor([math.inf, 1.0])}
    paths = []
    for name, changes in (("first", {}), ("second", {"b": torch.tensor([0.0, math.nan])})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        safetensors.torch.save_file({**tensors, **changes}, tmp_path / name / "adapter_model.safetensors")
        paths.append(tmp_path / name)
    (row,) = diff(*paths).values
    assert (row.name, row.largest, row.relative) == ("b", math.inf, math.inf)


def test_comparison_names_settings_labels_and_shapes(base: Base, tmp_path: Path) -> None:
    """Another alpha, another rank and another label show under their names."""
    first = build("text-classifier", base("bert"), lora())
    second = build("text-classifier", base("bert"), lora(lora_alpha=16, r=2))
    second.label_dictionary = copy.deepcopy(second.label_dictionary)
    index = len(second.label_dictionary) - 1
    old = second.label_dictionary.idx2item[index]
    second.label_dictionary.idx2item[index] = b"renamed"
    second.label_dictionary.item2idx[b"renamed"] = second.label_dictionary.item2idx.pop(old)
    found = diff(save_as("file", first, tmp_path), save_as("directory", second, tmp_path))
    changes = {change.name: (change.first, change.second) for change in found.config}
    assert changes["lora_alpha"] == (12, 16)
    assert changes["r"] == (4, 2)
    assert [(c.first, c.second) for c in found.labels] == [(old.decode(), "renamed")]
    shapes = {change.name: (change.first, change.second) for change in found.reshaped}
    assert shapes["encoder.layer.0.attention.self.query.lora_A.weight"] == ("float32 4×32", "float32 2×32")
    assert not found.is_equal


def test_comparison_names_another_base_and_tokenizer(base: Base, tmp_path: Path) -> None:
    """Models on two architectures differ in base, tokenizer and weights."""
    paths = [
        save_as("file", build("text-classifier", base("bert"), lora()), tmp_path),
        save_as("directory", build("text-classifier", base("roberta"), lora()), tmp_path),
    ]
    found = diff(*paths)
    changes = {change.name: (change.first, change.second) for change in found.config}
    assert changes["base name"] == (base("bert"), base("roberta"))
    assert "base fingerprint" in changes
    assert {change.name for change in found.tokenizer} >= {"tokenizer/tokenizer.json"}


def test_comparison_of_two_precisions_names_them(base: Base, tmp_path: Path) -> None:
    """A base in half precision is another setting."""
    paths = []
    for dtype in ("float32", "bfloat16"):
        (tmp_path / dtype).mkdir()
        paths.append(
            save_as("directory", build("text-classifier", base("bert"), lora(), dtype=dtype), tmp_path / dtype)
        )
    found = diff(*paths)
    assert ("base dtype", "float32", "bfloat16") in {(c.name, c.first, c.second) for c in found.config}


def test_comparison_of_a_stock_file_and_its_own_kind(base: Base, tmp_path: Path) -> None:
    """Two files of stock Flair are compared like any others."""
    flair_peft.uninstall()
    model = build("text-classifier", base("bert"), lora(), is_stock=True)
    flair_peft.install()
    first, second = save_stock(model, tmp_path / "a.pt"), save_stock(model, tmp_path / "b.pt")
    assert diff(first, second).is_equal
    with torch.no_grad():
        model.decoder.bias += 1
    (row,) = diff(first, save_stock(model, second)).values
    assert (row.name, row.largest) == ("decoder.bias", pytest.approx(1.0))


def test_comparison_of_an_adapter_with_a_checkpoint_meets_in_its_tensors(base: Base, tmp_path: Path) -> None:
    """PEFT's own directory and a checkpoint name the same tensors in the same way."""
    model = build("text-classifier", base("bert"), lora())
    path = save_as("directory", model, tmp_path)
    alone = get_peft_model(AutoModel.from_pretrained(base("bert")), lora())
    alone.load_state_dict({k: v for k, v in adapted(model).model.state_dict().items() if "lora_" in k}, strict=False)
    alone.save_pretrained(tmp_path / "alone")
    found = diff(tmp_path / "alone", path)
    assert found.equal == 8
    assert not any((found.removed, found.reshaped, found.values))


def test_comparison_tells_whoever_watches(base: Base, tmp_path: Path) -> None:
    """Progress counts the bytes of what was compared."""
    path = save_as("whole-file", build("text-classifier", base("bert"), lora()), tmp_path)
    seen: list[int] = []
    found: Any = inspect(path)
    with flair_peft.progress.watched_by(seen.append):
        compare(found, found)
    assert sum(seen) >= 2 * found.sizes["base"]
