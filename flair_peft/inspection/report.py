"""What a model file says of its model: method, ranks, base, labels, sizes, and what it lacks."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from flair_peft.adapter import implied, keys, methods
from flair_peft.inspection import file_contents
from flair_peft.inspection.file_contents import ADAPTER, CHECKPOINT, STOCK, Contents, StoredTensor
from flair_peft.models import stored
from flair_peft.storage import file_names
from flair_peft.torchfile import inert

FORMAT = 1
"""Of :meth:`Inspection.to_dict`; it grows when a key changes its meaning or goes away."""

PARTS = ("adapter", "head", "base", "tokenizer", "training", "other")

_STATE = "state_dict/"
_TRAINING = "training_state/"
_TRANSFORMER = re.compile(r"(?:[^.]+\.)*?model\.")
_NO_SETTINGS = frozenset({"auto_mapping", "peft_type", "peft_version", "task_type", "inference_mode", "revision"})
_BASE_IN_CONFIG = "base_model_name_or_path"
_LONGEST_PLACE = 200  # deeper than embeddings stand in any model
_LORA_A = ("lora_A", "lora_embedding_A")


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


@dataclass(frozen=True)
class Labels:
    """What a model predicts: the type, and the labels themselves."""

    type: str | None
    items: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a model without loading it."""

    contents: Contents

    @property
    def kind(self) -> str:
        """One of the kinds of :mod:`flair_peft.inspection.file_contents`."""
        return self.contents.kind

    @cached_property
    def flair_class(self) -> str | None:
        """The name of the Flair class."""
        name = self.contents.model_class
        return None if name is None else name.rpartition(".")[2]

    @cached_property
    def adapters(self) -> tuple[Adapter, ...]:
        """The adapters, in the order of the file."""
        return tuple(_find_adapters(self.contents))

    @cached_property
    def labels(self) -> dict[str, Labels]:
        """Task and field → labels."""
        return dict(_find_labels(self.contents.state))

    @cached_property
    def versions(self) -> dict[str, str]:
        """Library → version with which the model was written."""
        state = self.contents.state
        found = state.get("versions")
        found = dict(found) if isinstance(found, dict) else {}
        card = state.get("model_card")
        if not found and isinstance(card, dict):
            found = {name.removesuffix("_version"): v for name, v in card.items() if str(name).endswith("_version")}
            found.update({name: version for name in ("flair", "torch") if (version := card.get(name)) is not None})
        configs = {a.config.get("peft_version") for a in self.adapters} - {None}
        if "peft" not in found and len(configs) == 1:
            found["peft"] = configs.pop()
        return {str(name): _version(value) for name, value in found.items()}

    @cached_property
    def scores(self) -> dict[str, Any]:
        """What the model card says of the training's scores."""
        card = self.contents.state.get("model_card")
        scores = card.get("scores") if isinstance(card, dict) else None
        numbers = scores.items() if isinstance(scores, dict) else ()
        plain = ((str(name), value) for name, value in numbers if isinstance(value, (int, float, str)))
        return {name: value for name, value in plain if _is_finite(value)}

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Part of the model → bytes."""
        found = dict.fromkeys(PARTS, 0)
        for tensors in self.by_storage():
            found[self.part_of(tensors[0])] += tensors[1].bytes
        found["adapter"] += sum(tensor.bytes for tensor in self.contents.twins.values())
        found["tokenizer"] += self._tokenizer_bytes()
        total = sum(self.contents.files.values())
        found["other"] += max(0, total - sum(found.values()))
        return {**found, "total": total}

    @cached_property
    def dtypes(self) -> dict[str, dict[str, int]]:
        """Part of the model → dtype → number of tensors."""
        found: dict[str, Counter[str]] = {}
        for name, tensor in self.contents.tensors.items():
            found.setdefault(self.part_of(name), Counter())[tensor.dtype] += 1
        return {part: dict(found[part]) for part in ("adapter", "head", "base") if part in found}

    @cached_property
    def missing(self) -> tuple[str, ...]:
        """What the file lacks, in sentences."""
        return tuple(_find_missing(self))

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What else is worth knowing, in sentences."""
        return tuple(_find_notes(self))

    def by_storage(self) -> Iterator[tuple[str, StoredTensor]]:
        """Yield name and tensor of those that hold bytes of their own: several names can stand for one tensor."""
        seen = set()
        for name, tensor in self.contents.tensors.items():
            if tensor.storage not in seen:
                seen.add(tensor.storage)
                yield name, tensor

    def part_of(self, name: str) -> str:
        """Return to which part of the model a tensor belongs.

        What was learned in the transformer belongs to the adapter, biases for example; where a file holds all of the
        base, they cannot be told from it.
        """
        if name.startswith(_TRAINING):
            return "training"
        if _STATE not in name and self.kind != ADAPTER:
            return "tokenizer" if name.rpartition("/")[2] in file_names.ARCHIVES else "other"
        inside = self.inside_transformer(name)
        if inside is None:
            return "head"
        return "adapter" if keys.base_key(inside) is None or not self.holds_base else "base"

    def inside_transformer(self, name: str) -> str | None:
        """Return what a tensor of a transformer is called inside of it; ``None`` for other tensors."""
        for prefix in (prefix for group in self.contents.prefixes for prefix in group):
            if name.startswith(prefix):
                return name.removeprefix(prefix)
        found = None if self.contents.prefixes else _TRANSFORMER.match(name)
        return None if found is None else name[found.end() :]

    @cached_property
    def holds_base(self) -> bool:
        """Whether the weights of the base are in the file."""
        if self.kind == CHECKPOINT:
            return file_names.BASE in self.contents.files
        return self.kind != ADAPTER and not any(adapter.base.get("left_out") for adapter in self.adapters)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as plain values with stable names."""
        return {
            "format": FORMAT,
            "path": str(self.contents.path),
            "kind": self.kind,
            "class": self.flair_class,
            "bytes": self.sizes,
            "adapters": [adapter.to_dict() for adapter in self.adapters],
            "labels": {name: dataclasses.asdict(labels) for name, labels in self.labels.items()},
            "dtypes": self.dtypes,
            "tensors": len(self.contents.tensors),
            "versions": self.versions,
            "scores": self.scores,
            "missing": list(self.missing),
            "notes": list(self.notes),
        }

    def _tokenizer_bytes(self) -> int:
        folders = [f"{folder}/" for folder in file_names.ARCHIVES.values()]
        in_files = sum(size for name, size in self.contents.files.items() if any(part in name for part in folders))
        blobs = (params.get(name) for _, params in params_in(self.contents.state) for name in file_names.ARCHIVES)
        return in_files + sum(map(self.size_of, blobs))

    @classmethod
    def size_of(cls, stream: Any) -> int:
        """Return the size of an archive in a pickle."""
        content = cls.content_of(stream)
        return content.length if isinstance(content, inert.Blob) else len(content)

    @staticmethod
    def content_of(stream: Any) -> bytes | inert.Blob:
        """Return what is in an archive in a pickle: a stream, whose state is its bytes and a position."""
        if isinstance(stream, inert.Made):
            given = (item for item in (stream.state, stream.arguments) if isinstance(item, tuple) and item)
            stream = next(given, (b"",))[0]
        return stream if isinstance(stream, (inert.Blob, bytes)) else b""


def inspect(path: str | Path) -> Inspection:
    """Return what a checkpoint, a ``.pt`` file of Flair or an adapter of PEFT holds; nothing is loaded or run.

    Raises:
        ModelFileError: there is nothing of that kind, or it is damaged.
    """
    return Inspection(file_contents.read_contents(Path(path)))


def params_in(state: Mapping[Any, Any]) -> Iterator[tuple[str, dict[Any, Any]]]:
    """Yield place and parameters of each transformer embedding in the state of a model."""
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", state)]
    while pending:
        place, value = pending.pop()
        if id(value) in seen or len(place) > _LONGEST_PLACE:
            continue
        seen.add(id(value))
        if isinstance(value, inert.Made):
            value = value.state if isinstance(value.state, dict) else value.arguments
        if isinstance(value, dict):
            if "Transformer" in str(value.get("__cls__"))[:100] and ("model" in value or "peft_config" in value):
                yield place, value
            named = ((str(key)[:100], item) for key, item in value.items() if key != "state_dict")
        else:
            named = ((str(index), item) for index, item in enumerate(value))
        inner = [(f"{place}.{key}".lstrip("."), part) for key, part in named if _is_container(part)]
        pending.extend(reversed(inner))


def _is_container(value: Any) -> bool:
    return isinstance(value, (dict, list, tuple, inert.Made))


def _find_adapters(found: Contents) -> Iterator[Adapter]:
    groups = list(found.prefixes)
    if found.kind == ADAPTER:
        yield _describe(found, "", {}, found.configs[0], groups[0])
        return
    seen = set[int]()
    for place, params in params_in(found.state):
        number = params.get("part")
        if isinstance(number, int) and number in seen:
            continue  # embeddings that several tasks share
        prefixes = _prefixes_of(found, place, number, groups)
        config = found.configs.get(number) if isinstance(number, int) else None
        config = config or _plain_config(params.get("peft_config"))
        if config is not None or prefixes:
            seen.update({number} if isinstance(number, int) else ())
            yield _describe(found, place, params, config, prefixes)


def _prefixes_of(found: Contents, place: str, number: Any, groups: list[tuple[str, ...]]) -> tuple[str, ...]:
    """Return the prefixes of the tensors of these embeddings, and take them from those that are left.

    Files call embeddings otherwise than their modules are called, but positions in stacks and tasks are the same.
    """
    if found.kind == CHECKPOINT:
        return found.prefixes[number] if isinstance(number, int) and 0 <= number < len(found.prefixes) else ()
    for group in groups:
        if _where(group[0]) == _where(place):
            groups.remove(group)
            return group
    return ()


def _where(place: str) -> tuple[str, list[str]]:
    """Return the task and the positions in stacks that a place names, in a state or in a state dict."""
    place = place.replace("/", ".")
    task = re.match(r"model_states\.([^.]+)\.", place)
    positions = re.findall(r"list_embedding_(\d+)\.|\.embeddings\.(\d+)(?:\.|$)", place)
    return task.group(1) if task else "", [first or second for first, second in positions]


def _plain_config(stored: Any) -> Mapping[str, Any] | None:
    """Return the settings of a config in a state: JSON, what was pickled of it, or ``None``."""
    if isinstance(stored, inert.Made) and isinstance(stored.state, dict):
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
    if isinstance(value, inert.Made):
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
    first = prefixes[0] if prefixes else None
    own = {} if first is None else {k.removeprefix(first): t for k, t in found.tensors.items() if k.startswith(first)}
    added = {name: tensor for name, tensor in own.items() if keys.base_key(name) is None}
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
        ranks=tuple(sorted({t.shape[0] for name, t in added.items() if _is_first_factor(name) and t.shape})),
        modules=dict(sorted(Counter(module_of(name).rpartition(".")[2] for name in _one_of_each(added)).items())),
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


def implied_config(found: Inspection, adapter: Adapter) -> implied.ImpliedConfig | None:
    """Return the config that the tensors of an adapter imply; see ``flair_peft.adapter.implied.ImpliedConfig``."""
    first = adapter.prefixes[0] if adapter.prefixes else ""
    named = found.contents.tensors.items()
    return _imply({name.removeprefix(first): tensor for name, tensor in named if name.startswith(first)})


def _imply(own: Mapping[str, StoredTensor]) -> implied.ImpliedConfig | None:
    # As in the state dict of the embeddings, which call their transformer "model".
    shapes = {f"model.{name}": tensor.shape for name, tensor in own.items()}
    return implied.read_config(shapes)


def _differing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not PEFT's defaults."""
    classes = {method.value: cls for method, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = config.get("peft_type")
    config_class = classes.get(method) if isinstance(method, str) else None
    defaults = {} if config_class is None else _defaults(config_class)
    return {
        name: sorted(value) if name == "target_modules" and _are_texts(value) else value
        for name, value in config.items()
        if name not in _NO_SETTINGS and name != _BASE_IN_CONFIG and (name not in defaults or value != defaults[name])
    }


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _defaults(config_class: type) -> dict[str, Any]:
    found = {}
    for field in dataclasses.fields(config_class):
        if field.default is not dataclasses.MISSING:
            found[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            found[field.name] = made if isinstance(made, (dict, list)) else None
    return found


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


def module_of(name: str) -> str:
    """Return the module of the base that an adapter's tensor belongs to."""
    segments = keys.canonical_key(name).split(".")
    stop = next((i for i, part in enumerate(segments) if keys.base_key(part) is None), len(segments))
    return ".".join(segment for segment in segments[:stop] if segment != "token_adapter")


def _one_of_each(names: Mapping[str, Any]) -> Iterator[str]:
    """Yield one tensor of each module that has an adapter."""
    seen = set()
    for name in names:
        module = module_of(name)
        if module and module not in seen:
            seen.add(module)
            yield name


def _is_first_factor(name: str) -> bool:
    return not set(_LORA_A).isdisjoint(name.split("."))


def _adapter_names(key: str) -> Iterator[str]:
    """Yield the name that the key gives to its adapter: what stands behind PEFT's container, if not a parameter."""
    segments = key.split(".")
    for container, name in itertools.pairwise(segments):
        if keys.base_key(container) is None and name not in ("weight", "bias") and keys.base_key(name) is not None:
            yield name


def _find_labels(state: Mapping[Any, Any], task: str = "") -> Iterator[tuple[str, Labels]]:
    kinds = [state.get(name) for name in ("label_type", "tag_type")]
    kind = next((value for value in kinds if isinstance(value, str)), None)
    for name, value in state.items():
        items = _items_of(value) if isinstance(name, str) and name.endswith("dictionary") else None
        if items is not None:
            marks = stored.MARKS if name == "tag_dictionary" else ()
            yield f"{task}{name}", Labels(kind, tuple(item for item in items if item not in marks))
    tasks = state.get("model_states")
    for name, part in tasks.items() if isinstance(tasks, dict) and not task else ():
        if isinstance(part, dict):
            yield from _find_labels(part, f"{name}.")


@dataclass(frozen=True)
class StoredDictionary:
    """A dictionary of Flair's in a file.

    Attributes:
        items: by number.
        settings: what else it holds.
    """

    items: list[str]
    settings: Mapping[str, Any]


def dictionary_in(value: Any) -> StoredDictionary | None:
    """Return the dictionary of Flair's that a value is, in JSON or pickled; ``None`` for all other values."""
    if isinstance(value, dict) and value.get("$type") == "dictionary":
        held = {name: part for name, part in value.items() if name != "$type"}
    elif isinstance(value, inert.Made) and value.name == "flair.data.Dictionary" and isinstance(value.state, dict):
        held = {name: part for name, part in value.state.items() if name != "idx2item"}
        held["items"] = value.state.get("idx2item")
        if _is_usual(held.get("item2idx"), held["items"]):
            del held["item2idx"]
    else:
        return None
    items = held.pop("items", None)
    items = items if isinstance(items, list) else []
    plain = (item.decode("utf-8", "replace") if isinstance(item, bytes) else item for item in items)
    # Files of older versions of Flair lack the flags.
    named = {"multi_label": False, "span_labels": False, **{str(name): part for name, part in held.items()}}
    return StoredDictionary([item if isinstance(item, str) else repr(item) for item in plain], named)


def _is_usual(indices: Any, items: Any) -> bool:
    """Whether the numbers of items are their places."""
    if not isinstance(indices, dict) or not isinstance(items, list):
        return False
    return list(indices.items()) == [(item, index) for index, item in enumerate(items)]


def _items_of(value: Any) -> list[str] | None:
    found = dictionary_in(value)
    return None if found is None else found.items


def _find_missing(found: Inspection) -> Iterator[str]:
    yield from found.contents.damage
    for adapter in found.adapters:
        of = f" of {adapter.place}" if len(found.adapters) > 1 else ""
        if not adapter.has_config:
            unknown = f"; the tensors cannot tell {', '.join(adapter.open)}" if adapter.open else ""
            yield f"the PEFT config{of}, which stock Flair does not store{unknown}"
        if found.kind == ADAPTER or adapter.base.get("left_out") or not found.holds_base:
            name = adapter.base["name"]
            yield f"the base's weights{of}, which are found at '{name}'" if name else f"the base's weights{of}"


def _find_notes(found: Inspection) -> Iterator[str]:
    if not found.adapters:
        yield "no adapter" if found.kind == STOCK else "no adapter is described"
    for adapter in found.adapters:
        config = adapter.config or adapter.settings
        several = [name for name in adapter.names if name != "default"]
        if several:
            yield f"there are adapters of other names: {', '.join(several)}"
        if config.get("bias") not in (None, "none"):
            yield f"biases were trained (bias={config['bias']!r})"
        if config.get("modules_to_save"):
            yield f"modules were trained as a whole: {_list(config['modules_to_save'])}"
        if config.get("use_dora"):
            yield "DoRA: magnitudes were learned beside the matrices"
        if config.get("use_rslora"):
            yield "rsLoRA: the scale is alpha / √rank"
        if config.get("trainable_token_indices"):
            yield "rows of the embedding matrix were trained"
        init = config.get("init_lora_weights")
        if isinstance(init, str) and methods.init_rewrites_base(init):
            yield f"the initialisation '{init}' rewrote weights of the base"
        if adapter.base["needs_remote_code"]:
            yield "the base comes with code of its own: loading needs trust_remote_code=True"


def _list(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(value: Any) -> str:
    if isinstance(value, inert.Made):
        value = next((item for item in value.arguments if isinstance(item, str)), "?")
    return str(value)[:100]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
