"""Plain Flair models in directories: each comes back as the classes that it had, bit by bit, or is refused by name.

The oracles are the live model before it is saved, and what stock Flair loads from its own file.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import (
    CharacterEmbeddings,
    DocumentCNNEmbeddings,
    DocumentLMEmbeddings,
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    DocumentTFIDFEmbeddings,
    FlairEmbeddings,
    HashEmbeddings,
    OneHotEmbeddings,
    PooledFlairEmbeddings,
    StackedEmbeddings,
    TransformerDocumentEmbeddings,
    TransformerEmbeddings,
    TransformerWordEmbeddings,
    WordEmbeddings,
)
from flair.models import LanguageModel, MultitaskModel, TextClassifier
from flair.nn import Model
from flair.nn.decoder import LabelVerbalizerDecoder
from safetensors.torch import load_file, save_file

import flair_peft
from flair_peft.embeddings import plain_transformers
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import (
    AdapterConfigError,
    BaseMismatchError,
    BaseModelNotFoundError,
    ModelFileError,
    SaveError,
    UnsafeFileError,
    UnsupportedStateError,
)
from flair_peft.inspection.report import inspect
from tests.support import tiny
from tests.support.classic import tagger
from tests.support.configs import lora
from tests.support.files import Payload, resign
from tests.support.methods import perturb_
from tests.support.models import CLASSIFIER, TAGGER, make
from tests.support.zoo import ZOO, Entry

Base = Callable[[str], str]

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,!?"


def dictionary(items: list[str]) -> Dictionary:
    made = Dictionary()
    for item in items:
        made.add_item(item)
    return made


def characters(*, is_forward: bool = True, **options: Any) -> FlairEmbeddings:
    """Return embeddings of a tiny character language model with random weights."""
    model = LanguageModel(dictionary(list(LETTERS)), is_forward, hidden_size=16, nlayers=1, embedding_size=8)
    return FlairEmbeddings(model, name=f"characters-{is_forward}", **options)


def table(**options: Any) -> WordEmbeddings:
    """Return a table of words, of which one would be a mark of the format if it were not told from one."""
    words = {word: index for index, word in enumerate(["Berlin", "is", "$type", "George", "<unk>", "movie"])}
    made = WordEmbeddings(None, vocab=words, embedding_length=6, name="mine", **options)
    made.embedding.weight.data.normal_()
    return made


def letters() -> CharacterEmbeddings:
    return CharacterEmbeddings(dictionary(list(LETTERS)))


CLASSIC: dict[str, Callable[[], Any]] = {
    "characters": characters,
    "both directions": lambda: StackedEmbeddings([characters(), characters(is_forward=False, fine_tune=True)]),
    "table": table,
    "tuned table": lambda: table(fine_tune=True, force_cpu=False, stable=True),
    "letters": letters,
    "one hot": lambda: OneHotEmbeddings(dictionary(["Berlin", "is"]), embedding_length=5),
    "hash": lambda: HashEmbeddings(10, 5),
    "memory": lambda: PooledFlairEmbeddings(characters()),
}

QUICK = frozenset(
    {
        *("text-classifier-prototypes", "sequence-tagger-rnn-crf", "sequence-tagger-stacked", "span-classifier"),
        *("relation-extractor", "text-pair-regressor", "tars-classifier", "lemmatizer", "multitask"),
    }
)
"""Models of the zoo that differ most in what Flair stores of them."""

DOCUMENTS: dict[str, Callable[[], Any]] = {
    "pool": lambda: DocumentPoolEmbeddings([table(), characters()], fine_tune_mode="nonlinear"),
    "rnn": lambda: DocumentRNNEmbeddings([table(), characters()], hidden_size=8),
    "cnn": lambda: DocumentCNNEmbeddings([table()], kernels=((4, 2), (4, 3))),
    "language models": lambda: DocumentLMEmbeddings([characters()]),
}


def own_transformers(model: Model) -> list[TransformerEmbeddings]:
    return [module for module in model.modules() if isinstance(module, TransformerEmbeddings)]


def stored_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*.safetensors"))


def assert_same(model: Model, loaded: Model, entry: Entry, expected: Any) -> None:
    """Return if two models have the same classes and the same bits, and predict the same."""
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert theirs[name].dtype == tensor.dtype, name
        assert torch.equal(tensor, theirs[name]), name
    assert type(loaded) is type(model)
    assert {type(each) for each in own_transformers(loaded)} == {type(each) for each in own_transformers(model)}
    assert not any(isinstance(module, PeftTransformerEmbeddings) for module in loaded.modules())
    assert entry.predict(loaded, entry.corpus()) == expected


def round_trip(model: Model, entry: Entry, directory: Path, **options: Any) -> Model:
    """Save and load a model, and return the loaded one, which is the same."""
    expected = entry.predict(model, entry.corpus())
    flair_peft.save_pretrained(model, directory, **options)
    loaded = Model.load(directory)
    assert_same(model, loaded, entry, expected)
    return loaded


def says_nothing_of_adapters(directory: Path) -> bool:
    """Whether neither the card nor any file of a directory speaks of adapters."""
    return not any(b"adapter" in path.read_bytes().lower() for path in directory.rglob("*") if path.is_file())


@pytest.fixture
def own(base: Base, tmp_path: Path) -> Path:
    """Return a base of the test's own."""
    return Path(shutil.copytree(base("bert"), tmp_path / "base"))


def plain_classifier(base: str | Path, **options: Any) -> TextClassifier:
    return make(CLASSIFIER, str(base), None, is_stock=True, **options)


def train_(model: torch.nn.Module) -> None:
    """Change all weights of a model a little, but for the input embeddings of transformers."""
    matrices = {id(each.model.get_input_embeddings().weight) for each in own_transformers(model)}
    generator = torch.Generator().manual_seed(3)
    for parameter in (each for each in model.parameters() if id(each) not in matrices):
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in QUICK else pytest.mark.matrix) for n in ZOO])
def test_plain_model_comes_back_as_it_was(name: str, base: Base, tmp_path: Path) -> None:
    """Of every model class what was trained is stored, and no more; stock Flair's own file gives the same."""
    entry, directory = ZOO[name], tmp_path / "model"
    model = make(entry, base("bert"), None, is_stock=True)
    train_(model)
    loaded = round_trip(model, entry, directory)
    left_out = [transformer.base["left_out"] for transformer in inspect(directory).transformers]
    assert {count for count in left_out if count} == {1}
    assert says_nothing_of_adapters(directory)
    if entry.loads_in_stock is True:
        model.save(tmp_path / "stock.pt")
        stock = type(model).load(tmp_path / "stock.pt")
        assert entry.predict(stock, entry.corpus()) == entry.predict(loaded, entry.corpus())


@pytest.mark.parametrize("kind", CLASSIC)
def test_classic_word_embeddings_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    """Tables and language models are JSON and tensors, alone and from one save to the next."""
    model = TAGGER.build(lambda **_: CLASSIC[kind](), None)
    loaded = round_trip(model, TAGGER, tmp_path / "first")
    round_trip(loaded, TAGGER, tmp_path / "second")
    assert says_nothing_of_adapters(tmp_path)


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_classic_document_embeddings_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    """So are pools, recurrent and convolutional networks over them."""
    round_trip(CLASSIFIER.build(None, lambda **_: DOCUMENTS[kind]()), CLASSIFIER, tmp_path / "model")


def test_stack_of_classic_and_transformer_embeddings_comes_back_as_it_was(base: Base, tmp_path: Path) -> None:
    """Of the transformer only what its base lacks is stored, wherever it stands."""
    stack = StackedEmbeddings([table(), TransformerWordEmbeddings(base("bert"), layers="all"), characters()])
    model = TAGGER.build(lambda **_: stack, None)
    round_trip(model, TAGGER, tmp_path / "model")
    assert stored_bytes(tmp_path / "model") < 50_000


ARCHITECTURES = [
    *("t5", "bert-mlm"),
    *(pytest.param(n, marks=pytest.mark.matrix) for n in ("xlm-roberta", "albert", "bert-slow", "modernbert", "xlnet")),
]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_model_on_another_architecture_survives_a_second_save(
    architecture: str, base: Base, tmp_path: Path
) -> None:
    """Tied weights, slow tokenizers, and poolers that the base's files lack."""
    model = make(TAGGER, base(architecture), None, is_stock=True)
    round_trip(round_trip(model, TAGGER, tmp_path / "frozen"), TAGGER, tmp_path / "again")
    perturb_(model, seed=3, scale=0.02)
    round_trip(model, TAGGER, tmp_path / "trained")
    assert (tmp_path / "trained" / "base.safetensors").is_file()


def test_tied_weights_are_stored_once(base: Base, tmp_path: Path) -> None:
    """T5 has one matrix under two names."""
    model = make(TAGGER, base("t5"), None, is_stock=True)
    perturb_(model, seed=3, scale=0.02)
    flair_peft.save_pretrained(model, tmp_path / "model")
    state = model.embeddings.model.state_dict()
    stored = load_file(tmp_path / "model" / "base.safetensors")
    assert len(stored) == len(state) - 1
    assert {"shared.weight", "encoder.embed_tokens.weight"} <= state.keys()


@pytest.mark.parametrize(
    ("pooling", "dtype"), [("cls", torch.bfloat16), ("mean", torch.float64), ("max", torch.float16)], ids=str
)
def test_converted_model_keeps_its_dtype(pooling: str, dtype: torch.dtype, base: Base, tmp_path: Path) -> None:
    """Stock Flair's file gives fp32 back; a directory gives what was saved, also of what only the base holds."""
    model = plain_classifier(base("roberta"), cls_pooling=pooling).to(dtype)
    loaded = round_trip(model, CLASSIFIER, tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert stored_bytes(tmp_path / "model") < 20_000


def test_base_in_half_precision_comes_back_in_it(base: Base, tmp_path: Path) -> None:
    """Stock Flair predicts with such a base once the head is converted, before the save or after the load."""
    model = plain_classifier(base("bert"), transformers_model_kwargs={"torch_dtype": torch.bfloat16})
    flair_peft.save_pretrained(model, tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    assert {parameter.dtype for parameter in loaded.embeddings.parameters()} == {torch.bfloat16}
    assert loaded.decoder.weight.dtype == torch.float32
    model.bfloat16(), loaded.bfloat16()
    assert_same(model, loaded, CLASSIFIER, CLASSIFIER.predict(model, CLASSIFIER.corpus()))


def test_weights_that_a_training_left_alone_are_left_out(base: Base, tmp_path: Path) -> None:
    """Whatever was changed is stored and nothing else, down to the last norm that was not."""
    model = plain_classifier(base("bert"))
    changed = model.embeddings.model.encoder.layer[1]
    perturb_(changed, seed=3, scale=0.02)
    round_trip(model, CLASSIFIER, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "head.safetensors")
    inside = {name.partition("embeddings.model.")[2] for name in stored if "embeddings.model." in name}
    assert inside == {
        *(f"encoder.layer.1.{name}" for name in changed.state_dict()),
        *(f"pooler.dense.{name}" for name in ("weight", "bias")),
    }


def test_pooler_alone_is_no_reason_to_need_a_base(own: Path, tmp_path: Path) -> None:
    """Nobody reads it: a model that was trained in full loads where its base is gone."""
    model = plain_classifier(own)
    for name, parameter in model.embeddings.model.named_parameters():
        if "pooler" not in name:
            parameter.data += 0.01
    flair_peft.save_pretrained(model, tmp_path / "model")
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    shutil.rmtree(own)
    assert_same(model, Model.load(tmp_path / "model"), CLASSIFIER, expected)


def test_base_is_stored_where_that_is_asked_for(own: Path, tmp_path: Path) -> None:
    """save_base=True makes a directory that needs nothing, and a base that is given for it is refused."""
    model = plain_classifier(own)
    flair_peft.save_pretrained(model, tmp_path / "model", save_base=True)
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    shutil.rmtree(own)
    assert_same(model, Model.load(tmp_path / "model"), CLASSIFIER, expected)
    with pytest.raises(AdapterConfigError, match="holds all weights"):
        flair_peft.from_pretrained(tmp_path / "model", base_model=tmp_path)


def test_moved_base_is_named_and_a_changed_one_refused(own: Path, tmp_path: Path) -> None:
    """The base is found by its path, or where the user says; what is there is the same model, or an error."""
    model = plain_classifier(own)
    flair_peft.save_pretrained(model, tmp_path / "model")
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    moved = own.rename(tmp_path / "moved")
    with pytest.raises(BaseModelNotFoundError, match="base_model=") as missing:
        Model.load(tmp_path / "model")
    for given in (moved, {str(own): str(moved)}):
        loaded = TextClassifier.load(tmp_path / "model", base_model=given, verify="full")
        assert_same(model, loaded, CLASSIFIER, expected)
    flair_peft.verify(tmp_path / "model", base_model=str(moved))
    weights = load_file(moved / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(BaseMismatchError, match="its weights differ") as changed:
        flair_peft.from_pretrained(tmp_path / "model", base_model=str(moved))
    assert not any("adapter" in str(error.value) for error in (missing, changed))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": "auto"},
        {"device_map": {"": "cpu"}},
        {"device_map": "nonsense", "offload_folder": "off"},
        {"max_memory": {"cpu": "1GB"}},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["transformer", "classic"])
def test_options_that_spread_a_base_are_refused(kind: str, options: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """Flair's own embeddings lie on one device: nothing could come of them."""
    made = plain_classifier(base("bert")) if kind == "transformer" else TAGGER.build(lambda **_: table(), None)
    flair_peft.save_pretrained(made, tmp_path / "model")
    for load in (flair_peft.from_pretrained, type(made).load):
        with pytest.raises(AdapterConfigError, match=f"Cannot use the {', '.join(sorted(options))} given") as caught:
            load(tmp_path / "model", **options)
        assert "adapter" not in str(caught.value)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("architecture", ["bert", "gemma"])
def test_side_on_which_a_tokenizer_pads_comes_back(architecture: str, side: str, base: Base, tmp_path: Path) -> None:
    """It shows in batches alone, of texts of several lengths."""
    model = plain_classifier(base(architecture), cls_pooling="mean")
    model.embeddings.tokenizer.padding_side = side
    loaded = round_trip(model, CLASSIFIER, tmp_path / "model")
    assert loaded.embeddings.tokenizer.padding_side == side
    again = round_trip(loaded, CLASSIFIER, tmp_path / "again")
    assert again.embeddings.tokenizer.padding_side == side


def test_directory_of_a_transformer_is_left_alone_without_a_word_of_adapters(own: Path) -> None:
    """The files of both would lie among each other."""
    before = {path.name: path.read_bytes() for path in own.iterdir()}
    with pytest.raises(SaveError, match="a transformers model is there") as caught:
        flair_peft.save_pretrained(plain_classifier(own), own)
    assert "adapter" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in own.iterdir()} == before


def test_merged_model_is_saved_as_a_directory(base: Base, tmp_path: Path) -> None:
    """It is a plain model, whose matrices that had no adapter are still those of its base."""
    merged = flair_peft.merge(make(TAGGER, base("bert"), lora(target_modules=["query"])))
    round_trip(merged, TAGGER, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "head.safetensors")
    assert sum("query.weight" in name for name in stored) == 2
    assert not any("key.weight" in name for name in stored)


def test_shared_transformer_is_stored_once_for_all_tasks(base: Base, tmp_path: Path) -> None:
    """Both tasks of a model have its weights, which are in the directory once."""
    model = make(ZOO["multitask"], base("bert"), None, is_stock=True)
    perturb_(model, seed=3, scale=0.02)
    flair_peft.save_pretrained(model, tmp_path / "model")
    shared = own_transformers(model)
    assert len(shared) == 1
    weights = sum(tensor.nbytes for tensor in shared[0].model.state_dict().values())
    assert weights < stored_bytes(tmp_path / "model") < 1.5 * weights


@pytest.mark.parametrize("kind", ["tasks", "tasks of a stack", "names of labels"])
@pytest.mark.parametrize("is_trained", [True, False])
def test_transformer_in_several_places_is_one_again(kind: str, is_trained: bool, base: Base, tmp_path: Path) -> None:
    """Two would each learn half of what one learns, and take the memory twice."""
    if kind == "names of labels":
        texts = TransformerDocumentEmbeddings(base("bert"))
        labels = dictionary(["good", "bad"])
        decoder = LabelVerbalizerDecoder(texts, labels)
        model: Model = TextClassifier(texts, label_dictionary=labels, label_type="class", decoder=decoder)
    else:
        words: Any = TransformerWordEmbeddings(base("bert"))
        taggers = [tagger(StackedEmbeddings([words]) if "stack" in kind else words) for _ in range(2)]
        model = MultitaskModel(taggers, task_ids=["first", "second"])
    if is_trained:
        perturb_(model, seed=3, scale=0.02)
    flair_peft.save_pretrained(model, tmp_path / "model")
    loaded = flair_peft.from_pretrained(tmp_path / "model")
    assert len(own_transformers(loaded)) == len(own_transformers(model)) == 1
    expected, found = dict(model.named_parameters()), dict(loaded.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    own_transformers(loaded)[0].embed(Sentence("Berlin is large"))


def test_transformers_of_tasks_that_are_equal_stay_two(base: Base, tmp_path: Path) -> None:
    """Each of them may learn something else."""
    taggers = [tagger(TransformerWordEmbeddings(base("bert"))) for _ in range(2)]
    flair_peft.save_pretrained(MultitaskModel(taggers, task_ids=["first", "second"]), tmp_path / "model")
    assert len(own_transformers(flair_peft.from_pretrained(tmp_path / "model"))) == 2


def test_saving_a_plain_model_changes_nothing_in_it(base: Base, tmp_path: Path) -> None:
    """State, modes and random numbers are what they were, and what the model stores of itself too."""
    model = plain_classifier(base("bert")).train()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator, modes = torch.get_rng_state(), [module.training for module in model.modules()]
    flair_peft.save_pretrained(model, tmp_path / "model")
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == [module.training for module in model.modules()]
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert not {"stored_base", "part"} & model.embeddings.to_params().keys()


def test_loaded_plain_model_trains_on(base: Base, tmp_path: Path) -> None:
    """Its weights are its own: a training does not reach the base, nor another model on it."""
    flair_peft.save_pretrained(plain_classifier(base("bert")), tmp_path / "model")
    first, second = Model.load(tmp_path / "model"), Model.load(tmp_path / "model")
    expected = CLASSIFIER.predict(second, CLASSIFIER.corpus())
    CLASSIFIER.train(first, CLASSIFIER.corpus(), tmp_path / "training")
    assert CLASSIFIER.predict(first, CLASSIFIER.corpus()) != expected
    assert CLASSIFIER.predict(second, CLASSIFIER.corpus()) == expected
    round_trip(first, CLASSIFIER, tmp_path / "trained")


def test_plain_directory_needs_no_hook(base: Base, tmp_path: Path) -> None:
    """What is stored in a directory is built by Flair's own classes alone."""
    model = plain_classifier(base("bert"))
    expected = CLASSIFIER.predict(model, CLASSIFIER.corpus())
    flair_peft.uninstall()
    try:
        flair_peft.save_pretrained(model, tmp_path / "model")
        assert_same(model, flair_peft.from_pretrained(tmp_path / "model"), CLASSIFIER, expected)
    finally:
        flair_peft.install()


class Prefers(TextClassifier):
    """Gives one label more than its decoder does, and does not store which."""

    favourite = 0

    def _mask_scores(self, scores: Any, data_points: Any) -> Any:
        scores = super()._mask_scores(scores, data_points)
        return scores + 20 * torch.eye(scores.shape[-1])[self.favourite]


def test_model_that_would_label_otherwise_behind_its_head_is_refused(base: Base, tmp_path: Path) -> None:
    """Weights and what the head gives are the same; what a user's own class makes of that is not."""
    made = plain_classifier(base("bert"))
    model = Prefers(made.embeddings, label_type="class", label_dictionary=made.label_dictionary).eval()
    flair_peft.save_pretrained(model, tmp_path / "same")
    assert_same(model, Model.load(tmp_path / "same"), CLASSIFIER, CLASSIFIER.predict(model, CLASSIFIER.corpus()))
    model.favourite = 1
    with pytest.raises(UnsupportedStateError, match="labels a probe sentence otherwise"):
        flair_peft.save_pretrained(model, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_model_that_could_not_predict_after_a_load_is_refused_and_one_that_cannot_before_is_not(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a user's class needs and does not store is missed; what it wants of a sentence is its own affair."""
    made = plain_classifier(base("bert"))
    model = Prefers(made.embeddings, label_type="class", label_dictionary=made.label_dictionary).eval()
    model.favourite = 0
    monkeypatch.delattr(Prefers, "favourite")
    with pytest.raises(UnsupportedStateError, match=r"cannot predict: AttributeError.*favourite"):
        flair_peft.save_pretrained(model, tmp_path / "lost")
    del model.favourite
    flair_peft.save_pretrained(model, tmp_path / "kept")
    assert (tmp_path / "kept").is_dir()


class MakesItsOwn(TextClassifier):
    """A classifier whose state says nothing of the embeddings that it makes."""

    source = ""

    def __init__(self, **options: Any) -> None:
        super().__init__(TransformerDocumentEmbeddings(self.source), **options)

    def _get_state_dict(self) -> dict[str, Any]:
        state = super()._get_state_dict()
        return {name: value for name, value in state.items() if name != "document_embeddings"}

    @classmethod
    def _init_model_with_state_dict(cls, state: dict[str, Any], **options: Any) -> Model:
        model = cls(label_dictionary=state["label_dictionary"], label_type=state["label_type"], **options)
        model.load_state_dict(state["state_dict"])
        return model


def test_embeddings_that_code_around_them_makes_are_stored_whole(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing in the state could say what of them is left out."""
    monkeypatch.setattr(MakesItsOwn, "source", base("bert"))
    labels = plain_classifier(base("bert")).label_dictionary
    model = MakesItsOwn(label_dictionary=labels, label_type="sentiment")
    round_trip(model, CLASSIFIER, tmp_path / "model")
    assert not (tmp_path / "model" / "tokenizer").exists()


def with_adapter(embeddings: Any) -> Any:
    """Return embeddings to whose transformer its own method added an adapter."""
    embeddings.model.add_adapter(lora())
    return embeddings


UNSTORABLE: dict[str, tuple[Callable[[Any], Any], str]] = {
    "words of a corpus": (lambda _: DocumentTFIDFEmbeddings([Sentence("Berlin")] * 2), "DocumentTFIDFEmbeddings"),
    "an adapter": (lambda at: TransformerDocumentEmbeddings(at, peft_config=lora()), "PeftTransformerDocument"),
    "an adapter in place": (lambda at: with_adapter(TransformerWordEmbeddings(at)), "PeftTransformerWord"),
}


@pytest.mark.parametrize("kind", UNSTORABLE)
def test_what_would_come_back_as_something_else_is_refused(kind: str, base: Base, tmp_path: Path) -> None:
    """Nothing is written, and the message names what it is."""
    embeddings, named = UNSTORABLE[kind]
    made = embeddings(base("bert"))
    entry = CLASSIFIER if made.embedding_type == "sentence-level" else TAGGER
    model = entry.build(lambda **_: made, lambda **_: made)
    with pytest.raises((UnsupportedStateError, AdapterConfigError), match=named) as caught:
        flair_peft.save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()
    assert str(caught.value).count(". ") <= 3
    assert ("adapter" in str(caught.value)) == kind.startswith("an adapter")


def test_transformer_of_which_flair_makes_another_is_refused(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An ordinary one of what it stores of a quantised one, and one with half the window of Gemma 3, for example."""
    model = plain_classifier(base("bert"))
    for owner, name, value, said in (
        (plain_transformers.placement, "is_placed", True, "quantised or spread over devices"),
        (plain_transformers.stored_config, "changing", {"sliding_window"}, "another 'sliding_window'"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda _, value=value: value)
            with pytest.raises(UnsupportedStateError, match=said):
                flair_peft.save_pretrained(model, tmp_path / "model")


@pytest.fixture(scope="module")
def saved_once(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the directory of a plain model whose last layer was trained."""
    model, directory = plain_classifier(base("bert")), tmp_path_factory.mktemp("plain") / "saved"
    perturb_(model.embeddings.model.encoder.layer[1], seed=3, scale=0.02)
    flair_peft.save_pretrained(model, directory)
    return directory


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """Return a copy of that directory."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def _params(document: dict[str, Any]) -> dict[str, Any]:
    return document["model"]["document_embeddings"]


HOSTILE: dict[str, Callable[[dict[str, Any]], Any]] = {
    "code of the Hub": lambda document: _params(document).update(trust_remote_code=True),
    "a kernel": lambda document: _params(document)["config_state_dict"].update(_attn_implementation="me/kernel"),
    "code of a config": lambda document: _params(document)["config_state_dict"].update(
        model_type="mine", auto_map={"AutoModel": "me/x--y.Z"}
    ),
    "another object": lambda document: document["model"].update(label_type={"$type": "posix.system"}),
    "another class": lambda document: document.update({"class": "os.system"}),
    "a place that is none": lambda document: document["parts"][0].update(prefixes=["elsewhere/model."]),
    "a part that is none": lambda document: _params(document).update(part=7),
    "weights of nothing": lambda document: _params(document)["stored_base"].update(left_out=["nothing"]),
    "no base": lambda document: _params(document)["stored_base"].update(record=None),
    "a base of another kind": lambda document: _params(document).update(stored_base=[1]),
    "code of a base": lambda document: _params(document)["stored_base"]["record"].update(needs_remote_code=True),
    "other labels": lambda document: document["model"]["label_dictionary"]["items"].reverse(),
    "a huge vocabulary": lambda document: _params(document)["config_state_dict"].update(vocab_size=10**9),
    "endless labels": lambda document: (
        _params(document)["config_state_dict"].update(num_labels=10**12),
        _params(document)["stored_base"].update(left_out=[]),
    ),
    "many layers": lambda document: _params(document)["config_state_dict"].update(num_hidden_layers=10**6),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_plain_directory_is_refused(kind: str, saved: Path) -> None:
    """Under right hashes there may be anything: nothing of it runs, and every error says what it is."""
    resign(saved, HOSTILE[kind])
    with pytest.raises(flair_peft.FlairPeftError) as caught:
        flair_peft.from_pretrained(saved)
    assert "adapter" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("head.safetensors", "hash"),
        ("tokenizer/tokenizer.json", "hash"),
        # Wherever its middle is: in a value, a name of the format's, or a bracket.
        ("flair_peft.json", r"hash|no JSON|format version.* It was changed, or copied only in part"),
    ],
)
def test_damaged_plain_directory_is_refused(name: str, message: str, saved: Path) -> None:
    """A flipped bit in any file is found."""
    content = bytearray((saved / name).read_bytes())
    content[len(content) // 2] ^= 1
    (saved / name).write_bytes(content)
    with pytest.raises(ModelFileError, match=message):
        Model.load(saved)


def test_plain_file_becomes_a_directory(own: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What stock Flair would load of the file is in the directory, and what the base has is left to it."""
    model = plain_classifier(own)
    perturb_(model.embeddings.model.encoder.layer[1], seed=3, scale=0.02)
    model.save(tmp_path / "plain.pt")
    stock = TextClassifier.load(tmp_path / "plain.pt")
    expected = CLASSIFIER.predict(stock, CLASSIFIER.corpus())
    flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "model")
    assert_same(stock, Model.load(tmp_path / "model"), CLASSIFIER, expected)
    assert stored_bytes(tmp_path / "model") < (tmp_path / "plain.pt").stat().st_size / 2
    own.rename(tmp_path / "moved")
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "whole")
    assert "holds all of them" in caplog.text
    flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "second", base_model=str(tmp_path / "moved"))
    assert stored_bytes(tmp_path / "second") == stored_bytes(tmp_path / "model")
    other = tiny.build("bert", tmp_path / "other", seed=1)
    with pytest.raises(BaseMismatchError, match="none of the weights"):
        flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "third", base_model=str(other))


@pytest.mark.parametrize("kind", ["characters", "table", "letters"])
def test_classic_file_becomes_a_directory(kind: str, tmp_path: Path) -> None:
    """Files on classic embeddings name nothing that the allow-list has not."""
    model = TAGGER.build(lambda **_: CLASSIC[kind](), None)
    model.save(tmp_path / "plain.pt")
    flair_peft.convert_legacy(tmp_path / "plain.pt", tmp_path / "model")
    assert_same(model, Model.load(tmp_path / "model"), TAGGER, TAGGER.predict(model, TAGGER.corpus()))


def test_plain_file_with_code_or_damage_is_refused(base: Base, tmp_path: Path) -> None:
    """What a file without an adapter names is not run by a conversion, and its checksums are compared."""
    path, model = tmp_path / "plain.pt", plain_classifier(base("bert"))
    state = model._get_state_dict()
    torch.save({**state, "extra": Payload(tmp_path / "executed")}, path)
    with pytest.raises(UnsafeFileError, match=r"names 'posix\.mkdir'"):
        flair_peft.convert_legacy(path, tmp_path / "model")
    assert not (tmp_path / "executed").exists()
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[content.index(model.decoder.weight.detach().numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="checksum"):
        flair_peft.convert_legacy(path, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_inspection_of_a_plain_model_says_what_it_stands_on(saved: Path, base: Base, tmp_path: Path) -> None:
    """Base, dtype, head, labels and sizes, of a file of stock Flair and of a directory."""
    model = Model.load(saved)
    model.save(tmp_path / "plain.pt")
    for place in (saved, tmp_path / "plain.pt"):
        found = inspect(place)
        assert (found.adapters, found.notes) == ((), ())
        (transformer,) = found.transformers
        assert transformer.embeddings == "TransformerDocumentEmbeddings"
        assert (transformer.base["name"], transformer.base["dtype"]) == (base("bert"), "float32")
        assert found.labels["label_dictionary"].items == tuple(model.label_dictionary.get_items())
        assert found.sizes["head"] == sum(parameter.nbytes for parameter in model.decoder.parameters())
        assert found.sizes["base"] > 0
        assert found.sizes["adapter"] == 0
        assert bool(found.missing) == (place == saved)
        assert json.loads(json.dumps(found.to_dict()))["transformers"][0]["base"]["name"] == base("bert")


def test_inspection_of_stacks_and_tasks_finds_each_transformer(base: Base, tmp_path: Path) -> None:
    """Embeddings that tasks share are one in a directory; stock files hold them for each task."""
    for name, count in (("sequence-tagger-stacked", (2, 2)), ("multitask", (1, 2))):
        model = make(ZOO[name], base("bert"), None, is_stock=True)
        flair_peft.save_pretrained(model, tmp_path / name)
        model.save(tmp_path / "plain.pt")
        for place, expected in zip((tmp_path / name, tmp_path / "plain.pt"), count, strict=True):
            found = inspect(place).transformers
            assert [each.base["dtype"] for each in found] == ["float32"] * expected


def test_plain_model_is_none_for_a_shared_base(saved: Path, base: Base) -> None:
    """It has no adapter: it would share nothing, and says so."""
    with pytest.raises(BaseMismatchError, match="it has no adapter, so its weights are its own"):
        flair_peft.SharedBase(base("bert")).load(saved)
