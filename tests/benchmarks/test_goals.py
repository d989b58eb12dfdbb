"""The table of the goals says of each what was measured last, and of none that it was reached where it was not."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from tests.benchmarks import goals
from tests.benchmarks.report import RESULTS


def _report(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _row(median: float, **values: Any) -> dict[str, Any]:
    return {"what": "x", "median": median, "low": median - 0.1, "high": median + 0.1, "wanted": "≤ 1", **values}


def _of(rows: list[dict[str, Any]], reports: object) -> list[dict[str, Any]]:
    return rows


@pytest.mark.parametrize("goal", goals.GOALS, ids=lambda goal: goal.what)
def test_every_goal_was_measured_and_says_why_it_was_not_reached(goal: goals.Goal) -> None:
    """A report whose rows have other names now would leave a goal without figures."""
    rows = goal.rows(_report)
    assert rows
    assert all(row["low"] <= row["median"] <= row["high"] for row in rows)
    assert goal.why_not or all(map(goals.is_reached, rows))


def test_rows_are_those_of_the_shape_that_have_something_wanted_of_them() -> None:
    """A ratio that is only told is held against nothing."""
    rows = [
        _row(1.0, shape="a"),
        _row(2.0, shape="b"),
        _row(3.0, shape="a", wanted=None),
        {"shape": "a", "figures": {}},
    ]
    assert goals.named("report", "x", shape="a")(lambda _: {"rows": rows}) == rows[:1]


def test_goal_is_reached_only_if_all_of_its_rows_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """One row stands with its interval, several with the least and the greatest; the same is what 1 may be."""
    same = {"wanted": "1 in the interval"}
    reached, missed = [_row(0.5)], [_row(0.5), _row(1.25)]
    level, apart = [_row(1.05, **same)], [_row(1.05, **same), _row(1.15, **same)]
    rows = {"reached": reached, "missed": missed, "level": level, "apart": apart}
    all_goals = tuple(goals.Goal(name, functools.partial(_of, these), "it is hard") for name, these in rows.items())
    monkeypatch.setattr(goals, "GOALS", all_goals)
    assert goals.table(_report)[2:] == [
        "| reached | 0.50 × (0.40 to 0.60) | ≤ 1 | ✓ |",
        "| missed | 0.50 to 1.25 × | ≤ 1 | it is hard |",
        "| level | 1.05 × (0.95 to 1.15) | 1 in the interval | ✓ |",
        "| apart | 1.05 to 1.15 × | 1 in the interval | it is hard |",
    ]
