"""Scores of trainings whose batches are cut by length, beside those of one pass for each batch, with the same seeds."""

from __future__ import annotations

import functools
import inspect
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flair_peft import PeftTransformerEmbeddings
from tests.benchmarks.text_tasks import TASKS, Task
from tests.benchmarks.trainings import Record, kept, lacking, lead, run
from tests.benchmarks.ways import LORA, Way, train
from tests.support.minilm import find_minilm

RATE, HEAD_RATE, BATCH = 1e-3, 1e-2, 32

HAS_GROUPS = "length_grouping" in inspect.signature(PeftTransformerEmbeddings).parameters
CUTS = {"cut by length": {"length_grouping": True}, "one pass": {"length_grouping": False}}
CUTS = CUTS if HAS_GROUPS else {"one pass": {}}
"""How a batch runs → options of the embeddings."""

task_of: Callable[[str], Task] = functools.cache(lambda name: TASKS[name]())


def one(plan: Record) -> Record:
    """Return the plan of a training with what came out."""
    settings, task = plan["settings"], task_of(plan["task"])
    found = train(
        task,
        Way(lambda: {"peft_config": LORA(), **CUTS[plan["cut"]]}),
        find_minilm(),
        rate=RATE,
        head_rate=HEAD_RATE,
        seed=plan["seed"],
        count=settings["sentences"],
        epochs=settings["epochs"],
        measured=task.test[: settings["test"]],
        prove=False,
        batch=BATCH,
        shuffled=True,
    )
    return {**plan, **found}


def measure_scores(settings: dict[str, Any], runs: Path, *, seeds: int, workers: int) -> dict[str, Any]:
    """Return what trainings reach with batches cut by length and without, paired by seed, and their time."""
    records = kept(runs, settings)
    plans = [
        {"task": task, "cut": cut, "seed": seed, "settings": settings}
        for seed in range(1, seeds + 1)
        for task in TASKS
        for cut in CUTS
    ]
    for task in TASKS:
        task_of(task)
    run(one, lacking(plans, records), records, runs, workers=workers)
    done = [record for record in records if any(plan.items() <= record.items() for plan in plans)]
    trainings = [{key: value for key, value in record.items() if key != "settings"} for record in done]
    return {"settings": settings, "seeds": seeds, "rows": [scores(done, task) for task in TASKS], "runs": trainings}


def scores(records: Sequence[Record], task: str) -> dict[str, Any]:
    """Return the mean accuracy of each way in percent, and, of two, the lead and the ratio of the times."""
    those = sorted((r for r in records if r["task"] == task), key=lambda r: r["seed"])
    accuracy = {cut: [100 * r["score"] for r in those if r["cut"] == cut] for cut in CUTS}
    found: dict[str, Any] = {"task": task, "accuracy": {cut: statistics.mean(a) for cut, a in accuracy.items()}}
    if len(CUTS) > 1:
        taken = [[r["seconds"] for r in those if r["cut"] == cut] for cut in CUTS]
        found |= {"lead": lead(*accuracy.values()), "time": sum(taken[0]) / sum(taken[1])}
    return found


def scores_page(found: dict[str, Any]) -> list[str]:
    size = found["settings"]
    lines = [
        "## The same score",
        "",
        f"`python -m tests.benchmarks.real_text --only score`, {found['date']}, {found['machine']}.",
        "",
        f"MiniLM, {size['sentences']} training sentences that each seed draws, {size['epochs']} epochs of shuffled",
        f"batches of {size['batch']}, learning rate {RATE:g}, {HEAD_RATE:g} for the head; accuracy on {size['test']}",
        f"test sentences, mean over {found['seeds']} seeds; the difference is paired by seed, with 95 % intervals of",
        "Student's t. Time is that of the processor in the trainer, of all seeds together.",
        "",
        f"| text | {', % | '.join(CUTS)}, % | difference, points | time |",
        "|---|" + "---|" * (len(CUTS) + 2),
    ]
    for r in found["rows"]:
        accuracies = " | ".join(f"{mean:.2f}" for mean in r["accuracy"].values())
        lines.append(f"| {r['task']} | {accuracies} | {difference(r)} |")
    return lines


def difference(r: dict[str, Any]) -> str:
    if "lead" not in r:
        return " | "
    found = r["lead"]
    return f"{found['mean']:+.2f} ({found['low']:+.2f} to {found['high']:+.2f}) | {r['time']:.2f} ×"
