"""The trainings of :mod:`tests.support.parallel_training` in processes that Flair's ``launch_distributed`` starts.

Flair starts one process for each GPU and joins them by nccl. Here there are two on a CPU, joined by gloo; the rest is
Flair's. The processes that it starts import this file again.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import flair
import torch
import torch.distributed as dist
from flair import distributed_utils

from tests.support.parallel_training import main


def join(rank: int, world_size: int) -> None:
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=sys.argv[1])
    flair.device = torch.device("cpu")
    dist.init_process_group("gloo", rank=rank, world_size=world_size)


if Path(sys.argv[0]).stem == Path(__file__).stem:
    distributed_utils._ddp_setup = join
    torch.cuda.device_count = lambda: 2


if __name__ == "__main__":
    distributed_utils.launch_distributed(main, sys.argv[2], Path(sys.argv[3]), sys.argv[4:])
