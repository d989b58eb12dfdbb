"""On which class of transformers an adapter was trained, and what that class calls the modules of the base model.

An adapter of ``BertForTokenClassification`` names ``bert.encoder…`` what the bare model calls ``encoder…``. Which
prefix an adapter has is read off its tensors: of all prefixes that the classes of this architecture have, exactly one
must lead to modules that the bare model has. What then lies outside of the transformer must be part of such a class.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from flair_peft.adapter import keys
from flair_peft.base import memory_check, transformer, unusable
from flair_peft.errors import AdapterConfigError, AdapterMismatchError, BaseMismatchError, FlairPeftError, name_some
from flair_peft.primitives import building

# Tasks of PEFT and the classes of transformers that are trained for them; the first column is what PEFT stores.
_TASKS = (
    ("CAUSAL_LM", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING),
    ("SEQ_CLS", modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING),
    ("TOKEN_CLS", modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
    ("QUESTION_ANS", modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING),
    ("SEQ_2_SEQ_LM", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING),
    (None, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING),
    (None, modeling_auto.MODEL_FOR_PRETRAINING_MAPPING),
    (None, modeling_auto.MODEL_FOR_MULTIPLE_CHOICE_MAPPING),
    (None, modeling_auto.MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING),
    ("FEATURE_EXTRACTION", modeling_auto.MODEL_MAPPING),
)

# Classes that give the base model more than the tokens, where nobody else does, and what that is.
_MORE_INPUTS = {
    "BigBirdForQuestionAnswering": "tells the question by token types",
    "LongformerForMultipleChoice": "gives the tokens of the choice global attention",
    "LongformerForQuestionAnswering": "gives the tokens of the question global attention",
    "LongformerForSequenceClassification": "gives the first token global attention",
}

# How sentence-transformers holds a bare model, if the adapter was put around the whole of it.
_SENTENCE_TRANSFORMERS = ("0.auto_model.", "0.model.", "auto_model.")


@dataclass(frozen=True)
class Landing:
    """Where the tensors of an adapter belong.

    Attributes:
        prefix: what the source class puts in front of the names of the bare model.
        inside: key in the file → the same key as the bare model would have it, without wrappers.
        outside: key in the file → name in the source class, of tensors of heads and other parts.
    """

    prefix: str
    inside: Mapping[str, str]
    outside: Mapping[str, str]


def skeleton(config: PretrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return the bare model of this shape without memory for its weights.

    Raises:
        BaseModelNotFoundError: the config makes no model.
    """
    kwargs = {"trust_remote_code": True} if trust_remote_code else {}
    _begin_to_count()
    try:
        with contextlib.suppress(NotImplementedError), torch.device("meta"):
            return transformer.build_model(config, dtype=None, model_kwargs=kwargs)
        # Some, such as Apertus, compute with weights while they are made. Memory that nobody touches is not taken.
        return transformer.build_model(config, dtype=None, model_kwargs=kwargs)
    except FlairPeftError:
        raise
    except unusable.UNUSABLE as error:
        raise unusable.not_found(config.name_or_path, error) from error


def prefixes(config: PretrainedConfig, model: PreTrainedModel) -> tuple[str, ...]:
    """Return what classes of this architecture put in front of the names of the bare model, nothing first."""
    classes = [*source_classes(config), type(model)]
    named = [f"{cls.base_model_prefix}." for cls in classes if cls.base_model_prefix]
    return tuple(dict.fromkeys(["", *named, *_SENTENCE_TRANSFORMERS]))


def source_classes(config: PretrainedConfig) -> list[type[PreTrainedModel]]:
    """Return the classes that transformers has for this architecture, heads first."""
    return list(dict.fromkeys(cls for _, cls in _classes_by_task(config)))


def source_class(config: PretrainedConfig, settings: Mapping[str, Any]) -> type[PreTrainedModel] | None:
    """Return the class that an adapter was trained on, or ``None`` if its config does not tell."""
    task, mapping = settings.get("task_type"), settings.get("auto_mapping")
    name = mapping.get("base_model_class") if isinstance(mapping, Mapping) else None
    for found_task, cls in _classes_by_task(config):
        if cls.__name__ == name or (task is not None and found_task == task):
            return cls
    return None


def more_inputs(cls: type[PreTrainedModel] | None) -> str | None:
    """Return what a class does with the base model beyond giving it tokens, which embeddings do not; if anything."""
    return None if cls is None else _MORE_INPUTS.get(cls.__name__)


def refuse_other_inputs(cls: type[PreTrainedModel] | None) -> None:
    """Return unless a class gives the base model inputs that embeddings do not give it.

    Raises:
        AdapterConfigError: it does.
    """
    if cls is not None and (more := more_inputs(cls)):
        raise AdapterConfigError(
            f"Cannot use an adapter of {cls.__name__}: that class {more}, and Flair's embeddings do "
            "not. The adapter would compute something else here. Use one that was trained on the bare model, or on "
            "a class that adds nothing, such as those for token classification."
        )


def possible_classes(config: PretrainedConfig, settings: Mapping[str, Any]) -> list[type[PreTrainedModel]]:
    """Return the class that an adapter was trained on, all that it can have been, or none if it is not known here."""
    named, mapping = source_class(config, settings), settings.get("auto_mapping")
    if named is not None:
        return [named]
    return [] if isinstance(mapping, Mapping) and mapping.get("base_model_class") else source_classes(config)


def bare_name(name: str, rules: Iterable[str], modules: Collection[str]) -> str | None:
    """Return what the bare model calls a module of a source class; ``None`` if it has none such."""
    candidates = (name.removeprefix(rule) for rule in rules if name.startswith(rule))
    return next((bare for bare in candidates if bare in modules), None)


def build_source(cls: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel | None:
    """Return a model of the class without memory for its weights, or ``None`` where this config makes none."""
    _begin_to_count()
    try:
        with building.lock, torch.device("meta"):
            return cls._from_config(config)
    except FlairPeftError:
        raise
    except (ValueError, ImportError, AttributeError, TypeError):
        return None  # a class for other settings of this architecture: no adapter was trained on it


def _begin_to_count() -> None:
    bounds = memory_check.bounds()
    if bounds is not None:
        bounds.begin()


def reading_of_head(cls: type[PreTrainedModel], config: PretrainedConfig) -> str | None:
    """Return what the head of a class is applied to, if it is one linear layer on hidden states, else ``None``.

    Returns:
        "tokens" for token classification, "last token" for sequence classification of a decoder, which transformers
        calls ``score``. Heads that read a pooled vector or have layers in between are neither.
    """
    model = build_source(cls, config)
    if model is None:
        return None
    with_weights = {name: part for name, part in model.named_children() if any(True for _ in part.parameters())}
    heads = {name: part for name, part in with_weights.items() if not isinstance(part, PreTrainedModel)}
    if len(heads) != 1 or len(with_weights) != 2 or not all(type(part) is torch.nn.Linear for part in heads.values()):
        return None
    tasks = {task for task, trained_for_it in _classes_by_task(config) if trained_for_it is cls}
    if "TOKEN_CLS" in tasks:
        return "tokens"
    return "last token" if "SEQ_CLS" in tasks and "score" in heads else None


def locate(
    file_keys: Iterable[str], modules: Collection[str], rules: Iterable[str], is_part: Callable[[str], bool]
) -> Landing:
    """Return where each tensor of an adapter belongs.

    Args:
        file_keys: keys in the file.
        modules: names of all modules of the bare model.
        rules: prefixes that a source class can have, see :func:`prefixes`.
        is_part: whether a module of this name in the source class is one of another part than the transformer.

    Raises:
        BaseMismatchError: no prefix leads to modules of this model.
        AdapterMismatchError: several do, or a tensor belongs to nothing that is known.
    """
    source_names = {key: keys.strip_wrappers(key) for key in file_keys}
    bound = {key: name for key, name in source_names.items() if keys.carrier(key)}
    by_rule = {rule: {k: n for k, n in bound.items() if _leads_to(n, rule, modules)} for rule in rules}
    fitting = [rule for rule, led_to_modules in by_rule.items() if led_to_modules]
    if len(fitting) > 1:
        raise AdapterMismatchError(
            f"Cannot tell where the adapter belongs: its names fit the model both behind {name_some(fitting)}. Which "
            "one is meant cannot be proven, and the other would compute something else. Rename the tensors in the "
            "file to those of the bare model."
        )
    prefix = fitting[0] if fitting else ""
    placed = by_rule.get(prefix, {})
    inside = {key: name.removeprefix(prefix) if key in placed else name for key, name in source_names.items()}
    inside = {key: name for key, name in inside.items() if key in placed or key not in bound}
    outside = {key: name for key, name in bound.items() if key not in placed}
    _check_outside(outside, prefix, is_part, has_found=bool(inside))
    return Landing(prefix, inside, outside)


def part_of_a_class(config: PretrainedConfig, also: Collection[str]) -> Callable[[str], bool]:
    """Return a function that tells whether a module is one of the classes around a base model.

    Args:
        config: of the base model.
        also: names that the adapter's config gives modules that were trained in full.
    """
    known = functools.cache(lambda: frozenset(_module_names(config)))
    named = tuple(re.compile(rf"(.*\.)?{re.escape(entry)}(\..*)?") for entry in also)
    return lambda name: any(entry.fullmatch(name) for entry in named) or name in known()


def _module_names(config: PretrainedConfig) -> Iterator[str]:
    for cls in source_classes(config):
        model = build_source(cls, config)
        for name, _ in model.named_modules() if model is not None else ():
            yield name


def _classes_by_task(config: PretrainedConfig) -> Iterator[tuple[str | None, type[PreTrainedModel]]]:
    for task, mapping in _TASKS:
        of_task = mapping.get(type(config), None)
        for cls in of_task if isinstance(of_task, tuple) else (of_task,):
            if cls is not None:
                yield task, cls


def _leads_to(name: str, rule: str, modules: Collection[str]) -> bool:
    return name.startswith(rule) and keys.carrier(name.removeprefix(rule)) in modules


def _check_outside(outside: Mapping[str, str], prefix: str, is_part: Callable[[str], bool], *, has_found: bool) -> None:
    unknown = [key for key, name in outside.items() if not is_part(keys.carrier(name))]
    if not has_found:
        raise BaseMismatchError(
            f"Cannot use this base model for the adapter: none of its modules are those that the adapter adapts, such "
            f"as {name_some(outside.values(), limit=3)}. The adapter was trained on another architecture, or adapts "
            "a head alone. Pass base_model= with the model that it was trained on."
        )
    if unknown:
        raise AdapterMismatchError(
            f"Cannot place {len(unknown)} tensors of the adapter: {name_some(unknown)}. They are neither modules of "
            f"the transformer, behind the prefix '{prefix}' of the others, nor of a head that transformers has for "
            "this architecture. Pass base_model= with the model that it was trained on; a head of your own class has "
            "to be named in the adapter's modules_to_save."
        )
