"""No number and no expression in a file has a load take for ever: what the weights cannot fill is refused at once."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary
from flair.models import TextClassifier
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModel, BertConfig, BertModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, SharedBase
from flair_peft.adapter import config as configs
from flair_peft.errors import AdapterConfigError, FlairPeftError
from tests.support.configs import lora
from tests.support.files import resign
from tests.support.selection import few

Base = Callable[[str], str]

SECONDS = 4.0
"""Of CPU, for a load that takes half of one if nothing is wrong: a machine may be slow, and for ever is longer."""

NESTED = r"(\w+\.?)+!"
PATTERNS = (
    NESTED,
    r"(.*)*x(query|value)",
    r"((.+)+)+query!",
    r".*.*.*.*.*.*.*.*.*.*.*query!",
    r"(?:[a-z]|\w|.)*!",
    r"(?=.*query$)(\w+\.?)+!",
)
MANY = 10**5
BASES: dict[str, dict[str, Any]] = {
    **{f"{name} {10**7}": {name: 10**7} for name in ("num_hidden_layers", "vocab_size", "max_position_embeddings")},
    **{f"{name} {10**9}": {name: 10**9} for name in ("num_labels", "hidden_size", "intermediate_size")},
    "layers that can be written out": {"num_hidden_layers": 20_000},
    "inside": {"text_config": {"num_hidden_layers": 10**9}},
}
ADAPTERS: dict[str, dict[str, Any]] = {
    **{f"targets {pattern}": {"target_modules": pattern} for pattern in PATTERNS},
    "exclude": {"exclude_modules": NESTED},
    "layers": {"layers_pattern": NESTED, "layers_to_transform": [0]},
    "saved": {"modules_to_save": [NESTED]},
    **{f"{name} of {NESTED}": {name: {NESTED: 3}} for name in ("alpha_pattern", "rank_pattern")},
    **{f"{name} of many": {name: {f"q{n}": 3 for n in range(MANY)}} for name in ("alpha_pattern", "rank_pattern")},
    "targets of many": {"target_modules": ["query", *(f"q{n}" for n in range(MANY))]},
    "replication": {"layer_replication": [[0, 2]] * MANY},
    "tokens": {"trainable_token_indices": list(range(MANY))},
    "rank": {"r": 10**9},
    "rank that fits into memory": {"r": 10**5},
    "rank of a module": {"rank_pattern": {"query": 10**9}},
}


DEFAULT = {
    *(f"targets {PATTERNS[0]}", f"targets {PATTERNS[3]}", f"alpha_pattern of {NESTED}", "rank_pattern of many", "rank"),
    *(f"num_hidden_layers {10**7}", f"num_labels {10**9}", "layers that can be written out"),
}


def cases(changes: dict[str, dict[str, Any]]) -> list[Any]:
    """Return the changes as parameters, some for the matrix."""
    return [
        pytest.param(change, id=name, marks=() if name in DEFAULT else pytest.mark.matrix)
        for name, change in changes.items()
    ]


def change(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def changed_base(base: Base, folder: Path, changes: dict[str, Any]) -> str:
    directory = Path(shutil.copytree(base("bert"), folder / "changed base"))
    change(directory / "config.json", changes)
    return str(directory)


def adapter(base: str, folder: Path, config: PeftConfig, changes: dict[str, Any] | None = None) -> str:
    get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder / "adapter")
    change(folder / "adapter" / "adapter_config.json", {"base_model_name_or_path": base, **(changes or {})})
    return str(folder / "adapter")


def checkpoint(base: Base, folder: Path, *, save_base: bool = False) -> Path:
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    labels.add_item("b")
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    model = TextClassifier(embeddings, label_type="class", label_dictionary=labels)
    flair_peft.save_pretrained(model, folder / "model", save_base=save_base)
    return folder / "model"


def assert_refused_in_time(load: Callable[[], Any]) -> None:
    started = time.process_time()
    with pytest.raises(FlairPeftError):
        load()
    assert time.process_time() - started < SECONDS


@pytest.mark.parametrize("changes", cases(ADAPTERS))
def test_settings_of_an_adapter_end(changes: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """Whatever stands in an adapter_config.json, the load ends with an error of this package."""
    path = adapter(base("bert"), tmp_path, lora(), changes)
    assert_refused_in_time(lambda: PeftTransformerWordEmbeddings.from_adapter(path))


@pytest.mark.parametrize("config", [PrefixTuningConfig, PromptTuningConfig])
def test_count_of_virtual_tokens_ends(config: type[PeftConfig], base: Base, tmp_path: Path) -> None:
    """A prompt is no longer than the rows in the file."""
    config_of_few = config(num_virtual_tokens=4, task_type="FEATURE_EXTRACTION")  # type: ignore[call-arg]
    path = adapter(base("bert"), tmp_path, config_of_few, {"num_virtual_tokens": 10**9})
    assert_refused_in_time(lambda: PeftTransformerWordEmbeddings.from_adapter(path))


@pytest.mark.parametrize("reach", few(["adapter", "embeddings", "shared base", "tokenizer"], ["adapter", "tokenizer"]))
@pytest.mark.parametrize("changes", cases(BASES))
def test_settings_of_a_base_end(changes: dict[str, Any], reach: str, base: Base, tmp_path: Path) -> None:
    """A base that an adapter names, or the user, builds no more than its weights can fill."""
    directory = changed_base(base, tmp_path, changes)
    if reach == "tokenizer" and ("num_labels" in changes or "num_hidden_layers" in changes):
        (Path(directory) / "tokenizer_config.json").write_text("{}")  # so that transformers looks into the config
    path = adapter(base("bert"), tmp_path, lora(), {"base_model_name_or_path": directory})
    ways: dict[str, Callable[[], Any]] = {
        "adapter": lambda: PeftTransformerWordEmbeddings.from_adapter(path),
        "embeddings": lambda: PeftTransformerWordEmbeddings(directory, peft_config=lora()),
        "shared base": lambda: SharedBase(directory),
        "tokenizer": lambda: PeftTransformerWordEmbeddings(directory, peft_config=lora()),
    }
    assert_refused_in_time(ways[reach])


@pytest.mark.parametrize("save_base", few([False, True], [False]))
@pytest.mark.parametrize("changes", cases(BASES))
def test_shape_in_a_checkpoint_ends(changes: dict[str, Any], save_base: bool, base: Base, tmp_path: Path) -> None:
    """The same for the shape that a file of ours holds, whether or not it holds the weights."""
    path = checkpoint(base, tmp_path, save_base=save_base)

    def set_shape(document: dict[str, Any]) -> None:
        document["model"]["document_embeddings"]["config_state_dict"].update(changes)

    resign(path, set_shape)
    assert_refused_in_time(lambda: flair_peft.from_pretrained(path, verify=False))


@pytest.mark.parametrize("changes", cases(ADAPTERS))
def test_config_in_a_checkpoint_ends(changes: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """The same for the config of the adapter in it."""
    path = checkpoint(base, tmp_path)
    change(path / "adapter_config.json", changes)
    resign(path)
    assert_refused_in_time(lambda: flair_peft.from_pretrained(path))


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(query|value)",
        r"(\w+\.)*(query|value)",
        r"[^.]+(\.[^.]+)*\.(query|value)",
        r"^(?!.*pooler).*(?:query|value)$",
        r"^(?:(?!pooler).)*\.(?:query|value)$",
        r"^(?!pooler)(\w+\.)*layer\.\d+\.attention\.self\.(query|value)$",
        r"^(?!.*visual)(?!.*audio)(?!.*projector)(?!.*embed).*layer\.\d+\.(attention|mlp)\..*(?:query|value)$",
        r"(?i).*\.(QUERY|VALUE)",
        r"(?:.*?(?:encoder|text).*?(?:self|attn|mlp|ffn|dense).*?(?:query|value).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|attention|attn)\.(?:(?:query|value)))",
        "|".join(rf"encoder\.layer\.{layer}\.attention\.self\.(query|value)" for layer in range(100)),
    ],
)
def test_expression_of_an_honest_adapter_is_taken(pattern: str, base: Base, tmp_path: Path) -> None:
    """What people write repeats a lot, and ends: PEFT's own answer, for PEFT's files and after saving again."""
    path = adapter(base("bert"), tmp_path, lora(target_modules=pattern))
    embeddings = PeftTransformerDocumentEmbeddings.from_adapter(path)
    expected = get_peft_model(AutoModel.from_pretrained(base("bert")), lora(target_modules=pattern))
    found = [name for name, _ in embeddings.model.named_parameters() if "lora_" in name]
    assert found == [name for name, _ in expected.named_parameters() if "lora_" in name]
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    labels.add_item("b")
    model = TextClassifier(embeddings, label_type="class", label_dictionary=labels)
    flair_peft.save_pretrained(model, tmp_path / "model")
    loaded = flair_peft.from_pretrained(tmp_path / "model").embeddings.adapter_config
    assert loaded.target_modules == pattern


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys")  # of PEFT, while the test makes the files
def test_patterns_of_many_honest_modules_are_taken(base: Base, tmp_path: Path) -> None:
    """Five hundred keys, as methods write that choose a rank for each module."""
    pattern = {rf"layer\.{layer}\.attention\.self\.{name}": 2 for layer in range(250) for name in ("query", "value")}
    path = adapter(base("bert"), tmp_path, lora(rank_pattern=pattern, alpha_pattern=pattern))
    embeddings = PeftTransformerWordEmbeddings.from_adapter(path)
    ranks = {p.shape[0] for name, p in embeddings.model.named_parameters() if "lora_A" in name}
    assert ranks == {2}


@pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [({"num_hidden_layers": 80}, 4, 2), ({"vocab_size": 250_000}, 4, 2), ({}, 256, 5_000)],
    ids=["layers", "vocabulary", "rank and labels"],
)
@pytest.mark.matrix
def test_large_honest_model_is_taken(shape: dict[str, Any], rank: int, count: int, base: Base, tmp_path: Path) -> None:
    """What is large in all of its files is what it says: it loads as an adapter and as a checkpoint."""
    directory = Path(shutil.copytree(base("bert"), tmp_path / "large"))
    small = {"hidden_size": 16, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    BertModel(BertConfig(**{**small, "vocab_size": 200, **shape})).save_pretrained(directory)
    path = adapter(str(directory), tmp_path, lora(r=rank))
    embeddings = PeftTransformerDocumentEmbeddings.from_adapter(path)
    labels = Dictionary(add_unk=False)
    for number in range(count):
        labels.add_item(str(number))
    model = TextClassifier(embeddings, label_type="class", label_dictionary=labels)
    for save_base in (False, True):
        flair_peft.save_pretrained(model, tmp_path / "model", save_base=save_base)
        loaded = flair_peft.from_pretrained(tmp_path / "model")
        assert torch.equal(loaded.decoder.weight, model.decoder.weight)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_expression_that_backtracks_is_refused_for_names_of_any_length(pattern: str) -> None:
    """The way to a long name leads over its parts, so that nothing is begun that does not end."""
    for length in (10, 40, 200):
        names = [".".join(["encoder"] * length), "layer.0.attention.self.query"]
        started = time.process_time()
        with pytest.raises(AdapterConfigError, match="regular expression"):
            configs.refuse_endless_patterns({"target_modules": pattern}, names, source="x")
        assert time.process_time() - started < SECONDS
