"""What differs between two models in files: config, labels, tokenizer, tensors."""

from __future__ import annotations

import contextlib
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flair_peft.adapter import keys
from flair_peft.errors import ModelFileError
from flair_peft.inspection import adapters, file_contents
from flair_peft.inspection.file_contents import StoredTensor
from flair_peft.inspection.labels import dictionary_in
from flair_peft.inspection.report import Inspection
from flair_peft.primitives import progress
from flair_peft.storage import file_names
from flair_peft.torchfile.stand_ins import Blob, Made, Name
from flair_peft.torchfile.state_tree import embeddings_in

_PIECE = 1 << 22
_MOST_SETTINGS = 1_000_000

_LONGEST_NAME = 200
_DEEPEST = 1_000

# What is compared in another way, or says when and where a model was written and not what it is: of a model, of
# transformer embeddings, and of the config of a transformer.
_OF_MODELS = frozenset({"state_dict", "head_probe", "versions", "model_card", "training_state", "format_version"})
_OF_EMBEDDINGS = frozenset(
    {
        *("part", "probe", "stored_base", "peft_config", "tokenizer_data", "feature_extractor_data", "save_base"),
        *("untrained", "name", "format_version", "versions"),
    }
)
_OF_TRANSFORMERS = frozenset({"transformers_version", "_name_or_path"})

_DEVICE = "torch.device"
_SETS = frozenset(f"{module}.{name}" for module in ("builtins", "__builtin__") for name in ("set", "frozenset"))


@dataclass(frozen=True)
class Change:
    """A value that differs; ``None`` where one side has none."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True)
class ValueChange:
    """A tensor whose elements differ.

    Attributes:
        name: of the tensor.
        largest: the largest absolute difference of two elements.
        relative: Frobenius norm of the difference, divided by that of the first.
    """

    name: str
    largest: float
    relative: float


@dataclass(frozen=True)
class Comparison:
    """What differs between two models.

    Attributes:
        config: settings of the model, its adapters and bases.
        labels: what the models predict.
        tokenizer: its files.
        added: tensors that only the second has.
        removed: tensors that only the first has.
        reshaped: tensors of another shape or dtype.
        values: tensors with other elements.
        equal: number of tensors that are the same.
    """

    config: list[Change] = field(default_factory=list)
    labels: list[Change] = field(default_factory=list)
    tokenizer: list[Change] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    reshaped: list[Change] = field(default_factory=list)
    values: list[ValueChange] = field(default_factory=list)
    equal: int = 0

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not any(value for name, value in vars(self).items() if name != "equal")

    def to_dict(self) -> dict[str, Any]:
        """Return plain values with stable names."""
        return {"is_equal": self.is_equal, **asdict(self)}


def compare(first: Inspection, second: Inspection) -> Comparison:
    """Return what differs between two models; every tensor that both have is read.

    Raises:
        ModelFileError: a tensor cannot be read.
    """
    ours, theirs = comparable(first), comparable(second)
    reshaped, values, equal = list[Change](), list[ValueChange](), 0
    for name in (name for name in ours if name in theirs):
        shapes = _form(ours[name]), _form(theirs[name])
        if shapes[0] != shapes[1]:
            reshaped.append(Change(name, *shapes))
        found = _compare_values(name, ours[name], theirs[name])
        values.extend([] if found is None else [found])
        equal += found is None and shapes[0] == shapes[1]
        progress.advance(ours[name].bytes + theirs[name].bytes)
    settings, labels = zip(_settings(first), _settings(second), strict=True)
    return Comparison(
        config=_changes(*settings),
        labels=_changes(*labels),
        tokenizer=_changes(_tokenizer_files(first), _tokenizer_files(second)),
        added=[name for name in theirs if name not in ours],
        removed=[name for name in ours if name not in theirs],
        reshaped=reshaped,
        values=sorted(values, key=lambda change: -change.relative if math.isfinite(change.relative) else -math.inf),
        equal=equal,
    )


def comparable(found: Inspection) -> dict[str, StoredTensor]:
    """Return the tensors of a model under names that do not depend on the kind of file that holds them."""
    named: dict[str, StoredTensor] = {}
    seen = set()
    places = {prefix: index for index, adapter in enumerate(found.adapters) for prefix in adapter.prefixes}
    for name, tensor in sorted(found.contents.tensors.items()):
        if name.startswith("head_probe/"):
            continue  # what the head gives follows from the rest
        inside = found.inside_transformer(name)
        if found.part_of(name) == "tokenizer" or (inside is not None and tensor.view in seen):
            continue
        seen.add(tensor.view)
        spelled = name.removeprefix("state_dict/")
        if inside is not None:
            prefix = name.removesuffix(inside)
            around = file_names.folder_of(places.get(prefix, 0)) if prefix in places else prefix
            spelled = around + keys.canonical_key(inside)
        # Adapters of several names in one module differ in nothing else.
        named[name if spelled in named else spelled] = tensor
    return named


def _form(tensor: StoredTensor) -> str:
    return f"{tensor.dtype} {'×'.join(map(str, tensor.shape)) or 'number'}"


def _compare_values(name: str, first: StoredTensor, second: StoredTensor) -> ValueChange | None:
    if first.shape != second.shape:
        return None
    largest, square, norm = 0.0, 0.0, 0.0
    for left, right in zip(_pieces(first), _pieces(second), strict=True):
        ours, theirs = left.double(), right.double()
        same_gaps = ours.isnan() & theirs.isnan()
        difference = (ours - theirs).masked_fill(same_gaps | (ours == theirs), 0.0).abs().nan_to_num(math.inf)
        largest = max(largest, float(difference.max())) if difference.numel() else largest
        largest = max(largest, 1.0) if _are_other_integers(left, right) else largest
        square += float(difference.square().sum())
        norm += float(ours.nan_to_num(0.0).square().sum())
    if largest == 0.0:
        return None
    return ValueChange(name, largest, math.sqrt(square) / math.sqrt(norm) if norm else math.inf)


def _are_other_integers(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether integers differ, also by less than a floating-point number of their size can say."""
    kinds = (first.dtype, second.dtype)
    return not any(kind.is_floating_point for kind in kinds) and not torch.equal(first, second)


def _pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    read = tensor.read()
    flat = (torch.view_as_real(read) if read.is_complex() else read).reshape(-1)
    return (flat[start : start + _PIECE] for start in range(0, flat.numel(), _PIECE))


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    names = [*first, *(name for name in second if name not in first)]
    return [Change(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]


def _settings(found: Inspection) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all that a model holds beside tensors, under names, and the items of its dictionaries likewise."""
    settings: dict[str, Any] = {"class": found.flair_class}
    for index, adapter in enumerate(found.adapters):
        around = f"adapter {index + 1}: " if len(found.adapters) > 1 else ""
        settings[f"{around}method"] = adapter.method
        settings.update({f"{around}{name}": value for name, value in adapter.settings.items()})
        base = {name: value for name, value in adapter.base.items() if name != "left_out"}
        settings.update({f"{around}base {name}": value for name, value in base.items()})
    types = {f"{name} type": labels.type for name, labels in found.labels.items()}
    flat, items = _flat(found)
    return {**settings, **flat}, {**types, **items}


def _flat(found: Inspection) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return all plain values of a state under the names on the way to them, and the items of its dictionaries.

    Raises:
        ModelFileError: there are more of them, or they have longer names, than in any model.
    """
    state = found.contents.state
    flat, items = dict[str, Any](), dict[str, Any]()
    skipped = _skipped_names(state)
    # By identity: each of these is held by the state for as long as it is walked.
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", state)]
    while pending:
        place, value = pending.pop()
        if len(place) > _DEEPEST or len(flat) + len(items) + len(pending) > _MOST_SETTINGS:
            raise ModelFileError(
                f"Cannot compare '{found.contents.path}': it has more than {_MOST_SETTINGS} settings, or longer names "
                "of them, than any model of Flair. Pass a file that model.save() or Flair's trainer wrote."
            )
        if isinstance(value, (dict, list, tuple, Made)):
            if id(value) in seen:
                continue
            seen.add(id(value))
            dictionary = dictionary_in(value)
            if dictionary is not None:
                around = place.removeprefix("model_states.")
                items.update({f"{around} {index}": item for index, item in enumerate(dictionary.items)})
                pending.extend((f"{place}.{name}", part) for name, part in dictionary.settings.items())
            else:
                pending.extend(_inside(place, value, skipped.get(id(value), frozenset())))
        elif (plain := _plain(value)) is not None:
            flat[place] = plain
    return flat, items


def _plain(value: Any) -> Any:
    """Return what stands for a value without parts in a comparison; ``None`` for none, and for tensors."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, bytes):
        return _mark(value)
    if isinstance(value, Blob):
        return f"{value.length} bytes, {value.checksum:08x}"
    if isinstance(value, Name):
        return value.text
    return value if isinstance(value, (str, int, float, bool)) else None


def _skipped_names(state: Mapping[Any, Any]) -> dict[int, frozenset[str]]:
    """Return, by the identity of containers in a state, names in them that are not compared as settings."""
    skipped = {id(state): _OF_MODELS}
    tasks = state.get("model_states")
    skipped |= {id(task): _OF_MODELS for task in (tasks.values() if isinstance(tasks, dict) else ())}
    for embeddings in embeddings_in(state):
        skipped[id(embeddings.params)] = _OF_EMBEDDINGS
        pending = [embeddings.params.get("config_state_dict")]
        while pending:
            config = pending.pop()
            if isinstance(config, dict) and id(config) not in skipped:
                skipped[id(config)] = _OF_TRANSFORMERS
                pending.extend(config.values())
    return skipped


def _inside(place: str, value: Any, skipped: frozenset[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value.get("$type") in ("tensor", "tensors"):
        return
    if isinstance(value, Made):
        named = _parts_of(value)
    elif isinstance(value, dict):
        named = ((_name_of(key, index), item) for index, (key, item) in enumerate(_entries(value)))
    else:
        named = ((str(index), item) for index, item in enumerate(value))
    for name, item in named:
        if name not in skipped:
            yield f"{place}.{name}".lstrip("."), item


def _entries(value: Mapping[Any, Any]) -> Iterable[tuple[Any, Any]]:
    """Return the entries of a dictionary, in JSON of one whose keys are no texts, too."""
    items = value.get("items") if value.get("$type") == "dict" else None
    pairs = [tuple(pair) for pair in items if isinstance(pair, list)] if isinstance(items, list) else []
    return pairs if pairs and all(len(pair) == 2 for pair in pairs) else value.items()


def _parts_of(made: Made) -> Iterator[tuple[str, Any]]:
    """Yield all that a pickle says of an object, but for the order of sets and for where a model lay."""
    yield "class", made.name
    if made.name == _DEVICE:
        return
    if made.name in _SETS:
        items = made.items or [item for part in made.arguments if isinstance(part, (list, tuple)) for item in part]
        yield from ((str(index), item) for index, item in enumerate(sorted(items, key=_order_of)))
        return
    yield from (("state", part) for part in [made.state] if part is not None)
    for name, parts in (("arguments", made.arguments), ("items", made.items), ("entries", made.entries)):
        yield from ((name, parts) for _ in [0] if parts)


def _order_of(item: Any) -> str:
    plain = _plain(item)
    return f"{type(item).__name__} {plain!r}"


def _name_of(key: Any, index: int) -> str:
    """Return the name of an entry; no two of a dictionary have the same."""
    if isinstance(key, (str, bytes, int, float, bool, type(None))):
        text = key if isinstance(key, str) else repr(key)
        return text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]} ({zlib.crc32(repr(text).encode()):08x})"
    return f"({index})"


def _tokenizer_files(found: Inspection) -> dict[str, str]:
    """Return name → size and checksum of each file of a tokenizer, or of all of them together where it is pickled."""
    if found.kind == file_contents.CHECKPOINT:
        names = (name for name in found.contents.held if "tokenizer/" in name or "image_processor/" in name)
        return {name: _mark_of_file(name, Path(found.contents.held[name]).read_bytes()) for name in sorted(names)}
    files: dict[str, str] = {}
    for index, embeddings in enumerate(embeddings_in(found.contents.state)):
        number = embeddings.params.get("part")
        folder = file_names.folder_of(number if isinstance(number, int) else index)
        for name, subfolder in file_names.ARCHIVES.items():
            stored = embeddings.params.get(name)
            held = stored.get("tensor") if isinstance(stored, dict) else None
            if isinstance(held, str) and held in found.contents.tensors:
                archived = _archived(found.contents.tensors[held], found)
                files.update({f"{folder}{subfolder}/{file}": mark for file, mark in archived.items()})
            elif stored is not None:
                files[f"{adapters.place_of(embeddings)}.{name}"] = _plain(found.content_of(stored))
    return files


def _archived(tensor: StoredTensor, found: Inspection) -> dict[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(tensor.read().numpy().astype(np.uint8).tobytes())) as archive:
            return {
                member.filename: _mark_of_file(member.filename, archive.read(member))
                if _has_special_tokens(member.filename) and member.file_size < 1 << 20
                else f"{member.file_size} bytes, {member.CRC:08x}"
                for member in archive.infolist()
            }
    except Exception as error:  # zipfile raises half a dozen kinds for what is damaged
        raise ModelFileError(
            f"Cannot read the tokenizer in '{found.contents.path}': {type(error).__name__}: {error}. The file is "
            "damaged. Copy or save it again."
        ) from error


def _mark(content: bytes) -> str:
    return f"{len(content)} bytes, {zlib.crc32(content):08x}"


def _mark_of_file(name: str, content: bytes) -> str:
    """Return size and checksum, of special tokens without the flags: a tokenizer that is read has them elsewhere."""
    if _has_special_tokens(name):
        with contextlib.suppress(ValueError, RecursionError):
            content = json.dumps(_without_flags(json.loads(content))).encode()
    return _mark(content)


def _has_special_tokens(name: str) -> bool:
    return name.rpartition("/")[2] == "special_tokens_map.json"


def _without_flags(read: Any) -> Any:
    if isinstance(read, list):
        return [_without_flags(each) for each in read]
    if isinstance(read, dict):
        return read["content"] if "content" in read else {name: _without_flags(each) for name, each in read.items()}
    return read
