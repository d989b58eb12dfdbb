"""Sentences that run in groups of similar length or in packed rows: what they get is what one pass for all gives."""

from __future__ import annotations

import functools
import itertools
import json
import random
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.embeddings import TransformerDocumentEmbeddings
from flair.nn import Model
from peft import AdaLoraConfig, PromptTuningConfig
from peft.tuners.lora.config import VeloraConfig
from torch import nn

from flair_peft import PeftTransformerDocumentEmbeddings, PeftTransformerEmbeddings, PeftTransformerWordEmbeddings
from flair_peft.base import changed_modules
from flair_peft.embeddings import adapted, batch_division, division_trial, length_groups, packed_rows, pass_cost
from flair_peft.embeddings.adapted import ForwardPass
from flair_peft.embeddings.batch_division import Division
from flair_peft.embeddings.length_groups import LengthGroups
from flair_peft.embeddings.packed_rows import PackedRows
from flair_peft.embeddings.pass_cost import Cost
from tests.support import tiny
from tests.support.configs import lora
from tests.support.method_cases import make_embeddings, one_kind_each
from tests.support.methods import Method
from tests.support.models import make
from tests.support.selection import few
from tests.support.vectors import is_close, is_same
from tests.support.zoo import ZOO, copy_point

Base = Callable[[str], str]

TEXTS = (
    "I love it",
    "Berlin and Paris are large cities in Europe , and Bern is not .",
    "Who ?",
    "The founder of Apple , Steve Jobs , was born in San Francisco .",
    "She sold the house in New York and bought a car .",
    "It is great !",
)

TARGETS = {**tiny.ATTENTION_TARGETS, **tiny.MORE_TARGETS}
NEVER_GROUPED = {"fnet"}  # takes no mask
# Of those with tiny models here, on the versions that are installed.
ENCODERS_TO_PACK = ("bert", "roberta", "xlm-roberta", "electra", "mpnet", "squeezebert")


Divided = list[Division | None]


# Where a pass costs as much as a token, groups do without any padding; where it costs more, rows are packed.
PRICES = {"groups": 1.0, "packed": 30.0}


LIBRARIES = changed_modules.LIBRARIES


@pytest.fixture(autouse=True)
def _modules_of_tests_stand_for_those_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changed_modules, "LIBRARIES", LIBRARIES | {"tests"})


@pytest.fixture(params=PRICES)
def divided(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Divided:
    """Let passes cost little, forget all trials, and return how each batch of several rows is divided."""
    return watch(monkeypatch, request.param)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> Divided:
    """Do the same where rows are packed if the model takes them."""
    return watch(monkeypatch, "packed")


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Divided:
    """Do the same where groups cost less."""
    return watch(monkeypatch, "groups")


def watch(monkeypatch: pytest.MonkeyPatch, price: str) -> Divided:
    found: Divided = []
    find = division_trial.find_division

    def spy(run: Any, inputs: Any, **kwargs: Any) -> Division | None:
        groups = find(run, inputs, **kwargs)
        if len(inputs["input_ids"]) > 1:  # what new embeddings try out is a word alone
            found.append(groups)
        return groups

    monkeypatch.setattr(pass_cost, "cost_of", lambda *_: Cost(PRICES[price], 0.0))
    monkeypatch.setattr(division_trial, "find_division", spy)
    monkeypatch.setattr(division_trial, "_verdicts", {})
    return found


def embed(embeddings: PeftTransformerEmbeddings, sentences: Sequence[Sentence], *, grouped: bool) -> list[torch.Tensor]:
    embeddings.length_grouping = grouped
    for sentence in sentences:
        sentence.clear_embeddings()
    embeddings.embed(list(sentences))
    vectors = [sentence.embedding for sentence in sentences if embeddings.document_embedding]
    return vectors + [t.embedding for s in sentences for t in s if embeddings.token_embedding]


def are_alike(embeddings: PeftTransformerEmbeddings, sentences: Sequence[Sentence], *, tolerance: float = 1e-4) -> bool:
    """Whether the sentences have the vectors that one pass gives them, up to rounding."""
    grouped, whole = (embed(embeddings, sentences, grouped=each) for each in (True, False))
    return is_close(grouped, whole, tolerance=tolerance)


def cheapest(lengths: Sequence[int], cost: Cost) -> float:
    """Return the cost of the best of all ways to cut the sorted lengths."""
    ordered = sorted(lengths, reverse=True)
    found = []
    for cuts in itertools.product((False, True), repeat=len(ordered) - 1):
        ends = [i + 1 for i, is_cut in enumerate(cuts) if is_cut] + [len(ordered)]
        starts = [0, *ends[:-1]]
        found.append(sum(cost.of(end - start, ordered[start]) for start, end in zip(starts, ends, strict=True)))
    return min(found)


@pytest.mark.parametrize("fixed", [1.0, 20.0, 60.0, 1000.0])
def test_divide_finds_the_groups_that_cost_least(fixed: float) -> None:
    """No other way to cut the rows, sorted by length, costs less; each row is in one group."""
    generator, cost = random.Random(0), Cost(fixed, 0.003)
    for _ in range(20):
        lengths = [generator.randint(3, 60) for _ in range(9)]
        groups = length_groups.divide(lengths, cost)
        assert sorted(itertools.chain(*groups)) == list(range(9))
        paid = sum(cost.of(len(rows), max(lengths[row] for row in rows)) for rows in groups)
        assert paid == pytest.approx(cheapest(lengths, cost))


def test_divide_keeps_a_batch_whole_where_passes_cost_more_than_padding() -> None:
    """Where a group stops paying depends on the lengths and on what a pass costs, not on a number of groups."""
    lengths = [10, 12, 30, 31]
    assert length_groups.divide(lengths, Cost(35, 0)) == [[3, 2], [1, 0]]
    assert length_groups.divide(lengths, Cost(39, 0)) == [[3, 2, 1, 0]]
    assert length_groups.divide([7] * 50, Cost(0, 0)) == [list(range(50))]


def test_cost_is_higher_on_a_gpu_in_half_precision_and_quantised(base: Base) -> None:
    """A pass costs more tokens wherever tokens are computed faster, and the more the smaller the base is."""
    model = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()).base_model
    on_cpu, on_gpu = (pass_cost.cost_of(model, torch.device(kind)) for kind in ("cpu", "cuda"))
    assert 1000 < on_cpu.fixed < on_gpu.fixed
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pass_cost.cost_of(model, torch.device("cpu")).fixed > on_cpu.fixed
    model.quantization_method = "bitsandbytes"
    assert pass_cost.cost_of(model, torch.device("cpu")).fixed == pytest.approx(4 * on_cpu.fixed)


@pytest.mark.parametrize("kind", [PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings])
@pytest.mark.parametrize("architecture", TARGETS)
def test_architecture_has_the_vectors_of_one_pass(
    architecture: str, kind: type[PeftTransformerEmbeddings], base: Base, divided: Divided
) -> None:
    """Images and boxes included; what depends on padding is found out and has one pass."""
    targets = ["dense"] if architecture == "squeezebert" else TARGETS[architecture]
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    options = {"transformers_tokenizer_kwargs": {"use_fast": False}} if architecture == "bert-slow" else {}
    embeddings = kind(base(architecture), peft_config=config, allow_long_sentences=False, **options)
    assert are_alike(embeddings, tiny.make_sentences(architecture, TEXTS))
    if architecture != "squeezebert":  # whichever it is, the trial found it
        assert (divided[0] is None) == (architecture in NEVER_GROUPED)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("architecture", [*ENCODERS_TO_PACK, *tiny.DECODERS])
def test_architecture_that_takes_packed_rows_gets_them(
    architecture: str, attention: str, base: Base, packed: Divided
) -> None:
    """Encoders with a mask for each token, and decoders with one that is ready to be added."""
    if attention == "sdpa" and architecture in ("electra", "mpnet", "squeezebert"):
        pytest.skip("transformers has no such attention for it")
    targets = ["dense"] if architecture == "squeezebert" else TARGETS[architecture]
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    embeddings = PeftTransformerWordEmbeddings(base(architecture), peft_config=config, attn_implementation=attention)
    assert are_alike(embeddings, tiny.make_sentences(architecture, TEXTS))
    assert isinstance(packed[0], PackedRows)
    assert packed[0].form.is_causal is (architecture in tiny.DECODERS)


@pytest.mark.parametrize(
    "options",
    [
        {"subtoken_pooling": "last"},
        {"subtoken_pooling": "first_last"},
        {"subtoken_pooling": "mean"},
        {"layers": "all"},
        {"layers": "-1,0,1", "layer_mean": False},
        {"after_final_norm": True, "layers": "-2,-1", "layer_mean": False},
        {"use_context": 4},
        {"is_document_embedding": True, "cls_pooling": "mean"},
        {"is_document_embedding": True, "cls_pooling": "max", "layers": "all"},
        {"dtype": "bfloat16"},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["bert", "modernbert"])
def test_settings_of_embeddings_give_the_vectors_of_one_pass(
    architecture: str, options: dict[str, Any], base: Base, divided: Divided
) -> None:
    """All poolings, layers and contexts read the rows of the groups as they read those of one pass."""
    config = lora(target_modules=TARGETS[architecture])
    embeddings = PeftTransformerWordEmbeddings(base(architecture), peft_config=config, **options)
    sentences = [Sentence(text) for text in TEXTS]
    assert are_alike(embeddings, sentences, tolerance=0.1 if "dtype" in options else 1e-4)
    assert divided[0] is not None


def test_long_sentences_give_the_vectors_of_one_pass(base: Base, divided: Divided) -> None:
    """Windows are rows of their own, and Flair puts them together afterwards."""
    embeddings = PeftTransformerWordEmbeddings(
        base("bert"), peft_config=lora(), is_document_embedding=True, cls_pooling="mean"
    )
    sentences = [Sentence(text) for text in (*TEXTS, " ".join([TEXTS[1]] * 25))]
    assert are_alike(embeddings, sentences)
    assert divided[0] is not None
    assert sum(map(len, divided[0].rows)) > len(sentences)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("kind", [PeftTransformerWordEmbeddings, PeftTransformerDocumentEmbeddings])
def test_virtual_rows_give_the_vectors_of_one_pass(
    keep: bool, kind: type[PeftTransformerEmbeddings], base: Base, divided: Divided
) -> None:
    """The rows of a prompt stand in front of each group's, whether they are read or not."""
    config = PromptTuningConfig(num_virtual_tokens=3)
    embeddings = kind(base("bert"), peft_config=config, keep_virtual_rows=keep, cls_pooling="mean")
    assert are_alike(embeddings, [Sentence(text) for text in TEXTS])
    assert divided[0] is not None
    assert divided[0].first == 3


@pytest.mark.parametrize(("method", "kind"), one_kind_each(options=False))
def test_method_gives_the_vectors_of_one_pass(method: Method, kind: str, base: Base, divided: Divided) -> None:
    """Whatever a method adds to a model; those that look at the whole batch have one pass."""
    embeddings = make_embeddings(method, kind, base, torch.float32)
    assert are_alike(embeddings, [Sentence(text) for text in TEXTS])


# Flair joins the texts of each pair or triple, and embeds them one by one: there is nothing to divide.
ONE_BY_ONE = {"text-pair-classifier", "text-pair-regressor", "text-triple-classifier"}
# The texts of these are so much alike in length that no two of them fit into a row that is worth it.
ALIKE = {
    "span-classifier",
    "span-classifier-candidates",
    "relation-classifier-special-tokens",
    "text-pair-classifier-separate",
    "prefixed-sequence-tagger",
}


# Models that draw random numbers of their own, or that hold what is no loss of a batch, are like these.
@pytest.mark.parametrize(
    "name", few(ZOO, ("text-classifier", "sequence-tagger-crf", "relation-extractor", "tars-tagger"))
)
def test_model_has_the_loss_and_the_gradients_of_one_pass(
    name: str, base: Base, divided: Divided, request: pytest.FixtureRequest
) -> None:
    """For every model class, in training mode and without dropout."""
    entry = ZOO[name]
    model = make(entry, base("bert"), lora(target_modules="all-linear"))
    whole, grouped = (loss_and_gradients(entry, model, grouped=each) for each in (False, True))
    undivided = ONE_BY_ONE | (ALIKE if request.node.callspec.params["divided"] == "packed" else set())
    assert any(groups is not None for groups in divided) is (name not in undivided)
    assert grouped.keys() == whole.keys()
    for key, expected in whole.items():
        torch.testing.assert_close(grouped[key], expected, atol=1e-4, rtol=1e-3, msg=key)


def test_method_that_averages_over_a_pass_has_the_gradients_of_one(base: Base, divided: Divided) -> None:
    """VeLoRA's vectors are the same in groups, so that no trial tells; predictions go on being divided."""
    entry = ZOO["text-classifier"]
    model = make(entry, base("bert"), lora(velora_config=VeloraConfig(num_groups=4)))
    whole, grouped = (loss_and_gradients(entry, model, grouped=each) for each in (False, True))
    assert any("lora_A" in name and gradient.any() for name, gradient in whole.items())
    for key, expected in whole.items():
        torch.testing.assert_close(grouped[key], expected, atol=1e-6, rtol=1e-5, msg=key)
    assert not any(groups is not None for groups in divided)
    model.eval()
    model.predict([copy_point(point) for point in entry.corpus().train])
    assert any(groups is not None for groups in divided)


def loss_and_gradients(entry: Any, model: Model, *, grouped: bool) -> dict[str, torch.Tensor]:
    for module in model.modules():
        if isinstance(module, nn.Dropout) or type(module).__name__ in ("WordDropout", "LockedDropout"):
            module.p = module.dropout_rate = 0.0
        if isinstance(module, PeftTransformerEmbeddings):
            module.length_grouping = grouped
    random.seed(0)
    torch.manual_seed(0)
    points = [copy_point(point) for point in entry.transform_corpus(model, entry.corpus()).train]
    model.train()
    model.zero_grad()
    loss, _ = model.forward_loss(points)
    loss.backward()
    return {"": loss.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_gradients_of_one_pass(
    use_reentrant: bool, base: Base, divided: Divided
) -> None:
    """Layers that are computed again in the backward pass are those of each group."""
    entry = ZOO["text-classifier"]
    model = make(entry, base("bert"), lora(target_modules="all-linear"))
    expected = loss_and_gradients(entry, model, grouped=False)
    model.embeddings.base_model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = loss_and_gradients(entry, model, grouped=True)
    assert divided[-1] is not None
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, atol=1e-4, rtol=1e-3, msg=key)


def test_trial_within_autocast_leaves_the_gradients(base: Base, divided: Divided) -> None:
    """What autocast casts without a gradient during a trial is not what the training step computes with."""
    entry = ZOO["text-classifier"]
    model = make(entry, base("bert"), lora(target_modules="all-linear"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = loss_and_gradients(entry, model, grouped=True)
    assert divided == [divided[0]]
    assert divided[0] is not None
    expected = loss_and_gradients(entry, model, grouped=False)
    assert found.keys() == expected.keys()
    for name in [name for name in expected if "lora_" in name]:
        assert torch.cosine_similarity(found[name].flatten(), expected[name].flatten(), dim=0) > 0.9, name


def test_small_batch_is_computed_in_one_pass_as_stock_flair_does(base: Base) -> None:
    """Where groups do not pay, the bits are those of the whole batch."""
    stock = TransformerDocumentEmbeddings(base("bert"))
    ours = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    sentences = [Sentence(text) for text in TEXTS]
    stock.embed(sentences)
    expected = [sentence.embedding for sentence in sentences]
    with ours.model.disable_adapter():
        assert is_same(embed(ours, sentences, grouped=True), expected)


def test_switch_and_maximal_length_leave_one_pass(base: Base, divided: Divided) -> None:
    """length_grouping=False gives the bits of stock Flair for any lengths; so does padding to the model's length."""
    sentences = [Sentence(text) for text in TEXTS]
    for options in ({"length_grouping": False}, {"force_max_length": True}):
        embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), **options)
        embeddings.embed(sentences)
    assert not divided


def test_switch_is_stored_only_where_it_is_off(base: Base) -> None:
    """Files are what they were before it was there, and a model without groups has none after loading."""
    on, off = (
        PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), length_grouping=each)
        for each in (True, False)
    )
    assert "length_grouping" not in on.to_params()
    assert PeftTransformerDocumentEmbeddings.from_params(on.to_params()).length_grouping
    assert not PeftTransformerDocumentEmbeddings.from_params(off.to_params()).length_grouping


class PaddingShows(nn.Module):
    """An output layer that adds the length of the batch beyond a number of tokens, and counts its passes."""

    def __init__(self, layer: nn.Module, beyond: int) -> None:
        super().__init__()
        self.layer, self.beyond, self.passes = layer, beyond, 0
        self.register_buffer("longest", torch.zeros(1))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.passes += 1
        outputs = self.layer(*args, **kwargs)
        states = outputs[0] if isinstance(outputs, tuple) else outputs
        self.longest = torch.tensor([float(states.shape[1])])
        changed = states + max(0, states.shape[1] - self.beyond) * 0.1
        return (changed, *outputs[1:]) if isinstance(outputs, tuple) else changed


def make_dependent(base: str, *, beyond: int) -> tuple[PeftTransformerWordEmbeddings, PaddingShows]:
    embeddings = PeftTransformerWordEmbeddings(base, peft_config=lora())
    layers = embeddings.base_model.encoder.layer
    layers[1] = PaddingShows(layers[1], beyond).eval()
    return embeddings, layers[1]


def test_model_that_depends_on_padding_has_one_pass(base: Base, divided: Divided) -> None:
    """It is tried out, once, and no table has to know it."""
    embeddings, _ = make_dependent(base("bert"), beyond=0)
    sentences = [Sentence(text) for text in TEXTS]
    first, again = (embed(embeddings, sentences, grouped=True) for _ in range(2))
    assert divided == [None, None]
    assert is_same(first, embed(embeddings, sentences, grouped=False))
    assert is_same(again, first)


def add_mean(_: Any, args: Any, output: Any) -> Any:
    """Return the output of a layer with the mean of all inputs of the batch, padding included."""
    mean = args[0].mean(dim=(0, 1))
    return (output[0] + mean, *output[1:]) if isinstance(output, tuple) else output + mean


class WithMean(nn.Module):
    """A layer whose output depends on the batch."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return add_mean(self, args, self.layer(*args, **kwargs))


def change_config(base: Any) -> None:
    """Let BERT look back alone, which layers made before do where there is padding only."""
    base.config.is_decoder = True


def add_hook(base: Any) -> None:
    base.encoder.layer[0].register_forward_hook(add_mean)


def put_in_method(base: Any) -> None:
    layer = base.encoder.layer[0]
    own = type(layer).forward
    layer.forward = lambda *args, **kwargs: add_mean(layer, args, own(layer, *args, **kwargs))


def put_in_module(base: Any) -> None:
    base.encoder.layer[0] = WithMean(base.encoder.layer[0])


@pytest.mark.parametrize("change", [change_config, add_hook, put_in_method, put_in_module])
def test_model_that_was_changed_after_a_trial_is_tried_out_again(
    change: Callable[[Any], None], base: Base, divided: Divided
) -> None:
    """What was found of a model says nothing of what it has become, nor of models alike that have not changed."""
    embeddings, untouched = (PeftTransformerWordEmbeddings(base("bert"), peft_config=lora()) for _ in range(2))
    sentences = [Sentence(text) for text in TEXTS]
    assert are_alike(embeddings, sentences)
    change(embeddings.base_model)
    assert are_alike(embeddings, sentences)
    assert are_alike(untouched, sentences)
    assert [each is None for each in divided] == [False, True, False]


class Steered(nn.Module):
    """A layer to which somebody adds what all sentences of a batch have in common, now more and now less of it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return steer(self, args, self.layer(*args, **kwargs))


def steer(_: Any, args: Any, output: Any) -> Any:
    added = STRENGTH["now"] * args[0].mean(dim=(0, 1))
    return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added


STRENGTH = {"now": 0.0}


def steer_by_hook(base: Any) -> None:
    base.encoder.layer[0].register_forward_hook(steer)


def steer_by_partial(base: Any) -> None:
    base.encoder.layer[0].register_forward_hook(functools.partial(steer))


def steer_before(base: Any) -> None:
    base.encoder.layer[1].register_forward_pre_hook(lambda _, args: (steer(_, args, args[0]), *args[1:]))


def steer_by_module(base: Any) -> None:
    base.encoder.layer[0] = Steered(base.encoder.layer[0])


@pytest.mark.parametrize("put_in", [steer_by_hook, steer_by_partial, steer_before, steer_by_module])
def test_what_a_user_put_into_a_model_gets_batches_as_they_are(
    put_in: Callable[[Any], None], base: Base, divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It can do something else in the next batch than it did when that was tried out."""
    monkeypatch.setattr(changed_modules, "LIBRARIES", LIBRARIES)
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    put_in(embeddings.base_model)
    sentences = [Sentence(text) for text in TEXTS]
    for strength in (0.0, 1.0, 0.0):
        monkeypatch.setitem(STRENGTH, "now", strength)
        assert are_alike(embeddings, sentences)
    assert divided == [None] * 3


@pytest.mark.parametrize("setting", ["as it is", "checkpointing", "frozen below", "a hook that reads"])
def test_what_changes_nothing_from_batch_to_batch_costs_no_division(
    setting: str, base: Base, divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their hooks do in each batch what they did when that was tried out, and so do those that change nothing."""
    monkeypatch.setattr(changed_modules, "LIBRARIES", LIBRARIES)
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    if setting == "checkpointing":
        embeddings.model.gradient_checkpointing_enable()
    if setting == "frozen below":
        embeddings.model.enable_input_require_grads()
    if setting == "a hook that reads":
        embeddings.base_model.encoder.layer[0].register_forward_hook(lambda *_: None)
    assert are_alike(embeddings, [Sentence(text) for text in TEXTS])
    assert None not in divided


def test_what_was_found_of_models_is_kept_of_the_last_ones_alone(
    base: Base, divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hook for each batch would leave something for ever."""
    monkeypatch.setattr(division_trial, "_MOST", 3)
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    sentences = [Sentence(text) for text in TEXTS]
    for _ in range(5):
        hook = embeddings.base_model.encoder.layer[0].register_forward_hook(lambda *_: None)
        assert are_alike(embeddings, sentences)
        hook.remove()
        assert len(division_trial._verdicts) <= 3
    assert None not in divided


def test_ranks_that_a_training_moves_are_no_other_model(base: Base, divided: Divided) -> None:
    """AdaLoRA writes what its budget leaves into the config, step by step."""
    config = AdaLoraConfig(init_r=4, lora_alpha=12, total_step=10, target_modules=["query"], init_lora_weights=False)
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=config)
    sentences, found = [Sentence(text) for text in TEXTS], list[int]()
    for kept in (4, 3, 2):
        path = "encoder.layer.0.attention.self.query.lora_E"
        embeddings.model.peft_config["default"].rank_pattern = {path: [number < kept for number in range(4)]}
        assert are_alike(embeddings, sentences)
        found.append(len(division_trial._verdicts))
    assert found == found[:1] * 3


def test_longer_padding_is_tried_out_again(base: Base, divided: Divided) -> None:
    """Some models go another way beyond a length; below it, what was found stays."""
    embeddings, _ = make_dependent(base("bert"), beyond=40)
    short, long = [Sentence(text) for text in TEXTS], [Sentence(text) for text in ("Who ?", " ".join([TEXTS[1]] * 5))]
    for sentences in (short, long, short):
        assert are_alike(embeddings, sentences)
    assert [groups is None for groups in divided] == [False, True, False]


class NeighbourShows(nn.Module):
    """An output layer that adds to each token the one in front of it, as a convolution does."""

    def __init__(self, layer: nn.Module, share: float = 1.0) -> None:
        super().__init__()
        self.layer, self.share = layer, share

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        states, *others = self.layer(*args, **kwargs)
        return (states + self.share * nn.functional.pad(states, (0, 0, 1, 0))[:, :-1], *others)


def test_model_whose_tokens_see_their_neighbours_has_groups(base: Base, packed: Divided) -> None:
    """Padding behind a sentence changes nothing there, another sentence in front of it does."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    embeddings.base_model.encoder.layer[1] = NeighbourShows(embeddings.base_model.encoder.layer[1]).eval()
    assert are_alike(embeddings, [Sentence(text) for text in TEXTS])
    assert isinstance(packed[0], LengthGroups)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_model_whose_tokens_see_their_neighbours_less_than_rounding_has_groups(
    dtype: str, base: Base, packed: Divided
) -> None:
    """In half precision the sentence in front changes less than rounding does, and it shows all the same."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(), dtype=dtype)
    sentences = [Sentence(text) for text in TEXTS]
    embed(embeddings, sentences, grouped=True)
    embeddings.base_model.encoder.layer[1] = NeighbourShows(embeddings.base_model.encoder.layer[1], 0.004).eval()
    embed(embeddings, sentences, grouped=True)
    assert [type(division) for division in packed] == [PackedRows, LengthGroups]


def test_tokens_beside_one_of_a_great_norm_are_compared_on_their_own() -> None:
    """Decoders give their first token states a thousand times as large as the others."""
    states = torch.cat([torch.full((1, 1, 8), 1e3), torch.ones(1, 5, 8)], dim=1)
    close, apart = states.clone(), states.clone()
    close[:, 1:] += 1e-6
    apart[:, 2] += 1e-2
    assert division_trial._are_close([close], [states], 1e-4)
    assert not division_trial._are_close([apart], [states], 1e-4)
    assert (apart - states).norm() < 1e-4 * states.norm()


@pytest.mark.parametrize("ignored", ["position_ids", "attention_mask"])
def test_model_that_ignores_what_packed_rows_need_has_groups(
    ignored: str, base: Base, packed: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a signature says, it is tried out."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    inner = embeddings.base_model.forward

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        given = kwargs.get(ignored)
        if ignored == "attention_mask":
            kwargs[ignored] = given if given.dim() == 2 else torch.ones_like(given)
        else:
            kwargs.pop(ignored, None)
        return inner(*args, **kwargs)

    monkeypatch.setattr(embeddings.base_model, "forward", forward)
    assert are_alike(embeddings, [Sentence(text) for text in TEXTS])
    assert isinstance(packed[0], LengthGroups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_window_of_attention_is_found_where_sentences_are_longer(
    dtype: str, base: Base, packed: Divided, tmp_path: Path
) -> None:
    """A mask that is ready to be added has no window, which shows in longer sentences alone, however long rows were."""
    config = lora(target_modules=["q_proj", "v_proj"])
    embeddings = PeftTransformerWordEmbeddings(base("mistral"), peft_config=config)
    lengths = embeddings.prepare_tensors([Sentence(text) for text in TEXTS])["attention_mask"].sum(dim=1).tolist()
    window = max(lengths) - 2
    short = [text for text, length in zip(TEXTS, lengths, strict=True) if length <= window]
    directory = shutil.copytree(base("mistral"), tmp_path / "base")
    settings = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**settings, "sliding_window": window}), encoding="utf-8")
    embeddings = PeftTransformerWordEmbeddings(str(directory), peft_config=config, dtype=dtype)
    for texts in (short, TEXTS, short):
        sentences, tolerance = [Sentence(text) for text in texts], 1e-4 if dtype == "float32" else 5e-2
        assert are_alike(embeddings, sentences, tolerance=tolerance)
    assert [isinstance(division, PackedRows) for division in packed] == [True, False, True]
    assert isinstance(packed[0], PackedRows)
    assert packed[0].limit > window


@pytest.mark.parametrize("architecture", ["roberta", "xlm-roberta"])
def test_token_of_padding_within_a_sentence_has_the_position_that_the_model_gives_it(
    architecture: str, base: Base, packed: Divided
) -> None:
    """RoBERTa passes over it and counts on behind it."""
    embeddings = PeftTransformerWordEmbeddings(
        base(architecture), peft_config=lora(target_modules=TARGETS[architecture])
    )
    token = embeddings.tokenizer.pad_token
    sentences = [Sentence([*text.split(), token, "Berlin"]) for text in TEXTS]
    inputs = embeddings.prepare_tensors(sentences)
    masked = inputs["input_ids"][inputs["attention_mask"] == 1]
    assert embeddings.tokenizer.pad_token_id in masked
    assert are_alike(embeddings, sentences)
    assert isinstance(packed[0], PackedRows)


def forward_pass(embeddings: PeftTransformerEmbeddings) -> ForwardPass:
    tensors = embeddings.prepare_tensors([Sentence(text) for text in TEXTS])
    inputs = {name: tensors[name] for name in ("input_ids", "attention_mask")}
    return ForwardPass(embeddings, {**inputs, "output_hidden_states": True, "return_dict": True})


def test_trial_leaves_methods_that_another_thread_put_into_the_model(base: Base, packed: Divided) -> None:
    """transformers takes its own away after a pass: a trial that puts them back would leave them for ever."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    layer = embeddings.base_model.encoder.layer[0]
    inner = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        layer.forward = inner  # as the other thread does while the trial runs
        return inner(*args, **kwargs)

    layer.forward = forward
    assert isinstance(forward_pass(embeddings).division, PackedRows)
    assert layer.forward is inner


@pytest.mark.parametrize(
    "lengths", [[5, 4, 3, 3, 2, 2], [60, 4, 4, 4], [7, 30, 12, 12, 9, 25, 3] * 5, [9] * 6 + [2, 2]]
)
def test_packed_rows_hold_each_sentence_once_and_cost_less_than_padding(lengths: list[int], base: Base) -> None:
    """No row is longer than it may be, and a batch with padding becomes smaller."""
    ids = torch.ones(len(lengths), max(lengths), dtype=torch.long)
    model = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()).base_model
    found = packed_rows.find({"input_ids": ids}, lengths, Cost(10, 0.001), model)
    assert {each.form.is_causal for each in found} == {False, True}
    division = found[0]
    assert sorted(itertools.chain(*division.rows)) == list(range(len(lengths)))
    assert max(sum(lengths[sentence] for sentence in row) for row in division.rows) <= division.length
    assert len(division.rows) * division.length < ids.numel()


def test_packed_rows_are_not_longer_than_the_model_takes(base: Base) -> None:
    """Tables of positions and of kinds of tokens end there."""
    model = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()).base_model
    limit = model.config.max_position_embeddings
    lengths = [limit - 1, limit // 2, limit // 2 - 1, limit // 3]
    inputs = {"input_ids": torch.ones(len(lengths), limit - 1, dtype=torch.long)}
    assert all(each.length <= limit for each in packed_rows.find(inputs, lengths, Cost(10, 0), model))
    images = {**inputs, "pixel_values": torch.zeros(len(lengths), 3, 4, 4)}
    assert not packed_rows.find(images, lengths, Cost(10, 0), model)


def test_dropout_of_scores_counts_in_training(base: Base) -> None:
    """It draws a number for each score, which long rows have more of."""
    model = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()).base_model
    model.config.attention_probs_dropout_prob = 0.1
    costs = {mode: pass_cost.cost_of(model.train(mode), torch.device("cpu")) for mode in (True, False)}
    assert costs[True].attention > 2 * costs[False].attention > 0


def test_trial_leaves_the_model_and_random_numbers_as_they_were(base: Base, divided: Divided) -> None:
    """Modes of single modules, what modules note of a pass, and the next random number."""
    embeddings, layer = make_dependent(base("bert"), beyond=1000)
    embeddings.train()
    layer.layer.eval()
    modes = {name: module.training for name, module in embeddings.named_modules()}
    noted, drawn = layer.longest, torch.get_rng_state()
    asking = forward_pass(embeddings)
    given = {name: value.clone() for name, value in asking.inputs.items() if isinstance(value, torch.Tensor)}
    assert asking.division is not None
    assert modes == {name: module.training for name, module in embeddings.named_modules()}
    assert (layer.longest is noted, layer.passes) == (True, 0)
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(asking.inputs[name], value) for name, value in given.items())


@pytest.mark.parametrize(
    ("error", "is_final"),
    [(RuntimeError("out of memory"), False), (MemoryError(), False), (ValueError("one row"), True)],
    ids=str,
)
def test_trial_that_fails_leaves_one_pass_and_is_tried_again_where_memory_was_short(
    error: Exception, is_final: bool, base: Base, divided: Divided, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prediction that worked without it works with it; want of memory says nothing of the model."""
    embeddings = PeftTransformerWordEmbeddings(base("bert"), peft_config=lora())
    sentences = [Sentence(text) for text in TEXTS]
    expected = embed(embeddings, sentences, grouped=False)
    forward = ForwardPass._forward

    def fail(self: ForwardPass, inputs: dict[str, Any], rows: Sequence[int]) -> Any:
        if len(rows) <= 4:
            raise error
        return forward(self, inputs, rows)

    with monkeypatch.context() as context:
        context.setattr(ForwardPass, "_forward", fail)
        assert is_same(embed(embeddings, sentences, grouped=True), expected)
    assert divided == [None]
    assert are_alike(embeddings, sentences)
    assert (divided[1] is None) is is_final


@pytest.mark.parametrize("price", PRICES)
def test_padding_is_never_computed_and_layers_only_put_together_where_read(
    price: str, base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that the transformer sees are those of the division, and hidden states beyond them are zero."""
    divided = watch(monkeypatch, price)
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora(), layers="1")
    seen, joined = list[tuple[int, ...]](), list[int]()
    embeddings.base_model.embeddings.register_forward_hook(lambda _, __, output: seen.append(tuple(output.shape[:2])))
    tensors = embeddings.prepare_tensors([Sentence(text) for text in TEXTS])
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    embeddings.hidden_states(ids, attention_mask=mask)
    seen.clear()
    kind: Any = type(divided[-1])
    join = kind.join
    monkeypatch.setattr(kind, "join", lambda s, x: joined.append(1) or join(s, x))
    (states,) = embeddings.hidden_states(ids, attention_mask=mask)
    division: Any = divided[-1]
    if price == "packed":
        assert seen == [(len(division.rows), division.length)]
        padding = mask == 0
    else:
        assert seen == [(len(rows), length) for rows, length in zip(division.rows, division.lengths, strict=True)]
        padding = torch.ones_like(mask, dtype=torch.bool)
        for rows, length in zip(division.rows, division.lengths, strict=True):
            padding[list(rows), :length] = False
    assert sum(rows * length for rows, length in seen) < 0.7 * ids.numel()
    assert len(joined) == 2  # the layer that is read, and the last
    assert states[padding].count_nonzero() == 0
    assert states[mask == 1].count_nonzero(dim=-1).min() > 0


@pytest.mark.parametrize(
    "change",
    [
        {"attention_mask": torch.tensor([[1, 0, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])},
        {"attention_mask": torch.tensor([[1] * 6, [0, 0, 0, 0, 1, 1]])},
        {"attention_mask": torch.ones(2, 1, 6, 6)},
        {"attention_mask": None},
        {"inputs_embeds": torch.zeros(2, 6, 4)},
        {"token_type_ids": torch.zeros(2, 3)},
        {"factor": 0.5},
    ],
    ids=["holes", "on the left", "4D", "no mask", "unknown", "another shape", "a number"],
)
def test_inputs_that_nobody_can_cut_have_one_pass(change: dict[str, Any]) -> None:
    """A mask with holes, or an input whose shape is not known, is left as it is."""
    mask = torch.tensor([[1] * 6, [1, 1, 0, 0, 0, 0]])
    inputs = {"input_ids": torch.ones(2, 6, dtype=torch.long), "attention_mask": mask}
    free = Cost(0.5, 0)
    assert batch_division.find_lengths(inputs, lambda: free) is not None
    assert batch_division.find_lengths({**inputs, **change}, lambda: free) is None


def test_graph_that_is_traced_has_one_pass(base: Base, divided: Divided) -> None:
    """A graph for other batches may not hold the groups of this one."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora())
    tensors = embeddings.prepare_tensors([Sentence(text) for text in TEXTS])
    traced: list[bool] = []

    class Asking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embeddings = embeddings

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            traced.append(adapted.may_be_divided(self.embeddings))
            return ids + mask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, in favour of torch.export
        torch.jit.trace(Asking(), (tensors["input_ids"], tensors["attention_mask"]))
    assert False in traced
    assert adapted.may_be_divided(embeddings)


def test_checkpoints_within_a_process_group_have_one_pass(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reentrant checkpoints would tell DistributedDataParallel of a parameter once for each group."""
    embeddings = PeftTransformerDocumentEmbeddings(base("bert"), peft_config=lora()).train()
    embeddings.base_model.gradient_checkpointing_enable()
    assert adapted.may_be_divided(embeddings)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not adapted.may_be_divided(embeddings)
    assert adapted.may_be_divided(embeddings.eval())
