"""Train a sentiment classifier and a name tagger with LoRA, save both, and use them in another process.

    python examples/quickstart.py

Runs on a CPU in a minute or two and needs no network: the tiny encoder and the corpora are part of the repository. The
test sentences consist of words, names and phrases that the training sentences lack; the encoder has seen them in
pre-training only. Exits with 1 if a saved model predicts anything else than the one that was trained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Corpus, Sentence
from flair.datasets import ClassificationCorpus, ColumnCorpus
from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Classifier
from flair.trainers import ModelTrainer
from flair.trainers.plugins import TrainerPlugin
from peft import LoraConfig

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings

RESOURCES = Path(__file__).resolve().parent.parent / "resources"
ENCODER = str(RESOURCES / "tiny-encoder")
SPLITS = {"train_file": "train.txt", "dev_file": "dev.txt", "test_file": "test.txt"}

Prediction = list[tuple[str, str, float]]  # text, label, score


def read_reviews() -> Corpus:
    return ClassificationCorpus(RESOURCES / "corpora" / "sentiment", label_type="sentiment", **SPLITS)


def read_names() -> Corpus:
    return ColumnCorpus(RESOURCES / "corpora" / "ner", column_format={0: "text", 1: "ner"}, **SPLITS)


def build_classifier(embeddings: TransformerDocumentEmbeddings, corpus: Corpus) -> TextClassifier:
    labels = corpus.make_label_dictionary("sentiment")
    return TextClassifier(embeddings, label_type="sentiment", label_dictionary=labels)


def build_tagger(embeddings: TransformerWordEmbeddings, corpus: Corpus) -> SequenceTagger:
    tags = corpus.make_label_dictionary("ner", add_unk=False)
    return SequenceTagger(
        embeddings, tag_dictionary=tags, tag_type="ner", use_rnn=False, use_crf=False, reproject_embeddings=False
    )


@dataclass(frozen=True)
class Task:
    """What differs between the two tasks. All of it is plain Flair but for ``peft_embeddings``."""

    title: str
    metric: str
    read: Callable[[], Corpus]
    build: Callable[[Any, Corpus], Classifier]
    embeddings: type[TransformerEmbeddings]
    peft_embeddings: type[TransformerEmbeddings]


TASKS = {
    "sentiment": Task(
        title="Sentiment of reviews",
        metric="accuracy",
        read=read_reviews,
        build=build_classifier,
        embeddings=TransformerDocumentEmbeddings,
        peft_embeddings=PeftTransformerDocumentEmbeddings,
    ),
    "ner": Task(
        title="Names of people, places and organisations",
        metric="F1",
        read=read_names,
        build=build_tagger,
        embeddings=TransformerWordEmbeddings,
        peft_embeddings=PeftTransformerWordEmbeddings,
    ),
}


@dataclass(frozen=True)
class Outcome:
    """What is measured while one task is trained."""

    frozen_score: float
    adapter_score: float
    trained_parameters: int
    all_parameters: int
    file_size: int
    full_file_size: int
    predictions: list[Prediction]


class DotPerEpoch(TrainerPlugin):
    """Shows that the training goes on."""

    @TrainerPlugin.hook
    def after_training_epoch(self, **_: Any) -> None:
        """Print one dot."""
        print(".", end="", flush=True)


@contextlib.contextmanager
def without_progress_bars() -> Iterator[None]:
    """Flair shows one for each evaluation."""
    with contextlib.redirect_stderr(io.StringIO()):
        yield


def train(model: Classifier, corpus: Corpus, *, title: str) -> float:
    """Train ``model`` in place; the score on the test split."""
    print(f"  {title:<30}", end="", flush=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, without_progress_bars():
        result = ModelTrainer(model, corpus).fine_tune(
            folder,
            learning_rate=3e-3,
            decoder_learning_rate=1e-2,
            mini_batch_size=8,
            max_epochs=5,
            eval_batch_size=32,
            save_final_model=False,
            plugins=[DotPerEpoch()],
        )
    print(f" {time.perf_counter() - start:4.1f} s")
    return result["test_score"]


def predict(model: Classifier, sentences: list[Sentence]) -> list[Prediction]:
    """The labels of each sentence."""
    model.predict(sentences, label_name="predicted", mini_batch_size=32)
    return [
        [(label.data_point.text, label.value, label.score) for label in sentence.get_labels("predicted")]
        for sentence in sentences
    ]


def saved_size(model: Classifier, path: Path) -> int:
    """Save ``model``; the size of the file in bytes."""
    model.save(path)
    return path.stat().st_size


def run(task: Task, path: Path) -> Outcome:
    """Train the head alone, then with an adapter; the latter model is saved to ``path``."""
    print(task.title)
    with without_progress_bars():
        corpus = task.read()

    flair.set_seed(1)
    with without_progress_bars():
        baseline = task.build(task.embeddings(ENCODER), corpus)
    full_file_size = saved_size(baseline, path.with_suffix(".full.pt"))
    path.with_suffix(".full.pt").unlink()
    baseline.embeddings.requires_grad_(False)
    frozen_score = train(baseline, corpus, title="head on the frozen encoder")

    flair.set_seed(1)
    with without_progress_bars():
        lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
        model = task.build(task.peft_embeddings(ENCODER, peft_config=lora), corpus)
    adapter_score = train(model, corpus, title="head and LoRA")

    return Outcome(
        frozen_score=frozen_score,
        adapter_score=adapter_score,
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        all_parameters=sum(p.numel() for p in model.parameters()),
        file_size=saved_size(model, path),
        full_file_size=full_file_size,
        predictions=predict(model, list(corpus.test)),
    )


def predict_saved(folder: Path) -> None:
    """Load the saved models and write their predictions for the test splits as JSON; runs in a process of its own."""
    predictions = {}
    with without_progress_bars():
        for name, task in TASKS.items():
            model = Classifier.load(folder / f"{name}.pt")
            predictions[name] = predict(model, list(task.read().test))
    (folder / "predictions.json").write_text(json.dumps(predictions))


def predict_in_new_process(folder: Path) -> dict[str, list[Prediction]]:
    """What the models in ``folder`` predict when another Python process loads them."""
    subprocess.run([sys.executable, __file__, "--predict", str(folder)], check=True)
    predictions = json.loads((folder / "predictions.json").read_text())
    return {
        name: [[tuple(label) for label in sentence] for sentence in sentences]
        for name, sentences in predictions.items()
    }


def without_scores(sentences: list[Prediction]) -> list[list[tuple[str, str]]]:
    return [[(text, label) for text, label, _ in sentence] for sentence in sentences]


def report(task: Task, outcome: Outcome, loaded: list[Prediction]) -> bool:
    """Print what was measured; True if the loaded model predicts the labels of the trained one."""
    trained, found = without_scores(outcome.predictions), without_scores(loaded)
    same = sum(first == second for first, second in zip(trained, found, strict=True))
    scores = "the same" if outcome.predictions == loaded else "not the same"
    share = outcome.trained_parameters / outcome.all_parameters
    size, full_size = outcome.file_size / 1e6, outcome.full_file_size / 1e6
    print(
        f"\n{task.title}\n"
        f"  {task.metric:<18}{outcome.frozen_score:.3f} before (head only), {outcome.adapter_score:.3f} with LoRA\n"
        f"  {'trained':<18}{outcome.trained_parameters:,} of {outcome.all_parameters:,} parameters ({share:.1%})\n"
        f"  {'file':<18}{size:.2f} MB; {full_size:.2f} MB for a model that is fine-tuned in full\n"
        f"  {'new process':<18}{same} of {len(loaded)} sentences with the same labels, scores {scores}"
    )
    return same == len(trained)


def run_all(folder: Path) -> bool:
    """True if both models predict in a new process what they predict here."""
    outcomes = {name: run(task, folder / f"{name}.pt") for name, task in TASKS.items()}
    print("Loading both in a new process", flush=True)
    loaded = predict_in_new_process(folder)
    agreements = [report(task, outcomes[name], loaded[name]) for name, task in TASKS.items()]
    return all(agreements)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train, save, load and predict with LoRA in Flair.")
    parser.add_argument("--output", type=Path, help="keep the saved models in this folder")
    parser.add_argument("--predict", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.getLogger("flair").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # faster than several for matrices as small as these

    if arguments.predict:
        predict_saved(arguments.predict)
        return 0
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        is_same = run_all(arguments.output)
        print(f"\nBoth are in {arguments.output}. Look into one: flair-peft inspect {arguments.output / 'ner.pt'}")
        return 0 if is_same else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if run_all(Path(folder)) else 1


if __name__ == "__main__":
    sys.exit(main())
