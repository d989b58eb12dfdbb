"""Teach a classifier new labels with a few examples each: TARS, with LoRA.

    python examples/few_shot.py
    python examples/few_shot.py --model sentence-transformers/all-MiniLM-L6-v2 --epochs 1

TARS reads a label's name together with the text and says whether they belong together, so that what it learned of some
labels helps with others. It is trained on what reviews of films, hotels and four other things are about, and then asked
about concerts, museums, laptops, airlines, dentists and campsites: first without any example of these, then after
``--shots`` of each.

The encoder has to know what words mean. MiniLM, by the second command, comes to an accuracy of 0.692 without an example
and 0.836 after 8 of each; guessing gives 0.17. The tiny encoder of this repository, the default, comes to 0.234 and
0.289: with it, the script shows that all parts work together.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import flair
from flair.data import Corpus, Sentence
from flair.datasets import FlairDatapointDataset
from flair.models import TARSClassifier
from flair.trainers import ModelTrainer
from peft import LoraConfig

from flair_peft import PeftTransformerDocumentEmbeddings

RESOURCES = Path(__file__).resolve().parent.parent / "resources"
CORPORA = RESOURCES / "corpora"

Example = tuple[str, str]  # text, topic


def read_words() -> dict[str, set[str]]:
    """Return topic → words that only reviews of it use, from the grammar that the reviews were written with."""
    words: dict[str, set[str]] = {}
    for block in (CORPORA / "grammar" / "opinions.txt").read_text(encoding="utf-8").split("\n\n"):
        rule, *lines = block.strip().splitlines()
        named = re.match(r"= (\w+)\.(?:thing|aspects?)$", rule)
        if named:
            words.setdefault(named[1], set()).update(word.strip() for line in lines for word in line.split("|"))
    return words


def read_examples(split: str) -> list[Example]:
    """Return the reviews of a split whose words tell what they are about."""
    words, examples = read_words(), []
    for line in (CORPORA / "sentiment" / f"{split}.txt").read_text(encoding="utf-8").splitlines():
        _, text = line.split(" ", 1)
        topics = [topic for topic, own in words.items() if any(re.search(rf"\b{word}\b", text.lower()) for word in own)]
        if len(topics) == 1:
            examples.append((text, topics[0]))
    random.Random(1).shuffle(examples)
    return examples


def first_of_each(examples: Iterable[Example], count: int) -> tuple[list[Example], list[Example]]:
    """Return so many examples of each topic, and all the others."""
    chosen: list[Example] = []
    others: list[Example] = []
    for example in examples:
        same = sum(topic == example[1] for _, topic in chosen)
        (chosen if same < count else others).append(example)
    return chosen, others


def corpus_of(examples: Iterable[Example]) -> Corpus:
    sentences = [Sentence(text).add_label("topic", topic) for text, topic in examples]
    return Corpus(train=FlairDatapointDataset(sentences), sample_missing_splits=False)


def accuracy(model: TARSClassifier, examples: list[Example]) -> float:
    sentences = [Sentence(text) for text, _ in examples]
    model.predict(sentences, label_name="predicted", multi_label=False, mini_batch_size=32)
    pairs = zip(sentences, examples, strict=True)
    return sum(sentence.get_label("predicted").value == topic for sentence, (_, topic) in pairs) / len(examples)


def train(model: TARSClassifier, corpus: Corpus, *, epochs: int, learning_rate: float) -> None:
    with tempfile.TemporaryDirectory() as folder:
        ModelTrainer(model, corpus).fine_tune(
            folder,
            learning_rate=learning_rate,
            decoder_learning_rate=1e-2,
            mini_batch_size=8,
            max_epochs=epochs,
            save_final_model=False,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Teach TARS new labels with a few examples each, with LoRA in Flair.")
    parser.add_argument("--model", default=str(RESOURCES / "tiny-encoder"), help="name or folder of a transformer")
    parser.add_argument("--output", type=Path, default=Path("few-shot-model.pt"), help="file for the model")
    parser.add_argument("--shots", type=int, default=8, help="examples of each new topic")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    arguments = parser.parse_args()

    flair.set_seed(1)
    known, new = corpus_of(read_examples("train")), read_examples("test")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    tars = TARSClassifier(
        embeddings=PeftTransformerDocumentEmbeddings(arguments.model, peft_config=lora),
        task_name="known topics",
        label_dictionary=known.make_label_dictionary("topic", add_unk=False),
        label_type="topic",
    )
    train(tars, known, epochs=arguments.epochs, learning_rate=arguments.learning_rate)

    shots, others = first_of_each(new, arguments.shots)
    few = corpus_of(shots)
    topics = few.make_label_dictionary("topic", add_unk=False)
    tars.add_and_switch_to_new_task("new topics", topics, label_type="topic")
    before = accuracy(tars, others)
    train(tars, few, epochs=5, learning_rate=arguments.learning_rate)
    tars.save(arguments.output)

    loaded = TARSClassifier.load(arguments.output)
    print(f"topics that it was not trained on: {', '.join(sorted(topics.get_items()))}")
    print(f"accuracy without an example: {before:.3f}")
    print(f"accuracy after {arguments.shots} examples of each: {accuracy(loaded, others):.3f}")


if __name__ == "__main__":
    main()
