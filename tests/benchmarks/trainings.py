"""Trainings that benchmarks plan, run in processes of their own, and keep in a file of lines to go on from."""

from __future__ import annotations

import json
import math
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

Record = dict[str, Any]
"""The plan of a training with what came out."""


def kept(runs: Path, settings: dict[str, Any]) -> list[Record]:
    """Return the trainings in the file that had these settings."""
    lines = runs.read_text(encoding="utf-8").splitlines() if runs.exists() else []
    return [record for record in map(json.loads, lines) if record["settings"] == settings]


def lacking(plans: Sequence[Record], records: Sequence[Record]) -> list[Record]:
    """Return the plans that no record is of."""
    return [plan for plan in plans if not any(plan.items() <= record.items() for record in records)]


def run(
    one: Callable[[Record], Record], plans: Sequence[Record], records: list[Record], runs: Path, *, workers: int
) -> None:
    """Do the plans, and add what comes out to the records and to the file."""
    # A process of its own for each, with everything imported and one thread.
    with multiprocessing.get_context("fork").Pool(workers, maxtasksperchild=1) as pool:
        for record in pool.imap_unordered(one, plans, chunksize=1):
            records.append(record)
            with runs.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")


def lead(these: Sequence[float], those: Sequence[float]) -> dict[str, Any]:
    """Return by how much these are above those: mean and 95 % interval of Student's t over the pairs, two at least."""
    pairs = [a - b for a, b in zip(these, those, strict=True)]
    half = float(stats.t.ppf(0.975, len(pairs) - 1)) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    mean = statistics.mean(pairs)
    return {"mean": mean, "low": mean - half, "high": mean + half, "pairs": pairs}
