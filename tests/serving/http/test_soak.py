"""A service in a process of its own, under the load of the long soak, for seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks import serving_soak


@pytest.mark.matrix
def test_service_under_load_gives_no_wrong_answer_and_leaves_nobody_without_one(tmp_path: Path) -> None:
    """With loads and unloads, lost and hostile clients, and a restart; the log has no traceback."""
    soak = serving_soak.prepare(tmp_path)
    soak.run(20, restarts=1)
    assert not soak.problems
    seen = ("answers compared", "loads", "went away", "refused as malformed", "refused as too long", "restarts")
    assert all(soak.counted[what] for what in seen), soak.counted


def test_soak_sees_answers_that_differ() -> None:
    """The comparison has an object: another label, position, score or number of spans is another answer."""
    span = {"entity_group": "PER", "score": 0.5, "word": "Ann", "start": 0, "end": 3}
    assert serving_soak.is_same([span], [{**span, "score": 0.5001}])
    for other in ({"entity_group": "LOC"}, {"score": 0.6}, {"start": 1}, {"word": "Anna"}):
        assert not serving_soak.is_same([span], [{**span, **other}])
    assert not serving_soak.is_same([span, span], [span])
    assert not serving_soak.is_same({"error": "…"}, [span])
