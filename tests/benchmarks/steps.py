"""The time of a training step in the shape of BERT-base: full fine-tuning, and LoRA with this package."""

from __future__ import annotations

import functools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.training_utils import store_embeddings

from flair_peft import PeftTransformerDocumentEmbeddings
from tests.benchmarks.report import heading, ratio
from tests.benchmarks.shapes import SHAPES
from tests.benchmarks.training import LABELS, texts
from tests.benchmarks.ways import LORA

WANTED_STEP = 0.6

conditions = functools.partial(heading, "one core used", "no GPU used")
Loop = tuple[torch.nn.Module, list[Sentence]]


def loop(embeddings: Any) -> Loop:
    """Return a classifier whose head starts as in every other loop, and a batch."""
    dictionary = Dictionary(add_unk=False)
    for label in LABELS:
        dictionary.add_item(label)
    torch.manual_seed(0)
    model = TextClassifier(embeddings, label_dictionary=dictionary, label_type="sentiment")
    return model, [
        Sentence(words, use_tokenizer=False).add_label("sentiment", LABELS[number % 2])
        for number, words in enumerate(texts())
    ]


def step(model: Any, sentences: list[Sentence], optimizer: torch.optim.Optimizer) -> None:
    """Do one step as Flair's trainer does it."""
    model.zero_grad()
    optimizer.zero_grad()
    model.forward_loss(sentences)[0].backward()
    store_embeddings(sentences, "none")
    torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
    optimizer.step()


def step_times(*, pairs: int) -> dict[str, Any]:
    """Return the processor's time of a step of LoRA and of full fine-tuning, in turn, the first of a turn changing."""
    with tempfile.TemporaryDirectory() as temporary:
        base = str(SHAPES["bert-base"](Path(temporary) / "base"))
        few = functools.partial(LORA, r=8, target_modules=["query", "value"])
        loops = {
            "full fine-tuning": loop(TransformerDocumentEmbeddings(base, fine_tune=True)),
            "LoRA, r=8 on query and value": loop(PeftTransformerDocumentEmbeddings(base, peft_config=few())),
            "LoRA, r=16 on all linear layers": loop(PeftTransformerDocumentEmbeddings(base, peft_config=LORA())),
        }
        check_losses(list(loops.values()))
        steps = [
            functools.partial(step, model.train(), sentences, torch.optim.AdamW(model.parameters(), lr=5e-5))
            for model, sentences in loops.values()
        ]
        seconds: list[list[float]] = [[] for _ in steps]
        for number in range(-3, pairs):
            for which in list(range(len(steps)))[:: -1 if number % 2 else 1]:
                start = time.process_time()
                steps[which]()
                if number >= 0:
                    seconds[which].append(time.process_time() - start)
    rows = [
        {"what": f"{name} / full fine-tuning", **ratio(those, seconds[0]), "wanted": f"≤ {WANTED_STEP}"}
        for name, those in list(zip(loops, seconds, strict=True))[1:]
    ]
    figures = {name: statistics.median(those) for name, those in zip(loops, seconds, strict=True)}
    return {**conditions(), "pairs": pairs, "rows": rows, "figures": figures}


def check_losses(loops: list[Loop]) -> None:
    """Raise unless all lose the same without dropout: an adapter that starts as LoRA does changes nothing."""
    with torch.no_grad():
        losses = [model.eval().forward_loss(sentences)[0] for model, sentences in loops]
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-5)


def step_page(found: dict[str, Any]) -> list[str]:
    lines = [
        "## A training step in the shape of BERT-base",
        "",
        f"`python -m tests.benchmarks.quality --only step`, {found['date']}, {found['machine']}, {found['versions']}.",
        "",
        "A text classifier, fp32, 8 sentences of up to 30 words; time of the processor, which is used by one thread.",
        f"Ratios are medians of {found['pairs']} interleaved pairs with 95 % bootstrap intervals. Before any step all",
        "have the same loss.",
        "",
        "| what | median | 95 % | wanted |",
        "|---|---|---|---|",
    ]
    for r in found["rows"]:
        lines.append(f"| {r['what']} | {r['median']:.3f} | {r['low']:.3f} to {r['high']:.3f} | {r['wanted']} |")
    return [*lines, "", *(f"- {name}: {seconds:.3g} s" for name, seconds in found["figures"].items())]
