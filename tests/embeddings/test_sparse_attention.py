"""BigBird attends to blocks of tokens until a text is short, then to all for good: only the user's own texts count."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings
from flair.models import TextClassifier
from flair.nn import Model
from flair.trainers import ModelTrainer
from transformers import BertTokenizerFast, BigBirdConfig, BigBirdModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from tests.support import tiny
from tests.support.configs import lora
from tests.support.vectors import is_close

LONG = " ".join(["Berlin and Paris are large cities in Europe , and Bern is not ."] * 12)
SHORT = "Who ?"
BLOCKS = 8 * (5 + 2)  # tokens that a text has at most which is too short for blocks


@pytest.fixture(scope="module")
def sparse(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("sparse")
    tokenizer = BertTokenizerFast.from_pretrained(base("bert"), model_max_length=400)
    tokenizer.save_pretrained(folder)
    config = BigBirdConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=400,
        pad_token_id=tokenizer.pad_token_id,
        block_size=8,
        num_random_blocks=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    torch.manual_seed(0)
    BigBirdModel(config).save_pretrained(folder)
    tiny.align_(folder / "model.safetensors")
    assert len(tokenizer(LONG)["input_ids"]) > BLOCKS
    return str(folder)


def make_classifier(directory: str) -> TextClassifier:
    torch.manual_seed(0)
    config = lora(target_modules=["query", "value"], modules_to_save=None)
    embeddings = PeftTransformerDocumentEmbeddings(directory, peft_config=config)
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    model = TextClassifier(embeddings, label_type="class", label_dictionary=labels)
    return model.eval()


def attention(model: Any) -> str:
    embeddings = model.embeddings
    transformer = getattr(embeddings, "base_model", embeddings.model)
    layers = {layer.attention.self.__class__.__name__ for layer in transformer.encoder.layer}
    name = {"block_sparse": "BigBirdBlockSparseAttention", "original_full": "BigBirdSelfAttention"}
    assert layers == {name[transformer.attention_type]}
    return str(transformer.attention_type)


def vectors(embeddings: TransformerEmbeddings, *texts: str) -> list[torch.Tensor]:
    sentences = [Sentence(text) for text in texts]
    embeddings.embed(sentences)
    return [sentence.embedding.detach() for sentence in sentences]


def test_long_texts_are_read_as_by_peft_alone(sparse: str) -> None:
    """New embeddings have tried a word, and long texts are read in blocks all the same."""
    model = make_classifier(sparse)
    ids = model.embeddings.tokenizer(LONG, return_tensors="pt")
    with torch.no_grad():
        blocks = model.embeddings.model(**ids).last_hidden_state[0, 0]
    assert attention(model) == "block_sparse"
    assert is_close(vectors(model.embeddings, LONG), [blocks], tolerance=1e-5)
    before = torch.get_rng_state()
    (together,) = vectors(model.embeddings, LONG, SHORT)[:1]
    assert torch.equal(before, torch.get_rng_state())
    assert is_close([together], [blocks], tolerance=1e-5)
    vectors(model.embeddings, SHORT)
    assert attention(model) == "original_full"
    assert not is_close(vectors(model.embeddings, LONG), [blocks], tolerance=1e-3)


@pytest.mark.parametrize("is_directory", [False, True], ids=["file", "directory"])
def test_loaded_and_merged_models_read_long_texts_so(is_directory: bool, sparse: str, tmp_path: Path) -> None:
    """Neither a save nor what proves a load, nor a merge, is a text of the user's."""
    model = make_classifier(sparse)
    expected = vectors(model.embeddings, LONG)
    if is_directory:
        flair_peft.save_pretrained(model, tmp_path / "model")
        loaded = flair_peft.from_pretrained(tmp_path / "model")
    else:
        model.save(tmp_path / "model.pt")
        loaded = TextClassifier.load(tmp_path / "model.pt")
    merged = flair_peft.merge(model)
    merged.save(tmp_path / "merged.pt")
    stock = Model.load(tmp_path / "merged.pt")
    assert type(stock.embeddings) is TransformerDocumentEmbeddings
    for each in (model, loaded, merged, stock):
        assert attention(each) == "block_sparse"
        assert is_close(vectors(each.embeddings.eval(), LONG), expected, tolerance=1e-4)


def test_training_on_long_texts_reads_blocks_to_its_end(sparse: str, tmp_path: Path) -> None:
    """The trial of what files would hold, and the saves, leave it so; dropout goes on where it was on."""
    model = make_classifier(sparse)
    sentences = [Sentence(LONG) for _ in range(2)]
    for sentence, label in zip(sentences, ("good", "bad"), strict=True):
        sentence.add_label("class", label)
    data = FlairDatapointDataset(sentences)
    corpus = Corpus(train=data, dev=data, test=data, sample_missing_splits=False)
    ModelTrainer(model, corpus).fine_tune(tmp_path, max_epochs=2, mini_batch_size=2, save_optimizer_state=True)
    assert attention(model) == "block_sparse"
    model.train()
    model.save(tmp_path / "again.pt")
    assert all(module.training for module in model.embeddings.base_model.modules())
    assert attention(TextClassifier.load(tmp_path / "final-model.pt")) == "block_sparse"


def test_models_on_one_base_read_long_texts_as_alone(sparse: str, tmp_path: Path) -> None:
    """Their sentences share no pass while one of them reads blocks, for the other's may be short."""
    paths = [tmp_path / f"{number}" for number in range(2)]
    for path in paths:
        flair_peft.save_pretrained(make_classifier(sparse), path)
    shared = SharedBase(sparse)
    first, second = (shared.load(path) for path in paths)
    expected = vectors(first.embeddings, LONG)
    longs, shorts = [Sentence(LONG)], [Sentence(SHORT)]
    shared.predict({first: longs, second: shorts}, embedding_storage_mode="cpu")
    assert is_close([longs[0].embedding], expected, tolerance=1e-5)
    assert (attention(first), attention(second)) == ("block_sparse", "original_full")
