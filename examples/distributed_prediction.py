"""Predict the labels of a corpus that is larger than memory, in several processes, and go on after a crash.

    torchrun --nproc-per-node 2 examples/distributed_prediction.py best-model.pt texts/ labels/
    accelerate launch --multi_gpu --num_processes 2 examples/distributed_prediction.py best-model.pt texts/ labels/
    python examples/distributed_prediction.py best-model.pt texts/ labels/                        # in one process

The folder ``texts`` holds shards, UTF-8 files ``*.txt`` with a text in each line. For each, the folder ``labels`` gets
a file ``*.jsonl`` with as many lines: ``{"labels": [[text, label, score], …]}``, or ``{"error": …}`` for a text that
cannot be read or predicted. A file appears there when it is complete, and never changes afterwards: whatever happens,
start the same command again, and it does the shards that are missing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from flair.data import Sentence
from flair.nn import Classifier

import flair_peft

Record = dict[str, Any]

LABEL = "predicted"


def predict_texts(model: Classifier, texts: Iterable[bytes], *, mini_batch_size: int) -> Iterator[Record]:
    """Yield one record for each text, in order; what is wrong with one text is the matter of its record alone."""
    unreadable: deque[Exception | None] = deque()

    def decoded() -> Iterator[str]:
        for text in texts:
            try:
                unreadable.append(None)
                yield text.decode("utf-8")
            except UnicodeDecodeError as error:
                unreadable[-1] = error
                yield ""

    stream = flair_peft.predict_stream(model, decoded(), mini_batch_size=mini_batch_size, label_name=LABEL)
    for sentence in stream:
        yield to_record(sentence, unreadable.popleft())


def to_record(sentence: Sentence, error: Exception | None) -> Record:
    if error is None and sentence.has_metadata("prediction_error"):
        error = sentence.get_metadata("prediction_error")
    if error is not None:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"labels": [[label.data_point.text, label.value, label.score] for label in sentence.get_labels(LABEL)]}


def predict_shard(model: Classifier, shard: Path, output: Path, *, mini_batch_size: int) -> int:
    """Write the records of a shard to ``output``, which appears whole or not at all; how many there are."""
    count = failed = 0
    unfinished = output.with_name(f"{output.stem}.{uuid.uuid4().hex}.unfinished")
    with shard.open("rb") as texts, unfinished.open("w", encoding="utf-8") as file:
        for record in predict_texts(model, (line.rstrip(b"\r\n") for line in texts), mini_batch_size=mini_batch_size):
            file.write(json.dumps(record) + "\n")
            count += 1
            failed += "error" in record
        if failed == count > 0:
            model.predict(Sentence("one plain text"))  # raises where it is not the texts that are at fault
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(output)
    return count


def missing_shards(texts: Path, labels: Path) -> list[tuple[Path, Path]]:
    """Return shards without output, and where that goes."""
    pairs = [(shard, labels / f"{shard.stem}.jsonl") for shard in sorted(texts.glob("*.txt"))]
    return [(shard, output) for shard, output in pairs if not output.exists()]


def open_job(labels: Path, model: Path) -> None:
    """Make the folder, or leave if another model began to write to it: labels of two models would be mixed.

    What processes that were killed have left there goes: there is one job for a folder at a time.
    """
    labels.mkdir(parents=True, exist_ok=True)
    for left in labels.glob("*.unfinished"):
        left.unlink()
    described = {"model": str(model.resolve()), "changed": model.stat().st_mtime_ns}
    job = labels / "job.json"
    if not job.exists():
        job.with_suffix(".unfinished").write_text(json.dumps(described), encoding="utf-8")
        job.with_suffix(".unfinished").replace(job)
    elif json.loads(job.read_text(encoding="utf-8")) != described:
        raise SystemExit(f"'{labels}' holds labels of another model, see '{job}'. Name another folder.")


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a corpus in several processes.")
    parser.add_argument("model", type=Path, help="a .pt file or a checkpoint directory")
    parser.add_argument("texts", type=Path, help="folder of *.txt")
    parser.add_argument("labels", type=Path, help="folder for *.jsonl")
    parser.add_argument("--mini-batch-size", type=int, default=32)
    arguments = parser.parse_args()
    logging.getLogger("flair").setLevel(logging.ERROR)

    with flair_peft.join_processes() as is_distributed:
        if is_distributed:
            state = PartialState()
            missing = [None]
            if state.is_main_process:
                open_job(arguments.labels, arguments.model)
                missing = [missing_shards(arguments.texts, arguments.labels)]
            # One process decides: another one may look when the first shards are done already.
            (missing,) = broadcast_object_list(missing)
            with state.split_between_processes(missing) as share:
                predict_share(arguments, share)
        else:
            open_job(arguments.labels, arguments.model)
            predict_share(arguments, missing_shards(arguments.texts, arguments.labels))


def predict_share(arguments: argparse.Namespace, share: list[tuple[Path, Path]]) -> None:
    if share:
        model = Classifier.load(arguments.model)
        for shard, output in share:
            count = predict_shard(model, shard, output, mini_batch_size=arguments.mini_batch_size)
            print(f"{shard.name}: {count} texts", flush=True)


if __name__ == "__main__":
    main()
