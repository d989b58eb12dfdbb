"""Predict the labels of a corpus that is larger than memory with Ray Data, on one machine or a cluster.

    pip install "ray[data]"
    python examples/ray_prediction.py best-model.pt texts/ labels/ --workers 2

Input, output and restarts are those of ``distributed_prediction.py``. Ray hands a shard to whichever worker is free,
and gives it to another one if a worker dies. On a cluster, all machines have to reach the model and both folders.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import ray
from distributed_prediction import missing_shards, open_job, predict_shard
from flair.nn import Classifier

import flair_peft  # noqa: F401 - checkpoint directories load with it


class ShardPredictor:
    """A worker of Ray: loads the model once, and then predicts one shard after another."""

    def __init__(self, model: str, mini_batch_size: int) -> None:
        logging.getLogger("flair").setLevel(logging.ERROR)
        self.model = Classifier.load(model)
        self.mini_batch_size = mini_batch_size

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write the labels of a shard; its name and the number of its texts."""
        shard, output = Path(row["shard"]), Path(row["output"])
        count = predict_shard(self.model, shard, output, mini_batch_size=self.mini_batch_size)
        return {"shard": shard.name, "texts": count}


def main() -> None:
    parser = argparse.ArgumentParser(description="Predict a corpus with Ray Data.")
    parser.add_argument("model", type=Path, help="a .pt file or a checkpoint directory")
    parser.add_argument("texts", type=Path, help="folder of *.txt")
    parser.add_argument("labels", type=Path, help="folder for *.jsonl")
    parser.add_argument("--mini-batch-size", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    arguments = parser.parse_args()

    open_job(arguments.labels, arguments.model)
    missing = missing_shards(arguments.texts, arguments.labels)
    if not missing:
        return
    # Workers import this folder too. One that dies is replaced, and its shard is done again.
    ray.init(runtime_env={"working_dir": str(Path(__file__).resolve().parent)}, log_to_driver=False)
    rows = [{"shard": str(shard.resolve()), "output": str(output.resolve())} for shard, output in missing]
    done = (
        ray.data.from_items(rows, override_num_blocks=len(rows))
        .map(
            ShardPredictor,
            fn_constructor_args=(str(arguments.model.resolve()), arguments.mini_batch_size),
            compute=ray.data.ActorPoolStrategy(size=min(arguments.workers, len(rows))),
            num_gpus=arguments.gpus,
        )
        .iter_rows()
    )
    for row in done:
        print(f"{row['shard']}: {row['texts']} texts", flush=True)


if __name__ == "__main__":
    main()
