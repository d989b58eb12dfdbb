"""A 4-bit base in memory, against what the same weights take in fp16.

``python -m tests.benchmarks.quantised`` builds a base in the shape of BERT-base with random weights, loads it in 4 bits
in a process of its own, predicts, saves, loads the checkpoint in another process, compares what both predict bit by
bit, and writes the figures to ``resources/benchmarks``.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes
import flair
import torch
from flair.data import Dictionary
from flair.models import TextClassifier
from transformers import AutoModel, BitsAndBytesConfig

import flair_peft
from flair_peft.primitives import mapped_memory
from tests.benchmarks.memory import resident
from tests.benchmarks.report import RESULTS, heading, in_process, write
from tests.benchmarks.serving import scores, sentences
from tests.benchmarks.shapes import SHAPES
from tests.support import tiny
from tests.support.configs import lora

WANTED = 0.35
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def make(base: Path) -> TextClassifier:
    torch.manual_seed(0)
    embeddings = flair_peft.PeftTransformerDocumentEmbeddings(
        str(base),
        peft_config=lora(target_modules=None, r=8, lora_alpha=32),
        transformers_model_kwargs={"quantization_config": BitsAndBytesConfig(**FOUR_BITS)},
    )
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels).eval()


def measure(folder: Path, is_loaded: bool) -> dict[str, Any]:
    """Return what a process takes for the model beyond its imports, in bytes, and what it predicts.

    What was freed and is kept for the next forward pass counts in ``kept`` and not in ``bytes``.
    """
    scores(make(folder / "tiny"), sentences(4))  # what modules and the first products take is not the model's
    gc.collect()
    mapped_memory.give_back_freed()
    before = resident()
    model = flair_peft.from_pretrained(folder / "model") if is_loaded else make(folder / "base")
    gc.collect()
    kept = resident() - before
    mapped_memory.give_back_freed()
    taken = resident() - before
    found = scores(model, sentences(4)).tolist()
    if not is_loaded:
        flair_peft.save_pretrained(model, folder / "model")
    tensors = [*model.embeddings.model.parameters(), *model.embeddings.model.buffers()]
    return {"bytes": taken, "kept": kept, "tensors": sum(tensor.nbytes for tensor in tensors), "scores": found}


def sizes(folder: Path) -> tuple[int, int]:
    """Return the bytes of the weights that are quantised, in fp16, and of all else, as it is kept."""
    base = AutoModel.from_pretrained(folder / "base")
    linear = sum(m.weight.numel() for m in base.modules() if isinstance(m, torch.nn.Linear))
    total = sum(parameter.numel() for parameter in base.parameters())
    return 2 * linear, 4 * (total - linear)


def run(folder: Path, way: str) -> dict[str, Any]:
    return in_process("tests.benchmarks.quantised", "--folder", folder, "--way", way)


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    linear, rest = (report[name] for name in ("bytes of linear weights in fp16", "bytes of the rest"))
    lines = [
        "# A 4-bit base in memory",
        "",
        f"`python -m tests.benchmarks.quantised`, {report['date']}, {report['machine']}, {report['versions']}.",
        f"BERT-base's shape, NF4 with double quantisation. Linear weights in fp16: {linear / 1e6:.0f} MB; all else,",
        f"which is not quantised: {rest / 1e6:.0f} MB. The share is that of linear weights. The model that was",
        "loaded gave the same scores, bit by bit.",
        "",
        "| | what the process takes | with what was freed | share of fp16 | wanted |",
        "|---|---|---|---|---|",
    ]
    for way in ("made", "loaded"):
        taken, kept = (f"{report[way][name] / 1e6:.0f} MB" for name in ("bytes", "kept"))
        lines.append(f"| {way} | {taken} | {kept} | {report['share'][way]:.2f} | ≤ {report['wanted']} |")
    lines.append(f"| its tensors alone | | | {report['share of tensors']:.2f} | |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the model is made and kept; a temporary one if left out")
    parser.add_argument("--way", choices=("made", "loaded"), help="do this in this process, and print what it took")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    flair.device = torch.device("cpu")
    if options.way is not None:
        print(json.dumps(measure(options.folder, options.way == "loaded")))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "base").exists():
            SHAPES["bert-base"](folder / "base")
        if not (folder / "tiny").exists():
            tiny.build("bert", folder / "tiny")
        linear, rest = sizes(folder)
        made, loaded = run(folder, "made"), run(folder, "loaded")
    assert made["scores"] == loaded["scores"], "the reload predicts something else"
    report = {
        **heading("no GPU used", bitsandbytes=bitsandbytes.__version__),
        "bytes of linear weights in fp16": linear,
        "bytes of the rest": rest,
        "made": {name: made[name] for name in ("bytes", "kept", "tensors")},
        "loaded": {name: loaded[name] for name in ("bytes", "kept", "tensors")},
        "share": {way: (found["bytes"] - rest) / linear for way, found in (("made", made), ("loaded", loaded))},
        "share of tensors": (loaded["tensors"] - rest) / linear,
        "wanted": WANTED,
    }
    write("quantised", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
