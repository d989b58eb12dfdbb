"""The ways to predict faster by name, and the tables of what was measured, for the report and for the documentation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN = "predict, fp32"
ONE_BY_ONE = "one call for each sentence"
UNGROUPED = "without length groups"
STREAM = "predict_stream"
HALF = "bf16 base"
MERGED = "merged"
MERGED_HALF = "merged, bf16"
ONNX = "ONNX"
INT8 = "ONNX, int8"

AFTER = "one predict after the other"
AT_ONCE = "SharedBase.predict"
AFTER_UPPER = "adapters on the upper half of the layers: one predict after the other"
TRUNK = "adapters on the upper half of the layers: SharedBase.predict"


def of_ways(report: Mapping[str, Any]) -> str:
    """Return a table for each base and task: a row for each way, its speed and what it costs."""
    tables = [
        [f"**{base}, {task}**", "", *_table(those, "accuracy")]
        for base, found in report["bases"].items()
        for task, those in found["tasks"].items()
    ]
    return "\n\n".join("\n".join(lines) for lines in tables)


def of_several(report: Mapping[str, Any]) -> str:
    """Return a table for each base: four models on one text."""
    tables = [[f"**{base}**", "", *_table(found["several"])] for base, found in report["bases"].items()]
    return "\n\n".join("\n".join(lines) for lines in tables if len(lines) > 4)


def _table(rows: list[dict[str, Any]], *more: str) -> list[str]:
    header = ["", "sentences/s", "speed", "95 %", "same labels", *more]
    lines = [_line(header), _line(["---"] * len(header))]
    for row in rows:
        speed = row["speed"]
        interval = f"{speed['low']:.2f} to {speed['high']:.2f}" if speed["low"] < speed["high"] else ""
        shares = [row["agreement"], *(row[name] for name in more)]
        cells = [f"{row['a second']:.3g}", f"{speed['median']:.2f}", interval, *(f"{100 * s:.1f} %" for s in shares)]
        lines.append(_line([row["way"], *cells]))
    return lines


def conditions(report: Mapping[str, Any]) -> str:
    """Return where, when and with how much it was measured."""
    lines = [
        f"- {base}: {found['date']}, {found['machine']}, {found['versions']}; the machine's load was {found['load']} "
        f"at the end. Trained on {found['training']} sentences for two epochs, compared on {found['checked']} test "
        f"sentences, {found['rounds']} rounds with {found['timed']} of them."
        for base, found in report["bases"].items()
    ]
    return "\n".join(["`python -m tests.benchmarks.faster_prediction`:", "", *lines])


def to_markdown(report: Mapping[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Ways to predict faster",
        "",
        conditions(report),
        "",
        "LoRA (r=16 on all linear layers), shortly trained; mini-batches of 32. Labels, those of all words where words",
        "have labels, are compared with those of `predict` in fp32. Accuracy is that on the same sentences. All ways",
        "are timed in turn: of one thread the processor's time, else the clock's. Speed is the median of the ratios",
        "to `predict` in fp32, with the 95 % bootstrap interval.",
        "",
        "![How many times as fast each way is, and the share of labels that stay](faster_prediction.png)",
        "",
        of_ways(report),
        "",
        "## Four models on the same text",
        "",
        "Two for each task, on sentences of UD-EWT: each sentence gets the labels of all four. Speed is that of four",
        "calls of `predict`, one after the other; labels are compared with those that each model gives alone.",
        "",
        of_several(report),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
