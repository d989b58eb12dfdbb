"""What converting a file of stock Flair takes: ``python -m tests.benchmarks.conversion --shape xlm-roberta-large``.

The file is written by stock embeddings with the hook taken out, in the shape of a real model. The conversion runs in a
process of its own, whose peak memory is compared with the size of the file; what was in use before it began is not
counted. The converted model must predict what the stock model predicted.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from peft import LoraConfig

import flair_peft
from tests.benchmarks.memory import peak, reset_peak
from tests.benchmarks.shapes import SHAPES

_TEXT = "a wonderful film in Berlin"


def config() -> LoraConfig:
    """Return LoRA that is no no-op."""
    return LoraConfig(r=8, lora_alpha=24, target_modules=["query", "value"], init_lora_weights=False)


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


def main() -> None:
    """Write the file, convert it and print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=SHAPES, default="bert-base")
    parser.add_argument("--folder", type=Path, help="where base and file stay; a temporary one if left out")
    parser.add_argument("--convert", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    flair.device = torch.device("cpu")
    logging.getLogger("flair").setLevel(logging.ERROR)
    if arguments.convert:
        convert(*arguments.convert)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / arguments.shape
        base, path = folder / "base", folder / "stock.pt"
        if not (base / "config.json").exists():
            SHAPES[arguments.shape](base)
        expected = write_stock_file(base, path)
        command = [sys.executable, "-m", __spec__.name, "--convert", str(path), str(folder / "converted")]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        assert max(abs(a - b) for a, b in zip(found["scores"], expected, strict=True)) < 1e-5
        size = path.stat().st_size
        converted = sum(file.stat().st_size for file in (folder / "converted").rglob("*") if file.is_file())
        print(
            json.dumps(
                {
                    "shape": arguments.shape,
                    "file_bytes": size,
                    "directory_bytes": converted,
                    "seconds": round(found["seconds"], 1),
                    "peak_to_file": round(found["peak"] / size, 2),
                },
                indent=2,
            )
        )


if __name__ == "__main__":
    main()
