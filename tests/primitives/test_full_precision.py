"""What is compared is computed in fp32, whatever a process lets products of fp32 matrices be rounded to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.models import SequenceTagger, TextClassifier
from peft import LoraConfig
from torch.backends import cuda, mkldnn

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings, SharedBase
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.primitives.full_precision import exact_products, full_precision
from tests.support.methods import perturb_
from tests.support.round_trip import Factories
from tests.support.zoo import ZOO

Base = Callable[[str], str]
OPERATIONS = (cuda.matmul, mkldnn.matmul, mkldnn.conv, mkldnn.rnn)
CHOICES: dict[str, Callable[[], None]] = {
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "one operation": lambda: setattr(mkldnn.matmul, "fp32_precision", "bf16"),
    "every operation": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


def precisions() -> list[str]:
    return [operation.fp32_precision for operation in OPERATIONS]


def _reset() -> None:
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for operation in OPERATIONS:
        operation.fp32_precision = "none"


@pytest.fixture(params=CHOICES)
def chosen(request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Return what the operations have after a choice of a user, which is taken back afterwards."""
    CHOICES[request.param]()
    found = precisions()
    assert {"tf32", "bf16"} & {*found}
    yield found
    _reset()


def test_inside_products_are_exact_and_afterwards_as_they_were(chosen: list[str]) -> None:
    """A user's choice holds again, nested or not, after an error as well."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision("cpu"), exact_products():
            assert not {"tf32", "bf16"} & {*precisions()}
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.bfloat16
    assert precisions() == chosen
    with pytest.raises(KeyError), exact_products():
        raise KeyError
    assert precisions() == chosen


def test_what_was_inherited_is_inherited_afterwards() -> None:
    """A choice for all operations, taken back later, is taken back for these as well."""
    torch.backends.fp32_precision = "tf32"
    with exact_products():
        pass
    torch.backends.fp32_precision = "none"
    assert precisions() == ["none"] * len(OPERATIONS)


def test_threads_that_overlap_leave_the_choice_as_it_was() -> None:
    """The last that leaves gives the setting back, not what another one had set."""
    torch.set_float32_matmul_precision("medium")
    entered, leave = threading.Event(), threading.Event()

    def stay() -> None:
        with exact_products():
            entered.set()
            leave.wait(10)

    other = threading.Thread(target=stay)
    try:
        with exact_products():
            other.start()
            assert entered.wait(10)
        assert mkldnn.matmul.fp32_precision == "ieee"
        leave.set()
        other.join()
        assert torch.get_float32_matmul_precision() == "medium"
        assert mkldnn.matmul.fp32_precision == "bf16"
    finally:
        leave.set()
        _reset()


class Noting:
    """Notes which precision each pass through a model has."""

    def __init__(self, model: Any) -> None:
        self.passes: list[str] = []
        for embeddings in adapted_embeddings(model):
            embeddings.base_model.register_forward_pre_hook(lambda *_: self.passes.append(mkldnn.matmul.fp32_precision))


def classifier(base: str) -> TextClassifier:
    factories = Factories(base, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["query"]))
    model = ZOO["text-classifier"].build(factories.words, factories.documents)
    perturb_(model.embeddings.model, seed=1)
    return model


def tagger(base: str) -> SequenceTagger:
    lora = LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["query"])
    words = PeftTransformerWordEmbeddings(base, peft_config=lora, use_context=False)
    tags = Dictionary(add_unk=False)
    for tag in ("A", "B", "C"):
        tags.add_item(tag)
    return SequenceTagger(words, tags, "pos", use_rnn=False, use_crf=False, reproject_embeddings=False)


WRITTEN: dict[str, Callable[[Any, Path], Any]] = {
    "save": lambda model, path: model.save(path / "model.pt"),
    "save_pretrained": lambda model, path: flair_peft.save_pretrained(model, path / "directory"),
    "to_transformers": lambda model, path: flair_peft.to_transformers(model, path / "directory", merged=False),
}


@pytest.mark.parametrize("write", WRITTEN)
def test_what_a_file_proves_itself_by_is_computed_exactly(
    write: str, base: Base, tmp_path: Path, chosen: list[str]
) -> None:
    """Else a file that was saved with one choice would be refused with another; predictions are left to the choice."""
    model = tagger(base("bert")) if write == "to_transformers" else classifier(base("bert"))
    noting = Noting(model)
    WRITTEN[write](model, tmp_path)
    assert noting.passes
    assert not {"tf32", "bf16"} & {*noting.passes}
    noting.passes.clear()
    with torch.no_grad():
        model.embeddings.embed(Sentence("a sentence"))
    assert noting.passes == [chosen[1]]


def test_weights_are_merged_exactly(base: Base) -> None:
    """Inside autocast, the products of an adapter's factors would be of bfloat16 in the merged weights."""
    model = classifier(base("bert"))
    expected = flair_peft.merge(model).state_dict()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        merged = flair_peft.merge(model).state_dict()
    assert expected.keys() == merged.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


def test_file_of_one_choice_loads_with_another(base: Base, tmp_path: Path) -> None:
    """Where the processor rounds, the probe was ten times further away than rounding of fp32 explains."""
    live = classifier(base("bert"))
    live.save(tmp_path / "exact.pt")
    torch.set_float32_matmul_precision("medium")
    try:
        live.save(tmp_path / "rounded.pt")
        loaded = [TextClassifier.load(tmp_path / "exact.pt"), SharedBase(base("bert")).load(tmp_path / "exact.pt")]
        flair_peft.merge(live)  # which compares, too
        torch.set_float32_matmul_precision("highest")
        loaded.append(TextClassifier.load(tmp_path / "rounded.pt"))
    finally:
        _reset()
    sentences = [Sentence("a sentence of words"), Sentence("more")]
    found = []
    for model in (live, *loaded):
        model.predict(sentences, return_probabilities_for_all_classes=True)
        found.append([[label.score for label in sentence.labels] for sentence in sentences])
    assert found == [found[0]] * 4
