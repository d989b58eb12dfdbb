"""A head that was trained with its adapter goes on in Flair, or is refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import DocumentPoolEmbeddings, OneHotEmbeddings, StackedEmbeddings
from flair.models import SequenceTagger, TextClassifier, TextRegressor, TokenClassifier

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, take_over_head
from flair_peft.errors import HeadMismatchError
from tests.support import tiny
from tests.support.configs import lora
from tests.support.foreign_adapters import Source, offered, train, write_base
from tests.support.tiny import ATTENTION_TARGETS

Bases = Callable[[str], str]

LABELS = ["O", "B-PER", "I-PER"]
TEXTS = tiny.CORPUS[:3]
TOLERANCE = 1e-5


def _dictionary(items: list[str]) -> Dictionary:
    dictionary = Dictionary(add_unk=False)
    for item in items:
        dictionary.add_item(item)
    return dictionary


def _train(base: str, folder: Path, source: str, architecture: str, **options: Any) -> Source:
    return train(base, folder, source, lora(target_modules=ATTENTION_TARGETS[architecture], **options), num_labels=3)


def _words(folder: Path, **options: Any) -> PeftTransformerWordEmbeddings:
    return PeftTransformerWordEmbeddings.from_adapter(str(folder), use_context_separator=False, **options)


def _documents(folder: Path, **options: Any) -> PeftTransformerDocumentEmbeddings:
    return PeftTransformerDocumentEmbeddings.from_adapter(str(folder), use_context_separator=False, **options)


def _tagger(embeddings: Any, items: list[str], **options: Any) -> SequenceTagger:
    settings = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False, "tag_format": "BIO", **options}
    return SequenceTagger(embeddings, tag_dictionary=_dictionary(items), tag_type="ner", **settings).eval()


def _classifier(embeddings: Any, items: list[str], model_class: Any = TextClassifier) -> Any:
    return model_class(embeddings, label_dictionary=_dictionary(items), label_type="class").eval()


def _source_logits(trained: Source, embeddings: Any, text: str) -> torch.Tensor:
    ids = embeddings.prepare_tensors([Sentence(text)])["input_ids"]
    with torch.no_grad():
        return trained.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]


def _first_subtokens(embeddings: Any, text: str) -> list[int]:
    words = [token.text for token in Sentence(text)]
    numbers = embeddings.tokenizer(words, is_split_into_words=True).word_ids()
    return [numbers.index(number) for number in range(len(words))]


def _word_logits(model: Any, text: str) -> torch.Tensor:
    head = model.linear if isinstance(model, SequenceTagger) else model.decoder
    sentence = Sentence(text)
    model.embeddings.embed(sentence)
    with torch.no_grad():
        return head(torch.stack([token.embedding for token in sentence]))


TOKEN_CLASSES = [pair[0] for pair in offered() if pair[1] == "tokens" and pair[0] != "modernbert"]


@pytest.mark.parametrize("architecture", TOKEN_CLASSES)
def test_take_over_head_of_token_classification_gives_its_logits(
    architecture: str, base: Bases, tmp_path: Path
) -> None:
    """A tagger and a token classifier score words as the source class scores their first subtokens."""
    trained = _train(base(architecture), tmp_path, "tokens", architecture)
    order = ["I-PER", "O", "B-PER"]
    for model in (
        _tagger(_words(tmp_path), order),
        _classifier(_words(tmp_path), order, TokenClassifier),
    ):
        assert take_over_head(model, labels=LABELS) == []
        columns = [LABELS.index(label) for label in order]
        for text in TEXTS:
            rows = _first_subtokens(model.embeddings, text)
            expected = _source_logits(trained, model.embeddings, text)[rows][:, columns]
            assert (_word_logits(model, text) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("kind", "target"), [("BioGpt", "q_proj"), ("RobertaPreLayerNorm", "query")])
def test_take_over_head_after_a_final_norm_is_refused_until_the_embeddings_read_it(
    kind: str, target: str, base: Bases, tmp_path: Path
) -> None:
    """A head that reads what comes after the last hidden state scores as in its class, or not at all."""
    normed = write_base(kind, tmp_path / "base", base("bert"))
    trained = train(normed, tmp_path / "adapter", "tokens", lora(target_modules=[target]), num_labels=3)
    with pytest.raises(HeadMismatchError, match="after_final_norm=True"):
        take_over_head(_tagger(_words(trained.folder), LABELS), labels=LABELS)
    model = _tagger(_words(trained.folder, after_final_norm=True), LABELS)
    take_over_head(model, labels=LABELS)
    for text in TEXTS:
        rows = _first_subtokens(model.embeddings, text)
        expected = _source_logits(trained, model.embeddings, text)[rows]
        assert (_word_logits(model, text) - expected).abs().max() <= TOLERANCE


def test_take_over_head_of_a_new_model_predicts_without_dropout(base: Bases, tmp_path: Path) -> None:
    """What predict gives right after the head was taken over are the probabilities of the source class."""
    trained = _train(base("bert"), tmp_path, "tokens", "bert")
    model = _tagger(_words(tmp_path), LABELS).train()
    take_over_head(model, labels=LABELS)
    for text in TEXTS:
        sentence = Sentence(text)
        model.predict(sentence, return_probabilities_for_all_classes=True)
        rows = _first_subtokens(model.embeddings, text)
        expected = _source_logits(trained, model.embeddings, text)[rows].softmax(-1)
        found = [{label.value: label.score for label in token.get_tags_proba_dist("ner")} for token in sentence]
        scores = torch.tensor([[float(scores[label]) for label in LABELS] for scores in found])
        assert (scores - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen2", "mistral", "gemma"])
def test_take_over_head_of_a_decoder_over_its_last_token_gives_its_logits(
    architecture: str, base: Bases, tmp_path: Path
) -> None:
    """A text classifier scores sentences of a padded batch as the source class scores them one by one."""
    trained = _train(base(architecture), tmp_path, "sequence", architecture)
    model = _classifier(_documents(tmp_path), ["b", "c", "a"])
    assert take_over_head(model, labels=["a", "b", "c"]) == []
    sentences = [Sentence(text) for text in TEXTS]
    model.embeddings.embed(sentences)
    with torch.no_grad():
        logits = model.decoder(torch.stack([sentence.embedding for sentence in sentences]))
    for text, found in zip(TEXTS, logits, strict=True):
        assert (found - _source_logits(trained, model.embeddings, text)[[1, 2, 0]]).abs().max() <= TOLERANCE


NOT_LINEAR = [("sequence", name) for name in ("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "t5")]
NOT_LINEAR += [("sequence", "xlnet"), ("tokens", "modernbert"), ("questions", "bert"), ("bare", "bert")]


@pytest.mark.parametrize(("source", "architecture"), NOT_LINEAR)
def test_take_over_head_that_is_more_than_a_layer_on_hidden_states_is_refused(
    source: str, architecture: str, base: Bases, tmp_path: Path
) -> None:
    """A pooler, a dense layer or a summary in front of the last layer cannot be left out."""
    config = lora(target_modules=ATTENTION_TARGETS[architecture])
    options = {"num_labels": 3} if source in ("sequence", "tokens") else {}
    train(base(architecture), tmp_path, source, config, **options)
    model = _classifier(_documents(tmp_path), ["a", "b", "c"])
    with pytest.raises(HeadMismatchError, match=r"not one linear layer|have a head from elsewhere"):
        take_over_head(model, labels=["a", "b", "c"])


def test_take_over_head_with_other_labels_says_what_did_not_match(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Labels are matched by name: those that only one side has are named and keep their start."""
    _train(base("bert"), tmp_path, "tokens", "bert")
    model = _tagger(_words(tmp_path), ["O", "B-PER", "B-LOC"])
    before = model.linear.weight.detach().clone()
    assert take_over_head(model, labels=LABELS) == ["B-LOC"]
    assert "2 of 3 labels" in caplog.text
    assert "random start: 'B-LOC'" in caplog.text
    assert "not used: 'I-PER'" in caplog.text
    changed = (model.linear.weight != before).any(dim=1)
    assert changed.tolist() == [True, True, False]


def test_take_over_head_reads_labels_beside_the_adapter(base: Bases, tmp_path: Path) -> None:
    """A config.json that lies there names the rows."""
    _train(base("bert"), tmp_path, "tokens", "bert")
    (tmp_path / "config.json").write_text(json.dumps({"id2label": {"0": "O", "1": "B-PER", "2": "I-PER"}}))
    assert take_over_head(_tagger(_words(tmp_path), LABELS)) == []


def test_take_over_head_with_trained_biases_takes_the_trained_copy(base: Bases, tmp_path: Path) -> None:
    """With bias="all", PEFT stores the bias that the trained head replaced, too."""
    trained = _train(base("bert"), tmp_path, "tokens", "bert", bias="all")
    model = _tagger(_words(tmp_path), LABELS)
    take_over_head(model, labels=LABELS)
    text = TEXTS[0]
    expected = _source_logits(trained, model.embeddings, text)[_first_subtokens(model.embeddings, text)]
    assert (_word_logits(model, text) - expected).abs().max() <= TOLERANCE


def _token_classifier_without_bias(folder: Path) -> TokenClassifier:
    embeddings = _words(folder)
    embeddings.foreign_head.tensors["classifier.bias"].fill_(0.5)
    layer = torch.nn.Linear(embeddings.embedding_length, 3, bias=False)
    return TokenClassifier(embeddings, _dictionary(LABELS), "pos", decoder=layer)


def _refusals() -> dict[str, tuple[str, str, Callable[[Path], Any], Any, str]]:
    return {
        "reprojection": (
            "bert",
            "tokens",
            lambda f: _tagger(_words(f), LABELS, reproject_embeddings=True),
            LABELS,
            "this one has 'reproject_embeddings'",
        ),
        "a CRF": ("bert", "tokens", lambda f: _tagger(_words(f), LABELS, use_crf=True), LABELS, "'use_crf'"),
        "another model": ("bert", "tokens", lambda f: _classifier(_documents(f), LABELS), LABELS, "SequenceTagger or"),
        "a regressor": ("bert", "tokens", lambda f: TextRegressor(_documents(f)), LABELS, "not one linear layer that"),
        "mean pooling": (
            "llama",
            "sequence",
            lambda f: _classifier(_documents(f, cls_pooling="mean"), LABELS),
            LABELS,
            "it reads the last token",
        ),
        "an earlier layer": (
            "bert",
            "tokens",
            lambda f: _tagger(_words(f, layers="-2"), LABELS),
            LABELS,
            "it reads the last layer",
        ),
        "a bias": (
            "bert",
            "tokens",
            lambda f: _token_classifier_without_bias(f),
            LABELS,
            "it adds a bias, and the head of this one has none",
        ),
        "no labels": ("bert", "tokens", lambda f: _tagger(_words(f), LABELS), None, "Cannot tell the labels of the 3"),
        "too few labels": ("bert", "tokens", lambda f: _tagger(_words(f), LABELS), ["O"], "Cannot give 1 different"),
        "foreign labels": ("bert", "tokens", lambda f: _tagger(_words(f), LABELS), ["x", "y", "z"], "knows the labels"),
    }


@pytest.mark.parametrize("problem", _refusals())
def test_take_over_head_that_does_not_fit_the_model_is_refused(problem: str, base: Bases, tmp_path: Path) -> None:
    """What the two heads compute must be the same, or nothing is changed."""
    architecture, source, make, labels, message = _refusals()[problem]
    _train(base(architecture), tmp_path, source, architecture)
    model = make(tmp_path)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with pytest.raises(HeadMismatchError, match=message):
        take_over_head(model, labels=labels)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_take_over_head_that_was_only_adapted_is_refused(base: Bases, tmp_path: Path) -> None:
    """LoRA on a head says what to add to a layer that nobody stored."""
    _train(base("bert"), tmp_path, "tokens", "bert")
    model = _tagger(_words(tmp_path), LABELS)
    head = model.embeddings.foreign_head
    adapted = {"classifier.lora_A.weight": torch.ones(4, 32), "classifier.lora_B.weight": torch.ones(3, 4)}
    model.embeddings.foreign_head = type(head)(adapted, head.labels, head.source_class, head.reads)
    with pytest.raises(HeadMismatchError, match="only what an adapter adds"):
        take_over_head(model, labels=LABELS)


def test_take_over_head_that_reads_the_last_token_is_refused_over_pooled_words(base: Bases, tmp_path: Path) -> None:
    """A mean of words is no last token, though both come from the same transformer."""
    trained = train(base("gpt2"), tmp_path, "sequence", lora(target_modules=["c_attn"]), num_labels=3, pad_token_id=0)
    pooled = DocumentPoolEmbeddings([_words(trained.folder)])
    with pytest.raises(HeadMismatchError, match="what DocumentPoolEmbeddings makes of them"):
        take_over_head(_classifier(pooled, LABELS), labels=LABELS)


def test_take_over_head_reads_through_a_stack_of_one(base: Bases, tmp_path: Path) -> None:
    """A stack of one passes its vectors on, and one of several does not."""
    _train(base("bert"), tmp_path, "tokens", "bert")
    assert take_over_head(_tagger(StackedEmbeddings([_words(tmp_path)]), LABELS), labels=LABELS) == []
    several = StackedEmbeddings([_words(tmp_path), OneHotEmbeddings(_dictionary(["a"]))])
    with pytest.raises(HeadMismatchError, match="what StackedEmbeddings makes of them"):
        take_over_head(_tagger(several, LABELS), labels=LABELS)
