"""Flair's own objects that files can hold: dictionaries, strategies of relation classifiers, decoders."""

from __future__ import annotations

from functools import partial
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

from flair_peft.codec import setting_checks
from flair_peft.codec.objects import Fields, Kind, area, dtype_of, plain_kind


def _derive_dictionary(dictionary: Dictionary) -> Fields:
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


def _derive_prototypes(decoder: PrototypicalDecoder) -> Fields:
    mapping = decoder.metric_space_decoder
    return {
        "embeddings_size": decoder.prototype_size if mapping is None else mapping.in_features,
        "distance_function": decoder._distance_function,
        "use_radius": decoder.prototype_radii is not None,
        "dtype": dtype_of(decoder),
    }


def _size_prototypes(fields: Fields) -> int:
    count, width, length = fields["num_prototypes"], fields["prototype_size"], fields["embeddings_size"]
    mapping = area(length + 1, width) if width != length else 0
    return mapping + area(count, width or length) + area(count, fields["use_radius"])


def _derive_means(decoder: DeepNCMDecoder) -> Fields:
    # What is summed up for the next update is no parameter: no state dict holds it.
    updates, counts = decoder.prototype_updates, decoder.prototype_update_counts
    return {
        "embeddings_size": decoder.embedding_dim,
        "dtype": dtype_of(decoder),
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
    encoder = area(length + 1, 2, width) + area(2 * width + 1, width) if fields["use_encoder"] else 0
    return encoder + area(len(fields["label_dictionary"]), width + 1)


def _derive_verbalizer(decoder: LabelVerbalizerDecoder) -> Fields:
    # save_embeddings without the state dict: the model's own holds these weights as decoder.label_embedding.*
    return {
        "label_embedding": decoder.label_embedding.save_embeddings(use_state_dict=False),
        "embeds_in_training": decoder.label_embedding.training,
        "labels": [_text_of(sentence) for sentence in decoder.verbalized_labels],
    }


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
            "items": setting_checks.is_names,
            "indices": setting_checks.optional(setting_checks.is_index),
            "add_unk": setting_checks.is_flag,
            "multi_label": setting_checks.is_flag,
            "span_labels": setting_checks.is_flag,
        },
        derive=_derive_dictionary,
        build=_build_dictionary,
    ),
    *(plain_kind(name, cls, add_special_tokens=setting_checks.is_flag) for name, cls in _STRATEGIES.items()),
    Kind(
        name="task_prompt",
        cls=EntityTypeTaskPromptAugmentationStrategy,
        fields={"entity_types": setting_checks.is_words, "task_prompt": setting_checks.is_names},
        build=_build_task_prompt,
    ),
    Kind(
        name="candidates",
        cls=CandidateGenerator,
        fields={"mention_to_candidates_map": partial(setting_checks.is_a, dict), "backoff": setting_checks.is_flag},
        build=_build_candidates,
    ),
    Kind(
        name="prototypes",
        cls=PrototypicalDecoder,
        fields={
            "num_prototypes": setting_checks.is_size,
            "prototype_size": setting_checks.is_size,
            "min_radius": setting_checks.is_number,
            "unlabeled_distance": setting_checks.optional(setting_checks.is_number),
            "unlabeled_idx": setting_checks.optional(setting_checks.is_size),
            "learning_mode": setting_checks.optional(setting_checks.is_text),
            "embeddings_size": setting_checks.is_size,
            "distance_function": setting_checks.is_text,
            "use_radius": setting_checks.is_flag,
            "dtype": setting_checks.is_dtype,
        },
        derive=_derive_prototypes,
        build=lambda dtype, **settings: PrototypicalDecoder(**settings).to(dtype),
        size=_size_prototypes,
    ),
    Kind(
        name="class_means",
        cls=DeepNCMDecoder,
        fields={
            "label_dictionary": setting_checks.is_dictionary,
            "use_encoder": setting_checks.is_flag,
            "encoding_dim": setting_checks.is_size,
            "alpha": setting_checks.is_number,
            "mean_update_method": setting_checks.is_text,
            "multi_label": setting_checks.is_flag,
            "embeddings_size": setting_checks.is_size,
            "dtype": setting_checks.is_dtype,
            "pending": _is_pending,
        },
        derive=_derive_means,
        build=_build_means,
        size=_size_means,
    ),
    Kind(
        name="label_verbalizer",
        cls=LabelVerbalizerDecoder,
        fields={
            "label_embedding": partial(setting_checks.is_a, dict),
            "embeds_in_training": setting_checks.is_flag,
            "labels": setting_checks.is_names,
        },
        derive=_derive_verbalizer,
        build=_build_verbalizer,
        mold=lambda **_: LabelVerbalizerDecoder(nn.Identity(), Dictionary(add_unk=False)),
        holds_modules=True,
    ),
)
