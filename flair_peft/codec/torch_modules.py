"""The plain modules of torch that files can hold: layers, activations and containers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from flair_peft.codec import setting_checks
from flair_peft.codec.objects import Fields, Kind, area, dtype_of, plain_kind, read_attributes
from flair_peft.codec.setting_checks import Check


def _read_linear(layer: nn.Linear) -> Fields:
    sizes = read_attributes(layer, names=("in_features", "out_features"))
    return {**sizes, "bias": layer.bias is not None, "dtype": layer.weight.dtype}


_LAYER_NORM: dict[str, Check] = {
    "normalized_shape": setting_checks.is_sizes,
    "eps": setting_checks.is_number,
    "elementwise_affine": setting_checks.is_flag,
}


def _read_layer_norm(layer: nn.LayerNorm) -> Fields:
    settings = read_attributes(layer, names=tuple(_LAYER_NORM))
    return {**settings, "bias": layer.bias is not None, "dtype": dtype_of(layer)}


_EMBEDDING: dict[str, Check] = {
    "num_embeddings": setting_checks.is_size,
    "embedding_dim": setting_checks.is_size,
    "padding_idx": setting_checks.optional(setting_checks.is_size),
    "max_norm": setting_checks.optional(setting_checks.is_number),
    "norm_type": setting_checks.is_number,
    "scale_grad_by_freq": setting_checks.is_flag,
    "sparse": setting_checks.is_flag,
}


def _read_embedding(layer: nn.Embedding) -> Fields:
    return {**read_attributes(layer, names=tuple(_EMBEDDING)), "dtype": layer.weight.dtype}


def _read_sequential(module: nn.Sequential) -> Fields:
    # named_children() leaves out a layer that stands there a second time, as activations do.
    return {"modules": dict(module._modules)}


def _build_sequential(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


KINDS: tuple[Kind, ...] = (
    Kind(
        name="linear",
        cls=nn.Linear,
        fields={
            "in_features": setting_checks.is_size,
            "out_features": setting_checks.is_size,
            "bias": setting_checks.is_flag,
            "dtype": setting_checks.is_dtype,
        },
        read=_read_linear,
        build=nn.Linear,
        size=lambda fields: area(fields["in_features"] + fields["bias"], fields["out_features"]),
    ),
    Kind(
        name="layer_norm",
        cls=nn.LayerNorm,
        fields={**_LAYER_NORM, "bias": setting_checks.is_flag, "dtype": setting_checks.is_dtype},
        read=_read_layer_norm,
        build=nn.LayerNorm,
        size=lambda fields: area((1 + fields["bias"]) * fields["elementwise_affine"], *fields["normalized_shape"]),
    ),
    Kind(
        name="embedding",
        cls=nn.Embedding,
        fields={**_EMBEDDING, "dtype": setting_checks.is_dtype},
        read=_read_embedding,
        build=nn.Embedding,
        size=lambda fields: area(fields["num_embeddings"], fields["embedding_dim"]),
    ),
    plain_kind("identity", nn.Identity),
    plain_kind("dropout", nn.Dropout, p=setting_checks.is_number, inplace=setting_checks.is_flag),
    plain_kind("relu", nn.ReLU, inplace=setting_checks.is_flag),
    plain_kind("gelu", nn.GELU, approximate=setting_checks.is_text),
    plain_kind("silu", nn.SiLU, inplace=setting_checks.is_flag),
    plain_kind("leaky_relu", nn.LeakyReLU, negative_slope=setting_checks.is_number, inplace=setting_checks.is_flag),
    plain_kind("tanh", nn.Tanh),
    plain_kind("sigmoid", nn.Sigmoid),
    Kind(
        name="sequential",
        cls=nn.Sequential,
        fields={"modules": setting_checks.is_named_modules},
        read=_read_sequential,
        build=_build_sequential,
        holds_modules=True,
    ),
    Kind(
        name="module_list",
        cls=nn.ModuleList,
        fields={"modules": setting_checks.is_modules},
        read=lambda module: {"modules": list(module)},
        build=nn.ModuleList,
        holds_modules=True,
    ),
)
