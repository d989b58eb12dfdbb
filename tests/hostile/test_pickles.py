"""A file with adapters runs no code, wherever in it the code stands; a file without them is Flair's, as ever."""

from __future__ import annotations

import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import subprocess
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flair.data
import numpy as np
import pytest
import torch
from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import TextClassifier
from flair.nn import Classifier, Model
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.cli import main
from flair_peft.errors import FlairPeftError, ModelFileError, UnsafeFileError
from flair_peft.torchfile import allowed_names, checksums, scan, state_tree, unpickle
from tests.support.configs import lora
from tests.support.files import Payload
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO

KEY = "embeddings.model.base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"
PARAMETERS = {"__cls__": "TransformerDocumentEmbeddings", "model": "bert"}
Base = Callable[[str], str]


class Late(Payload):
    """Hands the payload over as state, behind a class that Flair's files do hold."""

    def __reduce__(self) -> Any:
        return OrderedDict, (), {"_metadata": Payload(self.marker)}


class Hashed(Payload):
    """Can stand as a key."""

    __hash__ = object.__hash__


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Return the directory that a payload makes; it is not there when the test is over."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


def state_of(**more: Any) -> dict[str, Any]:
    tensors = OrderedDict({KEY: torch.zeros(4, 32), "decoder.weight": torch.zeros(2, 32)})
    return {"state_dict": tensors, "document_embeddings": dict(PARAMETERS), "__cls__": "TextClassifier", **more}


def saved(state: Any, path: Path, protocol: int = 4, *, is_zip: bool = True) -> Path:
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return path


def zipped(path: Path, **pickles: bytes) -> Path:
    """Write a torch zip file of these pickles, by torch's own writer: its checksums are right."""
    writer = torch._C.PyTorchFileWriter(str(path))
    for name, content in pickles.items():
        writer.write_record(f"{name}.pkl", content, len(content))
    writer.write_end_of_file()
    return path


def text(value: str) -> bytes:
    """Return the opcode that pushes a string, of protocol 1 and later."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def with_adapters(evil: bytes, protocol: int = 4) -> bytes:
    """Return the pickle of a state with an adapter's key in which ``evil`` has put one value on the stack."""
    state = text("state_dict") + b"}" + text(KEY) + b"Ns"
    return b"\x80" + bytes([protocol]) + b"}(" + state + text("evil") + evil + b"u."


def pickle_in(path: Path) -> bytes:
    return torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")


def assert_refused(path: Path, error_class: type[FlairPeftError] = UnsafeFileError) -> str:
    """Assert that no way of loading accepts the file, in three sentences that name it, and return them."""
    messages = []
    for load in (unpickle.read_state, Model.load, Classifier.load, TextClassifier.load):
        with pytest.raises(error_class) as error:
            load(path)
        messages.append(str(error.value))
    assert set(messages) == {messages[0]}
    assert str(path) in messages[0]
    assert messages[0].count(". ") >= 2
    return messages[0]


PLACES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "value": lambda marker: state_of(extra=Payload(marker)),
    "key": lambda marker: {**state_of(), Hashed(marker): 1},
    "before all": lambda marker: {"first": Payload(marker), **state_of()},
    "state_dict": lambda marker: state_of(state_dict=OrderedDict({KEY: torch.zeros(1), "x": Payload(marker)})),
    "key of the state_dict": lambda marker: state_of(state_dict={KEY: torch.zeros(1), Hashed(marker): 1}),
    "task": lambda marker: {"model_states": {"a": state_of(), "b": state_of(extra=[{"x": (Payload(marker),)}])}},
    "model card": lambda marker: state_of(model_card={"training_parameters": {"plugins": [Payload(marker)]}}),
    "embeddings": lambda marker: state_of(document_embeddings={**PARAMETERS, "name": Payload(marker)}),
    "set": lambda marker: state_of(extra={1, Hashed(marker)}),
    "behind a state": lambda marker: state_of(extra=Late(marker)),
    "without tensors, beside a config": lambda marker: {
        "state_dict": {},
        "document_embeddings": {**PARAMETERS, "peft_config": {}, "x": Payload(marker)},
    },
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", PLACES)
def test_payload_anywhere_in_a_file_with_adapters_is_refused_by_name(
    place: str, protocol: int, is_zip: bool, marker: Path, tmp_path: Path
) -> None:
    """In every protocol and both layouts of torch's files, the error names what the file wanted to call."""
    path = saved(PLACES[place](marker), tmp_path / "x.pt", protocol, is_zip=is_zip)
    assert f"'{os.mkdir.__module__}.mkdir'" in assert_refused(path)


def test_payload_runs_in_stock_flair(tmp_path: Path) -> None:
    """The payloads of this module do work: without the hook, loading the file makes the directory."""
    path = saved(state_of(extra=Payload(tmp_path / "executed")), tmp_path / "x.pt")
    flair_peft.uninstall()
    with contextlib.suppress(Exception):  # what Flair says of the rest of the file
        TextClassifier.load(path)
    assert (tmp_path / "executed").exists()


OS = os.mkdir.__module__
NAME = f"{OS}\nmkdir\n".encode()
PUSHED = text(OS) + text("mkdir")


def called(name: bytes, marker: Path) -> bytes:
    """Return the opcodes that call what ``name`` has put on the stack."""
    return name + text(str(marker)) + b"\x85R"


RAW: dict[str, Callable[[Path], bytes]] = {
    "GLOBAL": lambda marker: called(b"c" + NAME, marker),
    "STACK_GLOBAL": lambda marker: called(PUSHED + b"\x93", marker),
    "STACK_GLOBAL of memoised names": lambda marker: (
        text(OS) + b"\x940" + text("mkdir") + b"\x940" + called(b"h\x00h\x01\x93", marker)
    ),
    "STACK_GLOBAL of numbered names": lambda marker: (
        text(OS) + b"q\x070" + text("mkdir") + b"q\x090" + called(b"h\x07h\x09\x93", marker)
    ),
    "STACK_GLOBAL of names numbered over others": lambda marker: (
        text("collections") + b"\x940" + text(OS) + b"q\x000" + called(b"h\x00" + text("mkdir") + b"\x93", marker)
    ),
    "STACK_GLOBAL of names numbered in text": lambda marker: (
        text(OS) + b"p7\n0" + called(b"g7\n" + text("mkdir") + b"\x93", marker)
    ),
    "STACK_GLOBAL with something in between": lambda marker: called(
        text(OS) + text("collections") + b"0" + text("mkdir") + b"\x93", marker
    ),
    "STACK_GLOBAL of doubled names": lambda marker: text("x") + b"20" + called(PUSHED + b"\x93", marker) + b"\x860",
    "STACK_GLOBAL of short strings": lambda marker: called(
        b"U" + bytes([len(OS)]) + OS.encode() + b"U\x05mkdir\x93", marker
    ),
    "STACK_GLOBAL of unicode in text": lambda marker: called(f"V{OS}\nV\\u006dkdir\n".encode() + b"\x93", marker),
    "STACK_GLOBAL across a mark": lambda marker: called(text(OS) + b"(" + text("mkdir") + b"\x93", marker),
    "STACK_GLOBAL in a frame": lambda marker: called(
        b"\x95" + struct.pack("<Q", len(PUSHED) + 1) + PUSHED + b"\x93", marker
    ),
    "INST": lambda marker: b"(" + text(str(marker)) + b"i" + NAME,
    "OBJ": lambda marker: b"(c" + NAME + text(str(marker)) + b"o",
    "NEWOBJ": lambda marker: b"c" + NAME + text(str(marker)) + b"\x85\x81",
    "NEWOBJ_EX": lambda marker: b"c" + NAME + text(str(marker)) + b"\x85}\x92",
    "persistent": lambda marker: called(b"c" + NAME, marker) + b"Q",
    "module of a persistent": lambda marker: text("module") + called(b"c" + NAME, marker) + b"\x86Q",
    "below what is returned": lambda marker: called(b"c" + NAME, marker) + b"0N",
}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", RAW)
def test_payload_of_any_opcode_is_refused(name: str, protocol: int, marker: Path, tmp_path: Path) -> None:
    """However a pickle gets hold of a function, it is found out before anything runs."""
    content = with_adapters(RAW[name](marker), protocol)
    assert_refused(zipped(tmp_path / "x.pt", data=content))


@pytest.mark.parametrize("code", [0x12, 0x1234, 0x123456])
def test_payload_behind_an_extension_code_is_refused(code: int, marker: Path, tmp_path: Path) -> None:
    """A number that this process has registered for a function is a name that the file does not hold."""
    width, opcode = {1: (1, b"\x82"), 2: (2, b"\x83"), 3: (4, b"\x84")}[(code.bit_length() + 7) // 8]
    copyreg.add_extension(OS, "mkdir", code)
    try:
        extension = opcode + code.to_bytes(width, "little")
        message = assert_refused(zipped(tmp_path / "x.pt", data=with_adapters(called(extension, marker))))
    finally:
        copyreg.remove_extension(OS, "mkdir", code)
    assert scan.UNRESOLVED in message


def test_payload_in_another_pickle_of_the_archive_is_refused(marker: Path, tmp_path: Path) -> None:
    """What torch would not read by itself is read here: nothing in such a file is meant well."""
    evil = b"\x80\x04" + RAW["STACK_GLOBAL"](marker) + b"."
    for name in ("constants", "attributes", "code/debug", "data2"):
        assert_refused(zipped(tmp_path / f"{name[:4]}.pt", **{"data": with_adapters(b"N"), name: evil}))


def test_script_that_torch_would_hand_on_is_refused(tmp_path: Path) -> None:
    """TorchScript has a language of its own; an archive that torch takes for one is not read."""
    path = zipped(tmp_path / "x.pt", data=with_adapters(b"N"), constants=b"\x80\x02N.")
    assert "TorchScript" in assert_refused(path)


class _WithoutTensors(pickle.Unpickler):
    def persistent_load(self, _: Any) -> None:
        return None


@pytest.mark.parametrize("position", range(5))
def test_payload_in_any_pickle_of_an_old_file_is_refused(position: int, marker: Path, tmp_path: Path) -> None:
    """Old-style files are five pickles in a row, all of which torch loads."""
    good = saved(state_of(), tmp_path / "good.pt", is_zip=False).read_bytes()
    stream, parts = io.BytesIO(good), []
    for _ in range(5):
        begin = stream.tell()
        recorder = _WithoutTensors(stream)
        try:
            recorder.load()
        except Exception:
            # The object's tensors cannot be built here: its pickle ends where that of the keys begins.
            stream.seek(good.rindex(b"\x80\x04", begin + 2))
        parts.append(good[begin : stream.tell()])
    assert len(parts) == 5
    parts[position] = b"\x80\x04" + RAW["STACK_GLOBAL"](marker) + b"0" + parts[position][2:]
    path = tmp_path / "x.pt"
    path.write_bytes(b"".join(parts) + good[stream.tell() :])
    assert_refused(path)


GADGETS = (
    "builtins.eval",
    "builtins.exec",
    "builtins.getattr",
    "builtins.__import__",
    "builtins.open",
    "builtins.type",
    "builtins.map",
    "builtins.set.add",
    "__builtin__.apply",
    "os.system",
    "nt.system",
    "subprocess.Popen",
    "functools.partial",
    "operator.attrgetter",
    "operator.methodcaller",
    "importlib.import_module",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "types.FunctionType",
    "runpy.run_path",
    "pickle.loads",
    "torch.load",
    "torch.hub.load",
    "torch.jit.load",
    "torch._utils._rebuild_tensor_v2.__globals__",
    "torch._tensor._rebuild_from_type_v2",
    "torch.storage._load_from_bytes",
    "torch.nn.modules.module.Module.register_forward_hook",
    "torch.serialization.load",
    "torch._utils.import_module",
    "torch._dynamo.guards.GuardBuilder.get",
    "numpy.load",
    "numpy.core.multiarray._reconstruct",
    "numpy.ndarray",
    "flair.data.Dictionary.load_from_file",
    "flair.data.log.addHandler",
    "flair.data.Path",
    "flair.file_utils.load_torch_state",
    "flair.file_utils.cached_path",
    "flair.embeddings.WordEmbeddings",
    "flair.embeddings.token.WordEmbeddings",
    "flair.embeddings.document.TransformerDocumentEmbeddings",
    "flair.nn.model.Model.load",
    "flair_peft.torchfile.unpickle.read_state",
    "flair_peft.torchfile.unpickle._AllowedUnpickler",
    "flair_peft.embeddings.PeftTransformerWordEmbeddings.from_adapter",
    "flair_peft.codec.restore_state.__globals__",
    "transformers.AutoModel.from_pretrained",
    "idlelib.pyshell.ModifiedInterpreter",
    "os.systemStorage",
    "Storage.FloatStorage",
)


@pytest.mark.parametrize("name", GADGETS)
def test_function_that_could_do_harm_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """None of the functions that attacks on pickles are built of is on the list, in either spelling."""
    module, _, attribute = name.rpartition(".")
    path = zipped(tmp_path / "x.pt", data=with_adapters(text(module) + text(attribute) + b"\x93"))
    assert f"'{name}'" in assert_refused(path)
    root, _, rest = name.partition(".")
    path = zipped(tmp_path / "y.pt", data=with_adapters(text(root) + text(rest) + b"\x93"))
    assert f"'{name}'" in assert_refused(path)


def name_of(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


DICTIONARY = name_of("flair.data.Dictionary")
CANDIDATES = name_of("flair.models.entity_linker_model.CandidateGenerator")
EMBEDDINGS = name_of("flair_peft.embeddings.PeftTransformerDocumentEmbeddings")
LINEAR = name_of("torch.nn.modules.linear.Linear")

MISUSES: dict[str, bytes] = {
    "attribute of a class": DICTIONARY + b"N}" + text("add_item") + b"Ns\x86b",
    "slots of an instance": DICTIONARY + b")\x81" + b"N}" + text("idx2item") + b"]s\x86b",
    "constructor of candidates, which downloads": CANDIDATES + text("zelda") + b"\x85R",
    "constructor of candidates as an object": b"(" + CANDIDATES + text("zelda") + b"o",
    "constructor of candidates in place": b"(" + text("zelda") + b"i" + CANDIDATES[1:],
    "constructor of embeddings": EMBEDDINGS + text("bert-base-uncased") + b"\x85R",
    "embeddings of Flair's state": EMBEDDINGS + b")\x81}" + text("model") + text("bert-base-uncased") + b"sb",
    "constructor of a dictionary": DICTIONARY + b")R",
    "constructor of a layer": LINEAR + b"KKKK\x86R",
    "new instance of a function": name_of("torch._utils._rebuild_parameter") + b")\x81",
    "call of a constant": name_of("torch.float32") + b")R",
    "call of a storage": name_of("torch.FloatStorage") + b"K\x04\x85R",
    "call of a string": text("collections.OrderedDict") + b")R",
    "bytes in another encoding": name_of("_codecs.encode") + text("x" * 9) + text("idna") + b"\x86R",
    "bytes of a length": name_of("__builtin__.bytes") + b"J\xff\xff\xff\x7f\x85R",
    "methods of an ordered dictionary": (
        name_of("collections.OrderedDict") + b")R}" + text("items") + CANDIDATES + b"sb"
    ),
    "default that calls": name_of("collections.defaultdict") + CANDIDATES + b"\x85R",
    "numbers that are objects": name_of("numpy.dtype") + text("O8") + b"\x89\x88\x87R",
    "number of another type": (
        name_of("numpy.core.multiarray.scalar") + DICTIONARY + b")\x81" + b"C\x08" + bytes(8) + b"\x86R"
    ),
    "numbers in an odd order": name_of("numpy.dtype") + text("f8") + b"\x89\x88\x87R" + b"(K\x03" + text("O") + b"tb",
    "attributes of a list": b"]}" + text("append") + b"Nsb",
    "attributes of a tensor": name_of("torch._utils._rebuild_parameter") + b"N\x89}\x87R}" + text("data") + b"Nsb",
    "tensor without a storage": name_of("torch._utils._rebuild_tensor_v2") + b"(NK\x00)) \x89}tR",
    "persistent in text": b"Px\n",
    "persistent that is a name": text("x") + b"Q",
    "persistent without parts": b")Q",
    "persistent that is no module": b"(" + text("module") + DICTIONARY + text("x.py") + text("class X: ...") + b"tQ",
    "opcode that there is not": b"\xff",
}


@pytest.mark.parametrize("name", MISUSES)
def test_what_is_allowed_is_not_to_be_misused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name on the list is good for what Flair does with it: no constructor runs, no class changes."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("it was called")

    before = dict(vars(flair.data.Dictionary))
    monkeypatch.setattr("flair.models.entity_linker_model.CandidateGenerator.__init__", refuse)
    monkeypatch.setattr(PeftTransformerDocumentEmbeddings, "__init__", refuse)
    monkeypatch.setattr(flair.data.Dictionary, "__init__", refuse)
    path = zipped(tmp_path / "x.pt", data=with_adapters(MISUSES[name]))
    assert "it was called" not in assert_refused(path, ModelFileError)
    monkeypatch.undo()
    assert dict(vars(flair.data.Dictionary)) == before


def test_hook_in_a_layer_is_not_called(tmp_path: Path) -> None:
    """What stands where torch keeps functions to call is the name of one: nothing in a state can be called."""
    hooks = text("_forward_hooks") + b"}K\x00" + CANDIDATES + b"s"
    path = zipped(tmp_path / "x.pt", data=with_adapters(LINEAR + b")\x81}" + hooks + b"sb"))
    (hook,) = unpickle.read_state(path)["evil"]._forward_hooks.values()
    assert hook == "flair.models.entity_linker_model.CandidateGenerator"
    assert not callable(hook)


def test_attribute_named_like_a_method_is_not_called(tmp_path: Path) -> None:
    """A second state is set by the class, not by what the first one has put in place of its method."""
    first = b"}" + text("__setstate__") + DICTIONARY + b")\x81sb"
    path = zipped(tmp_path / "x.pt", data=with_adapters(CANDIDATES + b")\x81" + first + b"}" + text("a") + b"K\x01sb"))
    assert unpickle.read_state(path)["evil"].a == 1


def test_name_that_the_opcodes_hid_is_refused_while_reading(
    marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The unpickler holds the list too: it needs no opcodes to be read before."""
    nothing = scan.PickleContents(frozenset(), frozenset({"peft_config"}), is_whole=True)
    monkeypatch.setattr(scan, "read_contents", lambda _: nothing)
    for is_zip in (True, False):
        path = saved(state_of(extra=Payload(marker)), tmp_path / "x.pt", is_zip=is_zip)
        assert f"'{OS}.mkdir'" in assert_refused(path, ModelFileError)
    for name, payload in RAW.items():
        assert_refused(zipped(tmp_path / f"{len(name)}.pt", data=with_adapters(payload(marker))), ModelFileError)


def test_list_of_what_is_allowed_calls_nothing_with_an_effect() -> None:
    """Every name on the list exists, and every class is rebuilt by setting attributes."""
    for name in allowed_names.RECORDS | allowed_names.MODULES | allowed_names.FUNCTIONS | allowed_names.CONSTANTS:
        if not name.startswith("flair_peft.codec."):
            assert unpickle._Name(name).look_up() is not None
    own = {"_io.BytesIO", "flair.data.Dictionary"}
    for name in allowed_names.RECORDS | allowed_names.MODULES:
        found = unpickle._Name(name).look_up()
        assert f"{found.__module__}.{found.__qualname__}" == name
        setter = getattr(found, "__setstate__", None)
        is_known = setter is torch.nn.Module.__setstate__ or name.startswith("flair_peft.embeddings.") or name in own
        assert setter is None or is_known, name


WITHOUT_ADAPTERS: dict[str, Callable[[], dict[str, Any]]] = {
    "unknown class": lambda: {"state_dict": {"a.b": torch.ones(1)}, "extra": Counter("abc")},
    "function": lambda: {"state_dict": {"a.b": torch.ones(1)}, "extra": subprocess.run},
    "numpy": lambda: {"state_dict": {"a.b": torch.ones(1)}, "extra": np.arange(3)},
    "word that looks like a key": lambda: {"state_dict": {"a.b": torch.ones(1)}, "extra": ["lora_A", "peft"]},
}


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", WITHOUT_ADAPTERS)
def test_file_without_adapters_is_read_as_ever(name: str, protocol: int, is_zip: bool, tmp_path: Path) -> None:
    """Whatever a file without adapters holds, it is read as Flair reads it."""
    state = WITHOUT_ADAPTERS[name]()
    path = saved(state, tmp_path / "x.pt", protocol, is_zip=is_zip)
    assert str(unpickle.read_state(path, expects_adapters=False)) == str(state)


def test_file_without_adapters_is_read_by_flair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own function is called, once, with a path to the file."""
    path, calls = saved({"state_dict": {}}, tmp_path / "x.pt"), list[bool]()
    monkeypatch.setattr(
        unpickle, "load_torch_state", lambda found: calls.append(path.samefile(found)) or {"state_dict": {}}
    )
    unpickle.read_state(path, expects_adapters=False)
    assert calls == [True]
    unpickle.read_state(path)
    unpickle.read_state(saved(state_of(), path), expects_adapters=False)
    assert calls == [True]


def assert_equal(first: Any, second: Any) -> None:
    """Assert that two states are of the same types and values, all the way down."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            assert_equal(first[key], second[key])
        assert_equal(list(getattr(first, "__dict__", {}).items()), list(getattr(second, "__dict__", {}).items()))
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_equal(one, other)
    elif isinstance(first, io.BytesIO):
        assert (first.getvalue(), first.tell()) == (second.getvalue(), second.tell())
    elif isinstance(first, PeftTransformerDocumentEmbeddings):
        assert_equal(dict(first.state_dict()), dict(second.state_dict()))
    elif isinstance(first, flair.data.Sentence):
        assert [token.text for token in first] == [token.text for token in second]
    elif hasattr(first, "__dict__"):
        assert_equal(vars(first), vars(second))
    else:
        assert first == second


# In its old layout torch stores the source of modules, which it looks for where the name of a class says that it lies.
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code for container of type PeftTransformer:UserWarning")
@pytest.mark.parametrize("kind", ["stock", "ours"])
@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_state_of_every_model_class_is_read_whole(name: str, kind: str, base: Base, tmp_path: Path) -> None:
    """What Flair's classes and ours write, in both protocols and layouts, comes back as plain unpickling reads it."""
    if kind == "stock":
        flair_peft.uninstall()
        word, document = TransformerWordEmbeddings, TransformerDocumentEmbeddings
    else:
        word, document = PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings
    model = ZOO[name].build(
        lambda **kwargs: word(base("bert"), **{"peft_config": lora(), **kwargs}),
        lambda **kwargs: document(base("bert"), **{"peft_config": lora(), **kwargs}),
    )
    state = {**model._get_state_dict(), "model_card": CARD}
    for protocol, is_zip in ((2, True), (4, True), (4, False)):
        path = saved(state, tmp_path / "x.pt", protocol, is_zip=is_zip)
        if kind == "stock" and ZOO[name].loads_in_stock is not True:
            # The embeddings in it are pickled with their tokenizers and layers, and no Flair can unpickle them.
            with pytest.raises(UnsafeFileError):
                unpickle.read_state(path)
            continue
        assert state_tree.has_adapters(state)
        if not is_zip and name == "text-classifier-label-verbalizer":
            # torch reads the tensors of such files last, when embeddings have long copied theirs.
            with pytest.raises(ModelFileError, match="in front of the tensors"):
                unpickle.read_state(path)
            continue
        assert_equal(unpickle.read_state(path), torch.load(path, map_location="cpu", weights_only=False))


CARD = {
    "flair_version": "0.15.1",
    "pytorch_version": torch.__version__,
    "training_parameters": {"optimizer": "torch.optim.adamw.AdamW", "learning_rate": np.float32(0.5), "plugins": []},
}


def test_model_that_was_trained_comes_back_with_its_card(base: Base, tmp_path: Path) -> None:
    """What the trainer writes into the card of a stock model is read, in Flair's own file."""
    entry = ZOO["text-classifier"]
    flair_peft.uninstall()
    model = entry.build(None, lambda **_: TransformerDocumentEmbeddings(base("bert"), peft_config=lora()))
    entry.train(model, entry.corpus(), tmp_path, save_final_model=True)
    path = tmp_path / "final-model.pt"
    found = unpickle.read_state(path)
    assert_equal(found, torch.load(path, map_location="cpu", weights_only=False))
    assert found["model_card"]["training_parameters"]["optimizer"] == "torch.optim.adamw.AdamW"


@pytest.mark.parametrize("protocol", [2, 4])
def test_numbers_of_numpy_and_defaults_are_read(protocol: int, tmp_path: Path) -> None:
    """Loss weights may have been computed with numpy, and counters have defaults."""
    labels = flair.data.Dictionary()
    labels.get_idx_for_items(["a"])
    kinds = (np.float64, np.float32, np.float16, np.int64, np.int8, np.uint8, np.bool_)
    weights = {kind.__name__: kind(1.5) for kind in kinds}
    state = state_of(loss_weights=weights, label_dictionary=labels, empty=b"", some=b"\x00\xff", kinds=[torch.bfloat16])
    found = unpickle.read_state(saved(state, tmp_path / "x.pt", protocol))
    assert_equal(found, state)
    assert found["label_dictionary"].item2idx_not_encoded["unseen"] == 0


def test_objects_of_the_trainer_in_a_card_become_their_names(tmp_path: Path) -> None:
    """No optimiser or sampler is rebuilt to predict; Flair itself stores such classes by name."""
    sampler = flair.samplers.ChunkSampler.__new__(flair.samplers.ChunkSampler)  # its own is broken on today's torch
    sampler.block_size = 5
    card = {"training_parameters": {"optimizer": torch.optim.SGD, "samplers": [sampler, sampler]}}
    found = unpickle.read_state(saved(state_of(model_card=card), tmp_path / "x.pt"))["model_card"]
    parameters = found["training_parameters"]
    assert parameters["optimizer"] == "torch.optim.sgd.SGD"
    assert parameters["samplers"] == ["flair.samplers.ChunkSampler"] * 2
    assert type(parameters["optimizer"]) is type(parameters["samplers"][0]) is str


def test_modules_in_a_file_own_their_memory(base: Base, tmp_path: Path) -> None:
    """A decoder that was pickled whole becomes part of the model, which may be saved over its own file."""
    entry = ZOO["text-classifier-prototypes"]
    model = entry.build(None, lambda **_: PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()))
    path = saved(model._get_state_dict(), tmp_path / "x.pt")
    decoder = unpickle.read_state(path)["decoder"]
    expected = [parameter.clone() for parameter in decoder.parameters()]
    path.write_bytes(b"")
    assert all(map(torch.equal, decoder.parameters(), expected))


@pytest.fixture(scope="module")
def whole(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with adapters, objects and tensors, in protocol 4."""
    entry, path = ZOO["text-classifier-prototypes"], tmp_path_factory.mktemp("whole") / "x.pt"
    model = entry.build(None, lambda **_: PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()))
    return saved({**model._get_state_dict(), "model_card": CARD}, path)


def assert_read_or_refused(path: Path) -> bool:
    """Assert that reading returns a state or raises an error of this package, and return which."""
    try:
        return isinstance(unpickle.read_state(path), dict)
    except FlairPeftError:
        return False


def test_pickle_that_is_cut_off_or_damaged_is_refused(whole: Path, tmp_path: Path) -> None:
    """Three hundred damaged pickles, whose checksums are right, end in a state or in an error of this package."""
    content, chance, outcomes = pickle_in(whole), random.Random(0), Counter()
    for number in range(300):
        damaged = bytearray(content)
        if number % 4 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        for _ in range(chance.choice((1, 1, 2, 8)) if number % 4 else 0):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        outcomes[assert_read_or_refused(zipped(tmp_path / "x.pt", data=bytes(damaged)))] += 1
    assert outcomes[False] > 200


def test_old_file_that_is_cut_off_or_damaged_is_refused(tmp_path: Path) -> None:
    """The same holds for the other layout, whose bytes have no checksums."""
    content = saved(state_of(label_dictionary=flair.data.Dictionary()), tmp_path / "y.pt", is_zip=False).read_bytes()
    chance, path = random.Random(1), tmp_path / "x.pt"
    for number in range(200):
        damaged = bytearray(content)
        if number % 4 == 0:
            damaged = damaged[: chance.randrange(len(damaged))]
        else:
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert_read_or_refused(path)


@pytest.mark.parametrize("member", ["data.pkl", "version", "byteorder", "data/0", "data/1"])
def test_checksum_of_any_member_is_read(member: str, tmp_path: Path) -> None:
    """One flipped bit in any part of the file is an error that names the part, and no other part."""
    path = saved(state_of(), tmp_path / "x.pt")
    checksums.check_sums(path)
    found = next(found for found in scan.stored_members(path) if found.name == f"x/{member}")
    content = bytearray(path.read_bytes())
    content[(found.start + found.stop) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=rf"checksum of 'x/{member}' in it is wrong"):
        checksums.check_sums(path)


def test_checksum_of_a_member_larger_than_the_buffer_is_right(tmp_path: Path) -> None:
    """Sums are taken piece by piece, from several files' worth of tensors at once."""
    state = {f"{KEY}{number}": torch.randn(1000, 301 + number) for number in range(6)}
    path = saved({"state_dict": state}, tmp_path / "x.pt")
    checksums.check_sums(path)
    content = bytearray(path.read_bytes())
    largest = max(scan.stored_members(path), key=lambda member: member.stop - member.start)
    content[largest.stop - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="checksum"):
        checksums.check_sums(path)


def test_old_file_has_no_checksums(tmp_path: Path) -> None:
    """Where torch writes none, there is nothing to be wrong."""
    checksums.check_sums(saved(state_of(), tmp_path / "x.pt", is_zip=False))


ENTRIES: dict[str, Callable[[Path], Any]] = {
    "verify": flair_peft.verify,
    "from_pretrained": flair_peft.from_pretrained,
    "load_legacy": lambda path: flair_peft.load_legacy(path, peft_config=LoraConfig()),
    "convert_legacy": lambda path: flair_peft.convert_legacy(path, path.parent / "new", peft_config=LoraConfig()),
    **{
        " ".join(words): lambda path, words=words: main.main([words[0], str(path), *words[1:]])  # type: ignore[misc]
        for words in (["verify"], ["merge", "new.pt"], ["export", "new.onnx", "new.pt"], ["push", "me/model"])
    },
    "convert": lambda path: main.main(["convert", str(path), "new", "--config", "adapter_config.json"]),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_payload_in_a_file_without_marks_is_refused_where_an_adapter_is_expected(
    entry: str, marker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What makes sense for adapters alone never hands a file on to Flair's own reader."""
    monkeypatch.chdir(tmp_path)
    LoraConfig(r=4).save_pretrained(tmp_path)
    path = saved({"state_dict": {}, "x": Payload(marker)}, tmp_path / "x.pt")
    with contextlib.suppress(UnsafeFileError):
        assert ENTRIES[entry](path) == 2


@pytest.mark.parametrize("load", [flair_peft.load_legacy, flair_peft.from_pretrained])
def test_path_in_a_file_without_marks_is_not_unpickled(
    load: Callable[[Path], Any], base: Base, marker: Path, tmp_path: Path
) -> None:
    """Nor does a state without an adapter name what Flair would unpickle."""
    (tmp_path / "characters").write_bytes(pickle.dumps(Payload(marker)))
    state = ZOO["lemmatizer"].build(lambda **_: TransformerWordEmbeddings(base("bert")), None)._get_state_dict()
    path = saved({**state, "char_dict": str(tmp_path / "characters")}, tmp_path / "x.pt")
    with pytest.raises(UnsafeFileError, match="char_dict"):
        load(path)


def test_trusted_file_may_name_what_it_likes(base: Base, tmp_path: Path) -> None:
    """``trust_pickle=True`` is the user's word for all that is in the file."""
    model = ZOO["lemmatizer"].build(lambda **_: TransformerWordEmbeddings(base("bert")), None)
    model.char_dictionary.save(tmp_path / "characters")
    state = {**model._get_state_dict(), "char_dict": str(tmp_path / "characters")}
    path = saved(state, tmp_path / "x.pt")
    loaded = flair_peft.load_legacy(path, trust_pickle=True)
    assert loaded.char_dictionary.idx2item == model.char_dictionary.idx2item
