"""One base under many models: the outputs of each alone, one storage, and no way from one to another."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import re
import shutil
import threading
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import DataPair, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import StackedEmbeddings, WordEmbeddings
from flair.embeddings.base import register_embeddings
from flair.models import MultitaskModel, SequenceTagger, TextClassifier
from flair.nn import Model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig, PreTrainedTokenizerFast

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerWordEmbeddings, SharedBase, from_pretrained
from flair_peft.base import memory_check
from flair_peft.embeddings import exact_values, pass_cost
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError, BaseMismatchError, FlairPeftError, PredictionSetupError
from flair_peft.primitives import host_internals, mapped_memory
from flair_peft.serving import mixed_batches
from tests.support import tiny
from tests.support.configs import lora
from tests.support.method_cases import KINDS, cases, make_embeddings
from tests.support.models import save_random, train_a_step
from tests.support.places import addresses_of
from tests.support.predictions import TEXTS, labels_of, points_of
from tests.support.round_trip import largest_difference
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO, copy_point, sentence_corpus

TOLERANCE = 1e-5


def frozen_addresses(model: Model) -> set[int]:
    modules = [module for module in model.modules() if isinstance(module, PeftTransformerEmbeddings)]
    named = (item for module in modules for item in module.model.named_parameters())
    return addresses_of(p for name, p in named if "lora" not in name and not p.requires_grad)


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_shared_base_model_predicts_what_it_predicts_alone(
    name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """For every model class: bit-equal predictions, on the storage of the base."""
    directory, _ = save_random(name, base("bert"), tmp_path / "model")
    shared = SharedBase(base("bert"))
    alone, model = flair_peft.from_pretrained(directory), shared.load(directory)
    corpus = ZOO[name].corpus()
    assert type(model) is type(alone)
    assert ZOO[name].predict(model, corpus) == ZOO[name].predict(alone, corpus)
    assert shared.models == [model]


def test_shared_base_is_the_base_of_a_model_that_was_loaded_before(base: Callable[[str], str], tmp_path: Path) -> None:
    """A model on the same base that is still there holds the same weights, however its base was asked for."""
    directory = save_random("text-classifier", base("bert"), tmp_path / "model")[0]
    gc.collect()  # of the model that was saved, and its base
    alone = flair_peft.from_pretrained(directory)
    shared = SharedBase(base("bert"))
    model = shared.load(directory)
    assert shared.models == [model]
    roots = [embeddings.base_source.frozen.root for embeddings in (alone.embeddings, model.embeddings)]
    assert roots[0] is roots[1]


@pytest.mark.parametrize("name", few(ZOO, ONE_OF_A_KIND))
def test_predict_together_gives_the_labels_of_separate_predictions(
    name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """For every model class, beside a classifier and a tagger with other adapters."""
    shared = SharedBase(base("bert"))
    others = ["text-classifier", "sequence-tagger"]
    configs = [lora(r=2, lora_alpha=16, target_modules=t) for t in (["query"], ["dense"])]
    # A random lemmatizer chooses between letters that are almost equally likely; with this seed, by more than rounding.
    models = [shared.load(save_random(name, base("bert"), tmp_path / "model", seed=42)[0])]
    for number, (other, config) in enumerate(zip(others, configs, strict=True)):
        models.append(
            shared.load(save_random(other, base("bert"), tmp_path / other, config=config, seed=number + 1)[0])
        )
    together = [points_of(kind) for kind in (name, *others)]
    separate = [[copy_point(point) for point in points] for points in together]
    shared.predict(dict(zip(models, together, strict=True)), mini_batch_size=4)
    for model, points in zip(models, separate, strict=True):
        model.predict(points)
    for found, expected in zip(together, separate, strict=True):
        assert largest_difference(labels_of(expected), labels_of(found)) < TOLERANCE
        assert not any(point._embeddings for point in found)


def test_predict_together_divides_the_mixed_batch_by_length(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each group has the adapters of its own rows; a model without groups leaves the batch whole."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(3)]
    texts = ["Who ?", "Berlin is large .", "The founder of Apple , Steve Jobs , was born in San Francisco ."]
    separate = {model: [Sentence(text) for text in texts[number:]] for number, model in enumerate(models)}
    for model, points in separate.items():
        model.predict(points)
    monkeypatch.setattr(pass_cost, "cost_of", lambda *_: pass_cost.Cost(1.0, 0.0))
    together = {model: [Sentence(point.text) for point in points] for model, points in separate.items()}
    with counting_forward_passes() as passes:
        shared.predict(together)
    assert passes[-2:] == [3, 3]  # the longest, which all have, first
    for model, points in together.items():
        assert largest_difference(labels_of(separate[model]), labels_of(points)) < TOLERANCE
    models[1].embeddings.length_grouping = False
    with counting_forward_passes() as passes:
        shared.predict(together)
    assert passes == [6]


def test_predict_together_runs_one_forward_pass_for_all(base: Callable[[str], str], tmp_path: Path) -> None:
    """Eight models with eight sentences need as many passes as one model with eight."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(8)]
    sentences = {model: [Sentence(TEXTS[i % 3])] for i, model in enumerate(models)}
    shared.predict(sentences)  # adapters are taken in, one after the other
    with counting_forward_passes() as passes:
        shared.predict(sentences)
    assert passes == [8]
    with counting_forward_passes() as passes:
        shared.predict(sentences, mini_batch_size=3)
    assert passes == [3, 3, 2]


@pytest.mark.parametrize(
    ("error", "is_remembered"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), False),
        (RuntimeError("DefaultCPUAllocator: can't allocate 8 bytes"), False),
        (MemoryError(), False),
        (NotImplementedError("this layer mixes nothing"), True),
        (RuntimeError("shapes cannot be multiplied"), True),
    ],
    ids=["gpu", "cpu", "python", "unsupported", "shapes"],
)
def test_adapter_that_could_not_be_tried_for_want_of_memory_is_tried_again(
    error: Exception, is_remembered: bool, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Meanwhile each model has a pass of its own, with the same labels; what PEFT cannot mix is tried once."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)]

    def fail(*_: Any, **__: Any) -> None:
        raise error

    def labels() -> list[Any]:
        sentences = {model: [Sentence(text) for text in TEXTS] for model in models}
        shared.predict(sentences)
        return [labels_of(points) for points in sentences.values()]

    with monkeypatch.context() as patch:
        patch.setattr(mixed_batches.MixingModel, "_forward", fail)
        alone = labels()
    with counting_forward_passes() as passes:
        together = labels()
    assert (6 in passes) is not is_remembered
    assert [largest_difference(a, b) < 1e-4 for a, b in zip(alone, together, strict=True)] == [True, True]


def test_prediction_within_autocast_leaves_later_ones_in_one_batch(base: Callable[[str], str], tmp_path: Path) -> None:
    """Adapters that round otherwise together, in the dtype of one call, are tried out anew in that of another."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        shared.predict({model: [Sentence(text) for text in TEXTS] for model in models})
    with counting_forward_passes() as passes:
        shared.predict({model: [Sentence(text) for text in TEXTS] for model in models})
    assert 2 * len(TEXTS) in passes


class counting_forward_passes:  # noqa: N801 - used as a function
    """Collects the number of rows of each pass through a BERT encoder."""

    def __enter__(self) -> list[int]:
        from transformers.models.bert.modeling_bert import BertEncoder

        self._rows: list[int] = []
        self._owner, self._forward = BertEncoder, BertEncoder.forward
        rows, forward = self._rows, self._forward

        def counted(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            rows.append(len(hidden_states))
            return forward(module, hidden_states, *args, **kwargs)

        self._owner.forward = counted
        return self._rows

    def __exit__(self, *_: object) -> None:
        self._owner.forward = self._forward


# Each way to hold weights: beside the base, in it, in front of the sentence, or computed from it.
_BY_DEFAULT = {"LORA", "IA3", "LN_TUNING", "PROMPT_TUNING", "PREFIX_TUNING", "TRAINABLE_TOKENS"} | {
    "dora", "bias_all", "pissa", "modules_to_save", "layer_replication"
}  # fmt: skip
METHOD_CASES = [
    case if case.values[0].name in _BY_DEFAULT else pytest.param(*case.values, id=case.id, marks=pytest.mark.matrix)
    for case in cases(working=True)
]


@pytest.mark.parametrize(("method", "kind"), METHOD_CASES)
def test_shared_base_every_method_beside_lora(
    method: Any, kind: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Whatever the method: equal predictions alone and together, and training it changes no bit of the other model."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        corpus = sentence_corpus()
        embeddings = make_embeddings(method, kind, base, torch.float32)
        second = PeftTransformerDocumentEmbeddings(
            base(KINDS[kind]), peft_config=lora(target_modules=None, r=3), cls_pooling="mean"
        )
        dictionary = corpus.make_label_dictionary("sentiment", add_unk=False)
        for number, made in enumerate((embeddings, second)):
            model = TextClassifier(made, label_type=f"sentiment{number}", label_dictionary=dictionary)
            flair_peft.save_pretrained(model.eval(), tmp_path / str(number))
        shared = SharedBase(base(KINDS[kind]))
        if method.name == "layer_replication":
            with pytest.raises(BaseMismatchError, match="another 'num_hidden_layers'"):
                shared.load(tmp_path / "0")
            return
        models = [shared.load(tmp_path / str(number)) for number in range(2)]
        alone = [flair_peft.from_pretrained(tmp_path / str(number)) for number in range(2)]
    together, separate = ([Sentence(text) for text in TEXTS] for _ in range(2))
    shared.predict(dict.fromkeys(models, together), return_probabilities_for_all_classes=True)
    for model in alone:
        model.predict(separate, return_probabilities_for_all_classes=True)
    assert largest_difference(labels_of(separate), labels_of(together)) < TOLERANCE
    assert frozen_addresses(models[0]) & frozen_addresses(models[1]), "nothing is shared"
    before = {name: tensor.clone() for name, tensor in models[1].state_dict().items()}
    train_a_step(models[0], "sentiment0")
    assert all(torch.equal(before[name], tensor) for name, tensor in models[1].state_dict().items())
    again, fresh = ([Sentence(text) for text in TEXTS] for _ in range(2))
    models[1].predict(again, return_probabilities_for_all_classes=True)
    alone[1].predict(fresh, return_probabilities_for_all_classes=True)
    assert labels_of(again) == labels_of(fresh)


def test_predict_together_shows_a_training_in_between(base: Callable[[str], str], tmp_path: Path) -> None:
    """The mixed pass reads the tensors that the models have at that time."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)]
    for step in range(2):
        together, separate = ([[Sentence(text) for text in TEXTS] for _ in models] for _ in range(2))
        shared.predict(dict(zip(models, together, strict=True)))
        for model, sentences in zip(models, separate, strict=True):
            model.predict(sentences)
        assert all(
            largest_difference(labels_of(b), labels_of(a)) < TOLERANCE for a, b in zip(together, separate, strict=True)
        )
        if step == 0:
            sentences = [Sentence(text).add_label("sentiment", "positive") for text in TEXTS]
            models[0].train()
            optimizer = torch.optim.SGD([p for p in models[0].parameters() if p.requires_grad], lr=1.0)
            models[0].forward_loss(sentences)[0].backward()
            optimizer.step()
            models[0].eval()


class Steered(torch.nn.Module):
    """A norm whose output is multiplied with a number, which is no weight."""

    def __init__(self, norm: torch.nn.Module, factor: float) -> None:
        super().__init__()
        self.norm, self.settings = norm, {"factor": factor}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.norm(states) * self.settings["factor"]


def _norm_of(embeddings: Any) -> Any:
    return embeddings.base_model.encoder.layer[0].output.LayerNorm


def _steer(embeddings: Any, factor: float) -> None:
    output = embeddings.base_model.encoder.layer[0].output
    output.LayerNorm = Steered(output.LayerNorm, factor)


@pytest.mark.parametrize("config", [{}, {"bias": "lora_only"}, {"layers_to_transform": [1]}])
@pytest.mark.parametrize("is_same_text", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda embeddings, number: setattr(
            embeddings.base_model.encoder.layer[0].output.LayerNorm, "eps", 1.0 + number
        ),
        lambda embeddings, number: _steer(embeddings, 1.0 + 2 * number),
    ],
    ids=["eps", "module"],
)
def test_predict_together_follows_settings_that_are_no_weights(
    change: Callable[[Any, int], None],
    is_same_text: bool,
    config: dict[str, Any],
    base: Callable[[str], str],
    tmp_path: Path,
) -> None:
    """Each model computes with its own, whatever was found of one like it before."""
    shared = SharedBase(base("bert"))
    models = [
        shared.load(save_random("text-classifier", base("bert"), tmp_path / str(n), config=lora(**config), seed=n)[0])
        for n in range(2)
    ]
    for number, model in enumerate(models):
        model._label_type = f"label{number}"
    shared.predict({model: [Sentence(TEXTS[0])] for model in models})
    for number, model in enumerate(models):
        change(model.embeddings, number)
    together = [[Sentence(text) for text in TEXTS] for _ in models]
    together = together[:1] * 2 if is_same_text else together
    shared.predict(dict(zip(models, together, strict=True)), return_probabilities_for_all_classes=True)
    for model, sentences in zip(models, together, strict=True):
        alone = [Sentence(text) for text in TEXTS]
        model.predict(alone, return_probabilities_for_all_classes=True)
        for found, expected in zip(sentences, alone, strict=True):
            scores = {label.value: label.score for label in expected.get_labels(model.label_type)}
            assert {label.value: label.score for label in found.get_labels(model.label_type)} == pytest.approx(
                scores, abs=TOLERANCE
            )


@pytest.mark.parametrize("config", [{}, {"bias": "lora_only"}])
@pytest.mark.parametrize("part", ["base", "adapter"])
def test_predict_together_draws_dropout_that_was_switched_on(
    part: str, config: dict[str, Any], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Whoever samples predictions so gets as many different ones as alone; the models mix again afterwards."""
    shared, options = SharedBase(base("bert")), lora(lora_dropout=0.5, **config)
    models = [
        shared.load(save_random("text-classifier", base("bert"), tmp_path / str(n), config=options, seed=n)[0])
        for n in range(2)
    ]
    inside = [m for n, m in models[0].embeddings.model.named_modules() if ("lora_dropout" in n) is (part == "adapter")]
    dropout = [module for module in inside if isinstance(module, torch.nn.Dropout)]

    def score() -> float:
        sentences = {model: [Sentence(TEXTS[0])] for model in models}
        shared.predict(sentences, return_probabilities_for_all_classes=True)
        return float(sentences[models[0]][0].labels[0].score)

    quiet = score()
    for module in dropout:
        module.p = 0.5
        module.train()
    assert len({score() for _ in range(4)}) > 1
    for module in dropout:
        module.eval()
    assert score() == pytest.approx(quiet, abs=TOLERANCE)


@pytest.mark.parametrize(
    "change",
    [
        lambda e: e.model.merge_adapter(),
        lambda e: e.model.disable_adapter_layers(),
        lambda e: e.model.get_input_embeddings().weight.requires_grad_(True),
        lambda e: [m.scaling.update(default=3.0) for m in e.model.modules() if isinstance(m, LoraLayer)],
        lambda e: e.train(),
        lambda e: e.model.to(torch.float64),
    ],
    ids=["merged", "switched off", "unfrozen", "scaled", "training", "converted"],
)
def test_predict_together_follows_what_was_done_to_a_model(
    change: Callable[[Any], None], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Models that cannot be mixed any more predict for themselves, as they would alone."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)]
    shared.predict({model: [Sentence(TEXTS[0])] for model in models})
    change(models[0].embeddings)
    together, separate = ([[Sentence(text) for text in TEXTS] for _ in models] for _ in range(2))
    shared.predict(dict(zip(models, together, strict=True)))
    for model, sentences in zip(models, separate, strict=True):
        model.predict(sentences)
    assert all(
        largest_difference(labels_of(b), labels_of(a)) < TOLERANCE for a, b in zip(together, separate, strict=True)
    )


def test_predict_same_sentences_under_models_that_build_on_one_another(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A relation model reads the entities that the tagger before it gives; two of one label type: the last one wins."""
    shared = SharedBase(base("bert"))
    names = ["sequence-tagger", "relation-extractor", "text-classifier", "text-classifier"]
    models = [
        shared.load(save_random(name, base("bert"), tmp_path / str(i), seed=i)[0]) for i, name in enumerate(names)
    ]
    together, separate = ([Sentence(str(point.text)) for point in sentence_corpus().test] for _ in range(2))
    shared.predict(dict.fromkeys(models, together), mini_batch_size=2)
    for model in models:
        model.predict(separate)
    assert largest_difference(labels_of(separate), labels_of(together)) < TOLERANCE
    assert any(point.get_labels("relation") for point in separate), "the tagger finds no entities to relate"


def test_predict_same_sentences_under_equal_settings_tokenises_them_once(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three taggers: one look at the words; a classifier reads them in another way."""
    shared = SharedBase(base("bert"))
    models: list[Model] = []
    for number, layer in enumerate(("ner", "pos", "ner")):
        config = lora(target_modules=None)
        name = "sequence-tagger" if layer == "ner" else "sequence-tagger-tokens"
        models.append(
            shared.load(save_random(name, base("bert"), tmp_path / str(number), config=config, seed=number)[0])
        )
    models[2].tag_type = "third"
    classifier = shared.load(save_random("text-classifier", base("bert"), tmp_path / "classifier", seed=9)[0])
    sentences = [Sentence(text) for text in TEXTS]
    shared.predict(dict.fromkeys([*models, classifier], sentences))
    calls: list[int] = []
    encode = PreTrainedTokenizerFast._batch_encode_plus

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(args[0] if args else kwargs["batch_text_or_text_pairs"]))
        return encode(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_batch_encode_plus", counted)
    shared.predict(dict.fromkeys([*models, classifier], sentences))
    assert calls == [3, 3]


@register_embeddings
class Asking(PeftTransformerDocumentEmbeddings):
    """Embeddings that put words in front of each text, as models for searches want."""

    def _expand_sentence_with_context(self, sentence: Sentence) -> tuple[list[Any], int]:
        tokens, offset = super()._expand_sentence_with_context(sentence)
        return [*Sentence("who :", use_tokenizer=False).tokens, *tokens], offset + 2


@pytest.mark.parametrize("change", ["a subclass", "the side that is cut"])
def test_predict_same_sentences_under_models_that_read_them_otherwise(
    change: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Each reads its own tokens, whatever its settings have in common with those of others."""
    kinds = [PeftTransformerDocumentEmbeddings, Asking if change == "a subclass" else PeftTransformerDocumentEmbeddings]
    shared, models = SharedBase(base("bert")), list[Any]()
    labels = Dictionary(add_unk=False)
    for label in ("good", "bad"):
        labels.add_item(label)
    for number, kind in enumerate(kinds):
        embeddings = kind(base("bert"), peft_config=lora(), allow_long_sentences=False)
        model = TextClassifier(embeddings, label_type=f"label{number}", label_dictionary=labels).eval()
        flair_peft.save_pretrained(model, tmp_path / str(number))
        models.append(shared.load(tmp_path / str(number)))
    if change == "the side that is cut":
        models[1].embeddings.tokenizer.truncation_side = "left"
    texts = [" ".join(str(number) for number in range(count)) for count in (1, 3, 600)]
    together, options = [Sentence(text) for text in texts], {"return_probabilities_for_all_classes": True}
    shared.predict(dict.fromkeys(models, together), **options)
    for model in models:
        alone = [Sentence(text) for text in texts]
        model.predict(alone, **options)
        for found, expected in zip(together, alone, strict=True):
            scores = {label.value: label.score for label in expected.labels}
            assert {each.value: each.score for each in found.get_labels(model.label_type)} == pytest.approx(
                scores, abs=TOLERANCE
            )


def test_threads_with_models_of_one_base_predict_what_they_predict_in_turn(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Eight threads share one vocabulary and one set of weights, alone and through the base."""
    shared = SharedBase(base("bert"))
    names = ["text-classifier", "sequence-tagger"]
    models = [shared.load(save_random(names[i % 2], base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(8)]
    expected = [[Sentence(text) for text in TEXTS * 3] for _ in models]
    for model, sentences in zip(models, expected, strict=True):
        model.predict(sentences, mini_batch_size=2)
    found: dict[int, list[list[Sentence]]] = {index: [] for index in range(8)}
    errors: list[BaseException] = []

    def work(index: int) -> None:
        try:
            for turn in range(4):
                sentences = [Sentence(text) for text in TEXTS * 3]
                if turn % 2:
                    shared.predict({models[index]: sentences, models[(index + 1) % 8]: [Sentence(TEXTS[0])]})
                else:
                    models[index].predict(sentences, mini_batch_size=2)
                found[index].append(sentences)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for index, turns in found.items():
        assert labels_of(turns[0]) == labels_of(turns[2]) == labels_of(expected[index])
        for turn in turns:
            assert largest_difference(labels_of(expected[index]), labels_of(turn)) < TOLERANCE


def test_predict_together_that_fails_leaves_every_model_as_it_was(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error in a forward pass or in a model reaches the caller, and nothing of it stays."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)]

    def predicted() -> list[Any]:
        sentences = {model: [Sentence(text) for text in TEXTS] for model in models}
        shared.predict(sentences)
        return [labels_of(given) for given in sentences.values()]

    expected = predicted()
    with monkeypatch.context() as patched:
        from transformers.models.bert.modeling_bert import BertPooler

        patched.setattr(BertPooler, "forward", lambda *_: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            predicted()
    assert predicted() == expected
    with monkeypatch.context() as patched:
        patched.setattr(models[1], "_mask_scores", lambda *_: (_ for _ in ()).throw(ArithmeticError("odd")))
        with pytest.raises(ArithmeticError, match="odd"):
            predicted()
    assert predicted() == expected


def test_predict_together_in_windows_of_any_number_of_sentences(base: Callable[[str], str], tmp_path: Path) -> None:
    """Unequal numbers, empty sentences and a single one: each gets its labels, and no vectors stay."""
    shared = SharedBase(base("bert"))
    models = [
        shared.load(save_random(name, base("bert"), tmp_path / str(i), seed=i)[0])
        for i, name in enumerate(["text-classifier", "sequence-tagger", "token-classifier"])
    ]
    together: list[Any] = [[Sentence(TEXTS[i % 3]) for i in range(150)], [Sentence(TEXTS[1])], Sentence(TEXTS[2])]
    together[0][3] = Sentence("")
    separate = copy.deepcopy(together)
    shared.predict({**dict(zip(models, together, strict=True))}, mini_batch_size=4)
    for model, sentences in zip(models, separate, strict=True):
        model.predict(sentences)
    for found, expected in zip(together, separate, strict=True):
        found, expected = ([given] if isinstance(given, Sentence) else given for given in (found, expected))
        assert largest_difference(labels_of(expected), labels_of(found)) < TOLERANCE
        assert any(labels_of(found))
    shared.predict({models[0]: []})


@pytest.mark.parametrize("name", ["sequence-tagger", "prefixed-sequence-tagger"])
def test_predict_together_with_document_context_reads_the_neighbours(
    name: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Context crosses mini-batches, and calls of predict, as it does in Flair."""
    shared = SharedBase(base("bert"))
    models = [
        shared.load(save_random(name, base("bert"), tmp_path / str(i), seed=i, use_context=8)[0]) for i in range(2)
    ]
    together, separate = ([[Sentence(TEXTS[i % 3]) for i in range(60)] for _ in models] for _ in range(2))
    shared.predict(dict(zip(models, together, strict=True)), mini_batch_size=3)
    for model, sentences in zip(models, separate, strict=True):
        model.predict(sentences)
    assert any(sentence.labels for sentences in separate for sentence in sentences)
    assert all(
        largest_difference(labels_of(b), labels_of(a)) < TOLERANCE for a, b in zip(together, separate, strict=True)
    )


@pytest.mark.parametrize("architecture", ["roberta", "deberta-v2", "t5", "gpt2", "llama", "xlnet", "electra", "albert"])
def test_predict_together_on_every_kind_of_base(architecture: str, base: Callable[[str], str], tmp_path: Path) -> None:
    """Positions, relative positions, causal masks: a padded batch gives what a batch of one's own gives."""
    shared = SharedBase(base(architecture))
    targets = {"layer_1"} if architecture == "xlnet" else "all-linear"
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    models = [
        shared.load(save_random("text-classifier", base(architecture), tmp_path / str(i), config=config, seed=i)[0])
        for i in range(3)
    ]
    together, separate = ([[Sentence(text) for text in TEXTS[: i + 1]] for i in range(3)] for _ in range(2))
    shared.predict(dict(zip(models, together, strict=True)))
    for model, sentences in zip(models, separate, strict=True):
        model.predict(sentences)
    assert all(largest_difference(labels_of(b), labels_of(a)) < 1e-4 for a, b in zip(together, separate, strict=True))


def test_shared_base_in_bfloat16_predicts_close_to_fp32_and_saves_exact_values(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Asked for by name, another dtype than that of the training: adapters compute in it, files keep theirs."""
    directory, live = save_random("text-classifier", base("bert"), tmp_path / "model")
    shared = SharedBase(base("bert"), dtype="bfloat16")
    model = shared.load(directory)
    dtypes = {p.dtype for p in model.embeddings.model.parameters()}
    assert dtypes == {torch.bfloat16}
    found, expected = ([Sentence(text) for text in TEXTS] for _ in range(2))
    model.predict(found, return_probabilities_for_all_classes=True)
    live.predict(expected, return_probabilities_for_all_classes=True)
    assert 0 < largest_difference(labels_of(expected), labels_of(found)) < 0.1
    exact = {name: tensor for name, tensor in live.state_dict().items() if "lora" in name}
    stored = model.state_dict()
    assert exact
    assert all(torch.equal(stored[name], tensor) for name, tensor in exact.items())
    model.train()
    assert {p.dtype for n, p in model.embeddings.model.named_parameters() if "lora" in n} == {torch.float32}
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in exact.items())


def test_weights_that_are_cast_once_more_are_kept_as_they_are_now() -> None:
    """What was put in the place of a cast is exact itself; what is a cast still has the value before it."""
    layer = torch.nn.Linear(3, 2)
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    exact_values.cast_(layer, dict(layer.named_parameters()), torch.bfloat16)
    layer.bias.data = torch.tensor([0.1, 0.2])
    exact_values.cast_(layer, dict(layer.named_parameters()), torch.float16)
    stored = layer.state_dict()
    assert {p.dtype for p in layer.parameters()} == {torch.float16}
    assert torch.equal(stored["weight"], before["weight"])
    assert torch.equal(stored["bias"], torch.tensor([0.1, 0.2]))


@pytest.mark.parametrize("module", ["intermediate.dense", "word_embeddings", "LayerNorm"])
@pytest.mark.parametrize(
    ("trained_in", "dtype"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")]
)
def test_copies_of_modules_compute_in_the_dtype_of_the_base_and_are_saved_as_they_were(
    trained_in: str, dtype: str, module: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What ``modules_to_save`` names takes the place of a module of the base, whatever dtype that is asked for."""
    config = lora(target_modules=["query"], modules_to_save=[module])
    directory, live = save_random("text-classifier", base("bert"), tmp_path / "model", config=config, dtype=trained_in)
    model = SharedBase(base("bert"), dtype=dtype).load(directory)
    for path in (tmp_path / "again", tmp_path / "again.pt"):
        found, expected = ([Sentence(text) for text in TEXTS] for _ in range(2))
        model.predict(found, return_probabilities_for_all_classes=True)
        live.predict(expected, return_probabilities_for_all_classes=True)
        assert largest_difference(labels_of(expected), labels_of(found)) < 0.1
        stored = {name: tensor for name, tensor in model.state_dict().items() if "modules_to_save" in name}
        assert stored
        assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in stored.items())
        model.save(path) if path.suffix else flair_peft.save_pretrained(model, path)
        model = TextClassifier.load(path)
    model.train().eval()
    assert all(torch.equal(live.state_dict()[name], model.state_dict()[name]) for name in stored)
    train_a_step(model, "sentiment")
    flair_peft.save_pretrained(model, tmp_path / "trained")
    assert from_pretrained(tmp_path / "trained").state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("architecture", "module"), [("llama", "input_layernorm"), ("gemma", "input_layernorm"), ("qwen3", "q_norm")]
)
def test_copies_of_norms_compute_in_the_dtype_of_the_base(
    architecture: str, module: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Those without a mean give their own dtype to what they norm; a move to another device leaves what is saved."""
    config = lora(target_modules=tiny.ATTENTION_TARGETS[architecture], modules_to_save=[module])
    directory, live = save_random("text-classifier", base(architecture), tmp_path / "model", config=config)
    model = SharedBase(base(architecture), dtype="bfloat16").load(directory)
    model.predict([Sentence(text) for text in TEXTS])
    model.embeddings._apply(torch.clone)
    stored = {name: tensor for name, tensor in model.state_dict().items() if "modules_to_save" in name}
    assert stored
    assert all(torch.equal(live.state_dict()[name], tensor) for name, tensor in stored.items())


def test_shared_base_model_in_bfloat16_is_saved_as_it_was_trained(base: Callable[[str], str], tmp_path: Path) -> None:
    """A model that was trained in bf16 comes back from a shared base's checkpoint bit by bit."""
    directory, _ = save_random("text-classifier", base("bert"), tmp_path / "model", dtype="bfloat16")
    model = SharedBase(base("bert"), dtype="bfloat16").load(directory)
    flair_peft.save_pretrained(model, tmp_path / "again")
    for name in ("adapter_model.safetensors", "head.safetensors"):
        first, second = (load_file(tmp_path / folder / name) for folder in ("model", "again"))
        assert first.keys() == second.keys()
        weights = {key for key in first if key.endswith((".weight", ".bias"))}  # beside them: what a probe gives
        assert weights
        assert all(torch.equal(first[key], second[key]) for key in weights)


@pytest.mark.parametrize(
    ("options", "dtype", "message"),
    [
        ({"dtype": "bfloat16"}, None, "trained on weights in bfloat16, and these are float32.*dtype='bfloat16'"),
        ({"transformers_config_kwargs": {"hidden_dropout_prob": 0.5}}, None, "has another 'hidden_dropout_prob'"),
    ],
)
def test_shared_base_model_of_other_settings_is_refused(
    options: dict[str, Any], dtype: str | None, message: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What would change predictions is never chosen for the user."""
    directory, _ = save_random("text-classifier", base("bert"), tmp_path / "model", **options)
    with pytest.raises(BaseMismatchError, match=message):
        SharedBase(base("bert"), dtype=dtype).load(directory)


def test_shared_base_model_with_other_attention_keeps_it_and_shares(base: Callable[[str], str], tmp_path: Path) -> None:
    """The attention is a setting, not a weight."""
    eager = {"transformers_model_kwargs": {"attn_implementation": "eager"}}
    directories = [
        save_random("text-classifier", base("bert"), tmp_path / str(i), **o)[0] for i, o in enumerate(({}, eager))
    ]
    shared = SharedBase(base("bert"))
    models = [shared.load(directory) for directory in directories]
    assert [m.embeddings.base_model.config._attn_implementation for m in models] == ["sdpa", "eager"]
    assert frozen_addresses(models[0]) == frozen_addresses(models[1])
    corpus, entry = sentence_corpus(), ZOO["text-classifier"]
    assert entry.predict(models[1], corpus) == entry.predict(flair_peft.from_pretrained(directories[1]), corpus)


def test_shared_base_model_of_another_base_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """Models that share nothing with it do not belong to it."""
    directory, _ = save_random("text-classifier", base("electra"), tmp_path / "model")
    with pytest.raises(BaseMismatchError, match="shares no weights with this base"):
        SharedBase(base("bert")).load(directory)


def test_shared_base_of_retrained_weights_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """A base of the same name whose weights are others is not the one."""
    folder = Path(shutil.copytree(base("bert"), tmp_path / "base"))
    directory, _ = save_random("text-classifier", str(folder), tmp_path / "model")
    weights = {name: tensor + 0.01 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseMismatchError, match="its weights differ"):
        SharedBase(str(folder)).load(directory)


@pytest.mark.parametrize("is_whole", [False, True])
def test_shared_base_file_of_flairs_trainer_shares_what_is_the_bases(
    is_whole: bool, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Slim files find the base; self-contained ones hold it, and share what is equal bit by bit."""
    _, live = save_random("sequence-tagger", base("bert"), tmp_path / "model")
    live.save(tmp_path / "model.pt", save_base=is_whole)
    shared = SharedBase(base("bert"))
    models = [shared.load(tmp_path / "model.pt"), shared.load(tmp_path / "model")]
    assert frozen_addresses(models[0]) == frozen_addresses(models[1])
    corpus, entry = sentence_corpus(), ZOO["sequence-tagger"]
    assert entry.predict(models[0], corpus) == entry.predict(live, corpus)
    before = entry.predict(models[1], corpus)
    for parameter in models[0].embeddings.model.parameters():
        parameter.requires_grad_(True)
    models[0].train()
    models[0].embeddings.hidden_states(torch.tensor([[1, 2]]))[0].sum().backward()
    torch.optim.SGD(models[0].parameters(), lr=1.0).step()
    assert entry.predict(models[1], corpus) == before


def test_shared_base_multitask_model_has_one_adapter_for_the_tasks_that_share(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Tasks on one embedding come back on one embedding, and that on the base."""
    directory, _ = save_random("multitask", base("bert"), tmp_path / "model")
    tagger, _ = save_random("sequence-tagger", base("bert"), tmp_path / "tagger")
    shared = SharedBase(base("bert"))
    model, other = shared.load(directory), shared.load(tagger)
    assert isinstance(model, MultitaskModel)
    modules = {id(m) for m in model.modules() if isinstance(m, PeftTransformerEmbeddings)}
    assert len(model.tasks) > 1
    assert len(modules) == 1
    assert frozen_addresses(model) == frozen_addresses(other)


def test_shared_base_model_trained_on_a_quantised_base_is_refused(base: Callable[[str], str], tmp_path: Path) -> None:
    """On weights that were never rounded it would predict something else."""
    directory, _ = save_random("text-classifier", base("bert"), tmp_path, quantization_config=BitsAndBytesConfig(True))
    with pytest.raises(BaseMismatchError, match="trained on a quantised base"):
        SharedBase(base("bert")).load(directory)


def test_predict_together_says_once_what_gets_passes_of_its_own(
    base: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Of each method and reason, however often it predicts and for however many models."""
    config = lora(target_modules=None, use_dora=True)
    shared = SharedBase(base("bert"))
    saved = [
        save_random("text-classifier", base("bert"), tmp_path / str(i), config=config, seed=i)[0] for i in range(2)
    ]
    models = [shared.load(directory) for directory in saved]
    with caplog.at_level(logging.INFO, logger="flair_peft"):
        for _ in range(2):
            shared.predict({model: [Sentence(text) for text in TEXTS] for model in models})
    said = [record.getMessage() for record in caplog.records if "passes of their own" in record.getMessage()]
    assert len(said) == 1
    assert "DoRA" in said[0]


def test_shared_base_quantised_is_refused(base: Callable[[str], str]) -> None:
    """Weights that cannot be shared are not loaded to be shared."""
    with pytest.raises(AdapterConfigError, match="quantised or spread over devices"):
        SharedBase(base("bert"), quantization_config=BitsAndBytesConfig(load_in_4bit=True))


def test_shared_base_stock_file_with_its_config_shares(base: Callable[[str], str], tmp_path: Path) -> None:
    """Old files can be served from the base, too."""
    from flair.embeddings import TransformerDocumentEmbeddings

    config = lora(target_modules=None)
    dictionary = sentence_corpus().make_label_dictionary("sentiment", add_unk=False)
    flair_peft.uninstall()
    stock = TransformerDocumentEmbeddings(base("bert"), peft_config=copy.deepcopy(config))
    TextClassifier(stock, label_type="sentiment", label_dictionary=dictionary).save(tmp_path / "old.pt")
    flair_peft.install()
    shared = SharedBase(base("bert"))
    model = shared.load(tmp_path / "old.pt", peft_config=config)
    other = shared.load(save_random("text-classifier", base("bert"), tmp_path / "model")[0])
    assert len(frozen_addresses(model) & frozen_addresses(other)) > 30


def test_unload_frees_the_model_and_leaves_the_others(base: Callable[[str], str], tmp_path: Path) -> None:
    """What was loaded goes with its last reference, also after it predicted together with others."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(3)]
    sentences = {model: [Sentence(TEXTS[0])] for model in models}
    shared.predict(sentences)
    adapter = weakref.ref(next(p for n, p in models[0].named_parameters() if "lora_A" in n))
    shared.unload(models[0])
    with pytest.raises(AdapterConfigError, match="it is not one of the 2 models"):
        shared.unload(models[0])
    sentences.pop(models[0])
    del models[0]
    gc.collect()
    assert adapter() is None
    shared.predict(sentences)
    third = weakref.ref(models[1])
    sentences.pop(models[1])
    del models[1]
    gc.collect()
    assert third() is None
    assert len(shared.models) == 1


def test_predict_together_keeps_nothing_of_bases_whose_models_are_gone(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Each set of trained rows is a base of its own, with a mixing model that goes with the models on it."""
    shared = SharedBase(base("bert"))
    models = []
    for number in range(3):
        _, live = save_random("text-classifier", base("bert"), tmp_path / str(number), seed=number)
        live.embeddings.base_model.get_input_embeddings().weight.data[-1] = float(number)
        flair_peft.save_pretrained(live, tmp_path / str(number))
        models += [shared.load(tmp_path / str(number)) for _ in range(2)]
    del live
    shared.predict({model: [Sentence(TEXTS[0])] for model in models})
    mixing = [weakref.ref(each) for by_method in shared._mixed_batches._models.values() for each in by_method.values()]
    assert len(mixing) == 3
    del models[2:]
    gc.collect()
    assert [each() is not None for each in mixing] == [True, False, False]
    sentences = {model: [Sentence(TEXTS[0])] for model in models}
    with counting_forward_passes() as passes:
        shared.predict(sentences)
    assert passes == [2]


def test_predict_with_something_else_than_a_model_is_refused(base: Callable[[str], str]) -> None:
    """The error says what a key must be."""
    with pytest.raises(AdapterConfigError, match="it is no Flair model"):
        SharedBase(base("bert")).predict({"ner": [Sentence("a")]})  # type: ignore[dict-item]


def test_shared_base_names_of_embeddings_differ(base: Callable[[str], str], tmp_path: Path) -> None:
    """Flair stores vectors under these names."""
    shared = SharedBase(base("bert"))
    models = [shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(3)]
    assert len({model.embeddings.name for model in models}) == 3
    assert shared.load(tmp_path / "0").embeddings.name == models[0].embeddings.name  # the same adapter


def test_sequence_tagger_and_classifier_of_one_sentence_list(base: Callable[[str], str], tmp_path: Path) -> None:
    """The example of the documentation."""
    shared = SharedBase(base("bert"))
    ner = shared.load(save_random("sequence-tagger-crf", base("bert"), tmp_path / "ner")[0])
    sentiment = shared.load(save_random("text-classifier", base("bert"), tmp_path / "sentiment")[0])
    assert isinstance(ner, SequenceTagger)
    together, separate = ([Sentence(text) for text in TEXTS] for _ in range(2))
    shared.predict({ner: together, sentiment: together}, mini_batch_size=2)
    ner.predict(separate)
    sentiment.predict(separate)
    assert largest_difference(labels_of(separate), labels_of(together)) < TOLERANCE
    assert all(sentence.get_labels("sentiment") for sentence in together)


def test_predict_together_with_options_of_single_models_gives_each_its_own(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A tagger and classifiers take options that the others do not know, or other values of one that all get."""
    shared = SharedBase(base("bert"))
    names = ("sequence-tagger-crf", "text-classifier", "text-classifier")
    models: Any = [
        shared.load(save_random(name, base("bert"), tmp_path / str(i), seed=i)[0]) for i, name in enumerate(names)
    ]
    models[2]._label_type = "topic"
    options: dict[Model, dict[str, Any]] = {
        models[0]: {"force_token_predictions": True},
        models[2]: {"return_probabilities_for_all_classes": False, "label_name": "sentiment of another"},
    }
    together, separate = ([Sentence(text) for text in TEXTS] for _ in range(2))
    shared.predict(dict.fromkeys(models, together), model_options=options, return_probabilities_for_all_classes=True)
    for model in models:
        model.predict(separate, **{"return_probabilities_for_all_classes": True, **options.get(model, {})})
    assert largest_difference(labels_of(separate), labels_of(together)) < TOLERANCE
    assert {len(sentence.get_labels("sentiment of another")) for sentence in together} == {1}
    assert {len(sentence.get_labels("sentiment")) for sentence in together} == {len(models[1].label_dictionary)}


def test_predict_together_under_one_label_name_leaves_the_labels_of_the_last_model(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A name that an option gives counts as the model's own: such models do not predict side by side."""
    shared = SharedBase(base("bert"))
    models: Any = [
        shared.load(save_random("text-classifier", base("bert"), tmp_path / str(i), seed=i)[0]) for i in range(2)
    ]
    models[1]._label_type = "topic"
    asked: list[int] = []
    together, separate = ([Sentence(text) for text in TEXTS] for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        run = shared._threads.run
        patch.setattr(shared._threads, "run", lambda tasks, answer: (asked.append(len(tasks)), run(tasks, answer)))
        shared.predict(dict.fromkeys(models, together))
        shared.predict(dict.fromkeys(models, together), model_options={models[1]: {"label_name": "sentiment"}})
    assert asked == [2, 1, 1]
    models[1].predict(separate, label_name="sentiment")
    found, expected = ([s.get_label("sentiment").score for s in given] for given in (together, separate))
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_predict_together_with_what_is_no_model_of_this_base_says_so(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A text, a list, a model from elsewhere and one that was unloaded each end in an error that names it."""
    save_random("text-classifier", base("bert"), tmp_path / "model")
    shared = SharedBase(base("bert"))
    model, elsewhere = shared.load(tmp_path / "model"), from_pretrained(tmp_path / "model")
    corpus = sentence_corpus()
    pair = DataPair(Sentence("Berlin"), Sentence("Bern"))
    for given in ("Berlin", ["Berlin"], [["Berlin"]], corpus, [corpus], [corpus.test], pair, [pair]):
        with pytest.raises(PredictionSetupError, match="labels data points"):
            shared.predict({model: given})
    for options in ({elsewhere: {"label_name": "other"}}, {"model": {"label_name": "other"}}, {model: None}, [{}]):
        with pytest.raises(PredictionSetupError, match="with models of the sentences"):
            shared.predict({model: [Sentence("Berlin")]}, model_options=options)
    for given in ("Berlin", [Sentence("Berlin")], Sentence("Berlin"), {"model": Sentence("Berlin")}):
        with pytest.raises(AdapterConfigError, match=r"Pass \{model: sentences\}"):
            shared.predict(given)
    shared.unload(model)
    for stranger in (model, elsewhere):
        with pytest.raises(AdapterConfigError, match="loaded elsewhere, or unloaded before"):
            shared.predict({stranger: [Sentence("Berlin")]})
        with pytest.raises(AdapterConfigError, match="loaded elsewhere, or unloaded before"):
            shared.unload(stranger)
        stranger.predict(Sentence("Berlin"))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_bounds_of_what_is_built_know_a_base_that_is_alive_or_only_compared(
    dtype: str | None, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of a base count whether it is read, found in memory, or read in another dtype to be compared."""
    monkeypatch.setattr(memory_check, "_FEW_TENSORS", 0)
    monkeypatch.setattr(memory_check, "_FEW_NUMBERS", 0)
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    config = lora(r=2, lora_alpha=6, target_modules=["query"])
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config)
    flair_peft.save_pretrained(
        TextClassifier(embeddings, label_dictionary=labels, label_type="class"), tmp_path / "model"
    )
    shared = SharedBase(base("bert"), dtype=dtype)
    assert {shared.load(tmp_path / "model") for _ in range(2)} == {*shared.models}
    assert all(flair_peft.from_pretrained(tmp_path / "model") for _ in range(2))


def test_trained_weights_of_a_shared_base_get_memory_of_their_own_before_they_get_a_gradient(
    base: Callable[[str], str],
) -> None:
    """Optimisers on a GPU read the addresses of what they write to, which copies nothing."""
    shared = SharedBase(base("bert"))
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    config = lora(r=2, lora_alpha=6, target_modules=["query"], bias="all")
    model = TextClassifier(
        PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config), label_dictionary=labels, label_type="class"
    )
    layer = model.embeddings.base_model.encoder.layer[0].output.dense.weight
    layer.requires_grad_(True)  # unfrozen by hand
    model.train()
    model.forward_loss([Sentence("Berlin").add_label("class", "a")])[0].backward()
    trained = [parameter for parameter in model.embeddings.parameters() if parameter.requires_grad]
    assert len(trained) > 10
    assert not any(map(host_internals.is_copied_on_write, trained))
    frozen = [parameter for parameter in model.embeddings.parameters() if not parameter.requires_grad]
    assert any(map(host_internals.is_copied_on_write, frozen))
    assert shared.models == []


@pytest.mark.parametrize("read", [flair_peft.merge, pickle.dumps, copy.deepcopy], ids=["merge", "pickle", "deepcopy"])
def test_model_that_is_copied_goes_on_sharing_its_base(
    read: Callable[[Any], Any], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Who reads a model as if it might be written to gets a copy, and leaves the model's memory as it is."""
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    config = lora(r=2, lora_alpha=6, target_modules=["query"])
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=config)
    flair_peft.save_pretrained(
        TextClassifier(embeddings, label_dictionary=labels, label_type="class"), tmp_path / "model"
    )
    model = SharedBase(base("bert")).load(tmp_path / "model")
    before = {name: mapped_memory.address(parameter) for name, parameter in model.named_parameters()}
    assert read(model)
    assert {name: mapped_memory.address(parameter) for name, parameter in model.named_parameters()} == before


def stacked_tagger(base: str, label_type: str, *, field: str | None = None, seed: int = 0) -> SequenceTagger:
    """Return a random tagger whose adapter stands behind a table of words, or of the labels of a type."""
    torch.manual_seed(seed)
    entries = (
        ["PUNCT", "NAME", "WORD"] if field else sorted({token.text.lower() for s in TEXTS for token in Sentence(s)})
    )
    table = WordEmbeddings(
        None,
        vocab={entry: place for place, entry in enumerate([*entries, "<unk>"])},
        embedding_length=4,
        field=field,
        name="table",
    )
    torch.nn.init.normal_(table.embedding.weight)
    embeddings = StackedEmbeddings([table, PeftTransformerWordEmbeddings(base, peft_config=lora())])
    labels = sentence_corpus().make_label_dictionary(label_type, add_unk=False)
    model = SequenceTagger(embeddings, tag_dictionary=labels, tag_type=label_type, use_rnn=False, use_crf=False)
    for parameter in model.linear.parameters():
        torch.nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("field", [None, "pos"])
@pytest.mark.parametrize("storage", ["none", "cpu"])
def test_predict_together_waits_for_models_whose_adapter_stands_in_a_stack(
    storage: str, field: str | None, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What stands before the adapter is stored, and may read labels: neither bears another model in between."""
    shared, together, separate = SharedBase(base("bert")), [*map(Sentence, TEXTS)], [*map(Sentence, TEXTS)]
    models = []
    for number, (label_type, of) in enumerate((("pos", None), ("ner", field))):
        flair_peft.save_pretrained(
            stacked_tagger(base("bert"), label_type, field=of, seed=number), tmp_path / label_type
        )
        models.append(shared.load(tmp_path / label_type))
        from_pretrained(tmp_path / label_type).predict(separate, embedding_storage_mode=storage)
    shared.predict(dict.fromkeys(models, together), embedding_storage_mode=storage)
    assert largest_difference(labels_of(separate), labels_of(together)) < TOLERANCE


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_predict_together_keeps_the_vectors_that_it_keeps_apart(
    order: tuple[int, ...], kept: tuple[int, ...], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Each model may be asked to keep its vectors, or not; a later one that keeps none clears those of earlier ones."""
    shared = SharedBase(base("bert"))
    kinds = ("sequence-tagger", "text-classifier")
    directories = [save_random(kind, base("bert"), tmp_path / kind, config=lora(), seed=1)[0] for kind in kinds]
    models = [shared.load(directories[number]) for number in order]
    options = {models[number]: {"embedding_storage_mode": "cpu"} for number in kept}
    together, apart = [*map(Sentence, TEXTS)], [*map(Sentence, TEXTS)]
    for model in models:
        model.predict(apart, mini_batch_size=2, **options.get(model, {}))
    shared.predict(dict.fromkeys(models, together), mini_batch_size=2, model_options=options)
    for one, other in zip(together, apart, strict=True):
        for mine, theirs in zip([one, *one], [other, *other], strict=True):
            assert mine._embeddings.keys() == theirs._embeddings.keys()
    assert any(sentence._embeddings or sentence[0]._embeddings for sentence in together) is (1 in kept)


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("config", [{"bias": "all"}, {"init_lora_weights": "pissa"}])
def test_base_in_another_dtype_takes_weights_of_the_base_that_a_file_holds(
    config: dict[str, Any], dtype: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Trained biases and rewritten weights compute with the others, in the dtype that was chosen."""
    directory, _ = save_random("text-classifier", base("bert"), tmp_path / "model", config=lora(**config))
    loaded = SharedBase(base("bert"), dtype=dtype).load(directory)
    exact = from_pretrained(directory)
    trained = {key for key, p in exact.embeddings.model.named_parameters() if "bias" in key and "lora" not in key}
    half = dict(loaded.embeddings.model.named_parameters())
    whole = dict(exact.embeddings.model.named_parameters())
    assert {half[key].dtype for key in trained} == {getattr(torch, dtype)}
    assert all(torch.equal(half[key], whole[key].to(half[key].dtype)) for key in trained)
    points = [[*map(Sentence, TEXTS)] for _ in range(2)]
    for each, those in zip((loaded, exact), points, strict=True):
        each.predict(those)
    assert largest_difference(*map(labels_of, points)) < 0.1


@pytest.mark.parametrize("size", [0, -1, "3", 2.0])
def test_predict_refuses_what_is_no_number_of_sentences(size: Any, base: Callable[[str], str], tmp_path: Path) -> None:
    """The memory of a pass is bounded by it."""
    shared = SharedBase(base("bert"))
    model = shared.load(save_random("text-classifier", base("bert"), tmp_path / "model")[0])
    with pytest.raises(PredictionSetupError, match=re.escape(f"mini_batch_size={size!r}")):
        shared.predict({model: [Sentence("hello")]}, mini_batch_size=size)
    with pytest.raises(PredictionSetupError, match="share their forward passes"):
        shared.predict({model: [Sentence("hello")]}, model_options={model: {"mini_batch_size": 2}})


def test_predict_takes_a_data_set_of_flair(base: Callable[[str], str], tmp_path: Path) -> None:
    """Its sentences have the labels, as after the model's own ``predict``."""
    shared = SharedBase(base("bert"))
    model = shared.load(save_random("sequence-tagger", base("bert"), tmp_path / "model")[0])
    together, separate = ([*map(Sentence, TEXTS)] for _ in range(2))
    shared.predict({model: FlairDatapointDataset(together)})
    model.predict(separate)
    assert labels_of(together) == labels_of(separate)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("way", ["moved", "moved, and said where", "link"])
def test_base_under_another_name_is_shared_in_any_dtype(
    way: str, dtype: str | None, base: Callable[[str], str], tmp_path: Path
) -> None:
    """What a file says of the base it was trained on tells, not where that lay; another base is still refused."""
    trained_on, now = tmp_path / "trained on", tmp_path / "now"
    shutil.copytree(base("bert"), trained_on)
    directory, _ = save_random("text-classifier", str(trained_on), tmp_path / "model")
    entry = ZOO["text-classifier"]
    expected = entry.predict(SharedBase(trained_on, dtype=dtype).load(directory), entry.corpus())
    if way == "link":
        now.symlink_to(trained_on)
    else:
        trained_on.rename(now)
    options = {"base_model": str(now)} if way == "moved, and said where" else {}
    shared = SharedBase(now, dtype=dtype)
    for _ in range(2):
        assert entry.predict(shared.load(directory, **options), entry.corpus()) == expected
    others = tmp_path / "others"
    tiny.build("bert", others, seed=9)
    with pytest.raises(FlairPeftError):
        SharedBase(others, dtype=dtype).load(directory, base_model=str(others))
