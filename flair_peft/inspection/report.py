"""What a model file says of its model: method, ranks, base, labels, sizes, and what it lacks."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from flair_peft.adapter import keys, traits
from flair_peft.inspection import file_contents
from flair_peft.inspection.adapters import (
    Adapter,
    OtherEmbeddings,
    PlainTransformer,
    find_adapters,
    find_others,
    find_plain,
)
from flair_peft.inspection.file_contents import ADAPTER, CHECKPOINT, Contents, StoredTensor
from flair_peft.inspection.labels import Labels, find_labels
from flair_peft.storage import file_names
from flair_peft.torchfile.stand_ins import Blob, Made
from flair_peft.torchfile.state_tree import embeddings_in

FORMAT = 1
"""Of :meth:`Inspection.to_dict`; it grows when a key changes its meaning or goes away."""

PARTS = ("adapter", "head", "embeddings", "base", "tokenizer", "training", "other")

_STATE = "state_dict/"
_TRAINING = "training_state/"
_TRANSFORMER = re.compile(r"(?:[^.]+\.)*?model\.")
_EMBEDDINGS = re.compile(r"(?:model_states/[^/]+/)?state_dict/(?:\w+_)?embeddings\.")


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
        return tuple(find_adapters(self.contents))

    @cached_property
    def transformers(self) -> tuple[PlainTransformer, ...]:
        """The transformer embeddings of a model without an adapter, in the order of the file."""
        return () if self.adapters or self.kind == ADAPTER else tuple(find_plain(self.contents))

    @cached_property
    def others(self) -> tuple[OtherEmbeddings, ...]:
        """The embeddings without a transformer of their own, in the order of the file."""
        return tuple(find_others(self.contents))

    @cached_property
    def labels(self) -> dict[str, Labels]:
        """Task and field → labels."""
        return dict(find_labels(self.contents.state))

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
        return {name: value for name, value in plain if isinstance(value, str) or math.isfinite(value)}

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
        return {part: dict(found[part]) for part in ("adapter", "head", "embeddings", "base") if part in found}

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
            return "head" if _EMBEDDINGS.match(name) is None else "embeddings"
        if not self.adapters:
            return "base"
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
            "transformers": [dataclasses.asdict(transformer) for transformer in self.transformers],
            "other_embeddings": [dataclasses.asdict(embeddings) for embeddings in self.others],
        }

    def _tokenizer_bytes(self) -> int:
        folders = [f"{folder}/" for folder in file_names.ARCHIVES.values()]
        in_files = sum(size for name, size in self.contents.files.items() if any(part in name for part in folders))
        blobs = (found.params.get(name) for found in embeddings_in(self.contents.state) for name in file_names.ARCHIVES)
        contents = map(self.content_of, blobs)
        return in_files + sum(each.length if isinstance(each, Blob) else len(each) for each in contents)

    @staticmethod
    def content_of(stream: Any) -> bytes | Blob:
        """Return what is in an archive in a pickle: a stream, whose state is its bytes and a position."""
        if isinstance(stream, Made):
            given = (item for item in (stream.state, stream.arguments) if isinstance(item, tuple) and item)
            stream = next(given, (b"",))[0]
        return stream if isinstance(stream, (Blob, bytes)) else b""


def inspect(path: str | Path) -> Inspection:
    """Return what a checkpoint, a ``.pt`` file of Flair or an adapter of PEFT holds; nothing is loaded or run.

    Raises:
        ModelFileError: there is nothing of that kind, or it is damaged.
    """
    return Inspection(file_contents.read_contents(Path(path)))


def _find_missing(found: Inspection) -> Iterator[str]:
    yield from found.contents.damage
    for base in (transformer.base for transformer in found.transformers):
        if base["left_out"]:
            yield f"{base['left_out']} weights of the base, which was found at '{base['name']}'"
    for adapter in found.adapters:
        of = f" of {adapter.place}" if len(found.adapters) > 1 else ""
        if not adapter.has_config:
            unknown = f"; the tensors cannot tell {', '.join(adapter.open)}" if adapter.open else ""
            yield f"the PEFT config{of}, which stock Flair does not store{unknown}"
        if found.kind == ADAPTER or adapter.base.get("left_out") or not found.holds_base:
            name = adapter.base["name"]
            yield f"the base's weights{of}, which were found at '{name}'" if name else f"the base's weights{of}"


def _find_notes(found: Inspection) -> Iterator[str]:
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
        if isinstance(init, str) and traits.of_init(init).rewrites_base:
            yield f"the initialisation '{init}' rewrote weights of the base"
        if adapter.base["needs_remote_code"]:
            yield "the base comes with code of its own: loading needs trust_remote_code=True"


def _list(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _version(value: Any) -> str:
    if isinstance(value, Made):
        value = next((item for item in value.arguments if isinstance(item, str)), "?")
    return str(value)[:100]
