"""No code runs from a checkpoint, wherever in it the code stands: the payloads here make a directory that must not be.

Some are pickles, some are modules that could be imported: their folder is on the path for as long as the test runs.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import json
import pickle
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.embeddings import CharacterEmbeddings
from flair.models import TextClassifier
from flair.nn import Classifier, Model
from transformers import AutoModel

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.base import tokenizers
from flair_peft.errors import FlairPeftError, ModelFileError
from flair_peft.models import save_plan
from flair_peft.storage import manifest
from tests.support.configs import lora
from tests.support.files import Payload, resign, write_text
from tests.support.selection import few
from tests.support.zoo import ZOO

# Of settings that contradict each other: PEFT warns, and goes on.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ENTRY = ZOO["text-classifier"]
DOCUMENT = "flair_peft.json"
Base = Callable[[str], str]


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """Return the directory that a payload makes; it is not there when the test is over."""
    yield tmp_path / "executed"
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def saved(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a good checkpoint."""
    place = tmp_path_factory.mktemp("saved") / "model"
    flair_peft.save_pretrained(build(base), place)
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """Return a copy of the good checkpoint."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def evil(place: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return the name of a module, in the checkpoint and on the path, that makes the marker when it is imported."""
    source = f"import os\nos.mkdir({str(marker)!r})\nclass Evil:\n    def __init__(self, *args, **kwargs): pass\n"
    for folder in (place, place / "tokenizer"):
        (folder / "evil_payload.py").write_text(source)
    monkeypatch.syspath_prepend(place)
    monkeypatch.chdir(place)
    yield "evil_payload"
    sys.modules.pop("evil_payload", None)


def build(base: Base) -> Model:
    torch.manual_seed(5)
    make = PeftTransformerDocumentEmbeddings
    return ENTRY.build(None, lambda **kwargs: make(base("bert"), peft_config=lora(), **kwargs))


def attempt(path: Path, **options: Any) -> list[bool]:
    """Return whether each way of loading gives a model; all others raise an error of this package."""
    loaded = []
    loads = [Model.load, Classifier.load, TextClassifier.load, *([flair_peft.from_pretrained] if path.is_dir() else [])]
    for load in loads:
        for verify in (True, False):
            try:
                loaded.append(isinstance(load(path, verify=verify, **options), TextClassifier))
            except FlairPeftError:
                loaded.append(False)
    return loaded


def list_file(place: Path, name: str, content: bytes) -> None:
    """Put a file into a checkpoint as if it had been saved with it."""
    (place / name).parent.mkdir(parents=True, exist_ok=True)
    (place / name).write_bytes(content)
    entry = manifest.entry_of(content)
    resign(place, lambda document: document["files"].update({name: {"bytes": entry.bytes, "sha256": entry.sha256}}))


def embeddings_in(document: dict[str, Any]) -> dict[str, Any]:
    return document["model"]["document_embeddings"]


def record_in(document: dict[str, Any]) -> dict[str, Any]:
    return embeddings_in(document)["stored_base"]["record"]


# The payloads work


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickled_payload_runs_when_it_is_unpickled(protocol: int, tmp_path: Path) -> None:
    """Otherwise nothing here could fail."""
    torch.save(Payload(tmp_path / "zip"), tmp_path / "x.bin", pickle_protocol=protocol)
    torch.load(tmp_path / "x.bin", weights_only=False)
    pickle.loads(pickle.dumps(Payload(tmp_path / "plain"), protocol))
    assert (tmp_path / "zip").exists()
    assert (tmp_path / "plain").exists()


def test_module_payload_runs_when_it_is_imported(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module beside the checkpoint is found by its name."""
    (place / "evil_twin.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    monkeypatch.syspath_prepend(place)
    importlib.import_module("evil_twin")
    sys.modules.pop("evil_twin")
    assert (tmp_path / "ran").exists()


def test_remote_code_payload_runs_in_transformers_that_trust_it(base: Base, tmp_path: Path) -> None:
    """The code of a base model is found and run by transformers if it is told to."""
    directory = evil_base(base, tmp_path, tmp_path / "ran")
    with pytest.raises(Exception, match=r"."):
        AutoModel.from_pretrained(directory, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


def test_good_checkpoint_loads_every_way(place: Path) -> None:
    """The attempts below would load what they should."""
    assert all(attempt(place))


# Pickles in a directory


STRANGERS = (
    *(
        "pytorch_model.bin",
        "adapter_model.bin",
        "adapter_model.pt",
        "training_args.bin",
        "optimizer.pt",
        "scheduler.pt",
    ),
    *(
        "best-model.pt",
        "final-model.pt",
        "head.pt",
        "head.bin",
        "base.bin",
        "flair_peft.pkl",
        "model.pkl",
        "rng_state.pth",
    ),
    *(
        "tokenizer/tokenizer.pkl",
        "tokenizer/vocab.pkl",
        "tokenizer/pytorch_model.bin",
        "embeddings-1/adapter_model.bin",
    ),
)


@pytest.mark.parametrize("is_listed", few([False, True], [False]), ids=["beside", "listed"])
@pytest.mark.parametrize("name", STRANGERS)
def test_pickle_among_the_files_is_not_read(name: str, is_listed: bool, place: Path, marker: Path) -> None:
    """What PEFT or transformers would unpickle, by its name, is nothing here, even if the manifest lists it."""
    content = pickle.dumps(Payload(marker))
    if is_listed:
        list_file(place, name, content)
    else:
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(content)
    assert is_listed or all(attempt(place))
    attempt(place)


def _files(place: Path) -> list[str]:
    return sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "plain"])
def test_pickle_by_the_name_of_any_file_is_refused(is_zip: bool, saved: Path, place: Path, marker: Path) -> None:
    """Each file in turn is a pickle under a right hash."""
    content = pickle.dumps(Payload(marker))
    if is_zip:
        torch.save(Payload(marker), place / "x")
        content = (place / "x").read_bytes()
    for name in _files(saved):
        shutil.rmtree(place)
        shutil.copytree(saved, place)
        (place / name).write_bytes(content)
        if name != DOCUMENT:
            resign(place)
        loaded = attempt(place)
        # Fast tokenizers read neither of these two.
        unread = ("README.md", "tokenizer/added_tokens.json", "tokenizer/special_tokens_map.json")
        assert not any(loaded) or name in unread, name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "head.safetensors"])
def test_tensors_left_out_for_a_pickle_are_missed(name: str, place: Path, marker: Path) -> None:
    """Without its safetensors, a checkpoint is not looked for in the .bin beside."""
    torch.save(Payload(marker), place / name.replace(".safetensors", ".bin"))
    (place / name).unlink()
    resign(place, lambda document: document["files"].pop(name))
    assert not any(attempt(place))


# Names of code in the settings


def _set(path: str, value: Any) -> Callable[[Path], None]:
    """Return what sets a value in a JSON file: "file:name/name"."""

    def change(place: Path) -> None:
        file, _, names = path.partition(":")
        *parents, last = names.split("/")

        def set_in(document: dict[str, Any]) -> None:
            for parent in parents:
                document = document[parent]
            document[last] = value

        if file == DOCUMENT:
            resign(place, set_in)
            return
        document = json.loads((place / file).read_text())
        set_in(document)
        list_file(place, file, json.dumps(document).encode())

    return change


TOKENIZER, ADAPTER = "tokenizer/tokenizer_config.json", "adapter_config.json"
EMBEDDINGS = f"{DOCUMENT}:model/document_embeddings"
AUTO_MAP = {
    "AutoConfig": "evil_payload.Evil",
    "AutoModel": "evil_payload.Evil",
    "AutoTokenizer": ["evil_payload.Evil"] * 2,
}
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}{% import 'evil_payload' as x %}{{ raise_exception('x') }}"

SETTINGS: dict[str, Callable[[Path], None]] = {
    "tokenizer: auto_map": _set(f"{TOKENIZER}:auto_map", AUTO_MAP),
    "tokenizer: class": _set(f"{TOKENIZER}:tokenizer_class", "evil_payload.Evil"),
    "tokenizer: another class": _set(f"{TOKENIZER}:tokenizer_class", "Evil"),
    "tokenizer: trust": _set(f"{TOKENIZER}:trust_remote_code", True),
    "tokenizer: template": _set(f"{TOKENIZER}:chat_template", TEMPLATE),
    "tokenizer: fast class": _set(f"{TOKENIZER}:fast_tokenizer_class", "evil_payload.Evil"),
    "tokenizer: processor": _set(f"{TOKENIZER}:processor_class", "evil_payload.Evil"),
    "tokenizer: files": _set(f"{TOKENIZER}:tokenizer_file", "evil_payload.py"),
    "adapter: mapping": _set(f"{ADAPTER}:auto_mapping", {"base_model_class": "Evil", "parent_library": "evil_payload"}),
    "adapter: custom modules": _set(f"{ADAPTER}:_custom_modules", {"evil_payload": "Evil"}),
    "adapter: runtime": _set(f"{ADAPTER}:runtime_config", {"evil_payload": "Evil"}),
    "adapter: loftq": _set(f"{ADAPTER}:loftq_config", {"evil_payload": "Evil"}),
    "adapter: initialisation": _set(f"{ADAPTER}:init_lora_weights", "evil_payload.Evil"),
    "adapter: method": _set(f"{ADAPTER}:peft_type", "evil_payload.Evil"),
    "adapter: base": _set(f"{ADAPTER}:base_model_name_or_path", "evil_payload"),
    "shape: auto_map": _set(f"{EMBEDDINGS}/config_state_dict/auto_map", AUTO_MAP),
    "shape: model type": _set(f"{EMBEDDINGS}/config_state_dict/model_type", "evil_payload"),
    "shape: attention": _set(f"{EMBEDDINGS}/config_state_dict/attn_implementation", "evil/payload"),
    "shape: inner attention": _set(f"{EMBEDDINGS}/config_state_dict/_attn_implementation", "evil/payload:x"),
    "shape: activation": _set(f"{EMBEDDINGS}/config_state_dict/hidden_act", "evil_payload.Evil"),
    "shape: architecture": _set(f"{EMBEDDINGS}/config_state_dict/architectures", ["evil_payload.Evil"]),
    "shape: quantisation": _set(
        f"{EMBEDDINGS}/config_state_dict/quantization_config", {"quant_method": "evil_payload"}
    ),
    "embeddings: class": _set(f"{EMBEDDINGS}/__cls__", "evil_payload.Evil"),
    "embeddings: model": _set(f"{EMBEDDINGS}/model", "evil_payload"),
    "embeddings: saved config": _set(f"{EMBEDDINGS}/saved_config", {"auto_map": AUTO_MAP}),
    "embeddings: kwargs": _set(f"{EMBEDDINGS}/transformers_model_kwargs", {"trust_remote_code": True}),
    "embeddings: tokenizer": _set(
        f"{EMBEDDINGS}/transformers_tokenizer_kwargs", {"tokenizer_type": "evil_payload", "auto_map": AUTO_MAP}
    ),
    "embeddings: dtype": _set(f"{EMBEDDINGS}/dtype", "evil_payload.Evil"),
    "base: needs code": _set(f"{EMBEDDINGS}/stored_base/record/needs_remote_code", True),
    "base: quantisation": _set(f"{EMBEDDINGS}/stored_base/record/quantization", {"quant_method": "evil_payload"}),
    "model: class": _set(f"{DOCUMENT}:model/__cls__", "evil_payload.Evil"),
    "model: type": _set(f"{DOCUMENT}:model/label_dictionary", {"$type": "evil_payload.Evil", "items": ["x"]}),
    "model: decoder": _set(f"{DOCUMENT}:model/decoder", {"$type": "evil_payload.Evil"}),
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.usefixtures("evil")
def test_module_named_in_the_settings_is_not_imported(name: str, place: Path) -> None:
    """Neither a class of ours nor of PEFT's and transformers' is looked for where a file says."""
    SETTINGS[name](place)
    attempt(place)
    assert "evil_payload" not in sys.modules


CLASSES: list[Any] = [
    *("os.system", "subprocess.Popen", "builtins.eval", "evil_payload.Evil", "flair.nn.model.Model", "torch.load", ""),
    *("flair.models.TextClassifier.__init__.__globals__", "TextClassifier", None, 1, True, ["os.system"], {"x": 1}, []),
]


@pytest.mark.parametrize("name", CLASSES, ids=repr)
@pytest.mark.usefixtures("evil")
def test_class_that_is_no_imported_model_is_refused(name: Any, place: Path) -> None:
    """A checkpoint chooses among the model classes that there are, and imports none."""
    resign(place, lambda document: document.update({"class": name}))
    assert not any(attempt(place))
    assert "evil_payload" not in sys.modules


def _dictionaries(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _dictionaries(inner)


def evil_base(base: Base, folder: Path, marker: Path) -> Path:
    """Return a base model whose config names code of its own, which makes the marker."""
    directory = Path(shutil.copytree(base("bert"), folder / "evil base"))
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "remote_evil.Evil", "AutoModel": "remote_evil.Evil"}
    (directory / "config.json").write_text(json.dumps({**config, "model_type": "remote-evil"}))
    (directory / "remote_evil.py").write_text(f"import os\nos.mkdir({str(marker)!r})\nclass Evil: pass\n")
    return directory


def test_trust_anywhere_in_a_checkpoint_runs_nothing(
    saved: Path, place: Path, base: Base, marker: Path, tmp_path: Path
) -> None:
    """Whichever dictionary of the document says so, the code of the base model does not run."""
    directory = evil_base(base, tmp_path, marker)
    count = sum(1 for _ in _dictionaries(json.loads((saved / DOCUMENT).read_text())))
    assert count > 15
    for index in range(count):
        shutil.copy(saved / DOCUMENT, place / DOCUMENT)

        def trust(document: dict[str, Any], index: int = index) -> None:
            record_in(document)["name"] = str(directory)
            embeddings_in(document)["model"] = str(directory)
            list(_dictionaries(document))[index]["trust_remote_code"] = True

        resign(place, trust)
        for verify in (True, False):
            with contextlib.suppress(FlairPeftError):  # its weights are good ones, and its code is not needed
                flair_peft.from_pretrained(place, verify=verify)


# Base models


def _pickled_base(base: Base, folder: Path, marker: Path, name: str) -> Path:
    directory = Path(shutil.copytree(base("bert"), folder / "pickled base"))
    (directory / "model.safetensors").unlink()
    if name.endswith("index.json"):
        index = {"metadata": {"total_size": 1}, "weight_map": {"embeddings.word_embeddings.weight": "x.bin"}}
        (directory / name).write_text(json.dumps(index))
        name = "x.bin"
    torch.save({"embeddings.word_embeddings.weight": Payload(marker)}, directory / name)
    return directory


@pytest.mark.parametrize(
    "name",
    [
        *(
            "pytorch_model.bin",
            "pytorch_model.bin.index.json",
            "tf_model.h5",
            "flax_model.msgpack",
            "model.safetensors",
        ),
        *("model.gguf", "model.ckpt.index", "adapter_model.bin"),
    ],
)
@pytest.mark.parametrize("how", ["absolute", "beside", "asked for"])
def test_base_that_is_a_pickle_runs_nothing(
    name: str, how: str, place: Path, base: Base, marker: Path, tmp_path: Path
) -> None:
    """A checkpoint may name any directory as its base; what is pickled there is refused."""
    directory = _pickled_base(base, place if how == "beside" else tmp_path, marker, name)
    if how != "asked for":
        resign(
            place,
            lambda document: record_in(document).update(name=str(directory) if how == "absolute" else directory.name),
        )
    options = {"base_model": str(directory)} if how == "asked for" else {}
    assert not any(attempt(place, **options))


ARGUMENTS: dict[str, Any] = {
    "gguf_file": "x.gguf",
    "weights_only": False,
    "trust_remote_code": True,
    "state_dict": {},
    "from_tf": True,
    "quantization_config": {"quant_method": "evil"},
    "device_map": "auto",
    "adapter_kwargs": {"x": 1},
    "code_revision": "x",
    "attn_implementation": "evil/payload",
    "token": "x",
    "cache_dir": "/tmp",
    "mirror": "x",
    "subfolder": {"x": 1},
    "variant": 3,
    "use_safetensors": [False],
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_argument_that_no_file_holds_is_refused(
    name: str, place: Path, base: Base, marker: Path, tmp_path: Path
) -> None:
    """Of what from_pretrained takes, files name three arguments and no others."""
    directory = _pickled_base(base, tmp_path, marker, "pytorch_model.bin")

    def change(document: dict[str, Any]) -> None:
        record_in(document).update(name=str(directory), arguments={name: ARGUMENTS[name]})

    resign(place, change)
    assert not any(attempt(place))


@pytest.mark.parametrize(
    "arguments",
    [{"use_safetensors": False}, {"subfolder": "../pickled base"}, {"variant": "../../x"}, {"subfolder": "/"}],
    ids=repr,
)
def test_argument_that_files_hold_reaches_no_pickle(
    arguments: dict[str, Any], place: Path, base: Base, marker: Path, tmp_path: Path
) -> None:
    """The three that they do name cannot make transformers unpickle either."""
    directory = _pickled_base(base, tmp_path, marker, "pytorch_model.bin")
    resign(place, lambda document: record_in(document).update(name=str(directory), arguments=arguments))
    assert not any(attempt(place))


# Other embeddings beside the transformer's


def _pickled_vectors(place: Path, marker: Path) -> str:
    (place / "vectors.gensim").write_bytes(pickle.dumps(Payload(marker)))
    return str(place / "vectors.gensim")


def test_dictionary_that_is_a_pickle_runs_in_stock_flair(place: Path, tmp_path: Path) -> None:
    """Flair unpickles the dictionary of character embeddings from any path that parameters name: a real way in."""
    with pytest.raises(TypeError):
        CharacterEmbeddings(_pickled_vectors(place, tmp_path / "ran"))
    assert (tmp_path / "ran").exists()


STOCK_EMBEDDINGS: dict[str, Callable[[str], dict[str, Any]]] = {
    "WordEmbeddings": lambda path: {"embeddings": path},
    "WordEmbeddings with a name": lambda path: {"embeddings": path, "name": "x"},
    "FastTextEmbeddings": lambda path: {"embeddings": path},
    "BytePairEmbeddings": lambda path: {"model_file_path": path, "embedding_file_path": path, "name": "x", "dim": 50},
    "MuseCrosslingualEmbeddings": lambda path: {},
    "NILCEmbeddings": lambda path: {"embeddings": path},
    "FlairEmbeddings": lambda path: {"model": path},
    "OneHotEmbeddings": lambda path: {"vocab_dictionary": path},
    "CharacterEmbeddings": lambda path: {"path_to_char_dict": path},
    "SentenceTransformerDocumentEmbeddings": lambda path: {"model": path},
    "TransformerWordEmbeddings": lambda path: {"model": str(Path(path).parent)},
    "TransformerDocumentEmbeddings": lambda path: {"model": str(Path(path).parent)},
    "TransformerJitWordEmbeddings": lambda path: {"jit_model": path},
    "DocumentTFIDFEmbeddings": lambda path: {"vectorizer": path},
    "ELMoEmbeddings": lambda path: {"model": path},
}


@pytest.mark.parametrize("name", STOCK_EMBEDDINGS)
@pytest.mark.parametrize("position", ["instead", "stacked", "nested"])
def test_embeddings_of_flair_that_unpickle_run_nothing(name: str, position: str, place: Path, marker: Path) -> None:
    """A checkpoint cannot have Flair load vectors, language models or transformers from a file that it names."""
    path = _pickled_vectors(place, marker)
    (place / "pytorch_model.bin").write_bytes(Path(path).read_bytes())
    evil = {"__cls__": name.partition(" ")[0], **STOCK_EMBEDDINGS[name](path)}

    def change(document: dict[str, Any]) -> None:
        ours = copy.deepcopy(embeddings_in(document))
        stacks = {
            "instead": evil,
            "stacked": {"__cls__": "StackedEmbeddings", "embeddings": [ours, evil]},
            "nested": {
                "__cls__": "DocumentPoolEmbeddings",
                "embeddings": {"__cls__": "StackedEmbeddings", "embeddings": [evil, ours]},
            },
        }
        document["model"]["document_embeddings"] = stacks[position]

    resign(place, change)
    attempt(place)


@pytest.mark.parametrize("name", STOCK_EMBEDDINGS)
def test_embeddings_of_flair_in_a_file_run_nothing(
    name: str, place: Path, base: Base, marker: Path, tmp_path: Path
) -> None:
    """The same holds for files of stock Flair with adapters: their pickle is harmless, what it says may not be."""
    state = build(base)._get_state_dict()
    evil = {"__cls__": name.partition(" ")[0], **STOCK_EMBEDDINGS[name](_pickled_vectors(place, marker))}
    stacked = [state["document_embeddings"], evil]
    torch.save(
        {**state, "document_embeddings": {"__cls__": "StackedEmbeddings", "embeddings": stacked}},
        tmp_path / "x.pt",
    )
    attempt(tmp_path / "x.pt")


# Where the Hub's cache keeps files


def test_checkpoint_of_links_loads_and_a_link_to_a_pickle_is_refused(place: Path, marker: Path, tmp_path: Path) -> None:
    """Snapshots are links to blobs, which are named by their hashes; their content is checked all the same."""
    blobs = tmp_path / "models--x--y" / "blobs"
    blobs.mkdir(parents=True)
    for number, name in enumerate(_files(place)):
        (place / name).rename(blobs / str(number))
        (place / name).symlink_to(blobs / str(number))
    assert all(attempt(place))
    for name in ("head.safetensors", "adapter_config.json", "tokenizer/tokenizer.json"):
        target = (place / name).resolve()
        before = target.read_bytes()
        target.write_bytes(pickle.dumps(Payload(marker)))
        assert not any(attempt(place))
        resign(place)
        assert not any(attempt(place))
        target.write_bytes(before)
        resign(place)
    assert all(attempt(place))


# Files


TYPES = (
    *(
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "evil_payload.Evil",
        "object",
        "__reduce__",
        "type",
        "function",
    ),
    *("pickle", "module", "partial", "torch.load", "codec.restore_state", "Sentence", "storage", "", "$type"),
)


@pytest.fixture
def text_and_tensors(base: Base) -> tuple[str, dict[str, torch.Tensor]]:
    """Return what a file of a good model holds."""
    description = save_plan.encode(save_plan.plan_save(build(base)))
    return json.dumps(description.document), {n: t.clone() for n, t in description.tensors.items()}


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.usefixtures("evil")
def test_type_named_in_the_text_of_a_file_is_refused(
    name: str, text_and_tensors: tuple[str, dict[str, torch.Tensor]], marker: Path, tmp_path: Path
) -> None:
    """The text chooses among the types of the format; with any arguments, no other name means anything."""
    text, tensors = text_and_tensors
    path = tmp_path / "x.pt"
    write_text(text, tensors, path)
    assert all(attempt(path))
    for fields in ({}, {"value": f"mkdir {marker}"}, {"items": [f"mkdir {marker}"]}, {"args": [str(marker)]}):
        document = json.loads(text)
        document["extra"] = {"$type": name, **fields}
        write_text(json.dumps(document), tensors, path)
        assert not any(attempt(path))
    document = json.loads(text)
    document["document_embeddings"]["__cls__"] = document["__cls__"] = name
    write_text(json.dumps(document), tensors, path)
    attempt(path)
    assert "evil_payload" not in sys.modules


def test_payload_beside_the_text_of_a_file_is_refused(
    text_and_tensors: tuple[str, dict[str, torch.Tensor]], marker: Path, tmp_path: Path
) -> None:
    """Instead of the text, of a tensor, of a name or of the dictionary, a pickled object runs nothing."""
    text, tensors = text_and_tensors
    path, payload = tmp_path / "x.pt", Payload(marker)
    for arguments in ((payload, tensors), (text, {**tensors, "x": payload}), ([payload, text], tensors)):
        write_text(*arguments, path)  # type: ignore[arg-type]
        assert not any(attempt(path))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "evil_payload.py", "../escaped", "/tmp/flair_peft_escaped"])
@pytest.mark.usefixtures("evil")
def test_tokenizer_archive_of_a_file_runs_and_writes_nothing(
    name: str, text_and_tensors: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """Files hold tokenizers as archives: no member of one leaves its folder, and none is code."""
    text, tensors = text_and_tensors
    stored = json.loads(text)["document_embeddings"]["tokenizer_data"]["tensor"]
    content = io.BytesIO(tensors[stored].numpy().tobytes())
    with zipfile.ZipFile(content) as archive:
        members = {member: archive.read(member) for member in archive.namelist()}
    settings = {**json.loads(members["tokenizer_config.json"]), "auto_map": AUTO_MAP, "trust_remote_code": True}
    members["tokenizer_config.json"] = json.dumps(settings).encode()
    members.setdefault(name, (tmp_path / "model" / "evil_payload.py").read_bytes())
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    changed = torch.frombuffer(bytearray(packed.getvalue()), dtype=torch.uint8)
    write_text(text, {**tensors, stored: changed}, tmp_path / "x.pt")
    attempt(tmp_path / "x.pt")
    assert not Path("/tmp/flair_peft_escaped").exists()
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("settings", [{}, {"tokenizer_class": None}, {"tokenizer_class": 3}, []], ids=str)
def test_tokenizer_that_names_no_class_is_not_guessed_from_a_directory_name(settings: Any) -> None:
    """transformers looks for the names of architectures in that of the directory, which is a random one here."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("tokenizer_config.json", json.dumps(settings))
    with pytest.raises(ModelFileError, match="tokenizer_class"):
        tokenizers.unpack_tokenizer(packed, {})
