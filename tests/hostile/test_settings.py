"""No setting in a file has Flair open, unpickle, write or fetch what the file names there."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary
from flair.embeddings import (
    HashEmbeddings,
    TransformerDocumentEmbeddings,
    TransformerOnnxDocumentEmbeddings,
    WordEmbeddings,
)
from flair.embeddings.base import EMBEDDING_CLASSES, TokenEmbeddings, register_embeddings
from flair.models import Lemmatizer
from flair.nn import Classifier, Model
from peft import get_peft_model
from transformers import AutoModel, CLIPConfig, CLIPModel, modeling_utils
from transformers.integrations import hub_kernels

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, SharedBase
from flair_peft.base import transformer
from flair_peft.codec import trust
from flair_peft.errors import BaseModelNotFoundError, FlairPeftError, ModelFileError, UnsafeFileError
from tests.support.configs import lora
from tests.support.files import Payload, resign
from tests.support.zoo import ZOO

Base = Callable[[str], str]


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Return the directory that a payload makes; it is not there when the test is over."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def build(name: str, base: Base) -> Model:
    torch.manual_seed(5)
    makes = (PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings)
    word, document = (
        lambda make=make, **kwargs: make(base("bert"), peft_config=lora(), **kwargs)  # type: ignore[misc]
        for make in makes
    )
    return ZOO[name].build(word, document)


def write(name: str, base: Base, path: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """Write the file of a model with an adapter, as stock Flair does it, with a changed state."""
    state = build(name, base)._get_state_dict()
    change(state)
    torch.save(state, path, pickle_protocol=2)
    return path


def assert_refused(path: Path, match: str) -> None:
    loads: list[Callable[[Path], Any]] = [Model.load, Classifier.load, flair_peft.from_pretrained]
    if path.is_file():
        loads = [Model.load, Classifier.load, flair_peft.load_legacy]
    for load in loads:
        with pytest.raises(ModelFileError, match=match):
            load(path)


def test_pickled_characters_of_a_lemmatizer_run_in_stock_flair(tmp_path: Path) -> None:
    """Flair unpickles the characters of a lemmatizer from any path: a real way in."""
    (tmp_path / "x").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(TypeError):
        Lemmatizer(HashEmbeddings(), char_dict=str(tmp_path / "x"))
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", ["directory", "file"])
def test_characters_of_a_lemmatizer_are_not_read_from_a_path(
    form: str, base: Base, marker: Path, tmp_path: Path
) -> None:
    """Dictionaries stand in the file itself, wherever a model has one."""
    (tmp_path / "characters").write_bytes(pickle.dumps(Payload(marker)))
    path, named = tmp_path / "model", {"char_dict": str(tmp_path / "characters")}
    if form == "directory":
        flair_peft.save_pretrained(build("lemmatizer", base), path)
        resign(path, lambda document: document["model"].update(named))
    else:
        write("lemmatizer", base, path, lambda state: state.update(named))
    assert_refused(path, "char_dict")


@pytest.mark.parametrize("form", ["directory", "file"])
@pytest.mark.parametrize("depth", [1, 2])
def test_task_is_not_read_from_a_path(depth: int, form: str, base: Base, marker: Path, tmp_path: Path) -> None:
    """The tasks of a multitask model stand in the file itself; a path would be loaded as Flair loads files."""
    torch.save({"state_dict": {}, "x": Payload(marker)}, tmp_path / "task.pt")
    path, named = tmp_path / "model", str(tmp_path / "task.pt")

    def change(state: dict[str, Any]) -> None:
        task: Any = {"model_states": {"first": named}, "loss_factors": [1.0], "__cls__": "MultitaskModel"}
        state["model_states"]["first"] = task if depth == 2 else named

    def change_document(document: dict[str, Any]) -> None:
        # All tensors of the document must be used.
        document["model"]["more"] = dict(document["model"]["model_states"])
        change(document["model"])

    if form == "directory":
        flair_peft.save_pretrained(build("multitask", base), path)
        resign(path, change_document)
    else:
        write("multitask", base, path, change)
    assert_refused(path, "model_states|state_dict")


def _stacked(state: dict[str, Any], other: dict[str, Any]) -> None:
    own = state["document_embeddings"]
    state["document_embeddings"] = {"__cls__": "StackedEmbeddings", "embeddings": [own, other]}


def test_onnxruntime_is_not_told_by_a_file_to_write_a_file(base: Base, tmp_path: Path) -> None:
    """Its options name a file to which the optimised graph is written, over what is there."""
    onnx = pytest.importorskip("onnx")
    victim, graph = tmp_path / "victim", tmp_path / "graph.onnx"
    victim.write_text("precious")
    kinds = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in "ab"]
    node = onnx.helper.make_node("Identity", ["a"], ["b"])
    made = onnx.helper.make_graph([node], "graph", kinds[:1], kinds[1:])
    version = onnx.helper.make_opsetid("", 14)
    onnx.save(onnx.helper.make_model(made, opset_imports=[version], ir_version=8), str(graph))
    stock = TransformerDocumentEmbeddings(base("bert"))
    evil = TransformerOnnxDocumentEmbeddings(
        onnx_model=str(graph), providers=["CPUExecutionProvider"], **stock.to_args()
    ).save_embeddings(use_state_dict=False)
    evil["session_options"] = {"optimized_model_filepath": str(victim)}
    path = write("text-classifier", base, tmp_path / "x.pt", lambda state: _stacked(state, evil))
    assert_refused(path, "TransformerOnnxDocumentEmbeddings")
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("is_inner", [False, True])
def test_attention_kernel_is_not_fetched_for_embeddings_beside(
    is_inner: bool, name: str, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers imports what is called "owner/kernel" from the Hub, for embeddings without an adapter, too."""
    fetched: list[Any] = []
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "load_and_register_attn_kernel", fetched.append, raising=False)
    monkeypatch.setattr(modeling_utils, "load_and_register_kernel", fetched.append, raising=False)
    evil = TransformerDocumentEmbeddings(base("bert")).save_embeddings(use_state_dict=False)
    shape = evil["config_state_dict"]
    (shape.setdefault("text_config", {}) if is_inner else shape)[name] = "evil/kernel"
    path = write("text-classifier", base, tmp_path / "x.pt", lambda state: _stacked(state, evil))
    assert_refused(path, "config_state_dict")
    assert not fetched


@pytest.mark.parametrize("is_whole", [False, True])
@pytest.mark.parametrize(
    "change",
    [
        *({name: "evil/kernel"} for name in ("attn_implementation", "_attn_implementation_internal")),
        {"attn_implementation": {"": "evil/kernel"}},
    ],
    ids=str,
)
def test_attention_kernel_is_not_fetched_for_embeddings_with_an_adapter(
    change: dict[str, Any], is_whole: bool, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever setting names it, the default attention is used."""
    fetched: list[Any] = []
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "load_and_register_attn_kernel", fetched.append, raising=False)
    monkeypatch.setattr(modeling_utils, "load_and_register_kernel", fetched.append, raising=False)
    flair_peft.save_pretrained(build("text-classifier", base), tmp_path / "model", save_base=is_whole)
    resign(
        tmp_path / "model",
        lambda document: document["model"]["document_embeddings"]["config_state_dict"].update(change),
    )
    flair_peft.from_pretrained(tmp_path / "model")
    assert not fetched


@pytest.mark.parametrize("change", [{"auto_map": {"AutoModel": "evil--x.Evil"}, "model_type": "x"}, {"backbone": "x"}])
def test_code_and_models_are_not_named_by_the_settings_of_embeddings_beside(
    change: dict[str, Any], base: Base, tmp_path: Path
) -> None:
    """What builds a stock transformer comes with transformers, and its config names no other model."""
    evil = TransformerDocumentEmbeddings(base("bert")).save_embeddings(use_state_dict=False)
    evil["config_state_dict"].update(change)
    path = write("text-classifier", base, tmp_path / "x.pt", lambda state: _stacked(state, evil))
    assert_refused(path, "config_state_dict")


@pytest.mark.parametrize("lacking", ["config_state_dict", "tokenizer_data"])
def test_transformer_beside_is_not_read_from_where_its_name_says(lacking: str, base: Base, tmp_path: Path) -> None:
    """Stock embeddings without a config or a tokenizer would be those of the directory or Hub id that they name."""
    evil = TransformerDocumentEmbeddings(base("bert")).save_embeddings(use_state_dict=False)
    del evil[lacking]
    path = write("text-classifier", base, tmp_path / "x.pt", lambda state: _stacked(state, evil))
    assert_refused(path, lacking)


@pytest.mark.parametrize(
    ("model", "change"),
    [
        ("tars-tagger", {"tars_embeddings": "bert-base-uncased"}),
        ("tars-classifier", {"tars_embeddings": None, "tars_model": {}}),
        ("text-classifier", {"entity_preprocessor": {"__cls__": "Ab3PEntityPreprocessor", "preprocessor": None}}),
        ("text-classifier", {"candidate_search_index": {"__cls__": "ExactMatchCandidateSearchIndex"}}),
        ("sequence-tagger", {"tag_dictionary": "chars"}),
        ("text-classifier", {"label_dictionary": "chars"}),
    ],
)
def test_settings_of_models_name_nothing(model: str, change: dict[str, Any], base: Base, tmp_path: Path) -> None:
    """No part of a model is found by a name: neither its embeddings nor its labels nor the tools of a linker."""
    path = write(model, base, tmp_path / "x.pt", lambda state: state.update(change))
    with pytest.raises(UnsafeFileError, match=next(reversed(change))):
        flair_peft.load_legacy(path)


FLAIR_CLASSES = sorted(name for name, found in EMBEDDING_CLASSES.items() if found.__module__.startswith("flair."))


@pytest.mark.parametrize("name", FLAIR_CLASSES)
@pytest.mark.parametrize("value", ["/etc/passwd", Path("/etc/passwd"), ["x"], object()], ids=lambda v: type(v).__name__)
def test_unknown_setting_of_any_class_of_flair_is_refused(name: str, value: Any) -> None:
    """What is not listed as harmless may hold numbers and flags alone, in every class that Flair registers."""
    assert trust.unsafe_part({"__cls__": name, "anything": value})


@pytest.mark.parametrize("is_inherited", [False, True])
def test_embeddings_of_a_users_own_are_the_users_business(is_inherited: bool) -> None:
    """A class that the user registered reads what it likes; what it inherits from Flair is held to Flair's rules."""
    parent = WordEmbeddings if is_inherited else TokenEmbeddings

    class OwnEmbeddings(parent):  # type: ignore[misc, valid-type]
        """Embeddings of a user."""

    OwnEmbeddings.__module__ = "elsewhere"
    register_embeddings(OwnEmbeddings)
    try:
        settings = {"__cls__": "OwnEmbeddings", "lexicon": "words.txt"}
        assert (trust.unsafe_part({**settings, "vocab": "/etc/passwd"}) is not None) == is_inherited
        assert trust.unsafe_part({**settings, "vocab": {"a": 0}}) is None
    finally:
        del EMBEDDING_CLASSES["OwnEmbeddings"]


def test_dictionary_of_characters_has_to_be_there() -> None:
    """Without it, Flair downloads one and unpickles it."""
    settings = {"__cls__": "CharacterEmbeddings", "char_embedding_dim": 3}
    assert trust.unsafe_part(settings)
    assert trust.unsafe_part({**settings, "path_to_char_dict": "common-chars"})
    assert not trust.unsafe_part({**settings, "path_to_char_dict": Dictionary()})


# What a base names, however far away it is


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Return the kernels that are fetched; whoever asks on standard input gets the test to fail."""
    names: list[Any] = []

    def ask(*_: Any) -> str:
        raise AssertionError("asked on standard input")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(modeling_utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(modeling_utils, "load_and_register_kernel", names.append)
    monkeypatch.setattr(hub_kernels, "get_kernel", names.append, raising=False)
    yield names
    assert names in ([], ["asked/for"])


def changed_base(base: Base, folder: Path, file: str = "config.json", **changes: Any) -> str:
    """Return a copy of a base, one of whose files of settings says something else."""
    directory = Path(shutil.copytree(base("bert"), folder / "changed base"))
    settings = json.loads((directory / file).read_text()) if (directory / file).exists() else {}
    (directory / file).write_text(json.dumps({**settings, **changes}))
    return str(directory)


def _adapter_on(directory: str, base: Base, folder: Path) -> str:
    """Return the directory of an adapter of PEFT that names the base."""
    get_peft_model(AutoModel.from_pretrained(base("bert")), lora()).save_pretrained(folder / "adapter")
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": directory}))
    return str(path.parent)


def _checkpoint_on(directory: str, base: Base, folder: Path) -> Path:
    flair_peft.save_pretrained(build("text-classifier", base), folder / "model")

    def point(document: dict[str, Any]) -> None:
        document["model"]["document_embeddings"]["stored_base"]["record"]["name"] = directory

    resign(folder / "model", point)
    return folder / "model"


REACHING: dict[str, Callable[[str, Base, Path], Any]] = {
    "new embeddings": lambda directory, base, folder: PeftTransformerWordEmbeddings(directory, peft_config=lora()),
    "shared base": lambda directory, base, folder: SharedBase(directory),
    "adapter": lambda directory, base, folder: PeftTransformerWordEmbeddings.from_adapter(
        _adapter_on(directory, base, folder)
    ),
    "checkpoint": lambda directory, base, folder: flair_peft.from_pretrained(_checkpoint_on(directory, base, folder)),
    "base of one's own": lambda directory, base, folder: flair_peft.from_pretrained(
        _checkpoint_on("elsewhere", base, folder), base_model=directory
    ),
}


@pytest.mark.parametrize("reach", REACHING)
@pytest.mark.parametrize(
    "named",
    [
        {"_attn_implementation_internal": "evil/kernel"},
        {"_attn_implementation": "evil/kernel@main:attention"},
        {"attn_implementation": {"": "evil/kernel"}},
        {"_attn_implementation_internal": "flash_attention_3"},
    ],
    ids=str,
)
def test_kernel_that_a_base_names_is_not_fetched(
    named: dict[str, Any], reach: str, base: Base, tmp_path: Path, fetched: list[Any]
) -> None:
    """Whoever leads to the base, and whatever setting names the kernel, the default attention is used."""
    REACHING[reach](changed_base(base, tmp_path, **named), base, tmp_path)
    assert not fetched


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["evil/kernel", {"": "evil/kernel"}], ids=str)
def test_kernel_that_an_inner_config_names_is_not_fetched(
    value: Any, name: str, tmp_path: Path, fetched: list[Any]
) -> None:
    """A model of several parts has a config for each, and transformers builds each as it says."""
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    CLIPConfig(text_config=small, vision_config={**small, "image_size": 4, "patch_size": 2}).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    content["vision_config"][name] = content["text_config"][name] = value
    content["other"] = [{"config": {name: value}}]
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = transformer.find_config(str(tmp_path), {})
    assert isinstance(transformer.build_model(config, dtype=None, model_kwargs={}), CLIPModel)
    assert not fetched
    assert "evil" not in str([*map(vars, (config, config.text_config, config.vision_config))])


@pytest.mark.parametrize("place", [{}, {"attn_implementation": "asked/for"}], ids=["file", "user"])
def test_kernel_that_the_user_asks_for_is_fetched(
    place: dict[str, Any], base: Base, tmp_path: Path, fetched: list[Any]
) -> None:
    """What is dropped is what files say, not what the user says; also where both say the same."""
    directory = changed_base(base, tmp_path, _attn_implementation_internal="asked/for")
    with contextlib.suppress(
        BaseModelNotFoundError
    ):  # of BERT, which has an attention of this name only once it is fetched
        PeftTransformerWordEmbeddings(directory, peft_config=lora(), transformers_model_kwargs=place)
    assert fetched[:1] == list(place.values())
    del fetched[1:]


CODE = {name: f"evil--x.{name}" for name in ("AutoConfig", "AutoModel", "AutoFeatureExtractor")}
TOKENIZER_CODE = {"AutoTokenizer": ["evil--x.Evil", "evil--x.Evil"]}


@pytest.mark.parametrize("reach", REACHING)
def test_code_that_a_base_names_is_not_asked_about(reach: str, base: Base, tmp_path: Path, fetched: list[Any]) -> None:
    """Of a model type that transformers does not know, it would ask on standard input whether to run the code."""
    directory = changed_base(base, tmp_path, auto_map={**CODE, **TOKENIZER_CODE}, model_type="unheard-of")
    if reach in ("checkpoint", "base of one's own"):
        REACHING[reach](directory, base, tmp_path)  # the file holds the config, and the base only weights
    else:
        with pytest.raises(BaseModelNotFoundError, match="trust_remote_code=True"):
            REACHING[reach](directory, base, tmp_path)
    assert not fetched


@pytest.mark.parametrize("where", ["base", "beside the adapter"])
@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("tokenizer_config.json", {"auto_map": TOKENIZER_CODE, "tokenizer_class": "Unheard"}),
        ("preprocessor_config.json", {"auto_map": CODE, "feature_extractor_type": None}),
    ],
)
def test_code_of_a_tokenizer_is_not_asked_about(
    file: str, changes: dict[str, Any], where: str, base: Base, tmp_path: Path, fetched: list[Any]
) -> None:
    """Tokenizers and image preprocessing are held to the same, wherever their files lie."""
    if where == "base":
        with pytest.raises(BaseModelNotFoundError):
            PeftTransformerWordEmbeddings(changed_base(base, tmp_path, file, **changes), peft_config=lora())
        return
    folder = Path(_adapter_on(base("bert"), base, tmp_path))
    (folder / file).write_text(json.dumps(changes))
    try:
        PeftTransformerWordEmbeddings.from_adapter(str(folder))
    except BaseModelNotFoundError:
        assert file == "tokenizer_config.json"


def test_backbone_that_a_config_names_is_refused(base: Base, tmp_path: Path, fetched: list[Any]) -> None:
    """transformers fetches it by its name, and asks whether its code may run."""
    directory = changed_base(base, tmp_path, backbone="evil/backbone")
    with pytest.raises(UnsafeFileError, match="evil/backbone"):
        PeftTransformerWordEmbeddings(directory, peft_config=lora())


def test_code_of_a_tokenizer_beside_is_refused(base: Base, tmp_path: Path, fetched: list[Any]) -> None:
    """Stock embeddings read their tokenizer themselves, and would ask."""
    evil = TransformerDocumentEmbeddings(base("bert")).save_embeddings(use_state_dict=False)
    packed = io.BytesIO()
    with zipfile.ZipFile(evil["tokenizer_data"]) as files, zipfile.ZipFile(packed, "w") as archive:
        for name in files.namelist():
            content = files.read(name)
            if name == "tokenizer_config.json":
                content = json.dumps({"tokenizer_class": "Unheard", "auto_map": TOKENIZER_CODE}).encode()
            archive.writestr(name, content)
    evil["tokenizer_data"] = packed
    path = write("text-classifier", base, tmp_path / "x.pt", lambda state: _stacked(state, evil))
    assert_refused(path, "tokenizer_data")


def test_model_that_a_method_names_is_not_read(base: Base, tmp_path: Path, fetched: list[Any]) -> None:
    """PEFT's shadow can be any model, by its name."""
    path = Path(_adapter_on(base("bert"), base, tmp_path), "adapter_config.json")
    path.write_text(
        json.dumps(
            {
                "peft_type": "SHADOW",
                "shadow_model": "evil/model",
                "shadow_alpha": 0.5,
                "base_model_name_or_path": base("bert"),
            }
        )
    )
    with pytest.raises(FlairPeftError, match="shadow_model"):
        PeftTransformerWordEmbeddings.from_adapter(str(path.parent))
