"""A training step of Flair over embeddings with an adapter, against a bare loop of PEFT on the same batch.

``python -m tests.benchmarks.training`` builds a base in the shape of BERT-base with random weights, gives both loops
the same adapter and head, compares losses and gradients, and writes the figures to ``resources/benchmarks``. Both loops
tokenise the words of the batch in each step. Steps are timed in turn in one process; memory is the peak of a process
that does one of the two, beyond what it takes to import everything.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from flair.training_utils import store_embeddings
from peft import get_peft_model
from transformers import AutoModel, AutoTokenizer

import flair_peft
from tests.benchmarks.memory import peak, private, reset_peak
from tests.benchmarks.report import RESULTS, heading, in_process, ratio, seconds, write
from tests.benchmarks.shapes import SHAPES
from tests.support.configs import lora

WANTED = 1.05
WORDS, BATCH = 30, 8
LABELS = ("good", "bad")
# Of gradients, relative to the largest of a tensor: sums in another order.
TOLERANCE = 1e-4

Step = Callable[[], torch.Tensor]
Loop = tuple[torch.nn.Module, Callable[[], torch.Tensor], Step]


def texts() -> list[list[str]]:
    """Return the words of a batch; lengths differ, as in any corpus."""
    generator = random.Random(0)
    words = ["a", "bb", "ab", "ba", "the", "aaab", ",", "aba", "?"]
    return [generator.choices(words, k=WORDS - 2 * number) for number in range(BATCH)]


def flair_loop(base: Path) -> Loop:
    """Return model, loss of the batch, and one step as Flair's trainer does it."""
    torch.manual_seed(0)
    dictionary = Dictionary(add_unk=False)
    for label in LABELS:
        dictionary.add_item(label)
    embeddings = flair_peft.PeftTransformerDocumentEmbeddings(str(base), peft_config=lora(r=8, lora_alpha=32))
    model = TextClassifier(embeddings, label_dictionary=dictionary, label_type="sentiment")
    sentences = [
        Sentence(words, use_tokenizer=False).add_label("sentiment", LABELS[number % 2])
        for number, words in enumerate(texts())
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5)

    def loss() -> torch.Tensor:
        return model.forward_loss(sentences)[0]

    def step() -> torch.Tensor:
        model.zero_grad()
        optimizer.zero_grad()
        found = loss()
        found.backward()
        store_embeddings(sentences, "none")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        return found.detach()

    return model, loss, step


def bare_loop(base: Path) -> Loop:
    """Return the same with transformers and PEFT alone."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base)
    encoder = get_peft_model(AutoModel.from_pretrained(base), lora(r=8, lora_alpha=32))
    model = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(768, len(LABELS))})
    batch, targets = texts(), torch.tensor([number % 2 for number in range(BATCH)])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)

    def loss() -> torch.Tensor:
        encoded = tokenizer(batch, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt")
        vectors = encoder(**encoded).last_hidden_state[:, 0]
        return torch.nn.functional.cross_entropy(model["head"](vectors), targets, reduction="sum")

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        return found.detach()

    return model, loss, step


LOOPS = {"flair": flair_loop, "bare": bare_loop}


def make_equal_(model: torch.nn.Module, bare: torch.nn.Module, *, head: str = "decoder") -> dict[str, str]:
    """Give the bare model the weights that are trained, in place; name of each there → name in the Flair model."""
    state = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = {name: name.replace("encoder.base_model", "embeddings.model.base_model") for name, _ in trained(bare)}
    names |= {f"head.{name}": f"{head}.{name}" for name in ("weight", "bias")}
    assert set(names.values()) == set(state)
    with torch.no_grad():
        for name, parameter in trained(bare):
            parameter.copy_(state[names[name]])
    return names


def trained(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def check(ours: Loop, bare: Loop) -> None:
    """Raise unless both loops have the same loss and the same gradients without dropout."""
    names = make_equal_(ours[0], bare[0])
    check_gradients((ours[0], bare[0]), (ours[1], bare[1]), names=names)


def check_gradients(
    models: tuple[torch.nn.Module, torch.nn.Module],
    steps: tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]],
    *,
    names: dict[str, str],
) -> None:
    """Raise unless both, ours and the bare one, lose the same and have the same gradients without dropout.

    Dropout is left out because groups of a batch draw other random numbers than one pass. The models train afterwards.
    """
    losses = []
    for model, loss in zip(models, steps, strict=True):
        model.eval()
        model.zero_grad()
        if model is models[0]:
            model.embeddings.training = True  # else Flair takes no gradient of them
        losses.append(loss())
        losses[-1].backward()
        model.train()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    gradients = {name: parameter.grad for name, parameter in trained(models[0])}
    for name, parameter in trained(models[1]):
        if parameter.grad is None:  # of a pooler that nothing reads
            assert gradients[names[name]] is None
            continue
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(gradients[names[name]], parameter.grad, rtol=TOLERANCE, atol=TOLERANCE * scale)


def times(base: Path, *, pairs: int) -> dict[str, list[float]]:
    """Return the seconds of each step of both loops, taken in turn, the first of a pair changing."""
    loops = {name: make(base) for name, make in LOOPS.items()}
    check(loops["flair"], loops["bare"])
    found: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(-3, pairs):
        for name in sorted(loops, reverse=bool(number % 2)):
            taken = seconds(loops[name][2])
            if number >= 0:
                found[name].append(taken)
    return found


def one_process(name: str, base: Path, *, steps: int = 4) -> None:
    """Print the memory of a process that does one of the loops, beyond its imports, in bytes.

    ``peak`` counts the pages of files that were read, too; ``private`` is what the process has for itself afterwards.
    """
    before, private_before = reset_peak(), private()
    model, _, step = LOOPS[name](base)
    model.train()
    for _ in range(steps):
        step()
    print(json.dumps({"peak": peak() - before, "private": private() - private_before}))


def memory(base: Path, *, pairs: int) -> dict[str, list[dict[str, int]]]:
    """Return the memory of processes, taken in turn."""
    found: dict[str, list[dict[str, int]]] = {name: [] for name in LOOPS}
    for _ in range(pairs):
        for name in LOOPS:
            found[name].append(in_process("tests.benchmarks.training", "--loop", name, "--base", base))
    return found


def evaluate(base: Path, *, pairs: int) -> dict[str, Any]:
    """Return what was measured and what we want."""
    found, sizes = {"time of a step": times(base, pairs=pairs)}, memory(base, pairs=pairs)
    for kind in ("peak", "private"):
        found[f"{kind} memory"] = {name: [size[kind] for size in those] for name, those in sizes.items()}
    rows = [
        {"what": f"{what} in Flair / in a bare loop", **ratio(values["flair"], values["bare"])}
        for what, values in found.items()
    ]
    return {
        **heading("one core used", "no GPU used"),
        "pairs": pairs,
        "rows": [{**row, "wanted": f"≤ {WANTED}"} for row in rows],
        "figures": {
            what: {name: statistics.median(values) for name, values in those.items()} for what, those in found.items()
        },
    }


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# A training step: time and memory",
        "",
        f"`python -m tests.benchmarks.training`, {report['date']}, {report['machine']}, {report['versions']}.",
        f"LoRA (r=8) on a base in the shape of BERT-base, fp32, {BATCH} sentences of up to {WORDS} words. Ratios are",
        f"medians of {report['pairs']} interleaved pairs, with 95 % bootstrap intervals; losses and gradients were the",
        "same.",
        "",
        "| what | median | 95 % | wanted |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        lines.append(
            f"| {row['what']} | {row['median']:.3f} | {row['low']:.3f} to {row['high']:.3f} | {row['wanted']} |"
        )
    lines.append("")
    for what, values in report["figures"].items():
        scale, unit = (1, "s") if what.startswith("time") else (1e6, "MB")
        lines.append(
            f"- {what}: Flair {values['flair'] / scale:.3g} {unit}, bare loop {values['bare'] / scale:.3g} {unit}"
        )
    lines += [
        "",
        "Peak memory counts pages of the mapped base, once for each mapping. What is read of it only once, such as the",
        "sample that its fingerprint is of, is read through a mapping that goes again.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--base", type=Path, help="where the base model is; it is made if left out")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device("cpu")
    if options.loop:
        one_process(options.loop, options.base)
        return
    with tempfile.TemporaryDirectory() as temporary:
        report = evaluate(options.base or SHAPES["bert-base"](Path(temporary) / "base"), pairs=options.pairs)
    write("training", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
