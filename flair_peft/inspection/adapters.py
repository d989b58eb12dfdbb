"""The adapters in a model file: method, settings, ranks and base of each, as configs and tensors tell them."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from flair_peft.adapter import implied, keys
from flair_peft.adapter.peft_registry import peft_methods
from flair_peft.inspection.file_contents import ADAPTER, CHECKPOINT, Contents, StoredTensor
from flair_peft.torchfile import state_tree
from flair_peft.torchfile.stand_ins import Made
from flair_peft.torchfile.state_tree import StoredEmbeddings, embeddings_in

_NO_SETTINGS = frozenset({"auto_mapping", "peft_type", "peft_version", "task_type", "inference_mode", "revision"})
_BASE_IN_CONFIG = "base_model_name_or_path"
_TRANSFORMER = re.compile(r"(?:model_states/[^/]+/)?state_dict/(?:[^.]+\.)*?model\.")
_LORA_A = frozenset({"lora_A", "lora_embedding_A"})


@dataclass(frozen=True)
class Adapter:
    """One adapter, and the transformer that it stands on.

    Attributes:
        place: where its embeddings stand in the model's state.
        embeddings: their class.
        method: PEFT's name of the method, such as "LORA"; ``None`` where neither config nor tensors tell.
        settings: of the config that differ from PEFT's defaults; those that the tensors imply if it is lost.
        has_config: whether the config is stored.
        open: names of settings that are lost and that the tensors cannot tell.
        suggestion: the call that would make the lost config, with these left open.
        ranks: of its matrices, in ascending order.
        modules: last name of a module → how many of them have an adapter.
        names: of the adapters, where the file tells.
        base: name, revision, dtype, … of the base model.
        config: the config as stored.
        prefixes: of the transformer's tensors.
    """

    place: str
    embeddings: str | None
    method: str | None
    settings: Mapping[str, Any]
    has_config: bool
    open: tuple[str, ...]
    suggestion: str | None
    ranks: tuple[int, ...]
    modules: Mapping[str, int]
    names: tuple[str, ...]
    base: Mapping[str, Any]
    config: Mapping[str, Any]
    prefixes: tuple[str, ...]

    @property
    def alpha(self) -> float | None:
        """What scales the adapter, together with the rank; ``None`` where it is lost or the method has none."""
        found = [self.config.get(name) for name in ("lora_alpha", "alpha")]
        return next((value for value in found if type(value) in (int, float)), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        hidden = ("config", "prefixes")
        return {**{name: value for name, value in found.items() if name not in hidden}, "alpha": self.alpha}


def find_adapters(found: Contents) -> Iterator[Adapter]:
    """Yield the adapters in a model file, in its order."""
    groups = list(found.prefixes)
    if found.kind == ADAPTER:
        yield _describe(found, "", {}, found.configs[0], groups[0])
        return
    seen = set[int]()
    for embeddings in embeddings_in(found.state):
        number = embeddings.params.get("part")
        if isinstance(number, int) and number in seen:
            continue  # embeddings that several tasks share
        prefixes = _prefixes_of(found, embeddings, number, groups)
        config = found.configs.get(number) if isinstance(number, int) else None
        config = config or _plain_config(embeddings.params.get("peft_config"))
        if config is not None or any(map(keys.is_adapter_key, own_tensors(found, prefixes))):
            seen.update({number} if isinstance(number, int) else ())
            yield _describe(found, place_of(embeddings), embeddings.params, config, prefixes)


@dataclass(frozen=True)
class PlainTransformer:
    """Transformer embeddings without an adapter.

    Attributes:
        place: where they stand in the model's state.
        embeddings: their class.
        base: name, revision, dtype, … of the model that they were made of.
    """

    place: str
    embeddings: str | None
    base: Mapping[str, Any]


def find_plain(found: Contents) -> Iterator[PlainTransformer]:
    """Yield the transformer embeddings of a model file in which no adapter is, in its order."""
    seen = set[int]()
    for embeddings in embeddings_in(found.state):
        number, name = embeddings.params.get("part"), embeddings.params.get("__cls__")
        if isinstance(number, int) and number in seen:
            continue  # embeddings that several tasks share
        seen.update({number} if isinstance(number, int) else ())
        prefixes = _prefixes_of(found, embeddings, number, []) or _plain_prefixes(found, embeddings)
        own = own_tensors(found, prefixes)
        base = _describe_base(embeddings.params, None, own)
        yield PlainTransformer(place_of(embeddings), name if isinstance(name, str) else None, base)


@dataclass(frozen=True)
class OtherEmbeddings:
    """Embeddings that have no transformer of their own: a table of words, or what stands around others.

    Attributes:
        place: where they stand in the model's state.
        embeddings: their class.
    """

    place: str
    embeddings: str


def find_others(found: Contents) -> Iterator[OtherEmbeddings]:
    """Yield the embeddings of a model file that have no transformer of their own, in its order."""
    for embeddings in state_tree.others_in(found.state):
        yield OtherEmbeddings(place_of(embeddings), embeddings.params["__cls__"])


def own_tensors(found: Contents, prefixes: tuple[str, ...]) -> dict[str, StoredTensor]:
    """Return the tensors of a transformer by their names in it; under the first of several prefixes are all of them."""
    first = prefixes[0] if prefixes else None
    return {} if first is None else {k.removeprefix(first): t for k, t in found.tensors.items() if k.startswith(first)}


def _plain_prefixes(found: Contents, embeddings: StoredEmbeddings) -> tuple[str, ...]:
    """Return the prefix of tensors in a file that stand in the same task, and place in a stack, as embeddings."""
    task = f"model_states/{embeddings.task.removesuffix('.')}/" if embeddings.task else ""
    wanted = state_tree.positions(embeddings.prefix)
    names = (match.group(0) for name in found.tensors if (match := _TRANSFORMER.match(name)) is not None)
    mine = (name for name in names if name.startswith(f"{task}state_dict/") and state_tree.positions(name) == wanted)
    return tuple(itertools.islice(mine, 1))


def place_of(embeddings: StoredEmbeddings) -> str:
    """Return keys and indices on the way to the parameters of embeddings in the state of a model, joined by dots."""
    around = ("model_states", embeddings.task.removesuffix(".")) if embeddings.task else ()
    return ".".join(map(str, (*around, *embeddings.place)))


def _prefixes_of(
    found: Contents, embeddings: StoredEmbeddings, number: Any, groups: list[tuple[str, ...]]
) -> tuple[str, ...]:
    """Return the prefixes of the tensors of these embeddings, and take them from those that are left.

    Files call embeddings otherwise than their modules are called, but positions in stacks and tasks are the same.
    """
    if found.kind == CHECKPOINT:
        return found.prefixes[number] if type(number) is int and 0 <= number < len(found.prefixes) else ()
    for group in groups:
        task = re.match("model_states/([^/]+)/", group[0])
        places = task.group(1) if task else "", state_tree.positions(group[0])
        if places == (embeddings.task.removesuffix("."), state_tree.positions(embeddings.prefix)):
            groups.remove(group)
            return group
    return ()


def _plain_config(stored: Any) -> Mapping[str, Any] | None:
    """Return the settings of a config in a state: JSON, what was pickled of it, or ``None``."""
    if isinstance(stored, Made) and isinstance(stored.state, dict):
        stored = stored.state
    if not isinstance(stored, dict):
        return None
    items = stored.get("items") if stored.get("$type") == "dict" else None
    pairs = [pair for pair in items if isinstance(pair, list) and len(pair) == 2] if isinstance(items, list) else None
    plain = stored.items() if pairs is None else pairs
    return {key: _plain_setting(value) for key, value in plain if isinstance(key, str)}


def _plain_setting(value: Any, depth: int = 0) -> Any:
    """Return a setting as JSON has it: sets as lists, enumerations as their value."""
    if depth > 5:
        return None
    if isinstance(value, Made):
        held = [list(argument) for argument in value.arguments if isinstance(argument, (list, tuple))]
        if value.items or held:
            return [_plain_setting(item, depth + 1) for item in value.items or held[0]]
        return next((argument for argument in value.arguments if isinstance(argument, (str, int))), None)
    if isinstance(value, dict):
        if isinstance(value.get("items"), list) and "$type" in value:
            return [_plain_setting(item, depth + 1) for item in value["items"]]
        return {str(key): _plain_setting(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain_setting(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (str, int, float, bool)) else None


def _describe(
    found: Contents, place: str, params: Mapping[Any, Any], config: Mapping[str, Any] | None, prefixes: tuple[str, ...]
) -> Adapter:
    own = own_tensors(found, prefixes)
    added = {name: tensor for name, tensor in own.items() if keys.base_key(name) is None}
    modules = {keys.carrier(name) for name in added} - {""}
    method, settings, unknown, suggestion = _settings(config, own)
    embeddings = params.get("__cls__")
    return Adapter(
        place=place,
        embeddings=embeddings if isinstance(embeddings, str) else None,
        method=method,
        settings=settings,
        has_config=config is not None,
        open=unknown,
        suggestion=suggestion,
        ranks=tuple(sorted({t.shape[0] for name, t in added.items() if _LORA_A & {*name.split(".")} and t.shape})),
        modules=dict(sorted(Counter(module.rpartition(".")[2] for module in modules).items())),
        names=tuple(sorted({name for key in added for name in _adapter_names(key)})),
        base=_describe_base(params, config, own),
        config=config or {},
        prefixes=prefixes,
    )


def _settings(
    config: Mapping[str, Any] | None, own: Mapping[str, StoredTensor]
) -> tuple[str | None, dict[str, Any], tuple[str, ...], str | None]:
    """Return method, settings, what is open and the call that would make the config."""
    if config is None:
        found = _imply(own)
        if found is None:
            return None, {}, (), None
        return found.method, dict(found.settings), found.open + found.optional, found.text
    method = config.get("peft_type")
    return (method if isinstance(method, str) else None), _differing(config), (), None


def implied_config(contents: Contents, adapter: Adapter) -> implied.ImpliedConfig | None:
    """Return the config that the tensors of an adapter imply; see ``flair_peft.adapter.implied.ImpliedConfig``."""
    return _imply(own_tensors(contents, adapter.prefixes or ("",)))


def _imply(own: Mapping[str, StoredTensor]) -> implied.ImpliedConfig | None:
    # As in the state dict of the embeddings, which call their transformer "model".
    shapes = {f"model.{name}": tensor.shape for name, tensor in own.items()}
    return implied.read_config(shapes)


def _differing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not PEFT's defaults."""
    name = config.get("peft_type")
    defaults = peft_methods().defaults.get(name, {}) if isinstance(name, str) else {}
    return {
        name: sorted(value) if name == "target_modules" and _are_texts(value) else value
        for name, value in config.items()
        if name not in _NO_SETTINGS and name != _BASE_IN_CONFIG and (name not in defaults or value != defaults[name])
    }


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _describe_base(
    params: Mapping[Any, Any], config: Mapping[str, Any] | None, own: Mapping[str, StoredTensor]
) -> dict[str, Any]:
    stored = params.get("stored_base")
    stored = stored if isinstance(stored, dict) else {}
    record = stored.get("record")
    record = record if isinstance(record, dict) else {}
    left_out = stored.get("left_out")
    weights = Counter(tensor.dtype for name, tensor in own.items() if keys.base_key(name) is not None)
    named = (record.get("name"), params.get("model"), (config or {}).get(_BASE_IN_CONFIG))
    dtypes = (params.get("dtype"), record.get("dtype"), weights.most_common(1)[0][0] if weights else None)
    revisions = (record.get("revision"), (config or {}).get("revision"))
    quantization = record.get("quantization")
    return {
        "name": _first_text(named),
        "revision": _first_text(revisions),
        "dtype": _first_text(dtypes),
        "quantization": quantization if isinstance(quantization, dict) else None,
        "vocabulary_size": record.get("vocabulary_size") if type(record.get("vocabulary_size")) is int else None,
        "fingerprint": _first_text((record.get("fingerprint"),)),
        "needs_remote_code": record.get("needs_remote_code") is True,
        "left_out": len(left_out) if isinstance(left_out, list) else 0,
    }


def _first_text(values: tuple[Any, ...]) -> str | None:
    return next((value for value in values if isinstance(value, str) and value), None)


def _adapter_names(key: str) -> Iterator[str]:
    """Yield the name that the key gives to its adapter: what stands behind PEFT's container, if not a parameter."""
    segments = key.split(".")
    for container, name in itertools.pairwise(segments):
        if keys.base_key(container) is None and name not in ("weight", "bias") and keys.base_key(name) is not None:
            yield name
