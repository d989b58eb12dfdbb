"""Which keys of a state dict are those of an adapter, and which spellings mean the same tensor.

PEFT spells one tensor in several ways, depending on whether a module is wrapped, on the adapter's name and on whether
a file went through PEFT's own save. Two spellings mean the same tensor if their canonical forms are equal.
Importing this module imports no other library.
"""

from __future__ import annotations

import functools
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from flair_peft.adapter.traits import NESTED_CONTAINERS, is_container

# Segments in front of every key that say only who wrapped the model; one of each, outermost first. What is called
# "module" elsewhere may be a module of the base.
WRAPPER_PREFIXES = ("module.", "base_model.model.module.", "base_model.model.", "base_model.")

# Segments of those who wrap a model, or any module in it, and that no module of a base is called.
_WRAPPING_ANYWHERE = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# Segments inside a key that wrapping inserts between a module and its own weight.
TRANSPARENT_SEGMENTS = frozenset({"base_layer"})

# Segments between a module of the base and the weight that PEFT's auxiliary wrappers keep aside.
_WRAPPING_SEGMENTS = frozenset({"original_module", "token_adapter"})

_INSIDE_WRAPPERS = TRANSPARENT_SEGMENTS | _WRAPPING_SEGMENTS

# What a module calls its own parameters, and no adapter is called.
_PARAMETER_NAMES = frozenset({"weight", "bias"})

# Flair's transformer embeddings keep their transformer in an attribute called ``model``.
_EMBEDDED_MODEL = re.compile(r"((?:[^.]+\.)*?)model\.")

_SAVED_COPY = re.compile(r"\.modules_to_save\.(?:[^.]+\.)?")

# Of the models of a process, whose spellings are remembered: each save asks for all of them several times.
_MOST_KEYS = 1 << 14


@dataclass(frozen=True)
class KeyMatch:
    """How the keys of a file fit the keys of a model.

    Attributes:
        renamed: model key → file key, for every tensor that has exactly one counterpart.
        missing: model keys that no key of the file means.
        unexpected: file keys that no key of the model means.
        ambiguous: file keys of which several mean the same model key, or the reverse.
    """

    renamed: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)


def is_adapter_key(key: str) -> bool:
    """Whether the key names a tensor that PEFT added, as opposed to one of the base model."""
    segments = key.split(".")
    return any(is_container(segment) for segment in segments) or "base_layer" in segments


def is_embedded_adapter_key(key: str) -> bool:
    """Whether the key of a Flair model names a tensor that PEFT added to the transformer of its embeddings."""
    prefix = _EMBEDDED_MODEL.match(key)
    return prefix is not None and is_adapter_key(key[prefix.end() :])


@functools.lru_cache(_MOST_KEYS)
def canonical_key(key: str) -> str:
    """Return the spelling of a key that does not depend on wrappers, ``base_layer`` and the adapter's name."""
    key = strip_wrappers(key)
    segments: list[str] = []
    skip_name = False
    for segment in key.split("."):
        if skip_name and segment not in _PARAMETER_NAMES:
            skip_name = False
            continue
        skip_name = False
        if segment in TRANSPARENT_SEGMENTS:
            continue
        segments.append(segment)
        is_kind = segments[-2:-1] and segments[-2] in NESTED_CONTAINERS
        skip_name = is_kind or (is_container(segment) and segment not in NESTED_CONTAINERS)
    return ".".join(segments)


@functools.lru_cache(_MOST_KEYS)
def base_key(key: str) -> str | None:
    """Return the name that a tensor has in the bare base model, or ``None`` if PEFT added the tensor."""
    # Adaption prompts wrap the attention modules of decoders, which they keep in an attribute called ``model``.
    key = re.sub(r"(^|\.)((?:self_)?attn)\.model\.", r"\1\2.", canonical_key(key))
    segments = [segment for segment in key.split(".") if segment not in _WRAPPING_SEGMENTS]
    return None if any(is_container(segment) for segment in segments) else ".".join(segments)


def carrier(key: str) -> str:
    """Return the name of the module to which a tensor belongs that PEFT added or saved; "" where it is no module's."""
    segments = strip_wrappers(key).split(".")
    added = (i for i, segment in enumerate(segments) if is_container(segment) or segment in _INSIDE_WRAPPERS)
    return ".".join(segments[: next(added, len(segments) - 1)])


def has_container(key: str) -> bool:
    """Whether a tensor stands in a container of a method, as opposed to a weight of the base, trained or copied."""
    return any(is_container(segment) and segment != "modules_to_save" for segment in key.split("."))


def plain_key(key: str) -> str:
    """Return the name that a weight of the base, or a trained copy of it, has in the bare base."""
    aside = {*_INSIDE_WRAPPERS, "modules_to_save"}
    return ".".join(segment for segment in strip_wrappers(key).split(".") if segment not in aside)


def without_saved_copy(key: str) -> str:
    """Return the name of which PEFT stores the same tensor, where it stores biases and resized matrices twice.

    The name of the adapter is still in that of a module within one that was copied.
    """
    return _SAVED_COPY.sub(".", key)


def is_unread(name: str) -> bool:
    """Whether no hidden state depends on the weight of a base, so that its value does not matter: poolers."""
    return "pooler" in name.split(".")


def match_keys(file_keys: Iterable[str], model_keys: Iterable[str]) -> KeyMatch:
    """Pair the keys of a file with the keys of a model that mean the same tensors.

    A key that stands on both sides is paired with itself before any rule is applied.
    """
    file_keys, model_keys = list(file_keys), list(model_keys)
    same = set(file_keys) & set(model_keys)
    match = KeyMatch(renamed={key: key for key in model_keys if key in same})
    in_file = _group_by_canonical_form(key for key in file_keys if key not in same)
    in_model = _group_by_canonical_form(key for key in model_keys if key not in same)
    for form in [*in_model, *(form for form in in_file if form not in in_model)]:
        theirs, ours = in_file.get(form, []), in_model.get(form, [])
        if len(theirs) == len(ours) == 1:
            match.renamed[ours[0]] = theirs[0]
        elif not theirs:
            match.missing.extend(ours)
        elif not ours:
            match.unexpected.extend(theirs)
        else:
            match.ambiguous.extend(theirs)
    return match


def find_adapter_prefixes(keys: Iterable[str]) -> list[str]:
    """Return the prefixes (``"embeddings."``, ``"embeddings.list_embedding_0."``) under which adapters are stored."""
    prefixes = (_EMBEDDED_MODEL.match(key) for key in keys if is_adapter_key(key))
    return sorted({prefix.group(1) for prefix in prefixes if prefix})


def strip_wrappers(key: str) -> str:
    """Return the key as the innermost model spells it."""
    key = ".".join(segment for segment in key.split(".") if segment not in _WRAPPING_ANYWHERE)
    for prefix in WRAPPER_PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _group_by_canonical_form(keys: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        groups[canonical_key(key)].append(key)
    return groups
