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
import os
import random
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

from tests import tiny
from tests.benchmarks.report import RESULTS, ROOT, processor, ratio, today, total_memory, write
from tests.benchmarks.shapes import SHAPES

WORKERS = Path(__file__).parent / "workers"
ADAPTERS, MIXED, BATCH, TRAINING_BATCH = 20, 8, 32, 8
TOLERANCE = 1e-4
"""Of probabilities: sums in another order, by another version of transformers."""
APART = 1e-2
"""What an adapter has to change the probability of some text by, at least."""


class Peer(NamedTuple):
    """A library in the comparison."""

    title: str
    has_adapters: bool = True
    mixes: bool = True
    kept: int = ADAPTERS
    """How many different checkpoints are made; whole models are large."""


OURS, REFERENCE = "by_flair_peft", "by_peft"
PEERS = {
    OURS: Peer("flair_peft"),
    "by_flair": Peer("Flair, whole models", has_adapters=False, mixes=False, kept=MIXED),
    REFERENCE: Peer("PEFT and transformers"),
    "by_sentence_transformers": Peer("sentence-transformers", mixes=False),
    "by_adapters": Peer("adapters (AdapterHub)"),
}
HERE = (OURS, "by_flair", REFERENCE)
GROUPS = ("files", "loads", "training", "prediction", "many", "mixed")

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
    "save": Row("save, the first in a process", "s"),
    "save_again": Row("save, once more", "s"),
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


class Worker:
    """A process of a peer, which answers requests."""

    def __init__(self, name: str, python: Path, folder: Path, *, device: str, threads: int) -> None:
        self.name, self.errors = name, folder / f"{name}.err"
        command = [python, "-m", "tests.benchmarks.workers", name, folder, device]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.hello = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the answer to a request.

        Raises:
            RuntimeError: the process ended; the message has the end of what it said.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            said = self.errors.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {said}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


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
                found[name] = worker.ask("make", count=PEERS[name].kept, check=checked)["scores"]
                if name == REFERENCE:
                    bare = [worker.ask("without_adapter", number=number)["scores"] for number in checked]
        expected = {"with": found[REFERENCE], "without": {str(number): bare[number] for number in checked}}
        for number in checked:
            assert apart(expected["with"][str(number)], expected["without"][str(number)]) > APART, "a no-op"
        for name, scores in found.items():
            kind = "with" if PEERS[name].has_adapters else "without"
            for number in map(str, checked):
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
        with self.all_workers() as workers:
            losses = {}
            for name, worker in workers.items():
                found = worker.ask("start_training")
                losses[name] = found["loss"]
                check_changes(name, found["changes"])
            for name in workers:
                if PEERS[name].has_adapters:
                    assert abs(losses[name] - losses[REFERENCE]) < TOLERANCE, losses
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


def empty(*rows: str) -> Runs:
    """Return rows without values."""
    return {row: {} for row in rows}


def add(runs: Runs, name: str, values: Mapping[str, float]) -> None:
    """Add the values of a peer to their rows, in place; a row in which it has no figure stays without."""
    for row, value in values.items():
        if name not in ROWS[row].absent:
            runs[row].setdefault(name, []).append(value)


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
        assert changes["layers"] == 0, f"{name}: a step changes the base"
    else:
        assert changes["layers"] > 0, f"{name}: a step does not change the model"
    assert changes["rest"] > 0, f"{name}: a step does not change the head"


def write_material(folder: Path, build: Callable[[Path], Any]) -> None:
    """Write the base, adapters and heads on it, and the texts, all of which depend on nothing but their numbers."""
    if not (folder / "base" / "config.json").exists():
        build(folder / "base")
    for number in range(ADAPTERS):
        torch.manual_seed(number)
        config = LoraConfig(r=8, lora_alpha=32, target_modules=["query", "value"], init_lora_weights=False)
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


def make_environment(name: str, folder: Path) -> Path:
    """Return the Python of a peer's environment, which is made if it is missing or of other versions."""
    wanted, python = WORKERS / f"{name}.txt", folder / name / "bin" / "python"
    installed = folder / name / "installed.txt"
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        venv.create(folder / name, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
        installed.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return python


def summarise(runs: Runs) -> list[dict[str, Any]]:
    """Return for each row with figures the medians of the peers, and the paired ratios of ours to theirs."""
    rows = []
    for row, values in runs.items():
        if not values:
            continue
        mine = values.get(OURS, [])
        ratios = {name: ratio(mine, theirs) for name, theirs in values.items() if name != OURS and mine}
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
        "date": today(),
        "machine": f"{processor()}, {os.cpu_count()} CPU cores, {total_memory() / 2**30:.0f} GiB",
        "shape": options.shape,
        **counts,
        "versions": comparison.versions,
        "devices": devices,
    }
    write("peers", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
