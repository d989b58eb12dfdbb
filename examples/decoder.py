"""Train a sentiment classifier with LoRA on a language model: a decoder such as Qwen or Llama.

    python examples/decoder.py
    python examples/decoder.py --model Qwen/Qwen2.5-0.5B --dtype bfloat16 --learning-rate 2e-4

A decoder reads from left to right, so that the last token is the one that has read the whole sentence: with
``cls_pooling="cls"``, Flair takes its vector. ``--model`` is a name or folder of any decoder that transformers knows.
Without it, and without a network, the script makes a small Qwen2 with random weights. It knows no language, so it shows
that all parts work together, and not what a language model is worth.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import flair
import torch
from flair.data import Sentence
from flair.datasets import ClassificationCorpus
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from peft import LoraConfig
from tokenizers import ByteLevelBPETokenizer
from transformers import Qwen2Config, Qwen2Model, Qwen2TokenizerFast

from flair_peft import PeftTransformerDocumentEmbeddings

RESOURCES = Path(__file__).resolve().parent.parent / "resources"
CORPUS = RESOURCES / "corpora" / "sentiment"


def make_decoder(folder: Path) -> str:
    """Write a random Qwen2 of 0.4 million parameters, with a tokenizer of the training sentences, into the folder."""
    bpe = ByteLevelBPETokenizer()
    bpe.train([str(CORPUS / "train.txt")], vocab_size=1500, special_tokens=["<|endoftext|>"], show_progress=False)
    bpe.save_model(str(folder))
    tokenizer = Qwen2TokenizerFast(
        vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"), model_max_length=256
    )
    tokenizer.save_pretrained(folder)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(1)
    Qwen2Model(config).save_pretrained(folder)
    return str(folder)


def train(model: str, output: Path, *, dtype: str | None, rank: int, epochs: int, learning_rate: float) -> None:
    """Train a classifier on the decoder and save it in ``output``."""
    corpus = ClassificationCorpus(
        CORPUS, label_type="sentiment", train_file="train.txt", dev_file="dev.txt", test_file="test.txt"
    )
    embeddings = PeftTransformerDocumentEmbeddings(
        model,
        peft_config=LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"),
        dtype=dtype,
        cls_pooling="cls",
    )
    classifier = TextClassifier(
        embeddings,
        label_type="sentiment",
        label_dictionary=corpus.make_label_dictionary("sentiment", add_unk=False),
    )
    ModelTrainer(classifier, corpus).fine_tune(
        output, learning_rate=learning_rate, decoder_learning_rate=1e-2, mini_batch_size=16, max_epochs=epochs
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with LoRA on a decoder in Flair.")
    parser.add_argument("--model", help="name or folder of a decoder; without it, a small random one is made")
    parser.add_argument("--output", type=Path, default=Path("decoder-model"), help="folder for the model and logs")
    parser.add_argument("--dtype", help="of the decoder's weights, such as bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    arguments = parser.parse_args()

    flair.set_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        train(
            arguments.model or make_decoder(Path(folder)),
            arguments.output,
            dtype=arguments.dtype,
            rank=arguments.rank,
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
        )
        loaded = TextClassifier.load(arguments.output / "final-model.pt")
    for text in ("The soup was cold and the waiter was rude.", "Not a dull moment: the show made us smile."):
        sentence = Sentence(text)
        loaded.predict(sentence)
        print(f"{sentence.tag} ({sentence.score:.3f}): {text}")


if __name__ == "__main__":
    main()
