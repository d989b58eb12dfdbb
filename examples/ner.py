"""Train a tagger of names with LoRA, save it as a directory, load it, and tag the lines of a text.

    python examples/ner.py
    python examples/ner.py --model xlm-roberta-base --dtype bfloat16 --data my-corpus --text my-text.txt

``--data`` is a folder of train.txt, dev.txt and test.txt with a word and its tag on each line. Without it, and without
a network, the script runs on the corpus and the tiny encoder of this repository, in under a minute.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable
from pathlib import Path

import flair
from flair.datasets import ColumnCorpus
from flair.models import SequenceTagger
from flair.trainers import ModelTrainer
from peft import LoraConfig

from flair_peft import PeftTransformerWordEmbeddings, predict_stream, save_pretrained

RESOURCES = Path(__file__).resolve().parent.parent / "resources"
LINES = ("Mr Chad moved from Lake Kyoto to Washington.", "Shares of Jordan rose in March.")


def train(model: str, data: Path, *, dtype: str | None, rank: int, epochs: int, learning_rate: float) -> SequenceTagger:
    """Return a trained tagger; Flair's log says how well it does."""
    corpus = ColumnCorpus(
        data,
        column_format={0: "text", 1: "ner"},
        train_file="train.txt",
        dev_file="dev.txt",
        test_file="test.txt",
    )
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    tagger = SequenceTagger(
        PeftTransformerWordEmbeddings(model, peft_config=lora, dtype=dtype),
        tag_dictionary=corpus.make_label_dictionary("ner", add_unk=False),
        tag_type="ner",
        use_rnn=False,
        use_crf=False,
        reproject_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        ModelTrainer(tagger, corpus).fine_tune(
            folder,
            learning_rate=learning_rate,
            decoder_learning_rate=1e-2,
            mini_batch_size=16,
            max_epochs=epochs,
            save_final_model=False,
        )
    return tagger


def tag(tagger: SequenceTagger, lines: Iterable[str]) -> None:
    """Print the names in each line; of any number of lines, few are in memory at a time."""
    for sentence in predict_stream(tagger, lines):
        names = ", ".join(f"{span.text} ({span.tag})" for span in sentence.get_spans("ner"))
        print(f"{sentence.text}  →  {names or 'no names'}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tagger of names with LoRA in Flair.")
    parser.add_argument("--model", default=str(RESOURCES / "tiny-encoder"), help="name or folder of a transformer")
    parser.add_argument("--data", type=Path, default=RESOURCES / "corpora" / "ner", help="folder of three splits")
    parser.add_argument("--text", type=Path, help="file of lines to tag")
    parser.add_argument("--output", type=Path, default=Path("ner-model"), help="directory for the tagger")
    parser.add_argument("--dtype", help="of the base, such as bfloat16")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()

    flair.set_seed(1)
    tagger = train(
        arguments.model,
        arguments.data,
        dtype=arguments.dtype,
        rank=arguments.rank,
        epochs=arguments.epochs,
        learning_rate=arguments.learning_rate,
    )
    save_pretrained(tagger, arguments.output)

    loaded = SequenceTagger.load(arguments.output)
    if arguments.text is None:
        tag(loaded, LINES)
    else:
        with arguments.text.open(encoding="utf-8") as lines:
            tag(loaded, lines)


if __name__ == "__main__":
    main()
