"""Lower layers that models have in common run once: the bits of separate predictions, and no trace of it."""

from __future__ import annotations

import contextlib
import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.nn import Model
from peft import PromptTuningConfig
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import AutoConfig, AutoModel, AutoTokenizer

from flair_peft import SharedBase
from flair_peft.embeddings import adapted
from flair_peft.embeddings.adapted import ForwardPass
from flair_peft.embeddings.cooperative_threads import CooperativeThreads
from flair_peft.serving import frozen_trunk
from flair_peft.serving.frozen_trunk import FrozenTrunks
from tests.support.configs import lora
from tests.support.models import save_random
from tests.support.predictions import labels_of
from tests.support.selection import few
from tests.support.tiny import ATTENTION_TARGETS, CORPUS, MORE_TARGETS, make_sentences

TARGETS = {name: targets for name, targets in {**ATTENTION_TARGETS, **MORE_TARGETS}.items() if name != "albert"}
BY_DEFAULT = {"bert", "deberta-v2", "modernbert", "xlnet", "t5", "llama", "gpt2", "bart", "gemma"}
IN_FIRST_LAYER = r"[^0-9]*\.0\..*"
TASKS = ("sequence-tagger", "sequence-tagger-tokens", "text-classifier")
DEPTH = 4


@pytest.fixture(scope="module")
def deep(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the directory of a BERT with four layers."""
    folder = tmp_path_factory.mktemp("deep")
    AutoTokenizer.from_pretrained(base("bert")).save_pretrained(folder)
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.from_pretrained(base("bert"), num_hidden_layers=DEPTH))
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return str(folder)


def upper(first: int, **options: Any) -> Any:
    """Return a config of adapters on the layers from this one up."""
    return lora(target_modules=["query", "value"], layers_to_transform=list(range(first, DEPTH)), **options)


def load(shared: SharedBase, base: str, folder: Path, *configs: Any, **options: Any) -> list[Model]:
    """Return a model for each config, of three tasks in turn."""
    for number, config in enumerate(configs):
        name = TASKS[number % len(TASKS)]
        save_random(name, base, folder / str(number), config=config, seed=number, **options)
    models = [shared.load(folder / str(number)) for number in range(len(configs))]
    for number, model in enumerate(models[len(TASKS) :]):
        model._label_type = f"another{number}"
    return models


@contextlib.contextmanager
def counting_layers(models: list[Model]) -> Iterator[list[torch.nn.Module]]:
    """Collect the last norm of each layer of these models whenever it computes."""
    calls, norms = list[torch.nn.Module](), set[int]()
    for model in models:
        layers = [part for _, part, is_layer in frozen_trunk._parts_of(model.embeddings.base_model) if is_layer]
        for layer in layers:
            if type(layer) is type(layers[0]):  # not those of BART's decoder
                norms.add(id([module for module in layer.modules() if "Norm" in type(module).__name__][-1]))

    def count(module: torch.nn.Module, _: Any) -> None:
        if id(module) in norms:
            calls.append(module)

    hook = register_module_forward_pre_hook(count)
    try:
        yield calls
    finally:
        hook.remove()


def compare(shared: SharedBase, models: list[Model], architecture: str = "bert") -> int:
    """Check that predicting together gives the labels and scores of separate predictions; return layers computed."""
    together, separate = (make_sentences(architecture, CORPUS) for _ in range(2))
    options = {"return_probabilities_for_all_classes": True}
    for model in models:
        model.predict(separate, **options)
    shared.predict(dict.fromkeys(models, make_sentences(architecture, CORPUS)))  # adapters are tried out
    with counting_layers(models) as calls:
        shared.predict(dict.fromkeys(models, together), **options)
    assert labels_of(separate) == labels_of(together)
    assert all(labels_of(separate))
    return len(calls)


def passes_of(models: list[Model], texts: tuple[str, ...] = CORPUS) -> list[ForwardPass]:
    """Return the first pass that each model asks for where it predicts for these texts."""
    passes: list[ForwardPass] = []

    class Enough(Exception):
        pass

    def answer(requests: list[ForwardPass]) -> list[Any]:
        passes.extend(requests)
        raise Enough

    for model in models:
        with contextlib.suppress(Enough):
            CooperativeThreads().run([lambda model=model: model.predict(make_sentences("bert", texts))], answer)
    return passes


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # of PEFT on convolutions in groups
@pytest.mark.parametrize("architecture", few(list(TARGETS), BY_DEFAULT))
def test_models_with_a_trunk_in_common_predict_the_bits_of_separate_predictions(
    architecture: str, base: Callable[[str], str], tmp_path: Path
) -> None:
    """For every architecture: two taggers and a classifier run the first layer once, unless it gives a dictionary."""
    is_transposed = architecture == "gpt2"
    config = lora(target_modules=TARGETS[architecture], exclude_modules=IN_FIRST_LAYER, fan_in_fan_out=is_transposed)
    shared = SharedBase(base(architecture))
    models = load(shared, base(architecture), tmp_path, config, config, config)
    assert compare(shared, models, architecture) == (6 if architecture == "squeezebert" else 1 + 3)


def test_models_with_trunks_of_different_depth_share_what_each_has(deep: str, tmp_path: Path) -> None:
    """Adapters from the second, third and fourth layer up, and one on all layers, which shares nothing."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(1), upper(2), upper(3, r=8))
    assert compare(shared, models) == DEPTH * 3 - 1 - 2
    everywhere = load(shared, deep, tmp_path / "more", upper(0), upper(2), upper(3))
    assert compare(shared, everywhere) == DEPTH * 3 - 2


def test_trunk_gives_the_hidden_states_of_separate_passes(deep: str, tmp_path: Path) -> None:
    """Every layer that is read, bit by bit and without a gradient; what is not read is not kept."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(1), upper(2), upper(3))
    models[0].embeddings.layer_indexes = list(range(DEPTH + 1))
    passes = passes_of(models)
    with torch.no_grad():
        outputs, alone = FrozenTrunks().run(passes), [each.run() for each in passes]
    for forward_pass, output, expected in zip(passes, outputs, alone, strict=True):
        for index in forward_pass.embeddings.layer_indexes:
            assert torch.equal(output["hidden_states"][index], expected.hidden_states[index])
            assert not output["hidden_states"][index].requires_grad
        assert torch.equal(output["last_hidden_state"], expected.last_hidden_state)
    assert [state is None for state in outputs[1]["hidden_states"]] == [True] * DEPTH + [False]


def _embeddings_of(model: Model) -> Any:
    return model.embeddings.base_model.embeddings


def _layer(model: Model, number: int) -> Any:
    return model.embeddings.base_model.encoder.layer[number]


def _replace_method(layer: Any) -> None:
    layer.forward = lambda *args, **kwargs: type(layer).forward(layer, *args, **kwargs)


CHANGES: dict[str, tuple[Callable[[Model], Any], int]] = {
    "nothing": (lambda model: None, 3),
    "adapter merged": (lambda model: model.embeddings.model.merge_adapter(), 3),
    "adapter switched off": (lambda model: model.embeddings.model.disable_adapter_layers(), 3),
    "layer written to": (lambda model: _layer(model, 1).output.dense.weight.data.add_(0.1), 1),
    "layer written to without a change": (lambda model: _layer(model, 1).output.dense.weight.data.mul_(1.0), 1),
    "layer unfrozen": (lambda model: _layer(model, 2).output.dense.bias.requires_grad_(True), 2),
    "embeddings written to": (lambda model: _embeddings_of(model).word_embeddings.weight.data.mul_(1.1), 0),
    "embeddings hooked": (lambda model: _embeddings_of(model).register_forward_hook(lambda *a: a[2] * 2), 0),
    "layer hooked": (lambda model: _layer(model, 1).attention.register_forward_hook(lambda *_: None), 1),
    "method replaced": (lambda model: _replace_method(_layer(model, 2)), 2),
    "setting changed": (lambda model: setattr(_layer(model, 1).attention.self, "scaling", 0.1), 1),
    "norm's epsilon changed": (lambda model: setattr(_layer(model, 1).output.LayerNorm, "eps", 0.1), 1),
    "layer in training mode": (lambda model: _layer(model, 1).train(), 1),
    "first layer moved": (lambda model: _layer(model, 0).to(torch.float64).to(torch.float32), 0),
}


@pytest.mark.parametrize("change", CHANGES)
def test_trunk_ends_where_a_model_differs_from_the_others(change: str, deep: str, tmp_path: Path) -> None:
    """Whatever was done to one model is in its results; the other two go on sharing their three layers."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(3), upper(3), upper(3))
    write, depth = CHANGES[change]
    write(models[1])
    passes = passes_of(models)
    with torch.no_grad():
        with counting_layers(models) as calls:
            trunks = FrozenTrunks()
            [group] = [group for group in trunks.groups(passes) if len(group) > 1]
            outputs = dict(zip(group, trunks.run([passes[number] for number in group]), strict=True))
            outputs.update({n: each.run() for n, each in enumerate(passes) if n not in outputs})
        alone = [each.run() for each in passes]
    assert len(calls) == 3 * DEPTH - 3 - depth
    for number, output in outputs.items():
        assert torch.equal(output["last_hidden_state"], alone[number].last_hidden_state)


@pytest.mark.parametrize(
    ("config", "computed"),
    [
        (lambda: upper(2, bias="all"), 2 * DEPTH),
        (lambda: upper(2, bias="lora_only"), 2 * DEPTH - 2),
        (lambda: upper(2, modules_to_save=["embeddings"]), 2 * DEPTH),
        (lambda: upper(2, modules_to_save=["layer.0.output"]), 2 * DEPTH),
        (lambda: upper(2, modules_to_save=["layer.1.output"]), 2 * DEPTH - 1),
        (lambda: upper(2, trainable_token_indices=list(range(5, 100))), 2 * DEPTH),
        (lambda: upper(2, use_dora=True), 2 * DEPTH - 2),
        (lambda: upper(2, init_lora_weights="pissa"), 2 * DEPTH - 2),
        (lambda: lora(target_modules=r".*layer\.[23]\..*(query|dense)", r=3), 2 * DEPTH - 2),
        (lambda: lora(target_modules="all-linear", exclude_modules=r".*layer\.[01]\..*"), 2 * DEPTH - 2),
        (lambda: lora(target_modules=["query"], rank_pattern={"layer.3.*query": 8}), None),
        (lambda: PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3), None),
    ],
    ids=[
        "biases", "biases of lora", "embeddings trained", "first layer trained", "second layer trained", "token rows",
        "dora", "pissa", "regular expression", "excluded", "everywhere", "prompt",
    ],
)  # fmt: skip
def test_trunk_ends_below_all_that_a_config_trains(
    config: Callable[[], Any], computed: int | None, deep: str, tmp_path: Path
) -> None:
    """Beside a model with adapters on the upper two layers; scores are equal whatever is shared."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(2), config())
    if computed is not None:
        assert compare(shared, models) == computed
    passes = passes_of(models)
    assert bool([*FrozenTrunks().groups(passes)]) is (computed is not None and computed < 2 * DEPTH)


def test_layer_that_is_called_many_times_is_shared_only_if_no_adapter_is_in_it(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """ALBERT has one layer: models with an adapter share nothing, two without an adapter share both of its calls."""
    shared = SharedBase(base("albert"))
    models = load(shared, base("albert"), tmp_path, *[lora(target_modules=["query"])] * 2)
    assert not [*FrozenTrunks().groups(passes_of(models))]
    plain = load(shared, base("albert"), tmp_path / "plain", *[lora(target_modules=["query"])] * 2)
    for model in plain:
        model.embeddings.model = model.embeddings.model.unload()
    passes = passes_of(plain)
    with counting_layers(plain) as calls, torch.no_grad():
        outputs = FrozenTrunks().run(passes)
    assert len(calls) == 2
    assert torch.equal(outputs[1]["last_hidden_state"], passes[1].run().last_hidden_state)


@pytest.mark.parametrize(("setting", "value"), [("_attn_implementation", "eager"), ("pretraining_tp", 2)])
def test_trunk_ends_where_layers_read_another_setting(
    setting: str, value: Any, base: Callable[[str], str], tmp_path: Path
) -> None:
    """Layers of decoders look into their config whenever they compute."""
    config = lora(target_modules=TARGETS["llama"], exclude_modules=IN_FIRST_LAYER)
    shared = SharedBase(base("llama"))
    models = load(shared, base("llama"), tmp_path, config, config)
    assert compare(shared, models, "llama") == 3
    setattr(models[1].embeddings.base_model.config, setting, value)
    assert not [*FrozenTrunks().groups(passes_of(models))]


def test_other_sentences_share_no_trunk(deep: str, tmp_path: Path) -> None:
    """The same number of subtokens is not the same text."""
    models = load(SharedBase(deep), deep, tmp_path, upper(3), upper(3))
    one, other = passes_of(models[:1], ("Berlin is large .",)), passes_of(models[1:], ("Paris is large .",))
    assert one[0].inputs["input_ids"].shape == other[0].inputs["input_ids"].shape
    assert not [*FrozenTrunks().groups([*one, *other])]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_trunk_with_adapters_on_disk_and_in_half_precision(dtype: str, deep: str, tmp_path: Path) -> None:
    """Adapters are in memory while their pass runs, whatever dtype the base has."""
    shared = SharedBase(deep, dtype=dtype, adapter_memory=1)
    models = load(shared, deep, tmp_path, upper(2), upper(2), upper(2))
    assert compare(shared, models) == DEPTH * 3 - 2 * 2


def test_trunk_with_the_context_of_sentences(deep: str, tmp_path: Path) -> None:
    """The row of the context's separator is part of what models have in common: another row is another text."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(2), upper(2), upper(2), use_context=4)
    assert compare(shared, models) == DEPTH * 3 - 2 * 2
    _embeddings_of(models[0]).word_embeddings.weight.data[-1] += 1.0
    assert compare(shared, models) == DEPTH * 3 - 2


@pytest.mark.parametrize("does_fail", [False, True])
def test_trunk_leaves_nothing_in_the_models(does_fail: bool, deep: str, tmp_path: Path) -> None:
    """Neither a method nor a tensor, also after a pass that failed; the next prediction is as before."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(2), upper(2), upper(2))
    before = [[(id(module), set(vars(module))) for module in model.modules()] for model in models]
    states: list[weakref.ref[torch.Tensor]] = []

    def watch(module: Any, inputs: Any, output: Any) -> None:
        states.append(weakref.ref(inputs[0]))
        if does_fail:
            raise ArithmeticError("in the last layer")

    hook = _layer(models[1], 3).register_forward_hook(watch)
    with pytest.raises(ArithmeticError) if does_fail else contextlib.nullcontext():
        shared.predict(dict.fromkeys(models, make_sentences("bert", CORPUS)))
    hook.remove()
    gc.collect()
    assert len(states) == 1
    assert states[0]() is None
    assert [[(id(module), set(vars(module))) for module in model.modules()] for model in models] == before
    assert compare(shared, models) == DEPTH * 3 - 2 * 2


def test_trunk_while_another_thread_predicts_with_the_same_models(deep: str, tmp_path: Path) -> None:
    """The other thread computes every layer of its own sentences, and gets their labels."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(2), upper(2), upper(2))
    expected = make_sentences("bert", CORPUS[::-1])
    for model in models:
        model.predict(expected)
    found: list[Any] = []

    def predict() -> None:
        for _ in range(3):
            sentences = make_sentences("bert", CORPUS[::-1])
            for model in models:
                model.predict(sentences)
            found.append(labels_of(sentences))

    threads = [threading.Thread(target=predict) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        compare_labels(shared, models)
    for thread in threads:
        thread.join()
    assert found == [labels_of(expected)] * 6


def compare_labels(shared: SharedBase, models: list[Model]) -> None:
    together, separate = (make_sentences("bert", CORPUS) for _ in range(2))
    shared.predict(dict.fromkeys(models, together))
    for model in models:
        model.predict(separate)
    assert labels_of(separate) == labels_of(together)


def test_layer_that_writes_to_what_it_is_given_makes_every_pass_compute(
    deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was recorded is used as long as nobody has written to it."""
    models = load(SharedBase(deep), deep, tmp_path, upper(2), upper(2))
    passes = passes_of(models)
    kind = type(_layer(models[0], 0))
    forward = kind.forward

    def writing(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, hidden_states.mul_(1.5), *args, **kwargs)

    monkeypatch.setattr(kind, "forward", writing)
    with torch.no_grad():
        outputs, alone = FrozenTrunks().run(passes), [each.run() for each in passes]
    for output, expected in zip(outputs, alone, strict=True):
        assert torch.equal(output["last_hidden_state"], expected.last_hidden_state)


@pytest.mark.parametrize(
    ("value", "is_recorded"),
    [((1.0, None, ("a", torch.ones(2))), True), ([torch.ones(2)], False), ({"k": 1}, False), (object(), False)],
    ids=["plain", "list", "dictionary", "object"],
)
def test_layer_is_replayed_where_all_that_it_is_given_and_gives_can_be_compared(value: Any, is_recorded: bool) -> None:
    """What could be changed unseen, such as a cache of keys and values, is computed with."""
    computed: list[Any] = []

    def compute(given: Any, *, state: Any) -> Any:
        computed.append(given)
        return state

    for positional, named in ((value, torch.ones(2)), (torch.ones(2), value)):
        computed.clear()
        recording = frozen_trunk._Recording()
        assert recording.recorder(compute)(positional, state=named) is named
        assert recording.replayer(compute, frozen_trunk._Equality())(positional, state=named) is named
        assert len(computed) == (1 if is_recorded else 2)


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor([1.0, 2.0, 4.0]),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64),
        torch.tensor([[1.0, 2.0, 3.0]]),
        torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])[:, 0],
        None,
        1.0,
    ],
    ids=["values", "dtype", "shape", "layout", "none", "number"],
)
def test_layer_computes_where_something_else_enters(other: Any) -> None:
    """One element, the dtype, the shape or the layout in memory may each lead to other bits."""
    recording = frozen_trunk._Recording()
    recording.recorder(lambda given: given * 2)(torch.tensor([1.0, 2.0, 3.0]))
    replay = recording.replayer(lambda given: "computed", frozen_trunk._Equality())
    assert replay(other) == "computed"
    again = recording.replayer(lambda given: "computed", frozen_trunk._Equality())
    assert torch.equal(again(torch.tensor([1.0, 2.0, 3.0])), torch.tensor([2.0, 4.0, 6.0]))
    assert again(torch.tensor([1.0, 2.0, 3.0])) == "computed", "there was one call"


def test_trunk_in_inference_mode_is_computed_by_each_model(deep: str, tmp_path: Path) -> None:
    """There, nobody can tell whether a tensor was written to."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, *[upper(2, use_dora=True)] * 3)
    with torch.inference_mode():
        assert compare(shared, models) == 3 * DEPTH
    assert compare(shared, models) == 3 * DEPTH - 2 * 2


def test_few_tokens_are_mixed_where_that_starts_fewer_layers(deep: str, tmp_path: Path) -> None:
    """One short sentence for two models goes through all layers of a third at once, many sentences do not."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(1), upper(1))
    calls = {}
    for texts in (("Berlin",), CORPUS):
        shared.predict(dict.fromkeys(models, make_sentences("bert", texts)))
        with counting_layers(models) as computed:
            shared.predict(dict.fromkeys(models, make_sentences("bert", texts)))
        calls[len(texts)] = len(computed)
    assert calls == {1: 0, len(CORPUS): 2 * DEPTH - 1}


def test_sentences_of_a_trunk_are_counted_once_in_a_mini_batch(
    deep: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each model gets whole mini-batches, as it would alone; without a trunk they divide one."""
    shared = SharedBase(deep)
    rows: list[int] = []
    forward = adapted.ForwardPass.run
    monkeypatch.setattr(
        adapted.ForwardPass, "run", lambda self: (rows.append(len(self.inputs["input_ids"])), forward(self))[1]
    )
    size = len(CORPUS)
    for name, first in (("trunk", 2), ("none", 0)):
        models = load(shared, deep, tmp_path / name, *[upper(first, use_dora=True)] * 3)
        rows.clear()
        shared.predict(dict.fromkeys(models, make_sentences("bert", CORPUS)), mini_batch_size=size)
        assert rows == ([size] * 3 if name == "trunk" else [size // 3] * 9)


def test_models_whose_adapter_was_taken_away_share_every_layer(deep: str, tmp_path: Path) -> None:
    """What is left are layers of the base, beside one with an adapter on the upper two."""
    shared = SharedBase(deep)
    models = load(shared, deep, tmp_path, upper(1), upper(3), upper(2))
    for model in models[:2]:
        model.embeddings.model = model.embeddings.model.unload()
    assert compare(shared, models) == DEPTH + 2
