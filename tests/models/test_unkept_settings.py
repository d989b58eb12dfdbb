"""Settings that Flair's classes take and do not keep come back all the same, or are refused before a training.

The oracle is the live model before it is saved.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Corpus, Sentence
from flair.embeddings import (
    DocumentCNNEmbeddings,
    DocumentLMEmbeddings,
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    HashEmbeddings,
    OneHotEmbeddings,
    PooledFlairEmbeddings,
    StackedEmbeddings,
    TransformerDocumentEmbeddings,
    TransformerWordEmbeddings,
)
from flair.models import (
    SequenceTagger,
    SpanClassifier,
    TARSClassifier,
    TARSTagger,
    TextClassifier,
    TokenClassifier,
)
from flair.nn import Model
from flair.trainers import ModelTrainer

import flair_peft
from flair_peft.errors import ModelFileError, UnsupportedStateError
from flair_peft.models import unkept_settings
from tests.support.classic import characters, dictionary, tagger
from tests.support.configs import lora
from tests.support.files import resign, save_as
from tests.support.methods import perturb_

Base = Callable[[str], str]


def stacked(*embeddings: Any) -> TextClassifier:
    return TextClassifier(
        StackedEmbeddings([*embeddings]), label_type="class", label_dictionary=dictionary("good", "bad")
    )


def linker(words: Any) -> SpanClassifier:
    labels = dictionary("Berlin_(city)", "Paris_(city)", add_unk=True)
    return SpanClassifier(words, labels, label_type="nel", span_label_type="ner")


def _set(model: Model, **settings: Any) -> Model:
    for name, value in settings.items():
        setattr(model, name, value)
    return model


def recurrent(kind: Any = torch.nn.GRU, **options: Any) -> Any:
    return kind(32, 8, bidirectional=True, batch_first=True, **options)


def tars(texts: Any, **options: Any) -> TARSClassifier:
    return TARSClassifier("task", dictionary("good", "bad", "odd"), "class", texts, **options)


def tars_of_words(words: Any, **options: Any) -> TARSTagger:
    return TARSTagger("task", dictionary("PER"), "ner", words, **options)


MODELS: dict[str, tuple[bool, Callable[[Any], Model]]] = {
    "spans to link": (True, linker),
    "spans in BIO": (
        True,
        lambda words: TokenClassifier(words, dictionary("PER", "LOC", span_labels=True), "ner", span_encoding="BIO"),
    ),
    "without whitespace": (True, lambda words: tagger(StackedEmbeddings([words, characters(with_whitespace=False)]))),
    "pooled": (
        True,
        lambda words: tagger(StackedEmbeddings([words, PooledFlairEmbeddings(characters(with_whitespace=False))])),
    ),
    "pooled in front": (True, lambda words: tagger(StackedEmbeddings([PooledFlairEmbeddings(characters()), words]))),
    "one hot in front": (
        True,
        lambda words: tagger(StackedEmbeddings([OneHotEmbeddings(dictionary("Berlin", "and", add_unk=True)), words])),
    ),
    "hashes in front": (True, lambda words: tagger(StackedEmbeddings([HashEmbeddings(50, 8), words]))),
    "pool in front": (False, lambda texts: stacked(DocumentPoolEmbeddings([characters()]), texts)),
    "recurrent network in front": (False, lambda texts: stacked(DocumentRNNEmbeddings([characters()], 8), texts)),
    "convolution in front": (
        False,
        lambda texts: stacked(DocumentCNNEmbeddings([characters()], kernels=((4, 2), (4, 3))), texts),
    ),
    "language model in front": (False, lambda texts: stacked(DocumentLMEmbeddings([characters()]), texts)),
    "pool of what was seen in front": (
        False,
        lambda texts: stacked(DocumentPoolEmbeddings([PooledFlairEmbeddings(characters())]), texts),
    ),
    "tags of spans, one by one": (True, lambda words: _set(tagger(words), predict_spans=False)),
    "tags of words, one by one": (
        True,
        lambda words: _set(
            TokenClassifier(words, dictionary("PER", span_labels=True), "ner"), span_prediction_problem=False
        ),
    ),
    "several labels": (False, lambda texts: tars(texts, multi_label=True, multi_label_threshold=0.01)),
    "thresholds": (False, lambda texts: tars(texts, multi_label_threshold={"default": 0.2, "good": 0.9})),
    "dropout": (False, lambda texts: tars(texts, dropout=0.1, locked_dropout=0.2, word_dropout=0.3)),
    "dropout between layers": (
        True,
        lambda words: tagger(words, use_rnn=True, rnn=recurrent(num_layers=2, dropout=0.1)),
    ),
    "no dropout between layers": (True, lambda words: tagger(words, use_rnn=True, rnn=recurrent(num_layers=2))),
    "all dropout": (False, lambda texts: tars(texts, dropout=1)),
    "learning from pairs of before": (False, lambda texts: tars(texts, train_on_gold_pairs_only=True)),
    "dropout of words": (True, lambda words: tars_of_words(words, dropout=0.2, locked_dropout=0.1)),
    "no dropout of words": (True, lambda words: tars_of_words(words, locked_dropout=0)),
    "prompt behind": (False, lambda texts: tars(texts, prefix=False)),
    "no task": (False, lambda texts: TARSClassifier(embeddings=texts, prefix=False)),
}
"""Name → whether it reads words, and the model around embeddings."""


def embeddings_for(at: str, *, words: bool, has_adapter: bool) -> Any:
    if has_adapter:
        ours = flair_peft.PeftTransformerWordEmbeddings if words else flair_peft.PeftTransformerDocumentEmbeddings
        return ours(at, peft_config=lora())
    return (TransformerWordEmbeddings if words else TransformerDocumentEmbeddings)(at)


def answers(model: Any) -> list[tuple[str, str, float]]:
    sentence = Sentence("Berlin and Paris are large .", use_tokenizer=False)
    sentence[0:1].add_label("ner", "LOC")
    for module in model.modules():
        if isinstance(module, PooledFlairEmbeddings):  # these remember what they saw
            module.word_embeddings, module.word_count = {}, {}
    model.eval()
    if isinstance(model, TARSClassifier) and model._current_task is None:
        model.predict_zero_shot(sentence, ["good", "bad"], multi_label=True)
    else:
        model.predict(sentence, label_name="found", return_probabilities_for_all_classes=True)
    labels = [*sentence.get_labels("found"), *sentence.get_labels("good-bad"), *sentence.labels]
    tags = [label for token in sentence for label in token.get_tags_proba_dist("found")]
    return [(label.data_point.text, label.value, label.score) for label in [*labels, *tags]]


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("kind", MODELS)
def test_settings_that_flair_does_not_keep_come_back(kind: str, has_adapter: bool, base: Base, tmp_path: Path) -> None:
    """In a directory and in a file, through a second save, with an adapter and without."""
    words, make = MODELS[kind]
    model = make(embeddings_for(base("bert"), words=words, has_adapter=has_adapter))
    perturb_(model, 1)
    expected, settings = answers(model), unkept_settings.read(model)
    assert expected
    assert settings
    for form in ("directory", "file") if has_adapter else ("directory",):
        loaded = type(model).load(save_as(form, model, tmp_path))
        assert not [name for name, module in loaded.named_modules() if module.training]
        assert answers(loaded) == expected
        assert unkept_settings.read(loaded) == settings
        again = type(model).load(save_as(form, loaded, tmp_path / "again"))
        assert answers(again) == expected


def test_dropout_of_a_tars_for_words_is_what_it_was(base: Base, tmp_path: Path) -> None:
    """The numbers alone would name layers that are not there."""
    model = tars_of_words(embeddings_for(base("bert"), words=True, has_adapter=True), dropout=0.2, locked_dropout=0.1)
    loaded = flair_peft.from_pretrained(save_as("directory", model, tmp_path))
    for each in (model.tars_model, loaded.tars_model):
        assert (each.dropout.p, each.locked_dropout.dropout_rate) == (0.2, 0.1)
    loaded.train()  # which returns nothing, of TARS
    assert loaded.tars_model.forward_loss([Sentence("Berlin is large")])[0].isfinite()


@pytest.mark.parametrize("has_adapter", [True, False])
def test_model_of_vectors_of_before_makes_none(has_adapter: bool, base: Base, tmp_path: Path) -> None:
    """Who says that sentences have their vectors already has made them otherwise."""
    texts = embeddings_for(base("bert"), words=False, has_adapter=has_adapter)
    model = tars(texts, should_embed_sentence=False)
    for form in ("directory", "file") if has_adapter else ("directory",):
        loaded = TARSClassifier.load(save_as(form, model, tmp_path))
        assert loaded.tars_model.should_embed_sentence is False
        assert "should_embed_sentence" not in str(unkept_settings.read(tars(texts)))


def test_loss_of_a_tars_with_several_labels_is_what_it_was(base: Base, tmp_path: Path) -> None:
    """A training that goes on would lower something else."""
    texts = embeddings_for(base("bert"), words=False, has_adapter=True)
    model = tars(texts, multi_label=True)
    loaded = flair_peft.from_pretrained(save_as("directory", model, tmp_path))
    assert type(loaded.tars_model.loss_function) is type(model.tars_model.loss_function)
    assert loaded.tars_model.loss_function.reduction == model.tars_model.loss_function.reduction


def test_training_goes_on_with_spans_in_bio(base: Base, tmp_path: Path) -> None:
    """Tags of another encoding are not in the dictionary of the head."""
    words = embeddings_for(base("bert"), words=True, has_adapter=True)
    labels = dictionary("PER", span_labels=True)
    model = TokenClassifier(words, labels, "ner", span_encoding="BIO")
    loaded = flair_peft.from_pretrained(save_as("directory", model, tmp_path))
    sentence = Sentence("George Washington spoke")
    sentence[0:2].add_label("ner", "PER")
    loss, count = loaded.forward_loss([sentence])
    assert loss.isfinite()
    assert count == 3


def test_spans_that_a_file_of_before_links_are_found_again(base: Base, tmp_path: Path) -> None:
    """Flair wrote the name of their labels into each file, and read it from none."""
    model = linker(embeddings_for(base("bert"), words=True, has_adapter=True))
    saved = save_as("directory", model, tmp_path)
    resign(saved, lambda document: document["model"].pop(unkept_settings.KEY))
    loaded = flair_peft.from_pretrained(saved, verify=False)
    assert loaded._span_label_type == "ner"
    assert answers(loaded) == answers(model)


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.endswith("in front")])
def test_order_of_a_stack_in_a_file_of_before_is_taken_with_a_word(
    kind: str, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flair sorts vectors by names, and kept the numbers in front of some of them alone."""
    words, make = MODELS[kind]
    model = make(embeddings_for(base("bert"), words=words, has_adapter=True))
    perturb_(model, 1)
    saved = save_as("directory", model, tmp_path)
    assert answers(flair_peft.from_pretrained(saved)) == answers(model)
    assert "in which order" not in caplog.text
    resign(saved, lambda document: document["model"].pop(unkept_settings.KEY))
    assert answers(flair_peft.from_pretrained(saved, verify=False)) == answers(model)
    assert "does not say in which order the vectors" in caplog.text


def test_order_is_not_in_doubt_where_names_and_numbers_agree(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Behind a number, letters come last anyway: nothing of the model could be another."""
    words = embeddings_for(base("bert"), words=True, has_adapter=True)
    behind = tagger(StackedEmbeddings([words, PooledFlairEmbeddings(characters())]))
    perturb_(behind, 1)
    saved = save_as("directory", behind, tmp_path)
    resign(saved, lambda document: document["model"].pop(unkept_settings.KEY))
    assert answers(flair_peft.from_pretrained(saved, verify=False)) == answers(behind)
    assert "in which order" not in caplog.text


def test_order_that_a_stack_lost_before_stays_as_it_is_from_then_on(base: Base, tmp_path: Path) -> None:
    """A model that was loaded by an earlier version, trained on and saved by this one is not turned round again."""
    model = MODELS["pooled in front"][1](embeddings_for(base("bert"), words=True, has_adapter=True))
    perturb_(model, 1)
    model.embeddings.embeddings[0].name = "characters-context"
    expected = answers(model)
    assert not unkept_settings.read(model)
    assert answers(flair_peft.from_pretrained(save_as("directory", model, tmp_path))) == expected


@pytest.mark.parametrize(
    ("kind", "name"), [("pooled in front", "name"), ("tags of spans, one by one", "predict_spans")]
)
def test_merged_model_says_what_its_own_files_do_not_keep(
    kind: str, name: str, base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    """A ``.pt`` of it is Flair's."""
    model = MODELS[kind][1](embeddings_for(base("bert"), words=True, has_adapter=True))
    flair_peft.merge(model)
    assert f"Flair's own files do not keep '{name}' of this SequenceTagger" in caplog.text
    caplog.clear()
    flair_peft.merge(tagger(embeddings_for(base("bert"), words=True, has_adapter=True)))
    assert "do not keep" not in caplog.text


LONG = " ".join(["Berlin and Paris are large ."] * 20)


@pytest.mark.parametrize("way", ["directory", "file", "pickle", "merge"])
@pytest.mark.parametrize(("architecture", "limit"), [("llama", 16), ("xlnet", 16), ("bert", 100)])
def test_long_texts_are_read_as_before_where_the_tokenizer_was_given_another_limit(
    architecture: str, limit: int, way: str, base: Base, tmp_path: Path
) -> None:
    """Flair finds out once whether long texts are cut, and how windows overlap."""
    config = lora(target_modules="all-linear")
    texts = flair_peft.PeftTransformerWordEmbeddings(base(architecture), peft_config=config)
    model = tagger(texts)
    perturb_(model, 1)
    texts.tokenizer.model_max_length = limit
    live = long_vectors(model)
    loaded = {
        "directory": lambda: flair_peft.from_pretrained(save_as("directory", model, tmp_path)),
        "file": lambda: SequenceTagger.load(save_as("file", model, tmp_path)),
        "pickle": lambda: pickle.loads(pickle.dumps(model)),
        "merge": lambda: flair_peft.merge(model),
    }[way]()
    assert (loaded.embeddings.truncate, loaded.embeddings.stride) == (texts.truncate, texts.stride)
    assert torch.allclose(long_vectors(loaded), live, atol=1e-5)


@pytest.mark.parametrize(("architecture", "limit"), [("xlnet", 16), ("bert", 100)])
def test_plain_embeddings_read_long_texts_as_before(architecture: str, limit: int, base: Base, tmp_path: Path) -> None:
    """In a directory: how Flair's own files read them is Flair's."""
    model = tagger(TransformerWordEmbeddings(base(architecture)))
    model.embeddings.tokenizer.model_max_length = limit
    loaded = flair_peft.from_pretrained(save_as("directory", model, tmp_path))
    assert torch.equal(long_vectors(loaded), long_vectors(model))


def long_vectors(model: Any) -> torch.Tensor:
    sentence = Sentence(LONG, use_tokenizer=False)
    with torch.no_grad():
        model.eval().embeddings.embed(sentence)
    found = torch.stack([token.get_embedding().cpu() for token in sentence])
    sentence.clear_embeddings()
    return found


@pytest.mark.parametrize("damage", [{"truncate": 1}, {"stride": -1}, {"stride": "1"}], ids=str)
def test_damaged_reading_of_long_texts_is_refused(damage: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """Instead of an error of a tokenizer at the first long text."""
    model = tagger(flair_peft.PeftTransformerWordEmbeddings(base("bert"), peft_config=lora()))
    saved = save_as("directory", model, tmp_path)
    resign(saved, lambda document: document["model"]["embeddings"].update(damage))
    with pytest.raises(ModelFileError, match="They are damaged"):
        flair_peft.from_pretrained(saved, verify=False)


DAMAGED: dict[str, Any] = {
    "no mapping": ["ner"],
    "no module": {"elsewhere": {"_span_label_type": "ner"}},
    "no setting of this class": {"": {"predict": "ner"}},
    "another kind of value": {"": {"_span_label_type": 3}},
    "no settings": {"": "ner"},
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_settings_are_refused(damage: str, base: Base, tmp_path: Path) -> None:
    """Nothing but what Flair's classes do not keep can be set by a file."""
    saved = save_as("directory", linker(embeddings_for(base("bert"), words=True, has_adapter=True)), tmp_path)
    resign(saved, lambda document: document["model"].update({unkept_settings.KEY: DAMAGED[damage]}))
    with pytest.raises(ModelFileError, match=unkept_settings.KEY):
        flair_peft.from_pretrained(saved, verify=False)


DECIDING: dict[str, tuple[bool, Callable[[Any], Model]]] = {
    "bidirectional=False": (True, lambda words: tagger(words, use_rnn=True, hidden_size=8, bidirectional=False)),
    "bias and nonlinearity": (True, lambda words: tagger(words, use_rnn=True, rnn=recurrent(bias=False))),
    "nonlinearity": (True, lambda words: tagger(words, use_rnn=True, rnn=recurrent(torch.nn.RNN, nonlinearity="relu"))),
    "recurrent_type": (True, lambda words: tagger(StackedEmbeddings([words, characters("GRU")]))),
    "tag_format": (True, lambda words: tars_of_words(words, tag_format="BIO")),
    "loss_weights of TARSTagger": (True, lambda words: tars_of_words(words, loss_weights={"S-entity": 3.0})),
    "allow_unk_predictions": (True, lambda words: tars_of_words(words, allow_unk_predictions=True)),
    "loss_weights of TARSClassifier": (False, lambda texts: tars(texts, loss_weights={"good": 3.0})),
    "a decoder of one's own": (False, lambda texts: tars(texts, decoder=torch.nn.Linear(32, 2, bias=False))),
}


@pytest.mark.parametrize("has_adapter", [True, False])
@pytest.mark.parametrize("setting", DECIDING)
def test_settings_on_which_weights_depend_are_refused_by_name(
    setting: str, has_adapter: bool, base: Base, tmp_path: Path
) -> None:
    """No load could bring these weights back."""
    words, make = DECIDING[setting]
    model = make(embeddings_for(base("bert"), words=words, has_adapter=has_adapter))
    with pytest.raises(UnsupportedStateError, match=setting):
        save_as("directory", model, tmp_path)
    assert not (tmp_path / "directory").exists()


class KeepsItsDirection(SequenceTagger):
    """A class of one's own that stores what Flair's does not."""

    def _get_state_dict(self) -> dict[str, Any]:
        return {**super()._get_state_dict(), "bidirectional": self.bidirectional}

    @classmethod
    def _init_model_with_state_dict(cls, state: dict[str, Any], **kwargs: Any) -> Any:
        return super()._init_model_with_state_dict(state, bidirectional=state["bidirectional"], **kwargs)


def test_what_stores_such_a_setting_by_itself_is_saved(base: Base, tmp_path: Path) -> None:
    """Neither a class of one's own, nor a language model of an older file, which calls its layers otherwise."""
    words = embeddings_for(base("bert"), words=True, has_adapter=True)
    heads = {"use_rnn": True, "hidden_size": 8, "use_crf": False, "reproject_embeddings": False}
    own = KeepsItsDirection(words, dictionary("O", "S-PER"), "ner", bidirectional=False, **heads)
    old = tagger(StackedEmbeddings([embeddings_for(base("bert"), words=True, has_adapter=True), characters("lstm")]))
    for number, model in enumerate((own, old)):
        perturb_(model, number)
        loaded = type(model).load(save_as("directory", model, tmp_path / str(number)))
        assert answers(loaded) == answers(model)


def test_settings_on_which_weights_depend_are_refused_before_a_training(base: Base, tmp_path: Path) -> None:
    """And not by the load of its result."""
    words = embeddings_for(base("bert"), words=True, has_adapter=True)
    model = tagger(words, use_rnn=True, hidden_size=8, bidirectional=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sentence = Sentence("George spoke")
    sentence[0].add_label("ner", "S-PER")
    with pytest.raises(UnsupportedStateError, match="bidirectional=False"):
        ModelTrainer(model, Corpus([sentence], sample_missing_splits=False)).fine_tune(tmp_path, max_epochs=1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_flair_keeps_none_of_these_settings(base: Base) -> None:
    """Once it does, what this package does for them can go."""
    for kind in ("spans to link", "spans in BIO", "several labels", "prompt behind", "tags of spans, one by one"):
        words, make = MODELS[kind]
        model = make(embeddings_for(base("bert"), words=words, has_adapter=False))
        state = model._get_state_dict()
        flair_peft.uninstall()
        try:
            loaded = type(model).load(state)
        finally:
            flair_peft.install()
        assert unkept_settings.read(loaded) != unkept_settings.read(model)
    assert "with_whitespace" not in json.dumps(sorted(characters(with_whitespace=False).to_params()))
