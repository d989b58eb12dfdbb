"""Streams: what Flair's own ``predict`` gives to a list, item by item, in bounded memory, whatever is in it."""

from __future__ import annotations

import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from flair.data import DataPair, EntityCandidate, Sentence
from flair.datasets import FlairDatapointDataset
from flair.datasets.entity_linking import InMemoryEntityLinkingDictionary
from flair.embeddings import TransformerWordEmbeddings
from flair.models import EntityMentionLinker, LanguageModel, RegexpTagger
from flair.models.clustering import ClusteringModel
from flair.models.entity_mention_linking import ExactMatchCandidateSearchIndex
from flair.nn import Model
from flair.tokenization import SpaceTokenizer

from flair_peft import PeftTransformerWordEmbeddings, predict_stream
from flair_peft.errors import PredictionError, PredictionSetupError
from tests.support import tiny
from tests.support.configs import lora
from tests.support.round_trip import Factories, largest_difference
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO, copy_point

BASE = Callable[[str], str]
ROUNDING = 1e-5
BAD = "half \ud83d of a pair"
TEXTS = list(tiny.CORPUS)


def build(name: str, base: str, **options: Any) -> Model:
    """Return a model in evaluation mode whose adapter does something."""
    factories = Factories(base, lora(), **options)
    torch.manual_seed(3)
    model = ZOO[name].build(factories.words, factories.documents)
    model.eval()  # that of TARS returns nothing
    return model


@pytest.fixture
def tagger(base: BASE) -> Model:
    """Return a tagger without context."""
    return build("sequence-tagger", base("bert"))


@pytest.fixture
def reader_of_context(base: BASE) -> Model:
    """Return a tagger that reads twelve words on each side of a sentence."""
    return build("sequence-tagger", base("bert"), use_context=12)


def many_texts(count: int) -> list[str]:
    """Return texts of many lengths, each with a number of its own."""
    return [" ".join([*TEXTS[i % len(TEXTS)].split()[: 1 + i * 7 % 12], str(i)]) for i in range(count)]


def words(text: str) -> Sentence:
    return Sentence(text.split(), use_tokenizer=False)


def sentences(count: int) -> list[Sentence]:
    return [words(text) for text in many_texts(count)]


def labels(point: Any) -> list[tuple[str, str, float]]:
    """Return the labels of a point and its parts, in an order of their own."""
    layers = point.annotation_layers.items()
    found = [
        (name, label.unlabeled_identifier, _value(label), float(label.score)) for name, ls in layers for label in ls
    ]
    return sorted(found, key=repr)


def _value(label: Any) -> str | float:
    try:
        return float(label.value)  # what a regressor says
    except ValueError:
        return label.value


def all_labels(points: Any) -> list[Any]:
    return [labels(point) for point in points]


def points_of(name: str, copies: int = 4) -> list[Any]:
    """Return new data points that the model can label, of different lengths."""
    corpus = ZOO[name].corpus()
    splits = [corpus.train, corpus.dev, corpus.test]
    return [copy_point(split[i]) for _ in range(copies) for split in splits for i in range(len(split))]


@pytest.mark.parametrize("window", [2, pytest.param(100, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_stream_of_any_model_gives_what_its_own_predict_gives(base: BASE, name: str, window: int) -> None:
    """Every model class of Flair labels a stream as it labels a list, in windows of any size, and keeps the order."""
    model = build(name, base("bert"))
    expected, given = points_of(name), points_of(name)
    model.predict(expected, mini_batch_size=4)
    if name == "lemmatizer":  # an untrained one spells on until the longest word of the call is over
        window = 100
    found = list(predict_stream(model, iter(given), mini_batch_size=4, window=window))
    assert [id(point) for point in found] == [id(point) for point in given]
    assert all_labels(found) != all_labels(points_of(name))
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING


def test_stream_of_one_window_has_the_scores_of_predict_bit_by_bit(tagger: Model) -> None:
    """Where mini-batches are those of Flair, so is every bit of the scores."""
    expected = sentences(100)
    tagger.predict(expected, mini_batch_size=8)
    found = list(predict_stream(tagger, sentences(100), mini_batch_size=8))
    assert any(all_labels(found))
    assert all_labels(found) == all_labels(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_stream_of_one_window_in_half_precision_is_that_of_predict(base: BASE, dtype: str) -> None:
    """The same holds with a base of half precision."""
    model = build("text-classifier", base("bert"), dtype=dtype)
    expected = sentences(20)
    model.predict(expected, mini_batch_size=8)
    assert all_labels(predict_stream(model, sentences(20), mini_batch_size=8)) == all_labels(expected)


def test_stream_of_an_entity_linker_gives_what_its_own_predict_gives() -> None:
    """A model without embeddings of sentences, which counts its batches otherwise, is streamed as well."""
    dictionary = InMemoryEntityLinkingDictionary([EntityCandidate("Q1", "Berlin", "places")], "places")
    index = ExactMatchCandidateSearchIndex()
    index.index(dictionary)
    linker = EntityMentionLinker(index, None, "ner", "link", dictionary)
    expected, given = points_of("span-classifier"), points_of("span-classifier")
    linker.predict(expected)
    found = list(predict_stream(linker, given, mini_batch_size=2, window=2, batch_size=3))
    assert "link" in {layer for point in found for layer in point.annotation_layers}
    assert all_labels(found) == all_labels(expected)


def test_sentence_that_was_refused_once_is_not_said_to_be_after_it_was_predicted(tagger: Model) -> None:
    """Who finds failures by their metadata streams them again, and finds those that fail still."""
    sentence = Sentence("Berlin !")
    sentence.add_metadata("prediction_error", "of an earlier stream")
    (found,) = predict_stream(tagger, [sentence])
    assert found is sentence
    assert not sentence.has_metadata("prediction_error")


def test_stream_of_a_regexp_tagger_names_the_sentence_that_it_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """A model that labels by rules is streamed; what it had written before it failed is not written twice."""
    tagger = RegexpTagger([(r"Ber\w+", "CITY"), (r"xy", "PART")])
    found = list(predict_stream(tagger, ["Berlin !", "Bern and axyz", "Bergen ."], use_tokenizer=False))
    assert [[label.value for label in point.labels] for point in found] == [["CITY"], [], ["CITY"]]
    assert found[1].get_metadata("prediction_error").index == 1
    assert "item 1" in caplog.text


def test_stream_passes_arguments_on_to_predict(tagger: Model) -> None:
    """Arguments of the model's own predict keep their names and meaning."""
    options = {
        "label_name": "mine",
        "return_probabilities_for_all_classes": True,
        "force_token_predictions": True,
        "embedding_storage_mode": "cpu",
    }
    expected = sentences(10)
    tagger.predict(expected, mini_batch_size=8, **options)
    found = list(predict_stream(tagger, sentences(10), mini_batch_size=8, **options))
    assert all_labels(found) == all_labels(expected)
    assert {layer for point in found for layer in point.annotation_layers} == {"mine"}
    scores = [[label.score for token in point for label in token.get_tags_proba_dist("mine")] for point in found]
    assert scores[0]
    assert all(len(token.embedding) for point in found for token in point)


def test_stream_forgets_vectors_as_flair_does(tagger: Model) -> None:
    """Vectors are not kept unless asked for."""
    assert not any(len(token.embedding) for point in predict_stream(tagger, TEXTS) for token in point)


def test_stream_makes_sentences_of_texts_and_of_lists_of_words(tagger: Model) -> None:
    """Texts become sentences as Flair's constructor makes them, with the tokenizer that was asked for."""
    text = "George went to Washington."
    (default,) = predict_stream(tagger, [text])
    (spaces,) = predict_stream(tagger, (text,), use_tokenizer=False)
    (own,) = predict_stream(tagger, {text: None}, use_tokenizer=SpaceTokenizer())
    (listed,) = predict_stream(tagger, [text.split()])
    assert [token.text for token in default] == [token.text for token in Sentence(text)]
    assert [token.text for token in spaces] == [token.text for token in own] == [token.text for token in listed]
    assert len(default) == len(spaces) + 1


def test_stream_reads_a_dataset_of_flair(tagger: Model) -> None:
    """Flair's datasets are streamed without becoming lists."""
    given = sentences(5)
    assert list(predict_stream(tagger, FlairDatapointDataset(given))) == given


def test_stream_without_items_is_empty(tagger: Model) -> None:
    """No items in, no items out."""
    assert list(predict_stream(tagger, [])) == []


def test_stream_reads_no_further_than_it_must(tagger: Model) -> None:
    """An endless source can be streamed, and nothing is read before the first step."""
    read: list[int] = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield TEXTS[number % len(TEXTS)]

    stream = predict_stream(tagger, endless(), mini_batch_size=4, window=2)
    assert not read
    found = list(itertools.islice(stream, 100))
    assert [point.to_plain_string() for point in found[:3]] == [Sentence(text).to_plain_string() for text in TEXTS[:3]]
    assert len(read) == 104


@pytest.mark.parametrize("name", ["tagger", pytest.param("reader_of_context", marks=pytest.mark.matrix)])
def test_stream_keeps_no_more_than_two_windows_alive(name: str, request: pytest.FixtureRequest) -> None:
    """What the caller let go of is collected; links between neighbours do not keep the stream in memory."""
    alive: weakref.WeakSet[Sentence] = weakref.WeakSet()

    def source() -> Iterator[Sentence]:
        for text in many_texts(200):
            sentence = words(text)
            alive.add(sentence)
            yield sentence

    largest = 0
    for number, _ in enumerate(predict_stream(request.getfixturevalue(name), source(), mini_batch_size=4, window=2)):
        if number % 7 == 0:
            gc.collect()
            largest = max(largest, len(alive))
    assert largest <= 2 * 8 + 2


@pytest.mark.parametrize("name", ["tagger", "reader_of_context"])
def test_stream_lets_a_caller_keep_one_sentence_alone(name: str, request: pytest.FixtureRequest) -> None:
    """A sentence that is kept does not keep the others of its window."""
    given = sentences(40)
    alive = weakref.WeakSet(given)
    stream = predict_stream(request.getfixturevalue(name), iter(given), mini_batch_size=4, window=4)
    given = []
    kept = [point for number, point in enumerate(stream) if number == 20]
    del stream
    gc.collect()
    assert list(alive) == kept
    assert not kept[0].is_context_set()


@pytest.mark.parametrize("name", ["sequence-tagger", "text-classifier", "tars-classifier", "text-regressor"])
@pytest.mark.parametrize("window", [1, 3])
def test_stream_context_reaches_across_windows(base: BASE, name: str, window: int) -> None:
    """Sentences read their neighbours as in one list, wherever a window ends."""
    model = build(name, base("bert"), use_context=12)
    expected, given = sentences(30), sentences(30)
    model.predict(expected, mini_batch_size=4, label_name="predicted")
    found = list(predict_stream(model, given, mini_batch_size=4, window=window, label_name="predicted"))
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING


def test_stream_of_a_model_that_reads_copies_with_context_is_refused(base: BASE) -> None:
    """Sentences of one call are each other's context, which a stream cannot keep; without context it predicts."""
    for use_context in (8, False):
        factories = Factories(base("bert"), lora(), use_context=use_context)
        model = ZOO["prefixed-sequence-tagger"].build(factories.words, None)
        with pytest.raises(PredictionSetupError, match="as a list to model") if use_context else nullcontext():
            assert len([*predict_stream(model, ["Berlin is large ."] * 3)]) == 3


def test_stream_context_makes_a_difference_here(reader_of_context: Model) -> None:
    """The tests of context have an object: without neighbours, scores differ."""
    together, single = sentences(30), sentences(30)
    reader_of_context.predict(together)
    for sentence in single:
        reader_of_context.predict(sentence)
    assert largest_difference(all_labels(together), all_labels(single)) > 100 * ROUNDING


def _document(count: int, *, empty: bool = False, boundary: int | None = None) -> list[Sentence]:
    made = sentences(count)
    for number in range(3, count, 4):
        made[number] = Sentence([]) if empty else made[number]
    if boundary is not None:
        made[boundary].is_document_boundary = True
    return made


@pytest.mark.parametrize("settings", [{"empty": True}, {"boundary": 9}, {"empty": True, "boundary": 15}])
def test_stream_context_passes_over_empty_sentences_and_stops_at_boundaries(
    reader_of_context: Model, settings: dict[str, Any]
) -> None:
    """Empty sentences hide no neighbours, and documents end where they say."""
    expected, given = _document(30, **settings), _document(30, **settings)
    reader_of_context.predict(expected, mini_batch_size=4)
    found = list(predict_stream(reader_of_context, given, mini_batch_size=4, window=1))
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING


def test_stream_context_that_the_caller_set_is_left_alone(reader_of_context: Model) -> None:
    """Sentences that the caller linked read the neighbours that they have, and keep them; others pass over them."""
    expected, given = sentences(24), sentences(24)
    for made in (expected, given):
        Sentence.set_context_for_sentences(made[5:12])
    links = [(point._previous_sentence, point._next_sentence) for point in given]
    reader_of_context.predict(expected, mini_batch_size=4)
    found = list(predict_stream(reader_of_context, given, mini_batch_size=4, window=2))
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING
    assert [(point._previous_sentence, point._next_sentence) for point in found] == links


def test_stream_context_does_not_depend_on_what_the_caller_does_with_what_came_out(reader_of_context: Model) -> None:
    """A second model that predicts what came out leaves links in it, which the stream does not follow."""
    expected, given = sentences(24), sentences(24)
    reader_of_context.predict(expected, mini_batch_size=4, label_name="first")
    found = []
    for point in predict_stream(reader_of_context, given, mini_batch_size=4, window=1, label_name="first"):
        reader_of_context.predict(point, label_name="second")
        point.remove_labels("second")
        found.append(point)
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING
    assert all(point.is_context_set() for point in found)


def test_stream_of_the_same_sentence_again_and_again_ends(reader_of_context: Model) -> None:
    """One object at many places of a stream is no neighbour of itself, and cannot make a circle."""
    again, empty = words("a man"), Sentence([])
    found = list(predict_stream(reader_of_context, [again, empty] * 10, mini_batch_size=2, window=1))
    expected = words("a man")
    reader_of_context.predict(expected)
    assert found == [again, empty] * 10
    assert largest_difference(labels(again), labels(expected)) < ROUNDING


def test_stream_of_a_stream_is_what_two_predicts_are(base: BASE, reader_of_context: Model) -> None:
    """Streams can be put one into another, each with its own labels and its own context."""
    classifier = build("text-classifier", base("bert"), use_context=12)
    expected = sentences(24)
    reader_of_context.predict(expected)
    classifier.predict(expected)
    first = predict_stream(reader_of_context, sentences(24), mini_batch_size=4, window=1)
    found = list(predict_stream(classifier, first, mini_batch_size=4, window=2))
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING


def test_stream_replaces_earlier_labels_as_predict_does(tagger: Model) -> None:
    """Predicting again does not add to what was predicted before."""
    once = all_labels(predict_stream(tagger, sentences(10)))
    assert all_labels(predict_stream(tagger, predict_stream(tagger, sentences(10)))) == once


ODD: dict[str, Any] = {
    "empty": "",
    "spaces": " \t ",
    "tokens of spaces": [" ", "\u00a0"],
    "control characters": "\x00 \x01",
    "zero width": ["\u200b", "\ufe0f"],
    "replacement": "caf\ufffd au lait",
    "unknown script": "𒀀𒀁 𒀂",
    "ten thousand words": ["word"] * 10_000,
    "one long word": "x" * 10_000,
}


@pytest.mark.parametrize(
    "long", [pytest.param(True, marks=pytest.mark.matrix), False], ids=["allow_long_sentences", "cut"]
)
@pytest.mark.parametrize(
    "name",
    few(["sequence-tagger", "sequence-tagger-rnn-crf", "text-classifier", "tars-classifier"], ["sequence-tagger"]),
)
def test_stream_with_odd_sentences_gives_what_flair_gives(base: BASE, name: str, long: bool) -> None:
    """What Flair can predict comes out as Flair predicts it, at its place, and the good ones do not mind."""
    model = build(name, base("bert"), allow_long_sentences=long)
    texts: list[Any] = [TEXTS[0], *(item for odd in ODD.values() for item in (odd, TEXTS[2]))]
    expected = [Sentence(text, use_tokenizer=False) for text in texts]
    model.predict(expected, label_name="predicted", mini_batch_size=4)
    found = list(
        predict_stream(model, texts, use_tokenizer=False, label_name="predicted", mini_batch_size=4, errors="raise")
    )
    assert [point.text for point in found] == [sentence.text for sentence in expected]
    assert largest_difference(all_labels(expected), all_labels(found)) < ROUNDING
    assert labels(found[0])


@pytest.mark.parametrize(
    "name", ["sequence-tagger", "text-classifier", "relation-extractor", "multitask", "text-regressor"]
)
@pytest.mark.parametrize("context", [False, 12], ids=["alone", "context"])
def test_stream_with_malformed_unicode_loses_nothing_else(
    base: BASE, name: str, context: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Sentences that no tokenizer reads come out in place with an error; the others as if these were not there."""
    model = build(name, base("bert"), use_context=context)
    good, bad_places = points_of(name, copies=2), [0, 7, 8, 20]
    given = points_of(name, copies=2)
    for place in bad_places:
        given.insert(place, words(BAD))
        given[place].add_label("gold", "kept")
    model.predict(good, mini_batch_size=4)
    found = list(predict_stream(model, given, mini_batch_size=4, window=2))
    assert found == given
    kept = [point for number, point in enumerate(found) if number not in bad_places]
    assert largest_difference(all_labels(good), all_labels(kept)) < ROUNDING
    for place in bad_places:
        if name == "relation-extractor":  # no entities, nothing to read
            continue
        error = found[place].get_metadata("prediction_error")
        assert labels(found[place]) == [("gold", found[place].unlabeled_identifier, "kept", 1.0)]
        assert isinstance(error, PredictionError)
        assert isinstance(error.__cause__, TypeError)
        assert error.index == place
        assert str(error) in caplog.text
        assert "surrogate" in str(error)
        assert str(error).isascii()
    assert not any(point.has_metadata("prediction_error") for point in kept)


@pytest.mark.parametrize("bad", [None, 3.5, b"bytes", ["a", None], ("a", "b")], ids=repr)
def test_stream_with_what_is_no_text_goes_on(tagger: Model, bad: Any) -> None:
    """What is no text is an empty sentence with an error, and the stream goes on."""
    found = list(predict_stream(tagger, [TEXTS[0], bad, TEXTS[2]]))
    assert [len(point) > 0 for point in found] == [True, False, True]
    assert "neither a text" in str(found[1].get_metadata("prediction_error"))
    assert labels(found[0])


def test_stream_with_a_tokenizer_that_fails_goes_on(tagger: Model) -> None:
    """A tokenizer that fails on one text costs that text alone."""

    class Picky(SpaceTokenizer):
        def tokenize(self, text: str) -> list[str]:
            return ["elsewhere"] if "not" in text else super().tokenize(text)

    found = list(predict_stream(tagger, ["a man", "not me", "a dog"], use_tokenizer=Picky()))
    assert [len(point) for point in found] == [2, 0, 2]
    assert isinstance(found[1].get_metadata("prediction_error").__cause__, ValueError)


def test_stream_that_shall_raise_gives_all_before_first(tagger: Model) -> None:
    """The error is raised at its place, with its number and its cause, and ends the stream."""
    stream = predict_stream(tagger, [*many_texts(9), BAD, "more"], mini_batch_size=4, errors="raise")
    found = []
    with pytest.raises(PredictionError, match="item 9 of the stream") as caught:
        found.extend(stream)
    assert caught.value.index == 9
    assert isinstance(caught.value.__cause__, TypeError)
    expected = [Sentence(text) for text in many_texts(9)]
    tagger.predict(expected)
    assert largest_difference(all_labels(found), all_labels(expected)) < ROUNDING
    assert list(stream) == []


def test_stream_error_keeps_no_window_alive_and_can_be_pickled(tagger: Model) -> None:
    """An error that is kept with its sentence does not keep the sentences around it."""
    given = [*sentences(6), words(BAD), *sentences(6)]
    others = weakref.WeakSet(given[:6] + given[7:])
    kept = [p for p in predict_stream(tagger, iter(given), mini_batch_size=4) if p.has_metadata("prediction_error")]
    given = []
    gc.collect()
    assert len(kept) == 1
    assert not others
    error = pickle.loads(pickle.dumps(kept[0].get_metadata("prediction_error")))
    assert (error.index, str(error)) == (6, str(kept[0].get_metadata("prediction_error")))


def test_stream_predicts_in_parts_what_fails_together(tagger: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mini-batch that needs more memory than there is, is predicted in parts, with the same labels."""
    stock, sizes = tagger.forward, []

    def forward(tensor: torch.Tensor, lengths: torch.Tensor) -> Any:
        sizes.append(len(lengths))
        if len(lengths) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(tensor, lengths)

    expected = sentences(20)
    tagger.predict(expected, mini_batch_size=8)
    monkeypatch.setattr(tagger, "forward", forward)
    found = list(predict_stream(tagger, sentences(20), mini_batch_size=8, errors="raise"))
    assert max(sizes) == 8
    assert largest_difference(all_labels(found), all_labels(expected)) < ROUNDING


def test_stream_lets_go_of_the_tensors_of_what_failed(tagger: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors that wait for their place in the stream hold no tensors: they would fill a GPU."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def forward(*_: Any) -> None:
        nonlocal most
        gc.collect()
        most = max(most, len(alive))
        activations = torch.zeros(3)
        alive.add(activations)
        raise RuntimeError("no memory for more")

    monkeypatch.setattr(tagger, "forward", forward)
    found = list(predict_stream(tagger, many_texts(6)))
    assert all(point.has_metadata("prediction_error") for point in found)
    assert most <= 1


def test_stream_of_a_source_that_fails_gives_what_was_read_first(tagger: Model) -> None:
    """What was read before the source failed comes out predicted, then the source's own error is raised."""

    def source() -> Iterator[str]:
        yield from TEXTS
        raise OSError("the disk is gone")

    found = []
    with pytest.raises(OSError, match="the disk is gone"):
        found.extend(predict_stream(tagger, source(), mini_batch_size=4))
    assert len(found) == len(TEXTS)
    assert any(all_labels(found))


def test_stream_interrupted_at_once_leaves_sentences_without_links(
    reader_of_context: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the midst of a window is not taken for a bad sentence, and nothing stays linked."""

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(reader_of_context, "predict", interrupt)
    given = sentences(10)
    reader_of_context.train()
    with pytest.raises(KeyboardInterrupt):
        list(predict_stream(reader_of_context, given))
    assert not any(sentence.is_context_set() for sentence in given)
    assert reader_of_context.training


@pytest.mark.parametrize("how", ["close", "throw"])
def test_stream_may_be_ended_at_any_time(tagger: Model, how: str) -> None:
    """A stream that is closed, or gets an error thrown into it, leaves the model as it was."""
    tagger.train()
    expected = [module.training for module in tagger.modules()]
    stream: Any = predict_stream(tagger, itertools.cycle(TEXTS), mini_batch_size=4, window=2)
    next(stream)
    if how == "close":
        stream.close()
    else:
        with pytest.raises(ZeroDivisionError):
            stream.throw(ZeroDivisionError())
    assert next(stream, None) is None
    assert [module.training for module in tagger.modules()] == expected


def test_stream_of_a_model_in_training_mode_has_no_dropout_and_gives_the_mode_back(base: BASE) -> None:
    """A model that was just trained predicts without dropout, and each of its modules is in its own mode afterwards."""
    model = build("sequence-tagger", base("bert"))
    expected = all_labels(predict_stream(model, sentences(20)))
    model.train()
    model.embeddings.model.eval()
    modes = [module.training for module in model.modules()]
    assert len(set(modes)) == 2
    found = []
    for point in predict_stream(model, sentences(20), mini_batch_size=4, window=2):
        assert [module.training for module in model.modules()] == modes
        found.append(labels(point))
    assert largest_difference(found, expected) < ROUNDING


def test_stream_leaves_no_gradient(tagger: Model) -> None:
    """Predicting builds no graph, also on a model that is being trained."""
    tagger.train()
    found = list(predict_stream(tagger, TEXTS, embedding_storage_mode="cpu"))
    assert not any(token.embedding.requires_grad for point in found for token in point)


def test_stream_of_pairs_keeps_the_batches_of_flair(base: BASE) -> None:
    """Pairs are predicted bit by bit as in a list: Flair does not sort them."""
    name = "text-pair-classifier"
    model, expected = build(name, base("bert")), points_of(name)
    model.predict(expected, mini_batch_size=4)
    found = list(predict_stream(model, points_of(name), mini_batch_size=4, window=1))
    assert all(isinstance(point, DataPair) for point in found)
    assert all_labels(found) == all_labels(expected)


def test_stream_with_a_pair_among_sentences_names_it(tagger: Model) -> None:
    """A data point of another kind fails alone."""
    pair = DataPair(words("a man"), words("a dog"))
    found = list(predict_stream(tagger, [*sentences(5), pair], mini_batch_size=2))
    assert found[5] is pair
    assert pair.has_metadata("prediction_error")
    assert any(all_labels(found[:5]))


def test_stream_shows_a_bar_when_asked(tagger: Model, capfd: pytest.CaptureFixture[str]) -> None:
    """The bar counts items, knows their number where the input does, and is off unless asked for."""
    list(predict_stream(tagger, TEXTS))
    assert capfd.readouterr().err == ""
    list(predict_stream(tagger, TEXTS, verbose=True))
    assert f"{len(TEXTS)}/{len(TEXTS)}" in capfd.readouterr().err
    list(predict_stream(tagger, iter([*TEXTS, None]), verbose=True))
    assert f"{len(TEXTS) + 1} items" in capfd.readouterr().err


@pytest.mark.parametrize(
    "item",
    ["a text", Sentence(["a"]), DataPair(Sentence(["a"]), Sentence(["b"])), None, b"x"],
    ids=lambda item: type(item).__name__,
)
def test_stream_of_one_item_is_refused_at_once(tagger: Model, item: Any) -> None:
    """A text is not taken for a stream of letters, nor a sentence for one of words."""
    with pytest.raises(PredictionSetupError, match="Put it into a list"):
        predict_stream(tagger, item)


@pytest.mark.parametrize("name", ["loss", "return_loss", "sentences", "label_threshold", "batch_size"])
def test_stream_names_an_argument_that_the_model_does_not_take(tagger: Model, name: str) -> None:
    """A misspelt argument is refused at once, with what can be passed."""
    with pytest.raises(PredictionSetupError, match=f"'{name}'.*SequenceTagger.predict takes .*'label_name'"):
        predict_stream(tagger, TEXTS, **{name: True})


def test_stream_of_several_tasks_takes_what_all_of_them_take(base: BASE) -> None:
    """Arguments of a multitask model go to all of its tasks, so all must take them."""
    model = build("multitask", base("bert"))
    options = {"return_probabilities_for_all_classes": True, "embedding_storage_mode": "none"}
    assert any(all_labels(predict_stream(model, sentences(5), **options)))
    with pytest.raises(PredictionSetupError, match="force_token_predictions"):
        predict_stream(model, TEXTS, force_token_predictions=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"mini_batch_size": 0},
        {"mini_batch_size": None},
        {"window": 0},
        {"window": 1.5},
        {"errors": "ignore"},
        {"use_tokenizer": "segtok"},
    ],
)
def test_stream_refuses_values_that_mean_nothing(tagger: Model, settings: dict[str, Any]) -> None:
    """Sizes count from one on, and errors are warned of or raised."""
    with pytest.raises(PredictionSetupError, match=next(iter(settings))):
        predict_stream(tagger, TEXTS, **settings)


@pytest.mark.parametrize("model", [ClusteringModel, LanguageModel, "ner", torch.nn.Linear(1, 1)], ids=str)
def test_stream_refuses_what_is_no_model_of_sentences(model: Any) -> None:
    """Only what labels data points can label a stream of them."""
    with pytest.raises(PredictionSetupError, match="Pass a model"):
        predict_stream(model, TEXTS)


def test_stream_predicts_with_stock_embeddings(base: BASE) -> None:
    """Models without an adapter are streamed as well."""
    model = (
        ZOO["sequence-tagger"].build(lambda **kwargs: TransformerWordEmbeddings(base("bert"), **kwargs), None).eval()
    )
    assert not isinstance(model.embeddings, PeftTransformerWordEmbeddings)
    expected = sentences(10)
    model.predict(expected)
    assert all_labels(predict_stream(model, sentences(10))) == all_labels(expected)
