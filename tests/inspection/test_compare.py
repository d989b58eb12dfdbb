"""A comparison finds what differs, and nothing where nothing does, across all kinds of files."""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import json
import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.data import Dictionary, Sentence
from flair.nn import Model
from peft import get_peft_model
from transformers import AutoModel

import flair_peft
from flair_peft.adapter import keys
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.inspection.compare import Comparison, compare
from flair_peft.inspection.report import inspect
from tests.support.classic import characters, dictionary, tagger
from tests.support.configs import lora
from tests.support.files import save_as, save_stock
from tests.support.models import CLASSIFIER, make
from tests.support.zoo import ZOO

Base = Callable[[str], str]


def diff(first: Path, second: Path) -> Comparison:
    found = compare(inspect(first), inspect(second))
    json.dumps(found.to_dict())
    return found


def adapted(model: Model) -> PeftTransformerEmbeddings:
    return next(module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings))


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger", "multitask"])
def test_comparison_of_a_model_with_itself_finds_nothing(name: str, base: Base, tmp_path: Path) -> None:
    """The same model is the same in a directory and in a file, with the base and without it."""
    model = make(ZOO[name], base("bert"), lora(use_dora=True, bias="lora_only"))
    slim = [save_as("directory", model, tmp_path), save_as("file", model, tmp_path)]
    whole = [save_as("whole-directory", model, tmp_path), save_as("whole-file", model, tmp_path)]
    for paths in (slim, whole):
        for path in paths[1:]:
            found = diff(paths[0], path)
            assert found == Comparison(equal=found.equal)
            assert found.is_equal
            assert found.equal > 15


def test_file_of_tasks_with_one_base_holds_it_once_wherever_it_is_in_memory(base: Base, tmp_path: Path) -> None:
    """Weights on a shared base stand in memory that is copied on write, of which a file holds copies."""
    model = make(ZOO["multitask"], base("bert"), lora())
    loaded = flair_peft.SharedBase(base("bert")).load(save_as("directory", model, tmp_path))
    paths = [save_as("whole-file", loaded, tmp_path), save_as("whole-directory", model, tmp_path)]
    found = diff(*paths)
    assert [*found.added, *found.removed, *found.reshaped, *found.values] == []
    assert paths[0].stat().st_size < 1.5 * sum(path.stat().st_size for path in paths[1].iterdir() if path.is_file())


def test_comparison_with_a_model_that_was_loaded_and_saved_finds_the_same_tensors(base: Base, tmp_path: Path) -> None:
    """Loading and saving changes no setting, no label and no tensor."""
    first = save_as("file", make(CLASSIFIER, base("bert"), lora(use_dora=True)), tmp_path)
    found = diff(first, save_as("directory", flair_peft.from_pretrained(first), tmp_path))
    assert found == Comparison(equal=found.equal, tokenizer=found.tokenizer)


def test_comparison_of_slim_and_whole_names_the_base(base: Base, tmp_path: Path) -> None:
    """What one file leaves out is what the other has more."""
    model = make(CLASSIFIER, base("bert"), lora())
    found = diff(save_as("directory", model, tmp_path), save_as("whole-file", model, tmp_path))
    own = adapted(model).model.state_dict()
    left_out = {keys.canonical_key(key) for key in own if keys.base_key(key) is not None}
    assert set(found.added) == left_out
    assert not any((found.config, found.labels, found.values, found.reshaped))


def test_comparison_measures_how_far_values_differ(base: Base, tmp_path: Path) -> None:
    """The largest and the relative difference are those of the tensors."""
    model = make(CLASSIFIER, base("bert"), lora())
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
    first = make(CLASSIFIER, base("bert"), lora())
    second = make(CLASSIFIER, base("bert"), lora(lora_alpha=16, r=2))
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
        save_as("file", make(CLASSIFIER, base("bert"), lora()), tmp_path),
        save_as("directory", make(CLASSIFIER, base("roberta"), lora()), tmp_path),
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
        paths.append(save_as("directory", make(CLASSIFIER, base("bert"), lora(), dtype=dtype), tmp_path / dtype))
    found = diff(*paths)
    assert ("base dtype", "float32", "bfloat16") in {(c.name, c.first, c.second) for c in found.config}


def test_comparison_of_a_stock_file_and_its_own_kind(base: Base, tmp_path: Path) -> None:
    """Two files of stock Flair are compared like any others."""
    flair_peft.uninstall()
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    first, second = save_stock(model, tmp_path / "a.pt"), save_stock(model, tmp_path / "b.pt")
    assert diff(first, second).is_equal
    with torch.no_grad():
        model.decoder.bias += 1
    (row,) = diff(first, save_stock(model, second)).values
    assert (row.name, row.largest) == ("decoder.bias", pytest.approx(1.0))


def _with_decoder(base: Base, path: Path, *dropouts: float) -> Path:
    torch.manual_seed(0)
    first, second = map(torch.nn.Dropout, dropouts)
    decoder = torch.nn.Sequential(torch.nn.Linear(32, 8), first, torch.nn.Linear(8, 8), second, torch.nn.Linear(8, 3))
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    model.decoder = decoder
    model._custom_decoder = True
    return save_stock(model, path)


@pytest.mark.parametrize("dropouts", [(0.5, 0.1), (0.1, 0.5), (0.5, 0.5)])
def test_comparison_names_settings_of_a_pickled_decoder(
    dropouts: tuple[float, float], base: Base, tmp_path: Path
) -> None:
    """Whatever a pickle says of an object is compared, however deep it lies."""
    flair_peft.uninstall()
    first = _with_decoder(base, tmp_path / "a.pt", 0.1, 0.1)
    second = _with_decoder(base, tmp_path / "b.pt", *dropouts)
    flair_peft.install()
    changes = [(change.name, change.first, change.second) for change in diff(first, second).config]
    assert [name for name, *_ in changes if name.endswith(".p")] == [name for name, *_ in changes]
    assert [change[1:] for change in changes] == [(0.1, dropout) for dropout in dropouts if dropout != 0.1]
    assert diff(first, first).is_equal


def _save(path: Path, **state: Any) -> Path:
    torch.save({"state_dict": {"x": torch.ones(1)}, "__cls__": "TextClassifier", **state}, path)
    return path


@dataclasses.dataclass
class Holder:
    """Something that a model could hold."""

    value: Any


STRIPES = torch.arange(6.0)

DIFFERENT: dict[str, tuple[Any, Any]] = {
    "arguments of a call": (functools.partial(round, 1.5), functools.partial(round, 2.5)),
    "function": (torch.nn.functional.relu, torch.nn.functional.gelu),
    "entries under keys that are no text": ({b"a": 1, b"b": 2, (1,): 1}, {b"a": 2, b"b": 2, (1,): 1}),
    "entries under long names": ({"a" * 300 + "b": 1, "a" * 300 + "c": 2}, {"a" * 300 + "b": 2, "a" * 300 + "c": 2}),
    "bytes": (b"abc", b"abd"),
    "many bytes": (b"x" * 20_000 + b"a", b"x" * 20_000 + b"b"),
    "a name that only embeddings do not mean": ({"name": "a", "part": 1}, {"name": "b", "part": 2}),
    "a dictionary in a list": ([dictionary("a", "b")], [dictionary("b", "a")]),
    "flags of a dictionary": (dictionary("a"), dictionary("a", span_labels=True)),
    "objects of the same kind": ([Holder([1]), Holder([2])], [Holder([1]), Holder([3])]),
    "a set": ({"a", "b", "c"}, {"a", "b", "d"}),
    "complex numbers": (torch.tensor([1 + 2j]), torch.tensor([1 + 3j])),
    "large integers": (torch.tensor([2**60]), torch.tensor([2**60 + 1])),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_comparison_finds_every_difference_of_a_pickled_state(name: str, tmp_path: Path) -> None:
    """No value is passed over, and a copy of it is equal."""
    first, second = (_save(tmp_path / f"{index}.pt", thing=value) for index, value in enumerate(DIFFERENT[name]))
    again = _save(tmp_path / "again.pt", thing=copy.deepcopy(DIFFERENT[name][0]))
    found = diff(first, again)
    assert found == Comparison(equal=found.equal)
    assert not diff(first, second).is_equal


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_comparison_names_items_of_every_dictionary(kind: str, base: Base, tmp_path: Path) -> None:
    """The characters of a lemmatizer and the labels of TARS's other tasks are compared like those of the model."""
    for name in ("lemmatizer", "tars-classifier"):
        first = make(ZOO[name], base("bert"), lora())
        second = copy.deepcopy(first)
        if name == "lemmatizer":
            _swap_last_(second.char_dictionary)
        else:
            for task in second._task_specific_attributes.values():
                task["label_dictionary"] = copy.deepcopy(task["label_dictionary"])
                _swap_last_(task["label_dictionary"])
        paths = []
        for index, model in enumerate((first, second)):
            (tmp_path / f"{name}-{index}").mkdir()
            paths.append(save_as(kind, model, tmp_path / f"{name}-{index}"))
        found = diff(*paths)
        assert len(found.labels) >= 2
        assert not found.config
        assert diff(paths[0], paths[0]).is_equal


def _swap_last_(dictionary: Dictionary) -> None:
    items = dictionary.idx2item
    items[-1], items[-2] = items[-2], items[-1]
    dictionary.item2idx = {item: index for index, item in enumerate(items)}


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_model_that_is_loaded_and_saved_again_is_equal(kind: str, base: Base, tmp_path: Path) -> None:
    """A tokenizer writes the word that Flair adds with its flags, and once it is read without them."""
    for folder in ("first", "second", "third"):
        (tmp_path / folder).mkdir()
    model = make(CLASSIFIER, base("bert"), lora()).eval()
    assert model.embeddings.tokenizer.additional_special_tokens
    first = save_as(kind, model, tmp_path / "first")
    second = save_as(kind, flair_peft.from_pretrained(first), tmp_path / "second")
    assert diff(first, second).is_equal
    model.embeddings.tokenizer.add_special_tokens({"pad_token": "[UNK]"})
    assert diff(first, save_as(kind, model, tmp_path / "third")).tokenizer


def test_comparison_of_tokenizers_in_stock_files_is_of_their_files(base: Base, tmp_path: Path) -> None:
    """Not of when they were written, nor of their size alone."""
    paths = []
    for name, content, day in (("a", b"x", 1), ("b", b"x", 2), ("c", b"y", 1)):
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(zipfile.ZipInfo("vocab.txt", (2020, 1, day, 0, 0, 0)), content * 20_000)
        params = {"__cls__": "TransformerDocumentEmbeddings", "model": "x", "tokenizer_data": archive}
        paths.append(_save(tmp_path / f"{name}.pt", document_embeddings=params))
    assert diff(paths[0], paths[1]).is_equal
    assert [change.name for change in diff(paths[0], paths[2]).tokenizer] == ["document_embeddings.tokenizer_data"]


def test_comparison_of_a_stock_file_with_its_checkpoint_finds_the_same(base: Base, tmp_path: Path) -> None:
    """Whatever Flair keeps beside a dictionary that it has looked into, and whatever JSON cannot have for a key."""
    models = {"classic": tagger(characters()), "plain": make(CLASSIFIER, base("bert"), None, is_stock=True)}
    found = dict[str, Comparison]()
    for name, model in models.items():
        model.predict(Sentence("George went to Washington ."))
        path = save_stock(model, tmp_path / f"{name}.pt")
        flair_peft.convert_legacy(path, tmp_path / name)
        found[name] = diff(path, tmp_path / name)
    assert found["classic"].is_equal
    assert not found["plain"].config


def test_comparison_finds_differences_between_views_of_one_storage(base: Base, tmp_path: Path) -> None:
    """Tensors in one storage are several, unless they are the same elements."""
    paths = []
    for index, change in enumerate((0.0, 1.0)):
        storage = STRIPES.clone()
        storage[4] += change
        weights = {f"embeddings.model.layer.{i}.weight": storage[2 * i : 2 * i + 2] for i in range(3)}
        weights["embeddings.model.layer.0.lora_A.default.weight"] = torch.ones(1, 2)
        params = {"__cls__": "TransformerDocumentEmbeddings", "model": "x"}
        paths.append(_save(tmp_path / f"{index}.pt", state_dict=weights, document_embeddings=params))
    assert [row.name for row in diff(*paths).values] == ["layer.2.weight"]


def test_comparison_of_an_adapter_with_a_checkpoint_meets_in_its_tensors(base: Base, tmp_path: Path) -> None:
    """PEFT's own directory and a checkpoint name the same tensors in the same way."""
    model = make(CLASSIFIER, base("bert"), lora())
    path = save_as("directory", model, tmp_path)
    alone = get_peft_model(AutoModel.from_pretrained(base("bert")), lora())
    alone.load_state_dict({k: v for k, v in adapted(model).model.state_dict().items() if "lora_" in k}, strict=False)
    alone.save_pretrained(tmp_path / "alone")
    found = diff(tmp_path / "alone", path)
    assert found.equal == 8
    assert not any((found.removed, found.reshaped, found.values))


def test_comparison_tells_whoever_watches(base: Base, tmp_path: Path) -> None:
    """Progress counts the bytes of what was compared."""
    path = save_as("whole-file", make(CLASSIFIER, base("bert"), lora()), tmp_path)
    seen: list[int] = []
    found: Any = inspect(path)
    with flair_peft.primitives.progress.watched_by(seen.append):
        compare(found, found)
    assert sum(seen) >= 2 * found.sizes["base"]
