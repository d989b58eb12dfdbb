"""What it costs to give only the upper layers of a base an adapter: points, and the time that a training saves.

``python -m tests.benchmarks.upper_layers`` trains all-mpnet-base-v2, of 12 layers (``--base`` names another, or a
directory with its weights), on SST-2 and on parts of speech of UD-EWT (in ``shared/data`` beside the project), with
LoRA on all layers and on the upper 8, 6 and 4. The rank grows as the layers get fewer, so that all ways train as many
weights. Every seed has its sentences and the start of its head in common over the ways. What is done stands in a file
of lines, from which the same command goes on, one seed after the other; ``--only report`` writes the report of what is
there. ``--only steps`` measures how much of a step the layers below the adapters take: what a training would save if it
kept their output.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flair
import torch

from flair_peft.compat import versions
from tests.benchmarks.report import RESULTS, heading, ratio, write
from tests.benchmarks.steps import step
from tests.benchmarks.text_tasks import TASKS, Task, sentences
from tests.benchmarks.trainings import Record, kept, lacking, run
from tests.benchmarks.upper_layer_table import COUNTS, to_markdown
from tests.benchmarks.ways import BATCH, LAYERS, RANK, build, train, upper
from tests.support.mpnet import find_mpnet

RATE, HEAD_RATE = 1e-3, 1e-2

conditions = functools.partial(heading, "one core used", "no GPU used")
task_of: Callable[[str], Task] = functools.cache(lambda name: TASKS[name]())


def plans(settings: dict[str, Any], seeds: int) -> list[Record]:
    """Return all trainings, the first seed of every task and way before the second."""
    return [
        {"task": task, "layers": count, "seed": seed, "settings": settings}
        for seed in range(1, seeds + 1)
        for task in TASKS
        for count in COUNTS
    ]


def one(base: str, plan: Record) -> Record:
    """Return the plan of a training with what came out; the first seed's models are saved and loaded as well."""
    settings = plan["settings"]
    found = train(
        task_of(plan["task"]),
        upper(plan["layers"]),
        base,
        rate=settings["rate"],
        head_rate=settings["head_rate"],
        seed=plan["seed"],
        count=settings["sentences"],
        epochs=settings["epochs"],
        # Of one length in a batch, as in the training; the score does not depend on the order.
        measured=sorted(task_of(plan["task"]).test[: settings["test"]], key=lambda those: len(those[0])),
        prove=plan["seed"] == 1,
    )
    return {**plan, **found}


def complete(records: Sequence[Record], task: str) -> list[int]:
    """Return the seeds with which every way was trained on the task."""
    done = {(r["layers"], r["seed"]) for r in records if r["task"] == task}
    return [seed for seed in sorted({seed for _, seed in done}) if all((count, seed) in done for count in COUNTS)]


def rows(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Return what each way reached in percent and cost, over the seeds that all ways have.

    Raises:
        AssertionError: a way trained more or fewer weights than the others, by more than one in a hundred.
    """
    found = []
    for task in TASKS:
        those = {(r["layers"], r["seed"]): r for r in records if r["task"] == task}
        seeds = complete(records, task)
        for count in COUNTS if seeds else ():
            own, full = ([those[way, seed] for seed in seeds] for way in (count, LAYERS))
            assert all(abs(a["trained"] / b["trained"] - 1) < 0.01 for a, b in zip(own, full, strict=True))
            found.append({"task": task, "layers": count, **row(own, full)})
    return found


def row(own: Sequence[Record], full: Sequence[Record]) -> dict[str, Any]:
    """Return the figures of one way beside those of all layers with the same seeds."""
    scores, others = ([100 * record["score"] for record in those] for those in (own, full))
    seconds, of_full = ([record["seconds"] for record in those] for those in (own, full))
    return {
        "seeds": len(own),
        "scores": scores,
        "differences": [a - b for a, b in zip(scores, others, strict=True)],
        "share": own[0]["trained"] / own[0]["parameters"],
        "seconds": statistics.median(seconds),
        "ratio": statistics.median(a / b for a, b in zip(seconds, of_full, strict=True)),
    }


def watch_(model: Any, frozen: int) -> list[float]:
    """Return a list to which each forward pass adds the processor's time before all layers, and after the frozen."""
    encoder = model.embeddings.base_model
    marks: list[float] = []
    for module in (encoder.embeddings, encoder.encoder.layer[frozen]):
        module.register_forward_pre_hook(lambda *_: marks.append(time.process_time()))
    return marks


def steps(task: Task, base: str, *, pairs: int) -> list[dict[str, Any]]:
    """Return the time of a step of each way, and the share of it below the adapters, on the same batches in turn."""
    models = [build(task, upper(count), base, seed=1).train() for count in COUNTS]
    optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in models]
    marks = [watch_(model, LAYERS - count) for model, count in zip(models, COUNTS, strict=True)]
    drawn = sorted(task.pool[: BATCH * (pairs + 3)], key=lambda those: len(those[0]))
    batches = [sentences(drawn[start : start + BATCH], task.label_type) for start in range(0, len(drawn), BATCH)]
    taken: list[list[float]] = [[] for _ in COUNTS]
    below: list[list[float]] = [[] for _ in COUNTS]
    # The longest first: what is slow once is slow in a step that is not counted.
    for number, batch in enumerate(reversed(batches)):
        for which in list(range(len(COUNTS)))[:: -1 if number % 2 else 1]:
            marks[which].clear()
            start = time.process_time()
            step(models[which], batch, optimizers[which])
            taken[which].append(time.process_time() - start)
            below[which].append(sum(marks[which][1::2]) - sum(marks[which][::2]))
    return [
        {"layers": count, "step": ratio(own[3:], taken[0][3:]), "below": ratio(under[3:], own[3:])}
        for count, own, under in zip(COUNTS, taken, below, strict=True)
    ]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="name or directory; all-mpnet-base-v2 as it is installed if left out")
    parser.add_argument("--only", choices=("score", "steps", "report"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sentences", type=int, default=640, help="of each training")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--test", type=int, default=600, help="sentences to test on, at most")
    parser.add_argument("--workers", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--pairs", type=int, default=21, help="of steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, help="where trainings that are done stand; upper_layers.jsonl in --out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    runs = options.runs or options.out / "upper_layers.jsonl"
    settings = {what: getattr(options, what) for what in ("sentences", "epochs", "test")}
    settings |= {"rate": RATE, "head_rate": HEAD_RATE, "rank": RANK}
    settings["libraries"] = {library: version for library, version in versions().items() if library != "flair_peft"}
    records = kept(runs, settings)
    for task in TASKS:
        task_of(task)
    if options.only in (None, "score"):
        waiting = lacking(plans(settings, options.seeds), records)
        run(functools.partial(one, options.base or find_mpnet()), waiting, records, runs, workers=options.workers)
    file = options.out / "upper_layers.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"steps": {}, "pairs": 0}
    timed = {"steps": found["steps"], "pairs": found["pairs"]}
    if options.only in (None, "steps"):
        timed = {
            "steps": {t: steps(task_of(t), options.base or find_mpnet(), pairs=options.pairs) for t in TASKS},
            "pairs": options.pairs,
        }
    trainings = [{key: value for key, value in record.items() if key != "settings"} for record in records]
    report = {**conditions(), "settings": {**settings, "batch": BATCH}, "rows": rows(records), **timed}
    write("upper_layers", {**report, "runs": trainings}, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
