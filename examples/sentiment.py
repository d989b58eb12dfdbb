"""Train a sentiment classifier, save it, load it, and predict.

    python examples/sentiment.py
    python examples/sentiment.py --model xlm-roberta-base --epochs 3

``sentiment_stock_flair.py`` is an ordinary Flair script that fine-tunes all weights. ``sentiment.py`` is the same with
LoRA: two lines are different, the import of the embeddings and the line that makes them. Without a network it runs on
the tiny encoder and the corpus of this repository, in under a minute.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flair
from flair.data import Sentence
from flair.datasets import ClassificationCorpus
from flair.models import TextClassifier
from flair.trainers import ModelTrainer

from flair_peft import PeftTransformerDocumentEmbeddings

RESOURCES = Path(__file__).resolve().parent.parent / "resources"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a sentiment classifier in Flair.")
    parser.add_argument("--model", default=str(RESOURCES / "tiny-encoder"), help="name or folder of a transformer")
    parser.add_argument("--data", type=Path, default=RESOURCES / "corpora" / "sentiment", help="folder of three splits")
    parser.add_argument("--output", type=Path, default=Path("sentiment-model"), help="folder for the model and logs")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    flair.set_seed(1)
    corpus = ClassificationCorpus(
        arguments.data, label_type="sentiment", train_file="train.txt", dev_file="dev.txt", test_file="test.txt"
    )
    embeddings = PeftTransformerDocumentEmbeddings(arguments.model)
    classifier = TextClassifier(
        embeddings,
        label_type="sentiment",
        label_dictionary=corpus.make_label_dictionary("sentiment", add_unk=False),
    )
    ModelTrainer(classifier, corpus).fine_tune(
        arguments.output,
        learning_rate=arguments.learning_rate,
        decoder_learning_rate=1e-2,
        mini_batch_size=16,
        max_epochs=arguments.epochs,
    )

    loaded = TextClassifier.load(arguments.output / "final-model.pt")
    for text in ("The soup was cold and the waiter was rude.", "Not a dull moment: the show made us smile."):
        sentence = Sentence(text)
        loaded.predict(sentence)
        print(f"{sentence.tag} ({sentence.score:.3f}): {text}")


if __name__ == "__main__":
    main()
