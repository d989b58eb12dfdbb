"""Ways of training a Flair model on real text, and one such training: what it reaches and what it costs.

Texts are those of the folder ``shared/data`` beside the project, weights those of MiniLM from the package index.
"""

from __future__ import annotations

import math
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flair
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Classifier
from flair.samplers import FlairSampler
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, TaskType
from torch import nn

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from tests.benchmarks.loads import peak, reset_peak

DATA = Path(__file__).parents[3] / "shared" / "data"
BATCH, EVALUATION_BATCH = 8, 64
RELOADED = 50
"""Test sentences that a model which was saved and loaded again predicts, and has to predict as before."""

ONE_WINDOW = {"allow_long_sentences": False}
"""No sentence here is longer than the model reads; Flair's default would copy each batch into 512 places."""

Tagged = tuple[list[str], list[str]]
"""The words of a sentence; one label for all of them, or one for each."""


@dataclass(frozen=True)
class Task:
    """A data set in three parts, which share no sentence but short ones that occur several times, and the model for it.

    Attributes:
        label_type: Flair's name for the labels.
        pool: sentences from which each seed draws those of its training.
        choice: sentences on which learning rates are chosen.
        test: sentences on which the chosen ones are measured.
        embeddings: the stock class and ours.
        options: of either class.
        model: the class of the model.
        dictionary: the keyword that takes the labels, and the other keywords.
    """

    label_type: str
    pool: list[Tagged]
    choice: list[Tagged]
    test: list[Tagged]
    embeddings: tuple[type[TransformerEmbeddings], type[TransformerEmbeddings]]
    options: dict[str, Any]
    model: type[Classifier]
    arguments: Callable[[Dictionary], dict[str, Any]]


@dataclass(frozen=True)
class Way:
    """How a base is trained, or not.

    Attributes:
        options: of the embeddings, made anew for each training.
        rates: the learning rates to start the choice from.
        is_stock: whether the embeddings are Flair's own.
        seeds: how many trainings are measured.
    """

    options: Callable[[], dict[str, Any]]
    rates: tuple[float, ...]
    is_stock: bool = False
    seeds: int = 3


class OfOneLength(FlairSampler):
    """Batches of sentences that stand together, in a random order: of sorted sentences, hardly a token is padding.

    Flair's own ChunkSampler does this, but cannot be made with the torch of today.
    """

    def __init__(self) -> None:
        self.data_source = None

    def __iter__(self) -> Iterator[int]:
        starts = list(range(0, self.num_samples, BATCH))
        random.shuffle(starts)
        return iter([index for start in starts for index in range(start, min(start + BATCH, self.num_samples))])


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


LORA = partial(LoraConfig, r=16, lora_alpha=32, target_modules="all-linear")
IN_FRONT = {"task_type": TaskType.FEATURE_EXTRACTION, "num_virtual_tokens": 20}

WAYS = {
    "full fine-tuning": Way(lambda: {"fine_tune": True}, (3e-5, 1e-4, 3e-4), is_stock=True, seeds=5),
    "frozen encoder": Way(lambda: {"fine_tune": False}, (3e-3, 1e-2, 3e-2), is_stock=True),
    "LoRA": Way(adapter(LORA), (3e-4, 1e-3, 3e-3), seeds=5),
    "DoRA": Way(adapter(LORA, use_dora=True), (3e-4, 1e-3, 3e-3)),
    "IA³": Way(adapter(IA3Config), (3e-3, 1e-2, 3e-2)),
    "prompt tuning": Way(adapter(PromptTuningConfig, **IN_FRONT), (3e-3, 1e-2, 3e-2)),
    "prefix tuning": Way(adapter(PrefixTuningConfig, **IN_FRONT), (3e-3, 1e-2, 3e-2)),
}


def sst2() -> Task:
    """Return sentiment of sentences: 6,920 to draw from, 872 for the choice, 1,821 to test."""

    def read(part: str) -> list[Tagged]:
        lines = (DATA / "sst2" / f"{part}.tsv").read_text(encoding="utf-8").splitlines()
        return [(text.split(" "), [label]) for text, label in (line.split("\t") for line in lines)]

    return classification(read("train"), read("dev"), read("test"))


def classification(pool: list[Tagged], choice: list[Tagged], test: list[Tagged]) -> Task:
    """Return a task whose sentences have one label each."""
    return Task(
        "sentiment",
        pool,
        choice,
        test,
        embeddings=(TransformerDocumentEmbeddings, PeftTransformerDocumentEmbeddings),
        options={"cls_pooling": "mean", **ONE_WINDOW},
        model=TextClassifier,
        arguments=lambda labels: {"label_dictionary": labels, "label_type": "sentiment"},
    )


def ewt() -> Task:
    """Return universal parts of speech: of the file "dev", all but the last 400 to draw from, these for the choice."""

    def read(part: str) -> list[Tagged]:
        blocks = (DATA / "ud-english-ewt" / f"en_ewt-ud-{part}.conllu").read_text(encoding="utf-8").split("\n\n")
        rows = [[line.split("\t") for line in block.splitlines() if line[:1].isdigit()] for block in blocks]
        # Ranges ("1-2") and empty nodes ("1.1") are not words.
        words = [[row for row in block if row[0].isdigit()] for block in rows if block]
        return [([row[1] for row in block], [row[3] for row in block]) for block in words]

    read_dev = read("dev")
    return tagging(read_dev[:-400], read_dev[-400:], read("test"))


def tagging(pool: list[Tagged], choice: list[Tagged], test: list[Tagged]) -> Task:
    """Return a task whose words have a label each."""
    heads = {"use_crf": False, "use_rnn": False, "reproject_embeddings": False}
    return Task(
        "upos",
        pool,
        choice,
        test,
        embeddings=(TransformerWordEmbeddings, PeftTransformerWordEmbeddings),
        options={"layers": "-1", "subtoken_pooling": "first", **ONE_WINDOW},
        model=SequenceTagger,
        arguments=lambda labels: {"tag_dictionary": labels, "tag_type": "upos", **heads},
    )


TASKS = {"SST-2": sst2, "UD-EWT": ewt}


def sentences(those: list[Tagged], label_type: str) -> list[Sentence]:
    """Return them as Flair has them."""
    made = []
    for words, labels in those:
        sentence = Sentence(words, use_tokenizer=False)
        if len(labels) == 1 and label_type == "sentiment":
            sentence.add_label(label_type, labels[0])
        else:
            for token, label in zip(sentence, labels, strict=True):
                token.add_label(label_type, label)
        made.append(sentence)
    return made


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
    shuffled: int | None = None,
) -> dict[str, Any]:
    """Return what one training reaches on ``measured`` and what it costs.

    The seed draws ``count`` sentences of the pool, the start of the head and the order of the sentences: ways with the
    same seed have all of these in common. The head learns with the adapter's rate unless it is given its own. Batches
    are of one length, or of ``shuffled`` sentences of whatever lengths. Seconds are those of the
    processor, in the trainer alone. Memory is the peak until the end of the training, beyond what the process had
    before.

    Raises:
        AssertionError: the score differs from a count by hand, or the saved file predicts something else.
    """
    assert count % BATCH == 0, "OfOneLength would mix lengths behind a short batch"
    before = reset_peak()
    drawn = sorted(random.Random(seed).sample(task.pool, count), key=lambda those: len(those[0]))
    corpus = Corpus(train=FlairDatapointDataset(sentences(drawn, task.label_type)), sample_missing_splits=False)
    model = build(task, way, base, seed=seed)
    flair.set_seed(seed)
    reached = ReachedParameters()
    with tempfile.TemporaryDirectory() as temporary:
        start = time.process_time()
        ModelTrainer(model, corpus).fine_tune(
            temporary,
            learning_rate=rate,
            decoder_learning_rate=head_rate,
            mini_batch_size=shuffled or BATCH,
            max_epochs=epochs,
            sampler=Shuffled() if shuffled else OfOneLength(),
            save_final_model=False,
            plugins=[reached],
        )
        seconds, memory = time.process_time() - start, peak() - before
        test = sentences(measured, task.label_type)
        accuracy = score(model, test, task.label_type)
        file = Path(temporary) / "model.pt"
        model.save(file)
        size = file.stat().st_size
        if prove:
            check_reloaded(model, type(model).load(file), test[:RELOADED])
    parameters = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return {
        "accuracy": accuracy,
        "trained": sum(parameters[name] for name in reached.names),
        "parameters": sum(parameters.values()),
        "seconds": seconds,
        "memory": memory,
        "file": size,
    }


def build(task: Task, way: Way, base: str, *, seed: int) -> nn.Module:
    """Return a model whose head starts as it does in every other way with this seed."""
    labels = Dictionary(add_unk=False)
    for label in sorted({label for _, those in task.pool for label in those}):
        labels.add_item(label)
    flair.set_seed(seed)
    embeddings = task.embeddings[not way.is_stock](base, **task.options, **way.options())
    flair.set_seed(seed)
    return task.model(embeddings, **task.arguments(labels))


def score(model: Any, test: list[Sentence], label_type: str) -> float:
    """Return the share of labels that are right, as Flair counts them and as we do."""
    result = model.evaluate(test, gold_label_type=label_type, mini_batch_size=EVALUATION_BATCH)
    units = [unit for sentence in test for unit in (sentence if label_type == "upos" else [sentence])]
    right = sum(unit.get_label("predicted").value == unit.get_label(label_type).value for unit in units)
    # Flair rounds to four digits.
    assert math.isclose(result.scores["accuracy"], right / len(units), abs_tol=1e-4)
    return right / len(units)


def check_reloaded(model: Any, loaded: Any, sample: list[Sentence]) -> None:
    """Raise unless both predict the same labels with the same scores."""
    found = []
    for predictor, name in ((model, "live"), (loaded, "loaded")):
        predictor.predict(sample, label_name=name, mini_batch_size=EVALUATION_BATCH)
        found.append([[(label.value, label.score) for label in sentence.get_labels(name)] for sentence in sample])
    assert found[0] == found[1]
