"""Every PEFT method as a small configuration: what a test parametrises over."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import peft
from peft import PeftConfig, TaskType
from torch import nn

BOTH = frozenset({"encoder", "decoder"})
ENCODER = frozenset({"encoder"})
DECODER = frozenset({"decoder"})
NOWHERE: frozenset[str] = frozenset()

LINEAR = {"encoder": ["query", "value", "intermediate.dense"], "decoder": ["q_proj", "v_proj", "down_proj"]}
SQUARE = {"encoder": ["query", "value"], "decoder": ["q_proj", "o_proj"]}
NORMS = {"encoder": ["LayerNorm"], "decoder": ["input_layernorm", "post_attention_layernorm", "norm"]}
EMBEDDING = {"encoder": ["word_embeddings"], "decoder": ["embed_tokens"]}
FEEDFORWARD = {"encoder": ["intermediate.dense"], "decoder": ["down_proj"]}
BLOCKS = {"encoder": r".*encoder\.layer\.\d+", "decoder": r".*layers\.\d+"}


@dataclass(frozen=True)
class Method:
    name: str
    config: Callable[[str], PeftConfig]
    works: frozenset[str] = BOTH
    reason: str = ""
    rewrites_base: bool = False


def _of(class_name: str, targets: Mapping[str, Any] | None = LINEAR, **options: Any) -> Callable[[str], PeftConfig]:
    def make(kind: str) -> PeftConfig:
        values = {name: value[kind] if isinstance(value, ByKind) else value for name, value in options.items()}
        if targets is not None:
            values["target_modules"] = targets[kind]
        return getattr(peft, class_name)(task_type=TaskType.FEATURE_EXTRACTION, **values)

    return make


class ByKind(dict):
    """A value that depends on the kind."""


_ALL = (
    Method("PROMPT_TUNING", _of("PromptTuningConfig", None, num_virtual_tokens=3)),
    Method(
        "MULTITASK_PROMPT_TUNING",
        _of("MultitaskPromptTuningConfig", None, num_virtual_tokens=3, num_tasks=2, num_ranks=2),
    ),
    Method("P_TUNING", _of("PromptEncoderConfig", None, num_virtual_tokens=3, encoder_hidden_size=16)),
    Method("PREFIX_TUNING", _of("PrefixTuningConfig", None, num_virtual_tokens=3)),
    Method("LORA", _of("LoraConfig", r=4, lora_alpha=12, init_lora_weights=False)),
    Method(
        "ADALORA",
        _of(
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
    ),
    Method("ADAMSS", _of("AdamssConfig", r=8, num_subspaces=3, subspace_rank=2)),
    Method("BOFT", _of("BOFTConfig", boft_block_size=4, init_weights=False)),
    Method("ADAPTION_PROMPT", _of("AdaptionPromptConfig", None, adapter_len=4, adapter_layers=2)),
    Method("IA3", _of("IA3Config", feedforward_modules=ByKind(FEEDFORWARD), init_ia3_weights=False)),
    Method("BEFT", _of("BeftConfig", init_weights=False)),
    Method("LILY", _of("LilyConfig", r=4, num_B=2, scaling=1.5, init_weights=False)),
    Method("LOHA", _of("LoHaConfig", r=4, alpha=6, init_weights=False)),
    Method("LOKR", _of("LoKrConfig", r=4, alpha=6, init_weights=False)),
    Method("OFT", _of("OFTConfig", oft_block_size=8, init_weights=False)),
    Method("POLY", _of("PolyConfig", r=4, n_tasks=2, n_skills=2, init_weights=False)),
    Method("LN_TUNING", _of("LNTuningConfig", NORMS)),
    Method("VERA", _of("VeraConfig", r=4, d_initial=0.5, init_weights=False)),
    Method("FROD", _of("FrodConfig", sparse_rate=0.1, init_weights=False, progressbar=False)),
    Method("PVERA", _of("PveraConfig", r=4, d_initial=0.5, init_weights=False)),
    Method("FOURIERFT", _of("FourierFTConfig", n_frequency=20, scaling=30.0)),
    Method("GLORA", _of("GloraConfig", r=4, init_weights=False)),
    Method("XLORA", _of("XLoraConfig", None, hidden_size=32, adapters={"a": "missing"})),
    Method("HRA", _of("HRAConfig", r=4, init_weights=False)),
    Method("VBLORA", _of("VBLoRAConfig", r=4, num_vectors=16, vector_length=8, topk=2)),
    Method("UNILORA", _of("UniLoraConfig", r=4, theta_d_length=64, init_weights=False)),
    Method("CPT", _of("CPTConfig", None, cpt_token_ids=[1, 2, 3], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[1, 2, 3])),
    Method("MISS", _of("MissConfig", r=4, init_weights=False)),
    Method("RANDLORA", _of("RandLoraConfig", r=8, randlora_alpha=12, init_weights=False)),
    Method("ROAD", _of("RoadConfig", variant="road_2", group_size=8, init_weights=False)),
    Method("TRAINABLE_TOKENS", _of("TrainableTokensConfig", EMBEDDING, token_indices=[5, 7, 9], init_weights=False)),
    Method("HIRA", _of("HiraConfig", r=4, init_weights=False)),
    Method("SHIRA", _of("ShiraConfig", r=2, random_seed=3, init_weights=False)),
    Method("C3A", _of("C3AConfig", block_size=8, init_weights="gaussian")),
    Method("WAVEFT", _of("WaveFTConfig", n_frequency=20, scaling=10.0, init_weights=False)),
    Method("OSF", _of("OSFConfig", effective_rank=8, init_weights=True)),
    Method("DELORA", _of("DeloraConfig", r=4, delora_lambda=7, init_weights=False)),
    Method("GRALORA", _of("GraloraConfig", r=4, alpha=6, gralora_k=2, init_weights=False)),
    Method("CARTRIDGE", _of("CartridgeConfig", None, num_virtual_tokens=4, num_frozen_tokens=1)),
    Method("TINYLORA", _of("TinyLoraConfig", r=2, u=8, init_weights="uniform", init_v_bound=0.5)),
    Method("PSOFT", _of("PsoftConfig", r=4, psoft_alpha=6, init_weights=False)),
    Method("PEANUT", _of("PeanutConfig", r=4, depth=1, scaling=1.5, init_weights=False)),
    Method("SHADOW", _of("ShadowConfig", None, r=4, shadow_alpha=0.3, init_weights=False, shadow_dropout=0.0)),
    Method("SUPERTUNING", _of("SupertuningConfig", sparsity=0.9)),
    Method("DEFT", _of("DeftConfig", r=4, alpha=6, init_weights=False)),
)
METHODS = {m.name: m for m in _ALL}
LORA_VARIANTS: dict = {}
