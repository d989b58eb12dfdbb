"""What each method of PEFT costs on a base in the shape of BERT-base, and whether it takes a base in 4 bits.

``python -m tests.benchmarks.methods`` trains each method for some steps with the settings that PEFT gives it, in turn
with LoRA, and writes the figures to ``resources/benchmarks``. Before a method is timed, its loss has to have a gradient
and a step has to change it. What a base in 4 bits takes is tried on a tiny one: trained, saved and loaded to the same
bits. The documentation makes its table of methods from the figures.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import re
import statistics
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flair
import peft
import torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from peft import PeftConfig, PeftType
from transformers import BitsAndBytesConfig

import flair_peft
from flair_peft.adapter import trainable
from flair_peft.adapter.methods import needs_step_hook
from flair_peft.errors import FlairPeftError
from tests.benchmarks.report import RESULTS, heading
from tests.benchmarks.shapes import bert_base
from tests.benchmarks.training import LABELS, texts
from tests.support import tiny
from tests.support.methods import METHODS, REFUSED_METHODS, perturb_

REFERENCE = "LORA"
TARGETS = ["query", "value"]

# What PEFT has no default for.
REQUIRED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000},
    "BOFT": {"boft_block_size": 4},
    "C3A": {"block_size": 256},
    "CARTRIDGE": {"num_virtual_tokens": 20},
    "IA3": {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]},
    "LN_TUNING": {"target_modules": ["LayerNorm"]},
    "OFT": {"oft_block_size": 32},
    "PREFIX_TUNING": {"num_virtual_tokens": 20},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "P_TUNING": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "TRAINABLE_TOKENS": {"target_modules": ["word_embeddings"], "token_indices": list(range(100, 120))},
}


def methods() -> list[str]:
    """Return the methods that work on an encoder, LoRA first."""
    found = [name for name, method in METHODS.items() if "encoder" in method.works and name not in REFUSED_METHODS]
    return sorted(found, key=lambda name: (name != REFERENCE, name))


def settings(name: str) -> dict[str, Any]:
    """Return what a config is given beyond PEFT's defaults."""
    fields = peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)].__dataclass_fields__
    targets = {"target_modules": TARGETS} if "target_modules" in fields else {}
    return {**targets, **REQUIRED.get(name, {})}


def config_of(name: str) -> PeftConfig:
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(name)](task_type="FEATURE_EXTRACTION", **settings(name))


def classifier(base: Path, config: PeftConfig, **options: Any) -> TextClassifier:
    torch.manual_seed(0)
    dictionary = Dictionary(add_unk=False)
    for label in LABELS:
        dictionary.add_item(label)
    embeddings = flair_peft.PeftTransformerDocumentEmbeddings(str(base), peft_config=config, **options)
    return TextClassifier(embeddings, label_dictionary=dictionary, label_type="sentiment")


def sentences() -> list[Sentence]:
    return [
        Sentence(words, use_tokenizer=False).add_label("sentiment", LABELS[number % 2])
        for number, words in enumerate(texts())
    ]


class Loop:
    """A model and one step of its training on one batch."""

    def __init__(self, base: Path, config: PeftConfig, **options: Any) -> None:
        start = time.perf_counter()
        self.model = classifier(base, config, **options)
        self.seconds_to_make = time.perf_counter() - start
        self.batch = sentences()
        self.trained = trainable.parameters(self.model.embeddings.model)
        self.hooked = self.model.embeddings.model.base_model if needs_step_hook(config) else None
        self.steps = 0
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-3)
        self.model.train()

    def step(self) -> float:
        self.optimizer.zero_grad()
        loss = self.model.forward_loss(self.batch)[0]
        loss.backward()
        self.optimizer.step()
        if self.hooked is not None:  # as RankAllocationPlugin does it
            self.steps += 1
            for parameter in self.trained.values():
                parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            self.hooked.update_and_allocate(self.steps)
        for sentence in self.batch:
            sentence.clear_embeddings()
        return float(loss.detach())

    def seconds(self) -> float:
        start = time.perf_counter()
        self.step()
        return time.perf_counter() - start


def check(loop: Loop) -> None:
    """Raise unless a step moves the adapter."""
    before = {name: parameter.detach().clone() for name, parameter in loop.trained.items()}
    loop.step()
    loop.step()  # where a factor starts at zero, the other one has its first gradient now
    assert any(not torch.equal(before[name], parameter) for name, parameter in loop.trained.items())


def measure(name: str, base: Path, reference: Loop, *, pairs: int) -> dict[str, Any]:
    """Return the cost of a method; its steps are timed in turn with those of LoRA."""
    loop = Loop(base, config_of(name))
    check(loop)
    times = [(loop.seconds(), reference.seconds()) for _ in range(pairs)]
    loop.model.eval()
    with tempfile.TemporaryDirectory() as folder:
        flair_peft.save_pretrained(loop.model, folder)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
    return {
        "config": type(config_of(name)).__name__,
        "settings": settings(name),
        "trained": sum(parameter.numel() for parameter in loop.trained.values()),
        "bytes": size,
        "seconds_to_make": round(loop.seconds_to_make, 2),
        "step": round(statistics.median(own / other for own, other in times), 2),
    }


def in_4_bits(name: str, base: Path) -> dict[str, Any]:
    """Return whether the method takes a base in 4 bits, with gradient checkpointing or without, or why not."""
    found = try_in_4_bits(name, base)
    return found if found["works"] else try_in_4_bits(name, base, use_gradient_checkpointing=False)


def try_in_4_bits(name: str, base: Path, **preparing: bool) -> dict[str, Any]:
    """Return what prevents the method from training, being saved and coming back on a base in 4 bits, if anything."""
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    options: dict[str, Any] = {"transformers_model_kwargs": {"quantization_config": settings}}
    options["peft_gradient_checkpointing_kwargs"] = preparing
    try:
        loop = Loop(base, METHODS[name].config("encoder"), **options)
        checkpointing = loop.model.embeddings.base_model.is_gradient_checkpointing
        perturb_(loop.model.embeddings.model, 0)
        check(loop)
        loop.model.eval()
        with tempfile.TemporaryDirectory() as folder:
            flair_peft.save_pretrained(loop.model, folder)
            loaded = flair_peft.from_pretrained(folder)
        found = vectors(loop.model), vectors(loaded)
    except FlairPeftError as error:
        return {"works": False, "why_not": str(error).replace(str(base), "…")}
    except Exception as error:  # whatever a library says
        return {"works": False, "why_not": f"{type(error).__name__}: {error}"}
    if torch.equal(*found):
        return {"works": True, "checkpointing": checkpointing}
    return {"works": False, "why_not": "it gives other vectors after loading"}


def vectors(model: TextClassifier) -> torch.Tensor:
    found = [Sentence("Berlin is large"), Sentence("a wonderful film")]
    model.eval()
    with torch.no_grad():
        model.embeddings.embed(found)
    return torch.stack([sentence.get_embedding().cpu() for sentence in found])


def evaluate(*, pairs: int, names: Sequence[str]) -> dict[str, Any]:
    """Return the figures of these methods."""
    with tempfile.TemporaryDirectory() as folder:
        base, small = bert_base(Path(folder) / "base"), tiny.build("bert", Path(folder) / "tiny")
        reference = Loop(base, config_of(REFERENCE))
        check(reference)
        rows = {}
        for name in names:
            rows[name] = {
                **measure(name, base, reference, pairs=pairs),
                "in_4_bits": in_4_bits(name, small),
            }
            print(name, json.dumps(rows[name]), flush=True)
            gc.collect()
    return {**heading("one of them used", "no GPU used"), "pairs": pairs, "methods": rows}


def with_rows(report: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return what the file holds with the rows of the report in the place of its own."""
    found = json.loads(file.read_text(encoding="utf-8"))
    return {**found, "methods": {name: report["methods"].get(name, row) for name, row in found["methods"].items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=methods(), help="these methods; the others stay as they are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    logging.getLogger("flair").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device("cpu")
    report = evaluate(pairs=chosen.pairs, names=chosen.only or methods())
    if chosen.only:
        report = with_rows(report, chosen.out / "methods.json")
    text = re.sub(r"0x[0-9a-f]+", "0x…", json.dumps(report, indent=2, ensure_ascii=False))
    chosen.out.mkdir(parents=True, exist_ok=True)
    (chosen.out / "methods.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
