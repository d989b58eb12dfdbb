"""Checks of every training with an adapter: what would otherwise show only at its end, or never."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from flair.distributed_utils import is_main_process
from flair.nn import Model
from flair.trainers.plugins.base import TrainerPlugin
from flair.trainers.plugins.functional.reduce_transformer_vocab import ReduceTransformerVocabPlugin
from peft import PeftModel

from flair_peft.adapter import methods, refusals, trainable
from flair_peft.base import quantisation
from flair_peft.embeddings import head_dtype
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import TrainingSetupError, name_some
from flair_peft.models import save
from flair_peft.training import plugins, rates, start_line
from flair_peft.training.exact_steps import exact_steps

log = logging.getLogger("flair_peft")


def check_training(model: Model, settings: Mapping[str, Any], *, optimizer: Any) -> None:
    """Return if Flair can train this model, which is in training mode, with these settings of ``train_custom``.

    Raises:
        TrainingSetupError: weights of the base train in float16 with an optimiser such as Adam, the vocabulary is to
            be reduced, or a rate is text.
        AdapterConfigError: no file can hold the adapter, or say how the base is quantised.
    """
    for name in rates.NAMES:
        if isinstance(given := settings.get(name), str):
            raise TrainingSetupError(
                f"Cannot train with {name}={given!r}: it is text, as which YAML reads 5e-4. Pass a number; YAML reads "
                "5.0e-4 as one."
            )
    for embeddings in adapted_embeddings(model):
        refusals.refuse_unstorable(embeddings.model)
        quantisation.check_storable(embeddings.base_model, embeddings.name)
    narrow = [name for name, p in model.named_parameters() if p.requires_grad and p.dtype == torch.float16]
    kind = rates.class_of(optimizer)
    if narrow and not (isinstance(kind, type) and issubclass(kind, torch.optim.SGD)):
        raise TrainingSetupError(
            f"Cannot train {name_some(narrow)} in float16, the dtype of the base that they belong to. Small gradients "
            "are 0 in it, and large ones infinite: optimisers such as Adam divide by them, and weights become NaN. "
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


class AdapterGuard(TrainerPlugin):
    """Checks at the start of a training what would otherwise show only at its end: dtypes, rates, gradients.

    Args:
        chosen_rates: learning rates that nobody gave, by Flair's names.
        is_head_rate_zero: whether 0 was asked for.
    """

    def __init__(self, chosen_rates: Mapping[str, float], *, is_head_rate_zero: bool) -> None:
        super().__init__()
        self._chosen_rates, self._is_head_rate_zero = chosen_rates, is_head_rate_zero
        self._has_said = False
        self._unseen: list[PeftTransformerEmbeddings] | None = None

    @TrainerPlugin.hook
    def after_setup(self, **_: Any) -> None:
        """Raise if the head could not consume the embeddings, or if no file could hold what is trained.

        Say if the adapter is multiplied with zero, and let what trains in half precision hold small updates.
        """
        head_dtype.check_head(self.model)
        for peft_model in plugins.peft_models(self.model) if is_main_process() else ():
            trainable.report_without_effect(peft_model)
        save.check_storable(self.model)
        self.trainer.context_stack.enter_context(exact_steps(self.trainer.optimizer))

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
        scores = {name: float(value) for name, value in zip(names, validation_scores, strict=True)}
        self.model.model_card["scores"] = {"epoch": epoch, **scores}

    @TrainerPlugin.hook("after_training")
    def note_test_score(self, **_: Any) -> None:
        """Keep the score on the test data, if there were any."""
        if self.trainer.corpus.test and "test_score" in self.trainer.return_values:
            score = float(self.trainer.return_values["test_score"])
            self.model.model_card.setdefault("scores", {})["test score"] = score

    @TrainerPlugin.hook("before_training_optimizer_step")
    def check_gradients(self, **_: Any) -> None:
        """Report what of an adapter has no gradient when it first gets some, and methods that miss their plugin."""
        # A batch may hold nothing to learn from, such as no pair of entities, or nothing for one of several adapters.
        if self._unseen == [] or all(parameter.grad is None for parameter in self.model.parameters()):
            return
        if self._unseen is None:
            self._unseen = adapted_embeddings(self.model) if is_main_process() else []
            for embeddings in self._unseen:
                self._report_missing_plugin(embeddings.model)
        is_alone = len(adapted_embeddings(self.model)) == 1
        self._unseen = [each for each in self._unseen if not _report_gradients(each, can_wait=not is_alone)]

    @TrainerPlugin.hook("after_training_epoch")
    def check_missing_gradients(self, **_: Any) -> None:
        """Report adapters that had no gradient in a whole epoch."""
        for embeddings in self._unseen or ():
            _report_gradients(embeddings, can_wait=False)
        self._unseen = self._unseen and []

    def _report_missing_plugin(self, peft_model: PeftModel) -> None:
        config = peft_model.peft_config[methods.ADAPTER_NAME]
        has_plugin = any(isinstance(plugin, plugins.RankAllocationPlugin) for plugin in self.trainer.plugins)
        if methods.needs_step_hook(config) and not has_plugin:
            log.warning(
                "%s is trained without RankAllocationPlugin, so its ranks will not change: it has to be told of every "
                "step. Pass plugins=[flair_peft.RankAllocationPlugin()] to the trainer.",
                methods.method_name(config),
            )
        with torch.no_grad():
            has_losses = any(bool(loss.any()) for loss in plugins.own_losses(peft_model))
        adding = [plugin for plugin in self.trainer.plugins if isinstance(plugin, plugins.AuxiliaryLossPlugin)]
        if has_losses and all(isinstance(plugin, plugins.RankAllocationPlugin) for plugin in adding):
            log.warning(
                "The loss of %s in the config of '%s' is not part of this training: PEFT leaves it to the training "
                "loop. Pass plugins=[flair_peft.AuxiliaryLossPlugin()] to the trainer, or weights of 0 in the config.",
                name_some(methods.own_losses(config)),
                peft_model.get_base_model().name_or_path,
            )


def _report_gradients(embeddings: PeftTransformerEmbeddings, *, can_wait: bool) -> bool:
    """Say what of an adapter has no gradient; return whether that is known by now."""
    parameters = trainable.parameters(embeddings.model)
    without = [name for name, p in parameters.items() if p.grad is None and ".pooler." not in f".{name}"]
    has_none = bool(parameters) and len(without) == len(parameters)
    if has_none and can_wait and embeddings.fine_tune:
        return False
    if has_none:
        log.warning(
            "The adapter of '%s' learns nothing: none of its %s parameters received a gradient so far.%s",
            embeddings.name,
            len(parameters),
            "" if embeddings.fine_tune else " With fine_tune=False Flair embeds without gradient; pass fine_tune=True.",
        )
    elif without:
        log.warning("These adapter parameters received no gradient in their first step: %s.", name_some(without))
    return True
