"""Saves of a model that is trained on, as after each better epoch, against PEFT's own of the adapter alone.

``python -m tests.benchmarks.saves`` changes what is trained a little before each pair of saves, compares what both
wrote, and writes the figures to ``resources/benchmarks``.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from flair.models import TextClassifier
from peft import get_peft_model_state_dict
from safetensors.torch import load_file

import flair_peft
from tests.benchmarks.checkpoints import make_model
from tests.benchmarks.report import RESULTS, heading, ratio, seconds, write
from tests.benchmarks.shapes import SHAPES

# Of the time, against PEFT's save_pretrained: both flush what they wrote, or PEFT does not.
WANTED = {"with fsync": 2.5, "without": None}


def train_(model: torch.nn.Module) -> None:
    """Change the weights that are trained a little, in place: nobody saves the same ones again."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1e-4)


def save_with_peft(model: Any, folder: Path) -> None:
    """Write what PEFT alone writes of the adapter, without the input embeddings, to which Flair added a row."""
    model.embeddings.model.save_pretrained(folder, save_embedding_layers=False)


def save_with_peft_and_flush(model: Any, folder: Path) -> None:
    """Write the same, so that a loss of power leaves it, as each save of this package does."""
    save_with_peft(model, folder)
    for path in (*folder.iterdir(), folder, folder.parent):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def evaluate(folder: Path, *, pairs: int) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Return rows and seconds of the first save of a model and of later ones, taken in turn with PEFT's."""
    model = make_model(folder)
    ours = {
        "model.save": lambda: model.save(folder / "again.pt"),
        "save_pretrained": lambda: flair_peft.save_pretrained(model, folder / "again"),
    }
    peft = {
        "with fsync": lambda: save_with_peft_and_flush(model, folder / "peft"),
        "without": lambda: save_with_peft(model, folder / "peft"),
    }
    first, rows, taken = seconds(ours["model.save"]), [], dict[str, list[float]]()
    train_(model)
    for save in (*ours.values(), *peft.values()):
        save()
    check_saved(model, folder)
    for name, save in ours.items():
        for how, other in peft.items():
            key = f"{name}, PEFT {how}"
            both = alternately(save, other, before=lambda: train_(model), pairs=pairs)
            taken[name], taken[f"PEFT {how}"] = both
            wanted = WANTED[how]
            rows.append({"what": f"later {key}", **ratio(*both), "wanted": wanted and f"≤ {wanted}"})
    return rows, {"first model.save": first, **{name: statistics.median(times) for name, times in taken.items()}}


def alternately(
    one: Callable[[], None], other: Callable[[], None], *, before: Callable[[], None], pairs: int
) -> tuple[list[float], list[float]]:
    """Return the seconds of each of two actions, in pairs whose order changes; the first two pairs warm up."""
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(-2, pairs):
        before()
        for index in sorted((0, 1), reverse=bool(number % 2)):
            taken = seconds((one, other)[index])
            if number >= 0:
                found[index].append(taken)
    return found


def check_saved(model: TextClassifier, folder: Path) -> None:
    """Raise unless what both wrote last holds the adapter that the model has now."""
    live = get_peft_model_state_dict(model.embeddings.model, save_embedding_layers=False)
    for written in ("again", "peft"):
        held = load_file(folder / written / "adapter_model.safetensors")
        assert held.keys() == live.keys()
        assert all(torch.equal(held[name], tensor) for name, tensor in live.items())
    assert torch.equal(TextClassifier.load(folder / "again.pt").decoder.weight, model.decoder.weight.cpu())


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Saves of a model that is trained on",
        "",
        f"`python -m tests.benchmarks.saves`, {report['date']}, {report['machine']}, {report['versions']}.",
        f"Ratios are medians of {report['pairs']} interleaved pairs in one process, with 95 % bootstrap intervals,",
        "each after a small change of what is trained, against PEFT's save_pretrained of the adapter alone. That does",
        "not flush its files to the disk: the goal is held against one that does, since every save of this package",
        "survives a loss of power. Both were compared with the live model. The made vocabularies spell most words: the",
        "sentence of the proof has 35 tokens in BERT-base's shape, 20 with the vocabulary of BERT.",
        "",
        "| shape | what | median | 95 % | wanted |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {row['shape']} | {row['what']} | {row['median']:.2f} | {interval} | {row['wanted'] or ''} |")
    lines.append("")
    for shape, taken in report["seconds"].items():
        found = ", ".join(f"{name} {value:.3g} s" for name, value in taken.items())
        lines.append(f"- {shape}: {found}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    rows, taken = list[dict[str, Any]](), {}
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as temporary:
            SHAPES[shape](Path(temporary, "base"))
            found, taken[shape] = evaluate(Path(temporary), pairs=options.pairs)
            rows += [{"shape": shape, **row} for row in found]
    report = {**heading("one thread", "no GPU used"), "pairs": options.pairs, "rows": rows, "seconds": taken}
    write("saves", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
