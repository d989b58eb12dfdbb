"""The same journeys on a GPU, and between a GPU and the CPU; skipped where there is none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import flair
import pytest
import torch
from flair.data import Sentence
from peft import LoftQConfig, PrefixTuningConfig, PromptTuningConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.embeddings import pass_cost
from tests.support import round_trip, tiny
from tests.support.configs import lora
from tests.support.places import addresses_of
from tests.support.zoo import ZOO

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # torch.compile, which ModernBERT uses, would rather multiply in TF32.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores"),
]

LORA = lora(target_modules=["query", "value", "dense"])
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A GPU sums in another order than a CPU does.
ACROSS_DEVICES = {torch.float32: 1e-4, torch.float16: 1e-2}


@pytest.fixture(autouse=True)
def _on_gpu() -> None:
    flair.device = torch.device("cuda")


# Flair's Lemmatizer hands lengths on the GPU to torch, which wants them on the CPU.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [name for name in ZOO if name != "lemmatizer"])
def test_model_trained_on_a_gpu_predicts_the_same_after_loading(
    name: str, dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Every model class trains, saves, loads and predicts on a GPU, in each dtype of the base."""
    factories = round_trip.Factories(base("bert"), LORA, dtype=dtype)
    model, corpus, entry = round_trip.train_and_save(name, factories, tmp_path)
    loaded = round_trip.load(tmp_path)
    assert {p.device.type for p in loaded.parameters()} == {"cuda"}
    difference = round_trip.largest_difference(entry.predict(model, corpus), entry.predict(loaded, corpus))
    assert difference <= max(round_trip.SCORE_TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoint_directory_comes_back_on_a_gpu(
    dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A directory written on a GPU loads there and on a CPU, its probe included, and shares the base on the GPU."""
    factories = round_trip.Factories(base("bert"), LORA, dtype=dtype)
    model, corpus, entry = round_trip.train_and_save("text-classifier", factories, tmp_path)
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    expected = entry.predict(model, corpus)
    first, second = (flair_peft.from_pretrained(tmp_path / "checkpoint") for _ in range(2))
    tolerance = max(round_trip.SCORE_TOLERANCE[dtype], 1e-5)
    assert round_trip.largest_difference(expected, entry.predict(second, corpus)) <= tolerance
    places = [addresses_of(p for p in m.parameters() if not p.requires_grad) for m in (first, second)]
    assert places[0] == places[1]
    flair.device = torch.device("cpu")
    on_cpu = flair_peft.from_pretrained(tmp_path / "checkpoint")
    assert {p.device.type for p in on_cpu.parameters()} == {"cpu"}


# In bf16 a GPU and a CPU round differently enough to change the best of two labels that are nearly equal.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger", "sequence-tagger-crf", "multitask"])
def test_model_moves_between_gpu_and_cpu(
    name: str, dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A model trained on a GPU loads and predicts on a CPU, moves to the GPU, and back."""
    factories = round_trip.Factories(base("bert"), LORA, dtype=dtype)
    model, corpus, entry = round_trip.train_and_save(name, factories, tmp_path)
    on_gpu = entry.predict(model, corpus)
    flair.device = torch.device("cpu")
    loaded = round_trip.load(tmp_path)
    tolerance = max(round_trip.SCORE_TOLERANCE[dtype], ACROSS_DEVICES[dtype])
    assert round_trip.largest_difference(on_gpu, entry.predict(loaded, corpus)) <= tolerance
    flair.device = torch.device("cuda")
    loaded.to(flair.device)
    assert round_trip.largest_difference(on_gpu, entry.predict(loaded, corpus)) <= tolerance
    flair.device = torch.device("cpu")
    loaded.to("cpu")
    assert round_trip.largest_difference(on_gpu, entry.predict(loaded, corpus)) <= tolerance


@pytest.mark.parametrize("pooling", ["cls", "mean", "max"])
def test_document_pooling_leaves_vectors_on_the_gpu(pooling: str, base: Callable[[str], str]) -> None:
    """Flair's mean and max pooling collect on the CPU; vectors leave on the device of the model all the same."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, cls_pooling=pooling)
    sentence = Sentence("Berlin is large .")
    embeddings.embed(sentence)
    assert sentence.get_embedding().device.type == "cuda"


@pytest.mark.parametrize("fixed", [1.0, 12.0], ids=["groups", "packed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_divided_batch_has_the_vectors_of_one_pass_on_a_gpu(
    dtype: torch.dtype, fixed: float, base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is put together again is on the GPU, in the order of the sentences."""
    monkeypatch.setattr(pass_cost, "cost_of", lambda *_: pass_cost.Cost(fixed, 0.0))
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=LORA, dtype=dtype)
    vectors = []
    for is_grouped in (True, False):
        embeddings.length_grouping = is_grouped
        sentences = [Sentence(text) for text in ("Who ?", "I love this wonderful movie , it is great !", "Yes .")]
        embeddings.embed(sentences)
        vectors.append(torch.stack([sentence.embedding for sentence in sentences]))
    assert vectors[0].device.type == "cuda"
    tolerance = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(*vectors, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("architecture", [name for name in tiny.ARCHITECTURES if name not in tiny.LAYOUT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_architecture_trains_on_a_gpu(
    architecture: str, dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """LoRA on each architecture trains and comes back on a GPU."""
    targets = tiny.ATTENTION_TARGETS[architecture]
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    factories = round_trip.Factories(base(architecture), config, dtype=dtype)
    model, corpus, entry = round_trip.train_and_save("text-classifier", factories, tmp_path)
    difference = round_trip.largest_difference(
        entry.predict(model, corpus), entry.predict(round_trip.load(tmp_path), corpus)
    )
    assert difference <= max(round_trip.SCORE_TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize(
    "config",
    [PromptTuningConfig(num_virtual_tokens=3), PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True)],
    ids=["prompt", "prefix"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prompt_method_trains_on_a_gpu(
    config: object, dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Prompt and prefix tuning train and come back on a GPU."""
    factories = round_trip.Factories(base("bert"), config, dtype=dtype)
    model, corpus, entry = round_trip.train_and_save("sequence-tagger", factories, tmp_path)
    assert round_trip.largest_difference(
        entry.predict(model, corpus), entry.predict(round_trip.load(tmp_path), corpus)
    ) <= max(round_trip.SCORE_TOLERANCE[dtype], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_amp_trains_an_adapter_on_a_gpu(dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path) -> None:
    """Flair's mixed precision, with its gradient scaler, changes the adapter."""
    factories = round_trip.Factories(base("bert"), LORA, dtype=dtype)
    entry = ZOO["text-classifier"]
    model = entry.build(factories.words, factories.documents)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    entry.train(model, entry.corpus(), tmp_path, use_amp=True)
    changed = [not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before]
    assert sum(changed) >= len(changed) - 1  # the pooler's gets no gradient


def test_loftq_rewrites_the_base_and_comes_back(base: Callable[[str], str], tmp_path: Path) -> None:
    """LoftQ quantises what the adapter then corrects; the rewritten base is what the file holds."""
    pytest.importorskip("bitsandbytes")
    config = lora(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))
    factories = round_trip.Factories(base("bert"), config)
    model, corpus, entry = round_trip.train_and_save("text-classifier", factories, tmp_path)
    difference = round_trip.largest_difference(
        entry.predict(model, corpus), entry.predict(round_trip.load(tmp_path), corpus)
    )
    assert difference <= 1e-5
