"""Plugins for Flair's trainer: rank allocation of AdaLoRA and AdaMSS, LoRA+, and checks of every training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed
from flair.distributed_utils import is_main_process
from flair.nn import Model
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from flair.trainers.plugins.functional.reduce_transformer_vocab import ReduceTransformerVocabPlugin
from peft import PeftConfig, PeftModel
from peft.optimizers import create_loraplus_optimizer

from flair_peft.adapter import methods, refusals, trainable
from flair_peft.base import quantisation
from flair_peft.embeddings import head_dtype
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import TrainingSetupError, name_some
from flair_peft.models import save
from flair_peft.training import rates, start_line

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
        forward_loss, own = self.model.forward_loss, vars(self.model).get("forward_loss")

        def with_others(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
            loss, count = forward_loss(*args, **kwargs)
            for other in self._losses():
                loss = loss + (count * (other - other.detach())).to(loss.device)
            return loss, count

        self.model.forward_loss = with_others
        try:
            yield
        finally:
            del self.model.forward_loss
            if own is not None:
                self.model.forward_loss = own

    def _losses(self) -> Iterator[torch.Tensor]:
        for model in _peft_models(self.model):
            with torch.autocast(model.device.type, enabled=False):
                yield from _own_losses(model)

    def _configs(self) -> list[PeftConfig]:
        return [model.peft_config[methods.ADAPTER_NAME] for model in _peft_models(self.model)]


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
        for model, config in zip(_peft_models(self.model), self._configs(), strict=True):
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
        for model, config in zip(_peft_models(self.model), self._configs(), strict=True):
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
    before schedulers are built on it. Parameters outside the adapter keep the learning rates they had.

    Args:
        loraplus_lr_ratio: learning rate of lora_B divided by that of lora_A; the paper suggests 16.
        loraplus_weight_decay: weight decay of the adapter; ``None`` keeps that of the optimiser.
    """

    def __init__(self, loraplus_lr_ratio: float = 16.0, loraplus_weight_decay: float | None = None) -> None:
        super().__init__()
        self.loraplus_lr_ratio = loraplus_lr_ratio
        self.loraplus_weight_decay = loraplus_weight_decay

    @TrainerPlugin.hook("after_setup")
    def split_learning_rates(self, **_: Any) -> None:
        """Give lora_A and lora_B parameter groups of their own, in place of the ones they were in."""
        optimizer = self.trainer.optimizer
        if not any("lora_B" in name and p.requires_grad for name, p in self.model.named_parameters()):
            _say_idle(self)
        for peft_model in _peft_models(self.model):
            adapter = {id(p) for p in trainable.parameters(peft_model).values()}
            groups = [g for g in optimizer.param_groups if any(id(p) in adapter for p in g["params"])]
            if not groups:
                continue  # the adapter is frozen
            group = groups[0]
            settings = {key: value for key, value in group.items() if key not in ("params", "initial_lr")}
            decay = self.loraplus_weight_decay
            loraplus = create_loraplus_optimizer(
                model=peft_model,
                optimizer_cls=type(optimizer),
                lr=settings.pop("lr"),
                loraplus_lr_ratio=self.loraplus_lr_ratio,
                loraplus_weight_decay=settings.pop("weight_decay", 0.0) if decay is None else decay,
            )
            for existing in optimizer.param_groups:
                existing["params"] = [p for p in existing["params"] if id(p) not in adapter]
            for new in loraplus.param_groups:
                if new["params"]:
                    optimizer.add_param_group({**settings, **{k: new[k] for k in ("params", "lr", "weight_decay")}})


class AdapterGuard(TrainerPlugin):
    """Checks at the start of a training what would otherwise show only at its end: dtypes, rates, gradients.

    Args:
        chosen_rates: learning rates that nobody gave, by Flair's names.
        is_head_rate_zero: whether 0 was asked for.
    """

    def __init__(self, chosen_rates: Mapping[str, float], *, is_head_rate_zero: bool) -> None:
        super().__init__()
        self._chosen_rates, self._is_head_rate_zero = chosen_rates, is_head_rate_zero
        self._has_said = self._has_seen_gradients = False

    @TrainerPlugin.hook("after_setup")
    def check_dtypes(self, **_: Any) -> None:
        """Raise if the head could not consume the embeddings."""
        head_dtype.check_head(self.model)

    @TrainerPlugin.hook("after_setup")
    def check_storable(self, **_: Any) -> None:
        """Raise if the model holds what no file can hold: not after the last epoch."""
        save.check_storable(self.model)

    @TrainerPlugin.hook("after_setup")
    def check_effect(self, **_: Any) -> None:
        """Say if the adapter is multiplied with zero."""
        for peft_model in _peft_models(self.model) if is_main_process() else ():
            trainable.report_without_effect(peft_model)

    @TrainerPlugin.hook("before_training_epoch")
    def say_what_is_trained(self, epoch: int, **_: Any) -> None:
        """Say what learns at which rate, and, where a training starts anew, which rates are far from good.

        By then, one that goes on has the rates that it had.
        """
        if self._has_said or not is_main_process():
            return
        self._has_said = True
        start_line.say(self.model, self.trainer.optimizer, self._chosen_rates)
        if epoch == 1:
            rates.report_far_ones(self.model, self.trainer.optimizer, is_head_rate_zero=self._is_head_rate_zero)

    @TrainerPlugin.hook("after_evaluation")
    def note_scores(self, epoch: int, validation_scores: tuple[float, ...], **_: Any) -> None:
        """Keep the scores of the epoch where files hold them: in the model card."""
        names = ("dev score", "dev loss") if len(validation_scores) > 1 else ("train loss",)
        scores = {name: float(value) for name, value in zip(names, validation_scores, strict=False)}
        self.model.model_card["scores"] = {"epoch": epoch, **scores}

    @TrainerPlugin.hook("after_training")
    def note_test_score(self, **_: Any) -> None:
        """Keep the score on the test data, if there were any."""
        if self.trainer.corpus.test and "test_score" in self.trainer.return_values:
            score = float(self.trainer.return_values["test_score"])
            self.model.model_card.setdefault("scores", {})["test score"] = score

    @TrainerPlugin.hook("before_training_optimizer_step")
    def check_gradients(self, **_: Any) -> None:
        """Report, at the first step with gradients, adapters that learn nothing and methods that miss their plugin."""
        # A batch may hold nothing to learn from, such as no pair of entities.
        if self._has_seen_gradients or all(parameter.grad is None for parameter in self.model.parameters()):
            return
        self._has_seen_gradients = True
        if not is_main_process():
            return
        for peft_model in _peft_models(self.model):
            self._report_missing_plugin(peft_model)
            self._report_missing_gradients(peft_model)

    def _report_missing_plugin(self, peft_model: PeftModel) -> None:
        config = peft_model.peft_config[methods.ADAPTER_NAME]
        has_plugin = any(isinstance(plugin, RankAllocationPlugin) for plugin in self.trainer.plugins)
        if methods.needs_step_hook(config) and not has_plugin:
            log.warning(
                "%s is trained without RankAllocationPlugin, so its ranks will not change: it has to be told of every "
                "step. Pass plugins=[flair_peft.RankAllocationPlugin()] to the trainer.",
                methods.method_name(config),
            )
        with torch.no_grad():
            has_losses = any(bool(loss.any()) for loss in _own_losses(peft_model))
        adding = [plugin for plugin in self.trainer.plugins if isinstance(plugin, AuxiliaryLossPlugin)]
        if has_losses and all(isinstance(plugin, RankAllocationPlugin) for plugin in adding):
            log.warning(
                "The loss of %s in the config of '%s' is not part of this training: PEFT leaves it to the training "
                "loop. Pass plugins=[flair_peft.AuxiliaryLossPlugin()] to the trainer, or weights of 0 in the config.",
                name_some(methods.own_losses(config)),
                peft_model.get_base_model().name_or_path,
            )

    def _report_missing_gradients(self, peft_model: PeftModel) -> None:
        parameters = trainable.parameters(peft_model)
        without = [name for name, p in parameters.items() if p.grad is None and ".pooler." not in f".{name}"]
        if parameters and len(without) == len(parameters):
            log.warning(
                "The adapter learns nothing: none of its %s parameters received a gradient in the first step. With "
                "fine_tune=False Flair embeds without gradient; pass fine_tune=True.",
                len(parameters),
            )
        elif without:
            log.warning("These adapter parameters received no gradient in the first step: %s.", name_some(without))


def _say_idle(plugin: TrainerPlugin) -> None:
    if not is_main_process():
        return
    configs = [model.peft_config[methods.ADAPTER_NAME] for model in _peft_models(plugin.trainer.model)]
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
            if plugin.pluggable is not None:
                plugin.detach()


def check_training(model: Model, settings: Mapping[str, Any], *, optimizer: Any) -> None:
    """Return if Flair can train this model, which is in training mode, with these settings of ``train_custom``.

    Raises:
        TrainingSetupError: weights of the base itself train in float16, with an optimiser that divides by squares of
            gradients: most of these are 0 there, and the weights would be NaN after the first steps.
        TrainingSetupError: the vocabulary is to be reduced. A checkpoint written in the middle would hold the reduced
            matrix, and a frozen one has neither gradient nor optimiser state that reducing it could save.
        AdapterConfigError: the base is quantised in a way that no file can say, so no checkpoint could be written.
    """
    for embeddings in adapted_embeddings(model):
        refusals.refuse_unstorable(embeddings.model)
        quantisation.check_storable(embeddings.base_model, embeddings.name)
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    if narrow and not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.SGD)):
        raise TrainingSetupError(
            f"Cannot train {name_some(narrow)} in float16, the dtype of the base that they belong to. That holds "
            "no squares of small gradients, by which optimisers such as Adam divide, and the weights would become NaN. "
            "Load the base in bfloat16 or float32, or call model.float() before the training."
        )
    adapted = [embeddings.name for embeddings in adapted_embeddings(model)]
    is_given = any(isinstance(plugin, ReduceTransformerVocabPlugin) for plugin in settings.get("plugins") or ())
    if adapted and (is_given or settings.get("reduce_transformer_vocab")):
        raise TrainingSetupError(
            f"Cannot reduce the vocabulary of {name_some(adapted)}. The embedding matrix of a base with an adapter is "
            "frozen: it has no gradient and no optimiser state that a smaller one would save, and checkpoints written "
            "during the training would hold the reduced matrix. Leave out reduce_transformer_vocab=True, or "
            "ReduceTransformerVocabPlugin."
        )


def _own_losses(model: PeftModel) -> list[torch.Tensor]:
    """Return the losses of the method's own that PEFT leaves to the training loop, each without dimensions."""
    named = methods.own_losses(model.peft_config[methods.ADAPTER_NAME])
    losses = [getattr(model.base_model, method)() for method in named.values()]
    return [loss for loss in losses if isinstance(loss, torch.Tensor)]


def _peft_models(model: torch.nn.Module) -> list[PeftModel]:
    return [embeddings.model for embeddings in adapted_embeddings(model)]
