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
    """Return a table for each base: a row for each way, and for each task its speed and what it costs."""
    return "\n\n".join(
        "\n".join([f"**{base}**", "", *_ways(found["tasks"])]) for base, found in report["bases"].items()
    )


def _ways(tasks: Mapping[str, list[dict[str, Any]]]) -> list[str]:
    columns = [f"{task}: {what}" for task in tasks for what in ("sentences/s", "speed", "same labels", "accuracy")]
    found = {task: {row["way"]: row for row in rows} for task, rows in tasks.items()}
    lines = [_line(["", *columns]), _line(["---"] * (1 + len(columns)))]
    for way in dict.fromkeys(way for rows in found.values() for way in rows):
        cells = [_cells(rows.get(way)) for rows in found.values()]
        lines.append(_line([way, *(cell for those in cells for cell in those)]))
    return lines


def _cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["–"] * 4
    return [f"{row['a second']:.3g}", _speed(row), _percent(row["agreement"]), _percent(row["accuracy"])]


def of_several(report: Mapping[str, Any]) -> str:
    """Return the table of four models on one text."""
    lines = [_line(["", "", "sentences/s", "speed", "same labels"]), _line(["---"] * 5)]
    for base, found in report["bases"].items():
        for row in found["several"]:
            cells = [f"{row['a second']:.3g}", _speed(row), _percent(row["agreement"])]
            lines.append(_line([base, row["way"], *cells]))
    return "\n".join(lines)


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


def _speed(row: Mapping[str, Any]) -> str:
    found = row["speed"]
    if found["low"] == found["high"] == 1:
        return "1"
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
