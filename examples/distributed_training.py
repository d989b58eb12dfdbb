"""Train a sentiment classifier with LoRA in several processes, on GPUs or CPUs, on one machine or more.

    torchrun --nproc-per-node 2 examples/distributed_training.py --output out
    accelerate launch --multi_gpu --num_processes 2 examples/distributed_training.py --output out
    python examples/distributed_training.py --output out                                          # in one process

On two machines, with the output in a folder that both reach:

    torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST:29500 \
        examples/distributed_training.py --output /shared/out

Needs no network: the tiny encoder and the corpus are part of the repository. Whatever the number of processes, a step
takes ``--batch-size`` sentences, so that the result is the same up to the order of sentences and rounding.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import flair
import torch.distributed
from flair.datasets import ClassificationCorpus
from flair.models import TextClassifier
from flair.trainers import ModelTrainer
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings

RESOURCES = Path(__file__).resolve().parent.parent / "resources"


def train(output: Path, *, batch_size: int, epochs: int, is_distributed: bool) -> float:
    """Train a classifier and save the best one in ``output``; its accuracy on the test sentences."""
    processes = torch.distributed.get_world_size() if is_distributed else 1
    if batch_size % processes:
        raise SystemExit(f"--batch-size {batch_size} cannot be shared out to {processes} processes evenly.")
    corpus = ClassificationCorpus(
        RESOURCES / "corpora" / "sentiment",
        label_type="sentiment",
        train_file="train.txt",
        dev_file="dev.txt",
        test_file="test.txt",
    )
    lora = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    model = TextClassifier(
        PeftTransformerDocumentEmbeddings(str(RESOURCES / "tiny-encoder"), peft_config=lora),
        label_type="sentiment",
        label_dictionary=corpus.make_label_dictionary("sentiment"),
    )
    result = ModelTrainer(model, corpus).fine_tune(
        output,
        learning_rate=3e-3,
        decoder_learning_rate=1e-2,
        mini_batch_size=batch_size // processes,  # Flair counts those of one process
        max_epochs=epochs,
        use_final_model_for_eval=False,
        multi_gpu=is_distributed,
    )
    return float(result["test_score"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with LoRA in Flair, in several processes.")
    parser.add_argument("--output", type=Path, required=True, help="folder for models and logs")
    parser.add_argument("--batch-size", type=int, default=8, help="sentences in a step, of all processes together")
    parser.add_argument("--epochs", type=int, default=5)
    arguments = parser.parse_args()
    flair.set_seed(1)
    with flair_peft.join_processes() as is_distributed:
        score = train(
            arguments.output,
            batch_size=arguments.batch_size,
            epochs=arguments.epochs,
            is_distributed=is_distributed,
        )
        if not is_distributed or torch.distributed.get_rank() == 0:
            print(f"accuracy on the test sentences: {score:.3f}")


if __name__ == "__main__":
    main()
