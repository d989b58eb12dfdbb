"""Sizes, times and memory of checkpoints, against what is the least that anybody must do.

``python -m tests.benchmarks.checkpoints`` builds base models in the shapes of BERT-base and XLM-R-large with random
weights, writes the same classifier in every form, loads each in processes of its own, compares what they give, and
writes the figures to ``resources/benchmarks``. Pairs are interleaved, since other work on the machine hits both alike.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from flair.data import Dictionary
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier

import flair_peft
from tests.benchmarks.report import RESULTS, ROOT, heading, in_process, ratio, seconds, write
from tests.benchmarks.shapes import SHAPES
from tests.support.configs import lora

TOLERANCE = 1e-4

# Way → the way that it is measured against, and the largest ratio of their times that we want. All but the last end
# with the first prediction, and have a tokenizer on both sides.
TIMES = {
    "load_directory": ("load_with_peft", 1.2),
    "load_slim_file": ("load_with_peft", 1.2),
    "load_directory_and_prove": ("predict_with_peft", 1.3),
    "only_load_whole_file": ("read_whole_file", 1.3),
}
MEMORY = {"load_directory": ("load_with_peft", 1.1), "load_slim_file": ("load_with_peft", 1.1)}
FASTER_THAN_STOCK = {"bert-base": 10.0, "xlm-roberta-large": 30.0}
SIZE = 1.05
IMPORT_SECONDS = 0.3


def settings() -> dict[str, Any]:
    """Return what a classifier of two labels is made with."""
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    return {"label_dictionary": labels, "label_type": "sentiment"}


def make_model(folder: Path) -> TextClassifier:
    """Return a classifier with LoRA on the base in a folder."""
    torch.manual_seed(0)
    config = lora(target_modules=None, r=8, lora_alpha=32)
    embeddings = flair_peft.PeftTransformerDocumentEmbeddings(str(folder / "base"), peft_config=config)
    return TextClassifier(embeddings, **settings())


def write_files(folder: Path) -> dict[str, float]:
    """Write one classifier in every form, and return the seconds that each took."""
    model = make_model(folder)
    stock = TextClassifier(
        TransformerDocumentEmbeddings(str(folder / "base"), use_context_separator=False), **settings()
    )
    model.save(folder / "slim.pt")  # the first save reads all of the base once
    return {
        "slim.pt": seconds(lambda: model.save(folder / "slim.pt")),
        "checkpoint": seconds(lambda: flair_peft.save_pretrained(model, folder / "checkpoint")),
        "whole.pt": seconds(lambda: model.save(folder / "whole.pt", save_base=True)),
        "stock.pt": seconds(lambda: stock.save(folder / "stock.pt")),
    }


def sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each form, and of what it has to hold: learned tensors and tokenizer files."""
    checkpoint = folder / "checkpoint"
    tokenizer = sum(path.stat().st_size for path in (checkpoint / "tokenizer").iterdir())
    model = TextClassifier.load(folder / "slim.pt", verify=False)
    learned = [p for p in model.parameters() if p.requires_grad or (p.shape[-1] != p.numel() and p.numel() < 4096)]
    held = sum(p.nbytes for p in {id(p): p for p in learned}.values())
    return {
        "learned tensors and tokenizer": held + tokenizer,
        "checkpoint": sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()),
        "slim.pt": (folder / "slim.pt").stat().st_size,
        "whole.pt": (folder / "whole.pt").stat().st_size,
        "stock.pt": (folder / "stock.pt").stat().st_size,
    }


def run(way: str, folder: Path) -> dict[str, Any]:
    """Return what one load in a new process measured."""
    return in_process("tests.benchmarks.loads", way, folder)


def measure(folder: Path, *, pairs: int, stock_pairs: int) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each way, interleaved; the files are in the page cache for all of them."""
    ways = list(dict.fromkeys([*TIMES, *(other for other, _ in TIMES.values())]))
    for way in ways:
        run(way, folder)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in [*ways, "load_stock_file"]}
    for number in range(pairs):
        for way in ways:
            found[way].append(run(way, folder))
        if number < stock_pairs:
            found["load_stock_file"].append(run("load_stock_file", folder))
    return found


def check(runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise unless all ways that have an adapter give the vector that PEFT gives."""
    expected = torch.tensor(runs["load_with_peft"][0]["vector"])
    for way, results in runs.items():
        for result in results:
            vector = torch.tensor(result["vector"])
            if way != "load_stock_file" and vector.numel():
                torch.testing.assert_close(vector, expected, atol=TOLERANCE, rtol=TOLERANCE)


def import_seconds(statement: str) -> float:
    code = f"import time; start = time.perf_counter(); {statement}; print(time.perf_counter() - start)"
    return float(subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout)


def evaluate(shape: str, folder: Path, *, pairs: int, stock_pairs: int) -> list[dict[str, Any]]:
    """Return the rows of one shape: what was measured, against what, and what we want."""
    saves, rows = write_files(folder), list[dict[str, Any]]()
    runs = measure(folder, pairs=pairs, stock_pairs=stock_pairs)
    check(runs)
    for way, (other, wanted) in TIMES.items():
        found = ratio([r["seconds"] for r in runs[way]], [r["seconds"] for r in runs[other]])
        rows.append({"what": f"time of {way} / {other}", **found, "wanted": wanted and f"≤ {wanted}"})
    for way, (other, wanted) in MEMORY.items():
        found = ratio([r["bytes"] for r in runs[way]], [r["bytes"] for r in runs[other]])
        rows.append({"what": f"peak memory of {way} / {other}", **found, "wanted": f"≤ {wanted}"})
    if runs["load_stock_file"]:
        whole = [r["seconds"] for r in runs["load_stock_file"]]  # fewer of them: one can take a minute
        found = ratio(whole, [r["seconds"] for r in runs["load_directory"]][: len(whole)])
        rows.append(
            {"what": "time of load_stock_file / load_directory", **found, "wanted": f"≥ {FASTER_THAN_STOCK[shape]}"}
        )
    held = sizes(folder)
    for name in ("checkpoint", "slim.pt"):
        share = held[name] / held["learned tensors and tokenizer"]
        rows.append(
            {"what": f"bytes of {name} / what it has to hold", "median": share, "low": share, "high": share}
            | {"wanted": f"≤ {SIZE}"}
        )
    figures = {
        "seconds": {way: statistics.median(r["seconds"] for r in results) for way, results in runs.items() if results},
        "bytes of memory": {way: statistics.median(r["bytes"] for r in rs) for way, rs in runs.items() if rs},
        "bytes of files": held,
        "seconds to save": saves,
    }
    return [{"shape": shape, **row} for row in rows] + [{"shape": shape, "figures": figures}]


def evaluate_imports(pairs: int) -> dict[str, Any]:
    """Return what importing the package adds to importing what it stands on."""
    both = [
        (import_seconds("import flair, peft, flair_peft"), import_seconds("import flair, peft")) for _ in range(pairs)
    ]
    added = sorted(a - b for a, b in both)
    median = statistics.median(added)
    row = {"shape": "", "what": "seconds that `import flair_peft` adds to `import flair, peft`", "median": median}
    return {
        **row,
        "low": added[len(added) // 20],
        "high": added[-1 - len(added) // 20],
        "wanted": f"≤ {IMPORT_SECONDS}",
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Checkpoints: size, time and memory",
        "",
        "`python -m tests.benchmarks.checkpoints`. Ratios are medians of interleaved pairs of processes, with 95 %",
        "bootstrap intervals; every load gave PEFT's vector. Later saves beside PEFT's are in [saves](saves.md).",
    ]
    for shape, measured in report["measured"].items():
        rows = [row for row in report["rows"] if row["shape"] == shape]
        lines += [
            "",
            f"## {shape or 'Import'}",
            "",
            f"{measured['date']}, {measured['machine']}, {measured['versions']};",
        ]
        lines += [f"{measured['pairs']} pairs.", "", "| what | median | 95 % | wanted |", "|---|---|---|---|"]
        for row in (row for row in rows if "what" in row):
            interval = f"{row['low']:.2f} to {row['high']:.2f}"
            lines.append(f"| {row['what']} | {row['median']:.2f} | {interval} | {row['wanted'] or ''} |")
        for row in (row for row in rows if "figures" in row):
            lines.append("")
            for kind, values in row["figures"].items():
                scale, unit = (1e6, "MB") if kind.startswith("bytes") else (1, "s")
                found = ", ".join(f"{name} {value / scale:.3g} {unit}" for name, value in values.items())
                lines.append(f"- {kind.split(' of ')[-1] if 'bytes' in kind else kind}: {found}")
    return "\n".join(lines) + "\n"


def renewed(report: dict[str, Any], shape: str, rows: list[dict[str, Any]], *, pairs: int) -> dict[str, Any]:
    """Return a report with other rows of one shape, beside those of others from whenever they were measured."""
    now = {**heading("no GPU used"), "pairs": pairs}
    kept = [row for row in report.get("rows", []) if row["shape"] != shape]
    return {**now, "measured": {**report.get("measured", {}), shape: now}, "rows": [*kept, *rows]}


def main() -> None:
    """Measure, and write the report after each shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--stock-pairs", type=int, default=3)
    parser.add_argument(
        "--shapes", nargs="*", default=list(FASTER_THAN_STOCK), help="others stay as they were measured"
    )
    parser.add_argument("--folder", type=Path, help="where the models are made and kept; a temporary one if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    file = options.out / "checkpoints.json"
    report = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    report = renewed(report, "", [evaluate_imports(options.pairs)], pairs=options.pairs)
    with tempfile.TemporaryDirectory() as temporary:
        for shape in options.shapes:
            folder = (options.folder or Path(temporary)) / shape
            if not (folder / "base").exists():
                SHAPES[shape](folder / "base")
            rows = evaluate(shape, folder, pairs=options.pairs, stock_pairs=options.stock_pairs)
            report = renewed(report, shape, rows, pairs=options.pairs)
            write("checkpoints", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
