"""Flair's own trainer, unchanged, over embeddings with an adapter."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.embeddings import TransformerDocumentEmbeddings
from flair.models import TextClassifier
from flair.nn import Classifier
from flair.nn.multitask import make_multitask_model_and_corpus
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from flair.trainers.plugins.functional.reduce_transformer_vocab import ReduceTransformerVocabPlugin
from peft import (
    AdaLoraConfig,
    IA3Config,
    LNTuningConfig,
    PeftConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
)
from peft.tuners.lora.config import KasaConfig, MontecloraConfig
from transformers import Adafactor

import flair_peft
from flair_peft import (
    AuxiliaryLossPlugin,
    LoraPlusPlugin,
    PeftTransformerWordEmbeddings,
    RankAllocationPlugin,
)
from flair_peft.errors import AdapterConfigError, TrainingSetupError
from tests.support import round_trip
from tests.support.configs import lora
from tests.support.opinions import classifier, opinion_corpus, opinions, train
from tests.support.zoo import ZOO


def scores(model: TextClassifier) -> list[float]:
    sentences = opinions()
    model.eval()
    model.predict(sentences, label_name="predicted", return_probabilities_for_all_classes=True)
    return [label.score for sentence in sentences for label in sentence.get_labels("predicted")]


class Watch(TrainerPlugin):
    """Calls a function of the trainer at each event of one kind."""

    def __init__(self, event: str, look: Callable[[ModelTrainer], None]) -> None:
        super().__init__()
        self.event, self.look = event, look

    def attach_to(self, pluggable: Any) -> None:
        super().attach_to(pluggable)
        self._hook_handles.append(pluggable.register_hook(lambda **_: self.look(self.trainer), self.event))


def test_adapter_trained_by_fine_tune_learns(base: Callable[[str], str], tmp_path: Path) -> None:
    """A few epochs turn an untrained classifier into one that knows its training sentences."""
    model = classifier(base("bert"))
    result = train(model, tmp_path, max_epochs=8)
    assert result["test_score"] > 0.9


def test_frozen_parameters_get_neither_gradient_nor_state_nor_decay(base: Callable[[str], str], tmp_path: Path) -> None:
    """The optimiser keeps state for the adapter and the head only, and the base keeps its very values."""
    model = classifier(base("bert"))
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    seen: list[set[int]] = []

    def look(trainer: ModelTrainer) -> None:
        assert all(p.grad is None for name, p in model.named_parameters() if name in frozen)
        seen.append({id(p) for p in trainer.optimizer.state})

    train(model, tmp_path, plugins=[Watch("after_training_batch", look)], weight_decay=0.5)
    assert seen[-1] == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)


@pytest.mark.parametrize("start", ["train", "fine_tune"])
def test_reported_scores_are_those_of_the_current_weights(
    start: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Dev losses reported after each epoch equal those computed on sentences that never stored a vector."""
    model = classifier(base("bert"))
    reported, fresh = [], []

    def look(trainer: ModelTrainer) -> None:
        result = model.evaluate(opinions(), gold_label_type="opinion")
        fresh.append(result.loss)

    class Reported(TrainerPlugin):
        @TrainerPlugin.hook
        def after_evaluation(self, validation_scores: tuple[float, float], **_: Any) -> None:
            reported.append(validation_scores[1])

    plugins = [Watch("after_evaluation", look), Reported()]
    trainer = ModelTrainer(model, opinion_corpus())
    getattr(trainer, start)(tmp_path, learning_rate=1e-2, max_epochs=3, mini_batch_size=8, plugins=plugins)
    assert len(set(reported)) == 3
    assert reported == pytest.approx(fresh, rel=1e-5)


def test_reported_scores_of_pooled_word_embeddings_are_those_of_the_current_weights(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Stock embeddings over ours do not hand out vectors of the first epoch either."""
    entry = ZOO["text-classifier-rnn"]
    factories = round_trip.Factories(base("bert"), lora())
    model = entry.build(factories.words, factories.documents)
    losses: list[tuple[float, float]] = []
    corpus = entry.corpus()

    class Compare(TrainerPlugin):
        @TrainerPlugin.hook
        def after_evaluation(self, validation_scores: tuple[float, float], **_: Any) -> None:
            fresh = model.evaluate(entry.corpus().dev, gold_label_type=model.label_type)
            losses.append((validation_scores[1], fresh.loss))

    ModelTrainer(model, corpus).train(tmp_path, learning_rate=0.1, max_epochs=3, plugins=[Compare()])
    assert len({reported for reported, _ in losses}) == 3
    for reported, fresh in losses:
        assert reported == pytest.approx(fresh, rel=1e-5)


def test_best_model_is_reloaded_into_the_live_one(base: Callable[[str], str], tmp_path: Path) -> None:
    """After training, the live model holds the best epoch's weights in the very tensors that it had."""
    model = classifier(base("bert"))
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    train(model, tmp_path, max_epochs=3, use_final_model_for_eval=False)
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    assert scores(model) == scores(Classifier.load(tmp_path / "best-model.pt"))


def test_scores_in_the_card_are_those_of_the_best_model_that_is_reloaded(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """What is published beside the weights is of their epoch."""
    seen: list[tuple[float, ...]] = []

    class Worse(TrainerPlugin):
        @TrainerPlugin.hook
        def before_training_epoch(self, epoch: int, **_: Any) -> None:
            if epoch == 3:
                with torch.no_grad():
                    self.model.decoder.weight.mul_(-1)

        @TrainerPlugin.hook
        def after_evaluation(self, validation_scores: tuple[float, ...], **_: Any) -> None:
            seen.append(validation_scores)

    model = classifier(base("bert"))
    train(model, tmp_path, max_epochs=3, use_final_model_for_eval=False, plugins=[Worse()])
    best = max(range(3), key=lambda epoch: seen[epoch][0])
    assert best < 2
    found = model.model_card["scores"]
    assert (found["epoch"], found["dev score"]) == (best + 1, seen[best][0])
    assert model.evaluate(opinions(), gold_label_type="opinion").main_score == pytest.approx(seen[best][0])


@pytest.mark.parametrize("start", ["train", pytest.param("fine_tune", marks=pytest.mark.matrix)])
def test_best_model_is_reloaded_where_embeddings_have_several_places(
    start: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Tasks of a multitask model share embeddings, and what a file leaves out is missing under each of their names."""
    entry = ZOO["multitask"]
    torch.manual_seed(1)
    shared = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    model, corpus = entry.build(lambda **_: shared, None), entry.corpus()
    others = {} if start == "train" else {"use_final_model_for_eval": False}
    getattr(ModelTrainer(model, corpus), start)(tmp_path, max_epochs=3, mini_batch_size=2, learning_rate=0.02, **others)
    assert (tmp_path / "best-model.pt").is_file()
    loaded = entry.model_class.load(tmp_path / "best-model.pt")
    assert entry.predict(model, corpus) == entry.predict(loaded, corpus)


def test_every_file_of_a_training_loads(base: Callable[[str], str], tmp_path: Path) -> None:
    """Best, final and epoch models load, also where the optimiser's state was asked for."""
    model = classifier(base("bert"))
    train(model, tmp_path, use_final_model_for_eval=False, save_model_each_k_epochs=1, save_optimizer_state=True)
    files = sorted(path.name for path in tmp_path.glob("*.pt"))
    assert files == ["best-model.pt", "final-model.pt", "model_epoch_1.pt", "model_epoch_2.pt"]
    assert scores(Classifier.load(tmp_path / "model_epoch_1.pt")) != scores(Classifier.load(tmp_path / files[1]))
    assert scores(Classifier.load(tmp_path / "model_epoch_2.pt")) == scores(Classifier.load(tmp_path / files[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{"use_amp": True}, {"mini_batch_chunk_size": 3}, {"decoder_learning_rate": 0.1}, {"train_with_dev": True}],
    ids=lambda options: next(iter(options)),
)
def test_trainer_option_works_with_an_adapter(
    options: dict[str, Any], dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Flair's own options train the adapter and leave a file that predicts the same."""
    model = classifier(base("bert"), dtype=dtype)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}
    train(model, tmp_path, **options)
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
    difference = round_trip.largest_difference(scores(model), scores(Classifier.load(tmp_path / "final-model.pt")))
    assert difference <= round_trip.SCORE_TOLERANCE[dtype]


def test_gradient_checkpointing_changes_no_gradient(base: Callable[[str], str]) -> None:
    """Checkpointing switched on after the adapter was added still passes gradients to every layer."""
    gradients = []
    for checkpointing in (False, True):
        model = classifier(base("bert"))
        if checkpointing:
            model.embeddings.model.gradient_checkpointing_enable()
        model.train()
        model.forward_loss(opinions()[:4])[0].backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert any("lora_A" in name for name in gradients[0])
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name])


def test_reducing_the_vocabulary_is_refused_with_an_adapter_only(base: Callable[[str], str], tmp_path: Path) -> None:
    """A frozen matrix gains nothing from it; stock models still may."""
    by_hand = ReduceTransformerVocabPlugin(base_path=tmp_path, save_optimizer_state=False)
    for settings in ({"reduce_transformer_vocab": True}, {"plugins": [by_hand]}):
        with pytest.raises(TrainingSetupError, match="frozen"):
            train(classifier(base("bert")), tmp_path, **settings)
    dictionary = opinion_corpus().make_label_dictionary("opinion", add_unk=False)
    stock = TextClassifier(
        TransformerDocumentEmbeddings(base("bert")), label_dictionary=dictionary, label_type="opinion"
    )
    train(stock, tmp_path / "stock", reduce_transformer_vocab=True, max_epochs=1)


def test_adapter_that_cannot_learn_is_said_at_once(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``fine_tune=False`` embeds without gradient: said when embeddings are made, and again at the first step."""
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        model = classifier(base("bert"), fine_tune=False)
    assert "cannot learn" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path, max_epochs=1)
    assert "learns nothing" in caplog.text
    assert caplog.text.count("learns nothing") == 1


def test_model_with_something_wrapped_around_it_is_refused_for_that(base: Callable[[str], str], tmp_path: Path) -> None:
    """Before a training and by a save, with what to do, and it works again once that is done."""
    model = classifier(base("bert"))
    model.embeddings.model = torch.nn.DataParallel(model.embeddings.model)
    with pytest.raises(AdapterConfigError, match=r"a DataParallel is wrapped around .*embeddings\.model\.module"):
        train(model, tmp_path)
    with pytest.raises(AdapterConfigError, match="a DataParallel is wrapped"):
        model.save(tmp_path / "model.pt")
    model.embeddings.model = model.embeddings.model.module
    train(model, tmp_path, max_epochs=1)


def test_adapter_that_is_multiplied_with_zero_is_said_at_once(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``lora_alpha=0`` is said when embeddings are made, and again when a training starts."""
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        model = classifier(base("bert"), peft_config=lora(lora_alpha=0))
    assert caplog.text.count("has no effect on 4 modules") == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path, max_epochs=1)
    assert caplog.text.count("has no effect on 4 modules") == 1


def test_model_that_diverged_is_saved_and_loaded_with_a_word(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Nothing that a training ends with is lost, and what is NaN is named when it is saved and when it is loaded."""
    model = classifier(base("bert"))
    diverged = next(name for name, _ in model.named_parameters() if "lora_A" in name)
    with torch.no_grad():
        dict(model.named_parameters())[diverged][0, 0] = torch.nan
        model.decoder.bias[0] = torch.inf
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        model.save(tmp_path / "model.pt")
        flair_peft.save_pretrained(model, tmp_path / "model")
    assert caplog.text.count("NaN or infinite numbers in 2 of ") == 2
    caplog.clear()
    for path in (tmp_path / "model.pt", tmp_path / "model"):
        with caplog.at_level(logging.WARNING, logger="flair_peft"):
            Classifier.load(path)
        said = next(record.getMessage() for record in caplog.records[::-1] if "NaN" in record.getMessage())
        assert said.startswith(f"'{path}' holds NaN")
        assert "'decoder.bias'" in said
        assert "query.lora_A" in said


def adalora(total_step: int, **options: Any) -> AdaLoraConfig:
    settings = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "deltaT": 1, "lora_alpha": 12, **options}
    return AdaLoraConfig(total_step=total_step, target_modules=["query", "value"], init_lora_weights=False, **settings)


def active_ranks(model: TextClassifier) -> int:
    """Return how many singular values AdaLoRA has not masked."""
    values = [p for name, p in model.named_parameters() if "lora_E" in name]
    return sum(int((value != 0).sum()) for value in values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adalora_with_its_plugin_shrinks_its_ranks(
    dtype: torch.dtype, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The budget falls from the initial to the target rank, and the masked ranks come back from the file."""
    model = classifier(base("bert"), peft_config=adalora(12), dtype=dtype)
    layers, at_start = 4, active_ranks(model)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path, max_epochs=3, plugins=[RankAllocationPlugin()])
    assert caplog.text == ""
    assert at_start == layers * 6
    assert active_ranks(model) == layers * 2
    assert active_ranks(Classifier.load(tmp_path / "final-model.pt")) == layers * 2


def test_adalora_without_its_plugin_says_so_at_the_first_step(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its ranks stay as they are, which the user is told once and with what to do."""
    model = classifier(base("bert"), peft_config=adalora(8))
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path)
    assert caplog.text.count("RankAllocationPlugin()") == 1
    assert active_ranks(model) == 4 * 6


def test_adalora_with_another_schedule_than_the_training_says_so(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """``total_step`` is compared with batches × epochs."""
    model = classifier(base("bert"), peft_config=adalora(99))
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path, plugins=[RankAllocationPlugin()])
    assert "total_step=99" in caplog.text
    assert "Pass total_step=8" in caplog.text


def test_adalora_is_pushed_towards_orthogonal_factors(base: Callable[[str], str], tmp_path: Path) -> None:
    """The penalty that PEFT adds to a loss of its own reaches the gradient."""
    distances = {}
    for weight in (0.0, 50.0):
        model = classifier(base("bert"), peft_config=adalora(40, orth_reg_weight=weight))
        options = {"max_epochs": 10, "learning_rate": 3e-2, "max_grad_norm": None}
        train(model, tmp_path / str(weight), plugins=[RankAllocationPlugin()], **options)
        factors = [p.detach() @ p.detach().T for name, p in model.named_parameters() if "lora_A" in name]
        distances[weight] = sum(float(torch.norm(f - torch.eye(len(f)))) for f in factors)
    assert distances[50.0] < 0.5 * distances[0.0]


LOSSES: dict[str, tuple[dict[str, Any], str]] = {
    "kasa": ({"kasa_config": KasaConfig(beta=0.3, gamma=0.2)}, "_get_kasa_loss"),
    "monteclora": (
        {"monteclora_config": MontecloraConfig(num_samples=3, kl_loss_weight=0.1, use_entropy=True)},
        "_get_monteclora_loss",
    ),
}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_peft_leaves_to_the_loop_are_trained_with(
    name: str, chunk: int | None, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first step is that of a loop which adds what PEFT computes to the loss of the batch."""
    options, method = LOSSES[name]
    models = [classifier(base("bert"), peft_config=lora(**options)) for _ in range(2)]
    trained, expected = ({n: p for n, p in model.named_parameters() if p.requires_grad} for model in models)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(
            models[0],
            tmp_path,
            max_epochs=1,
            optimizer=torch.optim.SGD,
            mini_batch_size=64,
            mini_batch_chunk_size=chunk,
            learning_rate=0.1,
            decoder_learning_rate=0.1,
            warmup_fraction=0.0,
            max_grad_norm=None,
            shuffle=False,
            plugins=[AuxiliaryLossPlugin(), Seed()],
        )
    assert "is not part" not in caplog.text
    assert "forward_loss" not in vars(models[0])
    points = [*opinion_corpus().train]
    models[1].train()
    torch.manual_seed(3)
    for start in range(0, len(points), chunk or len(points)):
        part = points[start : start + (chunk or len(points))]
        loss, count = models[1].forward_loss(part)
        (loss + count * getattr(models[1].embeddings.model.base_model, method)()).backward()
    assert any("lora_A" in key and parameter.grad.any() for key, parameter in expected.items())
    for key, parameter in expected.items():
        torch.testing.assert_close(trained[key], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=1e-6, msg=key)


def test_copy_of_a_model_in_training_computes_with_its_own_weights(base: Callable[[str], str], tmp_path: Path) -> None:
    """A teacher, or a mean of weights, learns nothing into the model that it was copied of, and can train later."""
    copies: list[TextClassifier] = []

    def look(trainer: ModelTrainer) -> None:
        if not copies:
            before = [p.grad.clone() for p in trainer.model.parameters() if p.grad is not None]
            copies.append(copy.deepcopy(trainer.model))
            copies[0].zero_grad()
            copies[0].forward_loss(opinions()[:4])[0].backward()
            after = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            assert all(map(torch.equal, before, after))
            assert any(p.grad is not None for p in copies[0].parameters())

    model = classifier(base("bert"), peft_config=adalora(total_step=8))
    watch = Watch("before_training_optimizer_step", look)
    train(model, tmp_path / "first", plugins=[RankAllocationPlugin(), watch])
    train(copies[0], tmp_path / "second", plugins=[RankAllocationPlugin()])
    assert scores(copies[0]) != scores(model)


class Seed(TrainerPlugin):
    """Draws the same numbers in the first batch as a loop that begins with it."""

    @TrainerPlugin.hook
    def before_training_batch(self, **_: Any) -> None:
        torch.manual_seed(3)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_that_nobody_adds_are_said(
    name: str, base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, at the first step; not where they are switched off."""
    options, _ = LOSSES[name]
    off = {"kasa_config": KasaConfig(beta=0.0, gamma=0.0)}
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(classifier(base("bert"), peft_config=lora(**off)), tmp_path / "off", max_epochs=1)
        assert "is not part" not in caplog.text
        train(classifier(base("bert"), peft_config=lora(**options)), tmp_path / "on")
    assert caplog.text.count(f"'{name}_config' in the config of '{base('bert')}' is not part of this training") == 1


@pytest.mark.parametrize("start", ["train", "fine_tune"])
def test_list_of_plugins_serves_several_trainings(start: str, base: Callable[[str], str], tmp_path: Path) -> None:
    """Flair appends its scheduler to the list: each training has one of them, and the list is as it was."""
    found: list[list[str]] = []
    plugins: list[TrainerPlugin] = [LoraPlusPlugin(1.0)]
    for number in range(3):
        folder = tmp_path / str(number)
        trainer = ModelTrainer(classifier(base("bert")), opinion_corpus())
        options, rate = ({"patience": 0, "anneal_factor": 0.5}, 2.0) if start == "train" else ({}, 1e-3)
        getattr(trainer, start)(folder, max_epochs=4, learning_rate=rate, plugins=plugins, **options)
        found.append([line.split("\t")[2] for line in (folder / "loss.tsv").read_text().splitlines()[1:]])
    assert len(plugins) == 1
    assert len(set(found[0])) > 1
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    ("plugin", "config"),
    [
        (RankAllocationPlugin, lora),
        (AuxiliaryLossPlugin, lora),
        (LoraPlusPlugin, lambda: IA3Config(target_modules=["query", "output.dense"], feedforward_modules=[])),
    ],
)
def test_plugin_that_has_nothing_to_do_says_so(
    plugin: type[TrainerPlugin],
    config: Callable[[], PeftConfig],
    base: Callable[[str], str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As methods do that miss their plugin; the training is as without it."""
    weights = []
    for count in (0, 1):
        model = classifier(base("bert"), peft_config=config())
        with caplog.at_level(logging.WARNING, logger="flair_peft"):
            plugins = [plugin() for _ in range(count)]
            train(model, tmp_path / str(count), max_epochs=1, plugins=plugins, shuffle=False)
        weights.append({name: p for name, p in model.named_parameters() if p.requires_grad})
        assert caplog.text.count(f"{plugin.__name__} has nothing to do") == count
    for name, parameter in weights[0].items():
        torch.testing.assert_close(parameter, weights[1][name])


def test_first_batches_of_another_task_say_nothing_of_an_adapter(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of several adapters, each is asked when it first learns, or at the end of the first epoch."""
    model, corpus = make_multitask_model_and_corpus(
        [(classifier(base("bert")), opinion_corpus()), (classifier(base("bert")), opinion_corpus())]
    )
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        ModelTrainer(model, corpus).fine_tune(tmp_path / "both", max_epochs=1, mini_batch_size=1)
    assert "learns nothing" not in caplog.text
    embeddings = model.tasks["Task_1"].embeddings
    embeddings._add_embeddings_internal = torch.no_grad()(embeddings._add_embeddings_internal)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        ModelTrainer(model, corpus).fine_tune(tmp_path / "one", max_epochs=2, mini_batch_size=4)
    assert caplog.text.count("learns nothing") == 1
    assert "pass fine_tune=True" not in caplog.text


def test_first_batch_without_anything_to_learn_from_says_nothing_of_the_adapter(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as one of sentences without a pair of entities, whose loss no parameter reaches."""
    model = classifier(base("bert"))
    forward_loss, calls = model.forward_loss, iter(range(100))

    def empty_first(points: Any) -> Any:
        empty = torch.zeros((), requires_grad=True), 1
        return forward_loss(points) if next(calls) else empty

    model.forward_loss = empty_first
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(model, tmp_path)
    assert next(calls) > 2
    assert "learns nothing" not in caplog.text


def scaling(monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Let Flair scale losses as ``use_amp=True`` makes it do on a GPU."""
    monkeypatch.setattr(torch.cuda.amp, "GradScaler", lambda **_: torch.amp.GradScaler("cpu", **options))


@pytest.mark.parametrize("chunk", [None, 3])
def test_adalora_is_penalised_the_same_whether_the_loss_is_scaled(
    chunk: int | None, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The penalty is scaled with the loss, once for each batch, and the reported loss is that of the model."""
    trained, reported = [], []
    for name in ("plain", "scaled", "in parts"):
        model = classifier(base("bert"), peft_config=adalora(8, orth_reg_weight=5.0))
        with monkeypatch.context() as patch:
            if name != "plain":
                scaling(patch, init_scale=2.0**12, growth_interval=2)
            part = chunk if name == "in parts" else None
            options = {"mini_batch_chunk_size": part, "optimizer": torch.optim.SGD, "learning_rate": 1e-2}
            train(model, tmp_path / name, plugins=[RankAllocationPlugin()], shuffle=False, **options)
        trained.append({n: p.detach() for n, p in model.named_parameters() if p.requires_grad})
        reported.append((tmp_path / name / "loss.tsv").read_text().splitlines()[1].split("\t")[3])
        assert "forward_loss" not in vars(model)
    for name, expected in trained[0].items():
        torch.testing.assert_close(trained[1][name], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(trained[2][name], expected, rtol=1e-4, atol=1e-6)
    assert reported[0] == reported[1] == reported[2]


def test_adalora_does_not_learn_importance_of_a_step_that_was_skipped(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Infinite gradients of a loss that was scaled too high are neither counted nor averaged."""
    scaling(monkeypatch, init_scale=2.0**126, backoff_factor=2.0**-110)
    model, plugin, run = classifier(base("bert"), peft_config=adalora(99)), RankAllocationPlugin(), []

    class Steps(TrainerPlugin):
        @TrainerPlugin.hook
        def after_training_batch(self, optimizer_was_run: bool, **_: Any) -> None:
            run.append(optimizer_was_run)

    train(model, tmp_path, plugins=[plugin, Steps()])
    assert run[0] is False
    assert plugin._step == sum(run) > 0
    importance = model.embeddings.model.base_model.rankallocator.exp_avg_ipt
    assert importance
    assert all(values.isfinite().all() for values in importance.values())


def test_lora_plus_gives_lora_b_its_own_learning_rate(base: Callable[[str], str], tmp_path: Path) -> None:
    """lora_B learns ``loraplus_lr_ratio`` times as fast as lora_A; the head keeps its own rate, and all are trained."""
    model = classifier(base("bert"))
    rates: list[dict[str, float]] = []

    def look(trainer: ModelTrainer) -> None:
        rate = {id(p): group["lr"] for group in trainer.optimizer.param_groups for p in group["params"]}
        assert len(rate) == sum(len(group["params"]) for group in trainer.optimizer.param_groups)
        rates.append({name: rate[id(p)] for name, p in model.named_parameters() if p.requires_grad})

    plugins = [LoraPlusPlugin(loraplus_lr_ratio=10.0), Watch("after_training_batch", look)]
    train(model, tmp_path, plugins=plugins)
    for step in rates:
        slow = {rate for name, rate in step.items() if "lora_A" in name}
        fast = {rate for name, rate in step.items() if "lora_B" in name}
        head = {rate for name, rate in step.items() if "lora_" not in name}
        assert len(slow) == len(fast) == len(head) == 1
        assert fast.pop() == pytest.approx(10 * min(slow))
        assert head.pop() == pytest.approx(2.5 * min(slow))
    assert len({tuple(step.values()) for step in rates}) > 1


def test_lora_plus_takes_any_optimiser(base: Callable[[str], str], tmp_path: Path) -> None:
    """Also one that cannot be made of a rate alone."""
    model = classifier(base("bert"))
    made = functools.partial(Adafactor, relative_step=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    train(model, tmp_path, optimizer=made, plugins=[LoraPlusPlugin()])
    after = dict(model.named_parameters())
    assert not [name for name, tensor in before.items() if torch.equal(after[name], tensor)]


def test_log_of_a_training_that_failed_at_its_start_is_closed(base: Callable[[str], str], tmp_path: Path) -> None:
    """What the next training says stands in its own log alone."""
    model = classifier(base("bert"))
    model.decoder.bfloat16()
    with pytest.raises(TypeError, match="computes in bfloat16"):
        ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path / "first", max_epochs=1)
    train(classifier(base("bert")), tmp_path / "second", learning_rate=1e-6)
    assert "hardly learns" in (tmp_path / "second/training.log").read_text()
    assert "hardly learns" not in (tmp_path / "first/training.log").read_text()


def test_prefix_projection_survives_the_reload_of_the_best_model(base: Callable[[str], str], tmp_path: Path) -> None:
    """The training-time encoder of the prefix comes back whole, so training goes on after the reload and the load."""
    config = PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16)
    model = classifier(base("bert"), peft_config=config)
    train(model, tmp_path, use_final_model_for_eval=False)
    loaded = Classifier.load(tmp_path / "best-model.pt")
    assert scores(loaded) == scores(model)
    before = {name: p.detach().clone() for name, p in loaded.named_parameters() if "transform" in name}
    train(loaded, tmp_path / "more")
    assert before
    assert all(not torch.equal(p, before[name]) for name, p in loaded.named_parameters() if name in before)


def test_training_after_the_reload_of_the_best_model_starts_from_its_exact_head(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """The trainer's own reload casts nothing: the live head is bit-equal to the one in the file."""
    model = classifier(base("bert"), dtype=torch.bfloat16)
    train(model, tmp_path, use_final_model_for_eval=False)
    stored = torch.load(tmp_path / "best-model.pt", weights_only=False)["state_dict"]
    assert model.decoder.weight.dtype == torch.float32
    assert torch.equal(model.decoder.weight, stored["decoder.weight"])
    loaded = Classifier.load(tmp_path / "best-model.pt")
    assert loaded.decoder.weight.dtype == torch.bfloat16
    assert torch.equal(loaded.train().decoder.weight, stored["decoder.weight"])


def test_head_of_another_dtype_is_named_before_the_training(base: Callable[[str], str], tmp_path: Path) -> None:
    """Converting one part of a model ends in an error that names both sides, not in a failed matrix product."""
    model = classifier(base("bert"))
    model.decoder.bfloat16()
    with pytest.raises(TypeError, match=r"'decoder\.\w+' of the head computes in bfloat16"):
        train(model, tmp_path)


def test_word_embeddings_train_with_their_default_of_long_sentences(base: Callable[[str], str], tmp_path: Path) -> None:
    """A sentence longer than the model trains in windows."""
    model = ZOO["sequence-tagger"].build(
        lambda **kwargs: PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(), **kwargs), None
    )
    corpus = ZOO["sequence-tagger"].corpus()
    corpus.train[0].tokens[0].form = "x" * 200
    ZOO["sequence-tagger"].train(model, corpus, tmp_path)


NARROWED = {
    "lora": lora(),
    "dora": lora(use_dora=True),
    "tokens": lora(trainable_token_indices=[1, 2, 5]),
    "ia3": IA3Config(target_modules=["query", "output.dense"], feedforward_modules=["output.dense"]),
    "prompts": PromptTuningConfig(num_virtual_tokens=3, task_type="FEATURE_EXTRACTION"),
    "adalora": AdaLoraConfig(target_modules=["query"], total_step=20, init_lora_weights=False),
}


@pytest.mark.filterwarnings("ignore:.*update_and_allocate")
@pytest.mark.parametrize("narrow", [pytest.param("half"), pytest.param("bfloat16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("method", NARROWED)
def test_model_in_half_precision_trains_in_fp32(
    method: str, narrow: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """A model that was converted, and one that was loaded from its file: no weight narrow, none NaN, same objects."""
    model = classifier(base("bert"), peft_config=NARROWED[method])
    getattr(model, narrow)()
    model.save(tmp_path / "half.pt")
    loaded = TextClassifier.load(tmp_path / "half.pt")
    assert scores(loaded) == scores(model)
    for number, each in enumerate((model, loaded)):
        before = {name: parameter for name, parameter in each.named_parameters() if parameter.requires_grad}
        values = {name: parameter.detach().float().clone() for name, parameter in before.items()}
        train(each, tmp_path / str(number), max_epochs=1)
        trained = {name: parameter for name, parameter in each.named_parameters() if parameter.requires_grad}
        assert trained.keys() == before.keys()
        assert all(trained[name] is before[name] for name in before)
        assert {parameter.dtype for parameter in trained.values()} == {torch.float32}
        assert all(parameter.isfinite().all() for parameter in trained.values())
        assert any(
            not torch.equal(values[name], parameter) for name, parameter in trained.items() if "decoder" not in name
        )
        again = TextClassifier.load(tmp_path / str(number) / "final-model.pt")
        assert scores(again) == pytest.approx(scores(each), abs=2e-2)


@pytest.mark.parametrize(
    "config", [lora(bias="all"), lora(modules_to_save=["LayerNorm"]), LNTuningConfig(target_modules=["LayerNorm"])]
)
@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_weights_of_the_base_in_fp16_are_refused_before_they_become_nan(
    config: PeftConfig, base: Callable[[str], str], tmp_path: Path
) -> None:
    """With Adam they are NaN after a step; as fp32, which the message names, they train."""
    model = classifier(base("bert"), peft_config=config)
    model.half()
    with pytest.raises(TrainingSetupError, match=r"LayerNorm.*in float16.*model\.float\(\)"):
        train(model, tmp_path, max_epochs=1)
    model.float()
    train(model, tmp_path, max_epochs=1)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_model_in_fp64_trains_in_fp64(base: Callable[[str], str], tmp_path: Path) -> None:
    """Nothing is narrowed by a rule against narrow weights."""
    model = classifier(base("bert")).double()
    train(model, tmp_path, max_epochs=1)
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float64}


@pytest.mark.parametrize(("given", "expected"), [(None, 2e-3), (5e-4, 5e-4)])
def test_loraplus_gives_adapters_of_embeddings_the_rate_of_the_others(
    given: float | None, expected: float, base: Callable[[str], str], tmp_path: Path
) -> None:
    """PEFT's own for them, 1e-6, would leave them where they are in a training as short as Flair's."""
    model = classifier(base("bert"), peft_config=lora(target_modules=["query", "word_embeddings"]))
    rates: list[float] = []

    def look(trainer: ModelTrainer) -> None:
        wanted = {id(p) for name, p in model.named_parameters() if "lora_embedding" in name}
        groups = [g for g in trainer.optimizer.param_groups if wanted & {id(p) for p in g["params"]}]
        rates.extend(group["initial_lr"] for group in groups)

    plugins = [LoraPlusPlugin(loraplus_lr_embedding=given), Watch("before_training_epoch", look)]
    train(model, tmp_path, learning_rate=2e-3, max_epochs=1, plugins=plugins)
    assert rates == [expected]
