"""How far a training has come, which Flair's trainer keeps in local variables, and whether it has a new best model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import BasePlugin, TrainerPlugin

from flair_peft.training import rates, trainer_state

State = dict[str, Any]

BEST_MODEL = "best-model.pt"

# Settings of the trainer that decide how the training goes on, beside those that the optimiser keeps.
PLANNED = (
    *("dataset_size", "mini_batch_size", "mini_batch_chunk_size", "max_epochs", "max_grad_norm", "shuffle"),
    *("train_with_dev", "train_with_test", "use_amp"),
)


_KEPT = (
    *("epoch", "batches", "is_complete", "is_evaluated", "steps", "evaluations", "scores", "is_best", "best"),
    "is_interrupted",
)
"""Attributes that the state of the training holds under their own names."""


class ProgressPlugin(TrainerPlugin):
    """Knows how far a training has come, which Flair's trainer keeps in local variables."""

    def __init__(self) -> None:
        super().__init__()
        self.epoch = 0
        self.batches = 0  # of this epoch; of all that follow, those before it
        self.is_complete = True  # all batches of the epoch are done
        self.is_evaluated = True
        self.steps = 0
        self.evaluations = 0
        self.scores: tuple[float, ...] = ()  # dev score and loss, or the loss of the training alone
        self.is_best = False
        self.best: tuple[float, ...] = ()
        self.is_interrupted = False
        self._train_loss: float | None = None
        self._random_at_epoch: State | None = None
        # Where the last event left off, if an interruption from here on would leave half drawn what comes next.
        self.random_at_pause: State | None = None
        self._settings: dict[str, Any] = {}

    def starting_point(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return what is to be changed in the settings of the trainer: nothing."""
        return {}

    def state_dict(self) -> State:
        """Return where the training stands, as plain values."""
        state = {
            **{name: getattr(self, name) for name in _KEPT},
            "train_loss": self._train_loss,
            "random_at_epoch": None if self.is_complete else self._random_at_epoch,
            "settings": {name: self._settings.get(name) for name in (*PLANNED, *rates.NAMES)},
        }
        return trainer_state.plain(state, "the progress of the training")

    def load_state_dict(self, state: State) -> None:
        """Stand where another training stood; whether its last epoch was the best is not taken over."""
        self.epoch, self.batches, self.is_complete = state["epoch"], state["batches"], state["is_complete"]
        self.is_evaluated, self.evaluations, self.steps = state["is_evaluated"], state["evaluations"], state["steps"]
        self.scores, self.best = tuple(state["scores"]), tuple(state["best"])
        self._train_loss = state["train_loss"]

    @TrainerPlugin.hook("after_setup")
    def take_settings(self, **settings: Any) -> None:
        """Remember what the training was started with."""
        self._settings = settings

    @TrainerPlugin.hook("before_training_epoch")
    def start_epoch(self, epoch: int, **_: Any) -> None:
        """Begin to count the batches of an epoch."""
        self.epoch, self.batches = epoch, 0
        self.is_complete = self.is_evaluated = self.is_best = self.is_interrupted = False
        self._train_loss = None
        self._random_at_epoch = trainer_state.random_state()

    @TrainerPlugin.hook("before_training_batch")
    def start_batch(self, **_: Any) -> None:
        """Remember the random generators for the case that the batch is interrupted and done again."""
        self.random_at_pause = trainer_state.random_state()

    @TrainerPlugin.hook("after_training_batch")
    def count_batch(self, total_number_of_batches: int, optimizer_was_run: bool, **_: Any) -> None:
        """Count a batch; an epoch that ends between its last batch and its end is complete too."""
        self.random_at_pause = None
        self.steps += bool(optimizer_was_run)
        self.batches += 1
        self.is_complete = self.batches == total_number_of_batches

    @TrainerPlugin.hook("metric_recorded")
    def take_loss(self, record: Any) -> None:
        """Remember the loss by which Flair finds the best epoch if there is no dev split."""
        if record.name == ("train", "loss"):
            self._train_loss = float(record.value)

    @TrainerPlugin.hook("after_training_epoch")
    def end_epoch(self, **_: Any) -> None:
        """Note that the epoch is trained, but not yet evaluated."""
        self.is_complete = True
        self.random_at_pause = trainer_state.random_state()

    @TrainerPlugin.hook("after_evaluation")
    def take_scores(self, current_model_is_best: bool, validation_scores: tuple[float, ...], **_: Any) -> None:
        """Remember the scores of the epoch, and whether it is the best since the very first."""
        self.random_at_pause = None
        self.evaluations += 1
        self.is_evaluated = True
        self.scores = tuple(float(score) for score in validation_scores)
        self.is_best = current_model_is_best and self.beats_best(self.scores)
        if self.is_best:
            self.best = self.scores

    @TrainerPlugin.hook("training_interrupt")
    def stop(self, **_: Any) -> None:
        """Remember that what follows the last event did not happen."""
        self.is_interrupted = True

    def beats_best(self, scores: tuple[float, ...]) -> bool:
        """Whether the scores are better than the best; a single one is a loss, which is better if it is lower."""
        if len(scores) == 1:
            return scores[0] < (self.best[0] if len(self.best) == 1 else float("inf"))
        return scores[0] > (self.best[0] if len(self.best) > 1 else 0.0)


def may_replace(trainer: ModelTrainer, model_file: str | Path) -> bool:
    """Whether the trainer may write this file: not a best model that is worse than the one before the checkpoint.

    Flair's loop begins each training with a best score of 0, so its first epoch would always be the best.
    """
    progress, path = find_progress(trainer), Path(model_file)
    return progress is None or path.name != BEST_MODEL or progress.is_best or not path.exists()


def find_progress(trainer: ModelTrainer) -> ProgressPlugin | None:
    """Return the plugin that follows this training; Flair leaves those of earlier ones attached, before it."""
    return next((plugin for plugin in reversed(trainer.plugins) if isinstance(plugin, ProgressPlugin)), None)


def plugins_behind(trainer: ModelTrainer) -> list[BasePlugin]:
    """Return the plugins behind the one that follows; Flair leaves those of earlier trainings attached, before it."""
    return list(trainer.plugins[trainer.plugins.index(find_progress(trainer)) + 1 :])
