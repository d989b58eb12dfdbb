"""Tokens of one's own: each has a row of the input embeddings that no other has, and files hold it."""

from __future__ import annotations

import copy
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Corpus, Relation, Sentence
from flair.datasets import FlairDatapointDataset
from flair.models import RelationClassifier, TextClassifier
from flair.models.relation_classifier_model import EntityMarker
from flair.trainers import ModelTrainer
from peft import LoraConfig
from transformers import AutoModel, AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.errors import AdapterConfigError
from tests.support.configs import lora
from tests.support.files import tensors_in

Base = Callable[[str], str]

TOKENS = ["<e1>", "<e2>"]
NAMES = ["Berlin", "Paris", "Merkel", "Apple", "York", "Europe"]
ON_THE_MATRIX: dict[str, dict[str, Any]] = {
    "rows of tokens": {"trainable_token_indices": [5, 6]},
    "a copy": {"modules_to_save": ["word_embeddings"]},
    "LoRA on it": {"target_modules": ["query", "word_embeddings"]},
}


def all_linear() -> LoraConfig:
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def matrix_of(embeddings: Any) -> torch.Tensor:
    return embeddings.base_model.get_input_embeddings().weight.detach()


def distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return how far apart two rows are, as a share of the longer one's length."""
    return float((first - second).float().norm() / max(first.float().norm(), second.float().norm()))


def relations() -> Corpus:
    """Two names in each sentence; which of them is marked as the head is all that tells its two relations apart."""
    chance, sentences = random.Random(0), []
    for _ in range(60):
        first, second = chance.sample(NAMES, 2)
        sentence = Sentence([first, "and", second, "."])
        spans = sentence[0:1], sentence[2:3]
        for span in spans:
            span.add_label("ner", "NAME")
        Relation(*spans).add_label("order", "forward")
        Relation(*reversed(spans)).add_label("order", "backward")
        sentences.append(sentence)
    parts = (sentences[:40], sentences[40:50], sentences[50:])
    return Corpus(*map(FlairDatapointDataset, parts), sample_missing_splits=False)


def relation_classifier(embeddings: Any, corpus: Corpus) -> RelationClassifier:
    return RelationClassifier(
        embeddings,
        corpus.make_label_dictionary("order", add_unk=False),
        "order",
        "ner",
        encoding_strategy=EntityMarker(add_special_tokens=True),
    )


def marked(model: RelationClassifier) -> list[Any]:
    """Return the label and the score of each relation of new test sentences."""
    sentences = list(relations().test)
    model.predict(sentences, label_name="found")
    return [(label.value, label.score) for sentence in sentences for label in sentence.get_labels("found")]


def test_relations_are_learned_from_their_markers(base: Base, tmp_path: Path) -> None:
    """The head's marker and the tail's are told apart with an adapter, too, and by the loaded models."""
    torch.manual_seed(0)
    random.seed(0)
    corpus = relations()
    model = relation_classifier(PeftTransformerDocumentEmbeddings(base("bert"), peft_config=all_linear()), corpus)
    trainer = ModelTrainer(model, model.transform_corpus(corpus))
    settings = {"learning_rate": 2e-3, "decoder_learning_rate": 1e-2, "max_epochs": 12, "mini_batch_size": 8}
    score = trainer.fine_tune(tmp_path / "training", train_with_dev=True, **settings)["test_score"]
    assert score > 0.9  # by chance: 0.5
    expected = marked(model.eval())
    assert len(expected) == 2 * len(corpus.test)
    flair_peft.save_pretrained(model, tmp_path / "model")
    for loaded in (
        flair_peft.from_pretrained(tmp_path / "model"),
        RelationClassifier.load(tmp_path / "training" / "final-model.pt"),
    ):
        assert marked(loaded) == expected


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_markers_of_a_relation_classifier_differ_and_are_alike_in_each_model(base: Base, dtype: str) -> None:
    """transformers would draw rows that are a thousandth apart, which are equal in half precision."""
    corpus = relations()
    embeddings = [PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), dtype=dtype) for _ in range(2)]
    own = len(matrix_of(embeddings[0]))
    first, second = (matrix_of(relation_classifier(each, corpus).embeddings) for each in embeddings)
    assert len(first) > own
    assert torch.equal(first, second)
    new = first[own:]
    assert min(distance(a, b) for i, a in enumerate(new) for b in new[:i]) > 0.5
    stray = first[:own].float()
    torch.testing.assert_close(new.float().std(), stray.std(), rtol=0.5, atol=0)


@pytest.mark.parametrize("has_separator", [True, False])
@pytest.mark.parametrize("way", ["keyword", "tokenizer", "tokenizer with a separator"])
def test_tokens_that_are_given_have_rows_of_their_own(
    base: Base, tmp_path: Path, way: str, has_separator: bool
) -> None:
    """In the order of the tokenizer; the separator's is the mean of all, as without them."""
    options: dict[str, Any] = {"use_context_separator": has_separator}
    if way == "keyword":
        options["transformers_tokenizer_kwargs"] = {"additional_special_tokens": TOKENS}
    else:
        tokenizer = AutoTokenizer.from_pretrained(base("bert"))
        tokenizer.add_tokens(["[FLERT]", *TOKENS] if "separator" in way else TOKENS)
        tokenizer.save_pretrained(tmp_path / "tokenizer")
        options["tokenizer"] = str(tmp_path / "tokenizer")
    raw = AutoModel.from_pretrained(base("bert")).get_input_embeddings().weight.detach()
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(), **options)
    matrix, ids = matrix_of(embeddings), embeddings.tokenizer.convert_tokens_to_ids(TOKENS)
    assert len(matrix) == len(embeddings.tokenizer)
    assert torch.equal(matrix[: len(raw)], raw)
    assert distance(*matrix[ids]) > 0.5
    if has_separator:
        mean = matrix[embeddings.tokenizer.convert_tokens_to_ids("[FLERT]")]
        torch.testing.assert_close(mean, raw.mean(dim=0))
    found = [Sentence([token, "hello"]) for token in TOKENS]
    embeddings.embed(found)
    assert not torch.equal(found[0][1].embedding, found[1][1].embedding)


def test_model_with_tokens_of_its_own_is_the_same_from_each_file(base: Base, tmp_path: Path) -> None:
    """Slim files hold the rows, and no more of the matrix; stock Flair has them in a merged one."""
    options = {"transformers_tokenizer_kwargs": {"additional_special_tokens": TOKENS}}
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), **options)
    sentences = [Sentence([token, "hello"]) for token in TOKENS]
    for sentence in sentences:
        sentence.add_label("kind", sentence[0].text)
    corpus = Corpus(FlairDatapointDataset(sentences), sample_missing_splits=False)
    model = TextClassifier(embeddings, "kind", label_dictionary=corpus.make_label_dictionary("kind")).eval()

    def scores(found: Any) -> list[Any]:
        texts = [Sentence([token, "hello"]) for token in TOKENS]
        found.predict(texts, return_probabilities_for_all_classes=True)
        return [[(label.value, label.score) for label in text.labels] for text in texts]

    expected = scores(model)
    assert expected[0] != expected[1]
    flair_peft.save_pretrained(model, tmp_path / "model")
    model.save(tmp_path / "model.pt")
    assert max(len(tensor) for tensor in tensors_in(tmp_path / "model").values() if tensor.dim()) < 100
    assert len(matrix_of(embeddings)) > 100
    assert scores(flair_peft.from_pretrained(tmp_path / "model")) == expected
    assert scores(TextClassifier.load(tmp_path / "model.pt")) == expected
    flair_peft.merge(model).save(tmp_path / "merged.pt")
    flair_peft.uninstall()
    try:
        merged = scores(TextClassifier.load(tmp_path / "merged.pt"))
    finally:
        flair_peft.install()
    for found, wanted in zip(merged, expected, strict=True):
        assert dict(found) == pytest.approx(dict(wanted), abs=1e-5)


def test_tokens_added_to_the_tokenizer_have_rows_once_the_model_is_resized(base: Base) -> None:
    """As with transformers, the base itself and others on it stay as they are; a padded vocabulary is not cut."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    other, before = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora()), matrix_of(embeddings).clone()
    embeddings.tokenizer.add_tokens(TOKENS)
    module = embeddings.model.resize_token_embeddings(len(embeddings.tokenizer))
    assert module is embeddings.base_model.get_input_embeddings()
    assert len(matrix_of(embeddings)) == len(before) + 2 == embeddings.base_model.config.vocab_size
    assert not embeddings.base_model.get_input_embeddings().weight.requires_grad
    assert torch.equal(matrix_of(embeddings)[:-2], before)
    assert torch.equal(matrix_of(other), before)
    assert embeddings.model.resize_token_embeddings(5) is module
    assert embeddings.model.resize_token_embeddings() is module
    assert len(module.weight) == len(before) + 2
    embeddings.model.resize_token_embeddings(len(before) + 2, pad_to_multiple_of=64)
    assert len(matrix_of(embeddings)) == -(-(len(before) + 2) // 64) * 64
    with torch.inference_mode():
        embeddings.model.resize_token_embeddings(len(matrix_of(embeddings)) + 1)
    found = [Sentence([token, "hello"]) for token in TOKENS]
    embeddings.embed(found)
    assert not torch.equal(found[0][1].embedding, found[1][1].embedding)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies_are_resized_on_their_own(base: Base, copied: Callable[[Any], Any]) -> None:
    """What is resized is the transformer that is asked, and not the one that it was copied from."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    own, second = len(matrix_of(embeddings)), copied(embeddings)
    second.model.resize_token_embeddings(own + 2)
    assert [len(matrix_of(each)) for each in (embeddings, second)] == [own, own + 2]


@pytest.mark.parametrize("init", [False, "pissa"])
def test_loaded_embeddings_are_resized_alike(base: Base, tmp_path: Path, init: Any) -> None:
    """Those of methods, too, that are added only once the weights of the base are there."""
    live = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(init_lora_weights=init))
    corpus = relations()
    flair_peft.save_pretrained(
        TextClassifier(live, "order", label_dictionary=corpus.make_label_dictionary("order")), tmp_path / "model"
    )
    loaded = flair_peft.from_pretrained(tmp_path / "model").embeddings
    for each in (live, loaded):
        each.model.resize_token_embeddings(len(matrix_of(each)) + 2)
    assert torch.equal(matrix_of(live), matrix_of(loaded))
    assert distance(*matrix_of(loaded)[-2:]) > 0.5


@pytest.mark.parametrize("name", ON_THE_MATRIX)
def test_tokens_come_before_an_adapter_on_the_input_embeddings(base: Base, tmp_path: Path, name: str) -> None:
    """Added behind it, they are refused with the way to do it; given with the tokenizer, files hold what they have."""
    corpus, path, config = relations(), base("bert"), lora(**ON_THE_MATRIX[name])
    with pytest.raises(AdapterConfigError, match="additional_special_tokens"):
        relation_classifier(PeftTransformerDocumentEmbeddings(path, peft_config=config), corpus)
    markers = sorted(EntityMarker(add_special_tokens=True).special_tokens)
    options = {"transformers_tokenizer_kwargs": {"additional_special_tokens": markers}}
    model = relation_classifier(PeftTransformerDocumentEmbeddings(path, peft_config=config, **options), corpus)
    ids = model.embeddings.tokenizer.convert_tokens_to_ids(markers)
    assert distance(*matrix_of(model.embeddings)[ids[:2]]) > 0.5
    expected = marked(model.eval())
    flair_peft.save_pretrained(model, tmp_path / "model")
    assert marked(flair_peft.from_pretrained(tmp_path / "model")) == expected


def test_padded_vocabulary_is_not_cut_to_the_markers_of_a_relation_classifier(base: Base, tmp_path: Path) -> None:
    """Flair asks for as many rows as there are tokens: fewer than the base has, whose matrix no slim file holds."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert-padded-vocab"), peft_config=lora())
    own = len(matrix_of(embeddings))
    model = relation_classifier(embeddings, relations()).eval()
    assert len(model.embeddings.tokenizer) < own == len(matrix_of(embeddings))
    expected = marked(model)
    flair_peft.save_pretrained(model, tmp_path / "model")
    assert marked(flair_peft.from_pretrained(tmp_path / "model")) == expected
    assert own not in [len(tensor) for tensor in tensors_in(tmp_path / "model").values() if tensor.dim()]
