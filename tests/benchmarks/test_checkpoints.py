"""A report of checkpoints keeps what was measured of other shapes, and says of each when and where."""

from __future__ import annotations

from typing import Any

from tests.benchmarks import checkpoints


def _rows(shape: str, median: float) -> list[dict[str, Any]]:
    numbers = {"median": median, "low": median, "high": median, "wanted": None}
    return [{"shape": shape, "what": "time", **numbers}, {"shape": shape, "figures": {"seconds": {"load": median}}}]


def test_shape_that_is_measured_again_leaves_the_others_as_they_were() -> None:
    """A run of hours can be stopped, and gone on with on another day and machine."""
    report = checkpoints.renewed({}, "small", _rows("small", 1.0), pairs=3)
    report = checkpoints.renewed(report, "large", _rows("large", 2.0), pairs=3)
    report["measured"]["large"] = {**report["measured"]["large"], "date": "2001-02-03"}
    report = checkpoints.renewed(report, "small", _rows("small", 4.0), pairs=21)
    assert [row["median"] for row in report["rows"] if "median" in row] == [2.0, 4.0]
    small, large = checkpoints.to_markdown(report).split("## ")[1:]
    assert small.startswith("small\n")
    assert "21 pairs" in small
    assert "| time | 4.00 |" in small
    assert "seconds: load 4 s" in small
    assert "2001-02-03" in large
    assert "3 pairs" in large
    assert "| time | 2.00 |" in large
