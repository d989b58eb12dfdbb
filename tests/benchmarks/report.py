"""What the benchmarks have in common: times and their ratios, processes that print JSON, reports."""

from __future__ import annotations

import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flair_peft.compat import versions

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "resources" / "benchmarks"


def heading(*notes: str, **versions_of_others: str) -> dict[str, str]:
    """Return what every report starts with: the date, the machine with what is to be noted of it, and the versions."""
    found = versions() | versions_of_others
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": ", ".join([machine(), *notes]),
        "versions": ", ".join(f"{name} {version}" for name, version in found.items()),
    }


def machine() -> str:
    """Return the processor, the number of its cores, and the memory."""
    gibibytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor()}, {os.cpu_count()} CPU cores, {gibibytes:.0f} GiB"


def processor() -> str:
    """Return the name of the processor, or its architecture where the system does not tell."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def in_process(module: str, *arguments: object) -> Any:
    """Return what a module of this project prints last, in JSON, in a process of its own.

    Raises:
        RuntimeError: the process failed; the message has the end of what it said.
    """
    command = [sys.executable, "-m", module, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def ratio(these: Sequence[float], those: Sequence[float]) -> dict[str, float]:
    """Return the median of the paired ratios with the 95 % interval of 2,000 bootstrap samples."""
    pairs = [a / b for a, b in zip(these, those, strict=True)]
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(pairs, k=len(pairs))) for _ in range(2000))
    return {"median": statistics.median(pairs), "low": medians[50], "high": medians[1949]}


def write(name: str, report: dict[str, Any], page: str, *, out: Path) -> None:
    """Write a report as ``NAME.json`` and ``NAME.md``, and print the page."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (out / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)
