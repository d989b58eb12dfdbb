"""The libraries of the comparison, what is measured of them, and the page that says it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from tests.benchmarks.report import ratio

ADAPTERS, MIXED, BATCH, TRAINING_BATCH = 20, 8, 32, 8


class Library(NamedTuple):
    """A library in the comparison."""

    title: str
    has_adapters: bool = True
    kept: int = ADAPTERS
    """How many different checkpoints are made; whole models are large."""


OURS, REFERENCE = "by_flair_peft", "by_peft"
PEERS = {
    OURS: Library("flair_peft"),
    "by_flair": Library("Flair, whole models", has_adapters=False, kept=MIXED),
    REFERENCE: Library("PEFT and transformers"),
    "by_sentence_transformers": Library("sentence-transformers"),
    "by_adapters": Library("adapters (AdapterHub)"),
}
HERE = (OURS, "by_flair", REFERENCE)

_NO_PROOF = "It has no check of what it loads that could be left out."
_NO_MIXING = "Its forward pass knows one adapter at a time."
_WHOLE = "Each model is a whole one; no two of them can share a forward pass."
_INSIDE = "The tokenizer is inside the one file."


class Row(NamedTuple):
    """A line of the comparison: what it is, its unit, who has no figure and why."""

    what: str
    unit: str
    absent: Mapping[str, str] = {}


_OTHERS = [name for name in PEERS if name != OURS]
_UNPROVEN = dict.fromkeys(_OTHERS, _NO_PROOF)
ROWS = {
    "bytes": Row("checkpoint, all files", "MB"),
    "learned": Row("the same without the tokenizer's files", "MB", {"by_flair": _INSIDE}),
    "save": Row("save into a new directory, the first in a process", "s"),
    "save_again": Row("save over that one", "s"),
    "import": Row("import of the library in a new process", "s"),
    "load": Row("load to first prediction in that process", "s"),
    "load_unproven": Row("the same without the probe (`verify=False`)", "s", _UNPROVEN),
    "load_peak": Row("peak memory of that process", "MB"),
    "load_beyond": Row("the same beyond what the imports take", "MB"),
    "load_device": Row("peak memory of the GPU for it", "MB"),
    "step": Row(f"training step, {TRAINING_BATCH} texts", "s"),
    "step_peak": Row("peak memory of the process that trains", "MB"),
    "step_device": Row("peak memory of the GPU for it", "MB"),
    "predict": Row(f"prediction of {BATCH} texts", "s"),
    "resident": Row(f"memory of a process with {ADAPTERS} models, on one base if it can", "MB"),
    "each": Row("memory that each model after the first adds", "MB"),
    "add": Row("adding one of them", "s"),
    "add_unproven": Row("the same without the probe (`verify=False`)", "s", _UNPROVEN),
    "mixed": Row(
        f"{BATCH} texts for {MIXED} models, in one batch",
        "s",
        {"by_flair": _WHOLE, "by_sentence_transformers": _NO_MIXING},
    ),
    "grouped": Row(f"the same, {BATCH // MIXED} texts of a model at a time", "s"),
}

Runs = dict[str, dict[str, list[float]]]
"""Row → peer → values, in the order in which they were measured."""


def empty(*rows: str) -> Runs:
    """Return rows without values."""
    return {row: {} for row in rows}


def add(runs: Runs, name: str, values: Mapping[str, float]) -> None:
    """Add the values of a peer to their rows, in place; a row in which it has no figure stays without."""
    for row, value in values.items():
        if name not in ROWS[row].absent:
            runs[row].setdefault(name, []).append(value)


def summarise(runs: Runs) -> list[dict[str, Any]]:
    """Return for each row with figures the medians of the peers, and the paired ratios of ours to theirs.

    Ours without a probe is compared with what the others do, who have none.
    """
    rows = []
    for row, values in runs.items():
        if not values:
            continue
        mine, others = values.get(OURS, []), runs.get(row.removesuffix("_unproven"), values)
        # In a tiny process, memory that was added can be nothing at all, of which there is no share.
        compared = {name: theirs for name, theirs in others.items() if name != OURS and mine and all(theirs)}
        ratios = {name: ratio(mine, theirs) for name, theirs in compared.items()}
        medians = {name: statistics.median(found) for name, found in values.items()}
        absent = dict(ROWS[row].absent)
        what = {"row": row, "what": ROWS[row].what, "unit": ROWS[row].unit}
        rows.append({**what, "median": medians, "ours / theirs": ratios, "absent": absent, "values": values})
    return rows


def figure(value: float, unit: str) -> str:
    """Return a value in its unit with three digits."""
    value, unit = (value / 1e6, "MB") if unit == "MB" else (value, "s") if value >= 1 else (value * 1e3, "ms")
    return f"{value:,.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Beside other libraries",
        "",
        f"`python -m tests.benchmarks.peers`, {report['date']}, {report['machine']}.",
        f"A base in the shape of {report['shape']} with random weights, fp32, LoRA (r=8, alpha=32) on query and value,",
        "a linear head of two labels on the vector of the first token, texts of 10 to 20 words. All libraries start",
        "from the same adapters and heads; their scores agreed within 1e-4 before anything was timed (Flair's whole",
        "models: with those of base and head alone). Files were warm; the libraries took turns. Figures are medians.",
        "Where a library writes no tokenizer, transformers writes it beside. For texts of a model at a time, adapters",
        "are switched on by the library's own call. Flair's models are whole, each with weights of its own.",
        "",
    ]
    for name, versions in report["versions"].items():
        found = ", ".join(f"{library} {version}" for library, version in versions.items())
        lines.append(f"- {PEERS[name].title}: {found}")
    for device, rows in report["devices"].items():
        lines += ["", f"## {device}", "", *_table(rows, list(report["versions"]))]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[str]:
    notes: list[str] = []
    lines = [f"| | {' | '.join(PEERS[name].title for name in names)} |", f"|---|{'---|' * len(names)}"]
    for row in rows:
        cells = [_cell(row, name, notes) for name in names]
        lines.append(f"| {row['what']} | {' | '.join(cells)} |")
    lines += ["", *(f"{number}. {note}" for number, note in enumerate(notes, 1))]
    others = [name for name in names if name != OURS]
    compared = [row for row in rows if row["ours / theirs"]]
    if not others or not compared:
        return lines
    lines += ["", "flair_peft's share of the others, medians of pairs with 95 % bootstrap intervals:", ""]
    lines += [f"| | pairs | {' | '.join(PEERS[name].title for name in others)} |", f"|---|---|{'---|' * len(others)}"]
    for row in compared:
        ratios = [row["ours / theirs"].get(name) for name in others]
        cells = [_share(found) for found in ratios]
        lines.append(f"| {row['what']} | {len(row['values'][OURS])} | {' | '.join(cells)} |")
    return lines


def _share(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "–"
    is_one = found["low"] == found["high"]
    return f"{found['median']:.2f}" + ("" if is_one else f" ({found['low']:.2f} to {found['high']:.2f})")


def _cell(row: Mapping[str, Any], name: str, notes: list[str]) -> str:
    if name in row["median"]:
        return figure(row["median"][name], row["unit"])
    why = row["absent"].get(name, "It was not measured.")
    if why not in notes:
        notes.append(why)
    return f"– [{notes.index(why) + 1}]"
