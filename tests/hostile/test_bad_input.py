"""What cannot work is refused in three sentences, before anything is changed, and the next good input works."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import shutil
import socket
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flair
import peft
import pytest
import torch
from flair.models import TextClassifier
from flair.nn import Model
from peft import (
    IA3Config,
    LNTuningConfig,
    LoftQConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PrefixTuningConfig,
    VBLoRAConfig,
)

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, patch
from flair_peft.errors import (
    AdapterConfigError,
    BaseModelNotFoundError,
    FlairPeftError,
    FormatVersionError,
    MissingConfigError,
    ModelFileError,
    StateMismatchError,
    UnsupportedMethodError,
)
from flair_peft.primitives import load_context
from tests.support.configs import lora
from tests.support.methods import METHODS
from tests.support.zoo import ZOO

ENTRY = ZOO["text-classifier"]
Base = Callable[[str], str]


def build(base: str) -> Model:
    return ENTRY.build(None, lambda **kwargs: PeftTransformerDocumentEmbeddings(base, peft_config=lora(), **kwargs))


@pytest.fixture(scope="module")
def good(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file that loads."""
    path = tmp_path_factory.mktemp("good") / "good.pt"
    torch.manual_seed(3)
    build(base("bert")).save(path)
    return path


@pytest.fixture(scope="module")
def expected(good: Path) -> list[Any]:
    """Return what the good file predicts before anything hostile was tried."""
    return ENTRY.predict(Model.load(good), ENTRY.corpus())


@pytest.fixture(autouse=True)
def _unharmed(good: Path, expected: list[Any]) -> Iterator[None]:
    """Assert, after each test, that the hook is whole and that the good file loads and predicts as before."""
    yield
    assert flair_peft.is_installed()
    assert all(vars(r.owner)[r.name] is r.replacement for r in patch._installed)
    assert load_context.current() == load_context.LoadContext()
    assert ENTRY.predict(Model.load(good), ENTRY.corpus()) == expected


def assert_helpful(error: BaseException) -> None:
    """Assert that the message is three sentences at least, none of them empty."""
    message = str(error)
    assert message.endswith(".")
    sentences = [sentence for sentence in message.split(". ") if sentence.strip(" .")]
    assert len(sentences) >= 3, message


def assert_refused(error_class: type[FlairPeftError], call: Callable[[], Any]) -> str:
    with pytest.raises(error_class) as error:
        call()
    assert_helpful(error.value)
    return str(error.value)


REFUSED = ("POLY", "CPT", "MULTITASK_PROMPT_TUNING", "XLORA", "ADAPTION_PROMPT", "SHADOW")


@pytest.mark.parametrize("method", REFUSED)
def test_method_that_cannot_work_is_refused_by_name(method: str, base: Base) -> None:
    """A method that needs what Flair has not is refused with its name, the architecture and the way out."""
    config = METHODS[method].config("encoder")
    message = assert_refused(
        UnsupportedMethodError, lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    )
    assert method in message
    assert "BertModel" in message
    assert "LoRA" in message


@pytest.mark.filterwarnings("ignore:aLoRA is currently only supported:UserWarning")
def test_activated_lora_is_refused(base: Base) -> None:
    """Tokens that switch an adapter on are never seen by Flair, so the adapter would stay off."""
    config = lora(alora_invocation_tokens=[1, 2])
    message = assert_refused(
        UnsupportedMethodError, lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    )
    assert "activated" in message


@pytest.mark.parametrize("architecture", ["distilbert", "albert"])
def test_prefix_on_a_model_without_past_key_values_is_refused(architecture: str, base: Base) -> None:
    """A prefix that the forward pass would not read is refused."""
    config = PrefixTuningConfig(num_virtual_tokens=3)
    assert_refused(
        UnsupportedMethodError, lambda: PeftTransformerWordEmbeddings(base(architecture), peft_config=config)
    )


def _spelt(config: LoraConfig, method: str) -> LoraConfig:
    config.peft_type = method
    return config


UNFIT: dict[str, Callable[[], PeftConfig]] = {
    "no such name": lambda: lora(target_modules=["nothing"]),
    "no such expression": lambda: lora(target_modules=r"nothing.*"),
    "no such layer": lambda: lora(layers_to_transform=[99]),
    "all excluded": lambda: lora(exclude_modules=["query", "value"]),
    "none given": lambda: lora(target_modules=[]),
    "no such parameter": lambda: lora(target_modules=[], target_parameters=["nothing"]),
    "norms": lambda: lora(target_modules=["LayerNorm"]),
    "ia3": lambda: IA3Config(target_modules=["nothing"], feedforward_modules=["nothing"]),
    "oft": lambda: OFTConfig(oft_block_size=8, target_modules=["nothing"]),
    "norm tuning": lambda: LNTuningConfig(target_modules=["nothing"]),
    "rank of zero": lambda: lora(r=0),
    "negative rank": lambda: lora(r=-1),
    "vectors of no length": lambda: VBLoRAConfig(vector_length=0, target_modules=["query"]),
    "rank in words": lambda: lora(r="four"),
    "alpha in words": lambda: lora(lora_alpha="twelve"),
    "Megatron": lambda: lora(megatron_config={"hidden_size": 32}),
    "method in lower case": lambda: _spelt(lora(), "lora"),
    "token beyond the vocabulary": lambda: lora(trainable_token_indices=[10**6]),
}


if not torch.cuda.is_available():
    UNFIT["quantisation on a CPU"] = lambda: lora(init_lora_weights="loftq", loftq_config=LoftQConfig(loftq_bits=4))


@pytest.mark.parametrize("name", UNFIT)
def test_config_that_fits_no_module_is_refused(name: str, base: Base) -> None:
    """A config whose targets or numbers fit nothing is an error of the config, not of PEFT's insides."""
    assert_refused(AdapterConfigError, lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=UNFIT[name]()))


@pytest.mark.parametrize(("architecture", "names"), [("bert", ["'query'", "'dense'"]), ("gpt2", ["'c_attn'"])])
def test_targets_that_match_nothing_are_answered_with_the_names_there_are(
    architecture: str, names: list[str], base: Base
) -> None:
    """The error lists the linear modules of the architecture at hand."""
    config = lora(target_modules=["nothing"])
    message = assert_refused(
        AdapterConfigError, lambda: PeftTransformerWordEmbeddings(base(architecture), peft_config=config)
    )
    assert "'nothing'" in message
    assert all(name in message for name in names)


WRONG_TYPES = [{"r": 4}, "lora", LoraConfig, 3, False, (), PeftConfig(), [LoraConfig(target_modules=["query"])]]


@pytest.mark.parametrize("config", WRONG_TYPES, ids=lambda config: repr(config)[:20])
def test_config_of_the_wrong_type_is_refused(config: Any, base: Base) -> None:
    """What is no instance of a method's config is never taken for the default."""
    assert_refused(AdapterConfigError, lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=config))


NO_DTYPES = ["int8", "banana", "", "nn", "float32 ", "torch.", torch.int8, torch.bool, 8, True, float]


@pytest.mark.parametrize("keyword", ["dtype", "head_dtype"])
@pytest.mark.parametrize("dtype", NO_DTYPES, ids=repr)
def test_dtype_that_is_none_is_refused(dtype: Any, keyword: str, base: Base) -> None:
    """Only floating-point dtypes of torch are dtypes, and the error shows what was passed."""
    message = assert_refused(
        AdapterConfigError,
        lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(), **{keyword: dtype}),
    )
    assert repr(dtype) in message


def test_dtypes_that_contradict_each_other_are_refused(base: Base) -> None:
    """Two spellings of one setting must not say two things."""
    message = assert_refused(
        AdapterConfigError,
        lambda: PeftTransformerWordEmbeddings(
            base("bert"),
            peft_config=lora(),
            dtype="bfloat16",
            transformers_model_kwargs={"torch_dtype": torch.float16},
        ),
    )
    assert "bfloat16" in message
    assert "float16" in message


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Return the addresses that anything tried to reach; every attempt fails."""
    tried: list[Any] = []

    def refuse(_: socket.socket, address: Any) -> None:
        tried.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: refuse(None, address))
    return tried


@pytest.mark.parametrize(
    "source",
    [
        "/nowhere/model",
        "./nowhere",
        "someone/nothing",
        "bert-base-nothing",
        "not a valid id!!",
        "a/b/c/d",
        "",
        "x@main",
    ],
)
def test_base_that_is_nowhere_is_refused_without_asking_the_network(source: str, connections: list[Any]) -> None:
    """Offline, a base model that is neither a directory nor cached is refused by its name."""
    message = assert_refused(BaseModelNotFoundError, lambda: PeftTransformerWordEmbeddings(source, peft_config=lora()))
    assert f"'{source}'" in message
    assert connections == []


def _without(*names: str) -> Callable[[Path], None]:
    def remove(directory: Path) -> None:
        for name in names:
            (directory / name).unlink()

    return remove


def _with_config(text: str) -> Callable[[Path], None]:
    return lambda directory: (directory / "config.json").write_text(text, encoding="utf-8") and None


def _cut_weights(length: int) -> Callable[[Path], None]:
    def cut(directory: Path) -> None:
        weights = directory / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:length])

    return cut


DAMAGED_BASES: dict[str, Callable[[Path], None]] = {
    "empty": lambda directory: _without(*(path.name for path in directory.iterdir()))(directory),
    "no weights": _without("model.safetensors"),
    "no config": _without("config.json"),
    "no tokenizer": _without("tokenizer.json", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json"),
    "config is not JSON": _with_config("{"),
    "config is empty": _with_config("{}"),
    "config is a list": _with_config("[1]"),
    "config is deep": _with_config("[" * 100_000),
    "config has sizes in words": _with_config(json.dumps({"model_type": "bert", "hidden_size": "32"})),
    "config names no known architecture": _with_config(json.dumps({"model_type": "banana"})),
    "config is nested too deep": _with_config('{"a": ' * 3_000 + "1" + "}" * 3_000),
    "config is nested as deep as Python reads": _with_config('{"a": ' * 900 + "1" + "}" * 900),
    "weights are empty": _cut_weights(0),
    "weights end in their header": _cut_weights(500),
    "weights end early": _cut_weights(-100),
}


@pytest.mark.parametrize("damage", DAMAGED_BASES)
def test_base_directory_that_is_damaged_is_refused_with_its_name(damage: str, base: Base, tmp_path: Path) -> None:
    """A directory that holds no usable model is named, with what is wrong with it."""
    directory = Path(shutil.copytree(base("bert"), tmp_path / "damaged"))
    DAMAGED_BASES[damage](directory)
    message = assert_refused(FlairPeftError, lambda: PeftTransformerWordEmbeddings(str(directory), peft_config=lora()))
    assert str(directory) in message


def test_base_directory_that_is_empty_is_said_to_be_so(tmp_path: Path) -> None:
    """An empty folder is called one."""
    assert "an empty folder" in assert_refused(
        BaseModelNotFoundError, lambda: PeftTransformerWordEmbeddings(str(tmp_path))
    )


def test_method_in_lower_case_is_answered_with_its_name(base: Base) -> None:
    """What only its spelling makes unknown is told how to write it."""
    config = _spelt(lora(), "lora")
    message = assert_refused(
        AdapterConfigError, lambda: PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    )
    assert message.endswith("Write 'LORA' instead.")


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _zip(**files: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    return buffer.getvalue()


def _of_a_module_that_is_gone() -> bytes:
    module = types.ModuleType("module_that_is_gone")
    module.Thing = type("Thing", (), {"__module__": module.__name__})
    sys.modules[module.__name__] = module
    try:
        return _saved({"state_dict": {}, "thing": module.Thing()})
    finally:
        del sys.modules[module.__name__]


def _of_a_class_that_is_gone() -> bytes:
    flair.data.Thing = type("Thing", (), {"__module__": "flair.data"})
    try:
        return _saved({"state_dict": {}, "thing": flair.data.Thing()})
    finally:
        del flair.data.Thing


NOT_MODELS: dict[str, Callable[[], bytes]] = {
    "empty file": lambda: b"",
    "one byte": lambda: b"P",
    "text": lambda: b"hello\n",
    "web page": lambda: b"<!DOCTYPE html><html></html>",
    "pointer of Git LFS": lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
    "zip": lambda: _zip(**{"a.txt": "x"}),
    "zip without files": _zip,
    "zip that looks like torch's": lambda: _zip(**{"archive/data.pkl": "x", "archive/version": "3\n"}),
    "tar": _tar,
    "gzip": lambda: gzip.compress(b"x" * 1000),
    "pickled list": lambda: pickle.dumps([1, 2]),
    "pickled dictionary": lambda: pickle.dumps({"state_dict": {}}),
    "saved list": lambda: _saved([1, 2]),
    "saved tensor": lambda: _saved(torch.ones(2)),
    "saved nothing": lambda: _saved(None),
    "saved text": lambda: _saved("state_dict"),
    "saved empty dictionary": lambda: _saved({}),
    "saved dictionary without state_dict": lambda: _saved({"embeddings": {}, "__cls__": "TextClassifier"}),
    "state_dict is a number": lambda: _saved({"state_dict": 3}),
    "state_dict with numbers as names": lambda: _saved({"state_dict": {1: torch.ones(1)}}),
    "model_states is a number": lambda: _saved({"model_states": 3}),
    "module that is gone": _of_a_module_that_is_gone,
    "class that is gone": _of_a_class_that_is_gone,
    "frame longer than memory": lambda: b"\x80\x04\x95" + b"\xff" * 100,
}


@pytest.mark.parametrize("loader", [TextClassifier, Model])
@pytest.mark.parametrize("name", NOT_MODELS)
def test_file_that_is_no_model_is_refused_with_its_name(name: str, loader: type[Model], tmp_path: Path) -> None:
    """Whatever the bytes are, the error names the file, through concrete and abstract classes."""
    path = tmp_path / "bad.pt"
    path.write_bytes(NOT_MODELS[name]())
    assert str(path) in assert_refused(ModelFileError, lambda: loader.load(path))


LENGTHS = (1, 2, 10, 100, 1000, 0.25, 0.5, 0.75, 0.9, 0.99, -1000, -100, -22, -1)


@pytest.mark.parametrize("length", LENGTHS)
def test_file_that_is_cut_off_is_refused_wherever_it_ends(length: float, good: Path, tmp_path: Path) -> None:
    """A download that stopped gives no model, even if only the last byte is missing."""
    content, path = good.read_bytes(), tmp_path / "cut.pt"
    path.write_bytes(content[: length if isinstance(length, int) else int(length * len(content))])
    message = assert_refused(ModelFileError, lambda: TextClassifier.load(path))
    assert str(path) in message
    assert f"{path.stat().st_size} bytes" in message


@pytest.mark.parametrize("start", [b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"], ids=repr)
def test_file_of_random_bytes_is_refused(start: bytes, tmp_path: Path) -> None:
    """Noise, whatever it begins like, ends in an error of this package and not in one of pickle's insides."""
    path = tmp_path / "noise.pt"
    for seed in range(40):
        path.write_bytes(start + random.Random(seed).randbytes(200))
        assert_refused(ModelFileError, lambda: TextClassifier.load(path))


@pytest.mark.parametrize("tensor", ["lora_A", "word_embeddings", "decoder"])
def test_file_with_a_damaged_tensor_is_refused(tensor: str, good: Path, tmp_path: Path) -> None:
    """One flipped byte in a weight changes predictions; the checksum in the file tells, so it is not silent."""
    good, small = tmp_path / "whole.pt", good
    TextClassifier.load(small).save(good, save_base=True)
    state = torch.load(good, map_location="cpu", weights_only=False)["state_dict"]
    values = next(value for key, value in state.items() if tensor in key and value.dim() == 2)
    content = bytearray(good.read_bytes())
    position = content.find(values.numpy().tobytes())
    assert position > 0
    content[position + 3] ^= 0x7F
    path = tmp_path / "flipped.pt"
    path.write_bytes(content)
    assert str(path) in assert_refused(FlairPeftError, lambda: TextClassifier.load(path))


PARAMETERS = "document_embeddings"
ADAPTER_KEY = "embeddings.model.base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"


def _set(name: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state[PARAMETERS].update({name: value})


def _drop(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: state[PARAMETERS].pop(name)


DAMAGED_STATES: dict[str, tuple[type[FlairPeftError], Callable[[dict[str, Any]], Any]]] = {
    "newer layout": (FormatVersionError, _set("format_version", 99)),
    "layout in words": (FormatVersionError, _set("format_version", "1")),
    "layout that is none": (FormatVersionError, _set("format_version", None)),
    "config is a number": (AdapterConfigError, _set("peft_config", 3)),
    "config is empty": (AdapterConfigError, _set("peft_config", {})),
    "config without value": (FlairPeftError, _set("peft_config", None)),
    "config left out": (MissingConfigError, _drop("peft_config")),
    "config of a method that is none": (AdapterConfigError, _set("peft_config", {"peft_type": "BANANA"})),
    "config of a list of methods": (AdapterConfigError, _set("peft_config", {"peft_type": ["LORA"]})),
    "config with a rank in words": (AdapterConfigError, _set("peft_config", {"peft_type": "LORA", "r": "four"})),
    "config of another rank": (
        StateMismatchError,
        _set("peft_config", {"peft_type": "LORA", "r": 8, "lora_alpha": 4, "target_modules": ["query", "value"]}),
    ),
    "dtype that is none": (AdapterConfigError, _set("dtype", "banana")),
    "architecture that is none": (ModelFileError, _set("config_state_dict", {"model_type": "banana"})),
    "shape without value": (ModelFileError, _set("config_state_dict", None)),
    "shape left out": (ModelFileError, _drop("config_state_dict")),
    "tokenizer is noise": (FlairPeftError, _set("tokenizer_data", io.BytesIO(b"noise"))),
    "tensor is a number": (FlairPeftError, lambda state: state["state_dict"].update({ADAPTER_KEY: 3})),
    "class that is none": (ModelFileError, lambda state: state.update(__cls__="Banana")),
}


@pytest.mark.parametrize("name", DAMAGED_STATES)
def test_file_with_a_damaged_part_is_refused(name: str, good: Path, tmp_path: Path) -> None:
    """A whole file whose settings make no sense gives an error of the right kind, and no model."""
    error_class, damage = DAMAGED_STATES[name]
    state = torch.load(good, map_location="cpu", weights_only=False)
    damage(state)
    path = tmp_path / "damaged.pt"
    torch.save(state, path)
    assert_refused(error_class, lambda: Model.load(path))


def test_file_of_a_newer_layout_is_refused_with_the_way_out(good: Path) -> None:
    """The error names the version of the file, the one that is known, and how to upgrade."""
    state = torch.load(good, map_location="cpu", weights_only=False)
    state[PARAMETERS]["format_version"] = 99
    message = assert_refused(FormatVersionError, lambda: TextClassifier.load(state))
    assert "version 99" in message
    assert "Upgrade flair_peft" in message


def test_config_of_a_newer_peft_is_refused_with_both_versions(good: Path) -> None:
    """A setting that this PEFT lacks is named with the version that had it."""
    state = torch.load(good, map_location="cpu", weights_only=False)
    state[PARAMETERS]["peft_config"].update(use_magic=True, peft_version="9.8.7")
    message = assert_refused(AdapterConfigError, lambda: TextClassifier.load(state))
    assert all(part in message for part in ("use_magic", "9.8.7", peft.__version__))


BAD_TENSORS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "missing": lambda state: state.pop(ADAPTER_KEY.removeprefix("embeddings.")),
    "extra": lambda state: state.update({"model.extra": torch.ones(1)}),
    "shape": lambda state: state.update({ADAPTER_KEY.removeprefix("embeddings."): torch.ones(2, 2)}),
}


@pytest.mark.parametrize("damage", BAD_TENSORS)
def test_embeddings_that_refuse_a_state_are_as_they_were(damage: str, base: Base) -> None:
    """Live embeddings are filled whole or not at all."""
    embeddings, other = (
        PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), name="twin") for _ in range(2)
    )
    before = {name: tensor.clone() for name, tensor in embeddings.state_dict().items()}
    state = dict(other.state_dict())
    BAD_TENSORS[damage](state)
    with pytest.raises(StateMismatchError):
        embeddings.load_state_dict(state)
    after = embeddings.state_dict()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []


@pytest.mark.parametrize("damage", BAD_TENSORS)
def test_embeddings_that_were_never_filled_refuse_to_embed(damage: str, base: Base) -> None:
    """Embeddings whose weights were refused hold no random ones instead: they embed nothing until they are filled."""
    whole = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    hollow = PeftTransformerDocumentEmbeddings.from_params(whole.to_params())
    state = dict(whole.state_dict())
    BAD_TENSORS[damage](state)
    with pytest.raises(StateMismatchError):
        hollow.load_state_dict(state)
    assert_refused(ModelFileError, lambda: hollow.embed(flair.data.Sentence("Berlin")))
    hollow.load_state_dict(whole.state_dict())
    sentences = [flair.data.Sentence("Berlin") for _ in range(2)]
    whole.embed(sentences[0])
    hollow.embed(sentences[1])
    assert torch.equal(sentences[0].embedding, sentences[1].embedding)
