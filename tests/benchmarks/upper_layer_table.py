"""The table of what adapters on the upper layers alone cost, of the figures that the benchmark wrote."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

LAYERS, RANK = 12, 16
COUNTS = (LAYERS, 8, 6, 4)
"""How many layers have an adapter, counted from the last."""
WANTED_POINTS, WANTED_TIME = -0.5, 0.5
COLLAPSED = 0.7
"""Share of the median below which a training came to nothing."""


def verdict(found: Sequence[dict[str, Any]], timed: dict[str, list[dict[str, Any]]]) -> list[int]:
    """Return the depths that lose at most half a point on every task at half the time, without the layers below."""
    return [
        count
        for count in COUNTS[1:]
        if all(
            statistics.median(r["differences"]) >= WANTED_POINTS and kept_ratio(timed, r["task"], count) <= WANTED_TIME
            for r in found
            if r["layers"] == count
        )
    ]


def kept_ratio(timed: dict[str, list[dict[str, Any]]], task: str, count: int) -> float:
    """Return the time of a step without the layers below the adapters, beside one that trains all layers."""
    (found,) = (r for r in timed[task] if r["layers"] == count)
    return float(found["step"]["median"] * (1 - found["below"]["median"]))


def table(report: dict[str, Any]) -> list[str]:
    """Return the lines of the table of all tasks and ways."""
    lines = [
        "| text | adapted layers | rank | seeds | accuracy, % | against all layers, points | time of training | "
        "of a step, if what comes out below were kept |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in report["rows"]:
        time = f"{r['seconds']:.0f} s ({r['ratio']:.2f} ×)"
        lines.append(
            f"| {r['task']} | {name(r['layers'])} | {RANK * LAYERS // r['layers']} | {r['seeds']} | "
            f"{spread(r['scores'], '.1f')} | {difference(r)} | {time} | {saved(report['steps'], r)} |"
        )
    return lines


def name(count: int) -> str:
    return "all 12" if count == LAYERS else f"upper {count}"


def difference(r: dict[str, Any]) -> str:
    return "" if r["layers"] == LAYERS else spread(r["differences"], "+.1f")


def spread(values: Sequence[float], form: str) -> str:
    """Return the median of some values, and the least and the greatest."""
    median = f"{statistics.median(values):{form}}"
    return f"{median} ({min(values):{form}} to {max(values):{form}})" if len(values) > 1 else median


def collapsed(report: dict[str, Any]) -> str:
    """Return which trainings came to nothing, as a sentence; without any, no sentence."""
    found = [
        f"one on {r['task']} with {name(r['layers'])} layers, at {score:.1f} %"
        for r in report["rows"]
        for score in r["scores"]
        if score < COLLAPSED * statistics.median(r["scores"])
    ]
    trainings = sum(len(r["scores"]) for r in report["rows"])
    return (
        f" {len(found)} of {trainings} trainings came to nothing at this learning rate: {'; '.join(found)}."
        if found
        else ""
    )


def saved(timed: dict[str, list[dict[str, Any]]], r: dict[str, Any]) -> str:
    return f"{kept_ratio(timed, r['task'], r['layers']):.2f} ×" if timed and r["layers"] < LAYERS else ""


def conclusion(report: dict[str, Any]) -> str:
    """Return whether keeping what comes out below the adapters for later epochs would be worth its code."""
    if not report["steps"] or {r["task"] for r in report["rows"]} != set(report["steps"]):
        return "Not all of it is measured yet."
    held = " and ".join(map(name, verdict(report["rows"], report["steps"]))) or "no depth"
    return (
        f"At most {-WANTED_POINTS:g} points lost on both texts, in the median, at {WANTED_TIME:g} × the time of all "
        f"layers, if a training kept what comes out below the adapters: {held}."
    )


def source(report: dict[str, Any]) -> str:
    """Return how and on what the figures were measured."""
    size = report["settings"]
    return (
        f"LoRA on all linear layers of all-mpnet-base-v2, as many weights trained in all rows, alpha twice the rank. "
        f"{size['sentences']} training sentences that each seed draws, {size['epochs']} epochs of batches of "
        f"{size['batch']}, learning rate {size['rate']:g}, {size['head_rate']:g} for the head; accuracy on "
        f"{size['test']} test sentences. Median, least and greatest over the seeds; differences are paired "
        f"by seed. Time is that of the processor in the trainer.{collapsed(report)}"
    )


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    where = f"{report['date']}, {report['machine']}, {report['versions']}"
    lines = ["# Adapters on the upper layers", "", f"`python -m tests.benchmarks.upper_layers`, {where}.", ""]
    lines += [source(report), "", *table(report), "", conclusion(report), ""]
    if report["steps"]:
        lines += [
            f"The last column is an estimate from {report['pairs']} batches, on which the ways were timed in turn: a",
            "step beside one that trains all layers, less the share of it that lies below the first adapted layer. The",
            "first epoch would have to compute that, too.",
            "",
            "| text | adapted layers | a step, beside all layers | share of it below the adapters |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {task} | {name(r['layers'])} | {interval(r['step'])} | {interval(r['below'])} |"
            for task, those in report["steps"].items()
            for r in those
        ]
    return "\n".join(lines) + "\n"


def interval(found: dict[str, float]) -> str:
    return f"{found['median']:.2f} ({found['low']:.2f} to {found['high']:.2f})"
