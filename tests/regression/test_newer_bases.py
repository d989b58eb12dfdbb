"""Bases that a newer transformers wrote give its hidden states, or are refused by name; archives are in ``newer``."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Sentence
from flair.models import TextClassifier
from packaging.version import Version
from transformers import BertTokenizerFast

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.base import transformer
from flair_peft.errors import AdapterConfigError, BaseModelNotFoundError
from tests.regression.make import labels
from tests.regression.make_newer import FOLDER, inputs
from tests.regression.newer_bases import BASES
from tests.support.configs import lora
from tests.support.selection import few

# Of transformers 4.56, whenever a config of Cohere 2 is made.
pytestmark = pytest.mark.filterwarnings("ignore:The .sliding_window_pattern. attribute is deprecated:FutureWarning")

ARCHIVE = FOLDER / "5.24.0.tar.xz"
TOLERANCE = 1e-4
WORDS = ("berlin", "paris", "movie", "great")

# What cannot be said to the installed transformers → what its error names.
REFUSED = {
    "eurobert": "of the type 'eurobert'",
    "nomic-bert": "of the type 'nomic_bert'",
    "modernbert-sliding-first": "layer_types=",
    "modernbert-yarn": "'yarn'",
    "modernbert-decoder-two-thetas": "rope_parameters=",
    "llama-proportional": "partial_rotary_factor=0.5",
    "llama-partial": "partial_rotary_factor=0.5",
    "llama-both-ways": "is_causal=False",
    "gemma-both-ways": "use_bidirectional_attention=True",
    "gemma3-scaled-windows": "rope_parameters=",
    "olmo3-two-thetas": "rope_parameters=",
}
if Version(transformers.__version__) < Version("4.57"):
    REFUSED |= {
        "embedding-gemma": "use_bidirectional_attention=True",
        "olmo3": "of the type 'olmo3'",
        "olmo3-two-thetas": "of the type 'olmo3'",
    }
EQUAL = [name for name in BASES if name not in REFUSED]

Unpacked = Callable[[str], Path]


@lru_cache
def record() -> dict[str, Any]:
    """Return the hidden states in the version that wrote the bases."""
    with tarfile.open(ARCHIVE) as archive:
        member = archive.extractfile("record.json")
        assert member is not None
        return json.load(member)


@pytest.fixture(scope="session")
def newer(tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    """Return a function from a base to its folder, which has a tokenizer of four words."""
    root = tmp_path_factory.mktemp("newer")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(root, filter="data")
    (root / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))

    def find(name: str) -> Path:
        BertTokenizerFast(vocab_file=str(root / "vocab.txt"), model_max_length=64).save_pretrained(root / name)
        return root / name

    return find


def classifier(base: Path) -> TextClassifier:
    config = lora(r=2, lora_alpha=6, target_modules="all-linear")
    embeddings = PeftTransformerDocumentEmbeddings(str(base), peft_config=config, cls_pooling="mean")
    return TextClassifier(embeddings, label_dictionary=labels("A", "B"), label_type="c").eval()


def score(model: Any) -> float:
    sentence = Sentence(" ".join(WORDS * 8))
    model.predict(sentence)
    return sentence.get_labels("c")[0].score


def largest_difference(found: torch.Tensor, expected: list[Any]) -> float:
    return float((found - torch.tensor(expected))[inputs()["attention_mask"].bool()].abs().max())


def test_every_base_was_written_and_none_of_them_is_both_equal_and_refused() -> None:
    """The replay has something to replay."""
    assert record().keys() == BASES.keys()
    assert REFUSED.keys() <= BASES.keys()


@pytest.mark.parametrize("name", EQUAL)
def test_base_of_a_newer_transformers_gives_its_hidden_states(name: str, newer: Unpacked) -> None:
    """Each layer, and the last state, which is after the final norm in both versions by this name."""
    source, expected = str(newer(name)), record()[name]
    model, _ = transformer.find_model(source, transformer.find_config(source, {}), dtype="float32", kwargs={})
    encoder = model.get_encoder() if model.config.is_encoder_decoder else model
    with torch.no_grad():
        output = encoder(**inputs(), output_hidden_states=True, return_dict=True)
    assert len(output.hidden_states) == len(expected["hidden_states"])
    for found, state in zip(output.hidden_states[:-1], expected["hidden_states"], strict=False):
        assert largest_difference(found, state) < TOLERANCE
    assert largest_difference(output.last_hidden_state, expected["last_hidden_state"]) < TOLERANCE


@pytest.mark.parametrize("name", REFUSED)
def test_base_that_only_a_newer_transformers_computes_is_refused_by_name(name: str, newer: Unpacked) -> None:
    """The message names the setting or the type; nothing is embedded with other numbers."""
    with pytest.raises(BaseModelNotFoundError, match=REFUSED[name]):
        PeftTransformerDocumentEmbeddings(str(newer(name)))


LOADED = {"embedding-gemma", "gemma2", "gpt-neox", "llama-yarn", "modernbert", "modernbert-decoder", "olmo3"}
ALWAYS = {"embedding-gemma", "gemma2", "llama-yarn", "modernbert"}


@pytest.mark.parametrize(
    "name", few(sorted({*LOADED, "phi3-longrope"} - REFUSED.keys()), always=ALWAYS - REFUSED.keys())
)
def test_model_on_a_base_of_a_newer_transformers_predicts_the_same_after_each_load(
    name: str, newer: Unpacked, tmp_path: Path
) -> None:
    """From a file, a directory and a shared base, several times over."""
    base = newer(name)
    first = model = classifier(base)
    expected = score(model)
    for turn in range(2):
        flair_peft.save_pretrained(model, tmp_path / str(turn))
        model = flair_peft.from_pretrained(tmp_path / str(turn))
        assert score(model) == pytest.approx(expected, abs=1e-6)
        model.save(tmp_path / f"{turn}.pt")
        model = TextClassifier.load(tmp_path / f"{turn}.pt")
        assert score(model) == pytest.approx(expected, abs=1e-6)
    assert model.embeddings.base_model.config.to_dict() == first.embeddings.base_model.config.to_dict()
    flair_peft.verify(tmp_path / "1")
    assert score(SharedBase(str(base)).load(tmp_path / "1")) == pytest.approx(expected, abs=1e-6)


def test_merge_on_a_base_with_capped_attention_is_refused(newer: Unpacked) -> None:
    """Stock Flair would read it with an attention that passes over the cap."""
    with pytest.raises(AdapterConfigError, match="another 'attn_implementation'"):
        flair_peft.merge(classifier(newer("gemma2")))
