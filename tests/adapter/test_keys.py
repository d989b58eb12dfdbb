"""Two names mean the same tensor, or they do not: tables of spellings, and the real names that PEFT gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModel

from flair_peft.adapter.keys import KeyMatch, canonical_key, find_adapter_prefixes, is_adapter_key, match_keys
from tests.support.methods import METHODS

QUERY = "encoder.layer.0.attention.self.query"
WRAPPED_QUERY = QUERY.replace("layer.0.", "layer.0._checkpoint_wrapped_module._fsdp_wrapped_module.")
NAME = "default"

SAME_TENSOR: dict[str, tuple[str, ...]] = {
    f"{QUERY}.weight": (
        f"{QUERY}.base_layer.weight",
        f"base_model.model.{QUERY}.weight",
        f"base_model.model.{QUERY}.base_layer.weight",
        f"base_model.{QUERY}.weight",
        f"module.{QUERY}.weight",
        f"_orig_mod.base_model.model.{QUERY}.base_layer.weight",
        f"module._orig_mod.base_model.model.{QUERY}.base_layer.weight",
        f"_orig_mod.module.base_model.model._orig_mod.{QUERY}.weight",
        f"base_model.model.module.{QUERY}.weight",
        f"base_model.model._orig_mod.module.{QUERY}.weight",
        f"_fsdp_wrapped_module.base_model.model.{WRAPPED_QUERY}.base_layer.weight",
    ),
    f"{QUERY}.bias": (f"{QUERY}.base_layer.bias", f"base_model.model.{QUERY}.base_layer.bias"),
    f"{QUERY}.lora_A.weight": (
        f"{QUERY}.lora_A.default.weight",
        f"{QUERY}.lora_A.sentiment-2.weight",
        f"base_model.model.{QUERY}.lora_A.weight",
        f"base_model.model.{QUERY}.lora_A.default.weight",
        f"module.base_model.model.{QUERY}.lora_A.other.weight",
        f"base_model.model._fsdp_wrapped_module.{WRAPPED_QUERY}.lora_A.default._fsdp_wrapped_module.weight",
        f"base_model.model._orig_mod.{QUERY}.lora_A.weight",
        f"base_model.model.module.{QUERY}.lora_A.weight",
    ),
    f"{QUERY}.lora_B.bias": (f"{QUERY}.lora_B.default.bias", f"base_model.model.{QUERY}.lora_B.other.bias"),
    f"{QUERY}.lora_magnitude_vector.weight": (f"base_model.model.{QUERY}.lora_magnitude_vector.default.weight",),
    "embeddings.word_embeddings.lora_embedding_A": (
        "embeddings.word_embeddings.lora_embedding_A.default",
        "base_model.model.embeddings.word_embeddings.lora_embedding_A.other",
    ),
    f"{QUERY}.lora_E": (f"{QUERY}.lora_E.default", f"base_model.model.{QUERY}.lora_E.other"),
    f"{QUERY}.ranknum": (f"{QUERY}.ranknum.default", f"base_model.model.{QUERY}.ranknum.other"),
    f"{QUERY}.ia3_l": (f"{QUERY}.ia3_l.default", f"base_model.model.{QUERY}.ia3_l.other"),
    "vera_A": ("base_model.vera_A.default", "base_model.vera_A.other"),
    f"{QUERY}.vera_lambda_b": (f"base_model.model.{QUERY}.vera_lambda_b.default",),
    f"{QUERY}.oft_R.weight": (f"{QUERY}.oft_R.default.weight", f"base_model.model.{QUERY}.oft_R.other.weight"),
    f"{QUERY}.boft_R": (f"{QUERY}.boft_R.default",),
    f"{QUERY}.hada_w1_a": (f"{QUERY}.hada_w1_a.default", f"base_model.model.{QUERY}.hada_w1_a.other"),
    "embeddings.LayerNorm.ln_tuning_layers.weight": (
        "base_model.model.embeddings.LayerNorm.ln_tuning_layers.default.weight",
        "embeddings.LayerNorm.ln_tuning_layers.other.weight",
    ),
    "prompt_encoder.embedding.weight": ("prompt_encoder.default.embedding.weight", "prompt_encoder.a.embedding.weight"),
    "embeddings.word_embeddings.token_adapter.trainable_tokens_delta": (
        "base_model.model.embeddings.word_embeddings.token_adapter.trainable_tokens_delta.default",
        "embeddings.word_embeddings.token_adapter.trainable_tokens_delta.other",
    ),
    "embeddings.word_embeddings.token_adapter.trainable_tokens_original": (
        "embeddings.word_embeddings.token_adapter.trainable_tokens_original.other",
    ),
    "embeddings.word_embeddings.token_adapter.weight": (
        "base_model.model.embeddings.word_embeddings.token_adapter.base_layer.weight",
    ),
    "pooler.modules_to_save.dense.weight": (
        "pooler.modules_to_save.default.dense.weight",
        "base_model.model.pooler.modules_to_save.other.dense.weight",
    ),
    "pooler.original_module.dense.weight": ("base_model.model.pooler.original_module.dense.weight",),
    "h.0.ln_1.weight": ("base_model.model.h.0.ln_1.weight",),
    "ln_f.bias": ("base_model.model.ln_f.bias",),
}
"""Spelling of a base model's key, or the shortest one of an adapter's → other spellings of the same tensor."""

DIFFERENT_TENSORS = (
    (f"{QUERY}.lora_A.default.weight", f"{QUERY}.lora_B.default.weight"),
    (f"{QUERY}.lora_A.default.weight", f"{QUERY}.weight"),
    (f"{QUERY}.lora_A.default.weight", f"{QUERY.replace('0', '1')}.lora_A.default.weight"),
    (f"{QUERY}.lora_A.default.weight", f"{QUERY}.lora_A.default.bias"),
    (f"{QUERY}.lora_E.default", f"{QUERY}.ranknum.default"),
    ("pooler.modules_to_save.default.dense.weight", "pooler.original_module.dense.weight"),
    ("pooler.modules_to_save.default.dense.weight", "pooler.dense.weight"),
    ("embeddings.LayerNorm.ln_tuning_layers.default.weight", "embeddings.LayerNorm.base_layer.weight"),
    ("base_model.frod_V.self_query.default", "base_model.frod_V.self_value.default"),
    ("base_model.model.h.0.ln_1.weight", "base_model.model.h.0.ln_2.weight"),
    ("embeddings.model.weight", "embeddings.weight"),
    ("base_model.model.encoder.module.weight", "base_model.model.encoder.weight"),
    ("base_model.model.encoder._orig_module.weight", "base_model.model.encoder.weight"),
)

ADAPTER_KEYS = (
    f"{QUERY}.base_layer.weight",
    f"{QUERY}.lora_A.default.weight",
    f"base_model.model.{QUERY}.lora_B.weight",
    f"{QUERY}.ranknum.default",
    f"{QUERY}.ia3_l.default",
    f"embeddings.model.base_model.model.{QUERY}.lora_A.default.weight",
    "base_model.vera_A.default",
    f"{QUERY}.vera_lambda_d.default",
    f"{QUERY}.oft_R.default.weight",
    "embeddings.LayerNorm.ln_tuning_layers.default.weight",
    "prompt_encoder.default.embedding.weight",
    "embeddings.word_embeddings.token_adapter.trainable_tokens_delta.default",
    "pooler.modules_to_save.default.dense.weight",
)

BASE_KEYS = (
    f"{QUERY}.weight",
    "h.0.ln_1.weight",
    "h.0.ln_2.bias",
    "ln_f.weight",
    "h.0.attn.c_attn.weight",
    "layers.0.self_attn.q_proj.weight",
    "pooler.original_module.dense.weight",
    "exploration_layer.weight",
    "flora_A.default.weight",
    "lora.weight",
    "LoRA_A.weight",
    "layer.lora-A.weight",
    "ia3.weight",
    "soft_attention.weight",
    "base_layers.0.weight",
    "base_layer_norm.weight",
    "my_modules_to_save.weight",
    "prompt_encoders.weight",
    "vera.weight",
    "ln_tuned.weight",
    "",
)


@pytest.mark.parametrize(("form", "spelling"), [(form, s) for form, some in SAME_TENSOR.items() for s in some])
def test_canonical_key_of_every_spelling_is_that_of_the_shortest(form: str, spelling: str) -> None:
    """Wrappers, ``base_layer`` and the adapter's name do not change which tensor is meant."""
    assert spelling != form
    assert canonical_key(spelling) == form


@pytest.mark.parametrize("form", [f for f in SAME_TENSOR if "modules_to_save" not in f and "prompt_encoder" not in f])
def test_canonical_key_of_a_canonical_key_is_itself(form: str) -> None:
    """A name without anything to leave out stays; below a saved module, a segment is taken for the adapter's name."""
    assert canonical_key(form) == form


@pytest.mark.parametrize(("first", "second"), DIFFERENT_TENSORS)
def test_canonical_key_of_different_tensors_differs(first: str, second: str) -> None:
    """No rule makes two tensors of one model the same."""
    assert canonical_key(first) != canonical_key(second)


def test_canonical_key_of_a_base_model_key_is_itself() -> None:
    """Names of models without adapters stay as they are, GPT-2's ln_1 and ln_f and all that only look like adapters."""
    assert [canonical_key(key) for key in BASE_KEYS] == list(BASE_KEYS)


@pytest.mark.parametrize("key", ADAPTER_KEYS)
def test_is_adapter_key_with_a_tensor_from_peft_is_true(key: str) -> None:
    """What PEFT adds, or moves into a ``base_layer``, is recognised under every prefix."""
    assert is_adapter_key(key)


@pytest.mark.parametrize("key", BASE_KEYS)
def test_is_adapter_key_with_a_name_that_merely_looks_like_one_is_false(key: str) -> None:
    """Rules hold for whole segments from their beginning, not for pieces of words."""
    assert not is_adapter_key(key)


@pytest.mark.parametrize(
    ("keys", "prefixes"),
    [
        ([], []),
        (["embeddings.model.encoder.layer.0.weight", "decoder.weight"], []),
        ([f"embeddings.model.base_model.model.{QUERY}.lora_A.default.weight"], ["embeddings."]),
        ([f"model.base_model.model.{QUERY}.ia3_l.default"], [""]),
        ([f"embeddings.model.{QUERY}.lora_A.weight"], ["embeddings."]),
        (
            [
                f"embeddings.list_embedding_1.model.base_model.model.{QUERY}.lora_A.default.weight",
                f"embeddings.list_embedding_0.model.base_model.model.{QUERY}.lora_A.default.weight",
                f"embeddings.list_embedding_0.model.base_model.model.{QUERY}.lora_B.default.weight",
                f"embeddings.list_embedding_2.model.{QUERY}.weight",
            ],
            ["embeddings.list_embedding_0.", "embeddings.list_embedding_1."],
        ),
        ([f"tars_model.embeddings.model.base_model.model.{QUERY}.lora_A.default.weight"], ["tars_model.embeddings."]),
        ([f"my_model.embeddings.model.{QUERY}.lora_A.weight"], ["my_model.embeddings."]),
        (["decoder.lora_A.default.weight"], []),
    ],
)
def test_find_adapter_prefixes_in_flair_state_dicts_gives_each_embeddings_once(
    keys: list[str], prefixes: list[str]
) -> None:
    """The prefix is that of the embeddings which hold the transformer, sorted and without repetition."""
    assert find_adapter_prefixes(keys) == prefixes


def test_match_keys_with_equal_names_pairs_each_with_itself() -> None:
    """A name on both sides means itself, even where a rule would see two adapters of one module."""
    keys = [f"{QUERY}.lora_A.{name}.weight" for name in ("default", "other")]
    assert match_keys(reversed(keys), keys) == KeyMatch(renamed={key: key for key in keys})


def test_match_keys_with_nothing_on_both_sides_is_exact() -> None:
    """No tensors fit no tensors."""
    assert match_keys([], []) == KeyMatch()


def test_match_keys_with_iterators_reads_them_once() -> None:
    """Generators are as good as lists."""
    match = match_keys(iter([f"{QUERY}.base_layer.weight"]), iter([f"{QUERY}.weight"]))
    assert match == KeyMatch(renamed={f"{QUERY}.weight": f"{QUERY}.base_layer.weight"})


@pytest.mark.parametrize(
    ("file", "model", "expected"),
    [
        (["a.weight"], [], KeyMatch(unexpected=["a.weight"])),
        ([], ["a.weight"], KeyMatch(missing=["a.weight"])),
        (["b.weight"], ["a.weight"], KeyMatch(missing=["a.weight"], unexpected=["b.weight"])),
        (
            ["q.lora_A.x.weight", "q.lora_A.y.weight"],
            ["q.lora_A.default.weight"],
            KeyMatch(ambiguous=["q.lora_A.x.weight", "q.lora_A.y.weight"]),
        ),
        (
            ["q.lora_A.weight"],
            ["q.lora_A.x.weight", "q.lora_A.y.weight"],
            KeyMatch(ambiguous=["q.lora_A.weight"]),
        ),
        (
            ["q.lora_A.default.weight", "q.lora_A.other.weight"],
            ["q.lora_A.default.weight"],
            KeyMatch(
                renamed={"q.lora_A.default.weight": "q.lora_A.default.weight"}, unexpected=["q.lora_A.other.weight"]
            ),
        ),
        (
            ["q.weight", "q.base_layer.weight"],
            ["base_model.model.q.base_layer.weight"],
            KeyMatch(ambiguous=["q.weight", "q.base_layer.weight"]),
        ),
    ],
)
def test_match_keys_that_do_not_fit_reports_every_name(file: list[str], model: list[str], expected: KeyMatch) -> None:
    """Left over, missing and ambiguous names are reported, and nothing is paired by guessing."""
    assert match_keys(file, model) == expected


WORKING = [name for name, method in METHODS.items() if "encoder" in method.works]
CONFIGS: dict[str, Callable[[], PeftConfig]] = {
    **{name: lambda name=name: METHODS[name].config("encoder") for name in WORKING},
    "LORA, modules to save": lambda: LoraConfig(target_modules=["query"], modules_to_save=["pooler"]),
    "LORA, token rows": lambda: LoraConfig(target_modules=["query"], trainable_token_indices=[5, 7]),
    "LORA, DoRA": lambda: LoraConfig(target_modules=["query"], use_dora=True, bias="lora_only"),
    "LORA, embeddings": lambda: LoraConfig(target_modules=["query", "word_embeddings"]),
    "LORA, lora_bias": lambda: LoraConfig(target_modules=["query"], lora_bias=True),
}


def _build(base: str, config: PeftConfig, name: str = NAME) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(AutoModel.from_pretrained(base), config, adapter_name=name)


def _without_wrappers(key: str) -> str:
    return key.removeprefix("base_model.model.").removeprefix("base_model.")


RESPELL: dict[str, Callable[[str], str]] = {
    "no wrapper": _without_wrappers,
    "no base_layer": lambda key: key.replace(".base_layer.", "."),
    "no wrapper, no base_layer": lambda key: _without_wrappers(key).replace(".base_layer.", "."),
    "data parallel and compiled": lambda key: f"module._orig_mod.{key}",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
def test_match_keys_with_real_names_spelled_otherwise_restores_every_one(
    method: str, base: Callable[[str], str]
) -> None:
    """For every method, each tensor of a PEFT model is found again whatever the file calls it."""
    ours = list(_build(base("bert"), CONFIGS[method]()).state_dict())
    for spelling, respell in RESPELL.items():
        theirs = {key: respell(key) for key in ours}
        assert match_keys(reversed(theirs.values()), ours) == KeyMatch(renamed=theirs), spelling


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
def test_match_keys_with_another_adapter_name_restores_every_one(method: str, base: Callable[[str], str]) -> None:
    """For every method, a PEFT model whose adapter has another name holds the same tensors."""
    ours = list(_build(base("bert"), CONFIGS[method]()).state_dict())
    theirs = list(_build(base("bert"), CONFIGS[method](), "sentiment").state_dict())
    renamed = {key: ".".join("sentiment" if s == NAME else s for s in key.split(".")) for key in ours}
    assert match_keys(theirs, ours) == KeyMatch(renamed=renamed)
    assert sorted(renamed.values()) == sorted(theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
def test_match_keys_with_names_that_peft_saves_pairs_none_wrongly(method: str, base: Callable[[str], str]) -> None:
    """PEFT's own files leave the adapter's name out; what is paired with them is the tensor that they hold."""
    model = _build(base("bert"), CONFIGS[method]())
    own, saved = model.state_dict(), get_peft_model_state_dict(model, save_embedding_layers=False)
    match = match_keys(saved, own)
    assert not match.ambiguous
    for ours, theirs in match.renamed.items():
        assert torch.equal(own[ours].float(), saved[theirs].float()), (ours, theirs)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", CONFIGS)
def test_is_adapter_key_of_real_names_tells_what_peft_added(method: str, base: Callable[[str], str]) -> None:
    """Every trained tensor that the base lacks is an adapter's, and no name of the base itself is."""
    model = _build(base("bert"), CONFIGS[method]())
    before = list(AutoModel.from_pretrained(base("bert")).state_dict())
    assert not [key for key in before if is_adapter_key(key)]
    shared = "word_embeddings.weight"  # prompt methods register the base's own matrix a second time
    added = [key for key in model.state_dict() if canonical_key(key) not in {*before, shared}]
    added = [key for key in added if ".original_module." not in key]
    assert added
    assert not [key for key in added if not is_adapter_key(key)]
