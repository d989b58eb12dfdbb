"""The checkpoint directory as files: it comes back as it was written, or an error says what is wrong with it."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import stat
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import safetensors
import safetensors.torch
import torch
from packaging.version import Version

from flair_peft.errors import FormatVersionError, ModelFileError, SaveError, UnsupportedStateError
from flair_peft.storage import atomic, checkpoint_directory, held_directory, manifest, temporaries
from flair_peft.storage.atomic import write_file
from flair_peft.storage.checkpoint_directory import read, write
from flair_peft.storage.held_directory import is_checkpoint
from flair_peft.storage.manifest import CARD, DOCUMENT

DOC = {"class": "TextClassifier", "labels": ["ü", "\ud800", "\u2028", ""], "numbers": [1, 2.5, -0.0, 1e300, None, True]}
ADAPTER = "adapter_model.safetensors"
posix = pytest.mark.skipif(sys.platform == "win32", reason="pipes, owners and permission bits of POSIX")


def contents() -> dict[str, Any]:
    return {
        "adapter_config.json": b'{"r": 4}',
        ADAPTER: {"a.weight": torch.arange(12.0).reshape(3, 4), "b": torch.ones(2, dtype=torch.bfloat16)},
        "head.safetensors": {"scalar": torch.tensor(3.5), "empty": torch.empty(0, 3)},
        "tokenizer/vocab.txt": "é\n".encode(),
    }


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Return a checkpoint."""
    write(tmp_path / "model", DOC, contents(), "# card")
    return tmp_path / "model"


@pytest.fixture(params=["exchange", "two renamings"])
def _means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put folders in place in either way."""
    if request.param == "two renamings":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)


both_means = pytest.mark.usefixtures("_means")


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()}


def is_same(found: checkpoint_directory.Checkpoint, document: Any = DOC) -> bool:
    expected = contents()
    tensors = {name: value for name, value in expected.items() if isinstance(value, dict)}
    return (
        found.document == document
        and dict(found.files) == {name: value for name, value in expected.items() if isinstance(value, bytes)}
        and found.tensors.keys() == tensors.keys()
        and all(equal(found.tensors[name], tensors[name]) for name in tensors)
    )


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and found[name].shape == value.shape and torch.equal(found[name], value)
        for name, value in expected.items()
    )


def resign(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the document, and make its own hash and those of the files right again."""
    document = json.loads((folder / DOCUMENT).read_text())
    for name in document["files"]:
        if (folder / name).is_file():
            entry = manifest.entry_of((folder / name).read_bytes())
            document["files"][name] = {"bytes": entry.bytes, "sha256": entry.sha256}
    changed = change(document)
    document = document if changed is None else changed
    if isinstance(document, dict):
        document["sha256"] = manifest.hash_of(document)
    (folder / DOCUMENT).write_text(json.dumps(document))


def test_checkpoint_read_is_what_was_written(place: Path) -> None:
    """Document, bytes and tensors come back as they were, also text that is no valid Unicode."""
    assert is_same(read(place))
    assert list(read(place).document) == list(DOC)
    assert (place / CARD).read_text() == "# card"
    assert [path.name for path in place.parent.iterdir()] == ["model"]


# safetensors stores complex numbers since 0.6; before, they are refused when a checkpoint is written.
COMPLEX = ["complex64"] if Version(safetensors.__version__) >= Version("0.6") else []


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "int64", "int8", "uint8", "bool", *COMPLEX]
)
def test_checkpoint_tensors_come_back_bit_equal_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    """The dtype and every bit are kept."""
    tensor = (torch.randn(5, 7) * 3).to(getattr(torch, dtype))
    write(tmp_path / "x", {}, {ADAPTER: {"t": tensor}}, "")
    assert equal(read(tmp_path / "x").tensors[ADAPTER], {"t": tensor})


def test_checkpoint_tensors_that_share_memory_come_back_each_by_itself(tmp_path: Path) -> None:
    """Shared, overlapping, transposed, expanded and conjugated tensors need no preparation by the caller."""
    base = torch.randn(6, 4)
    parameter = torch.nn.Parameter(base)
    tensors = {
        "base": base,
        "same": base,
        "parameter": parameter,
        "row": base[2],
        "transposed": base.t(),
        "expanded": base[:1].expand(3, 4),
        **({"conjugated": torch.randn(2, dtype=torch.complex64).conj()} if COMPLEX else {}),
        "empty": base[:0],
    }
    write(tmp_path / "x", {}, {ADAPTER: tensors}, "")
    found = read(tmp_path / "x").tensors[ADAPTER]
    assert equal(found, {name: tensor.detach() for name, tensor in tensors.items()})
    found["base"].zero_()
    assert torch.equal(found["same"], base)


def test_checkpoint_large_tensors_are_mapped_and_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are mapped; writing to such a tensor does not change the file, nor does the file's removal hurt."""
    monkeypatch.setattr(checkpoint_directory, "_MAPPED_FROM", 1000)
    tensor = torch.randn(100, 100)
    write(tmp_path / "x", {}, {ADAPTER: {"t": tensor}, "head.safetensors": {"h": tensor[0, :3]}}, "")
    found = read(tmp_path / "x").tensors[ADAPTER]["t"]
    assert torch.equal(found, tensor)
    found.zero_()
    again = read(tmp_path / "x").tensors[ADAPTER]["t"]
    shutil.rmtree(tmp_path / "x")
    assert torch.equal(again, tensor)
    assert not found.any()


def test_checkpoint_empty_comes_back(tmp_path: Path) -> None:
    """No files, an empty file and a file without tensors are checkpoints too; missing parents are made."""
    write(tmp_path / "a" / "b" / "x", {}, {}, "")
    assert read(tmp_path / "a" / "b" / "x").document == {}
    write(tmp_path / "x", {}, {"empty": b"", "none.safetensors": {}}, "")
    found = read(tmp_path / "x")
    assert dict(found.files) == {"empty": b""}
    assert found.tensors == {"none.safetensors": {}}


@both_means
def test_checkpoint_overwritten_is_the_new_one_without_stale_files(place: Path) -> None:
    """Files that only the earlier checkpoint had are gone, with their folders."""
    write(place, {"new": 1}, {"adapters/b/w.safetensors": {"t": torch.ones(1)}}, "# new")
    assert names_in(place) == {DOCUMENT, CARD, "adapters/b/w.safetensors"}
    assert not (place / "tokenizer").exists()
    assert read(place).document == {"new": 1}
    assert [path.name for path in place.parent.iterdir()] == ["model"]
    write(place, DOC, contents(), "# card")
    assert is_same(read(place))
    assert (place / CARD).read_text() == "# card"


@both_means
def test_checkpoint_overwritten_leaves_other_files_the_same(place: Path) -> None:
    """Logs, notes, links, empty folders, hidden folders and other checkpoints stay; open ones go on being written."""
    (place / "tokenizer" / "notes.txt").write_text("mine")
    (place / "empty" / "folder").mkdir(parents=True)
    (place / ".git").mkdir(mode=0o750)
    (place / ".git" / "HEAD").write_text("ref")
    (place / ".git").chmod(0o550)
    (place / "latest").symlink_to("other")
    (place / "gone").symlink_to("nowhere")
    write(place / "other", {"inner": 1}, {"x": b"1"}, "")
    with (place / "training.log").open("a") as log:
        log.write("before\n")
        log.flush()
        inode = os.fstat(log.fileno()).st_ino
        write(place, {"new": 1}, {"y": b"2"}, "# new")
        log.write("after\n")
    assert (place / "training.log").read_text() == "before\nafter\n"
    assert (place / "training.log").stat().st_ino == inode
    assert (place / "tokenizer" / "notes.txt").read_text() == "mine"
    assert (place / "empty" / "folder").is_dir()
    assert (place / ".git" / "HEAD").read_text() == "ref"
    assert stat.S_IMODE((place / ".git").stat().st_mode) == 0o550
    assert (place / "latest").readlink() == Path("other")
    assert (place / "gone").is_symlink()
    assert read(place / "other").document == {"inner": 1}
    assert names_in(place) == {
        *(DOCUMENT, CARD, "y", "training.log", "tokenizer/notes.txt", ".git/HEAD", "gone", "latest"),
        *(f"other/{name}" for name in (DOCUMENT, CARD, "x")),
    }
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@both_means
def test_checkpoint_other_files_survive_without_hard_links(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where links are impossible, files are copied, and the very files are back at the end."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    (place / "link").symlink_to("log")
    with (place / "log").open("a") as log:
        inode = os.fstat(log.fileno()).st_ino
        write(place, {}, {}, "")
        log.write("after")
    assert (place / "log").read_text() == "after"
    assert (place / "log").stat().st_ino == inode
    assert (place / "link").readlink() == Path("log")
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@both_means
def test_checkpoint_other_files_written_meanwhile_are_not_lost(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What others create, rewrite or remove while the folder is exchanged is there as they left it."""
    (place / "rewritten before").write_text("1")
    (place / "rewritten after").write_text("1")
    (place / "removed after").write_text("1")
    swap = atomic._swap

    def rewrite(name: str) -> None:
        (place / "part").write_text("2")
        (place / "part").replace(place / name)

    def swap_among_others(ready: Path, target: Path) -> Path:
        rewrite("rewritten before")
        (place / "created" / "deep").mkdir(parents=True)
        rewrite("created/deep/file")
        old = swap(ready, target)
        rewrite("rewritten after")
        return old

    monkeypatch.setattr(atomic, "_swap", swap_among_others)
    write(place, {"new": 1}, {}, "")
    for name in ("rewritten before", "rewritten after", "created/deep/file"):
        assert (place / name).read_text() == "2"
    assert read(place).document == {"new": 1}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_checkpoint_card_that_was_edited_stays(place: Path) -> None:
    """An edited card is somebody's text; one that is as it was written is renewed."""
    write(place, DOC, {}, "# second")
    assert (place / CARD).read_text() == "# second"
    (place / CARD).write_text("# mine")
    write(place, DOC, {}, "# third")
    assert (place / CARD).read_text() == "# mine"
    write(place, DOC, {}, "# fourth")
    assert (place / CARD).read_text() == "# mine"
    (place / CARD).unlink()
    write(place, DOC, {}, "# fifth")
    assert (place / CARD).read_text() == "# fifth"


def test_checkpoint_into_a_folder_of_others_keeps_their_files(tmp_path: Path) -> None:
    """A folder that is no checkpoint becomes one; what was in it stays, its README among it."""
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / CARD).write_text("# project")
    (tmp_path / "repository" / "train.py").write_text("pass")
    write(tmp_path / "repository", DOC, contents(), "# card")
    assert is_same(read(tmp_path / "repository"))
    assert (tmp_path / "repository" / CARD).read_text() == "# project"
    assert (tmp_path / "repository" / "train.py").read_text() == "pass"


def test_checkpoint_that_is_damaged_is_replaced_and_loses_only_what_is_replaced(place: Path) -> None:
    """What a damaged manifest lists cannot be known to be its own, so it stays."""
    (place / DOCUMENT).write_text("{")
    write(place, {"new": 1}, {ADAPTER: {}}, "")
    assert read(place).document == {"new": 1}
    assert (place / "tokenizer" / "vocab.txt").exists()


@posix
def test_checkpoint_manifest_cannot_make_a_save_remove_files_elsewhere(place: Path, tmp_path: Path) -> None:
    """Old files are removed by names of the manifest only below the folder, also through a link in it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "vocab.txt").write_text("mine")
    shutil.rmtree(place / "tokenizer")
    (place / "tokenizer").symlink_to(tmp_path / "elsewhere")
    write(place, {"new": 1}, {}, "")
    assert (tmp_path / "elsewhere" / "vocab.txt").read_text() == "mine"
    assert (place / "tokenizer" / "vocab.txt").read_text() == "mine"


def test_checkpoint_file_in_the_way_is_an_error_that_loses_nothing(place: Path) -> None:
    """A file where the new checkpoint needs a folder, and the other way round, are not removed."""
    before = names_in(place)
    (place / "extra").write_text("mine")
    with pytest.raises(SaveError, match="extra"):
        write(place, {}, {"extra/x": b""}, "")
    assert is_same(read(place))
    assert names_in(place) == before | {"extra"}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@both_means
def test_checkpoint_through_a_link_replaces_the_folder_behind_it(place: Path) -> None:
    """A symbolic link stays one."""
    link = place.parent / "latest"
    link.symlink_to("model")
    write(link, {"new": 1}, {}, "")
    assert link.is_symlink()
    assert read(link).document == read(place).document == {"new": 1}
    (place.parent / "dangling").symlink_to("later")
    write(place.parent / "dangling", {"later": 1}, {}, "")
    assert read(place.parent / "later").document == {"later": 1}


@posix
@both_means
def test_checkpoint_keeps_the_permissions_of_its_folder(place: Path, tmp_path: Path) -> None:
    """A folder that a group may write to stays so; a new one gets what the umask leaves."""
    mask = os.umask(0o027)
    try:
        place.chmod(0o2771)
        write(place, {}, {"tokenizer/x": b""}, "")
        write(tmp_path / "fresh", {}, {"x": b""}, "")
    finally:
        os.umask(mask)
    assert stat.S_IMODE(place.stat().st_mode) == 0o2771
    assert stat.S_IMODE((tmp_path / "fresh").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "fresh" / "x").stat().st_mode) == 0o640


def test_checkpoint_of_a_file_is_an_error(tmp_path: Path) -> None:
    """A regular file is not replaced by a folder, nor a folder by a file."""
    (tmp_path / "x").write_text("mine")
    with pytest.raises(SaveError, match="there is a file of that name"):
        write(tmp_path / "x", {}, {}, "")
    assert (tmp_path / "x").read_text() == "mine"
    with pytest.raises(SaveError, match="there is a folder of that name"):
        write_file(tmp_path, lambda file: None)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@both_means
def test_checkpoint_of_the_working_directory_leaves_the_process_in_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who saves to '.' can go on using relative names."""
    (place / "sub").mkdir()
    (place / "sub" / "note").write_text("mine")
    monkeypatch.chdir(place)
    write(Path(), {"new": 1}, {}, "")
    assert Path.cwd() == place
    assert read(Path()).document == {"new": 1}
    monkeypatch.chdir(place / "sub")
    write(Path(".."), {"new": 2}, {}, "")
    assert Path("note").read_text() == "mine"


@pytest.mark.parametrize("name", ["a b*[x]?", "ü" * 120, "x" * 255, ".hidden", "model.tmp", "-"])
def test_checkpoint_of_any_name_is_saved_twice(tmp_path: Path, name: str) -> None:
    """Names that are patterns, or as long as names can be, leave nothing beside them either."""
    for number in range(2):
        write(tmp_path / name, {"number": number}, {}, "")
        assert read(tmp_path / name).document == {"number": number}
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_checkpoint_leftovers_of_killed_writers_are_removed_and_others_kept(place: Path) -> None:
    """Only what no living writer holds, and only of this target, is cleared away."""
    parent = place.parent
    for name in (".model.0123456789abcdef.new.tmp", ".model.0123456789abcdee.old.tmp"):
        (parent / name).mkdir()
        (parent / name / "x").write_text("1")
    (parent / ".model.0123456789abcdea.new.tmp").write_text("1")
    kept = {".model.bin.0123456789abcdef.new.tmp", ".model.short.tmp", "model.0123456789abcdef.new.tmp"}
    for name in kept:
        (parent / name).write_text("1")
    with temporaries.new_folder(place) as alive:
        write(place, {"new": 1}, {}, "")
        assert {path.name for path in parent.iterdir()} == kept | {"model", alive.name}
    write(place, {"new": 2}, {}, "")
    assert {path.name for path in parent.iterdir()} == kept | {"model"}
    assert (place / "x").read_text() == "1", "what was beside an old checkpoint when its writer was killed is lost"


@posix
def test_checkpoint_where_nothing_can_be_locked_is_saved_and_cleared_by_age(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without locks, only what is older than a day is cleared away."""
    monkeypatch.setattr(temporaries, "_acquire", lambda descriptor, patience: False)
    for name in ("0123456789abcdef", "0123456789abcdee"):
        (place.parent / f".model.{name}.new.tmp").mkdir()
    os.utime(place.parent / ".model.0123456789abcdee.new.tmp", (0, 0))
    write(place, {"new": 1}, {}, "")
    assert read(place).document == {"new": 1}
    assert {path.name for path in place.parent.iterdir()} == {"model", ".model.0123456789abcdef.new.tmp"}


def test_checkpoint_left_aside_is_read_and_put_back(place: Path) -> None:
    """A checkpoint whose writer was killed between two renamings is where it was after it was read."""
    backup = temporaries.backup_of(place)
    place.rename(backup)
    assert is_checkpoint(place)
    assert is_same(read(place))
    assert not backup.exists()
    place.rename(backup)
    place.mkdir()
    assert is_same(read(place))


@both_means
def test_checkpoint_left_aside_and_its_folder_made_anew_become_one(place: Path) -> None:
    """The old checkpoint is read until a new one is saved, and neither's other files are lost."""
    backup = temporaries.backup_of(place)
    (place / "training.log").write_text("old")
    place.rename(backup)
    (place / "plots").mkdir(parents=True)
    (place / "plots" / "loss").write_text("new")
    (place / "training.log").write_text("new")
    assert is_same(read(place))
    write(place, {"new": 1}, {}, "")
    assert read(place).document == {"new": 1}
    assert (place / "plots" / "loss").read_text() == "new"
    assert {(place / name).read_text() for name in ("training.log", "training.log.1")} == {"old", "new"}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@both_means
def test_checkpoint_replaced_but_not_yet_cleared_away_is_cleared_away(place: Path) -> None:
    """A writer killed after both renamings leaves an old checkpoint, which the next one removes."""
    shutil.copytree(place, temporaries.backup_of(place))
    write(place, {"new": 1}, {}, "")
    write(place, {"new": 2}, {}, "")
    assert read(place).document == {"new": 2}
    assert names_in(place) == {DOCUMENT, CARD}
    assert [path.name for path in place.parent.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("document", "files"),
    [
        ({"x": float("nan")}, {}),
        ({"x": {1, 2}}, {}),
        ({"x": (1, 2)}, {}),
        ({"x": {1: 2}}, {}),
        ({"x": torch.ones(1)}, {}),
        ({"files": {}}, {}),
        ({"format_version": 1}, {}),
        ({}, {"../x": b""}),
        ({}, {"/x": b""}),
        ({}, {"a/b/c/d/e": b""}),
        ({}, {"a//b": b""}),
        ({}, {"a/": b""}),
        ({}, {"ü": b""}),
        ({}, {"": b""}),
        ({}, {"x\n": b""}),
        ({}, {DOCUMENT: b""}),
        ({}, {CARD: b""}),
        ({}, {"x.bin": {"t": torch.ones(1)}}),
        ({}, {"x.safetensors": b""}),
        ({}, {"x.safetensors": {"t": [1.0]}}),
        ({}, {"x.safetensors": {"__metadata__": torch.ones(1)}}),
        ({}, {"x.safetensors": {"t": torch.ones(2, 2).to_sparse()}}),
        ({}, {"x.safetensors": {"t": torch.ones(2, device="meta")}}),
        ({}, {"x.safetensors": {"t": torch.empty(2, dtype=torch.complex128)}}),
        ({}, {"x.safetensors": {"t": torch.empty(2, dtype=torch.float8_e8m0fnu)}}),
    ],
)
def test_checkpoint_of_what_the_format_cannot_hold_is_an_error(
    place: Path, document: dict[str, Any], files: dict[str, Any]
) -> None:
    """It is refused before anything is changed, and nothing is left of it."""
    with pytest.raises(UnsupportedStateError, match="Cannot store"):
        write(place, document, files, "")
    assert is_same(read(place))
    assert [path.name for path in place.parent.iterdir()] == ["model"]


def test_checkpoint_of_a_document_too_deep_is_an_error(place: Path) -> None:
    """Nesting that JSON's reader could not read again is not written."""
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(UnsupportedStateError, match="Cannot store"):
        write(place, {"deep": deep}, {}, "")
    assert is_same(read(place))
    while deep:
        deep = deep.pop()


@pytest.mark.parametrize("seed", range(8))
def test_checkpoint_with_mutated_bytes_is_an_error_or_the_same(place: Path, seed: int) -> None:
    """Whatever bytes of whatever file change, the checkpoint is refused, or what is read is what was written."""
    chance = random.Random(seed)
    files = sorted(names_in(place))
    refused = 0
    for _ in range(60):
        path = place / chance.choice(files)
        before = path.read_bytes()
        after = bytearray(before)
        for _ in range(chance.choice((1, 1, 3))):
            position = chance.randrange(len(after))
            kind = chance.randrange(3)
            if kind == 0:
                after[position] ^= 1 << chance.randrange(8)
            elif kind == 1:
                after[position] = chance.randrange(256)
            else:
                after[position : position + chance.randrange(3)] = chance.randbytes(chance.randrange(3)) or b"0"
        path.write_bytes(after)
        with contextlib.suppress(ModelFileError):
            refused += 1
            assert is_same(read(place))
            refused -= 1
        path.write_bytes(before)
    assert refused > 30
    assert is_same(read(place))


def test_checkpoint_cut_short_anywhere_is_an_error(place: Path) -> None:
    """Every shorter or longer version of every file is refused."""
    for name in names_in(place) - {CARD}:
        whole = (place / name).read_bytes()
        for length in {0, 1, len(whole) // 2, len(whole) - 1, len(whole) + 1} - {len(whole)}:
            (place / name).write_bytes((whole + b"0")[:length])
            # A document without its last line end is the same document.
            if (name, length) != (DOCUMENT, len(whole) - 1):
                with pytest.raises(ModelFileError, match=Path(name).name):
                    read(place)
        (place / name).write_bytes(whole)
    assert is_same(read(place))


def test_checkpoint_with_a_file_missing_is_an_error_that_names_it(place: Path) -> None:
    """The error names the file; the card may be missing, and files of others may be there."""
    (place / CARD).unlink()
    (place / "notes").write_text("mine")
    assert is_same(read(place))
    for name in names_in(place) - {"notes"}:
        (place / name).rename(place / "aside")
        with pytest.raises(ModelFileError, match=rf"{Path(name).name}.*(No such file|no checkpoint of)"):
            read(place)
        (place / "aside").rename(place / name)


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "below a file", "too long"])
def test_checkpoint_that_is_none_is_an_error(tmp_path: Path, kind: str) -> None:
    """A path to something else is refused at once and in the package's words."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    path = tmp_path / {"below a file": "file/x", "too long": "x" * 300}.get(kind, kind)
    assert not is_checkpoint(path)
    with pytest.raises(ModelFileError, match="Cannot read"):
        read(path)


@posix
@pytest.mark.parametrize("name", [DOCUMENT, "adapter_config.json", ADAPTER])
@pytest.mark.parametrize("kind", ["pipe", "device", "endless", "folder", "loop", "dangling"])
def test_checkpoint_with_something_else_for_a_file_is_an_error_at_once(place: Path, name: str, kind: str) -> None:
    """Pipes and devices are not opened, whether they are in the manifest as files or are linked to."""
    (place / name).unlink()
    if kind == "pipe":
        os.mkfifo(place / name)
    elif kind == "folder":
        (place / name).mkdir()
    else:
        targets = {"device": "/dev/tty", "endless": "/dev/zero", "loop": name, "dangling": "nowhere"}
        (place / name).symlink_to(targets[kind])
    with pytest.raises(ModelFileError, match=name):
        read(place)
    if name != DOCUMENT:
        write(place, {"new": 1}, {}, "")
        assert read(place).document == {"new": 1}


def test_checkpoint_of_links_is_read(place: Path, tmp_path: Path) -> None:
    """The Hub's cache keeps files under their hashes and folders of links to them."""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for number, name in enumerate(names_in(place)):
        (place / name).rename(blobs / str(number))
        (place / name).symlink_to(blobs / str(number))
    assert is_same(read(place))
    write(place, {"new": 1}, {}, "")
    assert read(place).document == {"new": 1}
    assert len(list(blobs.iterdir())) == 6


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "1",
        '"x"',
        "{}",
        "{" * 5,
        "[" * 1_000_000,
        '{"a":' * 1_000_000,
        '{"format_version": 1, "format_version": 1}',
        '{"format_version": NaN}',
        '{"format_version": 1e999}',
        '{"format_version": 1, "x": ' + "9" * 10_000 + "}",
        "\ufeff{}",
        b"\xff\xfe",
        b'{"x": "\xff"}',
    ],
    ids=lambda text: repr(text[:30]),
)
def test_checkpoint_whose_document_is_no_document_is_an_error(place: Path, text: str | bytes) -> None:
    """Deep, endless, ambiguous and undecodable JSON ends in one kind of error."""
    (place / DOCUMENT).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ModelFileError, match=DOCUMENT):
        read(place)


def test_checkpoint_of_a_newer_format_is_refused_by_name(place: Path) -> None:
    """The version is looked at first, since a newer format may be signed, and look, in another way."""
    resign(place, lambda document: document.update(format_version=2))
    with pytest.raises(FormatVersionError, match=r"version 2\. .* up to 1"):
        read(place)
    (place / DOCUMENT).write_text('{"format_version": 7}')
    with pytest.raises(FormatVersionError, match=r"version 7\."):
        read(place)


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1], {}])
def test_checkpoint_of_a_version_that_none_has_is_damaged(place: Path, version: Any) -> None:
    """What no version writes is damage, even under a right hash, and not the future."""
    resign(place, lambda document: document.update(format_version=version))
    with pytest.raises(ModelFileError, match="format version") as raised:
        read(place)
    assert not isinstance(raised.value, FormatVersionError)


def _entry(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["files"][ADAPTER].update(changes)


def _file(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda document: document["files"].update({name: document["files"][ADAPTER]})


def _value(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda document: document.update(changes)


@pytest.mark.parametrize(
    "change",
    [
        *(_value(files=files) for files in (None, [], "x", {"a": 1}, {"a": []}, {"a": {}}, {"a": None})),
        *(_value(card=card) for card in (None, 1, [])),
        *(_entry(bytes=size) for size in (-1, 1.5, "1", None, True, 10**30, 0)),
        *(_entry(sha256=digest) for digest in ("", "0" * 64, "Z" * 64, 1, None)),
        _entry(extra=1),
        *map(_file, ("../model/" + ADAPTER, "/etc/passwd", "..", ".", "", "a/../b", "./x", "a//b", "a\\b", "a/b/c/d")),
        *map(_file, ("x\n", "x\x00", "ü", "C:x", "~", DOCUMENT, CARD, "x" * 5000, "\ud800")),
        *map(_file, ("absent", "tokenizer", "tokenizer/..")),
        lambda document: [document],
        lambda document: document.pop("files") and None,
        lambda document: document.pop("card") and None,
    ],
)
def test_checkpoint_signed_but_of_a_wrong_structure_is_an_error(
    place: Path, change: Callable[[dict[str, Any]], Any]
) -> None:
    """A right hash does not make a manifest right: each of its parts is checked."""
    resign(place, change)
    with pytest.raises(ModelFileError, match="Cannot read"):
        read(place)
    write(place, {"new": 1}, {}, "")
    assert read(place).document == {"new": 1}


def _header(text: str | bytes, data: bytes = b"") -> bytes:
    header = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(header)) + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x08",
        struct.pack("<Q", 1 << 62) + b"{}",
        struct.pack("<Q", 1 << 40),
        _header("["),
        _header("[" * 1_000_000),
        _header(b"\xff\xff"),
        _header('{"t": {"dtype": "F32", "shape": [1099511627776, 1099511627776], "data_offsets": [0, 4]}}', b"1234"),
        _header('{"t": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}', b"1234"),
        _header('{"t": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', b"1234"),
        _header('{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}', b"1234"),
        _header('{"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', b"1234garbage"),
        _header(" " * 110_000_000),
    ],
    ids=range(13),
)
def test_checkpoint_with_hostile_tensors_under_a_right_hash_is_an_error(place: Path, content: bytes) -> None:
    """Headers that lie about their length, shapes or types do not crash, hang or fill the memory."""
    for threshold in (1 << 30, 0):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint_directory, "_MAPPED_FROM", threshold)
            (place / ADAPTER).write_bytes(content)
            resign(place, lambda document: None)
            with pytest.raises(ModelFileError, match=ADAPTER):
                read(place)


def test_checkpoint_file_too_large_to_read_is_an_error_before_it_is_read(place: Path) -> None:
    """A file of holes that claims a terabyte costs nothing."""
    for name in (DOCUMENT, "adapter_config.json"):
        before = (place / name).read_bytes()
        os.truncate(place / name, 1 << 40)
        if name != DOCUMENT:
            document = json.loads((place / DOCUMENT).read_text())
            document["files"][name]["bytes"] = 1 << 40
            document["sha256"] = manifest.hash_of(document)
            (place / DOCUMENT).write_text(json.dumps(document))
        with pytest.raises(ModelFileError, match="more than"):
            read(place)
        (place / name).write_bytes(before)


def test_checkpoint_error_says_what_happened_and_keeps_its_cause(place: Path) -> None:
    """The message names the file, what was expected and found, and what to do."""
    (place / ADAPTER).write_bytes(b"short")
    with pytest.raises(ModelFileError, match=rf"{ADAPTER}.*5 bytes, not \d+ .*Copy or save it again\."):
        read(place)
    (place / ADAPTER).unlink()
    with pytest.raises(ModelFileError) as raised:
        read(place)
    assert isinstance(raised.value.__cause__, OSError)


@both_means
def test_checkpoint_replaced_while_it_is_read_is_read_again(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose files vanish under it starts again with those that took their place."""
    open_file = held_directory.Folder.open
    replaced: list[int] = []

    def open_late(folder: Any, name: str, size: int | None = None) -> BinaryIO:
        if name == ADAPTER and len(replaced) < 3:
            replaced.append(1)
            monkeypatch.setattr(held_directory.Folder, "open", open_file)
            write(place, {"new": len(replaced)}, {"z": b"", ADAPTER: {"t": torch.ones(len(replaced))}}, "")
            monkeypatch.setattr(held_directory.Folder, "open", open_late)
        return open_file(folder, name, size)

    monkeypatch.setattr(held_directory.Folder, "open", open_late)
    found = read(place)
    assert found.document == {"new": 3}
    assert torch.equal(found.tensors[ADAPTER]["t"], torch.ones(3))


def test_checkpoint_replaced_at_every_try_is_an_error_in_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader does not try for ever."""
    parse = held_directory.parse

    def parse_late(text: bytes, path: Path) -> manifest.Document:
        shutil.copytree(place, place.with_name("next"))
        shutil.rmtree(place)
        place.with_name("next").rename(place)
        return parse(text, path)

    monkeypatch.setattr(held_directory, "parse", parse_late)
    with pytest.raises(ModelFileError, match="No such file"):
        read(place)


def _writes(content: bytes) -> Callable[[BinaryIO], None]:
    def write_content(file: BinaryIO) -> None:
        file.write(content)

    return write_content


@posix
def test_file_replaced_keeps_its_permissions_and_its_link(tmp_path: Path) -> None:
    """A new file is as open() makes it; one that was there keeps its mode, and a link to it stays one."""
    mask = os.umask(0o026)
    try:
        write_file(tmp_path / "x.pt", _writes(b"1"))
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "x.pt").stat().st_mode) == 0o640
    (tmp_path / "x.pt").chmod(0o604)
    (tmp_path / "link.pt").symlink_to("x.pt")
    write_file(tmp_path / "link.pt", _writes(b"2"))
    assert (tmp_path / "link.pt").is_symlink()
    assert (tmp_path / "x.pt").read_bytes() == b"2"
    assert stat.S_IMODE((tmp_path / "x.pt").stat().st_mode) == 0o604
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "link.pt"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_file_whose_writer_fails_is_as_it_was(tmp_path: Path, error: type[BaseException]) -> None:
    """An exception of the writer is passed on; nothing is left of what it had written."""

    def fail(file: BinaryIO) -> None:
        file.write(b"half" * 1_000_000)
        raise error

    (tmp_path / "x.pt").write_bytes(b"old")
    with pytest.raises(error):
        write_file(tmp_path / "x.pt", fail)
    assert (tmp_path / "x.pt").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]


@posix
def test_file_that_is_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """Nobody's /dev/null becomes a model."""
    (tmp_path / "null").symlink_to("/dev/null")
    write_file(tmp_path / "null", _writes(b"1"))
    assert stat.S_ISCHR((tmp_path / "null").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["null"]


def test_file_in_no_folder_is_an_error(tmp_path: Path) -> None:
    """A folder that is not there is not made for a file, as open() would not."""
    with pytest.raises(SaveError, match="No such file"):
        write_file(tmp_path / "absent" / "x.pt", _writes(b"1"))


def test_file_and_folder_beside_each_other_clear_away_only_their_own(tmp_path: Path) -> None:
    """The leftover of a killed writer of a file is removed by the next writer of that file."""
    leftover = tmp_path / ".x.pt.0123456789abcdef.new.tmp"
    leftover.write_bytes(b"half")
    write(tmp_path / "x", {}, {}, "")
    assert leftover.exists()
    write_file(tmp_path / "x.pt", _writes(b"1"))
    assert not leftover.exists()
    assert (tmp_path / "x.pt").read_bytes() == b"1"


def test_checkpoint_tensors_are_plain_safetensors(place: Path) -> None:
    """PEFT and others read the files of tensors without this package."""
    assert equal(safetensors.torch.load_file(place / ADAPTER), contents()[ADAPTER])
    with safetensors.safe_open(place / ADAPTER, "pt") as file:
        assert file.metadata() == {"format": "pt"}
