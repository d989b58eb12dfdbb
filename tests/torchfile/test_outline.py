"""Opcodes are followed to what a file would become, and nothing of it becomes anything."""

from __future__ import annotations

import contextlib
import pickle
import random
import time
from collections import Counter, OrderedDict, defaultdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Dictionary

from flair_peft.errors import ModelFileError
from flair_peft.torchfile import stand_ins
from flair_peft.torchfile.outline import read_outline, tensors_in
from flair_peft.torchfile.stand_ins import Blob, Made
from tests.support import sparse
from tests.support.files import Payload
from tests.support.selection import few

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def dictionary() -> Dictionary:
    made = Dictionary(add_unk=False)
    for item in ("good", "bäd", "neither\n"):
        made.add_item(item)
    return made


def state() -> dict[str, Any]:
    big = torch.arange(24.0).reshape(4, 6)
    tensors = {str(dtype): torch.arange(-3, 4).to(dtype) for dtype in DTYPES}
    views = {
        "part": big[1:, ::2],
        "turned": big.t(),
        "same": big,
        "none": torch.empty(0, 3),
        "number": torch.tensor(2.5),
    }
    return {
        "state_dict": OrderedDict({**tensors, **views, "parameter": torch.nn.Parameter(torch.ones(2))}),
        "labels": dictionary(),
        "numbers": [0, -1, 255, 70_000, 1 << 40, -(1 << 62), 1.5, True, None],
        "texts": ["", "plain", "ünïcode", "\ud800"],
        "counter": Counter(a=2),
        "ranks": defaultdict(int, {"a": 1}),
        "set": {3},
        "stream": BytesIO(b"x" * 20_000),
        5: (1, (2, (3, ()))),
    }


def save(path: Path, value: Any, protocol: int, *, is_zip: bool = True) -> Path:
    torch.save(value, path, pickle_protocol=protocol, _use_new_zipfile_serialization=is_zip)
    return path


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_outline_of_a_file_holds_what_torch_loads(protocol: int, is_zip: bool, tmp_path: Path) -> None:
    """Names, shapes, dtypes and elements of tensors, and all plain values, are those that torch gives."""
    found = read_outline(save(tmp_path / "x.pt", state(), protocol, is_zip=is_zip))
    loaded = torch.load(tmp_path / "x.pt", weights_only=False)
    assert list(found.value) == list(loaded)
    for name in ("numbers", "texts", "counter", "ranks", 5):
        assert found.value[name] == loaded[name]
    tensors = tensors_in(found.value)
    assert list(tensors) == [f"state_dict/{name}" for name in loaded["state_dict"]]
    for name, tensor in loaded["state_dict"].items():
        ours = tensors[f"state_dict/{name}"]
        assert (ours.shape, f"torch.{ours.dtype}", ours.bytes) == (tensor.shape, str(tensor.dtype), tensor.nbytes)
        assert torch.equal(found.read(ours), tensor.data)
    items = found.value["labels"].state["idx2item"]
    assert [item.decode() for item in items] == loaded["labels"].get_items()


def test_outline_tells_tensors_that_share_their_bytes(tmp_path: Path) -> None:
    """Views of one storage name the same storage."""
    tensors = tensors_in(read_outline(save(tmp_path / "x.pt", state(), 2)).value)
    keys = {tensors[f"state_dict/{name}"].storage.key for name in ("part", "turned", "same")}
    assert len(keys) == 1


def test_outline_of_a_tensor_of_a_dtype_without_a_storage_class_is_right(tmp_path: Path) -> None:
    """torch stores its newer dtypes in another way."""
    value = {"a": torch.arange(4).to(torch.float8_e4m3fn), "b": torch.arange(4).to(torch.uint16)}
    found = read_outline(save(tmp_path / "x.pt", value, 2))
    for name, tensor in tensors_in(found.value).items():
        assert f"torch.{tensor.dtype}" == str(value[name].dtype)
        assert torch.equal(found.read(tensor).float(), value[name].float())


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_outline_of_a_payload_does_not_run_it(is_zip: bool, tmp_path: Path) -> None:
    """What would be called is a name with arguments."""
    marker = tmp_path / "executed"
    path = save(tmp_path / "x.pt", {"state_dict": {"a": Payload(marker)}}, 2, is_zip=is_zip)
    made = read_outline(path).value["state_dict"]["a"]
    assert isinstance(made, Made)
    assert made.name in ("posix.mkdir", "nt.mkdir")
    assert made.arguments == (str(marker),)
    assert not marker.exists()


def test_outline_of_long_bytes_is_their_length(tmp_path: Path) -> None:
    """A tokenizer is not copied around."""
    made = read_outline(save(tmp_path / "x.pt", {"a": b"x" * 1_000_000}, 4)).value
    assert isinstance(made["a"], Blob)
    assert made["a"].length == 1_000_000


def _check(path: Path) -> None:
    """Read a hostile file: it is refused in this package's words, or is an outline; both soon."""
    start = time.process_time()
    try:
        found = read_outline(path)
        tensors = tensors_in(found.value)
    except ModelFileError:
        tensors = {}
    for tensor in tensors.values():
        with contextlib.suppress(ModelFileError):
            found.read(tensor)
    assert time.process_time() - start < 20


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_outline_of_a_truncated_file_is_refused(is_zip: bool, tmp_path: Path) -> None:
    """At no place of the file does a cut go unnoticed."""
    content = save(tmp_path / "x.pt", state(), 2, is_zip=is_zip).read_bytes()
    cut = tmp_path / "cut.pt"
    for size in [0, 1, 3, 4, 30, *range(100, len(content), max(1, len(content) // 40)), len(content) - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ModelFileError, match=r"cut\.pt"):
            read_outline(cut)


@pytest.mark.parametrize("is_zip", [True, False], ids=["zip", "old"])
def test_outline_of_changed_bytes_is_refused_or_read(is_zip: bool, tmp_path: Path) -> None:
    """Whatever stands in the pickle, nothing but this package's error leaves the reader."""
    content = save(tmp_path / "x.pt", state(), 2, is_zip=is_zip).read_bytes()
    draw, changed = random.Random(0), tmp_path / "changed.pt"
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(draw.choice((1, 3, 30))):
            damaged[draw.randrange(min(len(damaged), 4_000))] = draw.randrange(256)
        changed.write_bytes(damaged)
        _check(changed)


def test_outline_of_random_bytes_is_refused(tmp_path: Path) -> None:
    """Neither as a zip file nor as a pickle."""
    draw = random.Random(1)
    for start in (b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04\x95"):
        for _ in range(50):
            (tmp_path / "x.pt").write_bytes(start + draw.randbytes(draw.randrange(2, 500)))
            _check(tmp_path / "x.pt")


def nested(levels: int) -> bytes:
    """Return a pickle of tuples of which each holds the next twice: 2 ** levels values in a few bytes."""
    return b"\x80\x02)" + b"q\x00h\x00\x86" * levels + b"."


HOSTILE = {
    "doubling": nested(5_000),
    "doubling as a key": b"\x80\x02}" + nested(500)[2:-1] + b"K\x01s.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "deep": b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".",
    "deep dictionaries": b"\x80\x02" + b"}X\x01\x00\x00\x00a" * 100_000 + b"N" + b"s" * 100_000 + b".",
    "marks": b"\x80\x02" + b"(" * 1_000_000 + b"N.",
    "flood": b"\x80\x02" + b"]" * 5_000_000 + b".",
    "long number": b"\x80\x02\x8b" + (1 << 20).to_bytes(4, "little") + b"\xff" * (1 << 20) + b".",
    "long number in text": b"\x80\x02L" + b"9" * 1_000_000 + b"L\n.",
    "far memo": b"\x80\x02Nr\xff\xff\xff\xffj\xff\xff\xff\xff.",
    "empty stack": b"\x80\x02.",
    "no call": b"\x80\x02NNR.",
    "made of nothing": b"\x80\x02cos\nsystem\nN\x81.",
    "pop": b"\x80\x0200.",
    "instance": b"\x80\x02(ios\nsystem\n.",
    "text of one pickle, often": b"\x80\x02]X\x10\x27\x00\x00" + b"a" * 10_000 + b"q\x00" + b"h\x00" * 100_000 + b".",
}


@pytest.mark.parametrize("name", few(HOSTILE, HOSTILE.keys() - {"flood"}))
def test_outline_of_a_hostile_pickle_is_refused_or_read_soon(name: str, tmp_path: Path) -> None:
    """A few bytes that unfold to very much, and calls of nothing, take neither time nor memory."""
    (tmp_path / "x.pt").write_bytes(HOSTILE[name])
    _check(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"offset": 5},
        {"offset": -1},
        {"size": (1 << 40, 1 << 40)},
        {"stride": (1 << 30,)},
        {"size": (2.5,)},
        {"size": (2, 2)},
        {"size": (-1,)},
    ],
    ids=str,
)
def test_outline_of_a_tensor_larger_than_its_storage_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    """No file makes the reader look beyond the bytes of a storage."""
    settings = {"offset": 0, "size": (4,), "stride": (1,), **change}

    class Odd(sparse.Hole):
        def __reduce__(self) -> Any:
            return torch._utils._rebuild_tensor_v2, (sparse._Storage(self), *settings.values(), False, None)

    hole = Odd("0", 4)
    sparse.write_zip(tmp_path / "x.pt", {"a": hole}, [hole])
    with pytest.raises(ModelFileError, match="tensor"):
        read_outline(tmp_path / "x.pt")


def test_outline_of_tensors_without_their_bytes_refuses_to_read_them(tmp_path: Path) -> None:
    """A file that lacks a storage is noticed when the storage is asked for."""
    hole = sparse.Hole("0", 4)
    sparse.write_zip(tmp_path / "x.pt", {"a": hole}, [])
    found = read_outline(tmp_path / "x.pt")
    with pytest.raises(ModelFileError, match="not all there"):
        found.read(tensors_in(found.value)["a"])


def test_tensors_of_more_names_than_any_model_are_refused() -> None:
    """The same tensor under ever longer names does not fill the memory."""
    tensor = stand_ins.Tensor(stand_ins.Storage("torch.FloatStorage", "0", 1), "float32", 0, (1,), (1,))
    with pytest.raises(ModelFileError, match="more tensors"):
        tensors_in([tensor] * 200_000)
    with pytest.raises(ModelFileError, match="longer than any"):
        tensors_in({"a" * 5_000: tensor})


def test_outline_of_a_plain_pickle_is_its_value(tmp_path: Path) -> None:
    """A pickle that torch did not write is followed too."""
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": [1, "b"]}))
    assert read_outline(tmp_path / "x.pkl").value == {"a": [1, "b"]}


def test_dtypes_by_name_have_the_sizes_of_torch() -> None:
    """The table says of each dtype of this torch what torch says."""
    dtypes = {str(value): value.itemsize for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert dtypes == {f"torch.{name}": size for name, size in stand_ins.ITEM_BYTES.items() if f"torch.{name}" in dtypes}
