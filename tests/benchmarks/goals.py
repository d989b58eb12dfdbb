"""The goals of speed and memory, each beside what was measured last, and why it was not reached where it was not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Reports = Callable[[str], Mapping[str, Any]]
"""The name of a report → its figures."""


@dataclass(frozen=True)
class Goal:
    """A ratio that is to stay small.

    Attributes:
        what: in words of the README.
        rows: from the reports, the rows with ``median``, ``low``, ``high`` and what is ``wanted`` of all of them.
        why_not: what stands in the way, where a row misses it.
    """

    what: str
    rows: Callable[[Reports], list[Row]]
    why_not: str = ""


def steps(size: int) -> Callable[[Reports], list[Row]]:
    """Return a function to the rows of training steps on real text, in batches of so many sentences."""
    return lambda reports: [
        {**row["ratios"]["cut by length"], "wanted": f"≤ {row['wanted']}"}
        for row in reports("real_text")["steps"]["rows"]
        if row["size"] == size
    ]


def named(report: str, beginning: str, *, shape: str | None = None) -> Callable[[Reports], list[Row]]:
    """Return a function to the rows of a report that begin so, of one shape, and have something wanted of them."""
    return lambda reports: [
        row
        for row in reports(report)["rows"]
        if row.get("what", "").startswith(beginning) and row.get("shape") == shape and row["wanted"]
    ]


GOALS = (
    Goal("training step on real text, batches of 32, beside PEFT's own loop", steps(32)),
    Goal("the same, batches of 16", steps(16)),
    Goal(
        "eight models with adapters on the upper 4 of 12 layers, beside eight predictions",
        named("serving", "8 models, adapters on the upper 4 of 12 layers, on the same 32 sentences"),
    ),
    Goal(
        "32 LoRA models in a batch of 32, beside one; BERT-base's and MiniLM's shape",
        named("serving", "batch of 32 for 32 models / for one"),
        "heads and labels are work for each model, besides the pass that all share, which is short on MiniLM",
    ),
    Goal(
        "a batch for two models, 128 loaded, beside 2 loaded",
        named("serving", "batch of 32 for 2 models, 128 loaded"),
        "one of four is above 1, by a hundredth",
    ),
    Goal(
        "save of a model that was trained on, beside PEFT's adapter alone, both flushed",
        named("saves", "later", shape="bert-base"),
        "most of it is the pass of the transformer by which a load proves itself",
    ),
    Goal(
        "load to the first prediction, proven, beside PEFT's",
        named("checkpoints", "time of load_directory_and_prove", shape="bert-base"),
        "most of it is the proof, one more pass of the transformer",
    ),
    Goal(
        "adding a model to a `SharedBase`, proven, beside PEFT's `load_adapter`",
        named("serving", "adding a model, proven by its probe / PEFT's load_adapter"),
        "the proof is a pass of the transformer, `load_adapter` reads a file",
    ),
    Goal(
        "the same, not proven",
        named("serving", "adding a model, not proven / PEFT's load_adapter"),
        "a model has a tokenizer and a head besides its adapter",
    ),
    Goal("peak memory of a training step, beside a bare loop of PEFT", named("training", "peak memory")),
)


def is_reached(row: Row) -> bool:
    """Whether a ratio is what its report wants it to be: at most a number, or the same."""
    if row["wanted"] == "1 in the interval":
        return bool(row["low"] <= 1 <= row["high"])
    return bool(row["median"] <= float(row["wanted"].removeprefix("≤ ")))


def table(reports: Reports) -> list[str]:
    """Return the lines of the table of all goals: medians, or the least and the greatest of several."""
    lines = ["| | measured | goal | |", "|---|---|---|---|"]
    for goal in GOALS:
        rows = goal.rows(reports)
        [wanted] = {row["wanted"] for row in rows}
        is_so = all(map(is_reached, rows))
        lines.append(f"| {goal.what} | {measured(rows)} | {wanted} | {'✓' if is_so else goal.why_not} |")
    return lines


def measured(rows: Sequence[Row]) -> str:
    """Return the median of one row with its interval, or the least and the greatest median of several."""
    if len(rows) == 1:
        [row] = rows
        return f"{row['median']:.2f} × ({row['low']:.2f} to {row['high']:.2f})"
    medians = [row["median"] for row in rows]
    return f"{min(medians):.2f} to {max(medians):.2f} ×"
