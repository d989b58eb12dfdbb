"""This package beside Flair without adapters, bare PEFT, sentence-transformers and AdapterHub's adapters.

``python -m tests.benchmarks.peers`` makes a virtual environment for each (``workers/by_*.txt`` hold the versions),
a base in the shape of BERT-base with random weights, and twenty LoRA adapters and heads that all start from. Each
library saves and loads in its own way and gets the same texts. Before anything is timed, the scores of all have to
agree, an adapter has to change them, and a training step has to change the adapter and nothing of its base. Then the
libraries take turns, so that other work on the machine hits all alike. Results go to ``resources/benchmarks``.

``--here`` compares what is installed in this environment, without making any: this package, Flair and PEFT.
Where every environment has a torch that sees a GPU, all rows are measured there, too.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

from tests.benchmarks.peer_rows import (
    ADAPTERS,
    BATCH,
    HERE,
    MIXED,
    OURS,
    PEERS,
    REFERENCE,
    ROWS,
    TRAINING_BATCH,
    Runs,
    add,
    empty,
    summarise,
    to_markdown,
)
from tests.benchmarks.report import RESULTS, heading, write
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.workers.process import Worker, make_environment
from tests.support import tiny
from tests.support.configs import lora

TOLERANCE = 1e-4
"""Of probabilities: sums in another order, by another version of transformers."""
APART = 1e-2
"""What an adapter has to change the probability of some text by, at least."""
GROUPS = ("files", "loads", "training", "prediction", "many", "mixed")


class Comparison:
    """One run over some peers on one device: every method measures and returns values by row and peer."""

    def __init__(self, pythons: Mapping[str, Path], folder: Path, *, device: str, threads: int) -> None:
        self.pythons, self.folder, self.device, self.threads = pythons, folder, device, threads
        self.versions: dict[str, dict[str, str]] = {}
        self.gpus: dict[str, str | None] = {}

    @contextmanager
    def worker(self, name: str) -> Iterator[Worker]:
        """Yield a new process of this peer."""
        worker = Worker(name, self.pythons[name], self.folder, device=self.device, threads=self.threads)
        self.versions[name], self.gpus[name] = worker.hello["versions"], worker.hello["gpu"]
        try:
            yield worker
        finally:
            worker.close()

    def turns(self, number: int) -> list[str]:
        """Return the peers in the order of this round; each is the first in its turn."""
        names = list(self.pythons)
        first = number % len(names)
        return names[first:] + names[:first]

    def make(self) -> None:
        """Let every peer write its checkpoints, and check that all of them predict the same.

        Raises:
            AssertionError: they do not, or an adapter changes nothing.
        """
        checked = list(range(MIXED))
        found = {}
        for name in self.pythons:
            with self.worker(name) as worker:
                found[name] = worker.ask("make", count=PEERS[name].kept, check=[*checked, ADAPTERS - 1])["scores"]
                if name == REFERENCE:
                    bare = [worker.ask("without_adapter", number=number)["scores"] for number in checked]
        expected = {"with": found[REFERENCE], "without": {str(number): bare[number] for number in checked}}
        for number in checked:
            assert apart(expected["with"][str(number)], expected["without"][str(number)]) > APART, "a no-op"
        for name, scores in found.items():
            kind = "with" if PEERS[name].has_adapters else "without"
            for number in scores:
                assert_close(scores[number], expected[kind][number], f"{name} as built")
        self.expected = {name: expected["with" if PEERS[name].has_adapters else "without"] for name in found}

    def files(self, pairs: int) -> Runs:
        """Measure saving, in a new process each time."""
        runs = empty("bytes", "learned", "save", "save_again")
        for number in range(-1, pairs):
            for name in self.turns(number):
                with self.worker(name) as worker:
                    found = worker.ask("save")
                values = {
                    "bytes": found["bytes"],
                    "learned": found["bytes"] - found["tokenizer"],
                    "save": found["first"],
                    "save_again": found["again"],
                }
                add(runs, name, values if number >= 0 else {})
        return runs

    def loads(self, pairs: int) -> Runs:
        """Measure loads, in a new process each time; the first round warms the files up and is not counted."""
        runs = empty("import", "load", "load_unproven", "load_peak", "load_beyond", "load_device")
        for number in range(-1, pairs):
            for name in self.turns(number):
                for prove in (True, False) if name == OURS else (True,):
                    with self.worker(name) as worker:
                        found = worker.ask("load", prove=prove)
                        values = {"load_unproven": found["seconds"]}
                        if prove:
                            values = {"import": worker.hello["import"], "load": found["seconds"]}
                            values |= {"load_peak": found["peak"], "load_beyond": found["beyond"]}
                            values |= {"load_device": found["device"]} if "device" in found else {}
                    assert_close(found["scores"], self.expected[name]["0"][:1], f"{name} as loaded")
                    add(runs, name, values if number >= 0 else {})
        return runs

    def training(self, pairs: int) -> Runs:
        """Measure training steps of models that are trained side by side."""
        runs = empty("step", "step_peak", "step_device")
        checked = {}
        for name in self.pythons:
            with self.worker(name) as worker:
                checked[name] = worker.ask("start_training", check=True)
        for name, found in checked.items():
            check_changes(name, found["changes"])
            if PEERS[name].has_adapters:
                assert abs(found["loss"] - checked[REFERENCE]["loss"]) < TOLERANCE, checked
                assert found["trained"] == checked[REFERENCE]["trained"], checked
        with self.all_workers() as workers:
            for name, worker in workers.items():
                assert worker.ask("start_training", check=False)["loss"] == checked[name]["loss"]
            self.take_turns(workers, "step", pairs, runs)
            for name, worker in workers.items():
                found = worker.ask("memory")
                add(runs, name, {"step_peak": found["peak"]})
                add(runs, name, {"step_device": found["device"]} if "device" in found else {})
        return runs

    def prediction(self, pairs: int) -> Runs:
        """Measure predictions of a batch by models that were loaded."""
        runs = empty("predict")
        with self.all_workers() as workers:
            for name, worker in workers.items():
                scores = worker.ask("start_predicting")["scores"]
                assert_close(scores, self.expected[name]["0"], f"{name} as loaded")
            self.take_turns(workers, "predict", pairs, runs)
        return runs

    def many(self, pairs: int) -> Runs:
        """Measure twenty models on one base, in a new process each time."""
        runs = empty("resident", "each", "add", "add_unproven")
        for number in range(pairs):
            for name in self.turns(number):
                for prove in (True, False) if name == OURS else (True,):
                    with self.worker(name) as worker:
                        found = worker.ask("many", models=ADAPTERS, kept=PEERS[name].kept, prove=prove)
                    for which, scores in zip((0, (ADAPTERS - 1) % PEERS[name].kept), found["scores"], strict=True):
                        assert_close(scores, self.expected[name][str(which)], f"{name}, model {which} of {ADAPTERS}")
                    seconds = statistics.median(found["seconds"])
                    each = (found["all"] - found["one"]) / (ADAPTERS - 1)
                    values = {"resident": found["all"], "each": each, "add": seconds}
                    add(runs, name, values if prove else {"add_unproven": seconds})
        return runs

    def mixed(self, pairs: int) -> Runs:
        """Measure a batch for eight models, in one forward pass and in eight."""
        runs = empty("mixed", "grouped")
        for row in runs:
            names = [name for name in self.pythons if name not in ROWS[row].absent]
            with self.all_workers(names) as workers:
                for name, worker in workers.items():
                    settings = {"models": MIXED, "kept": PEERS[name].kept, "mixed": row == "mixed"}
                    scores = worker.ask("start_mixing", **settings)["scores"]
                    for number, part in enumerate(scores):
                        wanted = self.expected[name][str(number)][number::MIXED]
                        assert_close(part, wanted, f"{name}, model {number} of {MIXED}")
                self.take_turns(workers, row, pairs, runs)
        return runs

    @contextmanager
    def all_workers(self, names: Sequence[str] | None = None) -> Iterator[dict[str, Worker]]:
        """Yield a process of each peer; those that are not asked wait."""
        with ExitStack() as stack:
            yield {name: stack.enter_context(self.worker(name)) for name in names or self.pythons}

    def take_turns(self, workers: Mapping[str, Worker], row: str, pairs: int, runs: Runs) -> None:
        """Let each do what it has started, in turn; two rounds warm up."""
        for number in range(-2, pairs):
            for name in self.turns(number):
                if name in workers:
                    seconds = workers[name].ask("act")["seconds"]
                    add(runs, name, {row: seconds} if number >= 0 else {})


def apart(these: Any, those: Any) -> float:
    """Return the largest difference of two lists of numbers."""
    return float((torch.tensor(these) - torch.tensor(those)).abs().max())


def assert_close(these: Any, those: Any, who: str) -> None:
    """Raise unless two lists of probabilities agree."""
    difference = apart(these, those)
    assert difference < TOLERANCE, f"{who}: predicts something else, by up to {difference:.2g}"


def check_changes(name: str, changes: Mapping[str, float]) -> None:
    """Raise unless a step trained what it should: adapter and head alone, or the whole model."""
    if PEERS[name].has_adapters:
        assert changes["adapter"] > 0, f"{name}: a step does not change the adapter"
        assert changes["base"] == 0, f"{name}: a step changes the base"
    else:
        assert changes["base"] > 0, f"{name}: a step does not change the model"
    assert changes["head"] > 0, f"{name}: a step does not change the head"


def write_material(folder: Path, build: Callable[[Path], Any]) -> None:
    """Write the base, adapters and heads on it, and the texts, all of which depend on nothing but their numbers."""
    if not (folder / "base" / "config.json").exists():
        build(folder / "base")
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = lora(r=8, lora_alpha=32)
        base = AutoModel.from_pretrained(folder / "base")
        path = folder / "material" / str(number)
        get_peft_model(base, config).save_pretrained(path)
        head = torch.nn.Linear(base.config.hidden_size, 2)
        content = {name: parameter.tolist() for name, parameter in head.named_parameters()}
        (path / "head.json").write_text(json.dumps(content), encoding="utf-8")
    texts = {"prediction": make_texts(folder / "base", BATCH), "training": make_texts(folder / "base", TRAINING_BATCH)}
    (folder / "texts.json").write_text(json.dumps(texts), encoding="utf-8")


def make_texts(base: Path, count: int) -> list[str]:
    """Return texts of 10 to 20 words that are pieces of the vocabulary."""
    words = sorted(word for word in AutoTokenizer.from_pretrained(base).get_vocab() if word.isalpha())
    generator = random.Random(count)
    return [" ".join(generator.choices(words, k=10 + number % 11)) for number in range(count)]


def measure(comparison: Comparison, groups: Sequence[str], *, pairs: int, processes: int) -> list[dict[str, Any]]:
    """Return the rows of one device."""
    counts = {"files": processes, "loads": pairs, "many": processes}
    runs: Runs = {}
    comparison.make()
    for group in groups:
        runs |= getattr(comparison, group)(counts.get(group, pairs))
    return summarise({row: runs[row] for row in ROWS if row in runs})


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--processes", type=int, default=5, help="processes that save, and that load twenty models")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--groups", nargs="*", choices=GROUPS, default=list(GROUPS), help="measure these rows alone")
    parser.add_argument("--shape", choices=("bert-base", "tiny"), default="bert-base")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="where the models are made and kept; a temporary one if left out")
    parser.add_argument("--environments", type=Path, help="where environments are made and kept; as above")
    parser.add_argument("--here", action="store_true", help=f"in this environment, {', '.join(HERE)} alone")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    names = [name for name in PEERS if name in {*options.peers, REFERENCE} and (name in HERE or not options.here)]
    with tempfile.TemporaryDirectory() as temporary:
        places = options.environments or Path(temporary) / "environments"
        pythons = {name: Path(sys.executable) if options.here else make_environment(name, places) for name in names}
        folder = (options.folder or Path(temporary)) / options.shape
        write_material(folder, SHAPES.get(options.shape, lambda path: tiny.build("bert", path)))
        counts = {"pairs": options.pairs, "processes": options.processes}
        comparison = Comparison(pythons, folder, device="cpu", threads=options.threads)
        devices = {f"CPU, {options.threads} thread(s)": measure(comparison, options.groups, **counts)}
        if all(comparison.gpus.values()):
            on_gpu = Comparison(pythons, folder, device="cuda", threads=options.threads)
            devices[next(iter(comparison.gpus.values())) or ""] = measure(on_gpu, options.groups, **counts)
    report = {
        **heading(),
        "shape": options.shape,
        **counts,
        "versions": comparison.versions,
        "devices": devices,
    }
    write("peers", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
