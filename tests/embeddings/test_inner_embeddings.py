"""Embeddings and models of one's own that make their transformer in ``__init__``: Flair stores nothing of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flair
import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import StackedEmbeddings
from flair.embeddings.base import EMBEDDING_CLASSES, DocumentEmbeddings, TokenEmbeddings, register_embeddings
from flair.models import MultitaskModel, SequenceTagger, TextClassifier
from flair.nn import Model
from flair.trainers import ModelTrainer
from peft import IA3Config, PeftConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.errors import BaseMismatchError, StateMismatchError
from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.selection import few
from tests.support.zoo import sentence_corpus

MADE: dict[str, Any] = {}
TARGETS = ["query", "value"]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lambda: lora(target_modules=TARGETS),
    "pissa": lambda: lora(init_lora_weights="pissa", target_modules=TARGETS),
    "tokens": lambda: lora(target_modules=TARGETS, trainable_token_indices=[1, 2, 3]),
    "biases": lambda: lora(target_modules=TARGETS, bias="all"),
    "ia3": lambda: IA3Config(target_modules=[*TARGETS, "output.dense"], feedforward_modules=["output.dense"]),
}


class Projected(DocumentEmbeddings):
    """Document embeddings with a layer of their own behind a transformer that they make."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.name, self.static_embeddings, self.size = "projected", False, size
        self.base = PeftTransformerDocumentEmbeddings(fine_tune=True, **{**MADE, "peft_config": MADE["peft_config"]()})
        self.layer = torch.nn.Linear(self.base.embedding_length, size)
        self.to(flair.device)

    @property
    def embedding_length(self) -> int:
        return self.size

    def _add_embeddings_internal(self, sentences: list[Sentence]) -> None:
        self.base.embed(sentences)
        for sentence in sentences:
            vector = sentence.get_embedding(self.base.get_names()).to(self.layer.weight.dtype)
            sentence.set_embedding(self.name, self.layer(vector))

    def to_params(self) -> dict[str, Any]:
        return {"size": self.size}

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Projected:
        return cls(**params)


class Deep(Projected):
    """The same, whose transformer is two levels down."""

    def __init__(self, size: int = 16) -> None:
        super().__init__(size)
        self.inner = Projected(size)

    def _add_embeddings_internal(self, sentences: list[Sentence]) -> None:
        super()._add_embeddings_internal(sentences)
        self.inner.embed(list(sentences))
        for sentence in sentences:
            sentence.set_embedding(self.name, 2 * sentence.get_embedding([self.name]))


class Words(TokenEmbeddings):
    """Word embeddings that make two transformers."""

    def __init__(self, name: str = "words") -> None:
        super().__init__()
        self.name, self.static_embeddings = name, False
        options = {**MADE, "peft_config": MADE["peft_config"]()}
        self.first = PeftTransformerWordEmbeddings(fine_tune=True, **options)
        self.second = PeftTransformerWordEmbeddings(fine_tune=True, **options)

    @property
    def embedding_length(self) -> int:
        return self.first.embedding_length

    def _add_embeddings_internal(self, sentences: list[Sentence]) -> None:
        for part in (self.first, self.second):
            part.embed(sentences)
        for token in (token for sentence in sentences for token in sentence):
            vectors = [token.get_embedding(part.get_names()) for part in (self.first, self.second)]
            token.set_embedding(self.name, vectors[0] - 2 * vectors[1])

    def to_params(self) -> dict[str, Any]:
        return {"name": self.name}

    @classmethod
    def from_params(cls, params: dict[str, Any]) -> Words:
        return cls(**params)


class OwnModel(TextClassifier):
    """A model that makes its embeddings."""

    def __init__(self, label_dictionary: Dictionary) -> None:
        super().__init__(Projected(), label_type="sentiment", label_dictionary=label_dictionary)

    def _get_state_dict(self) -> dict[str, Any]:
        return {**Model._get_state_dict(self), "label_dictionary": self.label_dictionary}

    @classmethod
    def _init_model_with_state_dict(cls, state: dict[str, Any], **kwargs: Any) -> OwnModel:
        return Model._init_model_with_state_dict.__func__(cls, state, label_dictionary=state["label_dictionary"])


@pytest.fixture(autouse=True)
def _made(base: Callable[[str], str]) -> Iterator[None]:
    MADE.clear()
    MADE.update(model=base("bert"), peft_config=CONFIGS["lora"])
    for kind in (Projected, Deep, Words):
        register_embeddings(kind)
    yield
    for kind in (Projected, Deep, Words):
        EMBEDDING_CLASSES.pop(kind.__name__, None)


def labels(layer: str = "sentiment") -> Dictionary:
    return sentence_corpus().make_label_dictionary(layer, add_unk=False)


def classifier(embeddings: Any) -> TextClassifier:
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels())


def tagger() -> SequenceTagger:
    return SequenceTagger(Words(), tag_dictionary=labels("ner"), tag_type="ner", use_rnn=False, use_crf=False)


def tasks() -> MultitaskModel:
    return MultitaskModel([classifier(Projected()), classifier(Projected(8))], ["first", "second"])


MODELS: dict[str, Callable[[], Model]] = {
    "document": lambda: classifier(Projected()),
    "deep": lambda: classifier(Deep()),
    "stacked": lambda: SequenceTagger(
        StackedEmbeddings([Words(), PeftTransformerWordEmbeddings(**{**MADE, "peft_config": MADE["peft_config"]()})]),
        tag_dictionary=labels("ner"),
        tag_type="ner",
        use_rnn=False,
        use_crf=False,
    ),
    "words": tagger,
    "model": lambda: OwnModel(labels()),
    "tasks": tasks,
}


def predicted(model: Model) -> list[Any]:
    """Return all that the model gives for a few sentences, scores included."""
    sentences = [Sentence(text) for text in ("Berlin is large .", "I love it , do you ?")]
    model.eval()
    for part in model.tasks.values() if isinstance(model, MultitaskModel) else [model]:
        options = {"force_token_predictions": True} if isinstance(part, SequenceTagger) else {}
        part.predict(sentences, return_probabilities_for_all_classes=True, **options)
    return [[(label.value, label.score) for label in s.labels] + [t.tags_proba_dist for t in s] for s in sentences]


@pytest.mark.parametrize("kind", few(MODELS, ["deep", "words", "model", "tasks"]))
def test_transformer_made_by_other_code_saves_and_loads(kind: str, tmp_path: Path) -> None:
    """A file and a directory, without the base, give the same scores; verify and inspect read them."""
    model = MODELS[kind]()
    perturb_(model, seed=3)
    expected = repr(predicted(model))
    model.save(tmp_path / "model.pt")
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    size = sum(p.nbytes for p in AutoModel.from_pretrained(MADE["model"]).parameters())
    assert (tmp_path / "model.pt").stat().st_size < 0.8 * size
    for source in (tmp_path / "model.pt", tmp_path / "checkpoint"):
        loaded = type(model).load(source)
        assert repr(predicted(loaded)) == expected
        assert loaded.state_dict().keys() == model.state_dict().keys()
        flair_peft.verify(source)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("method", CONFIGS)
def test_every_kind_of_adapter_made_by_other_code_comes_back(method: str, dtype: str, tmp_path: Path) -> None:
    """Methods that rewrite the base, derive something from it or train its biases."""
    MADE.update(peft_config=CONFIGS[method], dtype=dtype)
    model = classifier(Projected())
    perturb_(model, seed=3)
    expected = predicted(model)
    model.save(tmp_path / "model.pt")
    assert predicted(TextClassifier.load(tmp_path / "model.pt")) == expected


def test_model_with_a_transformer_made_by_other_code_trains_and_its_best_model_loads(tmp_path: Path) -> None:
    """Flair's trainer saves and reloads it, and the converted model loads as well."""
    model = classifier(Projected())
    rates = {"learning_rate": 5e-3, "decoder_learning_rate": 5e-3}
    settings = {**rates, "max_epochs": 2, "mini_batch_size": 4, "use_final_model_for_eval": False}
    ModelTrainer(model, sentence_corpus()).fine_tune(tmp_path, **settings)
    assert predicted(TextClassifier.load(tmp_path / "best-model.pt")) == predicted(model)
    model.half()
    model.save(tmp_path / "half.pt")
    loaded = TextClassifier.load(tmp_path / "half.pt")
    assert predicted(loaded) == predicted(model)
    assert loaded.embeddings.base.base_dtype == torch.float16


def test_other_base_under_code_that_makes_its_transformer_is_refused(tmp_path: Path) -> None:
    """The code may find another base than in training, or make another adapter: neither predicts silently."""
    copy = tmp_path / "copy"
    AutoModel.from_pretrained(MADE["model"]).save_pretrained(copy)
    AutoTokenizer.from_pretrained(MADE["model"]).save_pretrained(copy)
    MADE["model"] = str(copy)
    model = classifier(Projected())
    perturb_(model, seed=3)
    model.save(tmp_path / "model.pt")
    del model
    MADE["peft_config"] = lambda: lora(lora_alpha=48, target_modules=TARGETS)
    with pytest.raises(StateMismatchError, match="probe"):
        TextClassifier.load(tmp_path / "model.pt")
    MADE["peft_config"] = CONFIGS["lora"]
    weights = load_file(copy / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="its weights differ"):
        TextClassifier.load(tmp_path / "model.pt")
