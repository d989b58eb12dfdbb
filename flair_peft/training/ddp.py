"""Training in several processes by torch's DistributedDataParallel: what they check, and what is sent.

Flair's trainer wraps the model in torch's DistributedDataParallel, takes the sum of all gradients for the gradient of
the batch, and lets every process evaluate. Here the base stays where it is, each process having read it itself.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from flair.data import Sentence
from flair.distributed_utils import aggregate, is_main_process
from flair.nn import Model
from flair.nn.decoder import DeepNCMDecoder
from flair.trainers import ModelTrainer
from flair.trainers.plugins import LinearSchedulerPlugin
from flair.trainers.plugins.base import TrainerPlugin
from torch.nn.parallel import DistributedDataParallel

from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import TrainingSetupError
from flair_peft.primitives import host_internals

log = logging.getLogger("flair_peft")

T = TypeVar("T")


def agree(value: T) -> T:
    """Return what the main process says; all processes of a training have to ask.

    Args:
        value: anything that can be pickled; that of the other processes does not matter.
    """
    if not torch.distributed.is_initialized():
        return value
    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]


def is_parallel(settings: Mapping[str, Any]) -> bool:
    """Whether these settings of ``ModelTrainer.train_custom`` are those of a training in a group of processes."""
    return bool(settings.get("multi_gpu")) and torch.distributed.is_initialized()


def prepare(model: Model, settings: Mapping[str, Any]) -> None:
    """Make equal in all processes what Flair takes for equal; does nothing in a training of one process.

    Best models of earlier trainings are deleted by the main process alone. Python's random numbers are those of the
    main process, from which Flair draws the sentences by which it compares the corpora.

    Raises:
        TrainingSetupError: the model learns by other means than gradients, which are all that travels.
    """
    if not is_parallel(settings):
        return
    if any(isinstance(module, DeepNCMDecoder) for module in model.modules()):
        raise TrainingSetupError(
            "Cannot train a DeepNCMDecoder in several processes. Each would move its prototypes by the sentences that "
            "it sees itself, without a gradient, and only gradients travel. Train in one process."
        )
    if settings.get("sampler") is not None and is_main_process():
        log.warning("Flair ignores the sampler: with multi_gpu=True it takes torch's DistributedSampler.")
    random.setstate(agree(random.getstate()))
    directory = Path(settings["base_path"])
    if is_main_process() and not settings.get("epoch") and directory.is_dir():
        ModelTrainer.check_for_and_delete_previous_best_models(directory)
    torch.distributed.barrier()


def wrap(model: Model, *, device_ids: object = None, **options: Any) -> DistributedDataParallel:
    """Return the model as Flair's trainer calls it: on a list of sentences, for the loss and the number of data points.

    Gradients of what is trained travel, and nothing else: no weights of the base, which each process has read from the
    same source, and no buffers after the first time, unless a head has some.

    Args:
        model: on the device of this process. What is trained and shares storage with other models gets its own.
        device_ids: is not used. Sentences are no tensors to be moved, and on a CPU Flair gives ``[None]``, which torch
            does not take.
        **options: as for :class:`torch.nn.parallel.DistributedDataParallel`.

    Raises:
        TrainingSetupError: the base is not the same in every process.
    """
    compare_bases(model)
    step = TrainingStep(model)
    # At construction, what is synchronised would be written to storage that other models share.
    host_internals.leave_out_of_synchronisation_(step, _read_from_source(step))
    wrapped = DistributedDataParallel(step, **options)
    wrapped.broadcast_buffers = any(True for _ in _buffers_of_heads(model))
    return wrapped


class TrainingStep(torch.nn.Module):
    """A model from whose loss one can always go back to all that is trained."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, sentences: list[Sentence]) -> tuple[torch.Tensor, int]:
        """Return the summed loss of the sentences, a scalar, and the number of data points.

        Flair's loss of a batch without labels depends on no parameter: this process would send no gradient, and the
        others would wait for it.
        """
        loss, count = self.model(sentences)
        if loss.grad_fn is None:
            loss = loss + sum(0.0 * p.sum() for p in self.model.parameters() if p.requires_grad)
        return loss, count


def compare_bases(model: Model) -> None:
    """Return if all processes read the same bases.

    Raises:
        TrainingSetupError: the fingerprints differ.
    """
    found = [embeddings.base_source.fingerprint for embeddings in adapted_embeddings(model)]
    everywhere: list[list[str | None]] = aggregate(found, list)
    if any(those != found for those in everywhere):
        different = [str(number) for number, those in enumerate(everywhere) if those != everywhere[0]]
        raise TrainingSetupError(
            f"Cannot train in several processes: processes {', '.join(different)} read another base model than process "
            f"0. Only adapter and head are sent, so that each would train on a base of its own. Give all machines the "
            f"same files or the same revision of {', '.join(e.base_model_name for e in adapted_embeddings(model))}."
        )


class GlobalSchedule(TrainerPlugin):
    """Gives Flair's linear schedule the number of steps that one process with the batches of all would count.

    Flair rounds the steps of an epoch up by the batch of one process and divides by their number afterwards.
    """

    @TrainerPlugin.hook("after_setup")
    def count_steps(self, dataset_size: int, mini_batch_size: int, **settings: Any) -> None:
        """Set up the schedule again; has to come behind the plugin that keeps it."""
        others = torch.distributed.get_world_size() - 1
        for plugin in self.trainer.plugins:
            if isinstance(plugin, LinearSchedulerPlugin):
                size = dataset_size + others * mini_batch_size
                plugin.after_setup(dataset_size=size, mini_batch_size=mini_batch_size, **settings)


def _read_from_source(step: torch.nn.Module) -> Iterator[str]:
    """Yield the names of parameters that hold what was read from the source."""
    found = {
        id(p) for embeddings in adapted_embeddings(step) for p in embeddings.base_source.unchanged(embeddings.model)
    }
    for name, parameter in step.named_parameters(remove_duplicate=False):
        if id(parameter) in found:
            yield name


def _buffers_of_heads(model: Model) -> Iterator[torch.Tensor]:
    inside = {id(buffer) for embeddings in adapted_embeddings(model) for buffer in embeddings.buffers()}
    return (buffer for buffer in model.buffers() if id(buffer) not in inside)
