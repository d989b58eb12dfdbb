"""Every PEFT method and LoRA option as a small configuration: what the tests parametrise over.

Sizes fit the models of ``tiny.py`` (hidden size 32, feed-forward size 64). No adapter starts as a no-op where its
config can prevent that, and no scale is 1: with B = 0 or alpha = r, most adapter tests pass on broken code. The rest is
left to `perturb_`. What the fields say was measured on PEFT 0.21.2 with transformers 4.57.6.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, TaskType
from peft.tuners.lora.config import BdLoraConfig, CordaConfig, KasaConfig, LoraGAConfig, MontecloraConfig, VeloraConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from torch import nn

from flair_peft.adapter import traits

REFUSED_METHODS = {name: each.refused for name, each in traits.METHODS.items() if each.refused}
"""PEFT's name of a method that no model can have → why."""

ENCODER = frozenset({"encoder"})
DECODER = frozenset({"decoder"})
BOTH = ENCODER | DECODER
NOWHERE: frozenset[str] = frozenset()

VIRTUAL_TOKENS = 3

_NO_BITSANDBYTES = "quantises the base with bitsandbytes, on a GPU"


class ByKind(dict[str, Any]):
    """A value of an option that differs between an encoder and a decoder."""


# Two shapes of matrices each, so that methods that share or slice projections cannot mistake one for the other.
LINEAR = ByKind(encoder=["query", "value", "intermediate.dense"], decoder=["q_proj", "v_proj", "down_proj"])
FEEDFORWARD = ByKind(encoder=["intermediate.dense"], decoder=["down_proj"])
NORMS = ByKind(encoder=["LayerNorm"], decoder=["input_layernorm", "post_attention_layernorm", "norm"])
TOKENS = ByKind(encoder=["word_embeddings"], decoder=["embed_tokens"])

TOKEN_INDICES = [1, 2, 3]
"""Rows for the methods that train single tokens: every tokenizer of ``tests.support.tiny`` gives one of them."""


@dataclass(frozen=True)
class Method:
    """A PEFT method or an option of one, with what the tests have to know about it.

    Attributes:
        name: for test ids.
        config: "encoder" (BERT's module names) or "decoder" (Llama's) → a new config.
        works: the kinds of models that it can train and run under Flair.
        reason: why not on the others.
        rewrites_base: injection changes the frozen weights, so that switching the adapter off does not give the base.
        trains_base: parameters of the base itself are trained (biases, which Llama lacks), with the same consequence.
        derived: buffers and attributes that injection computes from the base weights and that no ``state_dict`` holds.
            They change with the base, its dtype, and (through SVD) the number of threads.
        seeded: those that come from the config's seed instead. Safe as long as torch's generators stay as they are.
        lossy_peft_file: PEFT's own file, loaded onto the same base with the same config, can predict something else.
        needs_step: call ``base_model.update_and_allocate(step)`` after each backward pass, before gradients are zeroed.
        prepends_rows: ``hidden_states`` get ``VIRTUAL_TOKENS`` rows in front of those of the words.
        takes_positions: how many of the model's absolute positions the method uses up.
        without_gradient: the trainable parameters that no gradient reaches, as a regular expression; None for none.
        random_in_training: the output differs between train and eval mode although every dropout is 0.
        mixes_batch: the output for a sentence depends on the other sentences of its batch and on the padding.
        mergeable: the kinds of models into which PEFT can merge it.
        warns: what PEFT or torch warn of, as a regular expression; None for nothing.
        before: called with the base model and the config before injection.
        after: called with the PEFT model after injection.
    """

    name: str
    config: Callable[[str], PeftConfig]
    works: frozenset[str] = BOTH
    reason: str = ""
    rewrites_base: bool = False
    trains_base: bool = False
    derived: tuple[str, ...] = ()
    seeded: tuple[str, ...] = ()
    lossy_peft_file: bool = False
    needs_step: bool = False
    prepends_rows: bool = False
    takes_positions: int = 0
    without_gradient: str | None = None
    random_in_training: bool = False
    mixes_batch: bool = False
    mergeable: frozenset[str] = BOTH
    warns: str | None = None
    before: Callable[[nn.Module, PeftConfig], None] | None = None
    after: Callable[[PeftModel], None] | None = None


def attach(method: Method, model: nn.Module, kind: str) -> PeftModel:
    """Return ``model`` with a new adapter, calibrated on random tokens where the method wants data.

    Args:
        method: one that works on ``kind``.
        model: a transformer; changed in place, as PEFT does.
        kind: "encoder" or "decoder".
    """
    config = method.config(kind)
    if method.before is not None:
        method.before(model, config)
    peft_model = peft.get_peft_model(model, config)
    if method.after is not None:
        method.after(peft_model)
    return peft_model


def perturb_(model: nn.Module, seed: int, *, scale: float = 0.05) -> None:
    """Add noise to every trainable parameter, so that no adapter is a no-op.

    Args:
        model: changed in place; its dtypes and devices stay.
        seed: the same seed and the same parameter names give the same noise.
        scale: standard deviation of the noise. Parameters that PEFT starts at 0 or 1 stay close to that.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
            if parameter.requires_grad:
                noise = scale * torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter))


def _make(kind: str, *, class_name: str, options: Mapping[str, Any]) -> PeftConfig:
    values = {name: value[kind] if isinstance(value, ByKind) else value for name, value in options.items()}
    values = copy.deepcopy(values)  # PEFT writes into the rank patterns and nested configs that it is given
    return getattr(peft, class_name)(**{"task_type": TaskType.FEATURE_EXTRACTION, **values})


def _prompt(class_name: str, **options: Any) -> Callable[[str], PeftConfig]:
    return partial(_make, class_name=class_name, options=options)


def _layers(class_name: str, *, targets: object = LINEAR, **options: Any) -> Callable[[str], PeftConfig]:
    return partial(_make, class_name=class_name, options={"target_modules": targets, **options})


def _lora(**options: Any) -> Callable[[str], PeftConfig]:
    return _layers("LoraConfig", **{"r": 4, "lora_alpha": 12, "init_lora_weights": False, **options})


def _calibration_batches() -> list[dict[str, torch.Tensor]]:
    """Return 24 batches of one sentence of 16 tokens: CorDA can only read batches of one."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(4, 60, (24, 1, 16), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]


def _run_corda(model: nn.Module, config: PeftConfig) -> None:
    preprocess_corda(model, config, run_model=lambda: [model(**batch) for batch in _calibration_batches()])


def _run_lora_ga(model: nn.Module, config: PeftConfig) -> None:
    def train_step() -> None:
        for batch in _calibration_batches():
            model(**batch).last_hidden_state.float().square().sum().backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Full backward hook is firing")
        preprocess_loraga(model, config, train_step)
    model.zero_grad()


def _run_eva(model: PeftModel) -> None:
    peft.initialize_lora_eva_weights(model, _calibration_batches(), show_progress_bar=False)


def _by_name(*methods: Method) -> dict[str, Method]:
    return {method.name: method for method in methods}


_PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS}
_IN_FRONT: dict[str, Any] = {
    "prepends_rows": True,
    "takes_positions": VIRTUAL_TOKENS,
    "mergeable": NOWHERE,
}
_AS_CACHE: dict[str, Any] = {"takes_positions": VIRTUAL_TOKENS, "mergeable": NOWHERE}

METHODS: dict[str, Method] = _by_name(
    Method("PROMPT_TUNING", _prompt("PromptTuningConfig", **_PROMPT), **_IN_FRONT),
    Method(
        "MULTITASK_PROMPT_TUNING",
        _prompt("MultitaskPromptTuningConfig", **_PROMPT, num_tasks=2, num_ranks=2),
        works=NOWHERE,
        reason="PEFT's model for feature extraction never passes it the task ids that it needs",
        **_IN_FRONT,
    ),
    Method(
        "P_TUNING",
        _prompt("PromptEncoderConfig", **_PROMPT, encoder_hidden_size=16),
        lossy_peft_file=True,  # it holds the finished prompt, which only inference_mode=True reads as such
        **_IN_FRONT,
    ),
    Method("PREFIX_TUNING", _prompt("PrefixTuningConfig", **_PROMPT), **_AS_CACHE),
    Method("LORA", _lora()),
    Method(
        "ADALORA",
        _layers(
            "AdaLoraConfig",
            init_r=6,
            target_r=3,
            lora_alpha=12,
            total_step=20,
            tinit=2,
            tfinal=4,
            deltaT=2,
            init_lora_weights=False,
        ),
        # Pruned ranks change the order of summation; on a half-precision base PEFT trains `ranknum`, unsaved.
        lossy_peft_file=True,
        needs_step=True,
    ),
    Method(
        "ADAMSS",
        _layers("AdamssConfig", r=8, num_subspaces=3, subspace_rank=2, init_weights=None),
        derived=("num_subspaces", "scatter_index", "seg_result", "train_subspace_index"),
    ),
    Method(
        "BOFT",
        _layers("BOFTConfig", boft_block_size=4, init_weights=False),
        warns="Failed to load the CUDA extension|Setting boft_n_butterfly_factor to 1",
    ),
    Method(
        "ADAPTION_PROMPT",
        _prompt("AdaptionPromptConfig", adapter_len=4, adapter_layers=2),
        works=DECODER,
        reason="rewrites the attention of Llama, Mistral and GPT-2 only",
        mergeable=NOWHERE,
    ),
    Method("IA3", _layers("IA3Config", feedforward_modules=FEEDFORWARD, init_ia3_weights=False)),
    Method(
        "BEFT",
        _layers("BeftConfig", init_weights=False),
        mergeable=ENCODER,  # Llama's layers have no bias to merge into
        warns="the base layer has no bias term",
    ),
    Method(
        "LILY",
        _layers("LilyConfig", r=4, num_B=2, scaling=1.5, init_weights=False),
        mixes_batch=True,  # the router averages over all tokens of the batch, padding included
        mergeable=NOWHERE,
    ),
    Method("LOHA", _layers("LoHaConfig", r=4, alpha=6, init_weights=False)),
    Method("LOKR", _layers("LoKrConfig", r=4, alpha=6, init_weights=False)),
    Method("OFT", _layers("OFTConfig", oft_block_size=8, init_weights=False)),
    Method(
        "POLY",
        _layers("PolyConfig", r=4, n_tasks=2, n_skills=2, init_weights=False),
        works=NOWHERE,
        reason="needs task ids with every forward pass, which Flair has not",
        random_in_training=True,
        mergeable=NOWHERE,
    ),
    Method("LN_TUNING", _layers("LNTuningConfig", targets=NORMS), warns="Unsupported layer type"),
    Method("VERA", _layers("VeraConfig", r=4, d_initial=0.5, init_weights=False)),
    Method(
        "FROD",
        _layers("FrodConfig", sparse_rate=0.1, init_weights=False, progressbar=False),
        derived=("frod_U",),
        warns="Sparse invariant checks are implicitly disabled",
    ),
    Method("PVERA", _layers("PveraConfig", r=4, d_initial=0.5, init_weights=False), random_in_training=True),
    Method("FOURIERFT", _layers("FourierFTConfig", n_frequency=20, scaling=30.0), seeded=("indices",)),
    Method("GLORA", _layers("GloraConfig", r=4, init_weights=False)),
    Method(
        "XLORA",
        _prompt("XLoraConfig", hidden_size=32, adapters={"0": "first", "1": "second"}),
        works=NOWHERE,
        reason="mixes finished LoRA adapters that lie in other folders",
        mergeable=NOWHERE,
    ),
    Method("HRA", _layers("HRAConfig", r=4, init_weights=False)),
    Method("VBLORA", _layers("VBLoRAConfig", r=4, num_vectors=16, vector_length=8, init_vector_bank_bound=0.5)),
    Method(
        "UNILORA",
        _layers("UniLoraConfig", r=4, theta_d_length=64, init_weights=False),
        seeded=("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"),
    ),
    Method(
        "CPT",
        _prompt(
            "CPTConfig",
            task_type=TaskType.CAUSAL_LM,  # the config refuses any other
            cpt_token_ids=[5, 6, 7],
            cpt_mask=[1, 1, 1],
            cpt_tokens_type_mask=[1, 2, 3],
        ),
        works=NOWHERE,
        reason="for causal language models only",
        **_IN_FRONT,
    ),
    Method("MISS", _layers("MissConfig", r=4, init_weights=False)),
    Method("RANDLORA", _layers("RandLoraConfig", r=8, randlora_alpha=12, init_weights=False)),
    Method("ROAD", _layers("RoadConfig", variant="road_2", group_size=8, init_weights=False)),
    Method(
        "TRAINABLE_TOKENS",
        _layers("TrainableTokensConfig", targets=TOKENS, token_indices=TOKEN_INDICES, init_weights=False),
        derived=("trainable_tokens_original",),  # read when unmerging only
    ),
    Method("HIRA", _layers("HiraConfig", r=4, init_weights=False)),
    Method("SHIRA", _layers("ShiraConfig", r=2, random_seed=3, init_weights=False), seeded=("shira_indices",)),
    Method("C3A", _layers("C3AConfig", block_size=8, init_weights="gaussian")),
    Method(
        "WAVEFT",
        _layers("WaveFTConfig", n_frequency=20, scaling=10.0, init_weights=False),
        seeded=("waveft_indices",),
    ),
    Method(
        "OSF",
        _layers("OSFConfig", effective_rank=8, init_weights=False),
        derived=("_osf_S_low_init", "_osf_U_high", "_osf_U_low_init", "_osf_V_high", "_osf_V_low_init"),
    ),
    Method("DELORA", _layers("DeloraConfig", r=4, delora_lambda=7, init_weights=False)),
    Method("GRALORA", _layers("GraloraConfig", r=4, alpha=6, gralora_k=2, init_weights=False)),
    Method("CARTRIDGE", _prompt("CartridgeConfig", **_PROMPT, num_frozen_tokens=1), **_AS_CACHE),
    # init_weights=False leaves TinyLoRA's vectors as uninitialised memory.
    Method("TINYLORA", _layers("TinyLoraConfig", r=2, u=8, init_weights="uniform", init_v_bound=0.5)),
    Method(
        "PSOFT",
        _layers("PsoftConfig", r=4, psoft_alpha=6, init_weights=False),
        derived=("_psoft_A_cache", "_psoft_B_cache"),
    ),
    Method("PEANUT", _layers("PeanutConfig", r=4, depth=1, scaling=1.5, init_weights=False)),
    Method(
        "SHADOW",
        _prompt("ShadowConfig", r=4, shadow_alpha=0.3, shadow_dropout=0.0, init_weights=False),
        works=DECODER,
        reason="wraps decoder blocks only; between an encoder's blocks hidden states are no tensors",
        without_gradient=r"layers\.1\.shadow_update_",  # of the last block: there is no block after it to read them
        mergeable=NOWHERE,
    ),
    Method("SUPERTUNING", _layers("SupertuningConfig", sparsity=0.9, init_weights=False)),
    Method("DEFT", _layers("DeftConfig", r=4, alpha=6, init_weights=False)),
)
"""One entry for every ``peft.PeftType``, under its value."""

LORA_VARIANTS: dict[str, Method] = _by_name(
    Method("dora", _lora(use_dora=True)),
    Method("rslora", _lora(use_rslora=True)),
    Method(
        "bias_all",
        _lora(bias="all"),
        trains_base=True,
        without_gradient=r"\bpooler\.",
        warns="disabling adapter layers with bias",
    ),
    Method(
        "bias_lora_only",
        _lora(bias="lora_only"),
        trains_base=True,
        warns="disabling adapter layers with bias",
    ),
    Method("lora_bias", _lora(lora_bias=True), mergeable=ENCODER, warns="type Linear has no bias|have invalid shape"),
    Method("modules_to_save", _lora(modules_to_save=NORMS)),
    Method(
        "layers_to_transform",
        _lora(layers_to_transform=[1]),
        works=ENCODER,
        reason="PEFT looks for a name in front of 'layers.1', which a bare decoder has not",  # layers_pattern helps
    ),
    Method("exclude_modules", _lora(exclude_modules=ByKind(encoder=r".*layer\.0\..*", decoder=r".*layers\.0\..*"))),
    Method(
        "rank_pattern",
        _lora(
            rank_pattern=ByKind(encoder={"query": 2}, decoder={"q_proj": 2}),
            alpha_pattern=ByKind(encoder={"value": 20}, decoder={"v_proj": 20}),
        ),
    ),
    Method("all_linear", _lora(target_modules="all-linear"), without_gradient=r"\bpooler\."),
    Method("regular_expression", _lora(target_modules=ByKind(encoder=r".*\.(query|value)", decoder=r".*\.[qv]_proj"))),
    Method(
        "embedding",
        _lora(target_modules=ByKind(encoder=["word_embeddings", "query"], decoder=["embed_tokens", "q_proj"])),
        warns="Setting `save_embedding_layers` to `True`",
    ),
    Method(
        "trainable_tokens",
        _lora(trainable_token_indices=TOKEN_INDICES),
        derived=("trainable_tokens_original",),  # read when unmerging only
    ),
    Method(
        "target_parameters",
        _lora(target_modules=[], target_parameters=ByKind(encoder=["query.weight"], decoder=["q_proj.weight"])),
    ),
    Method("dropout", _lora(lora_dropout=0.3), random_in_training=True),
    Method("default_init", _lora(init_lora_weights=True)),
    Method("gaussian", _lora(init_lora_weights="gaussian")),
    Method("orthogonal", _lora(init_lora_weights="orthogonal")),
    Method("mica", _lora(init_lora_weights="mica")),
    Method("pissa", _lora(init_lora_weights="pissa"), rewrites_base=True),
    Method(
        "pissa_niter_4",
        _lora(init_lora_weights="pissa_niter_4"),
        rewrites_base=True,
        lossy_peft_file=True,  # its random SVD reads the global seed
    ),
    Method("olora", _lora(init_lora_weights="olora"), rewrites_base=True),
    Method(
        "corda",
        _lora(init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm")),
        rewrites_base=True,
        lossy_peft_file=True,  # its config cannot even be injected without the data of the first time
        before=_run_corda,
    ),
    Method(
        "lora_ga",
        _lora(init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig()),
        rewrites_base=True,
        lossy_peft_file=True,  # without gradients it silently starts as plain LoRA, on the unchanged base
        before=_run_lora_ga,
    ),
    Method(
        "eva",
        _lora(init_lora_weights="eva", eva_config=peft.EvaConfig(rho=2.0)),
        derived=("r", "scaling"),  # the data decides the ranks; afterwards the config holds them
        lossy_peft_file=True,  # on a half-precision base: what PEFT loads has single precision again
        warns="lora with eva initialization used with low_cpu_mem_usage=False",
        after=_run_eva,
    ),
    Method(
        "loftq",
        _lora(init_lora_weights="loftq", loftq_config=peft.LoftQConfig(loftq_bits=4)),
        works=NOWHERE,
        reason=_NO_BITSANDBYTES,
        rewrites_base=True,
    ),
    Method("kasa", _lora(kasa_config=KasaConfig()), rewrites_base=True),
    Method("velora", _lora(velora_config=VeloraConfig(num_groups=4))),
    Method("monteclora", _lora(monteclora_config=MontecloraConfig(num_samples=4)), random_in_training=True),
    Method(
        "bdlora",
        _lora(
            use_bdlora=BdLoraConfig(
                target_modules_bd_a=["query", "q_proj", "down_proj"],
                target_modules_bd_b=["value", "v_proj", "intermediate.dense"],
                nblocks=2,
            )
        ),
    ),
    Method(
        "layer_replication",
        _lora(layer_replication=[(0, 2), (0, 2)]),
        rewrites_base=True,  # not its weights, but how many layers share them
        mergeable=NOWHERE,  # PEFT merges every copy of a layer into the one weight that they share
    ),
    Method(
        "alora",
        _lora(alora_invocation_tokens=[7]),
        works=NOWHERE,
        reason="for causal language models only; elsewhere PEFT silently leaves it out of every forward pass",
        mergeable=NOWHERE,
        warns="aLoRA is currently only supported for CAUSAL_LM",
    ),
    Method(
        "qalora",
        _lora(use_qalora=True, qalora_group_size=8),
        works=NOWHERE,
        reason="for GPTQ layers only; elsewhere PEFT silently trains plain LoRA",
    ),
)
"""LoRA's options and ways to initialise it, one at a time."""

OTHER_VARIANTS: dict[str, Method] = _by_name(
    Method(
        "prefix_projection",
        _prompt("PrefixTuningConfig", **_PROMPT, prefix_projection=True, encoder_hidden_size=16),
        lossy_peft_file=True,  # it holds the finished prefix, which only inference_mode=True can load
        **_AS_CACHE,
    ),
    Method(
        "p_tuning_lstm",
        _prompt("PromptEncoderConfig", **_PROMPT, encoder_hidden_size=16, encoder_reparameterization_type="LSTM"),
        lossy_peft_file=True,
        **_IN_FRONT,
    ),
    Method(
        "vera_without_projection",
        _layers("VeraConfig", r=4, d_initial=0.5, init_weights=False, save_projection=False),
        seeded=("vera_A", "vera_B"),
        warns="to not (save|load) vera_A and vera_B",
    ),
    Method(
        "supertuning_without_indices",
        _layers("SupertuningConfig", sparsity=0.9, init_weights=False, save_precomputed_indices=False),
        derived=("supertuning_indices",),
        warns="sparse-support indices will be recomputed",
    ),
    Method(
        "pvera_sampling",
        _layers("PveraConfig", r=4, d_initial=0.5, init_weights=False, sample_at_inference=True),
        works=NOWHERE,
        reason="draws a new sample for every prediction",
        random_in_training=True,
    ),
    Method(
        "vblora_top_k",
        _layers(
            "VBLoRAConfig",
            r=4,
            num_vectors=16,
            vector_length=8,
            init_vector_bank_bound=0.5,
            save_only_topk_weights=True,
        ),
        lossy_peft_file=True,  # by rounding; and what is loaded can no longer be trained
    ),
    Method(
        "adamss_asa",
        _layers(
            "AdamssConfig",
            r=8,
            num_subspaces=3,
            subspace_rank=2,
            init_weights=None,
            use_asa=True,
            asa_target_subspaces=4,
            init_warmup=1,
            final_warmup=10,
            mask_interval=2,
        ),
        derived=METHODS["ADAMSS"].derived,
        needs_step=True,
    ),
    Method("fourierft_zeros", _layers("FourierFTConfig", n_frequency=20, scaling=30.0, init_weights=True)),
    Method("supra", _layers("SupertuningConfig", sparsity=0.9, r=4, lora_alpha=12, init_weights=False)),
    Method(
        "psoft_low_rank",
        _layers("PsoftConfig", r=4, psoft_alpha=6, init_weights=False, psoft_svd="lowrank"),
        derived=METHODS["PSOFT"].derived,
    ),
)
"""Options of the other methods that change what has to be stored."""

MATRIX: dict[str, Method] = {
    **{name: METHODS[name] for name in ("LORA", "ADALORA", "IA3", "LOHA", "LOKR", "OFT", "BOFT", "VERA", "VBLORA")},
    **{name: METHODS[name] for name in ("FOURIERFT", "HRA", "LN_TUNING", "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")},
    **{name: LORA_VARIANTS[name] for name in ("dora", "rslora", "bias_all", "modules_to_save", "trainable_tokens")},
    "pissa": LORA_VARIANTS["pissa"],
    "prefix_projection": OTHER_VARIANTS["prefix_projection"],
}
"""The 22 configurations of the published matrix, all of which work on BERT."""
