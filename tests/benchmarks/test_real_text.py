"""The loops on real text and the trainings over seeds: what is compared is the same work, and nothing is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import MPNetConfig, MPNetModel

from tests.benchmarks import upper_layer_table, upper_layers, ways
from tests.benchmarks.real_text import Loops, shuffled
from tests.benchmarks.text_tasks import Tagged, Task, classification, tagging
from tests.benchmarks.trainings import kept, lacking, lead, run
from tests.support import tiny

WORDS = ["a", "bb", "ab", "ba", "aaab", "aba"]


def _task(name: str) -> Task:
    """Return a task of six sentences of one to six words, some of which are cut into several subtokens."""
    make = classification if name == "SST-2" else tagging
    pool: list[Tagged] = []
    for count in (1, 6, 2, 5, 3, 4):
        labels = ["x", "y", "x", "y", "x", "y"][: 1 if name == "SST-2" else count]
        pool.append((WORDS[:count], labels if count % 2 else labels[::-1]))
    pool[-1][1][-1] = "y"
    return make(pool, [], [])


@pytest.fixture(params=["SST-2", "UD-EWT"])
def loops(request: pytest.FixtureRequest, tmp_path: Path) -> Loops:
    base = tiny.build("bert", tmp_path / "base")
    return Loops(request.param, _task(request.param), str(base), device=torch.device("cpu"))


def test_loops_on_a_ragged_batch_have_the_same_loss_and_gradients(loops: Loops) -> None:
    """Flair and the bare loop do the same work, so that their times can be compared."""
    loops.check(loops.task.pool)


def test_loops_that_read_something_else_are_refused(loops: Loops) -> None:
    """A bare loop that labels other vectors than Flair is not timed."""
    pool = loops.bare.pool
    loops.bare.pool = lambda states, encoded: pool(states.roll(1, dims=1), encoded) + 0.01 * states.std()
    with pytest.raises(AssertionError, match="not close"):
        loops.check(loops.task.pool)


def test_loops_step_changes_the_adapter_and_the_head_of_each_way(loops: Loops) -> None:
    """What is timed is a training: both models move, and the base stays."""
    for name, step in loops.steps(loops.task.pool).items():
        model = (loops.bare if name == "bare" else loops.ours).train()
        before = {key: value.clone() for key, value in model.named_parameters()}
        step()
        changed = {key for key, value in model.named_parameters() if not torch.equal(before[key], value)}
        assert any("lora_A" in key for key in changed), name
        assert any("lora" not in key for key in changed), name
        assert all("lora" in key or key.startswith(("head", "decoder", "linear")) for key in changed), name
    # Dropout had them train apart; the next batch size is checked and timed from equal weights again.
    loops.check(loops.task.pool)


def test_shuffled_batches_are_whole_and_in_no_order_of_length() -> None:
    """Sentences are drawn without repetition; what is left over is no batch."""
    pool: list[Tagged] = [(["a"] * count, ["x"]) for count in range(1, 12)]
    batches = shuffled(pool, 4)
    lengths = [len(words) for batch in batches for words, _ in batch]
    assert [len(batch) for batch in batches] == [4, 4]
    assert len(set(lengths)) == 8
    assert lengths != sorted(lengths)


def _number(plan: dict[str, Any]) -> dict[str, Any]:
    return {**plan, "score": plan["seed"] / 10}


def test_trainings_that_are_done_are_not_done_again_unless_settings_changed(tmp_path: Path) -> None:
    """A command that was stopped goes on, and records of other settings are not mixed in."""
    runs = tmp_path / "runs.jsonl"
    plans = [{"seed": seed, "settings": {"epochs": 2}} for seed in (1, 2, 3)]
    records: list[dict[str, Any]] = []
    run(_number, plans[:2], records, runs, workers=1)
    assert kept(runs, {"epochs": 2}) == records == [_number(plan) for plan in plans[:2]]
    assert lacking(plans, records) == plans[2:]
    assert kept(runs, {"epochs": 3}) == []


def test_lead_over_paired_seeds_has_the_interval_of_students_t() -> None:
    """Three differences of mean 2 and deviation 1: half the interval is 4.303 / √3."""
    found = lead([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert found["mean"] == 2.0
    assert found["high"] - found["mean"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert found["mean"] - found["low"] == pytest.approx(4.3027 / 3**0.5, rel=1e-4)


def test_upper_layers_have_as_many_weights_on_them_alone() -> None:
    """The rank makes up for the layers; neither the layers below nor the pooler have an adapter."""
    config = MPNetConfig(hidden_size=8, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32, vocab_size=9)
    counts = set()
    for count in upper_layer_table.COUNTS:
        (adapter,) = ways.upper(count).options().values()
        model = get_peft_model(MPNetModel(config), adapter)
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        layers = {int(name.split(".layer.")[1].split(".")[0]) for name in names}
        assert layers == set(range(12 - count, 12))
        assert not any("pooler" in name for name in names)
        assert len(names) == 2 * 6 * count
        counts.add(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    assert len(counts) == 1


def _records(*seeds: int, **changes: float) -> list[dict[str, Any]]:
    """Return trainings with these seeds: a layer less costs a tenth of a point, and a second of thirty."""
    return [
        {
            "task": task,
            "layers": count,
            "seed": seed,
            "score": 0.9 - (12 - count) * 0.001 + seed / 100,
            "seconds": 30.0 - (12 - count),
            "trained": 1000,
            "parameters": 10_000,
            **changes,
        }
        for seed in seeds
        for task in upper_layers.TASKS
        for count in upper_layer_table.COUNTS
    ]


def test_upper_layers_rows_are_of_seeds_that_all_ways_have() -> None:
    """A seed that is not finished does not move the figures of some ways alone; one seed has no spread."""
    (first, *_) = upper_layers.rows(_records(1))
    assert (first["seeds"], upper_layer_table.spread(first["scores"], ".1f")) == (1, "91.0")
    found = upper_layers.rows(_records(1, 2, 3)[:-1])
    assert [row["seeds"] for row in found] == [3] * 4 + [2] * 4
    (last,) = (row for row in found if (row["task"], row["layers"]) == ("UD-EWT", 4))
    assert last["differences"] == pytest.approx([-0.8, -0.8])
    assert last["ratio"] == pytest.approx(22 / 30)
    assert upper_layers.rows([]) == []


def test_upper_layers_page_names_a_training_that_came_to_nothing_and_the_median_stands() -> None:
    """One training of three that does not learn is said, and is not averaged with the others."""
    records = _records(1, 2, 3)
    records[-4]["score"] = 0.14
    rows = upper_layers.rows(records)
    assert upper_layer_table.collapsed({"rows": rows}).startswith(" 1 of 24 trainings")
    assert upper_layer_table.collapsed({"rows": rows}).endswith(": one on UD-EWT with all 12 layers, at 14.0 %.")
    (eight,) = (row for row in rows if (row["task"], row["layers"]) == ("UD-EWT", 8))
    assert upper_layer_table.difference(eight) == "-0.4 (-0.4 to +78.6)"


def test_upper_layers_rows_of_ways_that_train_more_weights_are_refused() -> None:
    """Ways are compared at the same number of trained weights."""
    records = _records(1)
    records[1]["trained"] = 1011
    with pytest.raises(AssertionError):
        upper_layers.rows(records)


@pytest.mark.parametrize(("below", "expected"), [(0.5, [8]), (0.1, [])])
def test_upper_layers_verdict_wants_points_and_time_on_both_texts(below: float, expected: list[int]) -> None:
    """Upper 8 lose 0.4 points, within what is allowed; it is worth a cache only where that halves the time."""
    step = {"median": 0.9, "low": 0.9, "high": 0.9}
    timed = {
        task: [
            {"layers": count, "step": step, "below": {"median": below, "low": below, "high": below}}
            for count in upper_layer_table.COUNTS
        ]
        for task in upper_layers.TASKS
    }
    rows = upper_layers.rows(_records(1, 2))
    assert upper_layer_table.verdict(rows, timed) == expected
    heading = {"date": "2026-01-01", "machine": "a machine", "versions": "some", "pairs": 21}
    settings = {"sentences": 640, "epochs": 2, "batch": 8, "rate": 1e-3, "head_rate": 1e-2, "test": 600}
    page = upper_layer_table.to_markdown({**heading, "settings": settings, "rows": rows, "steps": timed})
    assert "| SST-2 | upper 8 | 24 | 2 | 91.1 (90.6 to 91.6) | -0.4 (-0.4 to -0.4) |" in page
    assert "came to nothing" not in page
    assert f"below the adapters: {'upper 8' if expected else 'no depth'}." in page
