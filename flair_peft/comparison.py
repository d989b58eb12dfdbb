"""What differs between two models in files: config, labels, tokenizer, tensors."""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from flair_peft import contents, keys, layout, outline, progress
from flair_peft.contents import StoredTensor
from flair_peft.errors import ModelFileError
from flair_peft.inspection import Inspection, params_in

_PIECE = 1 << 22
_MOST_SETTINGS = 1_000_000

# What is compared in another way, or says when and where a model was written and not what it is.
_NO_SETTINGS = frozenset(
    {
        *("state_dict", "versions", "model_card", "training_state", "format_version", "part", "probe", "stored_base"),
        *("peft_config", "tokenizer_data", "feature_extractor_data", "save_base", "untrained", "name"),
        *("transformers_version", "_name_or_path"),
    }
)


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
    return Comparison(
        config=_changes(_settings(first), _settings(second)),
        labels=_changes(_labels(first), _labels(second)),
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
        inside = found.inside_transformer(name)
        if found.part_of(name) == "tokenizer" or (inside is not None and tensor.storage in seen):
            continue
        seen.add(tensor.storage)
        spelled = name.removeprefix("state_dict/")
        if inside is not None:
            prefix = name.removesuffix(inside)
            around = layout.folder_of(places.get(prefix, 0)) if prefix in places else prefix
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
    for ours, theirs in zip(_pieces(first), _pieces(second), strict=True):
        same_gaps = ours.isnan() & theirs.isnan()
        difference = (ours - theirs).masked_fill(same_gaps | (ours == theirs), 0.0).abs().nan_to_num(math.inf)
        largest = max(largest, float(difference.max())) if difference.numel() else largest
        square += float(difference.square().sum())
        norm += float(ours.nan_to_num(0.0).square().sum())
    if largest == 0.0:
        return None
    return ValueChange(name, largest, math.sqrt(square) / math.sqrt(norm) if norm else math.inf)


def _pieces(tensor: StoredTensor) -> Iterator[torch.Tensor]:
    flat = tensor.read().reshape(-1)
    return (flat[start : start + _PIECE].double() for start in range(0, flat.numel(), _PIECE))


def _changes(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[Change]:
    names = [*first, *(name for name in second if name not in first)]
    return [Change(name, first.get(name), second.get(name)) for name in names if first.get(name) != second.get(name)]


def _settings(found: Inspection) -> dict[str, Any]:
    settings: dict[str, Any] = {"class": found.flair_class}
    for index, adapter in enumerate(found.adapters):
        around = f"adapter {index + 1}: " if len(found.adapters) > 1 else ""
        settings[f"{around}method"] = adapter.method
        settings.update({f"{around}{name}": value for name, value in adapter.settings.items()})
        base = {name: value for name, value in adapter.base.items() if name != "left_out"}
        settings.update({f"{around}base {name}": value for name, value in base.items()})
    return {**settings, **_flat(found)}


def _flat(found: Inspection) -> dict[str, Any]:
    """Return all plain values of a state under the names on the way to them.

    Raises:
        ModelFileError: there are more than any model has.
    """
    flat: dict[str, Any] = {}
    seen: set[int] = set()
    pending: list[tuple[str, Any]] = [("", found.contents.state)]
    while pending:
        place, value = pending.pop()
        if isinstance(value, outline.Made):
            value = {"class": value.name, "state": value.state, "items": value.items}
        if isinstance(value, (dict, list, tuple)):
            if id(value) not in seen and len(place) < 1_000:
                seen.add(id(value))
                pending.extend(_inside(place, value))
        elif isinstance(value, (str, int, float, bool)):
            flat[place] = value
        if len(flat) + len(pending) > _MOST_SETTINGS:
            raise ModelFileError(
                f"Cannot compare '{found.contents.path}': it has more than {_MOST_SETTINGS} settings. No model of "
                "Flair has so many. Pass a file that model.save() or Flair's trainer wrote."
            )
    return flat


def _inside(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value.get("$type") in ("tensor", "tensors", "bytes_io", "dictionary"):
        return
    named = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in named:
        text = str(name)[:200] if isinstance(name, (str, int)) else ""
        is_dictionary = isinstance(item, outline.Made) and item.name == "flair.data.Dictionary"
        if text not in _NO_SETTINGS and not is_dictionary:
            yield f"{place}.{text}".lstrip("."), item


def _labels(found: Inspection) -> dict[str, Any]:
    named = {}
    for name, labels in found.labels.items():
        named[f"{name} type"] = labels.type
        named.update({f"{name} {index}": item for index, item in enumerate(labels.items)})
    return named


def _tokenizer_files(found: Inspection) -> dict[str, str]:
    """Return name → size and checksum of each file of a tokenizer; of those in pickles only the size is known."""
    if found.kind == contents.CHECKPOINT:
        root = found.contents.place
        names = (name for name in found.contents.files if "tokenizer/" in name or "image_processor/" in name)
        return {name: _mark((root / name).read_bytes()) for name in sorted(names)}
    files: dict[str, str] = {}
    for index, (place, params) in enumerate(params_in(found.contents.state)):
        number = params.get("part")
        folder = layout.folder_of(number if isinstance(number, int) else index)
        for name, subfolder in layout.ARCHIVES.items():
            stored = params.get(name)
            held = stored.get("tensor") if isinstance(stored, dict) else None
            if isinstance(held, str) and held in found.contents.tensors:
                archived = _archived(found.contents.tensors[held], found)
                files.update({f"{folder}{subfolder}/{file}": mark for file, mark in archived.items()})
            elif stored is not None:
                files[f"{place}.{name}"] = f"{found.size_of(stored)} bytes"
    return files


def _archived(tensor: StoredTensor, found: Inspection) -> dict[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(tensor.read().numpy().astype(np.uint8).tobytes())) as archive:
            return {member.filename: f"{member.file_size} bytes, {member.CRC:08x}" for member in archive.infolist()}
    except Exception as error:  # zipfile raises half a dozen kinds for what is damaged
        raise ModelFileError(
            f"Cannot read the tokenizer in '{found.contents.path}': {type(error).__name__}: {error}. The file is "
            "damaged. Copy or save it again."
        ) from error


def _mark(content: bytes) -> str:
    return f"{len(content)} bytes, {zlib.crc32(content):08x}"
