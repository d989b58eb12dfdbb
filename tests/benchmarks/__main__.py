"""All benchmarks with one command: ``python -m tests.benchmarks``, or some of them by name.

Each runs in a process of its own, one after the other, and writes its results as JSON and as a page into
``resources/benchmarks``; ``README.md`` there lists them. ``--quick`` tries whether they run, with the fewest
repetitions, and writes into a temporary folder unless ``--out`` names one. A benchmark that fails does not keep the
others from running; the exit status is then 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.report import RESULTS, ROOT


class Benchmark(NamedTuple):
    """What a module of this package measures, and its arguments for a trial."""

    what: str
    quick: tuple[str, ...] = ("--pairs", "1")
    is_for_gpu: bool = False


BENCHMARKS = {
    "checkpoints": Benchmark(
        "sizes, loads and their memory, beside PEFT alone and whole files of Flair",
        ("--pairs", "1", "--stock-pairs", "1", "--shapes", "bert-base"),
    ),
    "saves": Benchmark(
        "saves of a model that is trained on, beside PEFT's of the adapter", ("--pairs", "1", "--shapes", "bert-base")
    ),
    "conversion": Benchmark("converting a file of stock Flair", ("--shape", "bert-base")),
    "training": Benchmark("a training step, beside a bare loop of PEFT"),
    "prediction": Benchmark("streams of sentences: time, and memory over their length"),
    "serving": Benchmark("many models on one base"),
    "serving_http": Benchmark("models served over HTTP, beside a service by hand"),
    "serving_soak": Benchmark(
        "a service under load, with loads, restarts and hostile clients", ("--minutes", "0.5", "--restarts", "1")
    ),
    "quantised": Benchmark("a 4-bit base in memory", ()),
    "methods": Benchmark("what each method of PEFT costs"),
    "quality": Benchmark(
        "what adapters reach on real text, against full fine-tuning",
        ("--only", "step", "--pairs", "1"),
    ),
    "faster_prediction": Benchmark("ways to predict faster, and the labels that they change", ("--quick",)),
    "gpu": Benchmark("on a GPU: beside PEFT's loop, batches for many models, switches", ("--quick",), is_for_gpu=True),
    "real_text": Benchmark(
        "training on real text, beside a bare loop of PEFT",
        ("--only", "steps", "--pairs", "1", "--bases", "MiniLM"),
    ),
    "upper_layers": Benchmark(
        "what adapters on the upper layers alone cost",
        ("--seeds", "1", "--sentences", "8", "--epochs", "1", "--test", "16", "--pairs", "1"),
    ),
    "peers": Benchmark(
        "the same work with Flair, PEFT, sentence-transformers and adapters", ("--pairs", "1", "--processes", "1")
    ),
}


def takes_device(name: str) -> bool:
    """Whether a benchmark can be told where to compute."""
    return '"--device"' in (Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8")


def run(name: str, arguments: Sequence[object]) -> float | None:
    """Return the minutes that a benchmark took in a process of its own, or nothing where it failed."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"tests.benchmarks.{name}", *map(str, arguments)], cwd=ROOT)
    return (time.perf_counter() - start) / 60 if done.returncode == 0 else None


def write_index(out: Path) -> None:
    """Write the list of the results in a folder, with the date and the machine of each."""
    lines = [
        "# Benchmarks",
        "",
        "`python -m tests.benchmarks` measures all of them, `python -m tests.benchmarks NAME` one.",
        "",
        "| | what | when | where |",
        "|---|---|---|---|",
    ]
    for name, benchmark in BENCHMARKS.items():
        if not (out / f"{name}.json").exists():
            continue
        report = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
        title = f"[{name}]({name}.md)" if (out / f"{name}.md").exists() else f"[{name}]({name}.json)"
        lines.append(f"| {title} | {benchmark.what} | {report['date']} | {report['machine']} |")
    (out / "README.md").write_text("\n".join([*lines, *_on_a_gpu()]) + "\n", encoding="utf-8")


def _chosen(device: str | None) -> list[str]:
    """Return the benchmarks to run where none is named."""
    return [name for name, each in BENCHMARKS.items() if (takes_device(name) if device else not each.is_for_gpu)]


def _on_a_gpu() -> list[str]:
    """Return how everything that makes sense on a GPU is run there."""
    named = ", ".join(f"`{name}`" for name in BENCHMARKS if takes_device(name))
    return [
        "",
        "## On a GPU",
        "",
        "```bash",
        "python -m tests.benchmarks --device cuda --out resources/benchmarks/cuda  # all that take a device",
        "python -m tests.benchmarks.gpu --shapes llama-7b --out resources/benchmarks/cuda/llama-7b  # 14 GB of disk",
        "python -m pytest -n 0 tests/test_gpu.py",
        "```",
        "",
        f"A device is taken by {named}.",
        "`peers` measures on a GPU as well, where there is one. With `--quick --device cpu`, the first command tries",
        "whether they run on a CPU. 4 bits want `pip install bitsandbytes`, ONNX `pip install onnx onnxruntime-gpu`,",
        "FlashAttention `pip install flash-attn`.",
    ]


def main() -> int:
    """Run the benchmarks that were named, or all, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(BENCHMARKS)}; all of them if left out")
    parser.add_argument("--quick", action="store_true", help="as few repetitions as there can be")
    parser.add_argument("--device", help="such as cuda: only those that take it, there")
    parser.add_argument("--environments", type=Path, help="where peers makes and keeps its virtual environments")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(BENCHMARKS))
    if unknown:
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(BENCHMARKS)}")
    out = (options.out or (Path(tempfile.mkdtemp()) if options.quick else RESULTS)).resolve()
    minutes = {}
    for name in options.names or _chosen(options.device):
        arguments: list[object] = ["--out", out, *(BENCHMARKS[name].quick if options.quick else ())]
        arguments += ["--device", options.device] if options.device else []
        if name == "peers" and options.environments:
            arguments += ["--environments", options.environments.resolve()]
        minutes[name] = run(name, arguments)
    write_index(out)
    for name, taken in minutes.items():
        print(f"{name}: failed" if taken is None else f"{name}: {taken:.0f} minutes")
    print(f"The results are in {out}.")
    return 1 if None in minutes.values() else 0


if __name__ == "__main__":
    sys.exit(main())
