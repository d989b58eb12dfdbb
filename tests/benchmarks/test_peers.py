"""The comparison with other libraries: what it refuses, and that it runs. The figures are not looked at."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from tests.benchmarks import peer_rows, peers
from tests.benchmarks.__main__ import BENCHMARKS, write_index
from tests.benchmarks.report import ROOT
from tests.benchmarks.workers.process import WORKERS


def _pins(path: Path) -> dict[str, str]:
    """Return the exact versions that a list of requirements names."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and line[0] not in "#-"]
    wanted = [Requirement(line) for line in lines]
    assert all(str(each.specifier).startswith("==") for each in wanted)
    return {each.name: str(each.specifier) for each in wanted}


@pytest.mark.parametrize("name", peer_rows.PEERS)
def test_peers_environment_of_each_library_has_exact_versions_and_the_same_torch(name: str) -> None:
    """Every list names exact versions, and no library is measured on another torch than the rest."""
    held, pins = _pins(ROOT / "resources" / "constraints.txt"), _pins(WORKERS / f"{name}.txt")
    assert pins["torch"] == held["torch"]
    # sentence-transformers stands on another major version of transformers than Flair 0.15.1 can.
    if name != "by_sentence_transformers":
        assert {library: pins[library] for library in pins.keys() & held.keys()}.items() <= held.items()


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("by_peft", {"adapter": 0.0, "base": 0.0, "head": 1.0}, "does not change the adapter"),
        ("by_peft", {"adapter": 1.0, "base": 0.1, "head": 1.0}, "changes the base"),
        ("by_flair", {"adapter": 0.0, "base": 0.0, "head": 1.0}, "does not change the model"),
        ("by_adapters", {"adapter": 1.0, "base": 0.0, "head": 0.0}, "does not change the head"),
    ],
)
def test_peers_step_that_trains_something_else_is_refused(name: str, changes: dict[str, float], message: str) -> None:
    """A loop that leaves the adapter alone, or trains the base below it, is not timed."""
    with pytest.raises(AssertionError, match=message):
        peers.check_changes(name, changes)


def test_peers_scores_that_differ_are_refused() -> None:
    """A library that predicts something else is not timed."""
    with pytest.raises(AssertionError, match="by_peft as loaded: predicts something else"):
        peers.assert_close([[0.5, 0.5]], [[0.5, 0.501]], "by_peft as loaded")
    peers.assert_close([[0.5, 0.5]], [[0.5, 0.50001]], "by_peft as loaded")


def test_peers_row_that_a_library_cannot_do_has_a_dash_and_a_reason() -> None:
    """No figure stands where nothing was measured; equal reasons share a footnote."""
    runs: peer_rows.Runs = {"mixed": {"by_flair_peft": [2.0, 4.0], "by_peft": [1.0, 2.0]}}
    peer_rows.add(runs, "by_flair", {"mixed": 1.0})
    assert "by_flair" not in runs["mixed"]
    (row,) = peer_rows.summarise(runs)
    assert row["ours / theirs"]["by_peft"]["median"] == 2.0
    report = {
        "date": "2026-01-01",
        "machine": "a machine",
        "shape": "tiny",
        "versions": {name: {} for name in peer_rows.PEERS},
        "devices": {"CPU": [row]},
    }
    page = peer_rows.to_markdown(report)
    assert "| 3 s | – [1] | 1.5 s | – [2] | – [3] |" in page
    assert "1. Each model is a whole one" in page
    assert "3. It was not measured." in page


def test_peers_row_without_the_probe_is_compared_with_loads_that_have_none() -> None:
    """What only this package can leave out is no reason to leave the comparison out."""
    runs: peer_rows.Runs = {
        "load": {"by_flair_peft": [3.0], "by_peft": [2.0]},
        "load_unproven": {"by_flair_peft": [2.0]},
    }
    load, unproven = peer_rows.summarise(runs)
    assert load["ours / theirs"]["by_peft"]["median"] == 1.5
    assert unproven["ours / theirs"]["by_peft"]["median"] == 1.0
    assert unproven["median"] == {"by_flair_peft": 2.0}


def test_peers_worker_that_ends_is_reported_with_what_it_said(tmp_path: Path) -> None:
    """A library that fails ends the comparison with its own words."""
    comparison = peers.Comparison({"by_nobody": Path(sys.executable)}, tmp_path, device="cpu", threads=1)
    with (
        pytest.raises(RuntimeError, match=r"by_nobody ended with 1: (?s:.)*No module named '.*by_nobody'"),
        comparison.worker("by_nobody"),
    ):
        pass


@pytest.mark.matrix
def test_peers_that_are_installed_here_are_compared_in_all_rows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a tiny base: this package, whole models of Flair and PEFT agree, and every row gets its figures."""
    arguments = ["--here", "--shape", "tiny", "--pairs", "1", "--processes", "1", "--out", str(tmp_path)]
    peers.main([*arguments, "--folder", str(tmp_path / "models")])
    report: dict[str, Any] = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    (rows,) = report["devices"].values()
    assert [row["row"] for row in rows] == [name for name in peer_rows.ROWS if not name.endswith("_device")]
    for row in rows:
        assert row["median"].keys() | row["absent"].keys() >= set(peer_rows.HERE)
        assert row["row"] == "each" or all(value > 0 for values in row["values"].values() for value in values)
    assert capsys.readouterr().out == (tmp_path / "peers.md").read_text(encoding="utf-8") + "\n"
    write_index(tmp_path)
    index = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "[peers](peers.md)" in index
    assert "[serving]" not in index


def test_benchmarks_that_the_one_command_names_are_modules_with_a_main() -> None:
    """What ``python -m tests.benchmarks`` starts is there."""
    for name in BENCHMARKS:
        text = (Path(peers.__file__).parent / f"{name}.py").read_text(encoding="utf-8")
        assert "def main(" in text
        assert '"--out"' in text
