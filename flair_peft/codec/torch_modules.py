"""The plain modules of torch that files can hold: layers, activations and containers."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn

from flair_peft.codec import setting_checks
from flair_peft.codec.objects import Fields, Kind, area, dtype_of, plain_kind


def _bias_and_dtype(layer: nn.Linear | nn.LayerNorm) -> Fields:
    return {"bias": layer.bias is not None, "dtype": dtype_of(layer)}


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
        derive=_bias_and_dtype,
        build=nn.Linear,
        size=lambda fields: area(fields["in_features"] + fields["bias"], fields["out_features"]),
    ),
    Kind(
        name="layer_norm",
        cls=nn.LayerNorm,
        fields={
            "normalized_shape": setting_checks.is_sizes,
            "eps": setting_checks.is_number,
            "elementwise_affine": setting_checks.is_flag,
            "bias": setting_checks.is_flag,
            "dtype": setting_checks.is_dtype,
        },
        derive=_bias_and_dtype,
        build=nn.LayerNorm,
        size=lambda fields: area((1 + fields["bias"]) * fields["elementwise_affine"], *fields["normalized_shape"]),
    ),
    Kind(
        name="embedding",
        cls=nn.Embedding,
        fields={
            "num_embeddings": setting_checks.is_size,
            "embedding_dim": setting_checks.is_size,
            "padding_idx": setting_checks.optional(setting_checks.is_size),
            "max_norm": setting_checks.optional(setting_checks.is_number),
            "norm_type": setting_checks.is_number,
            "scale_grad_by_freq": setting_checks.is_flag,
            "sparse": setting_checks.is_flag,
            "dtype": setting_checks.is_dtype,
        },
        derive=lambda layer: {"dtype": layer.weight.dtype},
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
        # named_children() leaves out a layer that stands there a second time, as activations do.
        derive=lambda module: {"modules": dict(module._modules)},
        build=lambda modules: nn.Sequential(OrderedDict(modules)),
        holds_modules=True,
    ),
    Kind(
        name="module_list",
        cls=nn.ModuleList,
        fields={"modules": setting_checks.is_modules},
        derive=lambda module: {"modules": list(module)},
        build=nn.ModuleList,
        holds_modules=True,
    ),
)
