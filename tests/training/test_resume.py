"""A training that goes on from a checkpoint does what it would have done without stopping."""

from __future__ import annotations

import collections
import functools
import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flair.data import Corpus, Sentence
from flair.nn import Model
from flair.samplers import FlairSampler
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin, TrainingInterrupt
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PrefixTuningConfig, PromptEncoderConfig
from peft.tuners.lora.config import VeloraConfig

import flair_peft
from flair_peft import LoraPlusPlugin, RankAllocationPlugin
from flair_peft.adapter import methods
from flair_peft.errors import FormatVersionError, ModelFileError, TrainingSetupError, UnsupportedStateError
from flair_peft.torchfile import unpickle
from flair_peft.training import position, rates, resume, trainer_state
from flair_peft.training.resume import ResumePlugin
from tests.support.configs import lora
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS
from tests.support.round_trip import Factories
from tests.support.selection import few
from tests.support.zoo import BATCH, ZOO

EPOCHS = 4
BATCHES = 4
State = dict[str, Any]


dropping = functools.partial(lora, lora_dropout=0.2)
"""LoRA whose training draws random numbers."""


def adalora() -> AdaLoraConfig:
    schedule = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 1, "total_step": EPOCHS * BATCHES}
    return AdaLoraConfig(lora_alpha=12, lora_dropout=0.2, target_modules=["query", "value"], **schedule)


CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    "lora": dropping,
    "prefix-projection": lambda: PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16
    ),
    "p-tuning": lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16, encoder_dropout=0.2),
    "p-tuning-lstm": lambda: PromptEncoderConfig(
        num_virtual_tokens=3,
        encoder_hidden_size=16,
        encoder_reparameterization_type="LSTM",
        encoder_num_layers=2,
        encoder_dropout=0.2,
    ),
    "adalora": adalora,
    "trained norms": lambda: dropping(bias="all", modules_to_save=["LayerNorm"]),
    "velora-once": lambda: dropping(velora_config=VeloraConfig(num_groups=4, init_type="batch_average_once")),
}

# Flair's two schedules: linear with warm-up and AdamW; annealing on the dev score, here after each epoch that is not
# better, and SGD with momentum.
SCHEDULES: dict[str, dict[str, Any]] = {
    "fine_tune": {"learning_rate": 5e-3, "warmup_fraction": 0.4},
    "train": {"learning_rate": 0.05, "momentum": 0.9, "patience": 0, "min_learning_rate": 0.0},
}


def read_state(path: Path) -> State | None:
    return unpickle.read_state(path).get("training_state")


def assert_plain(value: Any) -> None:
    """Fail unless the value consists of what the file format holds."""
    if isinstance(value, dict):
        assert all(type(key) in (int, str) for key in value)
        value = list(value.values())
    if type(value) in (list, tuple):
        for item in value:
            assert_plain(item)
    else:
        assert type(value) in (type(None), bool, int, float, str, torch.Tensor)


class Stop(TrainerPlugin):
    """Ends the training at an event of an epoch, or of one of its batches."""

    def __init__(self, event: str, epoch: int, batch: int | None = None) -> None:
        super().__init__()
        self.event, self.epoch, self.batch = event, epoch, batch

    def attach_to(self, pluggable: Any) -> None:
        super().attach_to(pluggable)
        self._hook_handles.append(pluggable.register_hook(self.stop, self.event))

    def stop(self, epoch: int, batch_no: int | None = None, **_: Any) -> None:
        if (epoch, batch_no) == (self.epoch, self.batch):
            raise TrainingInterrupt("stopped")


class Journal(TrainerPlugin):
    """Writes down loss and learning rates of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.losses: list[float] = []
        self.rates: list[list[float]] = []

    @TrainerPlugin.hook
    def metric_recorded(self, record: Any) -> None:
        if record.name == ("train", "batch_loss"):
            self.losses.append(record.value)

    @TrainerPlugin.hook
    def before_training_optimizer_step(self, **_: Any) -> None:
        self.rates.append([group["lr"] for group in self.trainer.optimizer.param_groups])


class Journey:
    """One kind of training, run without stopping or in two parts, from the same seed."""

    def __init__(
        self,
        base: str,
        root: Path,
        *,
        config: Callable[[], PeftConfig] = dropping,
        entry: str = "text-classifier",
        schedule: str = "fine_tune",
        dtype: torch.dtype = torch.float32,
        plugins: Callable[[], list[TrainerPlugin]] = list,
        has_easy_dev: bool = False,
        use_context: int | bool = False,
        **options: Any,
    ) -> None:
        self.base, self.root, self.config, self.entry = base, root, config, ZOO[entry]
        self.schedule, self.dtype, self.plugins = schedule, dtype, plugins
        self.has_easy_dev, self.use_context, self.is_linked = has_easy_dev, use_context, False
        self.options = {"max_epochs": EPOCHS, "mini_batch_size": BATCH, **SCHEDULES[schedule], **options}

    def build(self) -> Model:
        torch.manual_seed(1)
        factories = Factories(self.base, self.config(), dtype=self.dtype, use_context=self.use_context)
        return self.entry.build(factories.words, factories.documents)

    def corpus(self) -> Corpus:
        """Return the corpus; training sentences as dev split give a score above 0, and so a best model."""
        corpus = self.entry.corpus()
        dev = self.entry.corpus().train if self.has_easy_dev else corpus.dev
        for split in (corpus.train, dev, corpus.test) if self.is_linked else ():
            Sentence.set_context_for_sentences([*split])
        return Corpus(train=corpus.train, dev=dev, test=corpus.test, sample_missing_splits=False)

    def train(self, model: Model, name: str, *plugins: TrainerPlugin) -> Journal:
        """Train into the directory ``name`` and return what happened."""
        journal = Journal()
        trainer = ModelTrainer(model, self.corpus())
        options = {"save_optimizer_state": True, **self.options}
        getattr(trainer, self.schedule)(
            self.root / name, plugins=[*plugins, *self.plugins(), journal], create_file_logs=False, **options
        )
        return journal

    def seeded(self, name: str, *plugins: TrainerPlugin) -> Journal:
        model = self.build()
        torch.manual_seed(2), random.seed(2), np.random.seed(2)
        return self.train(model, name, *plugins)

    def resumed(self, name: str, file: str = "final-model.pt", stops: Sequence[TrainerPlugin] = ()) -> Journal:
        """Load a file in what could be another process, and train on."""
        path = self.root / name / file
        torch.manual_seed(3), random.seed(3), np.random.seed(3)
        return self.train(Model.load(path), name, ResumePlugin(path), *stops)

    def tensors(self, name: str, file: str = "final-model.pt") -> dict[str, torch.Tensor]:
        return torch.load(self.root / name / file, weights_only=False)["state_dict"]

    def compare(self, stop: Stop, file: str = "final-model.pt") -> None:
        """Fail unless a training in two parts has the losses, rates and files of one without a stop."""
        whole = self.seeded("whole")
        first = self.seeded("parts", stop)
        done = len(first.losses)
        assert self.schedule == "train" or len(set(map(tuple, whole.rates))) > 1
        assert first.losses == whole.losses[:done]
        assert 0 < done < len(whole.losses)
        second = self.resumed("parts", file)
        assert second.losses == whole.losses[done:]
        assert second.rates == whole.rates[done:]
        files = {path.name for path in (self.root / "whole").glob("*.pt")}
        assert files == {path.name for path in (self.root / "parts").glob("*.pt")}
        for written in files:
            assert_same_tensors(self.tensors("whole", written), self.tensors("parts", written))


def assert_same_tensors(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor]) -> None:
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.fixture
def journey(base: Callable[[str], str], tmp_path: Path) -> Callable[..., Journey]:
    """Return a function that makes a journey on the tiny BERT."""
    return lambda **options: Journey(base("bert"), tmp_path, **options)


Journeys = Callable[..., Journey]


def plugins_of(method: str) -> Callable[[], list[TrainerPlugin]]:
    return lambda: [RankAllocationPlugin()] if method.startswith("ada") else []


@pytest.mark.parametrize(
    ("entry", "schedule"), [("text-classifier", "fine_tune"), ("sequence-tagger-rnn-crf", "train")]
)
@pytest.mark.parametrize("method", few(CONFIGS, ["lora", "adalora", "velora-once"]))
def test_resumed_training_of_each_method_equals_one_that_never_stopped(
    method: str, entry: str, schedule: str, journey: Journeys
) -> None:
    """Losses, learning rates and all files are bit-equal, with warm-up or annealing, momentum and dropout."""
    options = {"config": CONFIGS[method], "plugins": plugins_of(method)}
    journey(entry=entry, schedule=schedule, **options).compare(Stop("after_evaluation", 2))


@pytest.mark.parametrize(
    ("method", "schedule"),
    [
        ("lora", "train"),
        ("prefix-projection", "fine_tune"),
        ("adalora", "fine_tune"),
        ("trained norms", "train"),
        ("trained norms", "fine_tune"),
    ],
)
def test_resumed_training_on_a_16_bit_base_equals_one_that_never_stopped(
    method: str, schedule: str, journey: Journeys
) -> None:
    """The loaded head, cast to 16 bits for predictions, has its exact values back before the optimiser goes on."""
    options = {"config": CONFIGS[method], "plugins": plugins_of(method), "dtype": torch.bfloat16}
    journey(schedule=schedule, **options).compare(Stop("after_evaluation", 2))


# Refused by the package; and one that keeps noise which it drew ahead.
NOT_EXACT = ("corda", "lora_ga", "monteclora")
EVERY_METHOD = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [name for name, method in EVERY_METHOD.items() if "encoder" in method.works and name not in NOT_EXACT]
)
def test_resumed_training_of_every_method_equals_one_that_never_stopped(name: str, journey: Journeys) -> None:
    """What a method keeps outside its parameters while it trains comes back as well."""
    method = EVERY_METHOD[name]
    plugins = plugins_of("adalora" if method.needs_step else "lora")
    journey(config=lambda: method.config("encoder"), plugins=plugins).compare(Stop("before_training_batch", 2, 1))


@pytest.mark.parametrize("schedule", few(SCHEDULES, ["fine_tune"]))
@pytest.mark.parametrize(
    "stop",
    [
        ("after_training_epoch", 2, None),
        ("before_training_batch", 1, 1),
        ("before_training_batch", 3, 2),
        ("after_training_batch", 2, 0),
        ("after_training_batch", 2, BATCHES - 1),
    ],
    ids=str,
)
def test_training_stopped_anywhere_goes_on_there(
    stop: tuple[str, int, int | None], schedule: str, journey: Journeys
) -> None:
    """Evaluations and scheduler steps that were kept from happening are made up for; half an epoch is finished."""
    journey(schedule=schedule, use_final_model_for_eval=False).compare(Stop(*stop))


@pytest.mark.parametrize("place", ["forward_loss", "evaluate"])
def test_training_interrupted_by_the_user_goes_on_there(
    place: str, journey: Journeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl+C in the middle of a batch or an evaluation: numbers drawn for it are drawn again."""
    travel = journey(schedule="train", use_final_model_for_eval=False)
    whole = travel.seeded("whole")
    calls = iter(range(100))
    model_class = travel.entry.model_class
    original = getattr(model_class, place)

    def interrupted(self: Model, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        if next(calls) == 1:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(model_class, place, interrupted)
        first = travel.seeded("parts")
    second = travel.resumed("parts")
    assert len(first.losses) == (1 if place == "forward_loss" else 2 * BATCHES)
    assert first.losses + second.losses == whole.losses
    assert first.rates + second.rates == whole.rates
    for name in ("final-model.pt", "best-model.pt"):
        assert_same_tensors(travel.tensors("whole", name), travel.tensors("parts", name))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_training_goes_on_from_every_file_that_it_left(schedule: str, journey: Journeys) -> None:
    """Files of single epochs, written before the evaluation, and the best model are checkpoints too."""
    travel = journey(schedule=schedule, use_final_model_for_eval=False, save_model_each_k_epochs=1, has_easy_dev=True)
    whole = travel.seeded("whole")
    final = travel.tensors("whole")
    files = ["best-model.pt", "model_epoch_1.pt", "model_epoch_3.pt"]
    (travel.root / "kept").mkdir()
    for file in files:
        shutil.copy(travel.root / "whole" / file, travel.root / "kept" / file)
    for file in files:
        epoch = read_state(travel.root / "kept" / file)["progress"]["epoch"]
        assert travel.resumed("kept", file).losses == whole.losses[epoch * BATCHES :]
        assert_same_tensors(final, travel.tensors("kept"))


def test_learning_rate_is_annealed_as_it_would_have_been(journey: Journeys) -> None:
    """Bad epochs before the stop count, the last of them evaluated only after it."""
    travel = journey(schedule="train", max_grad_norm=0.0)  # nothing is learned, so no epoch is better
    travel.compare(Stop("after_training_epoch", 2))
    rates = travel.seeded("again").rates
    assert [rate for (rate,) in rates[::BATCHES]] == [0.05, 0.05, 0.025, 0.0125]


def test_training_can_be_stopped_more_than_once(journey: Journeys) -> None:
    """What was restored is kept again, also within one epoch."""
    travel = journey(schedule="train")
    whole = travel.seeded("whole")
    losses = travel.seeded("parts", Stop("before_training_batch", 2, 1)).losses
    # The resumed epoch counts the batches that are left from zero.
    losses += travel.resumed("parts", stops=[Stop("before_training_batch", 2, 2)]).losses
    losses += travel.resumed("parts", stops=[Stop("after_evaluation", 3)]).losses
    losses += travel.resumed("parts").losses
    assert losses == whole.losses
    assert_same_tensors(travel.tensors("whole"), travel.tensors("parts"))


class Shuffled(FlairSampler):
    """Shuffles with Python's generator; Flair's own samplers cannot be made with this torch."""

    def __init__(self) -> None:
        super().__init__()

    def __iter__(self) -> Iterator[int]:
        return iter(random.sample(range(self.num_samples), self.num_samples))


@pytest.mark.parametrize(
    "options",
    [
        {"sampler": Shuffled, "stop": 2},
        {"sampler": Shuffled, "stop": None},
        {"shuffle_first_epoch": False, "stop": 1},
        {"shuffle": False, "stop": 1},
        {"decoder_learning_rate": 0.1, "stop": None},
        {"train_with_dev": True, "stop": None},
        {"mini_batch_chunk_size": 1, "stop": 2},
        {"monitor_test": True, "use_final_model_for_eval": False, "stop": None},
        {"monitor_train_sample": 0.5, "stop": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_resumed_training_with_an_option_equals_one_that_never_stopped(
    options: dict[str, Any], journey: Journeys
) -> None:
    """Options of Flair's trainer that change order, groups or evaluations are followed."""
    settings = dict(options)
    batch = settings.pop("stop")
    stop = Stop("after_training_epoch", 2) if batch is None else Stop("before_training_batch", 1, batch)
    journey(**settings).compare(stop)


def test_resumed_training_in_mixed_precision_has_its_gradient_scale(
    journey: Journeys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale that grew over the steps goes on growing from there."""
    scales: list[float] = []

    class Scaler(torch.amp.GradScaler):
        def update(self, new_scale: float | None = None) -> None:
            super().update(new_scale)
            scales.append(self.get_scale())

    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda enabled: Scaler("cpu", init_scale=2.0, growth_interval=3))
    journey(use_amp=True).compare(Stop("after_evaluation", 2))
    steps = EPOCHS * BATCHES
    assert scales[:steps] == scales[steps:]
    assert scales[0] == 2.0
    assert scales[steps - 1] == 2.0 ** (1 + steps // 3)


def test_resumed_training_with_two_learning_rates_keeps_both(journey: Journeys) -> None:
    """Groups made by LoraPlusPlugin are compared and filled as the plugin makes them again."""
    travel = journey(plugins=lambda: [LoraPlusPlugin()])
    travel.compare(Stop("after_evaluation", 2))
    travel.plugins = list
    with pytest.raises(TrainingSetupError, match="groups of parameters"):
        travel.resumed("parts")


def test_resumed_training_with_context_says_where_the_corpus_does_not_tell_it(
    journey: Journeys, caplog: pytest.LogCaptureFixture
) -> None:
    """Sentences that nobody linked get those of their first mini-batch; a training with linked ones goes on exactly."""
    travel = journey(entry="sequence-tagger", use_context=8)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        travel.seeded("alone", Stop("after_evaluation", 1))
        assert "set_context_for_sentences" not in caplog.text
        travel.resumed("alone")
        assert "set_context_for_sentences" in caplog.text
        caplog.clear()
        travel.is_linked = True
        travel.compare(Stop("after_evaluation", 1))
    assert "set_context_for_sentences" not in caplog.text


@pytest.mark.parametrize("is_given", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_resumed_training_of_an_older_version_keeps_the_rates_of_flair(
    is_given: bool, journey: Journeys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Adapter and head had one rate where none was given for the head, and its files do not name any."""
    travel = journey()
    if not is_given:
        del travel.options["learning_rate"]
    with monkeypatch.context() as patch:
        patch.setattr(rates, "choose", lambda *_, **__: {})
        patch.setattr(rates, "NAMES", ())
        whole = travel.seeded("whole")
        done = len(travel.seeded("parts", Stop("before_training_batch", 2, 1)).losses)
    assert not read_state(travel.root / "parts" / "final-model.pt")["progress"]["settings"].keys() & set(rates.NAMES)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        resumed = travel.resumed("parts")
    assert "other settings" not in caplog.text
    assert resumed.losses == whole.losses[done:]
    assert resumed.rates == whole.rates[done:]
    assert {len(groups) for groups in resumed.rates} == {1}
    assert_same_tensors(travel.tensors("whole"), travel.tensors("parts"))


def test_resumed_training_keeps_the_rates_that_were_chosen_for_it(
    journey: Journeys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A later version may choose others: the optimiser goes on with those of the file."""
    travel = journey()
    del travel.options["learning_rate"]
    stop = Stop("after_evaluation", 2)
    whole, done = travel.seeded("whole"), len(travel.seeded("parts", stop).losses)
    monkeypatch.setattr(methods, "HEAD_RATE", 0.5)
    monkeypatch.setattr(methods, "suited_rate", lambda _: None)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        resumed = travel.resumed("parts")
    assert not caplog.text
    assert max(map(max, whole.rates)) == 1e-2
    assert resumed.rates == whole.rates[done:]
    assert_same_tensors(travel.tensors("whole"), travel.tensors("parts"))


def test_resumed_training_says_the_rates_that_it_has_and_which_it_was_given_in_vain(
    journey: Journeys, caplog: pytest.LogCaptureFixture
) -> None:
    """The optimiser goes on with those of the file: line, warning, model card and the next file say these."""
    travel = journey()
    del travel.options["learning_rate"]
    travel.seeded("parts", Stop("after_evaluation", 1))
    travel.options["decoder_learning_rate"] = 3e-3
    logging.getLogger("flair").setLevel(logging.INFO)
    with caplog.at_level(logging.INFO):
        resumed = travel.resumed("parts", stops=[Stop("after_evaluation", 2)])
    assert "decoder_learning_rate was 0.01, is 0.003 now. It goes on with those that it had." in caplog.text
    assert "the head at 1e-2. Trained" in caplog.text
    assert resumed.rates[0][0] > 3e-3
    assert read_state(travel.root / "parts" / "final-model.pt")["progress"]["settings"]["decoder_learning_rate"] == 1e-2
    del travel.options["decoder_learning_rate"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        travel.resumed("parts")
    assert "the head at 1e-2 (no decoder_learning_rate was given). Trained" in caplog.text
    assert "other settings" not in caplog.text


def test_training_that_nobody_prepared_does_not_go_on(journey: Journeys) -> None:
    """A merged model has no adapter, and trains as Flair has it: the plugin says so instead of naming an epoch."""
    travel = journey()
    travel.seeded("parts", Stop("after_evaluation", 1))
    path = travel.root / "parts" / "final-model.pt"
    with pytest.raises(TrainingSetupError, match="flair_peft did not prepare this one"):
        travel.train(flair_peft.merge(Model.load(path)), "merged", ResumePlugin(path))


def test_resumed_training_that_is_annealed_with_restarts_draws_the_same(journey: Journeys) -> None:
    """A load draws no random numbers, whatever was loaded before: Flair restarts from the best model by one."""
    settings = {"learning_rate": 0.3, "patience": 0, "min_learning_rate": 0.0, "anneal_with_restarts": True}
    travel = journey(schedule="train", has_easy_dev=True, **settings)
    travel.compare(Stop("after_evaluation", 2))


def test_ranks_masked_by_adamss_stay_frozen(journey: Journeys) -> None:
    """AdaMSS freezes parameters while it trains, which no state dict tells."""
    config = OTHER_VARIANTS["adamss_asa"].config
    journey(config=lambda: config("encoder"), plugins=plugins_of("adamss")).compare(Stop("after_evaluation", 2))


def test_best_model_is_not_replaced_by_a_worse_one(journey: Journeys) -> None:
    """The best score of the training before counts, though Flair's loop starts from 0."""
    travel = journey(use_final_model_for_eval=False, learning_rate=0.0, has_easy_dev=True)
    travel.seeded("parts", Stop("before_training_batch", 3, 0))
    best = (travel.root / "parts" / "best-model.pt").read_bytes()
    assert read_state(travel.root / "parts" / "final-model.pt")["progress"]["best"][0] > 0
    travel.resumed("parts")
    assert (travel.root / "parts" / "best-model.pt").read_bytes() == best


def test_noise_that_monteclora_drew_ahead_is_said_to_differ(
    journey: Journeys, caplog: pytest.LogCaptureFixture
) -> None:
    """The one method that goes on with other random numbers says so."""
    travel = journey(config=lambda: EVERY_METHOD["monteclora"].config("encoder"))
    travel.seeded("parts", Stop("after_evaluation", 2))
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        assert len(travel.resumed("parts").losses) == 2 * BATCHES
    assert "draws its noise ahead" in caplog.text


def test_training_with_no_epoch_left_keeps_its_state(journey: Journeys) -> None:
    """Resuming a finished training trains nothing, and more epochs can still be added later."""
    travel = journey()
    travel.seeded("parts")
    before = read_state(travel.root / "parts" / "final-model.pt")
    assert travel.resumed("parts").losses == []
    after = read_state(travel.root / "parts" / "final-model.pt")
    assert after["progress"] == before["progress"]
    assert after["optimizer"]["groups"] == before["optimizer"]["groups"]
    assert_same_tensors(flatten(before["optimizer"]["state"]), flatten(after["optimizer"]["state"]))


def flatten(state: State) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": value for name, entry in state.items() for key, value in entry.items()}


def test_more_epochs_than_planned_are_said_and_trained(journey: Journeys, caplog: pytest.LogCaptureFixture) -> None:
    """Other settings than before are followed or overruled, and the user is told which."""
    travel = journey()
    travel.seeded("parts")
    travel.options |= {"max_epochs": EPOCHS + 1, "weight_decay": 0.5, "warmup_fraction": 0.2}
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        assert len(travel.resumed("parts").losses) == BATCHES
    assert f"max_epochs was {EPOCHS}, is {EPOCHS + 1} now. It goes on with those given now." in caplog.text
    assert "weight_decay was 0.01, is 0.5 now. It goes on with those that it had." in caplog.text


def test_trainer_that_trained_before_keeps_the_state_of_the_last_training(journey: Journeys) -> None:
    """Flair leaves plugins of earlier trainings attached; their states are not those of this one."""
    travel = journey()
    model = travel.build()
    trainer = ModelTrainer(model, travel.entry.corpus())
    for name in ("first", "parts"):
        stop = [Stop("after_evaluation", 2)] if name == "parts" else []
        trainer.fine_tune(travel.root / name, plugins=stop, save_optimizer_state=True, **travel.options)
    state = read_state(travel.root / "parts" / "final-model.pt")
    assert [plugin["class"].rpartition(".")[2] for plugin in state["plugins"]] == ["LinearSchedulerPlugin"]
    assert len(travel.resumed("parts").losses) == 2 * BATCHES


def test_plugin_of_the_user_with_a_state_is_restored(journey: Journeys) -> None:
    """A plugin that has state_dict and load_state_dict gets its own state back."""

    class Counter(TrainerPlugin):
        counted = 0

        @TrainerPlugin.hook
        def after_training_batch(self, **_: Any) -> None:
            self.counted += 1

        def state_dict(self) -> State:
            return {"counted": self.counted}

        def load_state_dict(self, state: State) -> None:
            self.counted = state["counted"]

    counters: list[Counter] = []
    travel = journey(plugins=lambda: counters.append(Counter()) or [counters[-1]])
    travel.seeded("parts", Stop("after_evaluation", 2))
    travel.resumed("parts")
    assert counters[-1].counted == EPOCHS * BATCHES


def test_state_of_a_plugin_that_no_file_can_hold_is_said(journey: Journeys, caplog: pytest.LogCaptureFixture) -> None:
    """It costs neither the file nor the training."""

    class Opaque(TrainerPlugin):
        def state_dict(self) -> State:
            return {"value": object()}

        def load_state_dict(self, state: State) -> None:
            raise NotImplementedError

    travel = journey(plugins=lambda: [Opaque()])
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        travel.seeded("parts", Stop("after_evaluation", 1))
    assert "Opaque starts anew if this training is resumed" in caplog.text
    travel.resumed("parts")


class Wide(torch.optim.SGD):
    """Keeps sums in double precision, whatever the dtype of its parameters."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    total = state.setdefault("total", torch.zeros_like(parameter, dtype=torch.float64))
                    total += parameter.grad
                    parameter.data -= group["lr"] * total.to(parameter.dtype)


def test_state_of_an_optimiser_keeps_its_own_dtype(journey: Journeys) -> None:
    """torch casts a restored state to the dtype of the parameter; what was wider stays so."""
    journey(optimizer=Wide, learning_rate=1e-3).compare(Stop("after_evaluation", 2))


def test_state_given_as_a_dictionary_is_left_as_it_is(journey: Journeys) -> None:
    """One state can start several trainings, each of which does the same."""
    travel = journey()
    travel.seeded("parts", Stop("after_evaluation", 2))
    path = travel.root / "parts" / "final-model.pt"
    shutil.copy(path, travel.root / "kept.pt")
    state = read_state(path)
    runs = [travel.train(Model.load(travel.root / "kept.pt"), "parts", ResumePlugin(state)).losses for _ in range(2)]
    assert runs[0] == runs[1]
    assert len(runs[0]) == 2 * BATCHES


def test_plain_copies_hold_nothing_of_what_they_were_made_of() -> None:
    """Whatever kind of list or tuple something stands in, it is looked at and copied."""
    pair = collections.namedtuple("pair", "first second")
    tensor = torch.ones(2)
    found = trainer_state.plain({"kept": pair(tensor, [1, (2,)])}, "x")
    assert_plain(found)
    tensor.zero_()
    assert found["kept"][0].tolist() == [1.0, 1.0]
    assert found["kept"][1] == [1, (2,)]
    with pytest.raises(UnsupportedStateError, match="object"):
        trainer_state.plain(pair(object(), 1), "x")


def test_state_of_all_random_generators_is_plain_and_comes_back() -> None:
    """torch, Python and numpy draw again what they drew."""

    def draw() -> list[float]:
        return [random.gauss(0, 1), random.random(), float(np.random.randn()), float(torch.rand(1))]

    random.gauss(0, 1)
    np.random.randn()
    state = trainer_state.random_state()
    assert_plain(state)
    drawn = draw()
    trainer_state.set_random_state(state)
    assert draw() == drawn


@pytest.fixture
def stopped(journey: Journeys) -> Journey:
    """Return a journey that stopped after its second epoch."""
    travel = journey()
    travel.seeded("parts", Stop("after_evaluation", 2))
    return travel


def test_plugin_that_a_training_had_is_refused_in_another(stopped: Journey) -> None:
    """As where a cell of a notebook is run again: its state went into the first."""
    path = stopped.root / "parts" / "final-model.pt"
    first, second, plugin = Model.load(path), Model.load(path), ResumePlugin(path)
    stopped.train(first, "first", plugin)
    with pytest.raises(TrainingSetupError, match="twice with one ResumePlugin"):
        stopped.train(second, "second", plugin)
    stopped.train(second, "second", ResumePlugin(path))


def test_state_of_an_older_version_on_a_16_bit_base_goes_on(journey: Journeys) -> None:
    """Its optimiser kept its averages in the dtype of the parameters, and no sums."""
    travel = journey(config=CONFIGS["trained norms"], dtype=torch.bfloat16)
    travel.seeded("parts", Stop("after_evaluation", 2))
    path = travel.root / "parts" / "final-model.pt"
    state = read_state(path)
    assert state["optimizer"].pop("exact")
    for name, entry in state["optimizer"]["state"].items():
        if state["optimizer"]["parameters"][name]["dtype"] == "torch.bfloat16":
            entry.update({key: tensor.bfloat16() for key, tensor in entry.items() if key != "step"})
    model = Model.load(path)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "LayerNorm" in name}
    travel.train(model, "parts", ResumePlugin(state))
    after = dict(model.named_parameters())
    assert any(not torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_file_without_a_state_is_refused(stopped: Journey) -> None:
    """The message says which option was missing."""
    path = stopped.root / "parts" / "final-model.pt"
    Model.load(path).save(stopped.root / "plain.pt")
    with pytest.raises(TrainingSetupError, match=r"holds no training state.*save_optimizer_state=True"):
        ResumePlugin(stopped.root / "plain.pt")
    with pytest.raises(ModelFileError, match="there is no such file"):
        ResumePlugin(stopped.root / "nothing.pt")


def test_state_of_a_newer_version_is_refused(stopped: Journey) -> None:
    """A state that this version does not understand is not guessed at."""
    state = read_state(stopped.root / "parts" / "final-model.pt")
    with pytest.raises(FormatVersionError, match="Install a newer flair_peft"):
        ResumePlugin({**state, "version": resume.STATE_VERSION + 1})


def test_other_optimiser_is_refused(stopped: Journey) -> None:
    """Momentum of one optimiser means nothing to another."""
    stopped.options["optimizer"] = torch.optim.SGD
    with pytest.raises(TrainingSetupError, match=r"AdamW, not torch\.optim\.sgd\.SGD"):
        stopped.resumed("parts")


def test_other_schedule_is_refused(stopped: Journey) -> None:
    """A scheduler that is not there any more is missed."""
    stopped.schedule = "train"
    stopped.options = {"max_epochs": EPOCHS, "mini_batch_size": BATCH, "optimizer": torch.optim.AdamW}
    with pytest.raises(TrainingSetupError, match="LinearSchedulerPlugin"):
        stopped.resumed("parts")


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (lambda: LoraConfig(r=5, target_modules=["query", "value"]), r"of another shape: .*\(\[5, 32\] instead of"),
        (lambda: LoraConfig(r=4, target_modules=["query"]), "trained before but not now"),
        (lambda: LoraConfig(r=4, target_modules=["query", "key", "value"]), "trained now but not before"),
    ],
    ids=["shape", "missing", "additional"],
)
def test_other_parameters_are_refused(config: Callable[[], PeftConfig], found: str, stopped: Journey) -> None:
    """A model that is not the one of the file is named with what differs."""
    stopped.config = config
    plugin = ResumePlugin(stopped.root / "parts" / "final-model.pt")
    with pytest.raises(TrainingSetupError, match=found):
        stopped.train(stopped.build(), "parts", plugin)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("start", ["new", "of another file"])
def test_other_weights_are_refused(start: str, dtype: torch.dtype, journey: Journeys) -> None:
    """A model that was not loaded, or from another file of the same training, would train on to something else."""
    travel = journey(dtype=dtype, save_model_each_k_epochs=1)
    travel.seeded("parts", Stop("after_evaluation", 2))
    folder = travel.root / "parts"
    model = travel.build() if start == "new" else Model.load(folder / "model_epoch_1.pt")
    with pytest.raises(TrainingSetupError, match=r"parameters have other values than there, .*loaded from that very"):
        travel.train(model, "parts", ResumePlugin(folder / "final-model.pt"))
    assert len(travel.resumed("parts").losses) == 2 * BATCHES


def test_other_first_epoch_is_refused(stopped: Journey) -> None:
    """The epoch need not be given, and one that contradicts the checkpoint is an error."""
    stopped.options["epoch"] = 3
    with pytest.raises(TrainingSetupError, match="pass epoch=2"):
        stopped.resumed("parts")
    stopped.options["epoch"] = 2
    assert len(stopped.resumed("parts").losses) == 2 * BATCHES


def test_two_checkpoints_for_one_training_are_refused(stopped: Journey) -> None:
    """A training has one past."""
    path = stopped.root / "parts" / "final-model.pt"
    plugins = [ResumePlugin(path) for _ in range(2)]
    with pytest.raises(TrainingSetupError, match="2 checkpoints"):
        stopped.train(Model.load(path), "parts", *plugins)


def test_training_that_nothing_followed_has_no_state(stopped: Journey) -> None:
    """Outside a training there is no epoch to keep."""
    model = stopped.build()
    with pytest.raises(TrainingSetupError, match="no ProgressPlugin"):
        resume.training_state(ModelTrainer(model, stopped.entry.corpus()), model)


def test_optimiser_whose_state_no_file_can_hold_is_refused(stopped: Journey) -> None:
    """What cannot be kept is named."""
    model = stopped.build()
    trainer = ModelTrainer(model, stopped.entry.corpus())
    position.ProgressPlugin().attach_to(trainer)
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    trainer.optimizer.state[parameter] = {"closure": print}
    with pytest.raises(UnsupportedStateError, match="builtin_function_or_method"):
        resume.training_state(trainer, model)


class _LearnsMore(TrainerPlugin):
    """Gives the optimiser a parameter that is not the model's, as losses with weights of their own do."""

    @TrainerPlugin.hook
    def before_training_epoch(self, epoch: int, **_: Any) -> None:
        if epoch == 1:
            self.weight = torch.nn.Parameter(torch.ones(1))
            self.trainer.optimizer.add_param_group({"params": [self.weight]})


class _HasMore(torch.optim.SGD):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "slow": {}}


class _KeepsByName(torch.optim.SGD):
    """As PEFT's LoRA-FA does."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        self.state["lora"] = {"step": 1}
        return super().step(closure)


@pytest.mark.parametrize(
    ("plugins", "options", "words"),
    [
        ([_LearnsMore()], {"attach_default_scheduler": False}, "1 parameters that are not the model's"),
        ([], {"optimizer": _HasMore}, "1 parts that other optimisers do not have"),
        ([], {"optimizer": _KeepsByName}, "1 entries of its state that belong to none of them"),
    ],
    ids=["parameter", "part", "entry"],
)
def test_model_whose_optimiser_keeps_more_is_saved_without_a_state(
    plugins: list[TrainerPlugin],
    options: dict[str, Any],
    words: str,
    journey: Callable[..., Journey],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A training ends with its model saved, and none goes on from less than there was."""
    travel = journey(**options)
    with caplog.at_level(logging.WARNING, "flair_peft"):
        travel.seeded("whole", *plugins)
    path = travel.root / "whole" / "final-model.pt"
    assert f"'{path}' holds the model alone" in caplog.text
    assert words in caplog.text
    Model.load(path)
    with pytest.raises(TrainingSetupError, match="holds no training state"):
        ResumePlugin(path)


class _OwnSchedule(TrainerPlugin):
    """Keeps its scheduler under a name of its own."""

    @TrainerPlugin.hook
    def after_setup(self, optimizer: Any = None, **_: Any) -> None:
        self.cosine = torch.optim.lr_scheduler.CosineAnnealingLR(self.trainer.optimizer, T_max=EPOCHS, eta_min=1e-5)

    @TrainerPlugin.hook
    def after_training_epoch(self, **_: Any) -> None:
        self.cosine.step()


def test_scheduler_goes_on_whatever_it_is_called(journey: Callable[..., Journey]) -> None:
    """In a plugin of one's own."""
    journey(plugins=lambda: [_OwnSchedule()], schedule="train").compare(Stop("after_evaluation", 2))
