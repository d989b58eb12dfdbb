"""Trainings that one process or a group of processes can do, on the same sentences in the same global batches.

``torchrun --nproc-per-node 2 -m tests.support.parallel_training BASES FOLDER NAME…`` does those of these names, and
each process writes what it got to ``FOLDER/NAME-RANK.pt``. The base models are in ``BASES``.
"""

from __future__ import annotations

import functools
import logging
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.models import SequenceTagger, SpanClassifier, TextClassifier
from flair.nn import Classifier
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin, TrainingInterrupt
from peft import AdaLoraConfig
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import flair_peft
from flair_peft import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerWordEmbeddings,
    RankAllocationPlugin,
    ResumePlugin,
)
from flair_peft.embeddings import batch_division, pass_cost
from tests.support.configs import lora

GLOBAL_BATCH = 8
NAMES = ("Ann", "Bob", "Cem", "Dora", "Eve", "Finn", "Gus", "Hal")
PLACES = ("Berlin", "Paris", "Rome and Bern", "New York")

Result = dict[str, Any]


def sentences(*, unlabelled: Callable[[int], bool] = lambda _: False) -> list[Sentence]:
    """Return sentences of different lengths, those with odd numbers being the ones that the second process gets."""
    made = []
    for number in range(24):
        name, place = NAMES[number % 8], PLACES[number % 4]
        sentence = Sentence(f"{name} {'really ' * (number % 3)}{'loves' if number % 2 else 'hates'} {place} .")
        sentence.add_label("opinion", "good" if number % 2 else "bad")
        if not unlabelled(number):
            sentence[0:1].add_label("mention", "PER")
            sentence[0:1].add_label("kind", "early" if number % 8 < 4 else "late")
        made.append(sentence)
    return made


def corpus(*, size: int = 24, **options: Any) -> Corpus:
    """Return the same sentences for training and evaluation."""
    train, dev, test = (FlairDatapointDataset(sentences(**options)[:size]) for _ in range(3))
    return Corpus(train=train, dev=dev, test=test, name="opinions")


def labels(label_type: str) -> Dictionary:
    return corpus().make_label_dictionary(label_type, add_unk=False)


def classifier(base: str, **options: Any) -> TextClassifier:
    embeddings = PeftTransformerDocumentEmbeddings(
        base, **{"peft_config": lora(target_modules="all-linear"), **options}
    )
    return TextClassifier(embeddings, label_dictionary=labels("opinion"), label_type="opinion")


def tagger(base: str) -> SequenceTagger:
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=lora(target_modules="all-linear"))
    return SequenceTagger(
        embeddings,
        tag_dictionary=labels("mention"),
        tag_type="mention",
        hidden_size=8,
        dropout=0,
        word_dropout=0,
        locked_dropout=0,
    )


def span_classifier(base: str) -> SpanClassifier:
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=lora(target_modules="all-linear"))
    return SpanClassifier(embeddings, label_dictionary=labels("kind"), label_type="kind", span_label_type="mention")


class Traffic(TrainerPlugin):
    """Counts the bytes of gradients that this process hands over for each step, and the collectives of a step."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []
        self.collectives: list[dict[str, int]] = []

    @TrainerPlugin.hook("after_setup")
    def watch(self, **_: Any) -> None:
        def count(state, bucket):  # torch reads annotations as objects, and here they are strings
            self.bytes[-1] += bucket.buffer().nbytes
            return allreduce_hook(state, bucket)

        self.trainer.ddp_model.register_comm_hook(None, count)

    @TrainerPlugin.hook("before_training_batch")
    def begin(self, **_: Any) -> None:
        self.bytes.append(0)
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self.profiler.__enter__()

    @TrainerPlugin.hook("before_training_optimizer_step")
    def end(self, **_: Any) -> None:
        self.profiler.__exit__(None, None, None)
        events = {event.key: event.count for event in self.profiler.key_averages()}
        self.collectives.append({key: count for key, count in events.items() if key.startswith("gloo:")})


class Interruption(TrainerPlugin):
    """Ends the training after an epoch."""

    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.epoch = epoch

    @TrainerPlugin.hook("after_evaluation")
    def interrupt(self, epoch: int, **_: Any) -> None:
        if epoch == self.epoch:
            raise TrainingInterrupt("enough")


def run(
    base: str,
    directory: Path,
    *,
    build: Callable[..., Classifier] = classifier,
    architecture: str = "bert",
    data: Callable[[], Corpus] = corpus,
    plugins: tuple[Callable[[], TrainerPlugin], ...] = (),
    start: str = "fine_tune",
    watches: bool = False,
    stops_after: int | None = None,
    **options: Any,
) -> Result:
    """Train, and return the weights that were trained and what the trainer reported.

    Args:
        base: folder of base models.
        directory: for the trainer's files.
        build: makes the model.
        architecture: of the base model.
        data: makes the corpus.
        plugins: make plugins.
        start: method of the trainer.
        watches: count what travels.
        stops_after: the epoch after which the training is interrupted, and goes on from its file.
        **options: of the trainer.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    rank = dist.get_rank() if dist.is_initialized() else 0
    torch.manual_seed(rank)  # each process starts from weights of its own, and the first one's win
    model = build(f"{base}/{architecture}")
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    traffic = [Traffic()] if watches and world > 1 else []
    settings: dict[str, Any] = {
        "learning_rate": 4e-3,
        "max_epochs": 2,
        "mini_batch_size": GLOBAL_BATCH // world,
        "shuffle": False,
        "multi_gpu": world > 1,
        **options,
    }
    made = [*(make() for make in plugins), *traffic]
    if stops_after is not None:
        interrupted = [*made, Interruption(stops_after)]
        train = getattr(ModelTrainer(model, data()), start)
        train(directory, **settings, save_optimizer_state=True, plugins=interrupted)
        model = type(model).load(directory / "final-model.pt")
        made = [*(make() for make in plugins), *traffic, ResumePlugin(directory / "final-model.pt")]
    result = getattr(ModelTrainer(model, data()), start)(directory, **settings, plugins=made)
    model.eval()
    return {
        "trained": {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad},
        "frozen": {name: torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before},
        "score": result["test_score"],
        "loss": model.evaluate(sentences(), gold_label_type=model.label_type).loss,
        "bytes": [count for watch in traffic for count in watch.bytes],
        "collectives": [found for watch in traffic for found in watch.collectives],
        "files": sorted(path.name for path in directory.iterdir()),
    }


def _in_groups(base: str, directory: Path) -> Result:
    """Train with batches that are divided by length, in each process in another way."""
    cost_of, run_divided, passes = pass_cost.cost_of, batch_division.run_divided, list[int]()

    def counted(run_group: Any, inputs: Any, groups: Any) -> Any:
        passes.append(1 if groups is None else len(groups.rows))
        return run_divided(run_group, inputs, groups)

    pass_cost.cost_of = lambda *_: pass_cost.Cost(1.0, 0.0)
    batch_division.run_divided = counted
    try:
        result = run(base, directory, optimizer=torch.optim.SGD, learning_rate=0.05, watches=True)
    finally:
        pass_cost.cost_of, batch_division.run_divided = cost_of, run_divided
    return {**result, "passes": passes}


def _adalora(base: str) -> TextClassifier:
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=1, tfinal=1, deltaT=1, total_step=6, target_modules=["query", "value"]
    )
    return classifier(base, peft_config=config)


def _second_process_has_nothing(number: int) -> bool:
    return number < 8 and number % 2 == 1


TRAININGS: dict[str, Callable[[str, Path], Result]] = {
    "sgd": functools.partial(run, optimizer=torch.optim.SGD, learning_rate=0.05, watches=True),
    "adamw": run,
    "in-groups": _in_groups,
    "annealed": functools.partial(run, start="train", learning_rate=0.05, patience=0, max_epochs=4),
    "crf": functools.partial(run, build=tagger),
    "chunks": functools.partial(run, mini_batch_chunk_size=3, watches=True),
    "biases": functools.partial(
        run,
        build=functools.partial(classifier, peft_config=lora(target_modules="all-linear", bias="all")),
        optimizer=torch.optim.SGD,
    ),
    "mlm-only": functools.partial(run, architecture="bert-mlm"),
    # Adam would make a step of a gradient that is zero but for rounding, and bf16 rounds much.
    "bf16": functools.partial(
        run, build=functools.partial(classifier, dtype="bfloat16"), optimizer=torch.optim.SGD, learning_rate=0.03
    ),
    "adalora": functools.partial(run, build=_adalora, plugins=(RankAllocationPlugin,)),
    "nothing-to-learn-from": functools.partial(
        run, build=span_classifier, data=functools.partial(corpus, unlabelled=_second_process_has_nothing)
    ),
    "uneven": functools.partial(run, data=functools.partial(corpus, size=21)),
    "best-model": functools.partial(run, use_final_model_for_eval=False),
    "in-two-parts": functools.partial(run, max_epochs=4, stops_after=2),
    "in-one-part": functools.partial(run, max_epochs=4),
}


def main(base: str, folder: Path, names: list[str]) -> None:
    """Do the trainings of these names and write what this process got."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with flair_peft.join_processes() as is_distributed:
        assert is_distributed
        drawn = [random.random(), float(numpy.random.rand()), float(torch.rand(1))]
        torch.save(drawn, folder / f"drawn-{dist.get_rank()}.pt")
        for name in names:
            torch.save(TRAININGS[name](base, folder / name), folder / f"{name}-{dist.get_rank()}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), sys.argv[3:])
