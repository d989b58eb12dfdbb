"""A load proves itself through to the labels: what is edited in a file whose sums are right again is noticed."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from flair.data import Sentence
from flair.embeddings import PooledFlairEmbeddings, StackedEmbeddings, TransformerWordEmbeddings
from flair.models import TextClassifier
from flair.nn import Model

import flair_peft
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.adapted import ForwardPass
from flair_peft.errors import ModelFileError, StateMismatchError, UnsupportedStateError
from flair_peft.models import head_probe
from tests.support.classic import characters, tagger
from tests.support.configs import lora
from tests.support.files import resign
from tests.support.round_trip import Factories
from tests.support.selection import few
from tests.support.zoo import ZOO

Base = Callable[[str], str]

HEAD, DOCUMENT = "head.safetensors", "flair_peft.json"
VECTORS = f"{head_probe.KEY}/vectors/0/vectors"
LORA = lora()
DEFAULT = frozenset({"text-classifier", "sequence-tagger-rnn-crf", "relation-extractor", "tars-tagger", "multitask"})


@pytest.fixture(scope="module")
def saved(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function from the name of a model to the directory of its checkpoint."""
    places: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in places:
            torch.manual_seed(1)
            factories = Factories(base("bert"), LORA)
            places[name] = tmp_path_factory.mktemp(name) / "model"
            flair_peft.save_pretrained(ZOO[name].build(factories.words, factories.documents), places[name])
        return places[name]

    return save


@pytest.fixture
def place(saved: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Return a function from the name of a model to a copy of its checkpoint."""
    return lambda name="text-classifier": Path(shutil.copytree(saved(name), tmp_path / name))


def _learned(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Return the names of the tensors of the head."""
    return [
        name
        for name, tensor in tensors.items()
        if "state_dict/" in name and "embeddings." not in name and tensor.dim() and tensor.is_floating_point()
    ]


@pytest.mark.parametrize("name", few([n for n in ZOO if "verbalizer" not in n], DEFAULT))  # whose head is embeddings
def test_other_rows_of_a_head_are_noticed(name: str, place: Callable[..., Path]) -> None:
    """Whatever the class of the model: rows of a tensor of its head take one another's place, or the only one grows."""
    directory = place(name)
    assert isinstance(flair_peft.from_pretrained(directory), ZOO[name].model_class)
    tensors = safetensors.torch.load_file(directory / HEAD)
    names = _learned(tensors)
    assert names
    for key in names:
        other = tensors[key].roll(1, 0).contiguous() if len(tensors[key]) > 1 else tensors[key] * 1.5
        changed = {**tensors, key: other}
        if torch.equal(changed[key], tensors[key]):
            continue
        safetensors.torch.save_file(changed, directory / HEAD, {"format": "pt"})
        resign(directory)
        with pytest.raises(StateMismatchError, match="of its head give something else"):
            flair_peft.from_pretrained(directory)
        flair_peft.from_pretrained(directory, verify=False)


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    found = [value] if isinstance(value, dict) and value.get("$type") == "dictionary" else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*found, *(inner for part in parts for inner in _dictionaries(part))]


@pytest.mark.parametrize("name", few([n for n in ZOO if "regressor" not in n], DEFAULT))
def test_another_order_of_labels_is_noticed(name: str, place: Callable[..., Path]) -> None:
    """The last two labels of a dictionary change their places."""
    directory = place(name)

    def swap(document: dict[str, Any]) -> None:
        items = _dictionaries(document["model"])[-1]["items"]
        items[-2:] = items[:-3:-1]

    resign(directory, swap)
    with pytest.raises(StateMismatchError, match="settings, labels or vocabulary"):
        flair_peft.from_pretrained(directory)
    assert flair_peft.from_pretrained(directory, verify=False)


@pytest.mark.parametrize(
    "change",
    [
        {"multi_label": True},
        {"multi_label_threshold": 0.1},
        {"label_type": "other"},
        *({"embeddings": change} for change in ({"cls_pooling": "mean"}, {"context_length": 32}, {"layers": "0"})),
        {"embeddings": {"respect_document_boundaries": False}},
    ],
    ids=str,
)
def test_another_setting_is_noticed(change: dict[str, Any], place: Callable[..., Path]) -> None:
    """What decides how a sentence is read and how scores become labels is what it was when the model was saved."""
    directory, changes = place(), dict(change)

    def set_them(document: dict[str, Any]) -> None:
        document["model"]["document_embeddings"].update(changes.pop("embeddings", {}))
        document["model"].update(changes)

    resign(directory, set_them)
    with pytest.raises(StateMismatchError):
        flair_peft.from_pretrained(directory)


@pytest.mark.parametrize("words", [("b", "l"), ("z", "q")], ids=str)
def test_another_order_of_a_vocabulary_is_noticed(words: tuple[str, str], place: Callable[..., Path]) -> None:
    """Two tokens change their numbers, be they in the probe sentence or not."""
    directory = place()
    path = directory / "tokenizer" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = words
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    resign(directory)
    with pytest.raises(StateMismatchError):
        flair_peft.from_pretrained(directory)


def test_head_of_a_file_is_proven_as_that_of_a_directory_is(
    place: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trainer's .pt files hold the same probe."""
    model = flair_peft.from_pretrained(place())
    with monkeypatch.context() as patch:
        patch.setattr(head_probe, "take", lambda live, readings, take=head_probe.take: take(_rolled(live), readings))
        model.save(tmp_path / "edited.pt")
    with pytest.raises(StateMismatchError, match="decoder"):
        TextClassifier.load(tmp_path / "edited.pt")
    model.save(tmp_path / "model.pt")
    TextClassifier.load(tmp_path / "model.pt")


def _rolled(model: Any) -> Model:
    other = copy.deepcopy(model)
    other.decoder.weight.data = other.decoder.weight.data.roll(1, 0)
    return other


def test_file_without_a_probe_of_its_head_loads_and_verify_says_so(
    place: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Files of earlier versions hold none: they load, and what was not checked is said to whoever asks."""
    directory = place()
    tensors = safetensors.torch.load_file(directory / HEAD)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(head_probe.KEY)}
    assert len(kept) < len(tensors)
    safetensors.torch.save_file(kept, directory / HEAD, {"format": "pt"})
    resign(directory, lambda document: document["model"].pop(head_probe.KEY))
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        flair_peft.from_pretrained(directory)
        assert not [text for text in caplog.messages if "what its head gives" in text]
        flair_peft.verify(directory)
    assert [text for text in caplog.messages if "what its head gives" in text]


@pytest.mark.parametrize(
    "damage",
    [
        [],
        {"outputs": []},
        {"outputs": {"decoder": 1}},
        {"outputs": {}, "vectors": 3},
        {"outputs": {}, "vectors": [3]},
        "x",
    ],
    ids=str,
)
def test_damaged_probe_of_a_head_is_refused(damage: Any, place: Callable[..., Path]) -> None:
    """Nonsense in its place is an error of this package."""
    directory = place()
    tensors = safetensors.torch.load_file(directory / HEAD)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(head_probe.KEY)}
    safetensors.torch.save_file(kept, directory / HEAD, {"format": "pt"})
    resign(directory, lambda document: document["model"].update({head_probe.KEY: damage}))
    with pytest.raises(ModelFileError, match="probe of the head"):
        flair_peft.from_pretrained(directory)
    flair_peft.from_pretrained(directory, verify=False)


def test_saving_draws_no_random_numbers_and_leaves_the_mode(place: Callable[..., Path], tmp_path: Path) -> None:
    """A training goes on as if nothing had been saved: its random numbers, its dropout and its hooks are as before."""
    model = flair_peft.from_pretrained(place()).train()
    state = torch.get_rng_state()
    flair_peft.save_pretrained(model, tmp_path / "again")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


def test_model_that_cannot_play_the_probe_is_saved_all_the_same(
    place: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A class of a user's own may want other data points: nothing is refused because of that."""

    class Own(TextClassifier):
        """Predicts for nobody but who knows the word."""

        def predict(self, *args: Any, **kwargs: Any) -> Any:
            """Raise an error, as for data points that are not what the model reads."""
            raise KeyError("word")

    model = flair_peft.from_pretrained(place())
    model.__class__ = Own
    flair_peft.save_pretrained(model, tmp_path / "own")
    loaded = flair_peft.from_pretrained(tmp_path / "own")
    sentence = Sentence("Berlin")
    TextClassifier.predict(loaded, sentence)
    assert sentence.labels


def test_labels_out_of_numpy_and_nested_sets_are_those_that_were_saved(base: Base, tmp_path: Path) -> None:
    """The digest of settings is of what they are, not of how a set happens to be ordered or a string is made."""
    found = [
        {"a": {frozenset({"x", "y"}), frozenset({"z"})}, "b": {np.str_("PER"), np.str_("LOC")}, 1: (None, 2.5)},
        {"b": {"LOC", "PER"}, 1: [None, 2.5], "a": {frozenset({"z"}), frozenset({"y", "x"})}},
    ]
    assert head_probe.digest(found[0]) == head_probe.digest(found[1])
    assert head_probe.digest(found[0]) != head_probe.digest({**found[1], "b": {"LOC"}})


def test_embeddings_that_remember_words_are_compared_as_if_they_knew_none(base: Base, tmp_path: Path) -> None:
    """No file holds what they remember: the probe reads nothing of it, and leaves nothing in it."""
    pooled = PooledFlairEmbeddings(characters(), pooling="max")
    model = tagger(StackedEmbeddings([TransformerWordEmbeddings(base("bert")), pooled]))
    model.predict(Sentence("Berlin lives in Merkel"))
    words = {word: vector.clone() for word, vector in pooled.word_embeddings.items()}
    counts = dict(pooled.word_count)
    flair_peft.save_pretrained(model, tmp_path / "model")
    assert pooled.word_count == counts
    assert all(torch.equal(vector, words[word]) for word, vector in pooled.word_embeddings.items())
    loaded = flair_peft.from_pretrained(tmp_path / "model")
    assert not any(part.word_count for part in loaded.modules() if isinstance(part, PooledFlairEmbeddings))
    for layer in model.embeddings.embeddings[0].model.encoder.layer:
        layer.intermediate.intermediate_act_fn = torch.nn.ReLU()
    with pytest.raises(UnsupportedStateError, match="does not load as the same model"):
        flair_peft.save_pretrained(model, tmp_path / "changed")


def test_memory_of_another_thread_is_its_own_while_a_probe_runs() -> None:
    """It finds what was there and what it puts there, and the probe finds neither."""
    pooled = PooledFlairEmbeddings(characters())
    model = tagger(pooled)
    pooled.word_count["Berlin"] = 1
    with head_probe._without_memories(model):
        pooled.word_count["in"] = 5
        other = threading.Thread(target=lambda: pooled.word_count.__setitem__("in", pooled.word_count["Berlin"] + 1))
        other.start()
        other.join()
        assert "Berlin" not in pooled.word_count
        assert pooled.word_count["in"] == 5
    assert pooled.word_count == {"Berlin": 1, "in": 2}


def test_memory_is_the_one_it_was_after_probes_of_two_threads() -> None:
    """Each puts back what it found, so that neither may find the other's."""
    pooled = PooledFlairEmbeddings(characters())
    model, memory = tagger(pooled), pooled.word_count
    inside, may_end = threading.Event(), threading.Event()

    def probe() -> None:
        with head_probe._without_memories(model):
            inside.set()
            may_end.wait(10)

    first, second = threading.Thread(target=probe), threading.Thread(target=lambda: head_probe.answers(model))
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.5)
    may_end.set()
    first.join()
    second.join()
    assert pooled.word_count is memory
    assert memory == {}


def test_probe_that_cannot_run_here_is_said_and_memory_errors_pass(
    place: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What a device lacks is no sign of a changed file."""
    directory = place()

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented for 'Half'")

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    with caplog.at_level(logging.WARNING, logger="flair_peft"), monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "predict", fail)
        flair_peft.from_pretrained(directory)
    assert "It cannot predict here: not implemented" in caplog.text
    monkeypatch.setattr(TextClassifier, "predict", run_out)
    with pytest.raises(torch.OutOfMemoryError):
        flair_peft.from_pretrained(directory)


def test_save_without_memory_for_the_probe_keeps_the_model(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training that began ends with its model saved, if without the proof of its head."""
    factories = Factories(base("bert"), LORA)
    entry = ZOO["text-classifier"]
    model = entry.build(factories.words, factories.documents)
    expected = entry.predict(model, entry.corpus())

    def run_out(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("none left")

    with monkeypatch.context() as patch:
        patch.setattr(TextClassifier, "predict", run_out)
        flair_peft.save_pretrained(model, tmp_path / "model")
    assert entry.predict(flair_peft.from_pretrained(tmp_path / "model"), entry.corpus()) == expected


@pytest.mark.parametrize("name", ["text-classifier", "sequence-tagger-rnn-crf"])
@pytest.mark.parametrize("step", [flair_peft.save_pretrained, lambda _, path: flair_peft.from_pretrained(path)])
def test_predictions_of_another_thread_are_no_part_of_a_proof(
    step: Callable[..., Any], name: str, place: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that predicts with the model while it is probed is heard by nobody, and gets what it gets alone."""
    path, entry = place(name), ZOO[name]
    model = flair_peft.from_pretrained(path)
    expected, take = entry.predict(model, entry.corpus()), head_probe._make_point
    elsewhere = []

    def while_another_predicts(part: Any) -> Any:
        if threading.current_thread() is threading.main_thread():
            others = [part.embeddings.embed, lambda _: elsewhere.append(entry.predict(part, entry.corpus()))]
            for other in others:
                thread = threading.Thread(target=other, args=[Sentence("Something else")])
                thread.start()
                thread.join()
        return take(part)

    with monkeypatch.context() as patch:
        patch.setattr(head_probe, "_make_point", while_another_predicts)
        step(model, path)
    assert elsewhere == [expected]
    assert entry.predict(flair_peft.from_pretrained(path, verify="full"), entry.corpus()) == expected


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of rows of each forward pass."""
    rows, run = list[int](), ForwardPass.run

    def counting(self: ForwardPass) -> Any:
        rows.append(len(self.inputs["input_ids"]))
        return run(self)

    monkeypatch.setattr(ForwardPass, "run", counting)
    return rows


def test_load_that_proves_vectors_and_head_makes_one_forward_pass(
    place: Callable[..., Path], passes: list[int]
) -> None:
    """The vectors that are proven are those that the head's sentence gives: the weights are read once for both."""
    path = place()
    passes.clear()
    flair_peft.from_pretrained(path)
    assert passes == [1]


def test_vectors_are_replayed_alone_where_the_head_reads_another_sentence_first(
    place: Callable[..., Path],
    passes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A sentence that is not the stored one proves nothing, and refutes nothing."""
    path, predict = place(), TextClassifier.predict

    def reading_another_first(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.embeddings.embed([Sentence("Something else")])
        return predict(self, *args, **kwargs)

    monkeypatch.setattr(TextClassifier, "predict", reading_another_first)
    passes.clear()
    flair_peft.from_pretrained(path)
    assert passes == [1, 1, 1]
    assert "Not checked" not in caplog.text
    _change_vectors(path, VECTORS)
    with pytest.raises(StateMismatchError, match="its vectors of a probe sentence are"):
        flair_peft.from_pretrained(path)


def _change_vectors(directory: Path, name: str) -> None:
    tensors = safetensors.torch.load_file(directory / HEAD)
    safetensors.torch.save_file({**tensors, name: tensors[name] * 2}, directory / HEAD, {"format": "pt"})
    resign(directory)


@pytest.mark.parametrize("name", ["text-classifier", "multitask"])
def test_vectors_that_were_changed_are_noticed(name: str, place: Callable[..., Path]) -> None:
    """Vectors that the embeddings do not give are refused, though all that the head gives is right."""
    path = place(name)
    _change_vectors(path, VECTORS)
    with pytest.raises(StateMismatchError, match="its vectors of a probe sentence are"):
        flair_peft.from_pretrained(path)


@pytest.mark.parametrize(
    ("changed", "said"), [("input_ids", "its vectors of a probe sentence are"), ("text_ids", "its tokenizer gives")]
)
def test_other_ids_of_a_probe_are_noticed(changed: str, said: str, place: Callable[..., Path]) -> None:
    """The sentence that was read counts, and so does what the tokenizer made of a text."""
    path = place()
    resign(path, lambda document: document["model"][head_probe.KEY]["vectors"][0][changed].reverse())
    with pytest.raises(StateMismatchError, match=said):
        flair_peft.from_pretrained(path)


@pytest.mark.parametrize("ids", [3, ["a"], [1] * 5000, [10**9]], ids=["a number", "words", "many", "unknown"])
def test_damaged_ids_beside_a_head_are_refused(ids: Any, place: Callable[..., Path]) -> None:
    """Nonsense in the place of the sentence is an error of this package."""
    path = place()
    resign(path, lambda document: document["model"][head_probe.KEY]["vectors"][0].update(input_ids=ids))
    with pytest.raises(ModelFileError):
        flair_peft.from_pretrained(path)


def test_probe_of_earlier_versions_is_replayed_alone(
    base: Base, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read a text of their own for the vectors, which stand among the parameters of the embeddings."""
    factories = Factories(base("bert"), LORA)
    with monkeypatch.context() as patch:
        patch.setattr(vector_probe.Reading, "going_on", lambda _: contextlib.nullcontext())
        model = ZOO["text-classifier"].build(factories.words, factories.documents)
        flair_peft.save_pretrained(model, tmp_path / "model")
    state = json.loads((tmp_path / "model" / DOCUMENT).read_text())["model"]
    assert "vectors" not in state[head_probe.KEY]
    assert state["document_embeddings"]["probe"]["input_ids"] == vector_probe.probe_ids(factories.made[0])
    passes.clear()
    flair_peft.from_pretrained(tmp_path / "model")
    assert passes == [1, 1]
    _change_vectors(tmp_path / "model", "document_embeddings/probe/vectors")
    with pytest.raises(StateMismatchError, match="its vectors of a probe sentence are"):
        flair_peft.from_pretrained(tmp_path / "model")


def test_embeddings_that_pad_have_a_probe_of_their_own(base: Base, tmp_path: Path) -> None:
    """What the head has them read is more than the tokens of a sentence: vectors are taken apart, and proven."""
    factories = Factories(base("bert"), LORA, force_max_length=True)
    flair_peft.save_pretrained(ZOO["text-classifier"].build(factories.words, factories.documents), tmp_path / "model")
    state = json.loads((tmp_path / "model" / DOCUMENT).read_text())["model"]
    assert "vectors" not in state[head_probe.KEY]
    assert state[head_probe.KEY]["outputs"]
    assert flair_peft.from_pretrained(tmp_path / "model")
    _change_vectors(tmp_path / "model", "document_embeddings/probe/vectors")
    with pytest.raises(StateMismatchError, match="its vectors of a probe sentence are"):
        flair_peft.from_pretrained(tmp_path / "model")


def test_load_without_verification_makes_no_forward_pass(place: Callable[..., Path], passes: list[int]) -> None:
    """``verify=False`` asks for no proof, and pays for none."""
    path = place()
    passes.clear()
    flair_peft.from_pretrained(path, verify=False)
    assert passes == []


def test_embeddings_of_a_loaded_model_read_in_their_own_way_again(place: Callable[..., Path]) -> None:
    """Nothing of the proof stays in the model: it can be copied, stored and loaded."""
    model: Any = flair_peft.from_pretrained(place())
    assert "hidden_states" not in vars(model.embeddings)
    assert "hidden_states" not in vars(copy.deepcopy(model).embeddings)
