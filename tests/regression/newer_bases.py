"""Bases as a newer transformers writes them: which, and with which settings.

Every setting that an older version might pass over is far from its default, so that passing over it shows.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 48
LENGTH = 24

_SIZE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ENCODER = {**_SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 40, "pad_token_id": 0}
_DECODER = {**_SIZE, **_TOKENS, "max_position_embeddings": 64, "num_key_value_heads": 1}
_WIDE = {**_DECODER, "head_dim": 8}
_MODERN = {
    **_SIZE,
    **_TOKENS,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "local_attention": 8,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
_GEMMA3 = {
    **_WIDE,
    "sliding_window": 8,
    "query_pre_attn_scalar": 8,
    "layer_types": ["full_attention", "sliding_attention"],
}

Settings = dict[str, Any]


def rope(theta: float = 30.0, kind: str = "default", **more: Any) -> Settings:
    """Return ``rope_parameters``."""
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def by_layer(full: Settings, sliding: Settings) -> Settings:
    """Return ``rope_parameters`` for each kind of layer."""
    parts = {"full_attention": full, "sliding_attention": sliding}
    return {"rope_parameters": {name: part["rope_parameters"] for name, part in parts.items()}}


_LLAMA3 = rope(
    5000.0, "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_YARN = rope(5000.0, "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=1.0)
_LONG = {"short_factor": [1.0, 1.5, 2.0, 2.5], "long_factor": [2.0, 3.0, 5.0, 7.0]}
_LINEAR = rope(30.0, "linear", factor=3.0)

BASES: dict[str, tuple[str, Settings]] = {
    # what the support table names
    "bert": ("Bert", _ENCODER),
    "roberta": ("Roberta", {**_ENCODER, "type_vocab_size": 1}),
    "xlm-roberta": ("XLMRoberta", {**_ENCODER, "type_vocab_size": 1}),
    "deberta-v2": (
        "DebertaV2",
        {
            **_ENCODER,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "electra": ("Electra", {**_ENCODER, "embedding_size": 8}),
    "distilbert": (
        "DistilBert",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 16, "pad_token_id": 0}
        | {"max_position_embeddings": 40},
    ),
    "albert": ("Albert", {**_ENCODER, "embedding_size": 8}),
    "modernbert": ("ModernBert", {**_MODERN, **by_layer(rope(700.0), rope(20.0))}),
    "modernbert-alternating": (
        "ModernBert",
        {**_MODERN, "layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    ),
    "modernbert-all-full": (
        "ModernBert",
        {**_MODERN, "layer_types": ["full_attention"] * 3, **by_layer(rope(700.0), rope(20.0))},
    ),
    "modernbert-sliding-first": (
        "ModernBert",
        {**_MODERN, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "modernbert-yarn": ("ModernBert", {**_MODERN, **by_layer(_YARN, rope(20.0))}),
    "modernbert-decoder": ("ModernBertDecoder", {**_MODERN, **by_layer(rope(700.0), rope(700.0))}),
    "modernbert-decoder-two-thetas": ("ModernBertDecoder", {**_MODERN, **by_layer(rope(700.0), rope(20.0))}),
    "xlnet": (
        "XLNet",
        {"vocab_size": VOCABULARY, "d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 16, "pad_token_id": 0},
    ),
    "t5": (
        "T5Encoder",
        {"vocab_size": VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        | {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 12, "pad_token_id": 0}
        | {"feed_forward_proj": "gated-gelu", "decoder_start_token_id": 0},
    ),
    "layoutlm": ("LayoutLM", {**_ENCODER, "max_2d_position_embeddings": 32}),
    "layoutlmv3": (
        "LayoutLMv3",
        {**_ENCODER, "coordinate_size": 3, "shape_size": 2, "rel_pos_bins": 4, "rel_2d_pos_bins": 4}
        | {"input_size": 16, "patch_size": 16, "type_vocab_size": 1, "max_2d_position_embeddings": 32},
    ),
    "gpt2": (
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 16,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 16,
            "n_positions": 40,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "llama": ("Llama", {**_DECODER, **rope()}),
    "llama-linear": ("Llama", {**_DECODER, **_LINEAR}),
    "llama-dynamic": ("Llama", {**_DECODER, "max_position_embeddings": 12, **rope(30.0, "dynamic", factor=2.0)}),
    "llama-yarn": ("Llama", {**_DECODER, **_YARN}),
    "llama-llama3": ("Llama", {**_DECODER, **_LLAMA3}),
    "llama-longrope": (
        "Llama",
        {**_DECODER, **rope(500.0, "longrope", factor=3.0, original_max_position_embeddings=16, **_LONG)},
    ),
    "llama-proportional": ("Llama", {**_DECODER, **rope(500.0, "proportional", partial_rotary_factor=0.5)}),
    "llama-partial": ("Llama", {**_DECODER, **rope(30.0, partial_rotary_factor=0.5)}),
    "llama-both-ways": ("Llama", {**_DECODER, **rope(), "is_causal": False}),
    "qwen2": ("Qwen2", {**_DECODER, **rope()}),
    "qwen2-windows": (
        "Qwen2",
        {**_DECODER, **rope(), "use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "qwen3": ("Qwen3", {**_WIDE, **rope()}),
    "qwen3-yarn": ("Qwen3", {**_WIDE, **_YARN}),
    "mistral": ("Mistral", {**_WIDE, **rope(), "sliding_window": 6}),
    "mistral-yarn": ("Mistral", {**_WIDE, **_YARN, "sliding_window": 6}),
    "gemma": ("Gemma", {**_WIDE, **rope()}),
    "gemma-exact-gelu": ("Gemma", {**_WIDE, **rope(), "hidden_act": "relu"}),
    "gemma-both-ways": ("Gemma", {**_WIDE, **rope(), "use_bidirectional_attention": True}),
    # bases with a head, from which embeddings take the transformer
    "bert-mlm": ("BertForMaskedLM", _ENCODER),
    "modernbert-mlm": ("ModernBertForMaskedLM", {**_MODERN, **by_layer(rope(700.0), rope(20.0))}),
    "llama-lm": ("LlamaForCausalLM", {**_DECODER, **rope()}),
    "gemma3-lm": ("Gemma3ForCausalLM", {**_GEMMA3, **by_layer(rope(), rope(700.0))}),
    # what people use beside it
    "mpnet": ("MPNet", _ENCODER),
    "eurobert": ("EuroBert", {**_DECODER, **rope()}),
    "nomic-bert": ("NomicBert", {**_ENCODER, **rope()}),
    "gemma2": ("Gemma2", {**_WIDE, **rope(), "sliding_window": 6, "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**_GEMMA3, **by_layer(_LINEAR, rope(700.0))}),
    "gemma3-scaled-windows": ("Gemma3Text", {**_GEMMA3, **by_layer(rope(), _LINEAR)}),
    "embedding-gemma": (
        "Gemma3Text",
        {**_GEMMA3, **by_layer(rope(), rope(700.0)), "use_bidirectional_attention": True},
    ),
    "smollm3": (
        "SmolLM3",
        {**_DECODER, **rope(), "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo2": ("Olmo2", {**_DECODER, **rope()}),
    "olmo3": (
        "Olmo3",
        {**_DECODER, **by_layer(_YARN, rope(5000.0)), "sliding_window": 6}
        | {"layer_types": ["sliding_attention", "full_attention"]},
    ),
    "olmo3-two-thetas": (
        "Olmo3",
        {**_DECODER, **by_layer(rope(30.0), rope(5000.0)), "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "phi": ("Phi", {**_DECODER, **rope(30.0, partial_rotary_factor=0.25)}),
    "phi3": ("Phi3", {**_DECODER, **rope(30.0, partial_rotary_factor=0.5), "sliding_window": 6}),
    "phi3-longrope": (
        "Phi3",
        {**_DECODER, **rope(500.0, "longrope", original_max_position_embeddings=16, **_LONG)}
        | {"original_max_position_embeddings": 16, "sliding_window": None},
    ),
    "granite": (
        "Granite",
        {**_DECODER, **rope(), "attention_multiplier": 0.3, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    ),
    "gpt-neox": (
        "GPTNeoX",
        {**_SIZE, "vocab_size": VOCABULARY, "max_position_embeddings": 64, **rope(30.0, partial_rotary_factor=0.5)},
    ),
    "stablelm": ("StableLm", {**_DECODER, **rope(30.0, partial_rotary_factor=0.5)}),
    "cohere2": (
        "Cohere2",
        {**_DECODER, **rope(), "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "glm": ("Glm", {**_WIDE, **rope(30.0, partial_rotary_factor=0.5)}),
    "starcoder2": ("Starcoder2", {**_DECODER, **rope(), "sliding_window": 6}),
    "falcon": (
        "Falcon",
        {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            **_TOKENS,
            "max_position_embeddings": 64,
            **rope(),
            "multi_query": True,
        },
    ),
    "nemotron": ("Nemotron", {**_WIDE, **rope(30.0, partial_rotary_factor=0.5)}),
    "helium": ("Helium", {**_WIDE, **rope()}),
    "qwen3-moe": (
        "Qwen3Moe",
        {**_WIDE, **rope(), "num_local_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
        | {"decoder_sparse_step": 1},
    ),
    "mixtral": ("Mixtral", {**_DECODER, **rope(), "num_local_experts": 3, "num_experts_per_tok": 2}),
    "gpt-oss": (
        "GptOss",
        {**_WIDE, **_YARN, "num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    "bitnet": ("BitNet", {**_DECODER, **rope()}),
    "lfm2": (
        "Lfm2",
        {**_DECODER, **rope(), "layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "t5gemma": (
        "T5Gemma",
        {side: {**_GEMMA3, **rope(), "vocab_size": VOCABULARY} for side in ("encoder", "decoder")}
        | {"vocab_size": VOCABULARY},
    ),
    "xlm": (
        "XLM",
        {
            "vocab_size": VOCABULARY,
            "emb_dim": 16,
            "n_layers": 2,
            "n_heads": 2,
            "max_position_embeddings": 40,
            "pad_token_id": 5,
        },
    ),
    "bart": (
        "Bart",
        {**_TOKENS, "d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "max_position_embeddings": 40}
        | {f"{side}_attention_heads": 2 for side in ("encoder", "decoder")}
        | {f"{side}_ffn_dim": 16 for side in ("encoder", "decoder")},
    ),
}
