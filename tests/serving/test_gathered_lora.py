"""LoRA of many models in one pass: what each gives alone, from what the models hold at that time."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.nn import Model
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModel

from flair_peft import SharedBase
from flair_peft.serving import gathered_lora
from flair_peft.serving.gathered_lora import GatheredLora, PlainLora
from tests.support.configs import lora
from tests.support.models import save_random
from tests.support.predictions import TEXTS, labels_of
from tests.support.round_trip import largest_difference

TOLERANCE = 1e-5

# Ranks, scales and layers of every kind that add nothing but products of two matrices.
PLAIN: dict[str, dict[str, Any]] = {
    "rank 4": {},
    "rank 8": {"r": 8, "lora_alpha": 32},
    "rank 16": {"r": 16, "lora_alpha": 4, "lora_dropout": 0.1},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "all layers": {"target_modules": "all-linear", "r": 2, "lora_alpha": 1},
    "last layer": {"layers_to_transform": [1]},
    "patterns": {
        "rank_pattern": {"layer.0.attention.self.query": 7},
        "alpha_pattern": {"layer.1.attention.self.value": 30},
    },
}
# What PEFT mixes, in its own loop.
OTHERS: dict[str, dict[str, Any]] = {
    "bias": {"lora_bias": True},
    "words": {"target_modules": ["query", "word_embeddings"]},
}
WAYS = {"gathered": 2**60, "in turn": 0, "by size": None}


def load_models(shared: SharedBase, base: str, folder: Path, configs: dict[str, dict[str, Any]]) -> list[Model]:
    """Return a model for each config, on the shared base."""
    return [
        shared.load(save_random("text-classifier", base, folder / str(n), config=lora(**options), seed=n)[0])
        for n, options in enumerate(configs.values())
    ]


def sentences(models: list[Model]) -> dict[Model, list[Sentence]]:
    """Return one to three sentences for each model, of different lengths."""
    return {model: [Sentence(text) for text in (TEXTS * 2)[n % 3 : 2 * (n % 3) + 1]] for n, model in enumerate(models)}


def apart(shared: SharedBase, models: list[Model]) -> float:
    """Return how far scores of one prediction for all are from those of separate ones."""
    together, separate = sentences(models), sentences(models)
    shared.predict(together, return_probabilities_for_all_classes=True)
    for model, given in separate.items():
        model.predict(given, return_probabilities_for_all_classes=True)
        assert any(labels_of(given)), "nothing is predicted"
    return max(largest_difference(labels_of(separate[model]), labels_of(together[model])) for model in models)


@contextlib.contextmanager
def counting_passes() -> Iterator[list[int]]:
    """Collect the number of rows of each pass whose matrices are gathered."""
    rows: list[int] = []
    call = GatheredLora.__call__

    def counted(self: GatheredLora, adapters: Any, **inputs: Any) -> Any:
        rows.append(len(adapters))
        return call(self, adapters, **inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GatheredLora, "__call__", counted)
        yield rows


@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS.keys())
@pytest.mark.parametrize("dtype", [None, "bfloat16"], ids=["fp32", "bf16"])
def test_gathered_lora_of_any_ranks_scales_and_layers_shares_one_pass(
    dtype: str | None, limit: int | None, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way to add the products gives what the models give alone, with one pass for all."""
    shared = SharedBase(base("bert"), dtype=dtype)
    models = load_models(shared, base("bert"), tmp_path, PLAIN)
    if limit is not None:
        monkeypatch.setattr(gathered_lora, "_BYTES_PER_PRODUCT", {"cpu": limit})
    assert apart(shared, models) < (TOLERANCE if dtype is None else 0.02)
    with counting_passes() as passes:
        shared.predict(sentences(models))
    assert passes == [sum(map(len, sentences(models).values()))]


def _double(_: Any, __: Any, output: Any) -> Any:
    """Return the output of a layer, or of a model, with its states doubled."""
    if not isinstance(output, dict):
        return (output[0] * 2, *output[1:]) if isinstance(output, tuple) else output * 2
    for name in ("hidden_states", "last_hidden_state"):
        output[name] = tuple(2 * each for each in output[name]) if name == "hidden_states" else 2 * output[name]
    return output


def _put_in_method(embeddings: Any) -> None:
    layer = embeddings.base_model.encoder.layer[0]
    own = type(layer).forward
    layer.forward = lambda *args, **kwargs: _double(None, None, own(layer, *args, **kwargs))


def _put_in_module(embeddings: Any) -> None:
    embeddings.base_model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


_CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook of a layer": lambda e: e.base_model.encoder.layer[0].register_forward_hook(_double),
    "a hook of a layer with LoRA": lambda e: e.base_model.encoder.layer[0].attention.self.query.register_forward_hook(
        _double
    ),
    "a hook within LoRA": lambda e: (
        e.base_model.encoder.layer[0].attention.self.query.lora_A["default"].register_forward_hook(_double)
    ),
    "a hook of the model": lambda e: e.model.register_forward_hook(_double),
    "a method": _put_in_method,
    "a module": _put_in_module,
    "a setting": lambda e: setattr(e.base_model.config, "is_decoder", True),
}


@pytest.mark.parametrize("change", _CHANGES.values(), ids=_CHANGES)
def test_models_that_were_changed_predict_together_what_each_gives_alone(
    change: Callable[[Any], object], base: Callable[[str], str], tmp_path: Path
) -> None:
    """A pass for several models runs none of their own modules."""
    shared = SharedBase(base("bert"))
    configs = {"plain": {}, "other": {"r": 8}, "words": OTHERS["words"], "again": {"r": 3}}
    models: Any = load_models(shared, base("bert"), tmp_path, configs)
    before = [_vectors(model) for model in models]
    assert apart(shared, models) < TOLERANCE
    for model in models[::2]:
        change(model.embeddings)
    are_same = [torch.equal(each, _vectors(model)) for each, model in zip(before, models, strict=True)]
    assert are_same == [False, True, False, True]
    assert apart(shared, models) < TOLERANCE


def _vectors(model: Any) -> torch.Tensor:
    texts = [Sentence(text) for text in TEXTS]
    model.embeddings.embed(texts)
    return torch.stack([text.embedding for text in texts])


def test_gathered_lora_in_fp32_beside_others_in_bf16_computes_in_its_own(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Adapters that were widened by a training give what they give alone, also next to narrow ones."""
    shared = SharedBase(base("bert"), dtype="bfloat16")
    models: Any = load_models(shared, base("bert"), tmp_path, PLAIN)
    for model in models[::2]:
        model.train()
        model.eval()
    dtypes = {next(iter(PlainLora.of(m.embeddings.model, "default").matrices.values())).a.dtype for m in models}
    assert dtypes == {torch.float32, torch.bfloat16}
    assert apart(shared, models) < 0.02


def test_gathered_lora_under_autocast_gives_what_separate_predictions_give(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Autocast reaches the products as it reaches those of PEFT."""
    shared = SharedBase(base("bert"))
    models = load_models(shared, base("bert"), tmp_path, PLAIN)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert apart(shared, models) < 0.02


@pytest.mark.filterwarnings("ignore:.*have invalid shape:peft.utils.warning.PeftWarning")  # said of any bias of LoRA
def test_gathered_lora_beside_adapters_that_hold_more_leaves_these_to_peft(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """A bias or a table of words is never lost: such adapters are mixed by PEFT, with equal results."""
    shared = SharedBase(base("bert"))
    models: Any = load_models(shared, base("bert"), tmp_path, {**PLAIN, **OTHERS})
    assert apart(shared, models) < TOLERANCE
    plain = [PlainLora.of(model.embeddings.model, "default") is not None for model in models]
    assert plain == [True] * len(PLAIN) + [False] * len(OTHERS)


def _train_(embeddings: Any) -> None:
    for parameter in embeddings.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(1.5)


def _replace_data_(embeddings: Any) -> None:
    for layer in embeddings.model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B["default"].weight.data = -layer.lora_B["default"].weight.data


def _replace_modules_(embeddings: Any) -> None:
    for layer in embeddings.model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_A["default"] = torch.nn.Linear(layer.in_features, 4, bias=False).requires_grad_(False)


def _add_bias_(embeddings: Any) -> None:
    for layer in embeddings.model.modules():
        if isinstance(layer, LoraLayer):
            b = layer.lora_B["default"]
            layer.lora_B["default"] = torch.nn.Linear(b.in_features, b.out_features).requires_grad_(False)


def _add_another_(embeddings: Any) -> None:
    embeddings.model.add_adapter("another", lora())
    embeddings.model.base_model.set_adapter(["default", "another"])


CHANGES: dict[str, Callable[[Any], Any]] = {
    "trained": _train_,
    "data replaced": _replace_data_,
    "modules replaced": _replace_modules_,
    "bias added": _add_bias_,
    "converted": lambda embeddings: embeddings.model.to(torch.float64).float(),
    "scaled": lambda embeddings: [m.scaling.update(default=5.0) for m in embeddings.model.modules()
                                  if isinstance(m, LoraLayer)],
    "merged": lambda embeddings: embeddings.model.merge_adapter(),
    "unloaded": lambda embeddings: embeddings.model.merge_and_unload(),
    "switched off": lambda embeddings: embeddings.model.disable_adapter_layers(),
    "layer switched off": lambda embeddings: next(
        m for m in embeddings.model.modules() if isinstance(m, LoraLayer)).enable_adapters(False),
    "inactive": lambda embeddings: embeddings.model.base_model.set_adapter([]),
    "another active": _add_another_,
    "base changed": lambda embeddings: embeddings.base_model.encoder.layer[0].output.dense.weight.data.mul_(1.1),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_gathered_lora_after_a_change_of_a_model_shows_it_at_once(
    change: Callable[[Any], None], base: Callable[[str], str], tmp_path: Path
) -> None:
    """Nothing of an adapter is kept from the prediction before: the next one equals what the model gives by then."""
    shared = SharedBase(base("bert"))
    models: Any = load_models(shared, base("bert"), tmp_path, {name: PLAIN[name] for name in ("rank 4", "rank 8")})
    before = sentences(models)
    shared.predict(before, return_probabilities_for_all_classes=True)
    change(models[0].embeddings)
    assert apart(shared, models) < TOLERANCE
    after = sentences(models)
    shared.predict(after, return_probabilities_for_all_classes=True)
    moved = largest_difference(labels_of(before[models[0]]), labels_of(after[models[0]]))
    assert (moved > TOLERANCE) == (change not in (CHANGES["converted"], CHANGES["merged"], CHANGES["unloaded"]))


def test_gathered_lora_of_adapters_that_were_left_on_disk_reads_them(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """With memory for one adapter, a pass of seven reads those of all."""
    shared = SharedBase(base("bert"), adapter_memory=1)
    models = load_models(shared, base("bert"), tmp_path, PLAIN)
    for _ in range(2):
        assert apart(shared, models) < TOLERANCE


def test_gathered_lora_keeps_no_tensor_of_a_model_after_a_prediction(
    base: Callable[[str], str], tmp_path: Path
) -> None:
    """Also after a pass that failed: what a model held is freed with it."""
    shared = SharedBase(base("bert"))
    models: Any = load_models(shared, base("bert"), tmp_path, PLAIN)
    shared.predict(sentences(models))
    mixing: Any = next(iter(next(iter(shared._mixed_batches._models.values())).values()))
    with pytest.MonkeyPatch.context() as patch:
        layer = type(mixing._gathered.model.encoder.layer[1])
        patch.setattr(layer, "forward", lambda *_, **__: (_ for _ in ()).throw(MemoryError("full")))
        with pytest.raises(MemoryError, match="full"):
            shared.predict(sentences(models))
    kept = [weakref.ref(parameter) for parameter in models[0].embeddings.model.parameters()]
    shared.unload(models.pop(0))
    gc.collect()
    assert not any(reference() is not None for reference in kept)
    assert apart(shared, models) < TOLERANCE


@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS.keys())
def test_gathered_lora_gives_what_pefts_loop_gives(
    limit: int | None, base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of adapters in any order, one of them twice and apart, equal those of PEFT's ``adapter_names``."""
    if limit is not None:
        monkeypatch.setattr(gathered_lora, "_BYTES_PER_PRODUCT", {"cpu": limit})
    alone, adapters = {}, {}
    for number, (name, options) in enumerate(PLAIN.items()):
        torch.manual_seed(number)
        model = PeftModel(AutoModel.from_pretrained(base("bert")), lora(**options), "default").eval()
        alone[name], adapters[name] = model, PlainLora.of(model, "default")
    gathered = GatheredLora(AutoModel.from_pretrained(base("bert")))
    names = [*PLAIN, "rank 4", "rank 4", "all layers"]
    inputs = {"input_ids": torch.randint(5, 50, (len(names), 6)), "attention_mask": torch.ones(len(names), 6)}
    with torch.no_grad():
        found = gathered([adapters[name] for name in names], **inputs).last_hidden_state
        for row, name in enumerate(names):
            of_row = {key: value[row : row + 1] for key, value in inputs.items()}
            expected = alone[name](**of_row, adapter_names=["default"]).last_hidden_state
            torch.testing.assert_close(found[row : row + 1], expected, atol=1e-4, rtol=1e-4)
    assert not gathered._runs
