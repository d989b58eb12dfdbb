"""On a GPU: training and prediction beside a loop of PEFT, batches for many models, torch.compile, other attention.

``python -m tests.benchmarks.gpu`` builds bases with random weights in the shapes of BERT-base, XLM-R-large and a
decoder of 1 B parameters (``--shapes llama-7b`` for a larger one), gives both loops the same adapter and head, compares
what they compute, and writes ratios of interleaved pairs to ``resources/benchmarks``. Each shape is measured in a
process of its own; what fails is a row with its reason. ``--device cpu --quick`` tries all of it on tiny bases.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flair
import peft
import torch
from flair.data import Dictionary, Sentence
from flair.models import TextClassifier
from flair.training_utils import store_embeddings
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from tests.benchmarks.report import RESULTS, heading, in_process, write
from tests.benchmarks.serving import Action, compare, read, scores
from tests.benchmarks.shapes import DECODERS, SHAPES, llama
from tests.support import tiny
from tests.support.configs import lora

BASES: dict[str, Callable[[Path], Path]] = {
    **SHAPES,
    **DECODERS,
    "tiny-bert": functools.partial(tiny.build, "bert"),
    "tiny-llama": functools.partial(llama, hidden_size=64, intermediate_size=128, num_hidden_layers=2),
}
FOUR_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
PRECISIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "fp32": lambda: {"torch_dtype": torch.float32},
    "bf16": lambda: {"torch_dtype": torch.bfloat16},
    "4 bits": lambda: {"torch_dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(**FOUR_BITS)},
}
# Of the vectors of both loops, as a share of their norm.
TOLERANCES = {"fp32": 1e-3, "bf16": 0.05, "4 bits": 0.05}
COMPILE = "torch.compile"
SWITCHES = (COMPILE, "eager", "flash_attention_2")
MODELS = (1, 2, 4, 8, 16, 32, 64)
LABELS = ("good", "bad")
Row = dict[str, Any]


def texts(count: int) -> list[list[str]]:
    """Return the words of sentences whose lengths differ."""
    generator = random.Random(0)
    return [generator.choices(["a", "bb", "ab", "ba", "the", "aaab"], k=generator.randint(4, 48)) for _ in range(count)]


def sentences(count: int) -> list[Sentence]:
    given = [Sentence(words, use_tokenizer=False) for words in texts(count)]
    return [one.add_label("sentiment", LABELS[number % 2]) for number, one in enumerate(given)]


def classifier(base: Path, **model_kwargs: Any) -> TextClassifier:
    """Return a classifier with LoRA on the base; vectors are means of the tokens'."""
    torch.manual_seed(0)
    config = lora(target_modules="all-linear", r=8, lora_alpha=32, init_lora_weights="gaussian")
    embeddings = PeftTransformerDocumentEmbeddings(
        str(base), peft_config=config, cls_pooling="mean", transformers_model_kwargs=model_kwargs
    )
    labels = Dictionary(add_unk=False)
    for label in LABELS:
        labels.add_item(label)
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels).to(flair.device)


def step_of(loss: Action, model: torch.nn.Module) -> Action:
    """Return one step of a training, which ends with the loss on the CPU: all that was queued is done by then."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=5e-5)

    def step() -> float:
        optimizer.zero_grad()
        found = loss()
        found.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
        return float(found)

    return step


class Bare:
    """The same classifier with transformers and PEFT alone."""

    def __init__(self, base: Path, model: Any, batch: int, model_kwargs: dict[str, Any]) -> None:
        transformer = AutoModel.from_pretrained(base, **model_kwargs)
        if "quantization_config" in model_kwargs:
            transformer = peft.prepare_model_for_kbit_training(transformer)
        encoder = peft.get_peft_model(transformer, model.embeddings.adapter_config)
        weights = peft.get_peft_model_state_dict(model.embeddings.model, save_embedding_layers=False)
        peft.set_peft_model_state_dict(encoder, weights)
        self.model = torch.nn.ModuleDict({"encoder": encoder, "head": copy.deepcopy(model.decoder)}).to(flair.device)
        self.tokenizer = AutoTokenizer.from_pretrained(base, add_prefix_space=True)
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.texts = texts(batch)
        self.targets = torch.tensor([number % 2 for number in range(batch)], device=flair.device)

    def vectors(self) -> torch.Tensor:
        """Return the mean of the tokens' hidden states, (sentences, hidden), in fp32."""
        encoded = self.tokenizer(self.texts, is_split_into_words=True, padding=True, return_tensors="pt")
        encoded = {name: encoded[name].to(flair.device) for name in ("input_ids", "attention_mask")}
        states = self.model["encoder"](**encoded).last_hidden_state.float()
        mask = encoded["attention_mask"].unsqueeze(-1)
        return (states * mask).sum(1) / mask.sum(1)

    def loss(self) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.model["head"](self.vectors()), self.targets, reduction="sum")

    @torch.no_grad()
    def predict(self) -> list[int]:
        """Return the number of the label of each sentence."""
        return self.model["head"](self.vectors()).softmax(-1).argmax(-1).tolist()


@torch.no_grad()
def vectors(model: Any, given: list[Sentence]) -> torch.Tensor:
    """Return the vectors of the sentences, (sentences, hidden), in fp32; the model is in evaluation mode then."""
    model.eval().embeddings.embed(given)
    found = torch.stack([sentence.embedding for sentence in given]).float()
    store_embeddings(given, "none")
    return found


def check_close(found: torch.Tensor, expected: torch.Tensor, precision: str) -> None:
    """Raise if vectors are further apart than rounding explains."""
    apart = float((found - expected).norm() / expected.norm())
    assert apart <= TOLERANCES[precision], f"{precision}: vectors are {apart:.2g} of their norm apart"


def predicting(model: Any, given: list[Sentence]) -> Action:
    return lambda: model.predict(given, mini_batch_size=len(given), label_name="predicted")


def beside_peft(base: Path, precision: str, batch: int, pairs: int) -> Iterator[Row]:
    """Yield training and prediction, as multiples of the time of a bare loop."""
    options = PRECISIONS[precision]()
    model: Any = classifier(base, **options)
    given = sentences(batch)
    bare = Bare(base, model, batch, options)
    bare.model.eval()
    with torch.no_grad():
        check_close(vectors(model, given), bare.vectors(), precision)
    what = f"{precision}: prediction / PEFT's loop"
    yield {"what": what, **compare(predicting(model, given), bare.predict, pairs)}
    model.train(), bare.model.train()
    step, bare_step = step_of(lambda: model.forward_loss(given)[0], model), step_of(bare.loss, bare.model)
    yield {"what": f"{precision}: training step / PEFT's loop", **compare(step, bare_step, pairs)}


def switched(name: str, base: Path, precision: str, batch: int, pairs: int) -> Iterator[Row]:
    """Yield predictions with torch.compile or with another attention, as a multiple of the time without."""
    given, options = sentences(batch), PRECISIONS[precision]()
    plain: Any = classifier(base, **options)
    other: Any = classifier(base, **options, **({} if name == COMPILE else {"attn_implementation": name}))
    if name == COMPILE:
        other.embeddings.base_model.compile(dynamic=True)
    check_close(vectors(other, given), vectors(plain, given), precision)
    what = f"{precision}: prediction with {name} / without"
    yield {"what": what, **compare(predicting(other, given), predicting(plain, given), pairs)}


def mixed(base: Path, precision: str, batch: int, pairs: int) -> Iterator[Row]:
    """Yield a batch for several models, as multiples of the time of one for one model."""
    options = PRECISIONS[precision]()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(min(batch, MODELS[-1])):
            model: Any = classifier(base, **options).eval()
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data.add_(1e-3 * torch.randn_like(parameter))
            model._label_type = f"sentiment{number}"
            flair_peft.save_pretrained(model, Path(folder, str(number)))
        shared = flair_peft.SharedBase(str(base), dtype=options["torch_dtype"])
        models: list[Any] = [shared.load(path, verify=False) for path in sorted(Path(folder).iterdir())]
    given = [Sentence(words, use_tokenizer=False) for words in texts(batch)]

    all_scores = {"return_probabilities_for_all_classes": True}

    def together(count: int) -> Action:
        parts = {model: given[number::count] for number, model in enumerate(models[:count])}
        shared.predict(parts, mini_batch_size=batch, **all_scores)
        found = [read(model, part) for model, part in parts.items()]
        for one, (model, part) in zip(found, parts.items(), strict=True):
            torch.testing.assert_close(one, scores(model, part), atol=TOLERANCES[precision], rtol=0)
        return lambda: shared.predict(parts, mini_batch_size=batch, **all_scores)

    for count in (count for count in MODELS if count <= len(models)):
        what = f"{precision}: a batch of {batch} for {count} model(s) / for one"
        yield {"what": what, **compare(together(count), together(1), pairs)}


def measure(shape: str, folder: Path, batch: int, pairs: int) -> Iterator[Row]:
    """Yield the rows of a shape."""
    base = folder / shape
    if not base.exists():
        BASES[shape](base)
    parts = [("beside PEFT", beside_peft, name) for name in PRECISIONS if name != "fp32" or shape not in DECODERS]
    parts += [(name, functools.partial(switched, name), "bf16") for name in SWITCHES]
    for what, part, precision in [*parts, ("mixed", mixed, "bf16")]:
        try:
            yield from part(base, precision, batch, pairs)
        except Exception as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            yield {"what": f"{precision}: {what}", "why not": reason}
        gc.collect()


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# On a GPU",
        "",
        f"`python -m tests.benchmarks.gpu`, {report['date']}, {report['machine']}, {report['versions']}.",
        f"Batches of {report['batch']} texts of 4 to 48 words, LoRA r=8 on all linear layers. Medians of",
        f"{report['pairs']} interleaved pairs with 95 % bootstrap intervals; texts a second of both.",
    ]
    for shape, rows in report["shapes"].items():
        lines += ["", f"## {shape}", "", "| what | median | 95 % | texts a second |", "|---|---|---|---|"]
        for row in rows:
            if "why not" in row:
                lines.append(f"| {row['what']} | – | {row['why not'].replace('|', '/')} | |")
                continue
            speeds = " / ".join(f"{report['batch'] / seconds:.3g}" for seconds in row["seconds"])
            lines.append(f"| {row['what']} | {row['median']:.2f} | {row['low']:.2f} to {row['high']:.2f} | {speeds} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", choices=BASES, default=["bert-base", "xlm-roberta-large", "llama-1b"])
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="try whether it runs, on tiny bases")
    parser.add_argument("--folder", type=Path, help="where bases are made and kept; a temporary one if left out")
    parser.add_argument("--shape", choices=BASES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.quick:
        options.shapes, options.batch, options.pairs = ["tiny-bert", "tiny-llama"], 4, 1
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    flair.device = torch.device(options.device)
    if options.shape:
        print(json.dumps(list(measure(options.shape, options.folder, options.batch, options.pairs))))
        return
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        given = ["--folder", options.folder or temporary, "--batch", options.batch, "--pairs", options.pairs]
        for shape in options.shapes:
            command = ("tests.benchmarks.gpu", "--shape", shape, "--device", options.device, *given)
            found[shape] = in_process(*command)
    device = torch.cuda.get_device_name() if flair.device.type == "cuda" else "no GPU used"
    report = {**heading(device), "batch": options.batch, "pairs": options.pairs, "shapes": found}
    write("gpu", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
