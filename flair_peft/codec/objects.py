"""Flair's own objects and torch's plain modules ⇄ named settings: what a model's state holds beside plain values.

``KINDS`` is the whole list of classes that can come out of a file. Weights are not among the settings: Flair keeps them
in the state dict of the model around, which fills the modules that are built here.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod
from numbers import Integral, Real
from typing import Any

import torch
from flair.data import Dictionary, Sentence
from flair.embeddings.base import Embeddings, load_embeddings
from flair.models.entity_linker_model import CandidateGenerator
from flair.models.prefixed_tagger import EntityTypeTaskPromptAugmentationStrategy
from flair.models.relation_classifier_model import (
    EntityMarker,
    EntityMarkerPunct,
    EntityMask,
    TypedEntityMarker,
    TypedEntityMarkerPunct,
    TypedEntityMask,
)
from flair.nn import DeepNCMDecoder, LabelVerbalizerDecoder, PrototypicalDecoder
from torch import nn

from flair_peft.adapter import injection
from flair_peft.errors import ModelFileError, UnsupportedStateError, name_some

Fields = dict[str, Any]
Check = Callable[[Any], bool]

# Caches that Flair and torch fill when they are needed.
_DERIVED_ATTRIBUTES = frozenset({"item2idx_not_encoded", "_compiled_call_impl"})


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A class of objects that files can hold.

    Attributes:
        name: stands for the class in files.
        cls: the class itself; a subclass is another class, with settings and code of its own.
        fields: setting → whether a value can be one.
        read: object → its settings, which may themselves be objects; they are shared with it.
        build: settings as keyword arguments → a new object.
        size: settings → how many elements the weights have that ``build`` allocates.
        mold: as ``build``, but what it returns is only compared with the original; where building is costly.
        holds_modules: the modules inside are settings, and are stored as objects of their own.
    """

    name: str
    cls: type
    fields: Mapping[str, Check]
    read: Callable[[Any], Fields]
    build: Callable[..., Any]
    size: Callable[[Fields], int] = lambda _: 0
    mold: Callable[..., Any] | None = None
    holds_modules: bool = False

    @property
    def is_module(self) -> bool:
        """Whether objects of this kind are torch modules."""
        return issubclass(self.cls, nn.Module)


def read_fields(kind: Kind, value: Any, where: str) -> Fields:
    """Return the settings from which :func:`build_object` makes an object like ``value``.

    Args:
        kind: of the class of ``value``.
        value: is not modified; the settings share its parts.
        where: names the object in errors.

    Raises:
        UnsupportedStateError: the object has more to it than its class gives it: attributes, hooks, other parts.
    """
    fields = kind.read(value)
    odd = {name for name, check in kind.fields.items() if not check(fields[name])}
    if not odd:
        with injection.building_anew():  # saving must not change what is drawn next in training
            odd = _differences(kind, value, (kind.mold or kind.build)(**fields))
    if odd:
        raise UnsupportedStateError(
            f"Cannot store '{where}', a {kind.cls.__name__}: it differs from what its class gives it in "
            f"{name_some(odd)}. Files hold settings, not objects, so that no code runs from them, and this would be "
            f"lost. Use a {kind.cls.__name__} as its constructor makes it."
        )
    return {**fields, **_read_modes(kind, value)} if kind.is_module else fields


def build_object(kind: Kind, fields: Fields, *, room: int) -> tuple[Any, int]:
    """Return a new object and how many elements its weights have; a state dict must fill these.

    Args:
        kind: of the object.
        fields: its settings, as :func:`read_fields` gave them; they become part of the object.
        room: how many elements the weights may have: those of a file fit into the file.

    Raises:
        ModelFileError: the settings are not those of the class, or would take more memory than ``room``.
    """
    checks = {**kind.fields, **dict.fromkeys(_MODES if kind.is_module else (), _is_names)}
    odd = checks.keys() ^ fields.keys() or {name for name, check in checks.items() if not check(fields[name])}
    if odd:
        raise ModelFileError(
            f"Cannot build a {kind.cls.__name__}: its settings {name_some(odd)} are missing, unknown or of the wrong "
            "type. The file is damaged, or was not written by flair_peft. Copy or save it again."
        )
    settings = {name: fields[name] for name in kind.fields}
    size = kind.size(settings)
    if size > room:
        raise ModelFileError(
            f"Cannot build a {kind.cls.__name__} with {size} weights: the file holds {room} more bytes at most. It is "
            "damaged, or was not written by flair_peft. Copy or save it again."
        )
    with injection.building_anew():
        built = kind.build(**settings)
    if kind.is_module:
        _set_modes_(kind, built, **{name: fields[name] for name in _MODES})
    return built, size


def own_parameters(kind: Kind, module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a module that belong to none of the modules among its settings."""
    for prefix, part in _own_modules(kind, module):
        for name, parameter in part.named_parameters(recurse=False):
            yield f"{prefix}.{name}".lstrip("."), parameter


# The state in which a module is, beside its settings: names of its own parts.
_MODES = ("training", "frozen")


def _read_modes(kind: Kind, module: nn.Module) -> Fields:
    return {
        "training": [name for name, part in _own_modules(kind, module) if part.training],
        "frozen": [name for name, parameter in own_parameters(kind, module) if not parameter.requires_grad],
    }


def _set_modes_(kind: Kind, module: nn.Module, *, training: list[str], frozen: list[str]) -> None:
    for name, part in _own_modules(kind, module):
        part.training = name in training
    for name, parameter in own_parameters(kind, module):
        parameter.requires_grad_(name not in frozen)


def _own_modules(kind: Kind, module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [("", module)] if kind.holds_modules else list(module.named_modules())


def _differences(kind: Kind, value: Any, rebuilt: Any) -> set[str]:
    """Return what only one of two objects consists of; objects that differ in values only have none."""
    if not kind.is_module:
        # Objects that older versions of Flair stored may lack what their class has now.
        return vars(value).keys() - vars(rebuilt).keys() - _DERIVED_ATTRIBUTES
    first, second = (
        {f"{prefix}.{trait}".lstrip(".") for prefix, part in _own_modules(kind, module) for trait in _traits(part)}
        for module in (value, rebuilt)
    )
    return first ^ second


def _traits(module: nn.Module) -> Iterator[str]:
    yield type(module).__qualname__
    for name, value in vars(module).items():
        if name not in _DERIVED_ATTRIBUTES:
            yield f"{name} in use" if "hooks" in name and value else name
    for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
        yield f"{name} of {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _is_size(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and all(map(_is_size, value))


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_words(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value)


def _is_modules(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(module, nn.Module) for module in value)


def _is_named_modules(value: Any) -> bool:
    return type(value) is dict and _is_names(list(value)) and _is_modules(list(value.values()))


def _is_index(value: Any) -> bool:
    return type(value) is dict and all(isinstance(k, str) and _is_size(v) for k, v in value.items())


def _is_a(cls: type, value: Any) -> bool:
    return isinstance(value, cls)


def _is_exactly(cls: type, value: Any) -> bool:
    return type(value) is cls


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


_is_flag, _is_text = partial(_is_a, bool), partial(_is_a, str)
_is_dtype, _is_dictionary = partial(_is_a, torch.dtype), partial(_is_exactly, Dictionary)


def _read_attributes(value: Any, *, names: tuple[str, ...]) -> Fields:
    return {name: getattr(value, name) for name in names}


def _plain(name: str, cls: type, **fields: Check) -> Kind:
    """Return the kind of a class whose constructor takes what its attributes hold."""
    return Kind(name=name, cls=cls, fields=fields, read=partial(_read_attributes, names=tuple(fields)), build=cls)


def _area(*sizes: Any) -> int:
    # Sizes can be numpy's, which overflow.
    return prod(int(size) for size in sizes)


def _dtype_of(module: nn.Module) -> torch.dtype:
    return next((parameter.dtype for parameter in module.parameters()), torch.float32)


def _read_linear(layer: nn.Linear) -> Fields:
    sizes = _read_attributes(layer, names=("in_features", "out_features"))
    return {**sizes, "bias": layer.bias is not None, "dtype": layer.weight.dtype}


_LAYER_NORM: dict[str, Check] = {"normalized_shape": _is_sizes, "eps": _is_number, "elementwise_affine": _is_flag}


def _read_layer_norm(layer: nn.LayerNorm) -> Fields:
    settings = _read_attributes(layer, names=tuple(_LAYER_NORM))
    return {**settings, "bias": layer.bias is not None, "dtype": _dtype_of(layer)}


_EMBEDDING: dict[str, Check] = {
    "num_embeddings": _is_size,
    "embedding_dim": _is_size,
    "padding_idx": _optional(_is_size),
    "max_norm": _optional(_is_number),
    "norm_type": _is_number,
    "scale_grad_by_freq": _is_flag,
    "sparse": _is_flag,
}


def _read_embedding(layer: nn.Embedding) -> Fields:
    return {**_read_attributes(layer, names=tuple(_EMBEDDING)), "dtype": layer.weight.dtype}


def _read_sequential(module: nn.Sequential) -> Fields:
    # named_children() leaves out a layer that stands there a second time, as activations do.
    return {"modules": dict(module._modules)}


def _build_sequential(modules: dict[str, nn.Module]) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _read_dictionary(dictionary: Dictionary) -> Fields:
    # Flair's own files of older versions lack the two flags.
    flags = {name: getattr(dictionary, name, False) for name in ("multi_label", "span_labels")}
    items, indices = list(map(_to_text, dictionary.idx2item)), dictionary.item2idx
    is_usual = list(indices.items()) == [(item, index) for index, item in enumerate(dictionary.idx2item)]
    given = None if is_usual else {_to_text(item): index for item, index in indices.items()}
    return {"items": items, "indices": given, "add_unk": dictionary.add_unk, **flags}


def _build_dictionary(
    items: list[str], indices: dict[str, int] | None, add_unk: bool, multi_label: bool, span_labels: bool
) -> Dictionary:
    dictionary = Dictionary(add_unk=False)
    dictionary.idx2item = [_to_item(text) for text in items]
    given = {text: index for index, text in enumerate(items)} if indices is None else indices
    dictionary.item2idx = {_to_item(text): index for text, index in given.items()}
    dictionary.add_unk, dictionary.multi_label, dictionary.span_labels = add_unk, multi_label, span_labels
    return dictionary


def _to_text(item: Any) -> Any:
    # Items are bytes of UTF-8; those that are not come back the same too.
    return item.decode("utf-8", "surrogateescape") if type(item) is bytes else None


def _to_item(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _build_candidates(mention_to_candidates_map: dict[str, list[str]], backoff: bool) -> CandidateGenerator:
    # The constructor would simplify mentions a second time.
    generator = CandidateGenerator({}, backoff=backoff)
    generator.mention_to_candidates_map = mention_to_candidates_map
    return generator


def _build_task_prompt(entity_types: list[str], task_prompt: list[str]) -> EntityTypeTaskPromptAugmentationStrategy:
    strategy = EntityTypeTaskPromptAugmentationStrategy(entity_types)
    strategy.task_prompt = task_prompt
    return strategy


_PROTOTYPES: dict[str, Check] = {
    "num_prototypes": _is_size,
    "prototype_size": _is_size,
    "min_radius": _is_number,
    "unlabeled_distance": _optional(_is_number),
    "unlabeled_idx": _optional(_is_size),
    "learning_mode": _optional(_is_text),
}


def _read_prototypes(decoder: PrototypicalDecoder) -> Fields:
    mapping = decoder.metric_space_decoder
    return {
        **_read_attributes(decoder, names=tuple(_PROTOTYPES)),
        "embeddings_size": decoder.prototype_size if mapping is None else mapping.in_features,
        "distance_function": decoder._distance_function,
        "use_radius": decoder.prototype_radii is not None,
        "dtype": _dtype_of(decoder),
    }


def _build_prototypes(dtype: torch.dtype, **settings: Any) -> PrototypicalDecoder:
    return PrototypicalDecoder(**settings).to(dtype)


def _size_prototypes(fields: Fields) -> int:
    count, width, length = fields["num_prototypes"], fields["prototype_size"], fields["embeddings_size"]
    mapping = _area(length + 1, width) if width != length else 0
    return mapping + _area(count, width or length) + _area(count, fields["use_radius"])


_MEANS: dict[str, Check] = {
    "label_dictionary": _is_dictionary,
    "use_encoder": _is_flag,
    "encoding_dim": _is_size,
    "alpha": _is_number,
    "mean_update_method": _is_text,
    "multi_label": _is_flag,
}


def _read_means(decoder: DeepNCMDecoder) -> Fields:
    # What is summed up for the next update is no parameter: no state dict holds it.
    updates, counts = decoder.prototype_updates, decoder.prototype_update_counts
    return {
        **_read_attributes(decoder, names=tuple(_MEANS)),
        "embeddings_size": decoder.embedding_dim,
        "dtype": _dtype_of(decoder),
        "pending": [updates, counts] if bool(counts.any()) or bool(updates.any()) else [],
    }


def _build_means(dtype: torch.dtype, pending: list[torch.Tensor], **settings: Any) -> DeepNCMDecoder:
    decoder = DeepNCMDecoder(**settings).to(dtype)
    if pending:
        device = decoder.class_prototypes.device
        decoder.prototype_updates, decoder.prototype_update_counts = (t.to(device, copy=True) for t in pending)
    return decoder


def _is_pending(value: Any) -> bool:
    return isinstance(value, list) and len(value) in (0, 2) and all(type(tensor) is torch.Tensor for tensor in value)


def _size_means(fields: Fields) -> int:
    # As the constructor does: no encoding_dim means embeddings_size.
    length = fields["embeddings_size"]
    width = (fields["encoding_dim"] if fields["use_encoder"] else 0) or length
    encoder = _area(length + 1, 2, width) + _area(2 * width + 1, width) if fields["use_encoder"] else 0
    return encoder + _area(len(fields["label_dictionary"]), width + 1)


def _read_verbalizer(decoder: LabelVerbalizerDecoder) -> Fields:
    # save_embeddings without the state dict: the model's own holds these weights as decoder.label_embedding.*
    return {
        "label_embedding": decoder.label_embedding.save_embeddings(use_state_dict=False),
        "embeds_in_training": decoder.label_embedding.training,
        "labels": [_text_of(sentence) for sentence in decoder.verbalized_labels],
    }


def _mold_verbalizer(label_embedding: Fields, embeds_in_training: bool, labels: list[str]) -> LabelVerbalizerDecoder:
    return LabelVerbalizerDecoder(nn.Identity(), Dictionary(add_unk=False))


def _text_of(sentence: Sentence) -> str | None:
    """Return the text of a sentence, or ``None`` if Flair would not read that text as the same tokens."""
    text = sentence.to_original_text()
    first, second = ([(t.text, t.start_position, t.whitespace_after) for t in s] for s in (sentence, Sentence(text)))
    return text if first == second else None


def _build_verbalizer(label_embedding: Fields, embeds_in_training: bool, labels: list[str]) -> LabelVerbalizerDecoder:
    embeddings: Embeddings = load_embeddings(dict(label_embedding))
    embeddings.train(embeds_in_training)
    decoder = LabelVerbalizerDecoder(embeddings, Dictionary(add_unk=False))
    decoder.verbalized_labels = [Sentence(label) for label in labels]
    return decoder


_STRATEGIES = {
    "entity_mask": EntityMask,
    "typed_entity_mask": TypedEntityMask,
    "entity_marker": EntityMarker,
    "typed_entity_marker": TypedEntityMarker,
    "entity_marker_punct": EntityMarkerPunct,
    "typed_entity_marker_punct": TypedEntityMarkerPunct,
}

KINDS: tuple[Kind, ...] = (
    Kind(
        name="dictionary",
        cls=Dictionary,
        fields={
            "items": _is_names,
            "indices": _optional(_is_index),
            "add_unk": _is_flag,
            "multi_label": _is_flag,
            "span_labels": _is_flag,
        },
        read=_read_dictionary,
        build=_build_dictionary,
    ),
    *(_plain(name, cls, add_special_tokens=_is_flag) for name, cls in _STRATEGIES.items()),
    Kind(
        name="task_prompt",
        cls=EntityTypeTaskPromptAugmentationStrategy,
        fields={"entity_types": _is_words, "task_prompt": _is_names},
        read=partial(_read_attributes, names=("entity_types", "task_prompt")),
        build=_build_task_prompt,
    ),
    Kind(
        name="candidates",
        cls=CandidateGenerator,
        fields={"mention_to_candidates_map": partial(_is_a, dict), "backoff": _is_flag},
        read=partial(_read_attributes, names=("mention_to_candidates_map", "backoff")),
        build=_build_candidates,
    ),
    Kind(
        name="prototypes",
        cls=PrototypicalDecoder,
        fields={
            **_PROTOTYPES,
            "embeddings_size": _is_size,
            "distance_function": _is_text,
            "use_radius": _is_flag,
            "dtype": _is_dtype,
        },
        read=_read_prototypes,
        build=_build_prototypes,
        size=_size_prototypes,
    ),
    Kind(
        name="class_means",
        cls=DeepNCMDecoder,
        fields={**_MEANS, "embeddings_size": _is_size, "dtype": _is_dtype, "pending": _is_pending},
        read=_read_means,
        build=_build_means,
        size=_size_means,
    ),
    Kind(
        name="label_verbalizer",
        cls=LabelVerbalizerDecoder,
        fields={"label_embedding": partial(_is_a, dict), "embeds_in_training": _is_flag, "labels": _is_names},
        read=_read_verbalizer,
        build=_build_verbalizer,
        mold=_mold_verbalizer,
        holds_modules=True,
    ),
    Kind(
        name="linear",
        cls=nn.Linear,
        fields={"in_features": _is_size, "out_features": _is_size, "bias": _is_flag, "dtype": _is_dtype},
        read=_read_linear,
        build=nn.Linear,
        size=lambda fields: _area(fields["in_features"] + fields["bias"], fields["out_features"]),
    ),
    Kind(
        name="layer_norm",
        cls=nn.LayerNorm,
        fields={**_LAYER_NORM, "bias": _is_flag, "dtype": _is_dtype},
        read=_read_layer_norm,
        build=nn.LayerNorm,
        size=lambda fields: _area((1 + fields["bias"]) * fields["elementwise_affine"], *fields["normalized_shape"]),
    ),
    Kind(
        name="embedding",
        cls=nn.Embedding,
        fields={**_EMBEDDING, "dtype": _is_dtype},
        read=_read_embedding,
        build=nn.Embedding,
        size=lambda fields: _area(fields["num_embeddings"], fields["embedding_dim"]),
    ),
    _plain("identity", nn.Identity),
    _plain("dropout", nn.Dropout, p=_is_number, inplace=_is_flag),
    _plain("relu", nn.ReLU, inplace=_is_flag),
    _plain("gelu", nn.GELU, approximate=_is_text),
    _plain("silu", nn.SiLU, inplace=_is_flag),
    _plain("leaky_relu", nn.LeakyReLU, negative_slope=_is_number, inplace=_is_flag),
    _plain("tanh", nn.Tanh),
    _plain("sigmoid", nn.Sigmoid),
    Kind(
        name="sequential",
        cls=nn.Sequential,
        fields={"modules": _is_named_modules},
        read=_read_sequential,
        build=_build_sequential,
        holds_modules=True,
    ),
    Kind(
        name="module_list",
        cls=nn.ModuleList,
        fields={"modules": _is_modules},
        read=lambda module: {"modules": list(module)},
        build=nn.ModuleList,
        holds_modules=True,
    ),
)
"""Every class of objects that a file can hold, beside plain values and tensors."""
