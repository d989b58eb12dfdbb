"""Models served over HTTP: requests a second beside a service written by hand, and beside offline batches.

``python -m tests.benchmarks.serving_http`` writes a base in BERT-base's shape with random weights, eight classifiers
and a tagger on it, and asks services in processes of their own on loopback. This process is the clients, and predicts
the same texts itself: answers are compared with that before anything is timed. Every process computes with one thread.
What is compared takes turns in one run; ratios are medians of pairs with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import random
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import flair
import psutil
import torch
from flair.data import Dictionary, Sentence
from flair.models import SequenceTagger
from flair.nn import Classifier

import flair_peft
from tests.benchmarks import http_services
from tests.benchmarks.http_services import Answer, Client, Service
from tests.benchmarks.report import RESULTS, heading, ratio, seconds, write
from tests.benchmarks.serving import BATCH, MIXED, WORDS, write_models
from tests.support.configs import lora

CLIENTS, WAVES = 32, 8
SHORT = (3, 8)
"""Words of a text, at least and at most."""
TOLERANCE = 1e-3
# Of scores: what else is in a batch changes them by rounding.

Rows = list[dict[str, Any]]


def texts(count: int, *, words: tuple[int, int] = SHORT) -> list[str]:
    """Return texts of so many words."""
    chosen = random.Random(0)
    return [" ".join(chosen.choices(WORDS, k=chosen.randint(*words))) for _ in range(count)]


def write_tagger(folder: Path) -> None:
    """Write a tagger of four kinds of names on the base of the classifiers."""
    tags = Dictionary(add_unk=False)
    for tag in ("PER", "LOC", "ORG", "MISC"):
        tags.add_item(tag)
    torch.manual_seed(0)
    embeddings = flair_peft.PeftTransformerWordEmbeddings(
        str(folder / "base"), layers="-1", peft_config=lora(target_modules=None, r=8, lora_alpha=32)
    )
    model = SequenceTagger(
        embeddings, tag_dictionary=tags, tag_type="ner", use_rnn=False, use_crf=False, reproject_embeddings=False
    )
    flair_peft.save_pretrained(model.eval(), folder / "tagger")


def predict(model: Classifier, given: Sequence[str], *, mini_batch_size: int = BATCH) -> list[list[tuple[str, float]]]:
    """Return the labels of texts with their scores, as Flair itself predicts them."""
    sentences = [Sentence(text) for text in given]
    model.predict(sentences, mini_batch_size=mini_batch_size)
    return [[(label.value, label.score) for label in sentence.get_labels(model.label_type)] for sentence in sentences]


def check(answers: Sequence[Answer], expected: Sequence[list[tuple[str, float]]]) -> None:
    """Answers hold the labels of direct predictions, with their scores up to rounding.

    Raises:
        AssertionError: one does not.
    """
    for answer, labels in zip(answers, expected, strict=True):
        assert answer.status == 200, answer
        found = [(each.get("label", each.get("entity_group")), each["score"]) for each in answer.content]
        assert [name for name, _ in found] == [name for name, _ in labels], (found, labels)
        assert all(abs(a[1] - b[1]) < TOLERANCE for a, b in zip(found, labels, strict=True)), (found, labels)


@contextlib.contextmanager
def serving(models: dict[str, Path], *options: object) -> Iterator[Service]:
    """``flair-peft serve`` with models by name, one thread, and its own settings for the rest."""
    port = http_services.free_port()
    named = [f"{name}={path}" for name, path in models.items()]
    with http_services.running(["flair_peft", "serve", *named, "--port", port, "--threads", 1, *options], port) as one:
        yield one


@contextlib.contextmanager
def minimal(model: Path) -> Iterator[Service]:
    """The service that is written by hand."""
    port = http_services.free_port()
    with http_services.running(["tests.benchmarks.minimal_service", model, port], port) as one:
        yield one


def in_turns(actions: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Return the seconds that each action says it took, round by round, each time in another order."""
    for action in actions:
        action()
    taken: list[list[float]] = [[] for _ in actions]
    for number in range(rounds):
        for place in range(len(actions)):
            which = (number + place) % len(actions)
            taken[which].append(actions[which]())
    return taken


def measure_kind(folder: Path, rounds: int, name: str, *, words: tuple[int, int] = SHORT) -> Rows:
    """Return how one model is served to 32 clients, beside a service by hand and offline batches."""
    model, given = Classifier.load(folder / name), texts(CLIENTS * WAVES, words=words)
    expected, latencies = predict(model, given), list[float]()
    bodies = [{"inputs": text} for text in given]
    with serving({"model": folder / name}) as ours, minimal(folder / name) as theirs:

        def asked(service: Service, seen: list[float] | None = None) -> float:
            answers, taken = http_services.ask_all(service.port, bodies, clients=CLIENTS)
            check(answers, expected)
            if seen is not None:
                seen += [answer.seconds for answer in answers]
            return taken

        served, by_hand, offline = in_turns(
            [lambda: asked(ours, latencies), lambda: asked(theirs), lambda: seconds(lambda: predict(model, given))],
            rounds,
        )
    batches = [taken / WAVES for taken in offline]
    p50, p99 = _percentiles(latencies)
    what = (
        f"{'tagger' if name == 'tagger' else 'classifier'}, {CLIENTS} clients, texts of {words[0]} to {words[1]} words"
    )
    return [
        {
            "what": f"{what}: requests a second / those of a service by hand",
            "wanted": "≥ 2" if words == SHORT else "",
            **ratio(by_hand, served),
            "figures": f"{_rate(served)} / {_rate(by_hand)} requests/s; p50 {p50:.0f} ms, p99 {p99:.0f} ms",
        },
        {
            "what": f"{what}: time / that of offline batches of {BATCH}",
            "wanted": "≤ 1.15" if words == SHORT else "",
            **ratio(served, offline),
            "figures": f"{_rate(served)} / {_rate(offline)} texts/s",
        },
        {
            "what": f"{what}: p99 / time of one full batch",
            "wanted": "< 4" if words == SHORT else "",
            **ratio([p99 / 1e3] * len(batches), batches),
            "figures": f"{p99:.0f} / {1e3 * statistics.median(batches):.0f} ms",
        },
    ]


def measure_many(folder: Path, rounds: int) -> Rows:
    """Return what eight models at random cost beside one, in time and in memory."""
    given = texts(CLIENTS * WAVES)
    models = {str(number): folder / str(number) for number in range(MIXED)}
    names = random.Random(1).choices(list(models), k=len(given))
    # One after the other: what is compared with stays what Flair itself gives, and needs no base of ours.
    direct = {name: predict(Classifier.load(path), given) for name, path in models.items()}
    first, mixed = direct["0"], [direct[name][place] for place, name in enumerate(names)]
    with serving({"0": models["0"]}) as single, serving(models) as many:

        def asked(service: Service, chosen: Sequence[str], expected: Any) -> float:
            bodies = [{"inputs": text, "model": name} for text, name in zip(given, chosen, strict=True)]
            answers, taken = http_services.ask_all(service.port, bodies, clients=CLIENTS)
            check(answers, expected)
            return taken

        eight, one = in_turns(
            [lambda: asked(many, names, mixed), lambda: asked(single, ["0"] * len(given), first)], rounds
        )
        memory = [_resident(service) for service in (many, single)]
    what = f"{MIXED} models on one base, {CLIENTS} clients at random"
    return [
        {
            "what": f"{what}: time / that of one model",
            "wanted": "≤ 1.2",
            **ratio(eight, one),
            "figures": f"{_rate(eight)} / {_rate(one)} requests/s",
        },
        {
            "what": f"{what}: resident memory / that of one model",
            "wanted": "≤ 1.15",
            **ratio(memory[:1], memory[1:]),
            "figures": f"{memory[0] / 1e6:.0f} / {memory[1] / 1e6:.0f} MB",
        },
    ]


def measure_one_client(folder: Path, rounds: int) -> Rows:
    """Return the milliseconds that one client waits beyond ``predict`` alone."""
    model, given = Classifier.load(folder / "0"), texts(5 * rounds)
    with serving({"model": folder / "0"}) as service, Client(service.port) as client:
        check([client.ask({"inputs": text}) for text in given[:5]], predict(model, given[:5]))
        beyond, served = [], list[float]()
        for number, text in enumerate(given):
            actions = [lambda text=text: client.ask({"inputs": text}).seconds, lambda text=text: _alone(model, text)]
            taken = [action() for action in (actions if number % 2 else actions[::-1])]
            over_http, alone = taken if number % 2 else taken[::-1]
            beyond.append(1e3 * (over_http - alone))
            served.append(over_http)
    p50, p99 = _percentiles(served)
    return [
        {
            "what": "classifier, one client: milliseconds beyond predict alone",
            "wanted": "≤ 5",
            **ratio(beyond, [1.0] * len(beyond)),
            "figures": f"p50 {p50:.1f} ms, p99 {p99:.1f} ms",
        }
    ]


def _alone(model: Classifier, text: str) -> float:
    return seconds(lambda: model.predict(Sentence(text)))


def _rate(times: Sequence[float]) -> str:
    return f"{CLIENTS * WAVES / statistics.median(times):.0f}"


def _percentiles(times: Sequence[float]) -> tuple[float, float]:
    """Return the median and the 99th percentile in milliseconds."""
    ordered = sorted(times)
    return 1e3 * statistics.median(ordered), 1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]


def _resident(service: Service) -> int:
    return psutil.Process(service.process.pid).memory_info().rss


GROUPS: dict[str, Callable[[Path, int], Rows]] = {
    "classifier": lambda folder, rounds: measure_kind(folder, rounds, "0"),
    "tagger": lambda folder, rounds: measure_kind(folder, rounds, "tagger"),
    "longer": lambda folder, rounds: measure_kind(folder, max(1, rounds // 2), "0", words=(10, 20)),
    "many": measure_many,
    "one-client": measure_one_client,
}


def is_reached(row: dict[str, Any]) -> str:
    """Return what a row says of its goal, which the median decides."""
    if not row["wanted"]:
        return ""
    sign, goal = row["wanted"].split()
    found = row["median"]
    return "yes" if {"≥": found >= float(goal), "≤": found <= float(goal), "<": found < float(goal)}[sign] else "no"


def device_name() -> str:
    """Return the name of the GPU that is computed on, or that there is none."""
    return torch.cuda.get_device_name(flair.device) if flair.device.type == "cuda" else "no GPU used"


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Models served over HTTP",
        "",
        f"`python -m tests.benchmarks.serving_http`, {report['date']}, {report['machine']}, {report['versions']}.",
        "BERT-base's shape, LoRA r=8 on query and value. Clients and services are processes on one machine, each with",
        f"one torch thread. Medians of {report['rounds']} rounds of {CLIENTS * WAVES} requests that take turns, with",
        "95 % bootstrap intervals; every answer of every round is compared with a direct `predict`. The service by",
        "hand is `tests/benchmarks/minimal_service.py`.",
        "",
        "| what | median | interval | wanted | reached | figures |",
        "|---|---|---|---|---|---|",
    ]
    for row in report["rows"]:
        interval = f"{row['low']:.2f} to {row['high']:.2f}"
        cells = (row["what"], f"{row['median']:.2f}", interval, row["wanted"], is_reached(row), row["figures"])
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21, help="rounds of each row")
    parser.add_argument("--folder", type=Path, help="where the models are made and kept; a temporary one if left out")
    parser.add_argument("--groups", choices=GROUPS, nargs="+", default=list(GROUPS), help="measure these alone")
    parser.add_argument("--device", default="cpu", help="where the models are, such as cuda:0")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    flair.device = torch.device(options.device)
    # Services are told the number of a GPU, as Flair wants it.
    os.environ["FLAIR_DEVICE"] = "cpu" if flair.device.type == "cpu" else str(flair.device.index or 0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "tagger").exists():
            write_models(folder, count=MIXED)
            write_tagger(folder)
        gc.collect(), gc.freeze()
        rows: Rows = []
        for name in options.groups:
            rows += GROUPS[name](folder, options.pairs)
            print(name, *(f"{row['median']:.2f}" for row in rows), file=sys.stderr, flush=True)
    report = {**heading(device_name()), "rounds": options.pairs, "rows": rows}
    write("serving_http", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
