"""Memory that mapped tensors take, and give back."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flair_peft.base import added_rows
from flair_peft.primitives import fingerprint, mapped_memory
from flair_peft.primitives.load_context import LoadOptions, within_load
from flair_peft.primitives.mapped_memory import FilePages


def resident() -> int:
    """Return the bytes of files that this process has in memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssFile"].split()[0]) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_let_go_gives_memory_back_and_keeps_the_values(tmp_path: Path) -> None:
    """Outside of a load that is sparing it does nothing; what was written to a private mapping is kept, too."""
    save_file({"weight": torch.arange(8_000_000, dtype=torch.float64)}, tmp_path / "large.safetensors")
    weight = load_file(tmp_path / "large.safetensors")["weight"]
    expected = float(weight.sum())
    read = resident()
    mapped_memory.let_go(weight)
    assert resident() > read - weight.nbytes / 4
    with within_load(options=LoadOptions(is_sparing=True)):
        mapped_memory.let_go(weight)
        assert resident() < read - weight.nbytes / 2
    assert float(weight.sum()) == expected
    own = torch.ones(1_000_000)
    with within_load(options=LoadOptions(is_sparing=True)):
        mapped_memory.let_go(own)
        mapped_memory.let_go(own[::2])
        mapped_memory.let_go(torch.empty(0))
    assert float(own.sum()) == 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_mean_of_a_mapped_matrix_leaves_it_on_the_disk(tmp_path: Path) -> None:
    """New rows are the mean of all; a matrix in memory of its own is left in it."""
    torch.manual_seed(0)
    own = torch.randn(60_000, 128)
    save_file({"weight": own}, tmp_path / "large.safetensors")
    weight = load_file(tmp_path / "large.safetensors")["weight"]
    assert mapped_memory.is_mapped(weight)
    assert not mapped_memory.is_mapped(own)
    before = resident()
    found = added_rows.mean_row(weight)
    assert resident() < before + weight.nbytes / 4
    torch.testing.assert_close(found, own.mean(dim=0, keepdim=True))
    assert torch.equal(added_rows.mean_row(own), found)
    assert torch.equal(weight, own)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_pages_that_are_read_once_go_with_what_showed_them(tmp_path: Path) -> None:
    """Values are those of the tensors, what was written to them too, and their own pages stay on the disk."""
    save_file({"weight": torch.arange(8_000_000, dtype=torch.float64)}, tmp_path / "large.safetensors")
    weight, own = load_file(tmp_path / "large.safetensors")["weight"], torch.ones(3)
    weight[5] = -1
    before = resident()
    shown = mapped_memory.to_read_once([weight, own])
    assert shown[1] is own
    assert float(shown[0][5]) == -1
    assert float(shown[0].sum()) == 8_000_000 * 7_999_999 / 2 - 6
    assert resident() > before + weight.nbytes / 2
    del shown
    assert resident() < before + weight.nbytes / 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_tensors_are_as_in_files_until_one_is_written_to_or_its_file_goes(tmp_path: Path) -> None:
    """One byte written by address counts, as does a file that was replaced or removed; no other memory is a file's."""
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.arange(100_000.0), "y": torch.ones(3, 5)}, file)
    first, second = (list(load_file(file).values()) for _ in range(2))
    float(first[0].sum())
    assert FilePages().show(first, [file])
    assert not FilePages().show([*first, torch.ones(3)], [file])
    assert not FilePages().show(first, [tmp_path / "another.safetensors"])
    ctypes.memset(mapped_memory.address(first[0]) + 200_000, 7, 1)
    assert not FilePages().show(first, [file])
    assert FilePages().show(second, [file])
    file.unlink()
    assert not FilePages().show(second, [file])


def test_freed_memory_is_given_back() -> None:
    """Nothing that is in use changes."""
    kept = torch.ones(1_000_000)
    mapped_memory.give_back_freed()
    assert float(kept.sum()) == 1_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_map_again_gives_the_same_values_in_pages_that_are_written_apart(tmp_path: Path) -> None:
    """What was written before is there, what is written afterwards is in one of the two, and never in the file."""
    file = tmp_path / "a b.safetensors"
    save_file({"x": torch.arange(100_000.0), "y": torch.ones(3, 5)}, file)
    content = file.read_bytes()
    first = load_file(file)
    first["x"][50_000:50_010] = -1
    second = dict(zip(first, mapped_memory.map_again(list(first.values())), strict=True))
    for name, tensor in first.items():
        again = second[name]
        assert again is not None
        assert torch.equal(again, tensor)
        again.add_(1)
        assert torch.equal(again, tensor + 1)
        tensor.zero_()
        assert again.sum() > 0
    assert file.read_bytes() == content


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_map_again_takes_no_other_file_of_that_name(tmp_path: Path) -> None:
    """A file that was replaced or removed is not mapped again, nor is memory that is no file's."""
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(100_000)}, file)
    first = load_file(file)["x"]
    save_file({"x": torch.zeros(100_000)}, tmp_path / "new")
    (tmp_path / "new").replace(file)
    assert mapped_memory.map_again([first, torch.ones(10), torch.empty(0)]) == [None, None, None]
    file.unlink()
    assert mapped_memory.map_again([first]) == [None]


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
@pytest.mark.parametrize("name", ["a b", "a\rb", "a\u2028b", "a\x85b", "é", "a (deleted)", "0-1 r 0 0:0 1 x"])
def test_mapping_of_a_file_is_found_whatever_its_name(name: str, tmp_path: Path) -> None:
    """Linux lists names as they are, and those of others stand before and behind."""
    save_file({"x": torch.arange(100_000.0)}, tmp_path / name)
    first, other = load_file(tmp_path / name)["x"], torch.ones(100_000)
    assert mapped_memory.is_mapped(first)
    assert not mapped_memory.is_mapped(other)
    assert mapped_memory.is_file_mapped(tmp_path / name)
    [again, no] = mapped_memory.map_again([first, other])
    assert no is None
    assert again is not None
    assert torch.equal(again, first)
    assert mapped_memory.address(again) != mapped_memory.address(first)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_comparer_tells_one_number_that_was_written_to_one_of_two_mappings(tmp_path: Path) -> None:
    """What two tensors show of one file is the same unread; a page that was written to is read, and so is all else."""
    save_file({"x": torch.arange(100_000.0), "y": torch.ones(3, 5)}, tmp_path / "one")
    save_file({"x": torch.arange(100_000.0), "y": torch.zeros(3, 5)}, tmp_path / "two")
    (first, second), other = (load_file(tmp_path / "one") for _ in "ab"), load_file(tmp_path / "two")
    first["x"][7] = 7.0  # as it was

    def are_same(one: torch.Tensor, other: torch.Tensor) -> bool:
        return fingerprint.comparer(FilePages())(one, other)

    assert are_same(first["x"], second["x"])
    assert are_same(first["x"], other["x"])
    assert not are_same(first["y"], other["y"])
    assert not are_same(first["x"][1:], second["x"][:-1])
    assert not are_same(first["x"], second["x"].view(torch.int32))
    for changed in (first["x"], second["x"]):
        changed[60_000] += 1
        assert not are_same(first["x"], second["x"])
        assert not are_same(second["x"], first["x"])
        changed[60_000] -= 1
    assert are_same(first["x"], second["x"])
    assert are_same(first["x"].clone(), second["x"])


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_comparer_reads_nothing_of_what_two_mappings_show_of_a_file(tmp_path: Path) -> None:
    """A model whose base is mapped is saved without reading the base."""
    save_file({"x": torch.zeros(8_000_000)}, tmp_path / "large")
    first, second = (load_file(tmp_path / "large")["x"] for _ in "ab")
    before = resident()
    assert fingerprint.comparer(FilePages())(first, second)
    assert resident() < before + first.nbytes / 4


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_file_pages_say_nothing_of_what_is_mapped_afterwards(tmp_path: Path) -> None:
    """Tensors that were not there yet are read to be compared, and prove nothing of their file."""
    save_file({"x": torch.arange(100_000.0)}, tmp_path / "model")
    pages = FilePages()
    first, second = (load_file(tmp_path / "model")["x"] for _ in "ab")
    assert pages.is_same_part(first, second) is None
    assert fingerprint.comparer(pages)(first, second)
    assert not pages.show([first], [tmp_path / "model"])
    second[7] = 0.0
    assert not fingerprint.comparer(pages)(first, second)


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux")
def test_map_again_gives_room_for_more_rows_where_the_file_goes_on(tmp_path: Path) -> None:
    """The rows behind those of the old tensor are written to alone; where the file ends too early nothing is mapped."""
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(60_000.0).view(-1, 3), "b": torch.ones(2, 3)}, file)
    content, tensors = file.read_bytes(), load_file(file)
    tensors["a"][7] = -1
    [longer] = mapped_memory.map_again([tensors["a"]], more_rows=2)
    assert longer is not None
    longer[len(tensors["a"]) :] = 5
    assert torch.equal(longer, torch.cat([tensors["a"], torch.full((2, 3), 5.0)]))
    assert torch.equal(tensors["b"], torch.ones(2, 3))
    assert mapped_memory.map_again([tensors["a"], tensors["b"]], more_rows=3) == [None, None]
    assert file.read_bytes() == content


def test_place_is_that_of_the_same_elements_in_the_same_memory() -> None:
    """A transposed view lies in the same memory and is another tensor."""
    matrix = torch.arange(9.0).reshape(3, 3)
    place = mapped_memory.place_of(matrix)
    assert place == mapped_memory.place_of(matrix.view(9).view(3, 3))
    others = (matrix.T, matrix.view(9), matrix.view(torch.int32), matrix.clone(), matrix[:2, :2])
    assert all(place != mapped_memory.place_of(other) for other in others)
