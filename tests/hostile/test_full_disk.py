"""Whatever this package writes: where the disk is full, an error says so, and no part of a file is left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from flair.data import Sentence
from flair.models import TextClassifier

import flair_peft
from flair_peft.errors import SaveError
from flair_peft.inspection import moves, plot, report
from tests.support.configs import lora
from tests.support.models import CLASSIFIER, make
from tests.support.selection import few

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a limit on the size of files stands for a full disk")

Base = Callable[[str], str]
Write = Callable[[Path], Any]


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Inside, no file of this process grows beyond so many bytes: writing fails as on a full disk."""
    import resource

    found = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, found[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, found)


def written(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder that is written to, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _of_adapter(model: TextClassifier, source: Path) -> Write:
    return lambda folder: model.save(folder / "model.pt")


def _of_directory(model: TextClassifier, source: Path) -> Write:
    return lambda folder: flair_peft.save_pretrained(model, folder / "model")


def _of_merged(model: TextClassifier, source: Path) -> Write:
    merged = flair_peft.merge(model)
    return lambda folder: merged.save(folder / "model.pt")


def _of_plot(model: TextClassifier, source: Path) -> Write:
    model.save(source / "x.pt")
    measured = moves.measure(report.inspect(source / "x.pt"))
    return lambda folder: plot.draw(measured, folder / "plot.png", title="x")


def _of_export(model: TextClassifier, source: Path) -> Write:
    pytest.importorskip("onnxruntime")
    return lambda folder: flair_peft.export_onnx(model, folder / "model.onnx")


def _of_int8(model: TextClassifier, source: Path) -> Write:
    pytest.importorskip("onnxruntime")
    exported = flair_peft.export_onnx(model, source / "model.onnx")
    for embeddings in (module for module in exported.modules() if hasattr(module, "onnx_model")):
        embeddings.onnx_model = str(source / "model.onnx")
    return lambda folder: flair_peft.quantize_onnx(exported, [Sentence("Berlin is large .")])


WRITERS: dict[str, tuple[Callable[..., Write], int]] = {
    # Temporary files lie on the full disk, too.
    "file": (_of_adapter, 3_000),
    "larger file": (_of_adapter, 20_000),
    "directory": (_of_directory, 3_000),
    "merged": (_of_merged, 60_000),
    "plot": (_of_plot, 3_000),
    "export": (_of_export, 60_000),
    "int8": (_of_int8, 20_000),
}


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("name", few(WRITERS, ["file", "larger file", "merged", "plot", "int8"]))
def test_write_on_a_full_disk_is_an_error_and_leaves_what_was_there(
    name: str, is_there: bool, base: Base, tmp_path: Path
) -> None:
    """Three sentences that say what to do; a new name has no file, an old one the file that it had."""
    target = tmp_path / "target"
    target.mkdir()
    model, (prepare, room) = make(CLASSIFIER, base("bert"), lora()), WRITERS[name]
    write = prepare(model, target)
    if is_there:
        write(target)
    before = written(target)
    with pytest.raises(SaveError) as raised, room_for(room):
        write(target)
    assert str(raised.value).count(". ") >= 2
    assert "Make room" in str(raised.value)
    assert written(target) == before
    write(target)
    assert len(written(target)) > len(before) or is_there
