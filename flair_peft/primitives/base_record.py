"""Where a base model comes from, as files say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from flair_peft.errors import ModelFileError

# What transformers needs again to find the same weights. Files name no other argument of from_pretrained: these are
# the ones that neither run code nor reach for anything but weights.
_KEPT_ARGUMENTS = ("subfolder", "variant", "use_safetensors")

_OF_READ = ("read_fingerprint", "read_full_fingerprint")


@dataclass(frozen=True)
class BaseRecord:
    """What a checkpoint says of its base model: enough to find it again, and to know it.

    Attributes:
        name: Hub id, or absolute path of a directory.
        revision: commit on the Hub; ``None`` for a directory.
        vocabulary_size: rows of the input embeddings in the source, without rows that were added.
        fingerprint: digest of a sample of all weights, see :func:`flair_peft.primitives.fingerprint.sampled`.
        full_fingerprint: digest of all weights.
        read_fingerprint: as ``fingerprint``, without weights that nobody reads, such as poolers.
        read_full_fingerprint: as ``full_fingerprint``, without these.
        dtype: of the weights that the fingerprints are of, such as ``"float32"``.
        quantization: settings that transformers quantised the weights with, or ``None``.
        attention: the attention implementation, such as ``"sdpa"``.
        needs_remote_code: whether the model comes with code of its own, which no file switches on.
        arguments: further arguments of ``from_pretrained``.
    """

    name: str
    revision: str | None = None
    vocabulary_size: int | None = None
    fingerprint: str | None = None
    full_fingerprint: str | None = None
    read_fingerprint: str | None = None
    read_full_fingerprint: str | None = None
    dtype: str | None = None
    quantization: dict[str, Any] | None = None
    attention: str | None = None
    needs_remote_code: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, stored: Any) -> BaseRecord:
        """Return the record whose fields a file holds as plain values.

        Raises:
            ModelFileError: it is damaged.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        if not isinstance(stored, Mapping) or not set(stored) <= known or not _is_sound(stored):
            raise _damaged(stored)
        return cls(**stored)


@dataclass(frozen=True)
class StoredBase:
    """How a file stores the base of one embeddings module.

    Attributes:
        record: the base that the file was made from, if that was found when it was written.
        left_out: state-dict keys of tensors that are the base's own, bit by bit, or random there and unused.
        added_rows: rows that the input embeddings have beyond those of the base, (count, length).
    """

    record: BaseRecord | None = None
    left_out: frozenset[str] = frozenset()
    added_rows: torch.Tensor | None = None

    @property
    def is_needed(self) -> bool:
        """Whether the file lacks weights that only the base has."""
        return bool(self.left_out)

    def to_dict(self) -> dict[str, Any]:
        """Return the same as plain values and a tensor."""
        record = None if self.record is None else dataclasses.asdict(self.record)
        # Beside the record, in which readers of format 1 refuse what they do not know.
        read = None if record is None else {name: record.pop(name) for name in _OF_READ}
        return {"record": record, "read": read, "left_out": sorted(self.left_out), "added_rows": self.added_rows}

    @classmethod
    def from_dict(cls, stored: Any) -> StoredBase:
        """Return what :meth:`to_dict` wrote; nothing stands for a file that says nothing of its base.

        Raises:
            ModelFileError: it is damaged.
        """
        stored = {} if stored is None else stored
        if not isinstance(stored, Mapping):
            raise _damaged(stored)
        record, left_out, rows = (stored.get(name) for name in ("record", "left_out", "added_rows"))
        read = stored.get("read") or {}
        is_sound = isinstance(left_out, list | None) and all(isinstance(key, str) for key in left_out or ())
        is_matrix = isinstance(rows, torch.Tensor) and rows.dim() == 2 and rows.is_floating_point()
        is_known = isinstance(read, Mapping) and set(read) <= set(_OF_READ) and isinstance(record, Mapping | None)
        if not is_sound or (left_out and record is None) or not (rows is None or is_matrix) or not is_known:
            raise _damaged(stored)
        known = None if record is None else BaseRecord.from_dict({**record, **read})
        return cls(known, frozenset(left_out or ()), rows)


def kept_arguments(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments of ``from_pretrained`` that files keep."""
    return {name: kwargs[name] for name in _KEPT_ARGUMENTS if kwargs.get(name) is not None}


def _damaged(stored: Any) -> ModelFileError:
    return ModelFileError(
        f"Cannot read what the file says of its base model: {stored!r:.200}. It is damaged or was not written by "
        "flair_peft. Copy or save it again."
    )


def _is_sound(stored: Mapping[str, Any]) -> bool:
    texts = ("revision", "fingerprint", "full_fingerprint", *_OF_READ, "dtype", "attention")
    arguments, size = stored.get("arguments", {}), stored.get("vocabulary_size")
    return (
        isinstance(stored.get("name"), str)
        and all(isinstance(stored.get(name), str | None) for name in texts)
        and (size is None or (type(size) is int and 0 < size < 1 << 31))
        and isinstance(stored.get("quantization"), dict | None)
        and isinstance(stored.get("needs_remote_code", False), bool)
        and isinstance(arguments, dict)
        and all(name in _KEPT_ARGUMENTS and isinstance(value, str | bool) for name, value in arguments.items())
    )
