"""What converting a file of stock Flair takes: ``python -m tests.benchmarks.conversion``.

The file is written by stock embeddings with the hook taken out, in the shape of a real model. The conversion runs in a
process of its own, whose peak memory is compared with the size of the file; what was in use before it began is not
counted. The converted model must predict what the stock model predicted.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from peft import LoraConfig

import flair_peft
from tests.benchmarks.memory import peak, reset_peak
from tests.benchmarks.report import RESULTS, heading, in_process, write
from tests.benchmarks.shapes import SHAPES
from tests.support.configs import lora

MODULE = "tests.benchmarks.conversion"

_TEXT = "a wonderful film in Berlin"


def config() -> LoraConfig:
    """Return LoRA that is no no-op."""
    return lora(r=8, lora_alpha=24)


def scores(model: TextClassifier) -> list[float]:
    """Return the scores of one sentence."""
    sentence = Sentence(_TEXT)
    model.eval()
    model.predict(sentence, return_probabilities_for_all_classes=True)
    return [label.score for label in sentence.get_labels()]


def write_stock_file(base: Path, path: Path) -> list[float]:
    """Write the file that stock Flair writes, and return what its model predicts."""
    flair_peft.uninstall()
    torch.manual_seed(1)
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    embeddings = TransformerDocumentEmbeddings(str(base), peft_config=config())
    model = TextClassifier(embeddings, label_type="opinion", label_dictionary=labels)
    model.save(path)
    flair_peft.install()
    return scores(model)


def convert(path: Path, directory: Path) -> None:
    """Convert, and print the seconds and the peak memory that it took, in bytes."""
    before, start = reset_peak(), time.perf_counter()
    model = flair_peft.convert_legacy(path, directory, peft_config=config())
    seconds, used = time.perf_counter() - start, peak() - before
    print(json.dumps({"seconds": seconds, "peak": used, "scores": scores(model)}))


def measure(folder: Path, shape: str) -> dict[str, Any]:
    """Return what the conversion takes in a process of its own; what it wrote has to predict the same."""
    base, path, directory = folder / "base", folder / "stock.pt", folder / "converted"
    if not (base / "config.json").exists():
        SHAPES[shape](base)
    expected = write_stock_file(base, path)
    found = in_process(MODULE, "--convert", path, directory)
    assert max(abs(a - b) for a, b in zip(found["scores"], expected, strict=True)) < 1e-5
    size = path.stat().st_size
    return {
        "shape": shape,
        "file_bytes": size,
        "directory_bytes": sum(file.stat().st_size for file in directory.rglob("*") if file.is_file()),
        "seconds": round(found["seconds"], 1),
        "peak_to_file": round(found["peak"] / size, 2),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    return "\n".join(
        [
            "# Converting a file of stock Flair",
            "",
            f"`python -m {MODULE}`, {report['date']}, {report['machine']}, {report['versions']}.",
            f"A text classifier with LoRA (r=8) in the shape of {report['shape']}, fp32, as stock Flair saves it,",
            "with its base; `convert_legacy` in a process of its own, with everything imported. The directory predicts",
            "the same.",
            "",
            "| | |",
            "|---|---|",
            f"| file of stock Flair | {report['file_bytes'] / 1e6:,.0f} MB |",
            f"| directory | {report['directory_bytes'] / 1e6:.3g} MB |",
            f"| time | {report['seconds']} s |",
            f"| peak memory / size of the file | {report['peak_to_file']:.2f} |",
            "",
        ]
    )


def main() -> None:
    """Write the file, convert it and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="xlm-roberta-large")
    parser.add_argument("--folder", type=Path, help="where base and file stay; a temporary one if left out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flair.device = torch.device("cpu")
    logging.getLogger("flair").setLevel(logging.ERROR)
    if arguments.convert:
        convert(*arguments.convert)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.shape
        report = {**heading("no GPU used"), **measure(folder, arguments.shape)}
    write("conversion", report, to_markdown(report), out=arguments.out)


if __name__ == "__main__":
    main()
