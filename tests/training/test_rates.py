"""Learning rates that nobody gave, those that are far from good, and the line that says what is trained."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from flair.embeddings import StackedEmbeddings, TransformerDocumentEmbeddings, TransformerWordEmbeddings
from flair.models import SequenceTagger, TextClassifier
from flair.nn import Model
from flair.trainers import ModelTrainer
from flair.trainers.plugins.base import TrainerPlugin
from peft import IA3Config, OSFConfig, PromptTuningConfig

import flair_peft
from flair_peft import LoraPlusPlugin, PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.adapter import methods
from flair_peft.adapter.traits import LORA_RATE
from flair_peft.training import guard, rates, start_line
from tests.support.configs import lora
from tests.support.opinions import classifier, opinion_corpus, train
from tests.support.quantised import quantised_classifier
from tests.support.round_trip import Factories
from tests.support.selection import few
from tests.support.zoo import ZOO

SUITED_RATE = rates.as_written(LORA_RATE)

Base = Callable[[str], str]
Options = dict[str, Any]


class Mine(torch.optim.Optimizer):
    """An optimiser that may mean another thing by its learning rate."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, _: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign(), alpha=group["lr"])


class Derived(torch.optim.AdamW):
    """An AdamW with something of one's own in it."""


class Rates(TrainerPlugin):
    """Keeps the learning rates of the optimiser's groups before any step."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[float] = []

    @TrainerPlugin.hook("before_training_epoch")
    def look(self, epoch: int, **_: Any) -> None:
        if epoch == 1:
            groups = self.trainer.optimizer.param_groups
            self.found = [group.get("initial_lr", group["lr"]) for group in groups if group["params"]]


def trained(base: Base, folder: Path, *, start: str = "fine_tune", **options: Any) -> tuple[list[float], Any]:
    """Return the rates of the groups, and what a training from the same seed ends with."""
    model, seen = classifier(base("bert")), Rates()
    torch.manual_seed(2)
    settings = {"max_epochs": 1, "mini_batch_size": 8, "plugins": [seen], **options}
    getattr(ModelTrainer(model, opinion_corpus()), start)(folder, **settings)
    return seen.found, {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


ADAMW = {"start": "train", "optimizer": torch.optim.AdamW}

# What is asked for → the rates with which it is the same.
ASKED: dict[str, tuple[Options, Options]] = {
    "nothing": ({}, {"learning_rate": LORA_RATE, "decoder_learning_rate": 1e-2}),
    "the adapter's": ({"learning_rate": 5e-3}, {"learning_rate": 5e-3, "decoder_learning_rate": 1e-2}),
    "Flair's own for it": ({"learning_rate": 5e-5}, {"learning_rate": 5e-5, "decoder_learning_rate": 1e-2}),
    "the head's": ({"decoder_learning_rate": 3e-3}, {"learning_rate": LORA_RATE, "decoder_learning_rate": 3e-3}),
    "train without rates": (ADAMW, {**ADAMW, "learning_rate": LORA_RATE, "decoder_learning_rate": 1e-2}),
    "train_custom without rates": (
        {"start": "train_custom", "optimizer": torch.optim.AdamW},
        {
            "start": "train_custom",
            "optimizer": torch.optim.AdamW,
            "learning_rate": LORA_RATE,
            "decoder_learning_rate": 1e-2,
        },
    ),
    "an optimiser with options": (
        {"optimizer": functools.partial(torch.optim.AdamW, betas=(0.8, 0.99))},
        {
            "optimizer": functools.partial(torch.optim.AdamW, betas=(0.8, 0.99)),
            "learning_rate": LORA_RATE,
            "decoder_learning_rate": 1e-2,
        },
    ),
    "an optimiser made of one": (
        {"optimizer": Derived},
        {"learning_rate": LORA_RATE, "decoder_learning_rate": 1e-2, "optimizer": torch.optim.AdamW},
    ),
    "train": ({**ADAMW, "learning_rate": 5e-3}, {**ADAMW, "learning_rate": 5e-3, "decoder_learning_rate": 1e-2}),
}


@pytest.mark.parametrize("name", few(ASKED, ["nothing", "the adapter's", "train without rates"]))
def test_training_without_rates_is_the_one_with_those_of_adapter_and_head(
    name: str, base: Base, tmp_path: Path
) -> None:
    """Bit by bit: a rate that was given stays, and one that was not is that of the method, or of a head."""
    asked, same = ASKED[name]
    found, weights = trained(base, tmp_path / "asked", **asked)
    expected, others = trained(base, tmp_path / "same", **same)
    assert found == expected
    assert len(found) == 2
    assert all(torch.equal(weights[key], others[key]) for key in others)


def test_training_with_one_rate_for_both_is_that_of_flair(base: Base, tmp_path: Path) -> None:
    """``decoder_learning_rate`` as high as ``learning_rate`` switches the head's own off: bit by bit as without us."""
    _, weights = trained(base, tmp_path / "both", learning_rate=5e-3, decoder_learning_rate=5e-3)
    flair_peft.uninstall()
    try:
        found, others = trained(base, tmp_path / "flair", learning_rate=5e-3)
    finally:
        flair_peft.install()
    assert found == [5e-3]
    assert all(torch.equal(weights[key], others[key]) for key in others)


# What is left as it was asked for → the rates of its groups.
LEFT: dict[str, tuple[Options, list[float]]] = {
    "SGD": ({"learning_rate": 0.1, "optimizer": torch.optim.SGD}, [0.1]),
    "SGD without a rate": ({"optimizer": torch.optim.SGD}, [5e-5]),
    "Flair's train": ({"start": "train"}, [0.1]),
    "an optimiser of one's own": ({"optimizer": Mine}, [5e-5]),
    "both rates": ({"learning_rate": 2e-3, "decoder_learning_rate": 4e-3}, [4e-3, 2e-3]),
}


@pytest.mark.parametrize("name", few(LEFT, ["SGD", "an optimiser of one's own"]))
def test_rates_are_left_as_flair_has_them(name: str, base: Base, tmp_path: Path) -> None:
    """Where a rate means something else, or was given, nothing is chosen."""
    options, expected = LEFT[name]
    assert trained(base, tmp_path, **options)[0] == expected


def stacked(base: str, **options: Any) -> SequenceTagger:
    """Return a tagger on an adapter and on Flair's own embeddings."""
    return ZOO["sequence-tagger"].build(
        lambda **kwargs: StackedEmbeddings(
            [
                PeftTransformerWordEmbeddings(base, peft_config=lora(), **kwargs),
                TransformerWordEmbeddings(base, **options),
            ]
        ),
        None,
    )


def on_two_methods(base: str) -> SequenceTagger:
    """Return a tagger on LoRA and on IA³."""
    made = [PeftTransformerWordEmbeddings(base, peft_config=config) for config in (lora(), IA3Config())]
    return ZOO["sequence-tagger"].build(lambda **_: StackedEmbeddings(made), None)


def over_documents(base: str) -> TextClassifier:
    """Return a classifier whose RNN is part of its embeddings."""
    return ZOO["text-classifier-rnn"].build(
        lambda **kwargs: PeftTransformerWordEmbeddings(base, peft_config=lora(), **kwargs), None
    )


def with_encoded_labels(base: str) -> TextClassifier:
    """Return a classifier whose labels go through an adapter that Flair takes for a part of the head."""
    factories = Factories(base, lora())
    return ZOO["text-classifier-label-verbalizer"].build(factories.words, factories.documents)


def unfrozen(base: str) -> TextClassifier:
    """Return a classifier whose base was set free."""
    model = classifier(base)
    model.embeddings.model.requires_grad_(True)
    return model


BOTH = {"learning_rate": LORA_RATE, "decoder_learning_rate": 1e-2}
HEAD_ALONE = {"decoder_learning_rate": 1e-2}
SUITED: dict[str, tuple[Callable[[str], Model], Options]] = {
    "LoRA": (classifier, BOTH),
    "prompts": (
        lambda base: classifier(base, peft_config=PromptTuningConfig(num_virtual_tokens=2)),
        {"learning_rate": 3e-2, "decoder_learning_rate": 1e-2},
    ),
    "LoRA and IA3": (on_two_methods, BOTH),
    "an RNN among the embeddings": (over_documents, BOTH),
    "beside a frozen transformer": (lambda base: stacked(base, fine_tune=False), BOTH),
    "beside a transformer that is trained": (lambda base: stacked(base, fine_tune=True), HEAD_ALONE),
    "on a base that is trained": (unfrozen, HEAD_ALONE),
    "matrices as large as the base's": (lambda base: classifier(base, peft_config=OSFConfig()), HEAD_ALONE),
    "a head with an adapter": (with_encoded_labels, {"learning_rate": LORA_RATE}),
    "an adapter that does not learn": (lambda base: classifier(base, fine_tune=False), HEAD_ALONE),
}


@pytest.mark.parametrize("name", SUITED)
def test_suited_rates_spare_whatever_was_trained_before(name: str, base: Base) -> None:
    """Neither a whole transformer nor an adapter gets a rate that is made for something smaller, or random."""
    build, expected = SUITED[name]
    assert rates.suited_rates(build(base("bert")), torch.optim.AdamW) == expected


LIKE_ADAM = (torch.optim.Adam, torch.optim.NAdam, Derived, bitsandbytes.optim.AdamW8bit, bitsandbytes.optim.PagedAdamW)
OTHERS = (torch.optim.SGD, torch.optim.Rprop, torch.optim.Adafactor, bitsandbytes.optim.Lion, Mine)


@pytest.mark.parametrize("optimizer", [*LIKE_ADAM, *OTHERS])
def test_rates_are_for_optimisers_that_mean_the_same_by_them(optimizer: type) -> None:
    """Those that divide gradients by their size, whoever made a class of them, and with whatever options."""
    assert rates.is_like_adam(optimizer) is (optimizer in LIKE_ADAM)
    assert rates.is_like_adam(functools.partial(optimizer, lr=1.0)) is (optimizer in LIKE_ADAM)


FAR: dict[str, tuple[Callable[[], Any], Options, str | None]] = {
    "Flair's own": (
        lora,
        {"learning_rate": 5e-5},
        f"hardly learns with learning_rate=5e-5.*learning_rate={SUITED_RATE}",
    ),
    "nothing given": (lora, {}, None),
    "lower": (lora, {"learning_rate": 1.25e-5, "decoder_learning_rate": 1e-2}, "learning_rate=1.25e-5"),
    "of LoRA": (lora, {"learning_rate": LORA_RATE}, None),
    "low": (lora, {"learning_rate": 1e-4}, None),
    "high": (lora, {"learning_rate": 3e-3}, None),
    "too high": (lora, {"learning_rate": 30 * LORA_RATE}, f"30 times what suits LORA.*learning_rate={SUITED_RATE}"),
    "of a transformer with SGD": (
        lora,
        {"learning_rate": 5e-5, "decoder_learning_rate": 1e-2, "optimizer": torch.optim.SGD},
        f"learning_rate={SUITED_RATE} with AdamW, or a far higher one with SGD",
    ),
    "of the head for SGD": (
        lora,
        {"learning_rate": 0.1, "decoder_learning_rate": 5e-5, "optimizer": torch.optim.SGD},
        "decoder_learning_rate=1e-2 with AdamW, or a far higher one with SGD",
    ),
    "zero for the head": (
        lora,
        {"learning_rate": 1e-3, "decoder_learning_rate": 0.0},
        r"decoder_learning_rate=0 for none given: the head learns with 1e-3.*requires_grad_\(False\)",
    ),
    "none at all": (lora, {"learning_rate": 0.0, "decoder_learning_rate": 0.0}, None),
    "too high for SGD": (lora, {"learning_rate": 3e-2, "optimizer": torch.optim.SGD}, None),
    "of a transformer for the head": (
        lora,
        {"learning_rate": 1e-3, "decoder_learning_rate": 5e-5},
        "head hardly learns with a learning rate of 5e-5.*decoder_learning_rate=1e-2",
    ),
    "low for the head": (lora, {"learning_rate": 1e-3, "decoder_learning_rate": 1e-3}, None),
    "too high for the head": (
        lora,
        {"learning_rate": 1e-3, "decoder_learning_rate": 0.2},
        "head may not settle with a learning rate of 0.2: that is 20 times.*decoder_learning_rate=1e-2",
    ),
    "of LoRA with prompts": (lambda: PromptTuningConfig(num_virtual_tokens=2), {"learning_rate": 1e-3}, "=3e-2"),
    "of prompts": (lambda: PromptTuningConfig(num_virtual_tokens=2), {"learning_rate": 1e-2}, None),
    "of LoRA with IA3": (lambda: IA3Config(), {"learning_rate": 1e-3}, "=3e-2"),
    "raised by LoRA+": (lora, {"learning_rate": 5e-5, "plugins": [LoraPlusPlugin()]}, None),
    "raised by LoRA+ for a half": (lora, {"learning_rate": 1e-3, "plugins": [LoraPlusPlugin()]}, None),
    "after some epochs": (lora, {"learning_rate": 5e-5, "epoch": 1}, None),
    "without epochs": (lora, {"learning_rate": 5e-5, "max_epochs": 0}, None),
    "too high for an optimiser made of AdamW": (lora, {"learning_rate": 0.5, "optimizer": Derived}, "times what suits"),
    "of an optimizer of one's own": (lora, {"learning_rate": 5e-5, "optimizer": Mine}, None),
}


def test_rate_of_a_transformer_is_none_that_is_far_where_one_is_trained(
    base: Base, caplog: pytest.LogCaptureFixture
) -> None:
    """Embeddings have one rate, and what suits the adapter beside it would undo a transformer."""
    told = []
    for build in (lambda base: stacked(base, fine_tune=True), lambda base: stacked(base, fine_tune=False)):
        model = build(base("bert"))
        parts = [{"params": rates.head_parameters(model), "lr": 1e-2}, {"params": model.embeddings.parameters()}]
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="flair_peft"):
            rates.report_far_ones(model, torch.optim.AdamW(parts, lr=5e-5))
        told.append("hardly learns" in caplog.text)
    assert told == [False, True]


def test_rates_are_far_from_ten_times_and_a_tenth_on_and_those_of_heads_from_a_twentieth() -> None:
    """Flair's own rate for transformers is named for LoRA, ten times what suits too, and nothing between."""
    assert methods.is_too_low(5e-5, LORA_RATE)
    assert methods.is_too_high(5e-3, LORA_RATE)
    assert not any(too(rate, LORA_RATE) for rate in (6e-5, 4e-3) for too in (methods.is_too_low, methods.is_too_high))
    assert methods.is_too_low(5e-4, 1e-2, methods.TOO_LOW_FOR_HEADS)
    assert not methods.is_too_low(6e-4, 1e-2, methods.TOO_LOW_FOR_HEADS)
    assert not methods.is_too_high(1.0, None)


@pytest.mark.parametrize(
    "name", few(FAR, ["Flair's own", "of LoRA", "too high", "of a transformer for the head", "raised by LoRA+"])
)
def test_learning_rate_that_is_far_from_good_is_said_when_the_training_starts(
    name: str, base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Once, with the number to try; not where the rate may be meant."""
    config, options, said = FAR[name]
    model = classifier(base("bert"), peft_config=config())
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        settings = {"max_epochs": 1 + options.get("epoch", 0), "mini_batch_size": 8, **options}
        ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path, **settings)
    warned = [record.getMessage() for record in caplog.records if record.module == "rates"]
    assert len(warned) == (said is not None)
    assert said is None or re.search(said, warned[0])


def test_rate_of_several_adapters_is_measured_by_the_one_that_suits_all(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What was chosen for all of them is not said to be far, and what one of them alone would like is."""

    def told(**options: Any) -> str:
        configs = (lora(), IA3Config(target_modules=["key"], feedforward_modules=[]))
        each = [PeftTransformerWordEmbeddings(base("bert"), peft_config=config) for config in configs]
        model = ZOO["sequence-tagger"].build(lambda **_: StackedEmbeddings(each), None)
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="flair_peft"):
            ModelTrainer(model, ZOO["sequence-tagger"].corpus()).fine_tune(tmp_path, max_epochs=1, **options)
        return caplog.text

    assert "Try " not in told()
    assert told(learning_rate=3e-2).count("60 times what suits the adapters of this model") == 2


def test_flairs_own_embeddings_with_an_adapter_are_named_where_no_rate_is_given(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They train at Flair's rate for whole transformers, and nothing else here says so."""

    def told(kind: type[TransformerDocumentEmbeddings], **options: Any) -> list[str]:
        model = TextClassifier(
            kind(base("bert"), **{"peft_config": lora(), **options.pop("own", {})}),
            label_dictionary=opinion_corpus().make_label_dictionary("opinion", add_unk=False),
            label_type="opinion",
        )
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="flair_peft"):
            ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path, max_epochs=1, **options)
        return [record.getMessage() for record in caplog.records if record.module == "rates"]

    (said,) = told(TransformerDocumentEmbeddings)
    assert re.search(rf"Use PeftTransformerDocumentEmbeddings.*learning_rate={SUITED_RATE} and decoder_learning", said)
    assert not told(TransformerDocumentEmbeddings, learning_rate=5e-4)
    assert not told(TransformerDocumentEmbeddings, own={"fine_tune": False})
    assert not told(TransformerDocumentEmbeddings, own={"peft_config": None})
    assert not told(PeftTransformerDocumentEmbeddings)
    monkeypatch.setattr(rates, "is_main_process", lambda: False)
    assert not told(TransformerDocumentEmbeddings)


class OwnRate(ModelTrainer):
    """A trainer whose user wrote the rate into it."""

    @functools.wraps(ModelTrainer.train_custom)
    def train_custom(self, *args: Any, **kwargs: Any) -> Any:
        return super().train_custom(*args, **{**kwargs, "learning_rate": 2e-3})


def test_rate_that_a_trainer_of_ones_own_passes_on_is_one_that_was_given(base: Base, tmp_path: Path) -> None:
    """``fine_tune`` was called without one, and what arrives is another than Flair's."""
    seen = Rates()
    OwnRate(classifier(base("bert")), opinion_corpus()).fine_tune(tmp_path, max_epochs=1, plugins=[seen])
    assert sorted(seen.found) == [2e-3, 1e-2]


@pytest.fixture
def _informed() -> Iterator[None]:
    """Have Flair log as it does outside of these tests."""
    log = logging.getLogger("flair")
    level = log.level
    log.setLevel(logging.INFO)
    yield
    log.setLevel(level)


def start_lines(folder: Path) -> list[str]:
    """Return what the log of a training says of what is trained."""
    lines = (folder / "training.log").read_text(encoding="utf-8").splitlines()
    return [line.partition(" Training ")[2] for line in lines if " Trained: " in line]


LORA_LINE = "LORA (r=4, lora_alpha=12) on"


@pytest.mark.usefixtures("_informed")
def test_start_of_a_training_is_one_line_in_flairs_log(base: Base, tmp_path: Path) -> None:
    """Base, method, rates with a word on those that nobody gave, and how much is trained and frozen."""
    model, source = classifier(base("bert")), base("bert")
    sizes = {p: p.numel() for p in model.parameters()}
    trained = sum(size for p, size in sizes.items() if p.requires_grad)
    every, head = sum(sizes.values()), sum(p.numel() for p in model.decoder.parameters())
    ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path, max_epochs=1)
    (line,) = start_lines(tmp_path)
    assert line == (
        f"{LORA_LINE} '{source}' at learning rate {SUITED_RATE} (no learning_rate was given); the head at 1e-2 (no "
        f"decoder_learning_rate was given). Trained: {trained:,} of {every:,} parameters ({trained / every:.2%}), "
        f"{head:,} of them outside of the adapter. Frozen: {every - trained:,} of '{source}'."
    )
    assert model.model_card["training_parameters"]["learning_rate"] == LORA_RATE
    assert model.model_card["training_parameters"]["decoder_learning_rate"] == 1e-2


@pytest.mark.usefixtures("_informed")
def test_start_of_each_training_is_said_unless_nothing_is_left_to_do(base: Base, tmp_path: Path) -> None:
    """A training that goes on says it again, one whose epochs are done does not; rates that were given bear no word."""
    model, given = classifier(base("bert")), {"learning_rate": 2e-3, "decoder_learning_rate": 1.5e-2}
    for name, options in (("new", {}), ("on", {"epoch": 1}), ("done", {"epoch": 2})):
        ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path / name, max_epochs=2, **given, **options)
    for name in ("new", "on"):
        (line,) = start_lines(tmp_path / name)
        assert "at learning rate 2e-3; the head at 1.5e-2. Trained" in line
    assert not start_lines(tmp_path / "done")


@pytest.mark.usefixtures("_informed")
def test_other_processes_say_nothing_of_rates(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Line and warnings are those of the main process."""
    monkeypatch.setattr(guard, "is_main_process", lambda: False)
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        train(classifier(base("bert")), tmp_path, learning_rate=5e-5, max_epochs=1)
    assert not start_lines(tmp_path)
    assert "hardly learns" not in caplog.text


def said(model: Model, monkeypatch: pytest.MonkeyPatch, *, lr: float = 1e-3, **chosen: float) -> str:
    """Return the line of a training with AdamW and one rate for all."""
    lines: list[str] = []
    monkeypatch.setattr(start_line.log, "info", lambda text, *values: lines.append(text % values))
    start_line.say(model, torch.optim.AdamW(model.parameters(), lr=lr), chosen)
    return lines[0]


def test_start_line_names_each_adapter_and_what_is_frozen(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several adapters, adapters that do not learn, and embeddings of Flair that do not."""
    source = base("bert")
    line = said(on_two_methods(source), monkeypatch)
    assert f"{LORA_LINE} '{source}' at learning rate 1e-3; IA3 on '{source}' at learning rate 1e-3; the head" in line
    beside = stacked(source, fine_tune=False)
    frozen = beside.embeddings.embeddings[1]
    assert said(beside, monkeypatch).endswith(f", '{frozen.name}'.")
    still = classifier(source, fine_tune=False)
    line = said(still, monkeypatch)
    every = sum(p.numel() for p in still.embeddings.model.parameters())
    assert f"'{source}', frozen by fine_tune=False; the head at" in line
    assert line.endswith(f"Frozen: {every:,} of '{source}'.")


@pytest.mark.usefixtures("_informed")
def test_start_line_gives_the_range_where_rates_differ(base: Base, tmp_path: Path) -> None:
    """LoRA+ has two for the adapter, and an RNN among the embeddings learns with the adapter's."""
    train(classifier(base("bert")), tmp_path / "plus", max_epochs=1, plugins=[LoraPlusPlugin(4.0)])
    assert "at learning rate 4e-3 to 1.6e-2; the head at 1e-2 (no" in start_lines(tmp_path / "plus")[0]
    model, corpus = over_documents(base("bert")), ZOO["text-classifier-rnn"].corpus()
    ModelTrainer(model, corpus).fine_tune(tmp_path / "rnn", max_epochs=1, mini_batch_size=2)
    assert f"; the head at {SUITED_RATE} to 1e-2 (no" in start_lines(tmp_path / "rnn")[0]


def test_start_line_counts_quantised_weights_as_they_were(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two weights of four bits in a byte are two."""
    plain, quantised = classifier(base("bert"), peft_config=lora()), quantised_classifier(base("bert"), "nf4")
    counts = [re.search(r"of ([\d,]+) parameters", said(model, monkeypatch)) for model in (plain, quantised)]
    assert counts[0]
    assert counts[1]
    assert counts[0].group(1) == counts[1].group(1)


def freeze_adapter(model: Model) -> None:
    model.embeddings.model.requires_grad_(False)


def freeze_head(model: Model) -> None:
    model.decoder.requires_grad_(False)


@pytest.mark.usefixtures("_informed")
@pytest.mark.parametrize(
    ("freeze", "line"),
    [
        (freeze_adapter, r"', frozen; the head at 1e-2 .*\. .*\(0\.\d+%\), 66 of them outside of the adapter\."),
        (freeze_head, r"a head that is frozen\. .* 0 of them outside of the adapter\. .*, 66 of the head\."),
    ],
)
def test_start_line_says_what_is_frozen_of_adapter_and_head(
    freeze: Callable[[Model], None], line: str, base: Base, tmp_path: Path
) -> None:
    """Somebody trains the head alone, or the adapter under a head that stays."""
    model = classifier(base("bert"))
    freeze(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    ModelTrainer(model, opinion_corpus()).fine_tune(tmp_path, max_epochs=1, plugins=[LoraPlusPlugin()])
    (found,) = start_lines(tmp_path)
    assert re.search(line, found)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.usefixtures("_informed")
def test_start_line_names_a_transformer_that_is_trained_beside_the_adapter(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are none of the head's, and have the rate of all embeddings."""
    model = stacked(base("bert"), fine_tune=True)
    line = said(model, monkeypatch)
    name = next(part.name for part in model.embeddings.embeddings if type(part) is TransformerWordEmbeddings)
    assert f"; '{name}' at 1e-3; the head at 1e-3. Trained" in line


@pytest.mark.usefixtures("_informed")
def test_second_training_with_one_trainer_has_its_own_plugins_alone(
    base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Flair leaves those of the first: they would say its line, train with its rates, and step its schedule."""
    trainer, seen = ModelTrainer(classifier(base("bert")), opinion_corpus()), Rates()
    trainer.fine_tune(tmp_path / "first", max_epochs=1, plugins=[LoraPlusPlugin()])
    trainer.fine_tune(tmp_path / "plus", max_epochs=1, plugins=[LoraPlusPlugin()])
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        rates_given = {"learning_rate": 3e-2, "decoder_learning_rate": 7e-3}
        trainer.fine_tune(tmp_path / "last", max_epochs=1, plugins=[seen], **rates_given)
    assert sorted(seen.found) == [7e-3, 3e-2]
    (line,) = start_lines(tmp_path / "last")
    assert "at learning rate 3e-2; the head at 7e-3." in line
    assert caplog.text.count("60 times what suits LORA") == 1
