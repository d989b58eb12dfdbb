"""Training that goes on from a checkpoint as if it had never stopped.

Flair 0.15.1 accepts ``save_optimizer_state=True`` and stores no state. Here a state is a plain dictionary of tensors
and JSON values, made by :func:`training_state` while a model is saved, and :class:`ResumePlugin` gives it back:

    ``ModelTrainer(model, corpus).fine_tune("out", save_optimizer_state=True, max_epochs=10)``
    ``model = TextClassifier.load("out/final-model.pt")``
    ``ModelTrainer(model, corpus).fine_tune("out", max_epochs=10, plugins=[ResumePlugin("out/final-model.pt")])``

What Flair keeps in local variables (the first epoch, the sampler) is set by :func:`prepare_settings`, before it starts.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flair.data import Sentence
from flair.models import PrefixedSequenceTagger
from flair.nn import Model
from flair.samplers import FlairSampler
from flair.trainers import ModelTrainer
from flair.trainers.plugins import AnnealingPlugin, LinearSchedulerPlugin
from flair.trainers.plugins.base import TrainerPlugin, TrainingInterrupt
from flair.training_utils import store_embeddings
from torch.utils.data import RandomSampler, SequentialSampler

from flair_peft.codec.state_positions import class_name
from flair_peft.errors import FormatVersionError, MissingFileError, TrainingSetupError, name_some
from flair_peft.primitives import host_internals
from flair_peft.torchfile import unpickle
from flair_peft.training import rates, trainer_state
from flair_peft.training.position import BEST_MODEL, PLANNED, ProgressPlugin, find_progress, plugins_behind

log = logging.getLogger("flair_peft")

State = dict[str, Any]

STATE_VERSION = 1

_FOLLOWS_NEW = "those given now"

# In the state that was read from a file, beside what the file holds under these names: what its model had learned.
_LEARNED = "learned"


def training_state(trainer: ModelTrainer, model: Model) -> State:
    """Return all that the training of ``model`` needs to go on from here, apart from the model's own tensors.

    Returns:
        Dictionaries, lists, tuples, None, bool, int, float (infinite ones too), str, and copies of tensors on the CPU.

    Raises:
        TrainingSetupError: nothing followed this training, so that its epoch is not known.
        UnsupportedStateError: the optimiser keeps something that is neither a tensor nor a plain value.
    """
    progress = find_progress(trainer)
    if progress is None:
        raise TrainingSetupError(
            "Cannot keep the state of this training: no ProgressPlugin followed it, so its epoch is not known. "
            "flair_peft attaches one when a training with an adapter starts. Call flair_peft.install() before that."
        )
    scaler = trainer_state.find_scaler(trainer)
    return {
        "version": STATE_VERSION,
        "progress": progress.state_dict(),
        "optimizer": trainer_state.optimizer_state(trainer.optimizer, model),
        "plugins": trainer_state.plugin_states(plugins_behind(trainer)),
        "adapters": trainer_state.adapter_scores(model),
        "scaler": None if scaler is None else trainer_state.plain(scaler.state_dict(), "the gradient scaler"),
        "random": progress.random_at_pause or trainer_state.random_state(),
    }


def prepare_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``ModelTrainer.train_custom`` for a training that is followed, or goes on.

    The plugin that follows stands in front of all others, so that it hears of each event even if another plugin ends
    the training there. With a :class:`ResumePlugin`, the first epoch is set too.

    Raises:
        TrainingSetupError: there are two such plugins, or ``epoch`` is not the one where the checkpoint stopped.
    """
    plugins = list(settings.get("plugins") or [])
    following = [plugin for plugin in plugins if isinstance(plugin, ProgressPlugin)] or [ProgressPlugin()]
    if len(following) > 1:
        raise TrainingSetupError(
            f"Cannot go on from {len(following)} checkpoints: the plugins hold as many of "
            f"{name_some(map(str, following))}. A training has one past. Pass one of them."
        )
    others = [plugin for plugin in plugins if plugin is not following[0]]
    return {**settings, "plugins": [*following, *others], **following[0].starting_point(settings)}


def past_rates(settings: Mapping[str, Any]) -> dict[str, float | None] | None:
    """Return the learning rates of the training that goes on with these settings; ``None`` where one starts anew.

    Its optimiser goes on with the groups of parameters that it had. Files of older versions name no rates: theirs were
    those that were given, or Flair's.
    """
    resuming = next((plugin for plugin in settings["plugins"] if isinstance(plugin, ResumePlugin)), None)
    if resuming is None:
        return None
    return {name: rate for name, rate in resuming._past["settings"].items() if name in rates.NAMES}


def _read_training_state(path: Path) -> State | None:
    if not path.is_file():
        raise MissingFileError(
            f"Cannot go on with the training of '{path}': there is no such file. Pass the .pt file that the model was "
            "loaded from."
        )
    state = unpickle.read_state(path)
    training = state.get("training_state")
    if training is None:
        return None
    return {**training, _LEARNED: trainer_state.learned(training["optimizer"], state["state_dict"])}


class ResumePlugin(ProgressPlugin):
    """Lets a training go on where the one of a checkpoint stopped, batch for batch.

    Optimiser, schedulers, rank budgets and random generators are set before the first epoch. Pass the same corpus and
    the same settings as before, ``max_epochs`` among them: it counts from the very first epoch.

    Example:
        ``model = TextClassifier.load("out/final-model.pt")``
        ``plugins = [ResumePlugin("out/final-model.pt")]``
        ``ModelTrainer(model, corpus).fine_tune("out", max_epochs=10, plugins=plugins)``

    Args:
        source: the file that the model was loaded from, saved with ``save_optimizer_state=True``; or its state.

    Raises:
        MissingFileError: there is no such file.
        TrainingSetupError: the file has no training state.
        FormatVersionError: the state was written by a newer flair_peft.
    """

    def __init__(self, source: str | Path | State) -> None:
        super().__init__()
        # Read now: the training may write over the file. Copied: the optimiser goes on with these very tensors.
        state = copy.deepcopy(source) if isinstance(source, dict) else _read_training_state(Path(source))
        self.source = "the given state" if isinstance(source, dict) else str(source)
        self._state = self._check(state)
        self._past: State = self._state["progress"]
        self._is_prepared = self._is_restored = False

    def _check(self, state: State | None) -> State:
        if state is None:
            raise TrainingSetupError(
                f"Cannot go on with the training of '{self.source}': it holds no training state. It was saved without "
                "save_optimizer_state=True. Save it with that option, or leave out ResumePlugin to start anew."
            )
        if state["version"] > STATE_VERSION:
            raise FormatVersionError(
                f"Cannot go on with the training of '{self.source}': its state has version {state['version']}, and "
                f"this flair_peft reads up to {STATE_VERSION}. Install a newer flair_peft."
            )
        return state

    @property
    def start(self) -> int:
        """The last epoch that was finished, which is what Flair's ``epoch=`` takes."""
        return self._past["epoch"] - (0 if self._past["is_complete"] else 1)

    def starting_point(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Return the first epoch, and a sampler that leaves out the batches that are done.

        Raises:
            TrainingSetupError: another epoch is asked for, or a training took the state already.
        """
        if self._is_restored:
            raise TrainingSetupError(
                f"Cannot go on with the training of '{self.source}' twice with one ResumePlugin: a training took its "
                "optimiser, schedulers and random numbers already. This one would start without them. Load the model "
                "again, and make another ResumePlugin."
            )
        self._is_prepared = True
        self._refuse_other_epoch(settings.get("epoch") or self.start)
        if self._past["is_complete"]:
            return {"epoch": self.start}
        if settings.get("multi_gpu"):
            log.warning("Epoch %s is trained again: on several GPUs, no batches are left out.", self._past["epoch"])
            return {"epoch": self.start}
        return {"epoch": self.start, "sampler": self._remainder(settings)}

    def _remainder(self, settings: Mapping[str, Any]) -> FlairSampler:
        if isinstance(settings.get("sampler"), RemainderSampler):
            return settings["sampler"]
        shuffles = settings.get("shuffle", True)
        is_plain_epoch = self._past["epoch"] == 1 and not settings.get("shuffle_first_epoch", True)
        return RemainderSampler(
            settings.get("sampler"),
            done=self._past["batches"] * self._past["settings"]["mini_batch_size"],
            shuffles_first=shuffles and not is_plain_epoch,
            shuffles=shuffles,
        )

    def _refuse_other_epoch(self, epoch: int) -> None:
        if epoch != self.start:
            raise TrainingSetupError(
                f"Cannot go on with the training of '{self.source}' after epoch {epoch}: it stopped after epoch "
                f"{self.start}. Leave out epoch=…, or pass epoch={self.start}."
            )

    @TrainerPlugin.hook("after_setup")
    def take_settings(self, **settings: Any) -> None:
        """Refuse to start elsewhere, and say which settings are not those of the training before.

        Raises:
            TrainingSetupError: Flair starts at another epoch.
        """
        if self._is_restored:
            super().take_settings(**settings)
            return
        if not self._is_prepared:
            raise TrainingSetupError(
                f"Cannot go on with the training of '{self.source}': flair_peft did not prepare this one. It does for "
                "models that have an adapter, as long as it is installed. Pass the trainer the model that was saved, "
                "not a merged one, and call flair_peft.install() if it was uninstalled."
            )
        self._refuse_other_epoch(settings["epoch"])
        super().take_settings(**{**settings, **self._rates(settings)})
        if isinstance(settings["sampler"], RemainderSampler):
            # Flair stores the settings in every file, and a sampler holds the whole corpus.
            sampler = settings["sampler"].sampler
            self.model.model_card["training_parameters"]["sampler"] = sampler and class_name(sampler)
        now = trainer_state.plain({name: settings.get(name) for name in PLANNED}, "the settings")
        trainer_state.warn_of_changes(now, self._past["settings"], source=self.source, wins=_FOLLOWS_NEW)
        self._report_other_context()

    def _report_other_context(self) -> None:
        """Say if Flair will take sentences of one mini-batch for each other's context: these are others now."""
        corpus = self.trainer.corpus.train
        firsts = [next(iter(part or ()), None) for part in getattr(corpus, "datasets", [corpus])]
        reads_context = any(getattr(module, "context_length", 0) for module in self.model.modules())
        if isinstance(self.model, PrefixedSequenceTagger) or not reads_context:
            return  # the former reads copies, and links these anew each time
        if any(isinstance(first, Sentence) and not first.is_context_set() for first in firsts):
            log.warning(
                "The training of '%s' goes on, but not as without a stop: where a corpus does not say which "
                "sentences follow each other, Flair takes those of the first mini-batches for context of each other. "
                "Call Sentence.set_context_for_sentences with the sentences of each document before both trainings.",
                self.source,
            )

    def _rates(self, settings: Mapping[str, Any]) -> dict[str, float | None]:
        """Return the rates of the training before, as far as its file names them: the optimiser goes on with these.

        That of the head is compared here, that of all others with the rest of what the optimiser keeps.
        """
        past = {name: self._past["settings"][name] for name in rates.NAMES if name in self._past["settings"]}
        given = {name: settings.get(name) for name in ("decoder_learning_rate",)}
        trainer_state.warn_of_changes(given, past, source=self.source, wins=trainer_state.FOLLOWS_OLD)
        self.model.model_card["training_parameters"].update(past)
        return past

    @TrainerPlugin.hook("before_training_epoch")
    def start_epoch(self, epoch: int, **_: Any) -> None:
        """Restore everything before the first epoch. Schedulers exist by now: Flair makes them after this plugin."""
        is_first = not self._is_restored
        self.restore()
        if is_first and not self._past["is_complete"]:
            trainer_state.set_random_state(self._past["random_at_epoch"])
        super().start_epoch(epoch)
        if is_first and not self._past["is_complete"] and not self._settings["multi_gpu"]:
            self.batches = self._past["batches"]

    @TrainerPlugin.hook("before_training_batch")
    def start_batch(self, **_: Any) -> None:
        """Set the random generators at the batch where an epoch was interrupted; its order is drawn by now."""
        if self._state and not self._past["is_complete"]:
            trainer_state.set_random_state(self._state["random"])
        self._state = {}
        super().start_batch()

    @TrainerPlugin.hook("after_training_loop")
    def restore(self, **_: Any) -> None:
        """Restore everything once: where no epoch is left, before the final model is saved."""
        if self._is_restored:
            return
        self._is_restored = True
        self._restore_state()
        self._step_schedulers()
        if self.is_complete:
            self._end_past_epoch()

    def _restore_state(self) -> None:
        self.load_state_dict(self._past)
        trainer_state.restore_optimizer_(self.trainer.optimizer, self.model, self._state["optimizer"], self.source)
        trainer_state.refuse_other_weights(self.model, self._state.get(_LEARNED, {}), self.source)
        trainer_state.restore_plugins(plugins_behind(self.trainer), self._state["plugins"], self.source)
        trainer_state.restore_adapter_scores_(self.model, self._state["adapters"])
        scaler = trainer_state.find_scaler(self.trainer)
        if scaler is not None and self._state["scaler"]:
            scaler.load_state_dict(self._state["scaler"])
        trainer_state.set_random_state(self._state["random"])

    def _step_schedulers(self) -> None:
        """Do the step that a plugin kept from the schedulers behind it, by ending the training after a batch."""
        for plugin in plugins_behind(self.trainer):
            if isinstance(plugin, LinearSchedulerPlugin) and plugin.scheduler.last_epoch < self.steps:
                plugin.after_training_batch(optimizer_was_run=True)

    def _end_past_epoch(self) -> None:
        """Do what Flair does at the end of an epoch and had not done when the file was written.

        Files of ``save_model_each_k_epochs`` are written before the evaluation; a plugin that ends the training keeps
        those behind it from hearing of the event.
        """
        self.is_best = self._past["is_best"] and self._past["is_interrupted"]
        if not self.is_evaluated:
            scores = self._evaluate()
            self.take_scores(self.beats_best(scores), scores)
        best_model = Path(self._settings["base_path"]) / BEST_MODEL
        for plugin in plugins_behind(self.trainer):
            if isinstance(plugin, AnnealingPlugin) and plugin.scheduler.last_epoch < self.evaluations:
                self._anneal(plugin, best_model)
        if self.is_best and not (self._settings["train_with_dev"] or self._settings["use_final_model_for_eval"]):
            self.trainer._save_model(best_model, checkpoint=self._settings["save_optimizer_state"])

    def _anneal(self, plugin: AnnealingPlugin, best_model: Path) -> None:
        """Do what the plugin does after an evaluation, except for the record, which would stand in the next epoch's."""
        is_reduced = plugin.scheduler.step(*self.scores)
        plugin.store_learning_rate()
        if any(rate < plugin.min_learning_rate for rate in plugin.current_learning_rate):
            raise TrainingInterrupt("learning rate too small - quitting training!")
        if is_reduced and plugin.anneal_with_restarts and best_model.exists():
            self.trainer._load_model(best_model)

    def _evaluate(self) -> tuple[float, ...]:
        """Return the scores of the model as Flair's trainer computes them after an epoch."""
        settings = self._settings
        # Each evaluation draws random numbers, also that of a sample of the training data.
        splits = host_internals.variable_of_caller("train_custom", self.trainer, "evaluation_splits")
        scores: tuple[float, ...] = (float("inf") if self._train_loss is None else self._train_loss,)
        self.model.eval()
        for name, split in splits.items():
            result = self.model.evaluate(
                split,
                gold_label_type=self.model.label_type,
                mini_batch_size=settings["eval_batch_size"],
                embedding_storage_mode=settings["embeddings_storage_mode"],
                main_evaluation_metric=settings["main_evaluation_metric"],
                exclude_labels=settings["exclude_labels"],
                gold_label_dictionary=settings["gold_label_dictionary_for_eval"],
            )
            store_embeddings(split, settings["embeddings_storage_mode"])
            if name == "dev":
                scores = (float(result.main_score), float(result.loss))
        return scores


class RemainderSampler(FlairSampler):
    """Leaves out, the first time, the data points of batches that are done; afterwards it leaves out none.

    Args:
        sampler: what the user passed to the trainer; ``None`` for Flair's default, shuffled or not.
        done: how many data points of the first epoch are left out.
        shuffles_first: whether the first epoch is shuffled, without a sampler.
        shuffles: whether later epochs are.
    """

    def __init__(
        self, sampler: FlairSampler | type[FlairSampler] | None, *, done: int, shuffles_first: bool, shuffles: bool
    ) -> None:
        super().__init__()
        self.sampler = sampler() if isinstance(sampler, type) else sampler
        self.done, self.shuffles, self.shuffles_later = done, shuffles_first, shuffles

    def set_dataset(self, data_source: Any) -> None:
        """Draw from this data set."""
        super().set_dataset(data_source)
        if self.sampler is not None:
            self.sampler.set_dataset(data_source)

    def __iter__(self) -> Iterator[int]:
        done, shuffles = self.done, self.shuffles
        self.done, self.shuffles = 0, self.shuffles_later
        # torch's own samplers draw the same numbers as Flair's loader does without a sampler.
        default = RandomSampler if shuffles else SequentialSampler
        order = default(self.data_source) if self.sampler is None else self.sampler
        return itertools.islice(iter(order), done, None)

    def __len__(self) -> int:
        return self.num_samples if self.sampler is None else len(self.sampler)
