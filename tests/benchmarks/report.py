"""What the benchmarks have in common: where results go, what machine they are of, ratios of paired values."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "resources" / "benchmarks"


def today() -> str:
    """Return the date as it stands in reports."""
    return time.strftime("%Y-%m-%d")


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def total_memory() -> int:
    """Return the memory of this machine, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def ratio(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """Return the median of the paired ratios with the 95 % interval of 2,000 bootstrap samples."""
    pairs = [a / b for a, b in zip(these, those, strict=False)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {"median": statistics.median(pairs), "low": medians[50], "high": medians[1949]}


def write(name: str, report: dict[str, Any], page: str, *, out: Path) -> None:
    """Write a report as ``NAME.json`` and ``NAME.md``, and print the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
