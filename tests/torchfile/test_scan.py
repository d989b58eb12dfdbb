"""Reading what a torch file holds, without loading it."""

from __future__ import annotations

import datetime
import io
import os.path
import pickle
import random
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary

from flair_peft.errors import FlairPeftError, ModelFileError
from flair_peft.torchfile.scan import UNRESOLVED, is_zip, read_contents, stored_members

KEY = "embeddings.model.base_model.model.encoder.layer.0.attention.self.query.lora_A.default.weight"

OBJECTS: dict[str, Any] = {
    "values": {"a": [1, 2.5, None, True, b"x", "y", (1,), {2}, frozenset({3}), 10**50, -(10**400)]},
    "instances": [Dictionary(), Dictionary(), Counter("abc"), OrderedDict(a=1), Path("a/b")],
    "functions": [os.path.join, os.path.join, Dictionary.load_from_file, datetime.datetime.now, len],
    "classes": [Dictionary, datetime.date, datetime.datetime(2024, 1, 1), datetime.timezone.utc],
    "many strings": [f"{number}.{'x' * number}" for number in range(600)] + [os.path.split, Counter],
    "tensors": OrderedDict({KEY: torch.zeros(3, 4), "b": torch.nn.Linear(2, 2)}),
}


def named_by(data: bytes) -> set[str]:
    """Return what Python's own unpickler asks for."""
    asked: set[str] = set()

    class Recorder(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.add(f"{module}.{name}")
            return super().find_class(module, name)

    Recorder(io.BytesIO(data)).load()
    return asked


@pytest.mark.parametrize("dumps", [pickle.dumps, pickle._dumps], ids=["C", "Python"])
@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("name", OBJECTS)
def test_globals_are_what_pickle_itself_asks_for(
    name: str, protocol: int, dumps: Callable[..., bytes], tmp_path: Path
) -> None:
    """In every protocol, by either pickler, the names are exactly those that unpickling looks up."""
    data, path = dumps(OBJECTS[name], protocol), tmp_path / "x.pkl"
    path.write_bytes(data)
    contents = read_contents(path)
    assert contents.globals == named_by(data)
    assert contents.is_whole
    assert contents.marks == ({KEY} if name == "tensors" else set())


@pytest.mark.parametrize("layout", ["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_torch_file_is_read_to_its_end_and_no_further(protocol: int, layout: str, tmp_path: Path) -> None:
    """In both layouts everything is named that loading needs; bytes of tensors are not taken for opcodes."""
    path = tmp_path / "x.pt"
    state = {"state_dict": {KEY: torch.full((500,), 0x63, dtype=torch.uint8)}, "labels": Dictionary()}
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=layout == "zip")
    contents = read_contents(path)
    assert is_zip(path) == (layout == "zip")
    assert contents.globals == {
        "collections.OrderedDict",
        "flair.data.Dictionary",
        "torch.ByteStorage",
        "torch._utils._rebuild_tensor_v2",
        *(["_codecs.encode"] if protocol == 2 else []),
    }
    assert (contents.marks, contents.is_whole) == ({KEY}, True)


def has_marks(path: Path) -> bool:
    """Return whether the pickles of a file hold a word that tells of an adapter."""
    contents = read_contents(path)
    return contents is not None and bool(contents.marks)


HELD: list[tuple[Any, bool]] = [
    ({"state_dict": {KEY: 1}}, True),
    ({"a": [{"b": ("x", KEY)}]}, True),
    ({"embeddings": {"peft_config": None}}, True),
    ({"state_dict": {"embeddings.model.encoder.weight": 1}}, False),
    ({"words": ["lora_A", "base_layer", "peft", "peft_configs", "x.y", "ä.ö"]}, False),
    ({"text": f"The key {KEY[:40]} is a key."}, False),
    (None, False),
]


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize(("value", "expected"), HELD)
def test_marks_tell_files_with_adapters_from_those_without(
    value: Any, expected: bool, protocol: int, tmp_path: Path
) -> None:
    """A key of an adapter tensor or of a config, anywhere in any protocol; nothing that merely looks like it."""
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    assert has_marks(path) is expected
    torch.save(value, path, pickle_protocol=max(protocol, 1))
    assert has_marks(path) is expected


def written(content: bytes, directory: Path) -> Path:
    path = directory / "x.pkl"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"\x8c\x01a\x8c\x01b\x93.", "a.b"),
        (b"\x8c\x01a\x94\x8c\x01b\x94\x930h\x00h\x01\x93.", "a.b"),
        (b"X\x01\x00\x00\x00a\x95\x00\x00\x00\x00\x00\x00\x00\x00\x8d\x01\x00\x00\x00\x00\x00\x00\x00b\x93.", "a.b"),
        (b"ca b\nc\n.", "a b.c"),
        (b"(ia\nb\n.", "a.b"),
        (b"\x82\x01.", UNRESOLVED),
        (b"\x84\x01\x00\x00\x00.", UNRESOLVED),
        (b"\x93.", UNRESOLVED),
        (b"\x8c\x01a\x93.", UNRESOLVED),
        (b"\x8c\x01aN0\x8c\x01b\x93.", UNRESOLVED),
        (b"\x8c\x01a(\x8c\x01b\x93.", UNRESOLVED),
        (b"\x8c\x01a2\x93.", UNRESOLVED),
        (b"\x8c\x01aq\x000\x8c\x01bh\x00\x93.", UNRESOLVED),
        (b"\x8c\x01a\x94\x8c\x01bh\x05\x93.", UNRESOLVED),
        (b"\x8c\x01a\x94\x8c\x01bq\x00h\x00\x93.", UNRESOLVED),
        (b"U\x01aU\x01b\x93.", UNRESOLVED),
        (b"\x8c\x01aVb\n\x93.", UNRESOLVED),
        (b"c" + b"a" * 3000 + b"\nb\n.", UNRESOLVED),
        (b"X\x00\x10\x00\x00" + b"a" * 4096 + b"\x8c\x01b\x93.", UNRESOLVED),
    ],
)
def test_name_that_cannot_be_known_is_unresolved(content: bytes, expected: str, tmp_path: Path) -> None:
    """Names are read where they stand, or in the memo that every pickler keeps; the rest is not guessed."""
    contents = read_contents(written(content, tmp_path))
    assert expected in contents.globals
    assert contents.is_whole


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"\x80", b"\x80\x04", b"\xff", b"\x8c", b"\x8c\x05ab", b"X\xff\xff\xff\x7f", b"T\xff\xff\xff\xff."),
        *(b"ca\n", b"ca\nb", b"\x8e" + b"\xff" * 8, b"\x95\x00", b"(" * 1000, b"I1", b"hello\n"),
        b"\x8b\x00\x00\x00\x80.",
    ],
    ids=repr,
)
def test_pickle_without_an_end_is_not_whole(content: bytes, tmp_path: Path) -> None:
    """Where the bytes end or mean nothing, reading stops."""
    contents = read_contents(written(content, tmp_path))
    assert contents is None if content == b"" else not contents.is_whole
    assert not has_marks(tmp_path / "x.pkl")


def test_reading_noise_and_damage_raises_only_errors_of_this_package(tmp_path: Path) -> None:
    """Five hundred damaged files, of all layouts, are read or refused, and never crash."""
    chance, path, messages = random.Random(0), tmp_path / "x.pt", []
    originals = [pickle.dumps(OBJECTS["tensors"], 2), pickle.dumps(OBJECTS["values"], 0)]
    for is_zipped in (True, False):
        torch.save({"state_dict": {KEY: torch.zeros(3)}}, path, _use_new_zipfile_serialization=is_zipped)
        originals.append(path.read_bytes())
    for number in range(500):
        damaged = bytearray(chance.choice(originals))
        for _ in range(chance.choice((1, 2, 20))):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged if number % 3 else damaged[: chance.randrange(len(damaged))])
        for read in (read_contents, stored_members):
            try:
                read(path)
            except FlairPeftError as error:
                messages.append(str(error))
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + b"]\x94" * 500_000 + b".",
        b"\x80\x04" + b"".join(b"c%d\na\n0" % number for number in range(100_000)) + b"N.",
        b"\x8c\x03a.b\x94" * 200_000 + b".",
        b"X" + struct.pack("<I", 10**7) + b"lora_A." * (10**7 // 7) + b"x" * (10**7 % 7) + b".",
        b"V" * 10**6,
        b"(I1\n" * 10**5,
    ],
    ids=["memo", "names", "strings", "long string", "lines without end", "marks"],
)
def test_reading_many_opcodes_takes_bounded_time(content: bytes, tmp_path: Path) -> None:
    """Nothing in a file makes reading slower than its length, or holds on to more than the names in it."""
    path, start = written(content, tmp_path), time.perf_counter()
    contents = read_contents(path)
    assert time.perf_counter() - start < 5
    assert len(contents.globals) <= 10_001


def test_pickle_that_unpacks_to_more_than_memory_is_refused(tmp_path: Path) -> None:
    """The size that a member claims is judged before anything is unpacked, and no more than that is unpacked."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\x80\x04" + bytes(3_000_000))
    content = bytearray(path.read_bytes())
    place = content.rindex(struct.pack("<I", 3_000_002))
    content[place : place + 4] = struct.pack("<I", 0x7FFFFFFF)
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match="unpack to 2147483647 bytes"):
        read_contents(path)
    content[place : place + 4] = struct.pack("<I", 100)
    path.write_bytes(content)
    with pytest.raises(ModelFileError):
        read_contents(path)


def test_zip_of_another_program_is_read_too(tmp_path: Path) -> None:
    """A file without adapters may have been packed again; it is Flair's business, not refused here."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({KEY: Counter()}, 4))
        archive.writestr("x/more.pkl", pickle.dumps(Path("a"), 4))
        archive.writestr("x/text.txt", pickle.dumps(Dictionary(), 4))
    contents = read_contents(path)
    assert contents.globals == {"collections.Counter", f"{type(Path()).__module__}.{type(Path()).__name__}"}
    assert contents.marks == {KEY}


def test_zip_without_a_pickle_holds_nothing(tmp_path: Path) -> None:
    """There is nothing to read in it."""
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "x")
    assert read_contents(path) is None


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Return a file of torch's own making."""
    path = tmp_path / "x.pt"
    torch.save({"state_dict": {KEY: torch.arange(100.0), "b": torch.ones(3), "empty": torch.empty(0)}}, path)
    return path


def test_stored_members_are_the_bytes_that_torch_reads(archive: Path) -> None:
    """Names, places and checksums are those of torch's reader and of Python's."""
    content, reader = archive.read_bytes(), torch._C.PyTorchFileReader(str(archive))
    members = stored_members(archive)
    assert {member.name for member in members} == {f"x/{name}" for name in reader.get_all_records()}
    with zipfile.ZipFile(archive) as listed:
        for member in members:
            name = member.name.removeprefix("x/")
            assert content[member.start : member.stop] == reader.get_record(name) == listed.read(member.name)
            assert member.checksum == listed.getinfo(member.name).CRC
            assert member.start == reader.get_record_offset(name)


def _repacked(change: Callable[[zipfile.ZipFile, zipfile.ZipInfo, bytes], None]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        with zipfile.ZipFile(path) as old:
            members = [(member, old.read(member)) for member in old.infolist()]
        with zipfile.ZipFile(path, "w") as new:
            for member, content in members:
                change(new, member, content)

    return damage


def _changed(find: Callable[[bytes], int], value: bytes) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        place = find(bytes(content))
        content[place : place + len(value)] = value
        path.write_bytes(content)

    return damage


def _entry(content: bytes) -> int:
    return content.index(b"PK\x01\x02")


def _again(new: zipfile.ZipFile, member: zipfile.ZipInfo, content: bytes) -> None:
    new.writestr(member.filename, content)
    if member.filename.endswith("data.pkl"):
        new.writestr(member.filename.replace("data.pkl", "DATA.PKL"), content)


AMBIGUOUS: dict[str, Callable[[Path], None]] = {
    "compressed": _repacked(lambda new, member, content: new.writestr(member.filename, content, zipfile.ZIP_DEFLATED)),
    "two names that differ in case": _repacked(_again),
    "several folders": _repacked(lambda new, member, content: new.writestr(f"{member.CRC}/{member.filename}", content)),
    "something in front": lambda path: path.write_bytes(b"PK\x03\x04" + bytes(60) + path.read_bytes()) and None,
    "something behind": lambda path: path.write_bytes(path.read_bytes() + b"\0") and None,
    "other name in the header": _changed(lambda content: content.index(b"x/data.pkl"), b"x/data.pkm"),
    "other name in the directory": _changed(lambda content: content.rindex(b"x/data.pkl"), b"x/data.pk1"),
    "other method in the header": _changed(lambda content: 8, b"\x08"),
    "other place": _changed(lambda content: _entry(content) + 42, struct.pack("<I", 64)),
    "other size": _changed(lambda content: _entry(content) + 20, struct.pack("<II", 10**6, 10**6)),
    "encrypted": _changed(lambda content: _entry(content) + 8, b"\x09"),
    "fewer entries": _changed(lambda content: len(content) - 76 - 22 + 32, b"\x01"),
    "other directory": _changed(lambda content: len(content) - 76 - 22 + 48, b"\x10"),
    "other locator": _changed(lambda content: len(content) - 22 - 12, b"\x10"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_zip_that_two_readers_may_read_in_two_ways_is_refused(name: str, archive: Path) -> None:
    """What was summed is what torch reads, or the file is not read."""
    AMBIGUOUS[name](archive)
    with pytest.raises(ModelFileError, match="Copy or save it again"):
        stored_members(archive)
