"""What a file with adapters may have Flair build: embeddings classes and their settings, and settings of models.

Flair's constructors open, download, unpickle or write what some of these settings name. A file must bring with it what
it needs, so text is allowed only where Flair never takes it for the name of anything.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from numbers import Number
from typing import Any

import torch
from flair.data import Dictionary
from flair.embeddings import (
    BytePairEmbeddings,
    CharacterEmbeddings,
    DocumentCNNEmbeddings,
    DocumentLMEmbeddings,
    DocumentPoolEmbeddings,
    DocumentRNNEmbeddings,
    FlairEmbeddings,
    HashEmbeddings,
    MuseCrosslingualEmbeddings,
    NILCEmbeddings,
    OneHotEmbeddings,
    PooledFlairEmbeddings,
    StackedEmbeddings,
    WordEmbeddings,
)
from flair.embeddings.base import EMBEDDING_CLASSES, Embeddings
from flair.embeddings.transformer import TransformerEmbeddings
from transformers.models.auto.modeling_auto import MODEL_MAPPING_NAMES
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from flair_peft.base import config_safety, tokenizers
from flair_peft.codec.setting_checks import Check, each, is_a, is_text, optional
from flair_peft.errors import name_some
from flair_peft.torchfile import state_tree


def unsafe_part(params: Mapping[Any, Any]) -> str | None:
    """Return what these parameters of embeddings need that no file may name, if anything.

    Classes that users registered build what they like of their own settings: their code is not from a file. What they
    inherit from Flair is held to Flair's rules.

    Args:
        params: a dictionary of a model's state; those without a class of embeddings need nothing.
    """
    name = params.get("__cls__")
    embeddings_class = EMBEDDING_CLASSES.get(name) if isinstance(name, str) else None
    if embeddings_class is None:
        return None
    if _trusts_code(params):
        return "trust_remote_code, with which transformers runs code from the Hub"
    if any(_package_of(base) == "flair_peft" for base in embeddings_class.__mro__):
        return None  # these read their parameters by rules of their own
    root = next((base for base in embeddings_class.__mro__ if _package_of(base) == "flair"), Embeddings)
    rules = next((_RULES[base] for base in root.__mro__ if base in _RULES), None)
    if rules is None:
        return None if root.__name__ in _ABSTRACT else f"{name}, which are read from a file or a program of their own"
    odd = set(rules.odd_settings(params, is_exact=root is embeddings_class))
    return f"{name} whose settings {name_some(odd)} are not what Flair stores" if odd else None


def unsafe_setting(state: Mapping[Any, Any]) -> str | None:
    """Return what in the state of a model would have Flair open something that the file names, if anything.

    Args:
        state: of a model; those of the tasks of a multitask model are looked at, too.
    """
    odd = sorted(name for name, is_allowed in _MODEL_SETTINGS.items() if name in state and not is_allowed(state[name]))
    if odd:
        return f"its '{odd[0]}' is not what Flair stores there"
    tasks = state.get("model_states", {})
    return next(filter(None, map(unsafe_setting, tasks.values())), None)


@dataclass(frozen=True)
class _Rules:
    """What the settings of one of Flair's embeddings classes may hold; all others are numbers, flags or nothing."""

    settings: Mapping[str, Check]
    required: frozenset[str] = frozenset()

    def odd_settings(self, params: Mapping[Any, Any], *, is_exact: bool) -> Iterator[str]:
        """Yield the settings that hold something else; if not ``is_exact``, of those that are known."""
        yield from self.required - params.keys()
        for name, value in params.items():
            check = self.settings.get(name) or _COMMON.get(name) or (_is_plain if is_exact else None)
            if check is not None and not check(value):
                yield str(name)


def _package_of(cls: type) -> str:
    return cls.__module__.partition(".")[0]


def _trusts_code(settings: Mapping[Any, Any]) -> bool:
    # Flair passes parameters on to transformers, which heeds keyword arguments but not what a model's config says.
    nested = [value for name, value in settings.items() if isinstance(value, Mapping) and name != "config_state_dict"]
    return bool(settings.get("trust_remote_code")) or any(map(_trusts_code, nested))


def _is_shape(value: Any) -> bool:
    """Whether this is the config of a transformer, and all that it needs is in it or in transformers."""
    return isinstance(value, Mapping) and isinstance(value.get("model_type"), str) and not _names_others(value)


def _names_others(config: Any) -> bool:
    """Whether a config, or one inside it, names code, a kernel or another model."""
    if isinstance(config, list | tuple):
        return any(map(_names_others, config))
    if not isinstance(config, Mapping):
        return False
    # transformers passes code by where it knows the architecture itself.
    needs_code = "auto_map" in config and config.get("model_type") not in MODEL_MAPPING_NAMES
    # It fetches and runs an attention that is called "owner/kernel".
    attention = (value for name, value in config.items() if config_safety.names_attention(name))
    is_other = needs_code or isinstance(config.get("backbone"), str) or any(map(config_safety.is_fetched, attention))
    return is_other or any(map(_names_others, config.values()))


_is_plain, _is_text = optional(partial(is_a, Number)), optional(is_text)
_is_nested = partial(is_a, dict)  # whoever asks about a state asks about each dictionary in it
_is_dictionary, _is_list = partial(is_a, Dictionary), each((list, tuple), _is_nested)


def _is_numbers(value: Any) -> bool:
    return all(map(_is_numbers, value)) if isinstance(value, list | tuple) else _is_plain(value)


def _is_archive(value: Any) -> bool:
    """Whether this is the zip file of a tokenizer, or of image preprocessing, which names no code."""
    return isinstance(value, BytesIO) and not any(_names_code(name, value) for name in _MAPPING_FILES)


def _names_code(name: str, archive: BytesIO) -> bool:
    try:
        with tokenizers.opened(BytesIO(archive.getvalue())) as files:
            settings = json.loads(files.read(name)) if name in files.namelist() else {}
    except (zipfile.BadZipFile, ValueError, RuntimeError):
        return False  # who reads it says so
    if not isinstance(settings, dict) or not settings.get("auto_map"):
        return False
    # transformers passes code by where it knows the class itself.
    return all(tokenizer_class_from_name(str(settings.get("tokenizer_class")) + end) is None for end in ("", "Fast"))


def _is_language_model(value: Any) -> bool:
    texts = ("document_delimiter", "recurrent_type")
    return (
        isinstance(value, dict)
        and _is_dictionary(value.get("dictionary"))
        and all(map(_is_text, map(value.get, texts)))
        and all(_is_plain(item) for name, item in value.items() if name not in ("dictionary", *texts))
    )


_MAPPING_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")

_COMMON: dict[str, Check] = {
    "__cls__": _is_text,
    "name": _is_text,
    "field": _is_text,
    "state_dict": lambda value: isinstance(value, Mapping) and all(isinstance(t, torch.Tensor) for t in value.values()),
}

_TRANSFORMER = _Rules(
    {
        "config_state_dict": _is_shape,
        "tokenizer_data": _is_archive,
        "feature_extractor_data": optional(_is_archive),
        # With the two above, neither of these is looked for.
        "model": _is_text,
        "peft_config": optional(_is_nested),
        "stored_base": _is_nested,
        **dict.fromkeys(("layers", "subtoken_pooling", "cls_pooling"), _is_text),
    },
    required=frozenset({"config_state_dict", "tokenizer_data"}),
)
_WORDS = _Rules({"vocab": _is_nested})

_RULES: dict[type[Embeddings[Any]], _Rules] = {
    TransformerEmbeddings: _TRANSFORMER,
    StackedEmbeddings: _Rules({"embeddings": _is_list}),
    WordEmbeddings: _WORDS,
    NILCEmbeddings: _WORDS,
    CharacterEmbeddings: _Rules({"path_to_char_dict": _is_dictionary}, required=frozenset({"path_to_char_dict"})),
    FlairEmbeddings: _Rules({"model_params": _is_language_model}),
    PooledFlairEmbeddings: _Rules({"contextual_embeddings": _is_nested, "pooling": _is_text}),
    OneHotEmbeddings: _Rules({"vocab_dictionary": _is_dictionary}),
    HashEmbeddings: _Rules({"hash_method": _is_text}),
    MuseCrosslingualEmbeddings: _Rules({}),
    BytePairEmbeddings: _Rules(dict.fromkeys(("spm_model_binary", "word2vec_binary"), partial(is_a, bytes))),
    DocumentPoolEmbeddings: _Rules({"embeddings": _is_nested, "pooling": _is_text, "fine_tune_mode": _is_text}),
    DocumentRNNEmbeddings: _Rules({"embeddings": _is_nested, "rnn_type": _is_text}),
    DocumentCNNEmbeddings: _Rules({"embeddings": _is_nested, "kernels": _is_numbers}),
    DocumentLMEmbeddings: _Rules({"flair_embeddings": _is_list}),
}
"""Flair's embeddings classes whose settings hold all that they are made of."""

_ABSTRACT = ("Embeddings", "TokenEmbeddings", "DocumentEmbeddings", "ImageEmbeddings", "TransformerBaseEmbeddings")


# Flair takes text for the name of a transformer here.
_is_embeddings = optional(partial(is_a, (dict, list, tuple, torch.nn.Module)))


def _are_states(value: Any) -> bool:
    return isinstance(value, dict) and state_tree.holds_tensors({"model_states": value})


def _never(_: Any) -> bool:
    return False


_MODEL_SETTINGS: dict[str, Check] = {
    "char_dict": _is_dictionary,
    **dict.fromkeys(("label_dictionary", "tag_dictionary"), optional(_is_dictionary)),
    **dict.fromkeys(("embeddings", "document_embeddings", "word_embeddings", "tars_embeddings"), _is_embeddings),
    # Flair loads what it finds here: states as they are, and all else as the name of a file.
    "model_states": _are_states,
    # Files before Flair 0.9 hold a whole model here, which has the embeddings.
    "tars_model": _never,
    # Flair's entity linker takes classes by their names, downloads programs and runs them. It has no adapters.
    **dict.fromkeys(("entity_preprocessor", "candidate_search_index"), _never),
}
