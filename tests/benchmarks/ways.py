"""Ways of training a Flair model on real text, and one such training: what it reaches and what it costs."""

from __future__ import annotations

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flair
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.samplers import FlairSampler
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from torch import nn

from tests.benchmarks.loads import peak, reset_peak
from tests.benchmarks.text_tasks import Tagged, Task, check_reloaded, dictionary, score, sentences

BATCH = 8
RELOADED = 50
"""Test sentences that a model which was saved and loaded again predicts, and has to predict as before."""


@dataclass(frozen=True)
class Way:
    """How a base is trained, or not.

    Attributes:
        options: of the embeddings, made anew for each training.
        is_stock: whether the embeddings are Flair's own.
        keeps_vectors: whether vectors are computed once, for all epochs.
        epochs: how many times as many as other ways have.
        frozen: end of the names of parameters that keep their values all the same.
    """

    options: Callable[[], dict[str, Any]]
    is_stock: bool = False
    keeps_vectors: bool = False
    epochs: int = 1
    frozen: str = ""


class OfOneLength(FlairSampler):
    """Batches of sentences that stand together, in a random order: of sorted sentences, hardly a token is padding.

    Flair's own ChunkSampler does this, but cannot be made with the torch of today.
    """

    def __init__(self, size: int = BATCH) -> None:
        self.data_source = None
        self.size = size

    def __iter__(self) -> Iterator[int]:
        starts = list(range(0, self.num_samples, self.size))
        random.shuffle(starts)
        return iter([index for start in starts for index in range(start, min(start + self.size, self.num_samples))])


class Shuffled(OfOneLength):
    """Sentences in a random order that does not depend on what torch has drawn, so that all ways have the same."""

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.num_samples), self.num_samples))


class ReachedParameters(TrainerPlugin):
    """Keeps the names of the parameters that a gradient reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    @TrainerPlugin.hook
    def after_training_batch(self, **_: Any) -> None:
        self.names.update(name for name, parameter in self.model.named_parameters() if parameter.grad is not None)


def adapter(config: Callable[..., Any], **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: {"peft_config": config(**options)}


LAYERS, RANK = 12, 16
LORA = partial(LoraConfig, r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
IN_FRONT = {"task_type": TaskType.FEATURE_EXTRACTION, "num_virtual_tokens": 20}


def upper(count: int) -> Way:
    """Return LoRA on so many of MPNet's layers, counted from the last, with as many weights as on all of them."""
    rank = RANK * LAYERS // count
    return Way(
        adapter(
            LoraConfig,
            r=rank,
            lora_alpha=2 * rank,
            target_modules=["q", "k", "v", "o", "intermediate.dense", "output.dense"],
            layers_to_transform=list(range(LAYERS - count, LAYERS)),
            layers_pattern="layer",
        )
    )


WAYS = {
    "full fine-tuning": Way(lambda: {"fine_tune": True}, is_stock=True),
    "frozen encoder": Way(lambda: {"fine_tune": False}, is_stock=True, keeps_vectors=True),
    "LoRA": Way(adapter(LORA)),
    "DoRA": Way(adapter(LORA, use_dora=True)),
    "IA³": Way(adapter(IA3Config)),
    "prompt tuning": Way(adapter(PromptTuningConfig, **IN_FRONT)),
    "prefix tuning": Way(adapter(PrefixTuningConfig, **IN_FRONT)),
}


def train(
    task: Task,
    way: Way,
    base: str,
    *,
    rate: float,
    seed: int,
    count: int,
    epochs: int,
    measured: list[Tagged],
    prove: bool,
    head_rate: float | None = None,
    batch: int = BATCH,
    shuffled: bool = False,
    is_mixed: bool = False,
) -> dict[str, Any]:
    """Return what one training reaches on ``measured`` and what it costs.

    The seed draws ``count`` sentences of the pool, the start of the head and the order of the sentences: ways with the
    same seed have all of these in common. Sentences in documents are all taken. The head learns with the adapter's rate
    unless it is given its own. Batches are of one length, or ``shuffled`` and of whatever lengths; where the training
    ``is_mixed``, products of matrices are of bfloat16. Seconds are those of the processor, in the trainer alone. Memory
    is the peak until the end of the training, beyond what the process had before.

    Raises:
        AssertionError: the score differs from a count by hand, or the saved file predicts something else.
    """
    before = reset_peak()
    drawn = drawn_sentences(task, seed=seed, count=count)
    drawn = drawn[: len(drawn) // batch * batch]  # OfOneLength would mix lengths behind a short batch
    corpus = Corpus(train=FlairDatapointDataset(drawn), sample_missing_splits=False)
    model = build(task, way, base, seed=seed)
    flair.set_seed(seed)
    reached = ReachedParameters()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.process_time()
        ModelTrainer(model, corpus).fine_tune(
            temporary,
            learning_rate=rate,
            decoder_learning_rate=head_rate,
            mini_batch_size=batch,
            max_epochs=epochs * way.epochs,
            sampler=Shuffled() if shuffled else OfOneLength(batch),
            save_final_model=False,
            use_amp=is_mixed,
            embeddings_storage_mode="cpu" if way.keeps_vectors and "use_context" not in task.options else "none",
            plugins=[reached],
        )
        seconds, memory = time.process_time() - start, peak() - before
        test = sentences(measured, task.label_type)
        reached_score = score(model, test, task.label_type)
        file = Path(temporary) / "model.pt"
        model.model_card["training_parameters"]["sampler"] = None  # a stock model's file would hold all its sentences
        model.save(file)
        size = file.stat().st_size
        if prove:
            check_reloaded(model, type(model).load(file), test[:RELOADED])
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "score": reached_score,
        "trained": sum(parameters[name] for name in reached.names),
        "parameters": sum(parameters.values()),
        "seconds": seconds,
        "memory": memory,
        "file": size,
    }


def drawn_sentences(task: Task, *, seed: int, count: int) -> list[Sentence]:
    """Return the sentences of a training, the shortest first."""
    pool = task.pool if task.in_documents else random.Random(seed).sample(task.pool, count)
    return sorted(sentences(pool, task.label_type), key=len)


def build(task: Task, way: Way, base: str, *, seed: int) -> nn.Module:
    """Return a model whose head starts as it does in every other way with this seed."""
    labels = dictionary(task)
    flair.set_seed(seed)
    embeddings = task.embeddings[not way.is_stock](base, **task.options, **way.options())
    for name, parameter in embeddings.named_parameters() if way.frozen else ():
        parameter.requires_grad_(parameter.requires_grad and not name.endswith(way.frozen))
    flair.set_seed(seed)
    return task.model(embeddings, **task.arguments(labels))
