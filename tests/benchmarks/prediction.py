"""Predicting streams: against the bare transformer, against the length of the stream, and in memory.

``python -m tests.benchmarks.prediction`` compares labels with those of Flair's own ``predict`` before it times
anything, and writes ``resources/benchmarks/prediction.json`` and ``.md``. Pairs are interleaved, since other work on
the machine hits both alike.

*Bare transformer*: the forward passes of the same model, adapter included, on tensors that were made before the clock
started, in the same mini-batches. The stream starts from texts: it also splits them into words and pieces, makes
sentences, and adds labels to them.

*Length*: a stream of 100,000 texts is read in parts of a few windows, and between two parts as many streams of 1,000
texts are read from start to end; both start with nothing to collect. Sentences that the caller let go of are circles,
which only a full run of Python's garbage collector finds, every 4,000 sentences or so. One stream of 1,000 ends before
that and leaves it to what comes next, so there is a second figure: against a single one.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import logging
import random
import statistics
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import TokenEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger

from flair_peft import PeftTransformerWordEmbeddings, predict_stream
from tests.benchmarks.memory import peak, reset_peak
from tests.benchmarks.report import RESULTS, heading, in_process, ratio, seconds, write
from tests.benchmarks.shapes import SHAPES
from tests.support import tiny
from tests.support.configs import lora

MINI_BATCH = 32
LONG, SHORT, WINDOW = 100_000, 1_000, 1_024
FIRST, LAST = 10_000, 200_000
_WORDS = " ".join(tiny.CORPUS).split()


def texts(*, longest: int) -> Iterator[str]:
    """Yield texts of 3 to ``longest`` words without end, the same in each call."""
    generator = random.Random(0)
    while True:
        yield " ".join(generator.choices(_WORDS, k=generator.randint(3, longest)))


def build_tagger(base: Path, *, adapter: bool = True) -> SequenceTagger:
    """Return a tagger in evaluation mode; its adapter is no no-op."""
    torch.manual_seed(0)
    config = lora(r=8, lora_alpha=32)
    embeddings: TokenEmbeddings = TransformerWordEmbeddings(str(base), use_context_separator=False)
    if adapter:
        embeddings = PeftTransformerWordEmbeddings(str(base), peft_config=config)
    labels = Dictionary(add_unk=False)
    for label in ("PER", "LOC", "ORG", "MISC"):
        labels.add_item(label)
    head = {"use_rnn": False, "use_crf": False, "reproject_embeddings": False}
    tagger = SequenceTagger(embeddings, tag_dictionary=labels, tag_type="ner", **head)
    tagger.eval()
    return tagger


def check_equal(tagger: SequenceTagger, given: list[str]) -> None:
    """Raise unless a stream has the labels and scores of Flair's own predict, and some at all."""
    expected = [Sentence(text) for text in given]
    tagger.predict(expected, mini_batch_size=MINI_BATCH)
    found = list(predict_stream(tagger, given, mini_batch_size=MINI_BATCH))
    mine, flairs = ([[str(label) for label in point.labels] for point in points] for points in (found, expected))
    assert any(mine)
    assert mine == flairs


def consume(stream: Iterator[Any], count: int | None = None) -> None:
    """Read so many items, or all, and keep none."""
    deque(itertools.islice(stream, count), maxlen=0)


def against_bare_transformer(folder: Path, *, adapter: bool, pairs: int) -> dict[str, Any]:
    """Return the time of a stream of two mini-batches, as a multiple of the forward passes alone."""
    tagger = build_tagger(folder, adapter=adapter)
    given = list(itertools.islice(texts(longest=24), 2 * MINI_BATCH))
    check_equal(tagger, given)
    ordered = sorted((Sentence(text) for text in given), key=len, reverse=True)
    batches = [ordered[:MINI_BATCH], ordered[MINI_BATCH:]]
    inputs = [tagger.embeddings.prepare_tensors(batch) for batch in batches]
    inputs = [{name: each[name] for name in ("input_ids", "attention_mask")} for each in inputs]

    def forward() -> None:
        with torch.no_grad():
            for each in inputs:
                tagger.embeddings.model(**each)

    both = [
        (seconds(lambda: consume(predict_stream(tagger, given, mini_batch_size=MINI_BATCH))), seconds(forward))
        for _ in range(pairs + 1)
    ][1:]
    streams, forwards = zip(*both, strict=True)
    what = f"stream / bare forward of BERT-base, {'with LoRA' if adapter else 'without an adapter'}"
    figures = {"stream": statistics.median(streams) / len(given), "forward": statistics.median(forwards) / len(given)}
    return {"what": what, **ratio(streams, forwards), "wanted": "≤ 1.10", "seconds per sentence": figures}


def against_length(folder: Path, *, pairs: int) -> list[dict[str, Any]]:
    """Return the time per sentence of a long stream, as multiples of that of short ones, in steady state and first."""
    tagger = build_tagger(folder)
    check_equal(tagger, list(itertools.islice(texts(longest=12), 200)))

    def read_short_stream() -> None:
        consume(predict_stream(tagger, itertools.islice(texts(longest=12), SHORT)))

    read_short_stream()
    stream = predict_stream(tagger, itertools.islice(texts(longest=12), LONG))
    windows = -(-LONG // WINDOW)
    long, short, first = [], [], []
    for number in range(pairs):
        size = WINDOW * (windows * (number + 1) // pairs - windows * number // pairs)  # parts end where windows end
        count = min(size, LONG - sum(part for part, _ in long))
        gc.collect()
        long.append((count, seconds(lambda count=count: consume(stream, count)) / count))
        times = round(count / SHORT)
        gc.collect()
        short.append(seconds(lambda times=times: [read_short_stream() for _ in range(times)]) / (times * SHORT))
        gc.collect()
        first.append(seconds(read_short_stream) / SHORT)
    assert next(stream, None) is None
    each = [taken for _, taken in long]
    figures = {"long": statistics.mean(each), "short": statistics.mean(short), "first": statistics.mean(first)}
    what = f"time per sentence in a stream of {LONG:,} / in streams of {SHORT:,}, tiny model"
    return [
        {"what": what, **ratio(each, short), "wanted": "≤ 1.1", "seconds per sentence": figures},
        {"what": f"{what}, a single one, over before Python collects", **ratio(each, first), "wanted": "≤ 1.1"},
    ]


def of_flair(folder: Path, *, counts: tuple[int, ...] = (1_000, 8_000)) -> dict[str, Any]:
    """Return what Flair's own predict takes for lists of these lengths, once."""
    tagger = build_tagger(folder)
    taken = {}
    for count in counts:
        gc.collect()
        given = [Sentence(text) for text in itertools.islice(texts(longest=12), count)]
        taken[str(count)] = seconds(lambda given=given: tagger.predict(given)) / count
    return {"what": f"the same in Flair's predict, {counts[1]:,} / {counts[0]:,}, once"} | {
        "median": taken[str(counts[1])] / taken[str(counts[0])],
        "seconds per sentence": taken,
    }


def memory(folder: Path) -> None:
    """Print the resident memory before a stream, and its peak after 10,000 and after 200,000 sentences, in bytes."""
    tagger = build_tagger(folder)
    before = reset_peak()
    stream = predict_stream(tagger, itertools.islice(texts(longest=12), LAST))
    consume(stream, FIRST)
    first = peak()
    consume(stream)
    print(json.dumps({"before": before, "first": first, "last": peak()}))


def of_memory(folder: Path, *, runs: int) -> dict[str, Any]:
    """Return the peak memory of a process after a long stream, as a multiple of that after its first part."""
    found = [in_process("tests.benchmarks.prediction", "--memory", folder) for _ in range(runs)]
    what = f"peak memory after {LAST:,} / after {FIRST:,} streamed sentences, tiny model"
    measured = ratio([each["last"] for each in found], [each["first"] for each in found])
    beyond = {name: statistics.median(each[name] - each["before"] for each in found) for name in ("first", "last")}
    return {"what": what, **measured, "wanted": "≤ 1.05", "bytes": found[0], "bytes beyond those before": beyond}


def to_markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    lines = [
        "# Predicting streams: time and memory",
        "",
        f"`python -m tests.benchmarks.prediction`, {report['date']}, {report['machine']}, {report['versions']}.",
        f"Ratios of times are medians of {report['pairs']} interleaved pairs, with 95 % bootstrap intervals; memory",
        f"was measured in {report['runs']} process(es). Labels and scores were those of Flair's own `predict`.",
        "",
        "| what | median | 95 % | wanted |",
        "|---|---|---|---|",
    ]
    for row in report["rows"]:
        interval = f"{row['low']:.3f} to {row['high']:.3f}" if "low" in row else ""
        lines.append(f"| {row['what']} | {row['median']:.3f} | {interval} | {row.get('wanted', '')} |")
    lines.append("")
    for row in report["rows"]:
        if "seconds per sentence" in row:
            found = ", ".join(f"{name} {1e3 * value:.3g} ms" for name, value in row["seconds per sentence"].items())
        elif "bytes" not in row:
            continue
        else:
            beyond = row["bytes beyond those before"]
            found = f"before {row['bytes']['before'] / 1e6:.0f} MB"
            found += "".join(f", {name} {value / 1e6:.1f} MB more" for name, value in beyond.items())
        lines.append(f"- {row['what']}: {found}")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=21)
    parser.add_argument("--runs", type=int, default=1, help="processes that measure memory")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--memory", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    flair.device = torch.device("cpu")
    logging.disable(logging.WARNING)
    if options.memory:
        memory(options.memory)
        return
    with tempfile.TemporaryDirectory() as temporary:
        small, base = tiny.build("bert", Path(temporary) / "tiny"), SHAPES["bert-base"](Path(temporary) / "base")
        rows = [against_bare_transformer(base, adapter=adapter, pairs=options.pairs) for adapter in (True, False)]
        rows += against_length(small, pairs=options.pairs)
        rows += [of_flair(small), of_memory(small, runs=options.runs)]
    report = {
        **heading(f"{torch.get_num_threads()} thread(s)", "no GPU used"),
        "pairs": options.pairs,
        "runs": options.runs,
        "rows": rows,
    }
    write("prediction", report, to_markdown(report), out=options.out)


if __name__ == "__main__":
    main()
