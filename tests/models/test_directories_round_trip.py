"""Whole Flair models as checkpoint directories: what loads is what was saved, and PEFT alone can read its part."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.data import Dictionary
from flair.models import MultitaskModel, RelationClassifier, SequenceTagger, TextClassifier
from flair.nn import DefaultClassifier, Model
from peft import IA3Config, PeftConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoTokenizer, T5EncoderModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, compat
from flair_peft.adapter import keys, trainable
from flair_peft.base import base_cache, check_base
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import FlairPeftError, ModelFileError, UnsupportedMethodError, UnsupportedStateError
from flair_peft.inspection import compare, report
from flair_peft.storage import manifest
from tests.support import round_trip, tiny
from tests.support.configs import lora
from tests.support.files import tensors_in
from tests.support.method_cases import KINDS, cases, make_embeddings, one_kind_each
from tests.support.methods import METHODS, Method, perturb_
from tests.support.places import places_of
from tests.support.predictions import TEXTS
from tests.support.round_trip import Factories, largest_difference
from tests.support.selection import OF_THEIR_OWN_KIND, ONE_OF_A_KIND, few
from tests.support.zoo import ZOO

Base = Callable[[str], str]
Load = Callable[..., Any]

CLASSIFIER = ZOO["text-classifier"]
IDS = torch.tensor([[5, 6, 7, 8, 1, 2, 3]])
HEAD, BASE_FILE, ADAPTER = "head.safetensors", "base.safetensors", "adapter_model.safetensors"
TARGETS = ["query", "value", "dense"]


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Return a load that reads bases from their files, as a process does that holds no other model."""

    def load(source: Any, loader: Callable[..., Any] = flair_peft.from_pretrained, **options: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(base_cache, "_cache", weakref.WeakValueDictionary())
            return loader(source, **options)

    return load


def classifier(base: str, config: PeftConfig | None = None, **options: Any) -> TextClassifier:
    factories = Factories(base, config or lora(target_modules=TARGETS), **options)
    return CLASSIFIER.build(factories.words, factories.documents)


def predict(model: Model) -> Any:
    return CLASSIFIER.predict(model, CLASSIFIER.corpus())


def on(embeddings: PeftTransformerEmbeddings) -> TextClassifier:
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    return TextClassifier(embeddings, label_type="opinion", label_dictionary=labels)


def adapted(model: Model) -> list[PeftTransformerEmbeddings]:
    return [module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings)]


def vectors(embeddings: PeftTransformerEmbeddings) -> torch.Tensor:
    """Return the last hidden states of the ids that all tests here use, (1, subtokens, hidden)."""
    embeddings.eval()
    with torch.no_grad():
        return embeddings.hidden_states(IDS, attention_mask=torch.ones_like(IDS))[-1]


def vectors_of_peft(model: PeftModel) -> torch.Tensor:
    """Return the same from a model that this package had no part in, without rows for virtual tokens."""
    with torch.no_grad():
        states = model.eval()(input_ids=IDS, attention_mask=torch.ones_like(IDS)).last_hidden_state
    return states[:, -IDS.shape[1] :]


def document_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "flair_peft.json").read_text())


def parameters_in(value: Any) -> list[dict[str, Any]]:
    """Return the stored parameters of all embeddings in a document."""
    if isinstance(value, list):
        return [found for item in value for found in parameters_in(item)]
    if not isinstance(value, dict):
        return []
    own = [value] if "config_state_dict" in value else []
    return own + [found for item in value.values() for found in parameters_in(item)]


def check_zoo(name: str, base: str, dtype: torch.dtype, directory: Path, load: Load) -> None:
    entry, factories = ZOO[name], Factories(base, lora(target_modules=TARGETS), dtype=dtype)
    model, corpus = entry.build(factories.words, factories.documents), entry.corpus()
    before = entry.predict(model, corpus)
    flair_peft.save_pretrained(model, directory)
    loaded = load(directory)

    assert type(loaded) is type(model)
    assert [embeddings.base_dtype for embeddings in adapted(loaded)] == [dtype] * len(adapted(model))
    inside = {id(parameter) for embeddings in adapted(loaded) for parameter in embeddings.parameters()}
    head = {p.dtype for p in loaded.parameters() if id(p) not in inside}
    tolerance = round_trip.SCORE_TOLERANCE[dtype] if head == {dtype} else 0.0
    assert largest_difference(before, entry.predict(loaded, corpus)) <= tolerance
    assert not (directory / BASE_FILE).exists()


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_directory_of_any_model_class_predicts_bit_equal(name: str, base: Base, tmp_path: Path, load: Load) -> None:
    """Every trainable model class of Flair comes back from a directory as what it was."""
    check_zoo(name, base("bert"), torch.float32, tmp_path / "model", load)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ZOO)
def test_directory_of_any_model_class_in_half_precision_predicts_the_same(
    name: str, dtype: torch.dtype, base: Base, tmp_path: Path, load: Load
) -> None:
    """A head that is cast agrees to the rounding of the dtype; every other is exact."""
    check_zoo(name, base("bert"), dtype, tmp_path / "model", load)


@pytest.mark.parametrize("loader", [Model, DefaultClassifier, TextClassifier], ids=lambda loader: loader.__name__)
def test_directory_loads_by_its_own_class_and_those_above(
    loader: type[Model], base: Base, tmp_path: Path, load: Load
) -> None:
    """``load`` of Flair's classes takes a directory, as text or as path."""
    model = classifier(base("bert"))
    flair_peft.save_pretrained(model, tmp_path / "model")
    for source in (tmp_path / "model", str(tmp_path / "model")):
        loaded = load(source, loader.load)
        assert type(loaded) is TextClassifier
        assert predict(loaded) == predict(model)


def test_directory_of_another_class_is_refused_with_both_names(base: Base, tmp_path: Path) -> None:
    """A text classifier is not read as a tagger."""
    flair_peft.save_pretrained(classifier(base("bert")), tmp_path / "model")
    with pytest.raises(ModelFileError, match=r"as a SequenceTagger: it holds a TextClassifier.*TextClassifier\.load"):
        SequenceTagger.load(tmp_path / "model")


def test_directory_of_a_class_that_is_not_imported_is_refused(base: Base, tmp_path: Path) -> None:
    """Files import nothing: a class of the user's own must be there already, and then it loads."""

    class Mine(TextClassifier):
        pass

    model = classifier(base("bert"))
    model.__class__ = Mine
    flair_peft.save_pretrained(model, tmp_path / "model")
    assert type(flair_peft.from_pretrained(tmp_path / "model")) is Mine
    document = document_of(tmp_path / "model")
    assert document["class"].endswith(".Mine")
    Mine.__qualname__ = "Renamed"
    with pytest.raises(ModelFileError, match=r"Mine.*no such model class is imported"):
        flair_peft.from_pretrained(tmp_path / "model")


def peft_alone(
    base: str,
    config: PeftConfig,
    dtype: torch.dtype,
    *,
    rows: int = 0,
    after: Callable[[PeftModel], None] | None = None,
) -> tuple[PeftModel, Callable[[Path], PeftModel]]:
    """Return a PEFT model with a perturbed adapter, and a function that loads such an adapter from a directory."""

    def find() -> Any:
        found = AutoModel.from_pretrained(base, dtype=dtype)
        if rows:
            found.resize_token_embeddings(found.config.vocab_size + rows, mean_resizing=False)
        return found

    live = get_peft_model(find(), config)
    if after is not None:
        after(live)
    perturb_(live, seed=3)
    return live, lambda directory: PeftModel.from_pretrained(find(), str(directory))


def can_peft_do_it(live: PeftModel, load_with_peft: Callable[[Path], PeftModel], directory: Path) -> bool:
    """Whether PEFT's own file gives PEFT's own vectors again."""
    expected = vectors_of_peft(live)
    live.save_pretrained(str(directory))
    return torch.equal(expected, vectors_of_peft(load_with_peft(directory)))


def completed(method: Method, kind: str, base: str) -> PeftConfig:
    """Return the config of a method, with the token ids that ``tests.adapter.test_methods.make`` gives it."""
    config, tokenizer = method.config(kind), AutoTokenizer.from_pretrained(base)
    for setting in ("token_indices", "trainable_token_indices"):
        if getattr(config, setting, None):
            setattr(config, setting, tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"][1:4])
    return config


def check_method(method: Method, kind: str, base: Base, dtype: torch.dtype, directory: Path, load: Load) -> None:
    embeddings = make_embeddings(method, kind, base, dtype)
    model, expected = on(embeddings), vectors(embeddings)
    flair_peft.save_pretrained(model, directory)
    model.save(directory / "model.pt")
    assert torch.equal(expected, vectors(load(directory).embeddings))
    assert torch.equal(expected, vectors(load(directory / "model.pt", TextClassifier.load).embeddings))

    path = base(KINDS[kind])
    if method.name == "layers_to_transform" and kind == "decoder":
        return  # PEFT finds no layers there, this package spells them out
    # The separator's row makes the adapter of the matrix one column longer than the base's own vocabulary.
    rows = 1 if method.name == "embedding" else 0
    live, load_with_peft = peft_alone(path, completed(method, kind, path), dtype, rows=rows, after=method.after)
    if can_peft_do_it(live, load_with_peft, directory / "of-peft"):
        assert torch.equal(expected, vectors_of_peft(load_with_peft(directory)))
    else:
        assert method.lossy_peft_file


# What PEFT says of each method is asserted in test_methods.py.
quiet = pytest.mark.filterwarnings("ignore:.*:UserWarning")


@quiet
@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_directory_of_any_method_gives_its_vectors_and_peft_alone_gives_them_too(
    method: Method, kind: str, base: Base, tmp_path: Path, load: Load
) -> None:
    """Directory and file come back bit-equal; PEFT reads the directory wherever it could read a file of its own."""
    check_method(method, kind, base, torch.float32, tmp_path, load)


@pytest.mark.parametrize("targets", [["query", "value"], ["key", "dense"]], ids=str)
def test_directory_of_ia3_with_what_peft_fills_in_can_be_read_by_peft_alone(
    targets: list[str], base: Base, tmp_path: Path, load: Load
) -> None:
    """PEFT refuses the config that it completed itself; the directory holds one that means the same."""
    model = classifier(base("bert"), IA3Config(target_modules=targets, init_ia3_weights=False))
    expected = vectors(model.embeddings)
    flair_peft.save_pretrained(model, tmp_path / "model")
    model.save(tmp_path / "model.pt")
    assert torch.equal(expected, vectors(load(tmp_path / "model").embeddings))
    assert torch.equal(expected, vectors(load(tmp_path / "model.pt", TextClassifier.load).embeddings))
    assert torch.equal(expected, vectors(flair_peft.SharedBase(base("bert")).load(str(tmp_path / "model")).embeddings))
    alone = PeftModel.from_pretrained(AutoModel.from_pretrained(base("bert")), str(tmp_path / "model"))
    assert torch.equal(expected, vectors_of_peft(alone))


@quiet
@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "kind"), cases(working=True))
def test_directory_of_any_method_in_half_precision_gives_its_vectors(
    method: Method, kind: str, dtype: torch.dtype, base: Base, tmp_path: Path, load: Load
) -> None:
    """The same on bf16 and fp16 bases."""
    check_method(method, kind, base, dtype, tmp_path, load)


@quiet
@pytest.mark.parametrize("architecture", few(tiny.ARCHITECTURES, OF_THEIR_OWN_KIND))
def test_directory_of_any_architecture_gives_its_vectors_and_leaves_the_base_out(
    architecture: str, base: Base, tmp_path: Path, load: Load
) -> None:
    """On every architecture the directory holds the adapter and the head, and no weight of the base."""
    slow = {"transformers_tokenizer_kwargs": {"use_fast": False}} if architecture == "bert-slow" else {}
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture], fan_in_fan_out=architecture == "gpt2")
    embeddings = PeftTransformerDocumentEmbeddings(base(architecture), peft_config=config, **slow)
    perturb_(embeddings.model, seed=1)
    sentences = tiny.make_sentences(architecture, TEXTS)
    embeddings.embed(sentences)
    expected = torch.stack([sentence.get_embedding() for sentence in sentences])
    flair_peft.save_pretrained(on(embeddings), tmp_path)
    loaded = load(tmp_path).embeddings
    sentences = tiny.make_sentences(architecture, TEXTS)
    loaded.embed(sentences)
    assert torch.equal(expected, torch.stack([sentence.get_embedding() for sentence in sentences]))
    # The separator's row in the matrix is the mean of the base's, and stored apart from the state dict.
    names = {name.partition(": ")[2] for name in tensors_in(tmp_path)}
    assert {name for name in names if name.startswith("state_dict")} == {
        f"state_dict/decoder.{kind}" for kind in ("weight", "bias")
    }
    assert not any(keys.base_key(name) for name in safetensors.torch.load_file(tmp_path / ADAPTER))


def check_with_peft(embeddings: PeftTransformerEmbeddings, directory: Path, base: Any) -> None:
    """Fail unless PEFT alone gives the vectors with the directory and this base."""
    assert torch.equal(
        vectors_of_peft(embeddings.model), vectors_of_peft(PeftModel.from_pretrained(base, str(directory)))
    )


@quiet
@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_beside_saved_modules_are_all_stored(bias: str, base: Base, tmp_path: Path, load: Load) -> None:
    """PEFT's own file would drop the biases of the modules that it keeps aside, or fail on shared tensors."""
    config = lora(bias=bias, target_modules=["query", "intermediate.dense"], modules_to_save=["LayerNorm", "pooler"])
    live = classifier(base("bert"), config)
    trained = {name: p.detach().clone() for name, p in trainable.parameters(live.embeddings.model).items()}
    assert any(name.endswith("query.base_layer.bias") for name in trained)
    assert any("LayerNorm.modules_to_save.default.bias" in name for name in trained)
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", TextClassifier.load)):
        found = trainable.parameters(loaded.embeddings.model)
        assert list(found) == list(trained)
        assert all(torch.equal(found[name], tensor) for name, tensor in trained.items())
        assert predict(loaded) == predict(live)
    assert not (tmp_path / "model" / BASE_FILE).exists()


@quiet
@pytest.mark.parametrize("setting", ["alpha_pattern", "rank_pattern"])
def test_pattern_whose_order_matters_comes_back(setting: str, base: Base, tmp_path: Path, load: Load) -> None:
    """PEFT takes the first key that matches and sorts the keys in its file: ours says the same in any order."""
    pattern = {"output.dense": 2, "attention.output.dense": 3}
    live = PeftTransformerDocumentEmbeddings(
        base("bert"), peft_config=lora(target_modules=["dense"], **{setting: pattern}), use_context_separator=False
    )
    model = on(live)
    flair_peft.save_pretrained(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert torch.equal(vectors(live), vectors(loaded.embeddings))
    of_peft = PeftModel.from_pretrained(AutoModel.from_pretrained(base("bert")), str(tmp_path / "model"))
    torch.testing.assert_close(vectors(live), vectors_of_peft(of_peft))
    again = PeftTransformerDocumentEmbeddings.from_adapter(str(tmp_path / "model"), use_context_separator=False)
    torch.testing.assert_close(vectors(live), vectors(again))
    flair_peft.save_pretrained(loaded, tmp_path / "again")
    assert torch.equal(vectors(live), vectors(load(tmp_path / "again").embeddings))


@quiet
@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("bert", {"target_modules": TARGETS, "modules_to_save": ["word_embeddings"]}),
        ("bert", {"target_modules": ["word_embeddings", "query"]}),
        ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        ("llama", {"target_modules": ["embed_tokens"]}),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["shared"]}),
        ("t5", {"target_modules": ["q"], "modules_to_save": ["embed_tokens"]}),
        ("t5", {"target_modules": ["shared", "q"]}),
        ("t5", {"target_modules": ["embed_tokens", "q"]}),
        ("t5", {"target_modules": ["q", "v"], "trainable_token_indices": [5, 7]}),
        ("gpt2", {"target_modules": ["c_attn"], "modules_to_save": ["wte"], "fan_in_fan_out": True}),
        ("albert", {"target_modules": ["word_embeddings", "embedding_hidden_mapping_in"]}),
    ],
    ids=str,
)
@pytest.mark.parametrize("separator", [True, False], ids=["with separator", "without"])
def test_adapter_of_the_embedding_matrix_comes_back(
    separator: bool, architecture: str, options: dict[str, Any], base: Base, tmp_path: Path, load: Load
) -> None:
    """A matrix that is adapted or trained whole, also where it is tied, comes back; PEFT reads it on as many rows."""
    live = PeftTransformerDocumentEmbeddings(
        base(architecture), peft_config=lora(**options), use_context_separator=separator
    )
    perturb_(live.model, seed=2)
    model = on(live)
    flair_peft.save_pretrained(model, tmp_path / "model")
    model.save(tmp_path / "model.pt")
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", TextClassifier.load)):
        assert torch.equal(vectors(live), vectors(loaded.embeddings))
        expected = live.state_dict()
        found = loaded.embeddings.state_dict()
        assert list(found) == list(expected)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert list(trainable.parameters(loaded.embeddings.model)) == list(trainable.parameters(live.model))
    assert not (tmp_path / "model" / BASE_FILE).exists()

    def find() -> Any:
        found = (T5EncoderModel if architecture == "t5" else AutoModel).from_pretrained(base(architecture))
        if separator:
            found.resize_token_embeddings(found.config.vocab_size + 1, mean_resizing=False)
        return found

    alone = get_peft_model(find(), lora(**options))
    perturb_(alone, seed=2)
    if can_peft_do_it(alone, lambda path: PeftModel.from_pretrained(find(), str(path)), tmp_path / "of-peft"):
        check_with_peft(live, tmp_path / "model", find())


@quiet
def test_tied_weights_are_stored_once_and_stay_tied(base: Base, tmp_path: Path, load: Load) -> None:
    """T5 holds its matrix under two names; a trained one is written once and is one parameter after loading."""
    live = classifier(base("t5"), lora(target_modules=["q"]))
    matrix = live.embeddings.base_model.shared.weight
    with torch.no_grad():
        matrix.requires_grad_(True)
        matrix.data = matrix.data + 0.5
    before = predict(live)
    flair_peft.save_pretrained(live, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert predict(loaded) == before
    base_model = loaded.embeddings.base_model
    assert base_model.shared.weight is base_model.encoder.embed_tokens.weight
    assert torch.equal(base_model.shared.weight, matrix)


@pytest.mark.parametrize("method", ["VERA", "PVERA", "VBLORA", "GLORA", "PREFIX_TUNING", "PROMPT_TUNING"])
def test_tensor_that_a_method_registers_several_times_is_stored_once(
    method: str, base: Base, tmp_path: Path, load: Load
) -> None:
    """Each storage of the adapter is in one file once, what PEFT's file has already among them, and all come back."""
    live = on(make_embeddings(METHODS[method], "encoder", base, torch.float32))
    perturb_(live.embeddings.model, 3)
    flair_peft.save_pretrained(live, tmp_path)
    added = {n: t for n, t in live.embeddings.model.state_dict().items() if keys.base_key(n) is None}
    sizes = {tensor.data_ptr(): tensor.nbytes for tensor in added.values()}
    beside = ("head.safetensors: embeddings.model.", "adapter_model.safetensors: ")
    stored = {name: tensor for name, tensor in tensors_in(tmp_path).items() if name.startswith(beside)}
    assert sum(tensor.nbytes for tensor in stored.values()) <= sum(sizes.values())
    again = load(tmp_path).embeddings.model.state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in added.items())
    live.save(tmp_path / "model.pt")
    files = (tmp_path, tmp_path / "model.pt")
    assert compare.compare(*map(report.inspect, files)).is_equal


@pytest.mark.parametrize(
    "change",
    [
        lambda same_as: same_as.update(dict.fromkeys(same_as, "nothing")),
        lambda same_as: same_as.update({"x": next(iter(same_as))}),
        lambda same_as: same_as.update(dict.fromkeys(same_as, 3)),
        lambda same_as: same_as.update({next(iter(same_as.values())): next(iter(same_as.values()))}),
        lambda same_as: same_as.clear(),
    ],
    ids=["of nothing", "of another", "of a number", "of itself", "left out"],
)
def test_tensor_that_is_said_to_be_another_one_has_to_be_there(
    change: Callable[[dict[str, Any]], Any], base: Base, tmp_path: Path
) -> None:
    """Whoever writes such a file gets an error in this package's words."""
    flair_peft.save_pretrained(on(make_embeddings(METHODS["VERA"], "encoder", base, torch.float32)), tmp_path)
    document = document_of(tmp_path)
    assert document["parts"][0]["same_as"]
    change(document["parts"][0]["same_as"])
    document["sha256"] = manifest.hash_of(document)
    (tmp_path / "flair_peft.json").write_text(json.dumps(document))
    with pytest.raises(FlairPeftError):
        flair_peft.from_pretrained(tmp_path)


def test_added_tokens_of_a_relation_classifier_keep_their_rows(base: Base, tmp_path: Path, load: Load) -> None:
    """Tokens that the model itself added are in the tokenizer and the matrix again; only their rows are stored."""
    entry = ZOO["relation-classifier-special-tokens"]
    factories = Factories(base("bert"), lora(target_modules=TARGETS))
    live = entry.build(factories.words, factories.documents)
    own = AutoModel.from_pretrained(base("bert")).config.vocab_size
    added = live.embeddings.base_model.get_input_embeddings().weight.detach()[own:].clone()
    assert len(added) > 1
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", RelationClassifier.load)):
        assert torch.equal(loaded.embeddings.base_model.get_input_embeddings().weight[own:], added)
        assert len(loaded.embeddings.tokenizer) == len(live.embeddings.tokenizer)
        assert entry.predict(loaded, entry.corpus()) == entry.predict(live, entry.corpus())
    sizes = [len(tensor) for tensor in tensors_in(tmp_path / "model").values() if tensor.dim()]
    assert len(added) in sizes
    assert own not in sizes
    assert own + len(added) not in sizes


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
def test_init_that_took_something_from_the_base_is_not_computed_again(
    init: str, base: Base, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was taken out of the base's weights is stored: another machine may decompose them differently."""
    live = classifier(base("bert"), lora(init_lora_weights=init, target_modules=["query", "value"]))
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    before = predict(live)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("decomposed again")

    for name in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, name, refuse)
    monkeypatch.setattr(torch, "svd_lowrank", refuse)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", refuse)
    assert predict(load(tmp_path / "model")) == before
    assert predict(load(tmp_path / "model.pt", TextClassifier.load)) == before
    rewritten = {name for name in tensors_in(tmp_path / "model") if name.endswith("base_layer.weight")}
    assert len(rewritten) == 4
    with pytest.raises(UnsupportedMethodError, match="decomposed again"):
        classifier(base("bert"), lora(target_modules=TARGETS, init_lora_weights=init))


def test_base_without_a_pooler_predicts_the_same_and_its_random_one_is_not_stored(
    base: Base, tmp_path: Path, load: Load
) -> None:
    """An MLM-only base gets a random pooler, which nothing reads and no file holds; it is the same in each load."""
    live = classifier(base("bert-mlm"), lora(target_modules=["query", "value"]))
    before = predict(live)
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    torch.manual_seed(99)
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", TextClassifier.load)):
        assert predict(loaded) == before
    assert not any("pooler" in name for name in tensors_in(tmp_path / "model"))
    poolers = [model.embeddings.base_model.pooler.dense.weight for model in (live, loaded)]
    assert torch.equal(*poolers)


@quiet
def test_adapter_on_a_random_pooler_is_stored_without_it(base: Base, tmp_path: Path, load: Load) -> None:
    """Adapter weights that no vector depends on are kept all the same: nobody drops what was injected."""
    live = classifier(base("bert-mlm"), lora(target_modules="all-linear"))
    flair_peft.save_pretrained(live, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert predict(loaded) == predict(live)
    found = trainable.parameters(loaded.embeddings.model)
    assert any("pooler" in name for name in found)
    assert all(torch.equal(found[name], p) for name, p in trainable.parameters(live.embeddings.model).items())


def without_weight(base: str, directory: Path, name: str) -> str:
    """Return a copy of a base whose file lacks a weight, which is random after each load therefore."""
    shutil.copytree(base, directory)
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors.pop(name)
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def test_random_weight_that_vectors_depend_on_is_stored(
    base: Base, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the source lacks and the model reads is not the base's own; files of 0.2.0 hold such models."""
    monkeypatch.setattr(check_base, "check_complete", lambda *_: None)
    name = "encoder.layer.1.output.dense.weight"
    lacking = without_weight(base("bert"), tmp_path / "base", name)
    live = classifier(lacking, lora(target_modules=["query", "value"]))
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    torch.manual_seed(99)
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", TextClassifier.load)):
        assert predict(loaded) == predict(live)
    assert [key for key in tensors_in(tmp_path / "model") if key.endswith(name)]


def test_random_weight_under_two_adapters_is_stored_for_each(
    base: Base, tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that two adapters share in memory, and that must be stored, are not taken for one adapter's only."""
    monkeypatch.setattr(check_base, "check_complete", lambda *_: None)
    lacking = without_weight(base("bert"), tmp_path / "base", "embeddings.position_embeddings.weight")
    entry, factories = ZOO["sequence-tagger-stacked"], Factories(lacking, lora(target_modules=["query", "value"]))
    live = entry.build(factories.words, factories.documents)
    flair_peft.save_pretrained(live, tmp_path / "model")
    torch.manual_seed(99)
    loaded = load(tmp_path / "model")
    assert entry.predict(loaded, entry.corpus()) == entry.predict(live, entry.corpus())


def test_padded_vocabulary_gets_no_row_and_stores_none(base: Base, tmp_path: Path, load: Load) -> None:
    """Where the base has rows to spare, the separator takes one of them."""
    live = classifier(base("bert-padded-vocab"))
    size = AutoModel.from_pretrained(base("bert-padded-vocab")).config.vocab_size
    assert live.embeddings.base_model.config.vocab_size == size
    flair_peft.save_pretrained(live, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert predict(loaded) == predict(live)
    assert loaded.embeddings.base_model.config.vocab_size == size
    assert size not in [len(tensor) for tensor in tensors_in(tmp_path / "model").values() if tensor.dim()]


@pytest.mark.parametrize("frozen_again", [False, True])
def test_base_weights_that_the_user_trained_are_stored_and_no_others(
    frozen_again: bool, base: Base, tmp_path: Path, load: Load
) -> None:
    """An unfrozen layer is part of what was learned, also if it was frozen again afterwards."""
    live = classifier(base("bert"), lora(target_modules=["query", "value"]))
    layer = live.embeddings.base_model.encoder.layer[1].output
    layer.requires_grad_(True)
    live.train()
    live.forward_loss([CLASSIFIER.corpus().test[0]])[0].backward()
    torch.optim.SGD(live.parameters(), lr=0.5).step()
    layer.requires_grad_(not frozen_again)
    before = predict(live)
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    for loaded in (load(tmp_path / "model"), load(tmp_path / "model.pt", TextClassifier.load)):
        assert predict(loaded) == before
        found = loaded.embeddings.base_model.encoder.layer[1].output.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in layer.state_dict().items())
    stored = {keys.base_key(name.partition("model.")[2]) for name in tensors_in(tmp_path / "model")}
    changed = {f"encoder.layer.1.output.{name}" for name in layer.state_dict()}
    assert {name for name in stored if name and name.startswith("encoder")} == changed


@quiet
@pytest.mark.parametrize(
    "name", ["sequence-tagger-stacked", "text-classifier-label-verbalizer", "multitask", "multitask-word-and-document"]
)
def test_adapters_of_a_model_with_several_have_a_folder_each(name: str, base: Base, tmp_path: Path) -> None:
    """PEFT alone loads each of them; embeddings that tasks share are stored once."""
    entry, factories = ZOO[name], Factories(base("bert"), lora(target_modules=TARGETS))
    live = entry.build(factories.words, factories.documents)
    flair_peft.save_pretrained(live, tmp_path)
    folders = [path.parent for path in (tmp_path, tmp_path / "embeddings-1") for path in path.glob(ADAPTER)]
    assert len(folders) == len(adapted(live)) == (1 if "multitask" in name else 2)
    assert sorted(path.parent for path in tmp_path.rglob("adapter_config.json")) == sorted(folders)
    for embeddings, folder in zip(adapted(live), folders, strict=True):
        check_with_peft(embeddings, folder, AutoModel.from_pretrained(base("bert")))
    assert len({vectors_of_peft(embeddings.model).sum().item() for embeddings in adapted(live)}) == len(folders)


def test_models_of_a_multitask_model_with_two_embeddings_come_back_apart(
    base: Base, tmp_path: Path, load: Load
) -> None:
    """Tasks that have adapters of their own keep them, each on one shared base."""
    tasks = [classifier(base("bert"), lora(target_modules=TARGETS, r=rank)) for rank in (2, 3)]
    perturb_(tasks[1].embeddings.model, seed=7)
    live = MultitaskModel(tasks, task_ids=["first", "second"])
    flair_peft.save_pretrained(live, tmp_path)
    assert (tmp_path / "embeddings-1" / ADAPTER).exists()
    loaded = load(tmp_path)
    for task in ("first", "second"):
        assert predict(loaded.tasks[task]) == predict(live.tasks[task])
    matrices = places_of({e.name: e.base_model.get_input_embeddings().weight for e in adapted(loaded)})
    assert len(matrices) == 2
    assert len(set(matrices.values())) == 1


@pytest.mark.parametrize("architecture", ["bert", "bert-slow", "roberta", "llama", "t5", "modernbert", "gpt2"])
def test_tokenizer_of_the_directory_is_one_that_transformers_reads(
    architecture: str, base: Base, tmp_path: Path
) -> None:
    """The files are the tokenizer's own, with the tokens that the embeddings added."""
    slow = {"transformers_tokenizer_kwargs": {"use_fast": False}} if architecture == "bert-slow" else {}
    live = classifier(
        base(architecture), lora(target_modules="all-linear", fan_in_fan_out=architecture == "gpt2"), **slow
    )
    flair_peft.save_pretrained(live, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", use_fast=not slow)
    assert type(tokenizer) is type(live.embeddings.tokenizer)
    for text in (*TEXTS, "a [FLERT] b", "  two  spaces"):
        assert tokenizer(text)["input_ids"] == live.embeddings.tokenizer(text)["input_ids"]


def test_marks_of_a_crf_are_no_labels(base: Base, tmp_path: Path) -> None:
    """What Flair puts before and behind a sentence is in its dictionary, and is never predicted."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(target_modules=TARGETS))
    labels = Dictionary(add_unk=False)
    labels.add_item("<PER>")
    live = SequenceTagger(embeddings, tag_dictionary=labels, tag_type="ner", use_rnn=False, use_crf=True)
    assert "<START>" in live.label_dictionary.get_items()
    flair_peft.save_pretrained(live, tmp_path)
    live.save(tmp_path / "model.pt")
    text = (tmp_path / "README.md").read_text()
    assert "<PER>" in text
    assert "<START>" not in text
    assert "<STOP>" not in text
    for path in (tmp_path, tmp_path / "model.pt"):
        (found,) = report.inspect(path).labels.values()
        assert not {"<START>", "<STOP>"} & set(found.items)
        assert len(found.items) == len(live.label_dictionary) - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_document_records_versions_dtype_attention_and_quantisation(
    attention: str, dtype: torch.dtype, base: Base, tmp_path: Path, load: Load
) -> None:
    """What a load must do the same is written down, and done."""
    live = classifier(base("bert"), dtype=dtype, transformers_model_kwargs={"attn_implementation": attention})
    flair_peft.save_pretrained(live, tmp_path)
    document = document_of(tmp_path)
    assert document["model"]["versions"] == compat.versions()
    assert document["class"] == "flair.models.text_classification_model.TextClassifier"
    assert document["format_version"] == 1
    (params,) = parameters_in(document)
    record = params["stored_base"]["record"]
    assert params["dtype"] == str(dtype).removeprefix("torch.")
    assert record["attention"] == attention
    assert record["quantization"] is None
    assert record["name"] == base("bert")
    assert record["vocabulary_size"] == AutoModel.from_pretrained(base("bert")).config.vocab_size
    assert len(record["fingerprint"]) == len(record["full_fingerprint"]) == 64
    loaded = load(tmp_path)
    assert loaded.embeddings.base_model.config._attn_implementation == attention
    assert loaded.embeddings.base_dtype == dtype


def save_by_constructor(live: TextClassifier, directory: Path) -> Path:
    live.embeddings.save_base = True
    flair_peft.save_pretrained(live, directory / "model")
    return directory / "model"


def save_by_function(live: TextClassifier, directory: Path) -> Path:
    flair_peft.save_pretrained(live, directory / "model", save_base=True)
    return directory / "model"


def save_by_method(live: TextClassifier, directory: Path) -> Path:
    live.save(directory / "model.pt", save_base=True)
    return directory / "model.pt"


def save_by_constructor_and_method(live: TextClassifier, directory: Path) -> Path:
    live.embeddings.save_base = True
    live.save(directory / "model.pt")
    return directory / "model.pt"


@pytest.mark.parametrize(
    "save", [save_by_constructor, save_by_function, save_by_method, save_by_constructor_and_method]
)
@pytest.mark.parametrize("name", ["text-classifier", "text-classifier-label-verbalizer", "sequence-tagger-stacked"])
def test_model_saved_with_its_base_loads_where_the_base_is_gone(
    name: str, save: Callable[[Any, Path], Path], base: Base, tmp_path: Path, load: Load
) -> None:
    """With ``save_base=True`` nothing but the file is needed, and saving what was loaded keeps that."""
    shutil.copytree(base("bert"), tmp_path / "base")
    entry = ZOO[name]
    by_constructor = save in (save_by_constructor, save_by_constructor_and_method)
    factories = Factories(str(tmp_path / "base"), lora(target_modules=TARGETS), save_base=by_constructor)
    live, corpus = entry.build(factories.words, factories.documents), entry.corpus()
    live.embeddings.save_base = by_constructor
    source = save(live, tmp_path)
    before = entry.predict(live, corpus)
    shutil.rmtree(tmp_path / "base")
    loaded = load(source, Model.load)
    assert entry.predict(loaded, corpus) == before
    if by_constructor:
        assert adapted(loaded)[0].save_base
        loaded.save(tmp_path / "again.pt")
        assert entry.predict(load(tmp_path / "again.pt", Model.load), corpus) == before


def test_save_base_false_overrides_the_constructor(base: Base, tmp_path: Path) -> None:
    """What a call says wins over what the embeddings were made with."""
    live = classifier(base("bert"), save_base=True)
    flair_peft.save_pretrained(live, tmp_path / "whole")
    flair_peft.save_pretrained(live, tmp_path / "slim", save_base=False)
    assert (tmp_path / "whole" / BASE_FILE).exists()
    assert not (tmp_path / "slim" / BASE_FILE).exists()


class OwnDecoder(torch.nn.Linear):
    """A head of a user's own, which no file can name."""


class OwnDictionary(Dictionary):
    """A dictionary of a user's own."""


def with_own_decoder(base: str) -> tuple[TextClassifier, list[str]]:
    live = classifier(base)
    decoder = OwnDecoder(live.embeddings.embedding_length, len(live.label_dictionary))
    embeddings = live.embeddings
    return (
        TextClassifier(embeddings, label_type="sentiment", label_dictionary=live.label_dictionary, decoder=decoder),
        ["decoder", "OwnDecoder"],
    )


def with_own_dictionary(base: str) -> tuple[TextClassifier, list[str]]:
    live = classifier(base)
    live.label_dictionary.__class__ = OwnDictionary
    return live, ["label_dictionary", "OwnDictionary"]


@pytest.mark.parametrize("make_model", [with_own_decoder, with_own_dictionary])
def test_model_that_no_file_can_hold_is_refused_by_field_and_type(
    make_model: Callable[[str], tuple[TextClassifier, list[str]]], base: Base, tmp_path: Path
) -> None:
    """Directory, file and the very start of a training refuse it; nothing is written and no batch is seen."""
    live, named = make_model(base("bert"))
    (tmp_path / "earlier.pt").write_bytes(b"earlier")
    attempts: list[Callable[[], Any]] = [
        lambda: flair_peft.save_pretrained(live, tmp_path / "model"),
        lambda: live.save(tmp_path / "earlier.pt"),
    ]
    batches: list[Any] = []
    forward_loss = live.forward_loss
    live.forward_loss = lambda batch: batches.append(batch) or forward_loss(batch)
    attempts.append(lambda: CLASSIFIER.train(live, CLASSIFIER.corpus(), tmp_path / "training"))
    for attempt in attempts:
        with pytest.raises(UnsupportedStateError) as caught:
            attempt()
        assert all(name in str(caught.value) for name in named)
    assert batches == []
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "earlier.pt").read_bytes() == b"earlier"
    assert list((tmp_path / "training").glob("*.pt")) == []


def test_saving_changes_nothing_in_the_live_model(base: Base, tmp_path: Path) -> None:
    """State, modes, gradients and random numbers are what they were, in the middle of a training too."""
    live = classifier(base("bert"), lora(target_modules=TARGETS, lora_dropout=0.5))
    live.train()
    live.forward_loss([CLASSIFIER.corpus().test[0]])[0].backward()
    state = copy.deepcopy(live.state_dict())
    gradients = {name: p.grad.clone() for name, p in live.named_parameters() if p.grad is not None}
    modes = {name: module.training for name, module in live.named_modules()}
    generator = torch.get_rng_state()
    flair_peft.save_pretrained(live, tmp_path / "model")
    live.save(tmp_path / "model.pt")
    assert torch.equal(generator, torch.get_rng_state())
    assert modes == {name: module.training for name, module in live.named_modules()}
    assert all(torch.equal(live.get_parameter(name).grad, gradient) for name, gradient in gradients.items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in live.state_dict().items())


def test_loaded_model_saved_again_writes_the_same_tensors(base: Base, tmp_path: Path, load: Load) -> None:
    """Generations do not drift: the third directory holds what the first one held."""
    live = classifier(base("bert"), lora(target_modules=TARGETS, bias="lora_only"), dtype="bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = tmp_path / "0"
        flair_peft.save_pretrained(live, source)
        for generation in ("1", "2"):
            flair_peft.save_pretrained(load(source), tmp_path / generation)
            source = tmp_path / generation
    first, last = tensors_in(tmp_path / "0"), tensors_in(tmp_path / "2")
    assert first.keys() == last.keys()
    # What a head gives follows from the dtype in which it computes, which is another one after a load.
    learned = [name for name in first if "head_probe/" not in name]
    assert all(first[name].dtype == last[name].dtype and torch.equal(first[name], last[name]) for name in learned)
    # The first tokenizer was made of the base's files, whose spelling of added tokens is another.
    names = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    assert [str(n) for n in names if (tmp_path / "1" / n).read_bytes() != (source / n).read_bytes()] == []


def test_directory_is_not_put_beside_the_weights_of_a_base(base: Base, tmp_path: Path) -> None:
    """transformers would load the adapter as part of the base from then on."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    model = classifier(str(folder))
    with pytest.raises(flair_peft.errors.SaveError, match="Choose another directory"):
        flair_peft.save_pretrained(model, folder)
    assert not (folder / "adapter_config.json").exists()
    flair_peft.save_pretrained(model, tmp_path / "checkpoint")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "checkpoint" / name, folder)
    with pytest.raises(flair_peft.errors.AdapterConfigError, match="Pass the base model alone"):
        classifier(str(folder))


def test_embeddings_whose_tensors_are_made_anew_are_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """A save that cannot find them among those of the model would write what nothing can load."""
    model = classifier(base("bert"))

    def clone(_: Any, state: dict[str, Any], prefix: str, __: Any) -> None:
        state.update({name: tensor.clone() for name, tensor in state.items() if name.startswith(prefix)})

    model.embeddings.model.register_state_dict_post_hook(clone)
    with pytest.raises(UnsupportedStateError, match="other tensors each time"):
        flair_peft.save_pretrained(model, tmp_path / "kept")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_adapter_that_was_changed_in_eval_mode_is_saved_as_it_is(
    dtype: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A load narrows adapters to the base's dtype and keeps their exact values, which a changed one has no more."""
    flair_peft.save_pretrained(classifier(base("bert"), dtype=dtype), tmp_path / "first")
    model = flair_peft.from_pretrained(tmp_path / "first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
    expected = ZOO["text-classifier"].predict(model, ZOO["text-classifier"].corpus())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flair_peft.save_pretrained(model, tmp_path / "directory")
    model.save(tmp_path / "file.pt")
    for loaded in (flair_peft.from_pretrained(tmp_path / "directory"), TextClassifier.load(tmp_path / "file.pt")):
        assert ZOO["text-classifier"].predict(loaded, ZOO["text-classifier"].corpus()) == expected
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
