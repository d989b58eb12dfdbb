"""Processes that ``torchrun`` or ``accelerate launch`` started become one group for a training."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import flair
import torch.distributed
from accelerate import PartialState
from accelerate.utils import get_int_from_env

from flair_peft.errors import TrainingSetupError
from flair_peft.primitives import devices
from flair_peft.training import ddp, trainer_state

log = logging.getLogger("flair_peft")

# Set by torchrun and accelerate launch; by MPICH, Open MPI and MVAPICH.
_NUMBER_STARTED = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")


@contextmanager
def join_processes() -> Iterator[bool]:
    """Inside, the processes that a launcher started are one group, each with a device of its own as ``flair.device``.

    All begin with the random numbers of the first, so that corpora that are split at random are the same everywhere.
    Without a launcher nothing changes. Processes that are a group already, such as those of
    ``flair.distributed_utils.launch_distributed``, remain it.

    Example:
        ``with flair_peft.join_processes() as is_distributed:``
        ``    …  # corpus, embeddings, model``
        ``    ModelTrainer(model, corpus).fine_tune("out", mini_batch_size=4, multi_gpu=is_distributed)``

        ``torchrun --nproc-per-node 2 train.py`` takes twice as many sentences for a step as ``python train.py``.

    Yields:
        Whether there is a group, which is what the trainer's ``multi_gpu=`` takes.

    Raises:
        TrainingSetupError: a launcher started several processes, but they could not become a group.
    """
    started = get_int_from_env(_NUMBER_STARTED, 1)
    if torch.distributed.is_initialized() or started < 2:
        _report_missing_processes()
        yield torch.distributed.is_initialized()
        return
    state = PartialState(cpu=flair.device.type == "cpu")
    if not torch.distributed.is_initialized():
        raise TrainingSetupError(
            f"Cannot join the {started} processes of the launcher: accelerate has set this one up to "
            "work alone, before or for lack of a backend. Each would train a model of its own. Call join_processes() "
            "once, before anything of accelerate's, and with flair.device as it is to be."
        )
    try:
        # accelerate's name for a CPU is cpu:0, which is not the device of any tensor.
        with devices.computing_on(flair.device if state.device.type == "cpu" else state.device):
            # Those of GPUs belong to all devices of the machine, and a process has one.
            trainer_state.take_random_state(ddp.agree({**trainer_state.random_state(), "cuda": []}))
            yield True
    finally:
        state.destroy_process_group()


def _report_missing_processes() -> None:
    """Say that accelerate started one process where it was asked for several, which shows in one variable alone."""
    names = ("ACCELERATE_USE_CPU", "MASTER_ADDR")
    if not torch.distributed.is_initialized() and all(name in os.environ for name in names):
        log.warning(
            "accelerate launch was asked for several processes and started this one alone: with --cpu it leaves the "
            "others to mpirun. A step takes the sentences of one process. Use torchrun, which starts them on CPUs too."
        )
