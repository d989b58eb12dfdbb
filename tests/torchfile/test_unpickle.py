"""Reading Flair's own files, and asking for the config that they lack."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, TaskType

from flair_peft import PeftTransformerWordEmbeddings
from flair_peft.errors import MissingConfigError, ModelFileError
from flair_peft.models.stored import Stored, complete
from flair_peft.primitives.load_context import LoadOptions
from flair_peft.torchfile.state_tree import has_adapters
from flair_peft.torchfile.unpickle import read_state
from tests.support.configs import lora

A = "base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"
WORD, DOCUMENT = "TransformerWordEmbeddings", "TransformerDocumentEmbeddings"


def completed(state: dict[str, Any], config: Any) -> dict[str, Any]:
    """Return a state with a config; that these are no states of whole models is nothing to look at here."""
    return complete(Stored("state", state, "x.pt", LoadOptions(trust_file=True)), config).state


def params(name: str = WORD, **more: Any) -> dict[str, Any]:
    return {"__cls__": name, "model": "bert", **more}


def state_of(key: str, parameters: dict[str, Any], *prefixes: str, rank: int = 4) -> dict[str, Any]:
    """Return what stock Flair stores of a model: parameters under a key, tensors under prefixes."""
    tensors = {f"{prefix}model.{A}": torch.zeros(rank, 32) for prefix in prefixes}
    return {"state_dict": {**tensors, "decoder.weight": torch.zeros(2, 32)}, key: parameters, "__cls__": "X"}


STACK = {"__cls__": "StackedEmbeddings", "embeddings": [params(), params()]}
POOL = {"__cls__": "DocumentPoolEmbeddings", "embeddings": STACK}

STORED: dict[str, tuple[dict[str, Any], list[Callable[[dict[str, Any]], dict[str, Any]]]]] = {
    "tagger": (state_of("embeddings", params(), "embeddings."), [lambda s: s["embeddings"]]),
    "text classifier": (
        state_of("document_embeddings", params(DOCUMENT), "embeddings."),
        [lambda s: s["document_embeddings"]],
    ),
    "span classifier": (state_of("word_embeddings", params(), "embeddings."), [lambda s: s["word_embeddings"]]),
    "regressor": (
        state_of("document_embeddings", params(DOCUMENT), "document_embeddings."),
        [lambda s: s["document_embeddings"]],
    ),
    "tars": (state_of("tars_embeddings", params(DOCUMENT), "tars_model.embeddings."), [lambda s: s["tars_embeddings"]]),
    "stack": (
        state_of("embeddings", STACK, "embeddings.list_embedding_0.", "embeddings.list_embedding_1."),
        [lambda s: s["embeddings"]["embeddings"][0], lambda s: s["embeddings"]["embeddings"][1]],
    ),
    "stack whose second has an adapter": (
        state_of("embeddings", STACK, "embeddings.list_embedding_1."),
        [lambda s: s["embeddings"]["embeddings"][1]],
    ),
    "pool whose first has an adapter": (
        state_of("document_embeddings", POOL, "embeddings.embeddings.list_embedding_0."),
        [lambda s: s["document_embeddings"]["embeddings"]["embeddings"][0]],
    ),
    "multitask": (
        {"model_states": {"a": state_of("embeddings", params(), "embeddings.")}},
        [lambda s: s["model_states"]["a"]["embeddings"]],
    ),
}


def _count_configs(value: Any) -> int:
    if isinstance(value, dict):
        return ("peft_config" in value) + sum(_count_configs(item) for item in value.values())
    return sum(_count_configs(item) for item in value) if isinstance(value, list) else 0


@pytest.mark.parametrize("name", STORED)
def test_complete_gives_it_to_the_embeddings_that_have_adapter_tensors(name: str) -> None:
    """Wherever Flair stores the parameters of embeddings, those with an adapter get the config and no others do."""
    state, places = STORED[name]
    found = completed(state, lora(target_modules=["query"]))
    for place in places:
        assert place(found)["peft_config"].lora_alpha == 12
    assert _count_configs(found) == len(places)


@pytest.mark.parametrize("name", STORED)
def test_complete_without_one_asks_for_it(name: str) -> None:
    """The error holds the rank, the targets and the call to make."""
    with pytest.raises(MissingConfigError) as error:
        completed(STORED[name][0], None)
    message = str(error.value)
    assert "rank 4" in message
    assert "lora_alpha" in message
    assert "load('x.pt', peft_config=LoraConfig(r=4, lora_alpha=…, target_modules=['query']))" in message


@pytest.mark.parametrize("name", STORED)
def test_complete_leaves_state_and_config_as_they_were(name: str) -> None:
    """The state and the config given are read only; tensors are not copied."""
    state, config = STORED[name][0], lora(target_modules=["query"], task_type=TaskType.SEQ_CLS)
    before = copy.deepcopy(state)
    found = completed(state, config)
    assert _count_configs(state) == 0
    assert str(state) == str(before)
    assert config.task_type == TaskType.SEQ_CLS
    if "state_dict" in state:
        assert all(found["state_dict"][key] is tensor for key, tensor in state["state_dict"].items())


def test_complete_keeps_the_one_that_a_file_holds() -> None:
    """Embeddings that know their config need none."""
    state = state_of("embeddings", params(peft_config={"peft_type": "LORA"}), "embeddings.")
    assert completed(state, None)["embeddings"]["peft_config"] == {"peft_type": "LORA"}


def test_complete_of_another_method_names_what_the_file_holds() -> None:
    """The error names the config class of the method in the file, and does not invent a LoraConfig."""
    state = state_of("embeddings", params(), "embeddings.")
    state["state_dict"] = {"embeddings.model.encoder.query.ia3_l.default": torch.ones(32, 1)}
    with pytest.raises(MissingConfigError) as error:
        completed(state, None)
    assert "peft_config=IA3Config(feedforward_modules=[], target_modules=['query']))" in str(error.value)
    assert "LoraConfig" not in str(error.value)
    assert completed(state, IA3Config())["embeddings"]["peft_config"].peft_type == "IA3"


def test_complete_of_several_ranks_names_them_all() -> None:
    """A rank pattern shows in the shapes, so every rank is named."""
    state = state_of("embeddings", params(), "embeddings.")
    state["state_dict"][f"embeddings.model.{A}".replace("layer.0", "layer.1")] = torch.zeros(2, 32)
    with pytest.raises(MissingConfigError, match="rank 2, 4"):
        completed(state, None)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ({"state_dict": {"embeddings.model.encoder.weight": 0}, "embeddings": params()}, False),
        ({"state_dict": {f"embeddings.model.{A}": 0}}, True),
        ({"state_dict": {}, "embeddings": params(peft_config={})}, True),
        ({"model_states": {"a": {"state_dict": {}}, "b": {"state_dict": {f"embeddings.model.{A}": 0}}}}, True),
        ({"model_states": {"a": {"state_dict": {}}}}, False),
        ({}, False),
        (None, False),
        ([A], False),
    ],
)
def test_has_adapters_tells_states_with_them_from_those_without(state: Any, expected: bool) -> None:
    """Tensors or a config, in the model or in one of its tasks: either is an adapter."""
    assert has_adapters(state) is expected


def test_has_adapters_of_our_own_embeddings_is_true(base: Callable[[str], str]) -> None:
    """A model of this package is recognised by its parameters alone."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(target_modules=["query"]))
    assert has_adapters({"state_dict": {}, "embeddings": embeddings.save_embeddings(use_state_dict=False)})


def test_read_state_of_a_model_returns_what_was_saved(tmp_path: Path) -> None:
    """Tensors come back on the CPU with their values."""
    state = {"state_dict": {"a": torch.arange(3.0)}, "b": 1}
    torch.save(state, tmp_path / "x.pt")
    found = read_state(tmp_path / "x.pt")
    assert torch.equal(found["state_dict"]["a"], state["state_dict"]["a"])
    assert found["b"] == 1


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04xx", b"\x80\x02."], ids=repr)
def test_read_state_of_bytes_names_the_file_and_its_size(content: bytes, tmp_path: Path) -> None:
    """An unreadable file is named with its size, which tells an interrupted download at once."""
    path = tmp_path / "x.pt"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"x\.pt' \({len(content)} bytes\)") as error:
        read_state(path)
    assert error.value.__cause__ is not None


@pytest.mark.parametrize(("value", "kind"), [([1], "list"), (torch.ones(1), "Tensor"), ({"a": 1}, "dict")], ids=str)
def test_read_state_of_another_object_names_its_kind(value: Any, kind: str, tmp_path: Path) -> None:
    """A file that torch can read but that holds no model says what it holds."""
    torch.save(value, tmp_path / "x.pt")
    with pytest.raises(ModelFileError, match=f"holds a {kind} without"):
        read_state(tmp_path / "x.pt")
