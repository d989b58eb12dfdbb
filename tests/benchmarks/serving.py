"""Many models on one base: memory, adding one, one batch for many, merged and unmerged, one sentence among fifty.

``python -m tests.benchmarks.serving`` builds a base in the shape of BERT-base with random weights and fifty classifiers
on it, compares what they predict, and writes the figures to ``resources/benchmarks``. Times are ratios of interleaved
pairs, each group of rows in a process of its own; memory is that of a process that loads one model, or twenty, and
predicts with each.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
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
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import flair_peft
from tests.benchmarks.memory import resident
from tests.benchmarks.report import RESULTS, heading, in_process, ratio, seconds, write
from tests.benchmarks.shapes import SHAPES
from tests.support.configs import lora

MODELS, RESIDENT, MIXED, BATCH, LOADED = 50, 20, 8, 32, 128
# Of models for which one batch is: name of the targets → LoRA's ``target_modules``. A few files are loaded many times.
TARGETS = {"query and value": None, "all linear layers": "all-linear"}
FILES = 4
UPPER = [8, 9, 10, 11]
WORDS = "a bb ab ba the aaab , aba ? a bb ab ba the aaab , aba ? a ab".split()  # noqa: SIM905 - sentences
TOLERANCE = 1e-4
# Of scores between bf16 with the adapter beside its base and with the adapter in it.
HALF_TOLERANCE = 0.05

Action = Callable[[], Any]


def write_models(folder: Path, *, shape: str = "bert-base", targets: Any = None, count: int = MODELS) -> None:
    """Write a base and classifiers with adapters of their own on it."""
    if not (folder / "base").exists():
        SHAPES[shape](folder / "base")
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    for number in range(count):
        torch.manual_seed(number)
        config = lora(target_modules=targets, r=8, lora_alpha=32)
        embeddings = flair_peft.PeftTransformerDocumentEmbeddings(str(folder / "base"), peft_config=config)
        for parameter in embeddings.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.001 * torch.randn_like(parameter))  # as if it had been trained
        model = TextClassifier(embeddings, label_type=f"sentiment{number}", label_dictionary=labels)
        flair_peft.save_pretrained(model.eval(), folder / str(number))


def sentences(count: int) -> list[Sentence]:
    """Return sentences of 10 to 20 words."""
    return [Sentence(WORDS[: 10 + number % 11], use_tokenizer=False) for number in range(count)]


def scores(model: TextClassifier, given: list[Sentence]) -> torch.Tensor:
    model.predict(given, mini_batch_size=BATCH, return_probabilities_for_all_classes=True)
    return read(model, given)


def read(model: TextClassifier, given: list[Sentence]) -> torch.Tensor:
    """Return the score of each label of each sentence, (sentences, labels)."""
    found = [sorted(sentence.get_labels(model.label_type), key=lambda label: label.value) for sentence in given]
    return torch.tensor([[label.score for label in labels] for labels in found])


def compare(one: Action, other: Action, pairs: int, before: Action = lambda: None) -> dict[str, Any]:
    """Return the ratio of the times of two actions, run in turn, with its interval and the medians."""

    def timed(action: Action) -> float:
        before()
        return seconds(action)

    timed(one), timed(other)
    times = [(timed(one), timed(other)) if n % 2 else (timed(other), timed(one))[::-1] for n in range(pairs)]
    these, those = ([pair[index] for pair in times] for index in range(2))
    return {**ratio(these, those), "seconds": [statistics.median(these), statistics.median(those)]}


def measure_memory(folder: Path) -> dict[str, Any]:
    """Return the resident memory with twenty models over that with one."""
    command = ("tests.benchmarks.serving", "--folder", folder, "--resident")
    found = [in_process(*command, RESIDENT) / in_process(*command, 1) for _ in range(3)]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)}


def print_resident(folder: Path, count: int) -> None:
    shared = flair_peft.SharedBase(str(folder / "base"))
    models = [shared.load(folder / str(number)) for number in range(count)]
    for model in models:
        scores(model, sentences(BATCH))
    print(resident())


def measure_loads(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of adding a model to a shared base over that of PEFT's load_adapter, proven and not."""
    shared = flair_peft.SharedBase(str(folder / "base"))
    theirs = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), folder / "0", adapter_name="0")
    theirs.to(flair.device)
    ids = torch.tensor([[5, 6, 7, 8]], device=flair.device)
    model, rows = shared.load(folder / "1"), []
    theirs.load_adapter(folder / "1", adapter_name="1")
    theirs.set_adapter("1")
    with torch.no_grad():
        expected = theirs.eval()(ids).last_hidden_state
        torch.testing.assert_close(model.embeddings.hidden_states(ids)[-1], expected, atol=TOLERANCE, rtol=TOLERANCE)
    counter, kept = iter(range(2, 10**6)), list[Any]()

    def peft_alone() -> None:
        theirs.load_adapter(folder / str(next(counter) % MODELS), adapter_name="next")

    def peft_with_head() -> None:
        place = folder / str(next(counter) % MODELS)
        theirs.load_adapter(place, adapter_name="next")
        kept.append((AutoTokenizer.from_pretrained(place / "tokenizer"), head_by_hand(place)))

    def forget() -> None:
        kept.clear()
        if "next" in theirs.peft_config:
            theirs.delete_adapter("next")  # a tree with more adapters takes longer to extend
        gc.collect()

    sides: list[tuple[str, Action]] = [("PEFT's load_adapter", peft_alone)]
    sides.append(("load_adapter, a tokenizer and a head", peft_with_head))
    for verify, what in ((False, "not proven"), (True, "proven by its probe")):

        def ours(verify: bool = verify) -> None:
            kept.append(shared.load(folder / str(next(counter) % MODELS), verify=verify))

        for side, alone in sides:
            # The goal is held against the first side, which has neither tokenizer nor head.
            wanted = ("≤ 1.5" if verify else "≤ 1.1") if alone is peft_alone else ""
            rows.append({"what": f"adding a model, {what} / {side}", "wanted": wanted})
            rows[-1] |= compare(ours, alone, pairs, before=forget)
    return rows


def head_by_hand(place: Path) -> torch.nn.Linear:
    """Return the head of a checkpoint, as somebody reads it who has PEFT alone."""
    tensors = load_file(place / "head.safetensors")
    weight, bias = (tensors[f"state_dict/decoder.{name}"] for name in ("weight", "bias"))
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    return head


def measure_mixed(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of a batch for eight models over that of the same batch for one, and over eight passes."""
    shared = flair_peft.SharedBase(str(folder / "base"))
    models = [shared.load(folder / str(number), verify=False) for number in range(MIXED)]
    whole = sentences(BATCH)
    parts = {model: whole[number::MIXED] for number, model in enumerate(models)}
    options = {"return_probabilities_for_all_classes": True}
    shared.predict(parts, mini_batch_size=BATCH, **options)
    together = [read(model, given) for model, given in parts.items()]
    for model, given, found in zip(models, parts.values(), together, strict=True):
        torch.testing.assert_close(found, scores(model, given), atol=TOLERANCE, rtol=TOLERANCE)

    def mixed() -> None:
        shared.predict(parts, mini_batch_size=BATCH, **options)

    def grouped() -> None:
        for model, given in parts.items():
            model.predict(given, mini_batch_size=BATCH, **options)

    def single() -> None:
        models[0].predict(whole, mini_batch_size=BATCH, **options)

    return [
        {"what": "batch of 32 for 8 models / for one", "wanted": "≤ 1.15", **compare(mixed, single, pairs)},
        {"what": "8 passes of 4 / batch of 32 for 8 models", "wanted": "> 1", **compare(grouped, mixed, pairs)},
    ]


def measure_many(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of a batch of 32 for 32 models over that for one, and with 128 loaded over that with 2."""
    rows = list[dict[str, Any]]()
    for shape in ("bert-base", "minilm"):
        for name, targets in TARGETS.items():
            place = folder / f"many-{shape}-{'all' if targets else 'some'}"
            if not (place / str(FILES - 1)).exists():
                write_models(place, shape=shape, targets=targets, count=FILES)
            rows += _measure_many(place, pairs, f"{shape}, LoRA on {name}")
    return rows


def _measure_many(place: Path, pairs: int, where: str) -> list[dict[str, Any]]:
    few, many = (flair_peft.SharedBase(str(place / "base")) for _ in range(2))
    loaded = [many.load(place / str(number % FILES), verify=False) for number in range(LOADED)]
    two = [few.load(place / str(number), verify=False) for number in range(2)]
    return [
        {
            "what": f"batch of 32 for {count} models / for one ({where})",
            "wanted": "≤ 1.1",
            **compare(_together(many, loaded[:count]), _alone(loaded[0]), pairs),
        }
        for count in (BATCH, MIXED)
    ] + [
        {
            "what": f"batch of 32 for 2 models, 128 loaded / 2 loaded ({where})",
            "wanted": "1 in the interval",
            **compare(_together(many, loaded[-2:]), _together(few, two), pairs),
        }
    ]


def _together(shared: flair_peft.SharedBase, models: list[Any]) -> Action:
    """Return a prediction of 32 sentences for the models in turn, whose scores were compared with separate ones."""
    whole = sentences(BATCH)
    parts = {model: whole[number :: len(models)] for number, model in enumerate(models)}
    options = {"return_probabilities_for_all_classes": True}
    shared.predict(parts, mini_batch_size=BATCH, **options)
    together = [read(model, given) for model, given in parts.items()]
    for (model, given), found in zip(parts.items(), together, strict=True):
        torch.testing.assert_close(found, scores(model, given), atol=TOLERANCE, rtol=TOLERANCE)
    return lambda: shared.predict(parts, mini_batch_size=BATCH, **options)


def _alone(model: Any) -> Action:
    whole = sentences(BATCH)
    return lambda: model.predict(whole, mini_batch_size=BATCH, return_probabilities_for_all_classes=True)


def measure_mixed_by_peft(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the first of these ratios for the forward pass of PEFT alone, which is in ours."""
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folder / "base"), folder / "0", adapter_name="0").eval()
    for number in range(1, MIXED):
        model.load_adapter(folder / str(number), adapter_name=str(number))
    model.to(flair.device)
    torch.manual_seed(0)
    ids = torch.randint(5, 1000, (BATCH, 24)).to(flair.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    names = [str(row % MIXED) for row in range(BATCH)]

    @torch.no_grad()
    def mixed() -> torch.Tensor:
        return model(**inputs, adapter_names=names).last_hidden_state.cpu()

    @torch.no_grad()
    def single() -> torch.Tensor:
        return model(**inputs).last_hidden_state.cpu()

    torch.testing.assert_close(mixed()[::MIXED], single()[::MIXED], atol=TOLERANCE, rtol=TOLERANCE)
    return [
        {
            "what": "batch of 32 for 8 adapters / for one, PEFT's forward pass alone",
            "wanted": "",
            **compare(mixed, single, pairs),
        }
    ]


def measure_merged(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of a merged model over that of a plain one, and of an unmerged one in bf16 over plain bf16."""
    shared = flair_peft.SharedBase(str(folder / "base"))
    model = shared.load(folder / "0", verify=False)
    merged, plain = flair_peft.merge(model), flair_peft.merge(shared.load(folder / "1", verify=False))
    given = sentences(BATCH)
    torch.testing.assert_close(scores(merged, given), scores(model, given), atol=1e-3, rtol=1e-3)
    half = flair_peft.SharedBase(str(folder / "base"), dtype="bfloat16").load(folder / "0", verify=False)
    half_plain = flair_peft.merge(model, dtype=torch.bfloat16).to(torch.bfloat16)
    apart = (scores(half, given) - scores(half_plain, given)).abs().max()
    assert apart < HALF_TOLERANCE, apart

    def predicting(chosen: TextClassifier) -> Action:
        return lambda: chosen.predict(given, mini_batch_size=BATCH)

    rows = [
        {"what": "merged model / plain model of stock Flair", "wanted": "1 in the interval"},
        {"what": "unmerged in bf16 / plain in bf16", "wanted": "≤ 1.15"},
        {"what": "unmerged in fp32 / plain in fp32", "wanted": ""},
    ]
    for row, one, other in zip(rows, (merged, half, model), (plain, half_plain, merged), strict=True):
        row |= compare(predicting(one), predicting(other), pairs)
    return rows


def measure_one_sentence(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of one sentence with fifty models loaded over that with one, alone and through the base."""
    few, many = (flair_peft.SharedBase(str(folder / "base")) for _ in range(2))
    first = few.load(folder / "0", verify=False)
    models = [many.load(folder / str(number), verify=False) for number in range(MODELS)]
    given = sentences(1)
    torch.testing.assert_close(scores(first, given), scores(models[0], given), atol=0, rtol=0)
    many.predict({model: sentences(1) for model in models}, mini_batch_size=BATCH)  # every adapter is in the tree
    turn = iter(range(10**6))

    def any_of_many() -> None:
        models[next(turn) % MODELS].predict(given)

    def two_of(base: flair_peft.SharedBase, loaded: list[Any]) -> None:
        number = next(turn)
        base.predict({loaded[(number + step) % len(loaded)]: given[:] for step in range(2)})

    torch.testing.assert_close(_through(few, first, given), scores(first, given), atol=0, rtol=0)
    three = [first, *(few.load(folder / str(number), verify=False) for number in (1, 2))]
    few.predict({model: sentences(1) for model in three}, mini_batch_size=BATCH)
    return [
        {
            "what": "a sentence for any of 50 models / for the only one",
            "wanted": "1 in the interval",
            **compare(any_of_many, lambda: first.predict(given), pairs),
        },
        {
            "what": "a sentence for one model through the base / by its own predict",
            "wanted": "≤ 5 ms more",
            **compare(lambda: few.predict({first: given}), lambda: first.predict(given), pairs),
        },
        {
            "what": "two models at once, 50 loaded / 3 loaded",
            "wanted": "1 in the interval",
            **compare(lambda: two_of(many, models), lambda: two_of(few, three), pairs),
        },
    ]


def _through(shared: flair_peft.SharedBase, model: TextClassifier, given: list[Sentence]) -> torch.Tensor:
    shared.predict({model: given}, mini_batch_size=BATCH, return_probabilities_for_all_classes=True)
    return read(model, given)


def write_upper_models(folder: Path) -> None:
    """Write classifiers on the base whose adapters are on its upper four layers."""
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    for number in range(MIXED):
        torch.manual_seed(number)
        config = lora(target_modules=None, r=8, lora_alpha=32, layers_to_transform=UPPER)
        embeddings = flair_peft.PeftTransformerDocumentEmbeddings(str(folder / "base"), peft_config=config)
        model = TextClassifier(embeddings, label_type=f"sentiment{number}", label_dictionary=labels)
        flair_peft.save_pretrained(model.eval(), folder / f"upper-{number}")


def measure_trunk(folder: Path, pairs: int) -> list[dict[str, Any]]:
    """Return the time of several models on the same sentences over that of a pass for each."""
    if not (folder / f"upper-{MIXED - 1}").exists():
        write_upper_models(folder)
    shared = flair_peft.SharedBase(str(folder / "base"))
    models = [shared.load(folder / f"upper-{number}", verify=False) for number in range(MIXED)]
    options, rows = {"return_probabilities_for_all_classes": True}, []
    for count, size, wanted in ((MIXED, BATCH, "≤ 0.5"), (3, BATCH, "≤ 0.6"), (MIXED, 1, "≤ 0.6"), (3, 1, "≤ 0.7")):
        chosen, given = models[:count], sentences(size)

        def together(chosen: list[Any] = chosen, given: list[Sentence] = given) -> None:
            shared.predict(dict.fromkeys(chosen, given), mini_batch_size=BATCH, **options)

        def apart(chosen: list[Any] = chosen, given: list[Sentence] = given) -> None:
            for model in chosen:
                model.predict(given, mini_batch_size=BATCH, **options)

        expected = [scores(model, given) for model in chosen]
        together()
        # One sentence may be too short for a trunk: then it goes through all layers with all adapters at once.
        tolerance = 0.0 if size == BATCH else TOLERANCE
        for model, found in zip(chosen, expected, strict=True):
            torch.testing.assert_close(read(model, given), found, atol=tolerance, rtol=tolerance)
        what = f"{count} models, adapters on the upper {len(UPPER)} of 12 layers, on the same {size} sentences"
        rows.append({"what": f"{what} / {count} passes", "wanted": wanted, **compare(together, apart, pairs)})
    return rows


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Many models on one base",
        "",
        f"`python -m tests.benchmarks.serving`, {report['date']}, {report['machine']}, {report['versions']}.",
        "BERT-base's shape, LoRA r=8 on query and value, where nothing else is said; sentences of 10 to 20 words; one",
        f"thread. Medians of {report['pairs']}",
        "interleaved pairs with 95 % bootstrap intervals; memory: three pairs of processes, with their extremes.",
        "",
        "| what | median | interval | wanted | ms |",
        "|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        times = " / ".join(f"{1e3 * value:.0f}" for value in row.get("seconds", []))
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        lines.append(f"| {row['what']} | {row['median']:.2f} | {interval} | {row['wanted']} | {times} |")
    return "\n".join(lines) + "\n"


GROUPS: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
    "loads": measure_loads,
    "mixed": measure_mixed,
    "many": measure_many,
    "peft": measure_mixed_by_peft,
    "merged": measure_merged,
    "sentence": measure_one_sentence,
    "trunk": measure_trunk,
}


def _device_name() -> str:
    return torch.cuda.get_device_name(flair.device) if flair.device.type == "cuda" else "no GPU used"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--folder", type=Path, help="where the models are made and kept; a temporary one if left out")
    parser.add_argument("--resident", type=int, help="load so many models and print the resident memory")
    parser.add_argument("--group", choices=GROUPS, help="measure these rows in this process and print them")
    parser.add_argument("--device", default="cpu", help="where the models are, such as cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    flair.device = torch.device(options.device)
    torch.set_num_threads(1)
    if options.resident is not None:
        print_resident(options.folder, options.resident)
        return
    if options.group is not None:
        print(json.dumps(GROUPS[options.group](options.folder, options.pairs)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / str(MODELS - 1)).exists():
            write_models(folder)
        command = ("tests.benchmarks.serving", "--folder", folder, "--device", options.device)
        rows = [
            {"what": "resident memory with 20 models / with one", "wanted": "≤ 1.15", **measure_memory(folder)},
            *(row for group in GROUPS for row in in_process(*command, "--group", group, "--pairs", options.pairs)),
        ]
    report = {**heading(_device_name()), "pairs": options.pairs, "rows": rows}
    write("serving", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
