"""Write PEFT configs as plain JSON and read them back, and refuse those that cannot be what was meant."""

from __future__ import annotations

import copy
import dataclasses
import enum
import math
import re
import time
import typing
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import peft
from peft import LoraConfig, PeftConfig, TaskType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils.other import get_pattern_key

from flair_peft.adapter import traits
from flair_peft.errors import AdapterConfigError, name_some

# Facts about the file, not settings of the method; older PEFT versions do not know them.
_METADATA_FIELDS = ("peft_version", "auto_mapping")

# Set by PEFT on the configs of all prompt methods, whether or not they have such a setting.
_ADDED_BY_PEFT = frozenset({"encoder_hidden_size"})

# Names of modules, of which PEFT's constructors make sets.
_SETS = frozenset({"target_modules", "exclude_modules", "feedforward_modules"})

# What PEFT fills in when it adds an adapter. Its constructors, which it passed before, may refuse what results.
_FILLED_IN = _SETS | {"layers_to_transform", "layers_pattern", "modules_to_save"}

_METHODS = frozenset(method.value for method in PEFT_TYPE_TO_CONFIG_MAPPING)

DEFAULT_RANK = 16
DEFAULT_ALPHA = 32


def default_config(*, has_unread_layers: bool, has_transposed_weights: bool = False) -> LoraConfig:
    """Return LoRA on all linear layers, the config of embeddings that were given none.

    Args:
        has_unread_layers: whether the transformer has a pooler, or other layers that would never learn, since Flair
            reads hidden states.
        has_transposed_weights: whether linear layers keep their weights as (in, out), as GPT-2's do.
    """
    return LoraConfig(
        r=DEFAULT_RANK,
        lora_alpha=DEFAULT_ALPHA,
        target_modules="all-linear",
        exclude_modules=r"(.*\.)?(pooler|rel_pos(_[xy])?_bias)(\..*)?" if has_unread_layers else None,
        fan_in_fan_out=has_transposed_weights,
    )


def own_config(peft_config: Any) -> PeftConfig:
    """Return a copy of the user's config for feature extraction; PEFT writes into the config it is given.

    Raises:
        AdapterConfigError: it is not a ``PeftConfig`` of a method, or holds a number that is none.
    """
    if not isinstance(peft_config, PeftConfig) or peft_config.peft_type is None:
        raise AdapterConfigError(
            f"Cannot add an adapter from {type(peft_config).__name__}: {peft_config!r:.80}. peft_config takes an "
            "instance of a PEFT method's config. Pass one, for example LoraConfig(r=16, lora_alpha=32)."
        )
    _check_method(getattr(peft_config.peft_type, "value", peft_config.peft_type))
    config = copy.deepcopy(peft_config)
    _refuse_endless(config.to_dict(), type(config).__name__)
    config.task_type = TaskType.FEATURE_EXTRACTION
    config.inference_mode = False
    return config


def _refuse_endless(value: Any, where: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise AdapterConfigError(
            f"Cannot use the PEFT config: {where} is {value}. A scale that is no number makes every prediction none, "
            "and files cannot hold it. Pass the number that was meant."
        )
    parts = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    for name, part in parts:
        _refuse_endless(part, f"{where}.{name}")


def encode_config(config: PeftConfig) -> dict[str, Any]:
    """Return the config as plain JSON values.

    Raises:
        AdapterConfigError: a field holds something that JSON has no value for.
    """
    return {name: _to_json(value, name) for name, value in config.to_dict().items()}


def decode_config(stored: Any) -> PeftConfig:
    """Return the config that :func:`encode_config` wrote; a ``PeftConfig`` is returned as a copy.

    It is as it was, with what PEFT filled in when it added the adapter and what a constructor would derive again.

    Raises:
        AdapterConfigError: the method or one of its settings is not known to the installed PEFT, or the scale of the
            adapter is not stored.
    """
    if isinstance(stored, PeftConfig):
        return own_config(stored)
    if not isinstance(stored, Mapping):
        raise AdapterConfigError(
            f"Cannot read the stored PEFT config: it is a {type(stored).__name__}. PEFT {peft.__version__} "
            "writes dictionaries. Copy or save the file again."
        )
    _check_method(stored.get("peft_type"))
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[stored["peft_type"]]
    fields = {field.name: field for field in dataclasses.fields(config_class) if field.init}
    values = {name: value for name, value in stored.items() if name not in _METADATA_FIELDS}
    # A setting that this version lacks and that was switched off there says nothing.
    lost = values.keys() - fields.keys() - _ADDED_BY_PEFT
    unknown = [name for name in lost if not _is_off(values[name])]
    if unknown:
        raise AdapterConfigError(
            f"Cannot read the stored {config_class.__name__}: PEFT {peft.__version__} does not know its settings "
            f"{name_some(unknown)}. The model was trained with PEFT {stored.get('peft_version', '(unknown)')}. "
            "Install that version or a newer one."
        )
    scale = traits.of_method(stored["peft_type"]).scale
    if scale in fields and values.get(scale) is None and fields[scale].default is not None:
        raise AdapterConfigError(
            f"Cannot use the stored {config_class.__name__}: it lacks {name_some([scale])}, which scales what was "
            f"learned. PEFT would take {fields[scale].default}, and a wrong scale changes predictions "
            "silently. Add the value of the training to the adapter_config.json."
        )
    hints = typing.get_type_hints(config_class)
    given = {n: _to_dataclass(v, hints.get(n)) for n, v in values.items() if n in fields}
    try:
        config = config_class(**given)
    except ValueError:
        config = config_class(**{n: v for n, v in given.items() if n not in _FILLED_IN})
    made = encode_config(config)
    for name, value in given.items():
        if made.get(name) != values[name]:
            vars(config)[name] = set(value) if name in _SETS and isinstance(value, list) else value
    return own_config(config)


def _check_method(name: Any) -> None:
    """Return if the installed PEFT has a method of this name, spelt so."""
    if isinstance(name, str) and name in _METHODS:
        return
    meant = name.upper() if isinstance(name, str) else None
    advice = "Install the PEFT version with which the model was trained, or a newer one."
    raise AdapterConfigError(
        f"Cannot read the PEFT config: its peft_type is {name!r:.80}. PEFT {peft.__version__} knows no such method. "
        f"{f'Write {meant!r} instead.' if meant in _METHODS else advice}"
    )


PATTERNS = ("rank_pattern", "alpha_pattern")


def value_for(pattern: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """Return what a pattern of a config gives a module of this name, as PEFT looks it up."""
    return pattern.get(get_pattern_key(pattern.keys(), name), default)


def rivals(pattern: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    """Return the names of modules to which two keys of a pattern give different values.

    PEFT takes the first key that matches. Its files sort them, so that another one may be the first there.

    Args:
        pattern: of a config: regular expression for the end of a module's name → value.
        names: of modules.
    """
    return [name for name in names if any(value != _matching(pattern, name)[0] for value in _matching(pattern, name))]


def without_rivals(pattern: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a pattern that gives these modules the same values in any order of its keys."""
    if not rivals(pattern, names):
        return dict(pattern)
    meant = {name: _matching(pattern, name) for name in names}
    return {f"^{re.escape(name)}": values[0] for name, values in meant.items() if values}


def _matching(pattern: Mapping[str, Any], name: str) -> list[Any]:
    return [value for key, value in pattern.items() if get_pattern_key([key], name) == key]


# Settings whose text PEFT takes for no regular expression.
_NO_PATTERNS = frozenset(
    {*("base_model_name_or_path", "revision", "prompt_tuning_init_text", "tokenizer_name_or_path"), *_METADATA_FIELDS}
)

# What repeats, and groups that are repeated as a whole: these can take as many steps as there are ways to split a name.
_REPEATED, _REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")

_FLAGS = re.compile(r"\(\?[aiLmsux]+\)")
# What looks around, and what does so without a group in it.
_LOOKS_AROUND, _LOOKING_AROUND = re.compile(r"\(\?<?[=!]"), re.compile(r"\(\?<?[=!][^()]*\)")

_FEW_REPEATED, _SOME_REPEATED = 2, 6

# CPU seconds that one name, and all names, may take: what takes longer for one would go on for ever for the next.
_FOR_ONE, _FOR_ALL = 0.01, 0.5
_STEP, _MANY_NAMES = 2, 2_000


def refuse_endless_patterns(settings: Mapping[str, Any], names: Collection[str], *, source: str) -> None:
    """Return if PEFT comes to an end with the regular expressions that a config from a file holds.

    Python's backtrack: one can take longer than anybody waits for the name of a module, and nothing can stop it.

    Raises:
        AdapterConfigError: an expression takes too long.
    """
    patterns = {name: value for name, value in settings.items() if name not in _NO_PATTERNS}
    suspicious = {text for text in _texts_in(patterns) if not _is_simple(text)}
    for pattern in sorted(suspicious):
        if not _comes_to_an_end(pattern, names):
            raise AdapterConfigError(
                f"Cannot use the PEFT config of '{source}': comparing its regular expression {pattern!r:.80} with the "
                f"names of {len(names)} modules takes too long, or never ends. It repeats what repeats already. Write "
                "the names of the modules instead."
            )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    parts = [*value, *value.values()] if isinstance(value, Mapping) else value
    for part in parts if isinstance(parts, (list, tuple, set)) else ():
        yield from _texts_in(part)


def _is_simple(pattern: str) -> bool:
    """Whether no part of a regular expression repeats another that repeats, and few parts repeat at all."""
    return len(_REPEATED.findall(pattern)) <= _FEW_REPEATED and not _REPEATED_GROUP.search(pattern)


def _comes_to_an_end(pattern: str, names: Collection[str]) -> bool:
    """Whether an expression is compared with the names in time: with ever longer parts of each, to see it coming."""
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError):
        return True  # PEFT says so
    # What looks around can see the end of a name, and begin to take long there. It rules out ways of comparing the
    # rest, and adds none: so the rest is timed where every way has to be tried.
    bare = _LOOKING_AROUND.sub("", pattern)
    set_first = _FLAGS.match(bare)
    flags, bare = (set_first[0], bare[set_first.end() :]) if set_first else ("", bare)
    is_wild = _REPEATED_GROUP.search(bare) or len(_REPEATED.findall(bare)) > _SOME_REPEATED
    if is_wild and _LOOKS_AROUND.search(bare):
        return False
    try:
        forms = [re.compile(flags + form) for form in (bare, rf"(?:.*\.)?({bare})$", rf"(?:{bare})(?!)")]
    except (re.error, RecursionError, OverflowError):
        return False
    if len(names) > _MANY_NAMES:
        names = {re.sub(r"\d+", "0", name) for name in names}
    parts = sorted({name[:end] for name in names for end in [*range(_STEP, len(name), _STEP), len(name)]}, key=len)
    left = _FOR_ALL
    for part in parts:
        took = _time(forms, part)
        if took > _FOR_ONE:
            took = min(took, _time(forms, part))  # something else may have taken its time
        left -= took
        if took > _FOR_ONE or left < 0:
            return False
    return True


def _time(forms: Iterable[re.Pattern[str]], text: str) -> float:
    """Return the CPU seconds of this thread that comparing takes."""
    start = time.thread_time()
    for form in forms:
        form.fullmatch(text)
    return time.thread_time() - start


def _is_off(value: Any) -> bool:
    return value is None or value is False or (isinstance(value, (dict, list)) and not value)


def _to_json(value: Any, where: str) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (set, frozenset)):
        return sorted(_to_json(item, where) for item in value)
    if isinstance(value, (list, tuple)):
        return [_to_json(item, where) for item in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _to_json(item, f"{where}.{key}") for key, item in value.items()}
    raise AdapterConfigError(
        f"Cannot store the PEFT config: its setting '{where}' is a {type(value).__name__}. Files hold the config as "
        "plain JSON, so that no code runs from them. Use numbers, strings, lists or dictionaries with string keys."
    )


def _to_dataclass(value: Any, hint: Any) -> Any:
    """Return a stored dictionary as the dataclass that the field is annotated with, unless a dictionary is fine too."""
    candidates = [hint, *typing.get_args(hint)]
    nested = next((c for c in candidates if isinstance(c, type) and dataclasses.is_dataclass(c)), None)
    if nested is None or dict in candidates or not isinstance(value, Mapping):
        return value
    return nested(**value)
