"""What a file says of its model is what the live model says, and nothing of the file is loaded or run."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from flair.data import Dictionary
from flair.embeddings import OneHotEmbeddings, StackedEmbeddings
from flair.nn import Model
from peft import IA3Config, get_peft_model
from transformers import AutoModel

import flair_peft
from flair_peft import PeftTransformerWordEmbeddings
from flair_peft.adapter import keys
from flair_peft.errors import ModelFileError
from flair_peft.inspection import report
from flair_peft.inspection.report import Inspection, inspect
from tests.support import classic, sparse
from tests.support.configs import lora
from tests.support.files import Payload, save_as, save_stock
from tests.support.models import CLASSIFIER, make
from tests.support.zoo import ZOO

Base = Callable[[str], str]
SCORES = {"test_score": 0.75, "loss": 1.5}


KINDS = ("directory", "file", "whole-directory", "whole-file")
MODEL_NAMES = ("text-classifier", "sequence-tagger", "multitask")


@pytest.fixture(scope="module")
def saved(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Model, Path]]:
    """Return a function from a model's name and a kind to the live model and its file."""
    made: dict[tuple[str, str], tuple[Model, Path]] = {}
    config = lora(bias="lora_only", rank_pattern={"layer.1.attention.self.query": 2}, use_rslora=True)

    def find(name: str, kind: str) -> tuple[Model, Path]:
        if (name, kind) not in made:
            model = make(ZOO[name], base("bert"), config)
            model.model_card = {"scores": SCORES, "flair_version": "0"}
            made[name, kind] = model, save_as(kind, model, tmp_path_factory.mktemp("saved"))
        return made[name, kind]

    return find


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_inspection_of_a_model_says_what_the_live_model_says(
    name: str, kind: str, base: Base, saved: Callable[[str, str], tuple[Model, Path]]
) -> None:
    """Method, ranks, alpha, targets, base, labels, versions and scores are the model's own, in any kind of file."""
    model, path = saved(name, kind)
    found = inspect(path)
    (adapter,) = found.adapters
    embeddings = next(m for m in model.modules() if isinstance(m, flair_peft.PeftTransformerEmbeddings))
    config = embeddings.adapter_config
    assert found.kind == ("checkpoint" if "directory" in kind else "file")
    assert found.flair_class == type(model).__name__
    assert (adapter.method, adapter.alpha, adapter.has_config) == ("LORA", config.lora_alpha, True)
    assert adapter.settings["rank_pattern"] == config.rank_pattern
    assert adapter.settings["target_modules"] == sorted(config.target_modules)
    assert adapter.embeddings == type(embeddings).__name__
    own = embeddings.model.state_dict()
    assert adapter.ranks == tuple(sorted({len(tensor) for key, tensor in own.items() if "lora_A" in key})) == (2, 4)
    assert adapter.modules == {"query": 2, "value": 2}
    assert adapter.base["name"] == base("bert")
    assert adapter.base["dtype"] == "float32"
    assert found.scores == SCORES
    assert found.versions["flair_peft"] == flair_peft.__version__
    tasks = getattr(model, "tasks", {"": model})
    states = (task._get_state_dict() for task in tasks.values())
    stored = [tuple(value.get_items()) for state in states for value in state.values() if isinstance(value, Dictionary)]
    assert [labels.items for labels in found.labels.values()] == stored
    notes = " ".join(found.notes)
    assert "bias='lora_only'" in notes
    assert "rsLoRA" in notes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODEL_NAMES)
def test_inspection_of_a_model_adds_up_the_live_tensors(
    name: str, kind: str, saved: Callable[[str, str], tuple[Model, Path]]
) -> None:
    """Bytes of adapter, head and base are those of the live model's tensors, and all parts together are the files."""
    model, path = saved(name, kind)
    found = inspect(path)
    embeddings = next(m for m in model.modules() if isinstance(m, flair_peft.PeftTransformerEmbeddings))
    inside = {id(tensor) for tensor in embeddings.state_dict(keep_vars=True).values()}
    head = {id(t): t for t in model.state_dict(keep_vars=True).values() if id(t) not in inside}
    own = embeddings.model.state_dict()
    added = sum(tensor.nbytes for key, tensor in own.items() if keys.base_key(key) is None)
    biases = sum(p.nbytes for n, p in embeddings.model.named_parameters() if p.requires_grad and n.endswith("bias"))
    assert found.sizes["head"] == sum(tensor.nbytes for tensor in head.values())
    if kind.startswith("whole"):
        assert found.sizes["adapter"] == added
        assert found.sizes["base"] == sum(tensor.nbytes for tensor in own.values()) - added
        assert not found.missing
    else:
        assert found.sizes["adapter"] == added + biases
        assert found.sizes["base"] == 0
        assert len(found.missing) == 1
        assert "base's weights" in found.missing[0]
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    total = sum(file.stat().st_size for file in files)
    assert found.sizes["total"] == total == sum(found.sizes[part] for part in report.PARTS)
    assert found.sizes["tokenizer"] > 5_000


def tensors_of_live(model: Model) -> dict[str, torch.Tensor]:
    return {f"state_dict/{name}": tensor for name, tensor in model.state_dict().items()}


def test_inspection_of_a_stock_file_names_the_config_that_is_lost(base: Base, tmp_path: Path) -> None:
    """The tensors are those of the live model, and the config is what they imply, with what they cannot say open."""
    flair_peft.uninstall()
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    found = inspect(save_stock(model, tmp_path / "x.pt"))
    (adapter,) = found.adapters
    live = tensors_of_live(model)
    assert {name: tensor.shape for name, tensor in found.contents.tensors.items()} == {
        name: tuple(tensor.shape) for name, tensor in live.items()
    }
    for name, tensor in found.contents.tensors.items():
        assert torch.equal(tensor.read(), live[name])
    assert (found.kind, found.flair_class, adapter.has_config) == ("stock", "TextClassifier", False)
    assert (adapter.method, adapter.alpha, adapter.ranks, adapter.names) == ("LORA", None, (4,), ("default",))
    assert adapter.open == ("lora_alpha", "use_rslora", "lora_dropout", "alpha_pattern")
    assert adapter.suggestion == "LoraConfig(r=4, lora_alpha=…, target_modules=['query', 'value'])"
    assert adapter.base["name"] == base("bert")
    assert found.sizes["base"] > 10 * found.sizes["adapter"]
    assert found.labels["label_dictionary"].items == tuple(model.label_dictionary.get_items())
    assert "the tensors cannot tell lora_alpha, use_rslora, lora_dropout" in found.missing[0]


def test_inspection_of_an_old_style_file_says_the_same(base: Base, tmp_path: Path) -> None:
    """torch's former format holds the same model."""
    flair_peft.uninstall()
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    path = save_stock(model, tmp_path / "x.pt")
    new = inspect(path).to_dict()
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    old = inspect(path).to_dict()
    for name in new.keys() - {"bytes"}:
        assert old[name] == new[name]
    parts = ("adapter", "head", "base", "tokenizer")
    assert [old["bytes"][part] for part in parts] == [new["bytes"][part] for part in parts]


def test_inspection_of_a_stock_file_without_an_adapter_names_its_transformer(base: Base, tmp_path: Path) -> None:
    """Any model of Flair can be looked into."""
    model = make(CLASSIFIER, base("bert"), None, is_stock=True)
    found = inspect(save_stock(model, tmp_path / "x.pt"))
    assert found.adapters == ()
    assert found.notes == ()
    assert [transformer.base["name"] for transformer in found.transformers] == [base("bert")]
    transformer = sum(tensor.nbytes for tensor in model.embeddings.model.state_dict().values())
    assert found.sizes["base"] == transformer


def test_inspection_of_classic_embeddings_names_each_and_tells_them_from_the_head(tmp_path: Path) -> None:
    """Also where they stand in others."""
    words = OneHotEmbeddings(classic.dictionary("a", "b"), embedding_length=3)
    model = classic.tagger(StackedEmbeddings([words, classic.characters()]), use_rnn=True, hidden_size=4)
    found = inspect(save_stock(model, tmp_path / "x.pt"))
    assert [(each.embeddings, each.place) for each in found.others] == [
        ("StackedEmbeddings", "embeddings"),
        ("OneHotEmbeddings", "embeddings.embeddings.0"),
        ("FlairEmbeddings", "embeddings.embeddings.1"),
    ]
    embedded = sum(tensor.nbytes for tensor in model.embeddings.state_dict().values())
    whole = sum(tensor.nbytes for tensor in model.state_dict().values())
    assert (found.sizes["embeddings"], found.sizes["head"]) == (embedded, whole - embedded)


def test_inspection_of_stock_tasks_finds_an_adapter_for_each(base: Base, tmp_path: Path) -> None:
    """Flair stores shared embeddings once for each task."""
    flair_peft.uninstall()
    model = make(ZOO["multitask"], base("bert"), lora(), is_stock=True)
    flair_peft.install()
    found = inspect(save_stock(model, tmp_path / "x.pt"))
    assert [adapter.place.split(".")[1] for adapter in found.adapters] == list(model.tasks)
    assert len({adapter.prefixes for adapter in found.adapters}) == 2
    assert found.sizes["base"] == sum(
        tensor.nbytes
        for key, tensor in next(iter(model.tasks.values())).embeddings.model.state_dict().items()
        if keys.base_key(key) is not None
    )


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_inspection_of_an_adapter_of_peft_says_what_it_is(safe: bool, base: Base, tmp_path: Path) -> None:
    """PEFT's own directories name method, rank and base, in both formats of weights."""
    config = lora(use_dora=True, modules_to_save=["pooler"])
    get_peft_model(AutoModel.from_pretrained(base("bert")), config).save_pretrained(tmp_path, safe_serialization=safe)
    found = inspect(tmp_path)
    (adapter,) = found.adapters
    assert (found.kind, found.flair_class) == ("adapter", None)
    assert (adapter.method, adapter.ranks, adapter.alpha) == ("LORA", (4,), 12)
    assert adapter.base["name"] == base("bert")
    assert "base's weights" in found.missing[0]
    notes = " ".join(found.notes)
    assert "DoRA" in notes
    assert "pooler" in notes


def test_inspection_of_an_adapter_without_weights_says_so(base: Base, tmp_path: Path) -> None:
    """A directory that lacks its largest file is not read as whole."""
    get_peft_model(AutoModel.from_pretrained(base("bert")), lora()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "'adapter_model.safetensors' is missing" in inspect(tmp_path).missing[0]


def test_inspection_of_another_method_names_it(base: Base, tmp_path: Path) -> None:
    """Methods without a rank have none here."""
    config = IA3Config(target_modules=["key", "dense"], feedforward_modules=["dense"], init_ia3_weights=False)
    (adapter,) = inspect(save_as("file", make(CLASSIFIER, base("bert"), config), tmp_path)).adapters
    assert (adapter.method, adapter.ranks, adapter.alpha) == ("IA3", (), None)
    assert adapter.modules.keys() == {"dense", "key"}


def test_inspection_of_a_stack_finds_each_adapter(base: Base, tmp_path: Path) -> None:
    """Each of several adapters stands with its own base and its own rank."""
    from flair.embeddings import StackedEmbeddings

    ranks = iter((2, 5))
    name = MODEL_NAMES[1]
    torch.manual_seed(0)

    def words(**options: Any) -> Any:
        made = [
            PeftTransformerWordEmbeddings(base(kind), peft_config=lora(r=next(ranks)), **options)
            for kind in ("bert", "roberta")
        ]
        return StackedEmbeddings(made)

    model = ZOO[name].build(words, words)
    for path in (save_as("directory", model, tmp_path), save_as("file", model, tmp_path)):
        first, second = inspect(path).adapters
        assert (first.ranks, first.base["name"]) == ((2,), base("bert"))
        assert (second.ranks, second.base["name"]) == ((5,), base("roberta"))


def test_inspection_in_half_precision_names_the_dtypes(base: Base, tmp_path: Path) -> None:
    """Base and head are told apart by their dtypes."""
    model = make(CLASSIFIER, base("bert"), lora(), dtype="bfloat16")
    found = inspect(save_as("whole-file", model, tmp_path))
    assert found.adapters[0].base["dtype"] == "bfloat16"
    assert found.dtypes["base"].keys() == {"bfloat16"}
    assert found.dtypes["head"].keys() == {"float32"}


def test_inspection_as_json_has_stable_keys(saved: Callable[[str, str], tuple[Model, Path]]) -> None:
    """Scripts can rely on the names, whatever the kind."""
    for kind in KINDS:
        text = json.dumps(inspect(saved("text-classifier", kind)[1]).to_dict(), allow_nan=False)
        found = json.loads(text)
        assert list(found) == [
            *("format", "path", "kind", "class", "bytes", "adapters", "labels", "dtypes", "tensors", "versions"),
            *("scores", "missing", "notes", "transformers", "other_embeddings"),
        ]
        assert list(found["bytes"]) == [*report.PARTS, "total"]
        assert found["adapters"][0].keys() == {
            *("place", "embeddings", "method", "settings", "has_config", "open", "suggestion", "ranks", "modules"),
            *("names", "base", "alpha"),
        }


def copied(path: Path, folder: Path) -> Path:
    shutil.copytree(path, folder / "copy")
    return folder / "copy"


def test_inspection_of_a_directory_says_which_files_are_not_whole(
    saved: Callable[[str, str], tuple[Model, Path]], tmp_path: Path
) -> None:
    """Sizes show what is missing before anything is hashed."""
    path = copied(saved("text-classifier", "directory")[1], tmp_path)
    (path / "tokenizer" / "tokenizer.json").unlink()
    with (path / "adapter_config.json").open("a") as file:
        file.write(" ")
    missing = " ".join(inspect(path).missing)
    assert "'tokenizer/tokenizer.json' is missing" in missing
    assert "'adapter_config.json' has" in missing


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "document of nothing": lambda p: (p / "flair_peft.json").write_bytes(b""),
    "document of noise": lambda p: (p / "flair_peft.json").write_bytes(random.Random(0).randbytes(500)),
    "deep document": lambda p: (p / "flair_peft.json").write_text("[" * 100_000),
    "changed document": lambda p: (p / "flair_peft.json").write_text(
        (p / "flair_peft.json").read_text().replace("TextClassifier", "TextClassifyer")
    ),
    "truncated weights": lambda p: (p / "head.safetensors").write_bytes((p / "head.safetensors").read_bytes()[:-3]),
    "weights of noise": lambda p: (p / "adapter_model.safetensors").write_bytes(random.Random(0).randbytes(500)),
    "config of noise": lambda p: (p / "adapter_config.json").write_bytes(random.Random(0).randbytes(500)),
    "deep config": lambda p: (p / "adapter_config.json").write_text('{"a":' * 100_000),
    "config of a number": lambda p: (p / "adapter_config.json").write_text("5"),
    "config with NaN": lambda p: (p / "adapter_config.json").write_text('{"r": NaN}'),
    "huge config": lambda p: os.truncate(p / "adapter_config.json", 1 << 30),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_inspection_of_a_damaged_directory_is_refused(
    name: str, saved: Callable[[str, str], tuple[Model, Path]], tmp_path: Path
) -> None:
    """Every damage to what is read is an error of this package."""
    path = copied(saved("text-classifier", "directory")[1], tmp_path)
    DAMAGE[name](path)
    with pytest.raises(ModelFileError):
        inspect(path).to_dict()


def test_inspection_of_changed_files_is_refused_or_read(
    saved: Callable[[str, str], tuple[Model, Path]], tmp_path: Path
) -> None:
    """Whatever is in a file, no other error than this package's comes out, and JSON if none."""
    content = saved("text-classifier", "file")[1].read_bytes()
    draw, path = random.Random(0), tmp_path / "x.pt"
    for _ in range(200):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(min(len(damaged), 14_000))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            json.dumps(inspect(path).to_dict(), allow_nan=False)
        except ModelFileError:
            continue


def _rebuilt(changes: dict[str, Any]) -> dict[str, Any]:
    state = {"state_dict": {"decoder.weight": torch.ones(2)}, "__cls__": "X", "label_type": "x", "embeddings": {}}
    return {**state, **changes}


@pytest.mark.parametrize("place", ["state_dict", "embeddings", "label_dictionary", "model_card", "__cls__", "versions"])
def test_inspection_of_a_payload_does_not_run_it(place: str, tmp_path: Path) -> None:
    """Code in the place of any part stays a name."""
    marker = tmp_path / "executed"
    torch.save(_rebuilt({place: Payload(marker)}), tmp_path / "x.pt")
    inspect(tmp_path / "x.pt").to_dict()
    assert not marker.exists()


def _deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value, "__cls__": "TransformerWordEmbeddings", "model": "x", "peft_config": {"r": 1}}
    return value


@pytest.mark.parametrize("place", ["embeddings", "model_card", "versions", "label_dictionary", "model_states"])
def test_inspection_of_odd_values_is_refused_or_read(place: str, tmp_path: Path) -> None:
    """Values of another kind than Flair writes are no reason to fail in words that are not this package's."""
    for value in (
        None,
        5,
        "x",
        [1],
        {"scores": [1]},
        {1: 2},
        {"$type": "dictionary", "items": 5},
        _deep(50),
        {"a": {}},
    ):
        torch.save(_rebuilt({place: value}), tmp_path / "x.pt")
        try:
            json.dumps(inspect(tmp_path / "x.pt").to_dict(), allow_nan=False)
        except ModelFileError:
            continue


@pytest.mark.parametrize("name", ["nothing", "empty folder", "transformers", "text", "other pickle", "pipe"])
def test_inspection_of_something_else_is_refused(name: str, base: Base, tmp_path: Path) -> None:
    """Whatever is no model is refused by its path."""
    path = tmp_path / "x"
    if name == "transformers":
        shutil.copytree(base("bert"), path)
    elif name == "empty folder":
        path.mkdir()
    elif name == "text":
        path.write_text("Dear reader,\n")
    elif name == "other pickle":
        path.write_bytes(pickle.dumps([1, 2]))
    elif name == "pipe":
        os.mkfifo(path)
    with pytest.raises(ModelFileError, match=str(path)) as error:
        inspect(path)
    assert ("holds a model of transformers" in str(error.value)) == (name == "transformers")


def _large_state() -> tuple[dict[str, Any], dict[str, sparse.Hole]]:
    """Return the state of a model of 2 GB in 400 tensors, with a tokenizer of 16 MB."""
    a = "embeddings.model.base_model.model.encoder.layer.{}.attention.self.query.lora_{}.default.weight"
    holes = {
        f"embeddings.model.base_model.model.encoder.{i}.weight": sparse.Hole(str(i), 1024, 1280) for i in range(400)
    }
    for i in range(24):
        holes[a.format(i, "A")] = sparse.Hole(f"a{i}", 8, 1024)
        holes[a.format(i, "B")] = sparse.Hole(f"b{i}", 1024, 8)
    embeddings = {"__cls__": "TransformerWordEmbeddings", "model": "x", "tokenizer_data": b"x" * 16_000_000}
    return {"state_dict": holes, "__cls__": "SequenceTagger", "embeddings": embeddings}, holes


def seconds(action: Callable[[], Any]) -> float:
    """Return the shortest of three times of the processor: the machine may have other work."""
    times = []
    for _ in range(3):
        start = time.process_time()
        action()
        times.append(time.process_time() - start)
    return min(times)


@pytest.mark.parametrize("kind", ["zip", "old", "adapter"])
def test_inspection_of_a_file_of_two_gigabytes_takes_less_than_half_a_second(kind: str, tmp_path: Path) -> None:
    """Only headers and opcodes are read, never the tensors."""
    state, holes = _large_state()
    path = tmp_path / "x.pt"
    if kind == "adapter":
        path = tmp_path
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 3}))
        sparse.write_safetensors(path / "adapter_model.safetensors", holes)
    else:
        (sparse.write_zip if kind == "zip" else sparse.write_old)(path, state, holes.values())
    found: list[Inspection] = []
    assert seconds(lambda: found.append(inspect(path)) or found[-1].to_dict()) < 0.5
    assert found[0].sizes["total"] > 2_000_000_000
    assert found[0].adapters[0].ranks == (8,)
    if kind != "adapter":
        assert found[0].sizes["base"] == 400 * 4 * 1024 * 1280
        assert found[0].sizes["tokenizer"] == 16_000_000


def test_inspection_reads_no_tensor(saved: Callable[[str, str], tuple[Model, Path]], monkeypatch: Any) -> None:
    """Nothing is loaded by torch or safetensors."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was loaded")

    paths = [saved("text-classifier", kind)[1] for kind in KINDS]
    for module, name in ((torch, "load"), (torch, "frombuffer"), (pickle, "loads"), (safetensors.torch, "load_file")):
        monkeypatch.setattr(module, name, refuse)
    for path in paths:
        inspect(path).to_dict()


@pytest.mark.parametrize(("init", "is_rewriting"), [("eva", False), ("orthogonal", False), ("pissa_niter_2", True)])
def test_notes_say_that_the_base_was_rewritten_only_where_the_initialisation_does_that(
    init: str, is_rewriting: bool, base: Base, tmp_path: Path
) -> None:
    """EVA and orthogonal matrices start LoRA beside the base's weights; PiSSA takes what it starts from out of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # EVA waits for data
        config = lora(init_lora_weights=init)
        get_peft_model(AutoModel.from_pretrained(base("bert")), config).save_pretrained(tmp_path)
    assert ("rewrote" in " ".join(inspect(tmp_path).notes)) == is_rewriting
