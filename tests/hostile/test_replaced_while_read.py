"""A file or directory that another takes the place of while it is read is the old one or the new one, never both."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from flair.data import Dictionary
from flair.models import TextClassifier
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, SharedBase
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.inspection import compare, report
from flair_peft.primitives import held_file
from flair_peft.storage import atomic, checkpoint_directory, hub
from flair_peft.torchfile import unpickle
from tests.support.configs import lora
from tests.support.files import save_stock
from tests.support.models import CLASSIFIER, make
from tests.support.selection import few

Base = Callable[[str], str]
SIZES = {"A": 3, "B": 5}
"""Label of a model → what its lora_alpha, its tensors and the number of its classes are."""


def alike(model: Any, label: str) -> Any:
    """Return the model, every learned part of which now tells which one it is."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith("decoder."):
                parameter.fill_(SIZES[label])
    return model


def live(label: str, base: str) -> TextClassifier:
    labels = Dictionary(add_unk=False)
    for number in range(SIZES[label]):
        labels.add_item(f"{label}{number}")
    config = LoraConfig(r=4, lora_alpha=SIZES[label], target_modules=["query"])
    embeddings = PeftTransformerDocumentEmbeddings(base, peft_config=config)
    return alike(TextClassifier(embeddings, label_dictionary=labels, label_type="x"), label)


def label_of(model: Any) -> str:
    """Return which model it is; parts of two are an error."""
    found = {item[0] for item in model.label_dictionary.get_items()} - {"<"}
    values = {float(value) for name, p in model.named_parameters() if "lora_" in name for value in p.detach().unique()}
    values |= {float(value) for value in model.decoder.weight.detach().unique()}
    values |= {float(m.adapter_config.lora_alpha) for m in model.modules() if isinstance(m, PeftTransformerEmbeddings)}
    (label,) = found
    assert values == {float(SIZES[label])}, (label, values)
    return label


def read_inspected(path: Path) -> str:
    found = report.inspect(path)
    (labels,) = {item[0] for item in found.labels["label_dictionary"].items} - {"<"}
    tensors = found.contents.tensors.items()
    values = {float(v) for name, tensor in tensors if "lora_" in name for v in tensor.read().unique()}
    values |= {float(adapter.alpha) for adapter in found.adapters if adapter.alpha is not None}
    assert values == {float(SIZES[labels])}
    assert not found.contents.damage
    return labels


def read_compared(path: Path) -> str:
    """Compare with both: it equals one of them."""
    beside = [path.with_name(f"{path.name}.{label}") for label in SIZES]
    inspected = report.inspect(path)
    found = [compare.compare(inspected, report.inspect(other)).is_equal for other in beside]
    assert sorted(found) == [False, True]
    return "AB"[found.index(True)]


def read_adapter(path: Path) -> str:
    embeddings = PeftTransformerDocumentEmbeddings.from_adapter(str(path))
    values = {
        float(v) for name, p in embeddings.model.named_parameters() if "lora_" in name for v in p.detach().unique()
    }
    (label,) = (label for label, size in SIZES.items() if size == embeddings.adapter_config.lora_alpha)
    assert values == {float(SIZES[label])}
    return label


def read_pushed(path: Path, patch: pytest.MonkeyPatch) -> str:
    pushed: list[str] = []
    patch.setattr(hub, "upload", lambda folder, *_, **__: pushed.append(label_of(flair_peft.from_pretrained(folder))))
    hub.push_directory(path, "me/model")
    return pushed[0]


READERS: dict[str, Callable[[Path], str]] = {
    "load": lambda path: label_of(TextClassifier.load(path)),
    "from_pretrained": lambda path: label_of(flair_peft.from_pretrained(path)),
    "SharedBase": lambda path: label_of(load_shared(path)),
    "inspect": read_inspected,
    "diff": read_compared,
    "verify": lambda path: str(flair_peft.verify(path)),
}
OF_FILES = {"load_legacy": lambda path: label_of(flair_peft.load_legacy(path)), "state": lambda path: state_of(path)}
OF_DIRECTORIES = {"from_adapter": read_adapter}


def load_shared(path: Path) -> Any:
    shared = SharedBase(str(path.parent / "base"), adapter_memory=1)
    return shared.load(path)


def state_of(path: Path) -> str:
    state = unpickle.read_state(path)
    values = {float(v) for name, t in state["state_dict"].items() if "lora_" in name for v in t.unique()}
    (label,) = {item[0] for item in state["label_dictionary"].get_items()} - {"<"}
    assert values == {float(SIZES[label])}
    return label


class Swap:
    """Puts another file or directory in the place of one before it is opened for the n-th time."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.before = 0
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.path is not None and event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            self.opens(os.fspath(arguments[0]))

    def opens(self, opened: Any) -> None:
        path = self.path
        if path is None or not self._is_meant(os.fsdecode(opened)):
            return
        self.before -= 1
        if self.before == 0:
            self.path = None
            replace(path.with_name("next"), path)

    def _is_meant(self, opened: str) -> bool:
        return opened.startswith((str(self.path), "/proc/self/fd/")) or not Path(opened).is_absolute()


def replace(new: Path, path: Path) -> None:
    if new.is_file():
        new.replace(path)
    else:
        assert atomic._exchange(new, path)
        shutil.rmtree(new)


SWAP = Swap()


@pytest.fixture
def swap(monkeypatch: pytest.MonkeyPatch) -> Iterator[Swap]:
    """Hear of opens in Python, and of those of torch and safetensors."""

    def told(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda path, *args, **kwargs: (SWAP.opens(os.fspath(path)), call(path, *args, **kwargs))[1]

    monkeypatch.setattr(torch.UntypedStorage, "from_file", told(torch.UntypedStorage.from_file))
    monkeypatch.setattr(safetensors, "safe_open", told(safetensors.safe_open))
    yield SWAP
    SWAP.path = None


@pytest.fixture
def places(base: Base, tmp_path: Path) -> Callable[[str], Path]:
    """Return a function from a kind to a path with two models beside it."""
    shutil.copytree(base("bert"), tmp_path / "base")

    def make(kind: str) -> Path:
        path = tmp_path / ("model.pt" if kind == "file" else "model")
        for label in SIZES:
            model, beside = live(label, str(tmp_path / "base")), path.with_name(f"{path.name}.{label}")
            model.save(beside) if kind == "file" else flair_peft.save_pretrained(model, beside)
        return path

    return make


def put(source: Path, path: Path) -> None:
    (shutil.copyfile if source.is_file() else shutil.copytree)(source, path)


def assert_never_both(path: Path, swap: Swap, read: Callable[[Path], str]) -> None:
    """Swap before the first, the second, … opening, until a read opens nothing any more."""
    seen, before = set(), 0
    while swap.path is None:
        before += 1
        for name in (path, path.with_name("next")):
            shutil.rmtree(name) if name.is_dir() else name.unlink(missing_ok=True)
        put(path.with_name(f"{path.name}.A"), path)
        put(path.with_name(f"{path.name}.B"), path.with_name("next"))
        swap.before, swap.path = before, path
        seen.add(read(path))
    swap.path = None
    assert before > 2
    assert seen in ({"A", "B"}, {"None"}), seen


CASES = [
    *(("file", name) for name in (*READERS, *OF_FILES)),
    *(("directory", name) for name in (*READERS, *OF_DIRECTORIES)),
]


@pytest.mark.skipif(sys.platform != "linux", reason="directories are exchanged in one step")
@pytest.mark.parametrize(
    "case", few(CASES, [c for c in CASES if c[1] in ("load", "diff", "state", "from_adapter", "inspect")])
)
def test_replacement_before_any_opening_gives_the_old_or_the_new(
    case: tuple[str, str], swap: Swap, places: Callable[[str], Path]
) -> None:
    """Whatever moment another model takes the place at: no error, and all parts are of one."""
    kind, name = case
    assert_never_both(places(kind), swap, {**READERS, **OF_FILES, **OF_DIRECTORIES}[name])


def test_replacement_while_a_directory_is_pushed_gives_the_old_or_the_new(
    swap: Swap, places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is uploaded is one model, as it was verified."""
    assert_never_both(places("directory"), swap, lambda path: read_pushed(path, monkeypatch))


def test_replacement_of_a_stock_file_gives_the_old_or_the_new(
    swap: Swap, base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files of stock Flair, with an adapter or plain: what is found out of one is not applied to the other."""
    config = lora(lora_alpha=8, target_modules=["query"])
    adapted = make(CLASSIFIER, base("bert"), config, is_stock=True)
    save_stock(adapted, tmp_path / "model.pt.A")
    save_stock(make(CLASSIFIER, base("bert"), None, is_stock=True), tmp_path / "model.pt.B")

    def read(path: Path) -> str:
        state = unpickle.read_state(path, expects_adapters=False)
        return "A" if any("lora_" in name for name in state["state_dict"]) else "B"

    assert_never_both(tmp_path / "model.pt", swap, read)


def test_replacement_where_files_are_opened_by_name_alone_is_found_out(
    swap: Swap, places: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Systems without Linux's descriptors read anew what another took the place of."""
    monkeypatch.setattr(held_file.HeldFile, "__fspath__", lambda self: os.fspath(self.path))
    monkeypatch.setattr(
        held_file.HeldFile,
        "is_what_readers_get",
        lambda self: self.path.exists() and os.path.samestat(self.path.stat(), self.stat()),
    )
    assert_never_both(places("file"), swap, READERS["load"])


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_reader_beside_a_writer_gets_one_model_each_time(kind: str, places: Callable[[str], Path]) -> None:
    """In a natural race nobody is told that sound files are damaged."""
    path = places(kind)
    saved = [path.with_name(f"{path.name}.{label}") for label in SIZES]
    finished = threading.Event()

    def write(source: Path) -> None:
        if kind == "file":
            atomic.write_file(path, lambda file: file.write(source.read_bytes()) and None)
        else:
            found = checkpoint_directory.read(source)
            checkpoint_directory.write(path, found.document, {**found.files, **found.tensors}, "card")

    def keep_writing() -> None:
        while not finished.is_set():
            for source in saved:
                write(source)

    write(saved[0])
    writer = threading.Thread(target=keep_writing)
    writer.start()
    try:
        seen = [read(path) for _ in range(8) for read in (READERS["load"], read_inspected)]
    finally:
        finished.set()
        writer.join()
    assert set(seen) == {"A", "B"}
