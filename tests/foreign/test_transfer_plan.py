"""Adapters that were trained on other classes compute in embeddings what they computed there."""

from __future__ import annotations

import copy
import json
import logging
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from flair.data import Dictionary, Sentence
from flair.models import SequenceTagger, TextClassifier
from peft import (
    AdaLoraConfig,
    AdaptionPromptConfig,
    FrodConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    OSFConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    TrainableTokensConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn

from flair_peft import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
    SharedBase,
    merge,
    save_pretrained,
)
from flair_peft.errors import (
    AdapterConfigError,
    AdapterMismatchError,
    BaseMismatchError,
    BaseModelNotFoundError,
    ModelFileError,
    UnsupportedMethodError,
    UntrainedAdapterError,
)
from flair_peft.foreign import source_classes
from tests.support import tiny
from tests.support.configs import lora
from tests.support.foreign_adapters import (
    SOURCES,
    TEXT,
    Source,
    hidden_states,
    largest_difference,
    offered,
    train,
    write_base,
)
from tests.support.hub_stand_in import HubStandIn, online
from tests.support.methods import perturb_
from tests.support.tiny import ATTENTION_TARGETS
from tests.support.zoo import ZOO

Bases = Callable[[str], str]

TOLERANCE = 1e-5

# In the default run; the rest of the architectures is part of the matrix.
ALWAYS = ("bert", "distilbert", "llama", "t5")


def _embed(source: Source, **options: Any) -> tuple[PeftTransformerEmbeddings, tuple[torch.Tensor, ...]]:
    embeddings = PeftTransformerEmbeddings.from_adapter(str(source.folder), layers="all", **options)
    return embeddings, _states(embeddings, source.input_ids)


def _states(embeddings: PeftTransformerEmbeddings, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return embeddings.hidden_states(ids, attention_mask=torch.ones_like(ids))


def _rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = change(load_file(path))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def _set(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def _cases() -> list[Any]:
    pairs = list(offered())
    assert len(pairs) >= 80
    return [
        pytest.param(*pair, marks=() if pair[0] in ALWAYS else pytest.mark.matrix, id="-".join(pair)) for pair in pairs
    ]


@pytest.mark.parametrize(("architecture", "source"), _cases())
def test_foreign_adapter_computes_what_it_computed_in_its_class(
    architecture: str, source: str, base: Bases, tmp_path: Path
) -> None:
    """For every class that transformers has for an architecture, hidden states are those of the class itself."""
    # PEFT cannot store a head whole that it adapts, too, as "all-linear" would have it.
    targets = ATTENTION_TARGETS[architecture] if SOURCES[source][1] in _WITH_HEAD else "all-linear"
    config = lora(target_modules=targets, fan_in_fan_out=architecture == "gpt2")
    trained = train(base(architecture), tmp_path / "adapter", source, config)
    assert largest_difference(trained.hidden_states, trained.without) > 0.1
    embeddings, states = _embed(trained)
    assert largest_difference(trained.hidden_states, states) <= TOLERANCE
    _check_accounts(trained, embeddings)


_WITH_HEAD = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS")


def _check_accounts(trained: Source, embeddings: PeftTransformerEmbeddings) -> None:
    """Each tensor of the file is in the model, or in the head that is kept beside it."""
    stored = load_file(trained.folder / "adapter_model.safetensors")
    head = dict(embeddings.foreign_head.tensors) if embeddings.foreign_head else {}
    values = [value for name, value in embeddings.model.state_dict().items() if "lora_" in name]
    for name, tensor in stored.items():
        kept = head.pop(name.removeprefix("base_model.model."), None)
        holders = [value for value in values if value.shape == tensor.shape and torch.equal(value, tensor)]
        assert (kept is not None and torch.equal(kept, tensor)) != (len(holders) == 1), name
    assert not head


def _dora() -> PeftConfig:
    return lora(target_modules=["query", "dense"], use_dora=True)


def _ia3_with_regex() -> PeftConfig:
    return IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=r"model\..*down_proj", init_ia3_weights=False
    )


def _adalora() -> PeftConfig:
    return AdaLoraConfig(
        target_modules=["query", "value"], init_r=4, target_r=2, lora_alpha=24, total_step=100, init_lora_weights=False
    )


def _tinylora(**options: Any) -> PeftConfig:
    return TinyLoraConfig(r=2, u=8, init_weights="uniform", init_v_bound=0.5, **options)


# Name → architecture, source, config.
METHODS: dict[str, tuple[str, str, Callable[[], PeftConfig]]] = {
    "dora": ("bert", "tokens", _dora),
    "rslora": ("llama", "sequence", lambda: lora(target_modules=["q_proj"], use_rslora=True)),
    "pissa": ("llama", "causal-lm", lambda: lora(target_modules=["q_proj"], init_lora_weights="pissa")),
    "regex": ("llama", "causal-lm", lambda: lora(target_modules=r".*model\.layers\.\d+\.self_attn\.(q|v)_proj")),
    "anchored regex": ("llama", "causal-lm", lambda: lora(target_modules=r"model\.layers\.1\.self_attn\.q_proj")),
    "excluded": ("bert", "tokens", lambda: lora(target_modules=["query"], exclude_modules=r"bert\..*layer\.0.*")),
    "layers": ("llama", "causal-lm", lambda: lora(target_modules=["q_proj"], layers_to_transform=[1])),
    "layers of a pattern": (
        "bert",
        "sequence",
        lambda: lora(target_modules=["query"], layers_to_transform=[1], layers_pattern="layer"),
    ),
    "rank and alpha patterns": (
        "llama",
        "causal-lm",
        lambda: lora(
            target_modules=["q_proj", "v_proj"],
            rank_pattern={"model.layers.0.self_attn.q_proj": 2, r"^model\.layers\.1\..*v_proj": 6},
            alpha_pattern={"model.layers.1.self_attn.q_proj": 3, "v_proj": 5},
        ),
    ),
    "patterns of a head": (
        "bert",
        "masked-lm",
        lambda: lora(target_modules=["query", "transform.dense"], rank_pattern={"cls.*dense": 2, "layer.0.*query": 3}),
    ),
    "bias all": ("bert", "tokens", lambda: lora(target_modules=["query"], bias="all")),
    "bias lora_only": ("roberta", "sequence", lambda: lora(target_modules=["query"], bias="lora_only")),
    "bias all, norm saved": (
        "bert",
        "tokens",
        lambda: lora(target_modules=["query"], bias="all", modules_to_save=["encoder.layer.1.output.LayerNorm"]),
    ),
    "bias all, module of modules saved": (
        "bert",
        "tokens",
        lambda: lora(target_modules=["query"], bias="all", modules_to_save=["encoder.layer.1.output"]),
    ),
    "bias all, head of several layers": ("roberta", "sequence", lambda: lora(target_modules=["query"], bias="all")),
    "bias all, pooler saved": (
        "bert",
        "bare",
        lambda: lora(target_modules=["query"], bias="all", modules_to_save=["pooler"]),
    ),
    "head saved": ("bert", "sequence", lambda: lora(target_modules=["query"], modules_to_save=["classifier"])),
    "embeddings and head saved": (
        "llama",
        "causal-lm",
        lambda: lora(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]),
    ),
    "embeddings saved by full name": (
        "llama",
        "causal-lm",
        lambda: lora(target_modules=["q_proj"], modules_to_save=["model.embed_tokens"]),
    ),
    "a module of modules saved": (
        "bert",
        "tokens",
        lambda: lora(target_modules=["query"], modules_to_save=["bert.embeddings"]),
    ),
    "an unread copy of the embeddings saved": (
        "t5",
        "seq2seq",
        lambda: lora(target_modules=["q"], modules_to_save=["shared"]),
    ),
    "modules saved that the bare model has once more": (
        "roberta",
        "tokens",
        lambda: lora(target_modules=["query"], modules_to_save=["dense"]),
    ),
    "adapted embeddings": ("bert", "sequence", lambda: lora(target_modules=["query", "word_embeddings"])),
    "trained tokens": (
        "bert",
        "tokens",
        lambda: lora(target_modules=["query"], trainable_token_indices=list(range(5, 90))),
    ),
    "trained tokens by name": (
        "llama",
        "causal-lm",
        lambda: lora(
            target_modules=["q_proj"],
            trainable_token_indices={"model.embed_tokens": list(range(5, 400)), "lm_head": [3, 4]},
        ),
    ),
    "trained tokens alone": (
        "llama",
        "causal-lm",
        lambda: TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=list(range(5, 400))),
    ),
    "ia3": (
        "bert",
        "sequence",
        lambda: IA3Config(
            target_modules=["key", "output.dense"], feedforward_modules=["output.dense"], init_ia3_weights=False
        ),
    ),
    "ia3 with the feed-forward modules that peft fills in": (
        "bert",
        "tokens",
        lambda: IA3Config(target_modules=["query", "dense"], init_ia3_weights=False),
    ),
    "ia3 without any of the feed-forward modules that peft fills in": (
        "llama",
        "causal-lm",
        lambda: IA3Config(target_modules=["q_proj", "v_proj"], init_ia3_weights=False),
    ),
    "ia3 with a regex for its targets": (
        "llama",
        "causal-lm",
        lambda: IA3Config(
            target_modules=r"model\..*(k_proj|down_proj)", feedforward_modules=["down_proj"], init_ia3_weights=False
        ),
    ),
    "ia3 with a regex": ("llama", "causal-lm", _ia3_with_regex),
    "adalora": ("bert", "sequence", _adalora),
    "prompt": ("llama", "causal-lm", lambda: PromptTuningConfig(num_virtual_tokens=3)),
    "prompt on an encoder": ("bert", "sequence", lambda: PromptTuningConfig(num_virtual_tokens=3)),
    "prompt on encoder and decoder": ("t5", "seq2seq", lambda: PromptTuningConfig(num_virtual_tokens=3)),
    "p-tuning": ("llama", "causal-lm", lambda: PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=16)),
    "prefix": ("llama", "causal-lm", lambda: PrefixTuningConfig(num_virtual_tokens=3)),
    "prefix on an encoder": ("bert", "sequence", lambda: PrefixTuningConfig(num_virtual_tokens=3)),
    "prefix with projection": (
        "gpt2",
        "causal-lm",
        lambda: PrefixTuningConfig(num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=16),
    ),
    "loha": ("llama", "causal-lm", lambda: LoHaConfig(r=4, alpha=12, target_modules=["q_proj"], init_weights=False)),
    "lokr with a pattern": (
        "llama",
        "causal-lm",
        lambda: LoKrConfig(
            r=4,
            alpha=12,
            target_modules=["q_proj"],
            init_weights=False,
            rank_pattern={"model.layers.0.self_attn.q_proj": 2},
        ),
    ),
    "vera with a head beside": (
        "bert",
        "masked-lm",
        lambda: VeraConfig(r=4, target_modules=["query", "dense", "decoder"], init_weights=False, d_initial=0.5),
    ),
    "pvera with a head beside": (
        "bert",
        "masked-lm",
        lambda: PveraConfig(r=4, target_modules=["query", "dense", "decoder"], init_weights=False, d_initial=0.5),
    ),
    "randlora with a head beside": (
        "bert",
        "masked-lm",
        lambda: RandLoraConfig(r=8, randlora_alpha=12, target_modules=["query", "dense"], init_weights=False),
    ),
    "unilora": (
        "bert",
        "masked-lm",
        lambda: UniLoraConfig(r=4, theta_d_length=64, target_modules=["query"], init_weights=False),
    ),
    "unilora with indices and a decoder beside": (
        "t5",
        "seq2seq",
        lambda: UniLoraConfig(
            r=4, theta_d_length=64, target_modules=["q", "wo"], init_weights=False, save_indices=True
        ),
    ),
    "tinylora": ("bert", "tokens", lambda: _tinylora(target_modules=["query"])),
    "tinylora with ties": (
        "llama",
        "causal-lm",
        lambda: _tinylora(target_modules=["q_proj", "v_proj"], weight_tying=0.5, save_projection=False),
    ),
    "vera": ("llama", "causal-lm", lambda: VeraConfig(r=4, target_modules=["q_proj"], init_weights=False)),
    "vblora": (
        "llama",
        "causal-lm",
        lambda: VBLoRAConfig(r=4, num_vectors=8, vector_length=8, topk=2, target_modules=["q_proj"]),
    ),
    "mica": ("bert", "tokens", lambda: lora(target_modules=["query"], init_lora_weights="mica")),
    "osf with a pattern": (
        "bert",
        "tokens",
        lambda: OSFConfig(
            effective_rank=8, rank_pattern={r"layer\.0": 4}, target_modules=["query", "value"], init_weights=False
        ),
    ),
    "ln tuning": ("llama", "sequence", lambda: LNTuningConfig(target_modules=["input_layernorm", "norm"])),
    "adaption prompt": ("llama", "causal-lm", lambda: AdaptionPromptConfig(adapter_len=3, adapter_layers=1)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
def test_foreign_adapter_of_any_method_computes_what_it_computed_in_its_class(
    method: str, base: Bases, tmp_path: Path
) -> None:
    """Whatever the method, and however its config names modules, hidden states are those of the class itself."""
    architecture, source, config = METHODS[method]
    trained = train(base(architecture), tmp_path / "adapter", source, config())
    assert largest_difference(trained.hidden_states, tuple(s.clone() for s in trained.without)) > 1e-2
    embeddings, states = _embed(trained)
    assert largest_difference(trained.hidden_states, states) <= TOLERANCE
    assert embeddings.adapter_config.task_type == "FEATURE_EXTRACTION"
    assert not embeddings.adapter_config.inference_mode
    again = PeftTransformerEmbeddings.from_params(embeddings.to_params())
    again.load_state_dict(embeddings.state_dict())
    assert largest_difference(states, _states(again, trained.input_ids)) == 0.0


# Name → architecture, source, config of adapters that compute something else without the modules beside.
DRAWN_TOGETHER: dict[str, tuple[str, str, Callable[[], PeftConfig]]] = {
    "vera": (
        "t5",
        "seq2seq",
        lambda: VeraConfig(r=4, target_modules=["q", "wo"], init_weights=False, save_projection=False),
    ),
    "randlora": (
        "bert",
        "masked-lm",
        lambda: RandLoraConfig(r=8, target_modules=["query", "decoder"], init_weights=False, save_projection=False),
    ),
    "randlora of another shape": (
        "bert",
        "masked-lm",
        lambda: RandLoraConfig(r=8, target_modules=["query", "decoder"], init_weights=False),
    ),
    "unilora": (
        "t5",
        "seq2seq",
        lambda: UniLoraConfig(r=4, theta_d_length=64, target_modules=["q", "wo"], init_weights=False),
    ),
    "unilora on a head": (
        "bert",
        "masked-lm",
        lambda: UniLoraConfig(r=4, theta_d_length=64, target_modules=["query", "decoder"], init_weights=False),
    ),
    "tinylora": ("bert", "masked-lm", lambda: _tinylora(target_modules=["query", "transform.dense"])),
    "frod": ("t5", "seq2seq", lambda: FrodConfig(sparse_rate=0.1, target_modules=["q"], progressbar=False)),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", DRAWN_TOGETHER)
def test_foreign_adapter_with_one_random_part_for_modules_beside_is_refused(
    method: str, base: Bases, tmp_path: Path
) -> None:
    """What was drawn for more modules than embeddings have is not drawn anew for these alone."""
    architecture, source, config = DRAWN_TOGETHER[method]
    train(base(architecture), tmp_path, source, config())
    with pytest.raises(UnsupportedMethodError, match="one random part for all modules"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "("},
        {"target_modules": 5},
        {"rank_pattern": {"(": 3}},
        {"rank_pattern": [1]},
        {"modules_to_save": 5},
        {"layers_to_transform": "a"},
        {"exclude_modules": "["},
        {"lora_alpha": math.inf},
    ],
    ids=str,
)
def test_foreign_adapter_with_settings_that_make_no_sense_is_refused(
    settings: dict[str, Any], base: Bases, tmp_path: Path
) -> None:
    """A file that somebody edited is named, whatever is wrong with it."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _set(tmp_path, **settings)
    with pytest.raises(AdapterConfigError, match=r"(?s)adapter_config\.json.*\. Correct|lora_alpha is inf"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_with_a_value_that_lora_refuses_is_told_to_correct_it(base: Bases, tmp_path: Path) -> None:
    """Nobody who uses LoRA is told to choose LoRA."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _set(tmp_path, bias="some")
    with pytest.raises(AdapterConfigError, match="Correct the config"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_with_a_trained_copy_of_the_embeddings_leaves_those_of_the_base(
    base: Bases, tmp_path: Path
) -> None:
    """With the adapter switched off, the model is the base."""
    config = lora(target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trained = train(base("llama"), tmp_path, "bare", config)
    embeddings, states = _embed(trained)
    assert largest_difference(trained.hidden_states, states) <= TOLERANCE
    with embeddings.model.disable_adapter():
        assert largest_difference(trained.without, _states(embeddings, trained.input_ids)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_foreign_unilora_of_an_unknown_class_is_refused(base: Bases, tmp_path: Path) -> None:
    """Its file does not say which modules it adapted, so the class has to."""
    config = UniLoraConfig(r=4, theta_d_length=64, target_modules=["query"], init_weights=False)
    train(base("bert"), tmp_path, "masked-lm", config)
    _set(tmp_path, auto_mapping={"base_model_class": "MyBert", "parent_library": "mine"})
    with pytest.raises(UnsupportedMethodError, match="one random part"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


@pytest.mark.filterwarnings("ignore")
def test_foreign_adapter_whose_start_was_drawn_at_random_is_refused(base: Bases, tmp_path: Path) -> None:
    """PiSSA's fast decomposition takes something else out of the base each time."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"], init_lora_weights="pissa_niter_4"))
    with pytest.raises(UnsupportedMethodError, match="path_initial_model_for_weight_conversion"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adalora_with_a_spent_budget_computes_the_same_and_keeps_its_full_rank(
    base: Bases, tmp_path: Path
) -> None:
    """What AdaLoRA pruned is zero, as it was in training: a plugin may give the rank to other matrices later."""
    torch.manual_seed(1)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base("bert"))
    config = _adalora()
    config.task_type, config.tfinal, config.total_step, config.target_r = "SEQ_CLS", 1, 3, 2
    peft_model = get_peft_model(model, config)
    perturb_(peft_model, 3, scale=0.2)
    ids = transformers.AutoTokenizer.from_pretrained(base("bert"))("Berlin", return_tensors="pt")["input_ids"]
    for step in range(4):
        peft_model(input_ids=ids, labels=torch.tensor([0])).loss.backward()
        peft_model.base_model.update_and_allocate(step)
    peft_model.eval().save_pretrained(tmp_path / "adapter")
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any(len(tensor) < 4 for name, tensor in stored.items() if name.endswith("lora_E"))
    embeddings = PeftTransformerEmbeddings.from_adapter(str(tmp_path / "adapter"), layers="all")
    assert largest_difference(hidden_states(model, ids), _states(embeddings, ids)) <= TOLERANCE
    assert all(len(p) == 4 for name, p in embeddings.model.named_parameters() if "lora_E" in name)


@pytest.mark.filterwarnings("ignore")
def test_foreign_adapter_around_a_whole_sentence_transformer_is_found_behind_its_wrappers(
    base: Bases, tmp_path: Path
) -> None:
    """Modules of a SentenceTransformer are numbered, and hold the transformer as ``auto_model``."""
    torch.manual_seed(1)
    inner = nn.Module()
    inner.auto_model = transformers.AutoModel.from_pretrained(base("bert")).eval()
    peft_model = get_peft_model(nn.Sequential(inner), lora(target_modules=["query", "dense"]))
    peft_model.save_pretrained(tmp_path)
    embeddings = PeftTransformerEmbeddings.from_adapter(str(tmp_path), layers="all", base_model=base("bert"))
    ids = torch.tensor([[2, 7, 8, 9, 3]])
    assert largest_difference(hidden_states(inner.auto_model, ids), _states(embeddings, ids)) <= TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_foreign_adapter_on_a_bf16_base_computes_what_it_computed_there(base: Bases, tmp_path: Path) -> None:
    """The base takes the dtype that is asked for, and the adapter is the trained one."""
    config = lora(target_modules=["q_proj", "v_proj"])
    trained = train(base("llama"), tmp_path, "causal-lm", config, dtype=torch.bfloat16)
    embeddings, states = _embed(trained, dtype="bfloat16")
    assert embeddings.base_dtype == torch.bfloat16
    assert largest_difference(trained.hidden_states, states) == 0.0


@pytest.mark.filterwarnings("ignore:MatMul8bitLt")
def test_foreign_adapter_on_a_quantised_base_changes_it_as_it_changed_its_class(base: Bases, tmp_path: Path) -> None:
    """What the adapter adds to an 8-bit base is what PEFT adds to it, within the rounding of that base."""
    pytest.importorskip("bitsandbytes")
    trained = train(base("llama"), tmp_path, "causal-lm", lora(target_modules=["q_proj", "v_proj"]))
    eight_bits = transformers.BitsAndBytesConfig(load_in_8bit=True)
    source = transformers.AutoModelForCausalLM.from_pretrained(base("llama"), quantization_config=eight_bits)
    without = hidden_states(source, trained.input_ids)
    PeftModel.from_pretrained(source, tmp_path).eval()
    expected = hidden_states(source, trained.input_ids)
    embeddings, states = _embed(trained, transformers_model_kwargs={"quantization_config": eight_bits})
    assert embeddings.is_quantised
    assert largest_difference(without, states) > 1
    assert largest_difference(expected, states) < 0.2


@pytest.mark.parametrize(
    ("embeddings_class", "attribute"),
    [(PeftTransformerWordEmbeddings, "token_embedding"), (PeftTransformerDocumentEmbeddings, "document_embedding")],
)
def test_foreign_adapter_gives_embeddings_of_the_class_that_is_asked(
    embeddings_class: Any, attribute: str, base: Bases, tmp_path: Path
) -> None:
    """All three classes take adapters, and every keyword of their constructors."""
    train(base("bert"), tmp_path, "sequence", lora(target_modules=["query"]))
    embeddings = embeddings_class.from_adapter(str(tmp_path), layers="-1,-2", name="mine", use_context=True)
    assert type(embeddings) is embeddings_class
    assert getattr(embeddings, attribute)
    assert (embeddings.layer_indexes, embeddings.name, embeddings.context_length) == ([-1, -2], "mine", 64)


@pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers")
@pytest.mark.parametrize(("entry", "architecture"), [("text-classifier", "bert"), ("sequence-tagger", "llama")])
def test_foreign_adapter_is_trained_on_and_comes_back_from_a_file(
    entry: str, architecture: str, base: Bases, tmp_path: Path
) -> None:
    """The embeddings are like any others: training changes the adapter, and a load predicts what was saved."""
    source = "sequence" if architecture == "bert" else "causal-lm"
    targets = r".*\.(query|word_embeddings)" if architecture == "bert" else r"model\..*\.q_proj"
    train(base(architecture), tmp_path / "adapter", source, lora(target_modules=targets, r=2))

    def make(embeddings_class: Any) -> Callable[..., Any]:
        return lambda **kwargs: embeddings_class.from_adapter(str(tmp_path / "adapter"), **kwargs)

    zoo = ZOO[entry]
    model, corpus = (
        zoo.build(make(PeftTransformerWordEmbeddings), make(PeftTransformerDocumentEmbeddings)),
        zoo.corpus(),
    )
    before = {name: p.detach().clone() for name, p in model.embeddings.model.named_parameters() if "lora_" in name}
    zoo.train(model, corpus, tmp_path / "out", learning_rate=1e-2)
    after = dict(model.embeddings.model.named_parameters())
    assert all(not torch.equal(after[name], value) for name, value in before.items())
    loaded = type(model).load(tmp_path / "out" / "final-model.pt")
    assert zoo.predict(loaded, corpus) == zoo.predict(model, corpus)


def test_foreign_adapter_can_be_copied_with_its_head(base: Bases, tmp_path: Path) -> None:
    """A deep copy embeds the same and has the same head."""
    trained = train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    embeddings, states = _embed(trained)
    clone = copy.deepcopy(embeddings)
    assert largest_difference(states, _states(clone, trained.input_ids)) == 0.0
    assert set(clone.foreign_head.tensors) == {"classifier.weight", "classifier.bias"}


def test_foreign_adapter_leaves_the_base_of_other_models_as_it_was(base: Bases, tmp_path: Path) -> None:
    """Biases and rows that come with an adapter go to storage of their own, though the base is shared."""
    plain = PeftTransformerEmbeddings(base("bert"), layers="all", peft_config=lora(target_modules=["query"]))
    trained = train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"], bias="all"))
    before = _states(plain, trained.input_ids)
    _embed(trained)
    assert largest_difference(before, _states(plain, trained.input_ids)) == 0.0


# ---- vocabulary and tokenizer


def _resized(base: str, folder: Path, config: PeftConfig, *, tokens: int = 3) -> tuple[Any, torch.Tensor]:
    """Return a causal language model with an adapter and new tokens, stored as a training script would."""
    torch.manual_seed(1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens([f"<new{number}>" for number in range(tokens)])
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    nn.init.normal_(model.get_input_embeddings().weight[-tokens:].data)
    config.task_type = "CAUSAL_LM"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = get_peft_model(model, config).eval()
        perturb_(peft_model, 3, scale=0.2)
        peft_model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, tokenizer("<new0> Berlin <new2>", return_tensors="pt")["input_ids"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [420, 421]},
    ],
    ids=["frozen", "saved", "adapted", "trained tokens"],
)
def test_foreign_adapter_with_new_tokens_brings_their_rows_and_their_tokenizer(
    options: dict[str, Any], base: Bases, tmp_path: Path
) -> None:
    """A vocabulary that was resized comes with the adapter, however its rows are trained, and survives a file."""
    model, ids = _resized(base("llama"), tmp_path / "adapter", lora(**{"target_modules": ["q_proj"], **options}))
    embeddings = PeftTransformerDocumentEmbeddings.from_adapter(str(tmp_path / "adapter"), layers="all")
    assert embeddings.tokenizer.convert_tokens_to_ids("<new2>") == ids.max()
    expected = hidden_states(model, ids)
    assert largest_difference(expected, _states(embeddings, ids)) <= TOLERANCE
    entry = ZOO["text-classifier"]
    classifier = entry.build(lambda **_: None, lambda **_: embeddings)
    classifier.save(tmp_path / "model.pt")
    loaded = TextClassifier.load(tmp_path / "model.pt")
    assert largest_difference(expected, _states(loaded.embeddings, ids)) <= TOLERANCE


def test_foreign_adapter_whose_file_lacks_the_rows_of_new_tokens_is_refused(base: Bases, tmp_path: Path) -> None:
    """Rows that nobody stored are not made up; the base's own tokenizer can be asked for instead."""
    _resized(base("llama"), tmp_path, lora(target_modules=["q_proj"]))
    _rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if "embed_tokens" not in k})
    with pytest.raises(AdapterMismatchError, match="'<new0>', '<new1>', '<new2>' lie behind"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    PeftTransformerEmbeddings.from_adapter(str(tmp_path), tokenizer=base("llama"))


def test_foreign_adapter_of_a_smaller_vocabulary_is_refused(base: Bases, tmp_path: Path) -> None:
    """Rows of a base cannot be taken away."""
    _resized(base("llama"), tmp_path, lora(target_modules=["q_proj"]))
    _rewrite(tmp_path, lambda ts: {k: v[:100] if "embed_tokens" in k else v for k, v in ts.items()})
    with pytest.raises(BaseMismatchError, match="has 420 rows, and the adapter was trained with 100"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_with_an_embedding_matrix_of_its_own_says_so(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A matrix in the file that differs from the base's is used, reported, and stored with the model."""
    trained = train(base("bert"), tmp_path, "masked-lm", lora(target_modules=["query"]))
    matrix = 2 * trained.model.get_input_embeddings().weight.detach()
    name = "base_model.model.bert.embeddings.word_embeddings.weight"
    _rewrite(tmp_path, lambda tensors: {**tensors, name: matrix})
    trained.model.get_input_embeddings().weight.data = matrix.clone()
    _, states = _embed(trained)
    assert largest_difference(hidden_states(trained.model, trained.input_ids), states) <= TOLERANCE
    assert "has input embeddings of its own" in caplog.text


def test_foreign_adapter_without_a_tokenizer_uses_that_of_the_base(base: Bases, tmp_path: Path) -> None:
    """PEFT stores no tokenizer: words are cut as the base cuts them."""
    train(base("bert"), tmp_path, "bare", lora(target_modules=["query"]))
    embeddings = PeftTransformerEmbeddings.from_adapter(str(tmp_path), use_context_separator=False)
    assert embeddings.tokenizer.get_vocab() == transformers.AutoTokenizer.from_pretrained(base("bert")).get_vocab()


def test_foreign_adapter_whose_base_was_moved_names_the_file_that_named_it(base: Bases, tmp_path: Path) -> None:
    """The message says which file names a base that is gone, and how to name another."""
    train(base("bert"), tmp_path, "bare", lora(target_modules=["query"]))
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(tmp_path / "moved")
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(
        BaseModelNotFoundError, match=r"adapter_config\.json' names the base model '.*/moved'.* base_model="
    ):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    assert PeftTransformerEmbeddings.from_adapter(str(tmp_path), base_model=base("bert"))


# ---- files


def test_foreign_adapter_in_a_subfolder_and_in_the_old_format_is_read(base: Bases, tmp_path: Path) -> None:
    """``adapter_model.bin`` is read for its tensors alone."""
    trained = train(base("bert"), tmp_path / "run" / "last", "tokens", lora(target_modules=["query"]))
    weights = tmp_path / "run" / "last" / "adapter_model.safetensors"
    torch.save(load_file(weights), weights.with_name("adapter_model.bin"))
    weights.unlink()
    embeddings = PeftTransformerEmbeddings.from_adapter(str(tmp_path), subfolder="run/last", layers="all")
    assert largest_difference(trained.hidden_states, _states(embeddings, trained.input_ids)) <= TOLERANCE


class _Code:
    def __reduce__(self) -> Any:
        return (print, ("this ran",))


def test_foreign_adapter_that_pickles_more_than_tensors_is_refused(
    base: Bases, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No code of a file runs."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.bert.pooler": _Code()}, tmp_path / "adapter_model.bin")
    with pytest.raises(ModelFileError, match=r"adapter_model\.bin"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    assert "this ran" not in capsys.readouterr().out


def test_foreign_adapter_whose_keys_carry_its_name_is_read(base: Bases, tmp_path: Path) -> None:
    """Some tools store the keys of the live model."""
    trained = train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _rewrite(tmp_path, lambda ts: {k.replace("_A.weight", "_A.default.weight"): v for k, v in ts.items()})
    _, states = _embed(trained)
    assert largest_difference(trained.hidden_states, states) <= TOLERANCE


def test_foreign_adapter_on_the_hub_is_found_with_its_base_at_their_revisions(base: Bases, tmp_path: Path) -> None:
    """Adapter and base come from the Hub, by id, revision and token, and offline from the cache."""
    trained = train(base("bert"), tmp_path / "adapter", "tokens", lora(target_modules=["query"]))
    _set(trained.folder, base_model_name_or_path="you/base")

    def files(folder: Path) -> dict[str, bytes]:
        return {f"deep/{p.name}" if folder == trained.folder else p.name: p.read_bytes() for p in folder.iterdir()}

    with HubStandIn() as hub, online(hub, None, tmp_path / "cache", token=hub.token):
        hub.add_repo("you/base", files(Path(base("bert"))))
        hub.add_repo("me/adapter", files(trained.folder))
        embeddings, states = _embed_from("me/adapter@main", trained, subfolder="deep")
        assert largest_difference(trained.hidden_states, states) <= TOLERANCE
        assert embeddings.base_revision is not None
        with hub.down():
            _, states = _embed_from("me/adapter", trained, subfolder="deep", local_files_only=True)
        assert largest_difference(trained.hidden_states, states) <= TOLERANCE
        with pytest.raises(ModelFileError, match="me/nothing"):
            PeftTransformerEmbeddings.from_adapter("me/nothing")


def _embed_from(name: str, trained: Source, **options: Any) -> tuple[Any, tuple[torch.Tensor, ...]]:
    embeddings = PeftTransformerEmbeddings.from_adapter(name, layers="all", **options)
    return embeddings, _states(embeddings, trained.input_ids)


# ---- errors


def _break_file(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"{")


def _nest_config(folder: Path, levels: int) -> None:
    path = folder / "adapter_config.json"
    settings = {**json.loads(path.read_text()), "rank_pattern": "nested"}
    path.write_text(json.dumps(settings).replace('"nested"', '{"a": ' * levels + "1" + "}" * levels))


FILE_ERRORS: dict[str, tuple[Callable[[Path], Any], type[Exception], str]] = {
    "no config": (lambda f: (f / "adapter_config.json").unlink(), ModelFileError, "no adapter_config.json in"),
    "no weights": (
        lambda f: (f / "adapter_model.safetensors").unlink(),
        ModelFileError,
        "no adapter_model.safetensors",
    ),
    "deep config": (lambda f: _nest_config(f, 3_000), ModelFileError, "Cannot read"),
    "deep setting": (lambda f: _nest_config(f, 900), AdapterConfigError, "Cannot read"),
    "broken config": (lambda f: _break_file(f, "adapter_config.json"), ModelFileError, "Cannot read"),
    "broken weights": (lambda f: _break_file(f, "adapter_model.safetensors"), ModelFileError, "Cannot read"),
    "empty weights": (lambda f: _rewrite(f, lambda _: {}), ModelFileError, "it holds no tensors"),
    "no method": (lambda f: _set(f, peft_type=None), AdapterConfigError, "knows no such method"),
    "a newer setting": (lambda f: _set(f, newer=3), AdapterConfigError, "does not know its settings 'newer'"),
    "a refused setting": (lambda f: _set(f, r=0), AdapterConfigError, "refuses|`r`"),
    "no base": (lambda f: _set(f, base_model_name_or_path=None), AdapterConfigError, "Pass base_model="),
    "a base elsewhere": (lambda f: _set(f, base_model_name_or_path="/no/where"), BaseModelNotFoundError, "/no/where"),
    "replicated layers": (lambda f: _set(f, layer_replication=[[0, 1]]), UnsupportedMethodError, "replicates layers"),
    "a refused method": (
        lambda f: _set(f, alora_invocation_tokens=[1], task_type="CAUSAL_LM"),
        UnsupportedMethodError,
        "alora_invocation_tokens: activated LoRA",
    ),
    "two values of one tensor": (
        lambda f: _rewrite(f, lambda ts: {**ts, "base_model.model.classifier.modules_to_save.bias": torch.ones(2)}),
        AdapterMismatchError,
        "means the same tensor and holds other values",
    ),
    "unknown tensors": (
        lambda f: _rewrite(f, lambda ts: {**ts, "base_model.model.mine.lora_A.weight": torch.ones(1)}),
        AdapterMismatchError,
        "Cannot place 1 tensors of the adapter: 'base_model.model.mine.lora_A.weight'",
    ),
    "tensors of no module of the transformer": (
        lambda f: _rewrite(f, lambda ts: {**ts, "base_model.model.bert.more.lora_A.weight": torch.ones(1)}),
        AdapterMismatchError,
        "behind the prefix 'bert.'",
    ),
    "a parameter of another method": (
        lambda f: _rewrite(f, lambda ts: {k.replace("lora_A", "hada_w1_a"): v for k, v in ts.items()}),
        AdapterMismatchError,
        "missing: .*left over: ",
    ),
    "a tensor missing": (
        lambda f: _rewrite(
            f, lambda ts: {k: v for k, v in ts.items() if "layer.0.attention.self.query.lora_B" not in k}
        ),
        AdapterMismatchError,
        "missing: 'base_model.model.encoder.layer.0.attention.self.query.lora_B.weight'",
    ),
    "a layer missing": (
        lambda f: _rewrite(f, lambda ts: {k: v for k, v in ts.items() if "layer.0" not in k}),
        BaseMismatchError,
        "no tensors for: 'encoder.layer.0.attention.self.query'",
    ),
    "another rank": (lambda f: _set(f, r=3), BaseMismatchError, r"\(4, 32\) instead of \(3, 32\)"),
    "no alpha": (lambda f: _set(f, lora_alpha=None), AdapterConfigError, "lacks 'lora_alpha', which scales"),
    "an alpha of zero": (lambda f: _set(f, lora_alpha=0), UntrainedAdapterError, "the scale in its adapter_config"),
    "alphas of zero": (
        lambda f: _set(f, alpha_pattern={"query": 0}),
        UntrainedAdapterError,
        "the scale in its adapter_config",
    ),
    "NaN": (
        lambda f: _rewrite(f, lambda ts: {k: v * (float("nan") if "0.attention" in k else 1) for k, v in ts.items()}),
        ModelFileError,
        "2 of its tensors hold NaN or infinite numbers: .*0.attention.self.query.lora_A",
    ),
    "an infinite head": (
        lambda f: _rewrite(f, lambda ts: {k: v / ("classifier" not in k) for k, v in ts.items()}),
        ModelFileError,
        "classifier",
    ),
    "the tensors of ZeRO-3": (
        lambda f: _rewrite(f, lambda ts: {k: v[:0] if "lora_B" in k else v for k, v in ts.items()}),
        ModelFileError,
        "2 of its tensors are empty: .*zero_to_fp32",
    ),
    "an empty adapter": (
        lambda f: _rewrite(f, lambda ts: {k: v * ("lora_B" not in k) for k, v in ts.items()}),
        UntrainedAdapterError,
        "all of its 2 matrices",
    ),
}


@pytest.mark.parametrize("problem", FILE_ERRORS)
def test_foreign_adapter_that_cannot_be_used_is_an_error_that_says_why(
    problem: str, base: Bases, tmp_path: Path
) -> None:
    """Nothing is guessed and nothing is left out."""
    change, error, message = FILE_ERRORS[problem]
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    change(tmp_path)
    with pytest.raises(error, match=message) as caught:
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    assert len(str(caught.value).split(". ")) >= 3


@pytest.mark.parametrize("setting", ["alpha_pattern", "rank_pattern"])
def test_foreign_adapter_whose_file_lost_the_order_of_a_pattern_is_refused(
    setting: str, base: Bases, tmp_path: Path
) -> None:
    """PEFT's file sorts the keys, of which the first that matches counted in training."""
    pattern = {"output.dense": 2, "attention.output.dense": 3}
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["dense"], **{setting: pattern}))
    with pytest.raises(AdapterConfigError, match=f"Cannot tell the {setting}"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config[setting] = {"^(?!.*attention).*output.dense": 2, "attention.output.dense": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_with_the_base_of_another_architecture_is_refused(base: Bases, tmp_path: Path) -> None:
    """No name fits."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    with pytest.raises(BaseMismatchError, match="none of its modules are those that the adapter adapts"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path), base_model=base("gpt2"))


def test_foreign_adapter_of_a_head_alone_is_refused(base: Bases, tmp_path: Path) -> None:
    """Nothing of it would be in the embeddings."""
    train(base("bert"), tmp_path, "masked-lm", lora(target_modules=["transform.dense"]))
    with pytest.raises(BaseMismatchError, match="or adapts a head alone"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_takes_no_second_config(base: Bases, tmp_path: Path) -> None:
    """The config is the adapter's own."""
    train(base("bert"), tmp_path, "bare", lora(target_modules=["query"]))
    with pytest.raises(TypeError, match="peft_config"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path), peft_config=lora())


def test_foreign_adapter_loaded_by_peft_alone_would_change_nothing(base: Bases, tmp_path: Path) -> None:
    """The reason for all this: PEFT puts none of the tensors in place, and only warns."""
    trained = train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _set(tmp_path, init_lora_weights=True, modules_to_save=None)
    model = transformers.AutoModel.from_pretrained(base("bert"))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        PeftModel.from_pretrained(model, tmp_path).eval()
    assert largest_difference(trained.without, hidden_states(model, trained.input_ids)) == 0.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 64}, r"2 tensors have another shape|\(4, 32\) instead of \(4, 64\)"),
        ({"num_hidden_layers": 3}, "no tensors for: 'encoder.layer.2.attention.self.query'"),
        ({"num_hidden_layers": 1}, r"Cannot place 2 tensors .*layer\.1"),
    ],
    ids=["wider", "deeper", "shallower"],
)
def test_foreign_adapter_with_a_base_of_another_size_is_refused(
    changes: dict[str, int], message: str, base: Bases, tmp_path: Path
) -> None:
    """A base on which only some tensors would fit is not the one that the adapter was trained on."""
    train(base("bert"), tmp_path / "adapter", "tokens", lora(target_modules=["query"]))
    config = transformers.AutoConfig.from_pretrained(base("bert"))
    for name, value in changes.items():
        setattr(config, name, value)
    transformers.BertModel(config).save_pretrained(tmp_path / "other")
    transformers.AutoTokenizer.from_pretrained(base("bert")).save_pretrained(tmp_path / "other")
    with pytest.raises((BaseMismatchError, AdapterMismatchError), match=message):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path / "adapter"), base_model=str(tmp_path / "other"))


def test_foreign_adapter_that_changes_nothing_is_taken_on_request(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever wants to train on an empty adapter can say so."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _rewrite(tmp_path, lambda tensors: {k: v * ("lora_B" not in k) for k, v in tensors.items()})
    PeftTransformerEmbeddings.from_adapter(str(tmp_path), allow_untrained=True)
    assert "2 of 2 deciding matrices" in caplog.text


def test_foreign_adapter_that_is_partly_zero_is_reported(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Layers that learned nothing are named."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _rewrite(tmp_path, lambda ts: {k: v * ("layer.1.attention.self.query.lora_B" not in k) for k, v in ts.items()})
    PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    assert "1 of 2 deciding matrices" in caplog.text


def test_foreign_prefix_of_a_decoder_is_refused_on_its_encoder(base: Bases, tmp_path: Path) -> None:
    """PEFT gives the prefix to the decoder alone: the encoder would be as it was."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(base("t5"), tmp_path, "seq2seq", PrefixTuningConfig(num_virtual_tokens=3))
    with pytest.raises(UnsupportedMethodError, match="takes no past key values"):
        PeftTransformerEmbeddings.from_adapter(str(tmp_path))


def test_foreign_adapter_reports_the_tensors_of_its_head(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What embeddings have no place for is named, and kept."""
    train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    with caplog.at_level(logging.WARNING, logger="flair_peft"):
        embeddings = PeftTransformerEmbeddings.from_adapter(str(tmp_path))
    assert "2 tensors of" in caplog.text
    assert "'classifier.bias', 'classifier.weight'" in caplog.text
    assert embeddings.foreign_head.source_class == "BertForTokenClassification"


def test_foreign_names_that_fit_behind_two_prefixes_are_ambiguous() -> None:
    """Which of two modules is meant cannot be proven, so it is not guessed."""
    with pytest.raises(AdapterMismatchError, match=r"both behind '', 'model\.'"):
        source_classes.locate(
            ["base_model.model.model.q.lora_A.weight"], {"q", "model.q"}, ["", "model."], is_part=lambda _: True
        )


def test_foreign_names_lose_the_prefix_and_heads_keep_theirs() -> None:
    """Tensors of the transformer get the bare model's names; those of no module at all keep what they are called."""
    landing = source_classes.locate(
        ["base_model.model.model.q.lora_A.weight", "base_model.model.score.weight", "base_model.vera_A"],
        {"q"},
        ["", "model."],
        is_part=lambda name: name == "score",
    )
    assert landing.prefix == "model."
    assert landing.inside == {
        "base_model.model.model.q.lora_A.weight": "q.lora_A.weight",
        "base_model.vera_A": "vera_A",
    }
    assert landing.outside == {"base_model.model.score.weight": "score.weight"}


def test_foreign_head_of_a_class_of_ones_own_is_known_by_modules_to_save(base: Bases, tmp_path: Path) -> None:
    """A head that transformers does not have is recognised where the adapter's config names it."""
    trained = train(base("bert"), tmp_path, "tokens", lora(target_modules=["query"]))
    _rewrite(tmp_path, lambda tensors: {**tensors, "base_model.model.my_head.weight": torch.ones(2, 32)})
    _set(tmp_path, modules_to_save=["classifier", "score", "my_head"])
    embeddings, states = _embed(trained)
    assert largest_difference(trained.hidden_states, states) <= TOLERANCE
    assert "my_head.weight" in embeddings.foreign_head.tensors


def test_foreign_embeddings_embed_sentences(base: Bases, tmp_path: Path) -> None:
    """What a sentence gets is the last hidden state of the source class."""
    trained = train(base("llama"), tmp_path, "causal-lm", lora(target_modules=["q_proj"]))
    embeddings = PeftTransformerDocumentEmbeddings.from_adapter(str(tmp_path), use_context_separator=False)
    sentence = Sentence(tiny.CORPUS[0])
    embeddings.embed(sentence)
    ids = embeddings.prepare_tensors([Sentence(tiny.CORPUS[0])])["input_ids"]
    expected = hidden_states(trained.model, ids)[-1][0, -1]
    assert torch.allclose(sentence.embedding, expected, atol=TOLERANCE)


def test_foreign_tagger_is_a_usual_model(base: Bases, tmp_path: Path) -> None:
    """A directory holds the model with its resolved config, and gives it back."""
    from flair_peft import from_pretrained, save_pretrained

    train(base("llama"), tmp_path / "adapter", "causal-lm", METHODS["rank and alpha patterns"][2]())
    entry = ZOO["sequence-tagger"]
    tagger = entry.build(
        lambda **kwargs: PeftTransformerWordEmbeddings.from_adapter(str(tmp_path / "adapter"), **kwargs),
        lambda **_: None,
    )
    assert isinstance(tagger, SequenceTagger)
    save_pretrained(tagger, tmp_path / "model")
    corpus = entry.corpus()
    assert entry.predict(from_pretrained(tmp_path / "model"), corpus) == entry.predict(tagger, corpus)


def _modernbert(base: Bases, folder: Path, **options: Any) -> tuple[Source, PeftTransformerDocumentEmbeddings]:
    trained = train(base("modernbert"), folder / "adapter", "bare", lora(target_modules=["Wqkv"]))
    settings = {"cls_pooling": "mean", "use_context_separator": False, **options}
    return trained, PeftTransformerDocumentEmbeddings.from_adapter(str(trained.folder), **settings)


def _vector(embeddings: Any) -> torch.Tensor:
    sentence = Sentence(TEXT)
    embeddings.embed(sentence)
    return sentence.embedding.detach()


def test_adapter_of_a_model_with_a_final_norm_says_how_to_read_it(
    base: Bases, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The default is what Flair reads, and is said once; after_final_norm=True gives what the bare model returns."""
    trained, before = _modernbert(base, tmp_path)
    assert caplog.text.count("after_final_norm=True") == 1
    caplog.clear()
    after = PeftTransformerDocumentEmbeddings.from_adapter(
        str(trained.folder), cls_pooling="mean", use_context_separator=False, after_final_norm=True
    )
    PeftTransformerEmbeddings.from_adapter(str(trained.folder), layers="1")
    assert "after_final_norm" not in caplog.text
    ids = trained.input_ids
    with torch.no_grad():
        last = trained.model(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    assert largest_difference((last,), _states(after, ids)) <= TOLERANCE
    assert largest_difference(trained.hidden_states[-1:], _states(before, ids)) <= TOLERANCE
    assert (_vector(before) - _vector(after)).abs().max() > 0.1


def test_adapter_read_after_the_final_norm_is_so_wherever_it_goes(base: Bases, tmp_path: Path) -> None:
    """Copies, files, directories and a SharedBase with other models give the same vectors; a merge is refused."""
    _, embeddings = _modernbert(base, tmp_path, after_final_norm=True)
    labels = Dictionary(add_unk=False)
    labels.add_item("a")
    labels.add_item("b")
    model = TextClassifier(embeddings, label_dictionary=labels, label_type="class").eval()
    expected = _vector(embeddings)
    model.save(tmp_path / "model.pt")
    save_pretrained(model, tmp_path / "model")
    assert torch.equal(_vector(copy.deepcopy(embeddings)), expected)
    assert torch.equal(_vector(TextClassifier.load(tmp_path / "model.pt").embeddings), expected)
    shared = SharedBase(base("modernbert"))
    models = [shared.load(tmp_path / "model"), shared.load(tmp_path / "model.pt")]
    sentences = [Sentence(TEXT), Sentence(TEXT)]
    shared.predict(dict(zip(models, sentences, strict=True)), embedding_storage_mode="cpu")
    for sentence in sentences:
        assert (sentence.embedding - expected).abs().max() <= TOLERANCE
    with pytest.raises(AdapterConfigError, match="final norm"):
        merge(model)


def test_adapter_of_a_class_that_gives_the_base_more_inputs_is_refused(base: Bases, tmp_path: Path) -> None:
    """Longformer's classifier gives the first token global attention; its tagger adds nothing, and is read."""
    longformer = write_base("Longformer", tmp_path / "base", base("bert"), attention_window=[4, 4])
    config = lora(target_modules=["query", "query_global"])
    for source in ("sequence", "questions", "choice"):
        folder = tmp_path / source
        model = getattr(transformers, SOURCES[source][0]).from_pretrained(longformer)
        config.task_type = {"sequence": "SEQ_CLS", "questions": "QUESTION_ANS"}.get(source)
        get_peft_model(model, copy.deepcopy(config)).save_pretrained(folder)
        with pytest.raises(AdapterConfigError, match="global attention"):
            PeftTransformerEmbeddings.from_adapter(str(folder))
    trained = train(longformer, tmp_path / "tokens", "tokens", lora(target_modules=["query"]))
    ids = trained.input_ids
    _, ours = _embed(trained)
    assert largest_difference(trained.hidden_states, tuple(state[:, : ids.shape[1]] for state in ours)) <= TOLERANCE
