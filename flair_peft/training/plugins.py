"""Plugins for Flair's trainer: rank allocation of AdaLoRA and AdaMSS, losses that PEFT leaves to it, and LoRA+."""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from flair.distributed_utils import is_main_process
from flair.nn import Model
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from flair.trainers.plugins.loggers.log_file import LogFilePlugin
from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer

from flair_peft.adapter import methods, trainable
from flair_peft.embeddings.peft_transformer import adapted_embeddings

log = logging.getLogger("flair_peft")


class AuxiliaryLossPlugin(TrainerPlugin):
    """Trains with the losses of KaSA and MonteCLoRA, which PEFT leaves to the training loop, beside Flair's.

    These are those of ``KasaConfig(beta=…, gamma=…)`` (Wang et al. 2024, https://arxiv.org/abs/2412.06071) and of
    ``MontecloraConfig(kl_loss_weight=…, use_entropy=…)``, as PEFT computes them. They weigh as much beside the loss of
    each sentence (of each word, in a tagger) as they would beside a mean: Flair's loss is a sum. What Flair reports is
    its own.

    Example:
        ``ModelTrainer(model, corpus).fine_tune("out", plugins=[AuxiliaryLossPlugin()])``
    """

    @TrainerPlugin.hook("after_setup")
    def add_losses(self, **_: Any) -> None:
        """Let the loss of each batch have the gradient of the others until the training is over."""
        self._report_idle()
        self.trainer.context_stack.enter_context(self._adding())

    def _report_idle(self) -> None:
        if not any(methods.own_losses(config) for config in self._configs()):
            _say_idle(self)

    @contextmanager
    def _adding(self) -> Iterator[None]:
        """Inside, the loss of each batch has the gradient of the other losses, too, and its value as it was.

        What is done to the loss is done to these then: Flair scales it, and gradients are unscaled only after
        the last hook before the optimiser's step.
        """
        trained, own = [self.model], vars(self.model).get("forward_loss")

        def with_others(model: Model, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
            forward_loss = own or functools.partial(type(model).forward_loss, model)
            loss, count = forward_loss(*args, **kwargs)
            for other in self._losses() if model in trained else ():
                loss = loss + (count * (other - other.detach())).to(loss.device)
            return loss, count

        # A method: a copy of the model has its own, which computes with the copy.
        self.model.forward_loss = types.MethodType(with_others, self.model)
        try:
            yield
        finally:
            del trained.pop().forward_loss
            if own is not None:
                self.model.forward_loss = own

    def _losses(self) -> Iterator[torch.Tensor]:
        for model in peft_models(self.model):
            with torch.autocast(model.device.type, enabled=False):
                yield from own_losses(model)

    def _configs(self) -> list[PeftConfig]:
        return [model.peft_config[methods.ADAPTER_NAME] for model in peft_models(self.model)]


class RankAllocationPlugin(AuxiliaryLossPlugin):
    """Moves the rank budget of AdaLoRA, or of AdaMSS with ``use_asa=True``, after each optimiser step.

    Without it the ranks never change: these methods learn of gradients only through ``update_and_allocate``
    (Zhang et al. 2023, https://arxiv.org/abs/2303.10512). It also adds the gradient of AdaLoRA's orthogonality penalty,
    ``orth_reg_weight`` times the mean Frobenius norm of PᵀP − I, which PEFT adds to a loss that Flair does not compute,
    as :class:`AuxiliaryLossPlugin` does with others. Steps that ``use_amp=True`` skips do not count.

    ``AdaLoraConfig(total_step=…)`` must be the number of optimiser steps of the whole training, batches × epochs.

    Example:
        ``ModelTrainer(model, corpus).fine_tune("out", plugins=[RankAllocationPlugin()])``
    """

    def __init__(self) -> None:
        super().__init__()
        self._step = 0

    @TrainerPlugin.hook("after_setup")
    def compare_schedule(
        self,
        dataset_size: int,
        mini_batch_size: int,
        max_epochs: int,
        epoch: int = 0,
        multi_gpu: bool = False,
        **_: Any,
    ) -> None:
        """Start counting steps, and say if the schedule of the config is not that of the training."""
        self._step = 0
        processes = torch.distributed.get_world_size() if multi_gpu else 1
        steps_of_epoch = -(-dataset_size // (mini_batch_size * processes))
        steps = steps_of_epoch * max_epochs
        those_left = steps_of_epoch * (max_epochs - epoch)
        for config in self._configs():
            planned = getattr(config, "total_step", steps)
            if planned not in (steps, those_left):
                log.warning(
                    "%s plans for total_step=%s optimiser steps, but this training has %s. Its rank budget will follow "
                    "the plan. Pass total_step=%s.",
                    methods.method_name(config),
                    planned,
                    steps,
                    steps,
                )

    def _losses(self) -> Iterator[torch.Tensor]:
        for model, config in zip(peft_models(self.model), self._configs(), strict=True):
            weight = getattr(config, "orth_reg_weight", 0.0)
            with torch.autocast(model.device.type, enabled=False):
                factors = [
                    p @ p.T if "lora_A" in name else p.T @ p
                    for name, p in model.named_parameters()
                    if p.requires_grad and ("lora_A" in name or "lora_B" in name)
                ]
                if weight and factors:
                    distances = [torch.norm(f - torch.eye(len(f), dtype=f.dtype, device=f.device)) for f in factors]
                    yield weight * torch.stack([distance.to(model.device) for distance in distances]).mean()

    @TrainerPlugin.hook("after_training_batch")
    def update_budget(self, optimizer_was_run: bool = True, **_: Any) -> None:
        """Rank the singular values by importance and mask those beyond the budget."""
        if not optimizer_was_run:
            return  # gradients that were scaled too high are infinite, and would be so in the mean for ever
        self._step += 1
        for model, config in zip(peft_models(self.model), self._configs(), strict=True):
            if methods.needs_step_hook(config):
                for parameter in trainable.parameters(model).values():
                    if parameter.grad is None:  # of a layer that Flair does not read, such as the pooler
                        parameter.grad = torch.zeros_like(parameter)
                model.base_model.update_and_allocate(self._step)

    def _report_idle(self) -> None:
        if not any(map(methods.needs_step_hook, self._configs())):
            _say_idle(self)


class LoraPlusPlugin(TrainerPlugin):
    """Trains lora_B with a higher learning rate than lora_A (Hayou et al. 2024, https://arxiv.org/abs/2402.12354).

    Regroups the parameters of the optimiser that Flair made, by :func:`peft.optimizers.create_loraplus_optimizer`,
    before schedulers are built on it. Parameters outside the adapter keep the learning rates they had. What else is
    trained in the transformer and has one dimension, such as norms, has the rate of lora_B, as PEFT groups it.

    Args:
        loraplus_lr_ratio: learning rate of lora_B divided by that of lora_A; the paper suggests 16.
        loraplus_weight_decay: weight decay of the adapter; ``None`` keeps that of the optimiser.
        loraplus_lr_embedding: learning rate of LoRA on embedding matrices; ``None`` takes that of lora_A. PEFT's own,
            1e-6, learns nothing in a short training.
    """

    def __init__(
        self,
        loraplus_lr_ratio: float = 16.0,
        loraplus_weight_decay: float | None = None,
        loraplus_lr_embedding: float | None = None,
    ) -> None:
        super().__init__()
        self.loraplus_lr_embedding = loraplus_lr_embedding
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.loraplus_weight_decay = loraplus_weight_decay

    @TrainerPlugin.hook("after_setup")
    def split_learning_rates(self, **_: Any) -> None:
        """Give lora_A and lora_B parameter groups of their own, in place of the ones they were in."""
        optimizer = self.trainer.optimizer
        if not any("lora_B" in name and p.requires_grad for name, p in self.model.named_parameters()):
            _say_idle(self)
        for peft_model in peft_models(self.model):
            adapter = {id(p) for p in trainable.parameters(peft_model).values()}
            groups = [g for g in optimizer.param_groups if any(id(p) in adapter for p in g["params"])]
            if not groups:
                continue  # the adapter is frozen
            group = groups[0]
            settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
            decay, rate = self.loraplus_weight_decay, settings.pop("lr")
            loraplus = create_loraplus_optimizer(
                model=peft_model,
                optimizer_cls=torch.optim.AdamW,  # for its groups, which are all that is taken
                lr=rate,
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_lr_embedding=rate if self.loraplus_lr_embedding is None else self.loraplus_lr_embedding,
                loraplus_weight_decay=settings.pop("weight_decay", 0.0) if decay is None else decay,
            )
            for existing in optimizer.param_groups:
                existing["params"] = [p for p in existing["params"] if id(p) not in adapter]
            for new in loraplus.param_groups:
                if new["params"]:
                    optimizer.add_param_group({**settings, **{k: new[k] for k in ("params", "lr", "weight_decay")}})


def _say_idle(plugin: TrainerPlugin) -> None:
    if not is_main_process():
        return
    configs = [model.peft_config[methods.ADAPTER_NAME] for model in peft_models(plugin.trainer.model)]
    log.warning(
        "%s has nothing to do in this training: it is not for %s. Leave it out.",
        type(plugin).__name__,
        " and ".join(map(methods.describe, configs)) or "a model without adapter",
    )


def detach_known(trainer: ModelTrainer) -> None:
    """Take the plugins of this package and of Flair off a trainer whose training is over: the next has its own.

    Flair leaves all of them, and a scheduler of one training does not know the parameter groups of another.
    """
    for plugin in list(trainer.plugins):
        if type(plugin).__module__.partition(".")[0] in ("flair", "flair_peft"):
            trainer.plugins.remove(plugin)
            if isinstance(plugin, LogFilePlugin):
                plugin.close_file_handler()  # which Flair leaves open where a training fails before its first epoch
            if plugin.pluggable is not None:
                plugin.detach()


def own_losses(model: PeftModel) -> list[torch.Tensor]:
    """Return the losses of the method's own that PEFT leaves to the training loop, each without dimensions."""
    named = methods.own_losses(model.peft_config[methods.ADAPTER_NAME])
    losses = [getattr(model.base_model, method)() for method in named.values()]
    return [loss for loss in losses if isinstance(loss, torch.Tensor)]


def peft_models(model: torch.nn.Module) -> list[PeftModel]:
    """Return the transformers of a model that have adapters."""
    return [embeddings.model for embeddings in adapted_embeddings(model)]
