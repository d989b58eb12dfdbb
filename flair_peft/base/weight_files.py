"""The files that hold the weights of a base, in a directory or on the Hub, and what their headers say."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from transformers.modeling_utils import _add_variant, load_state_dict
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
)

# One file and the index of several, in the order in which transformers looks for them.
_SAFETENSORS, _PICKLED = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME), (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
NAMES = (*_SAFETENSORS, *_PICKLED)

# How a file of a base is reached.
REACHING = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def find_file(source: str, name: str, kwargs: Mapping[str, Any]) -> Path | None:
    """Return a file of a directory or of a Hub id, downloaded if need be; ``None`` if there is none."""
    kinds = ("missing_entries", "gated_repo", "connection_errors")
    settings = {f"_raise_exceptions_for_{kind}": False for kind in kinds}
    found = cached_file(source, name, **reaching(kwargs), **settings)
    return None if found is None else Path(found)


def reaching(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return those arguments for ``from_pretrained`` that say how files are reached."""
    return {name: kwargs[name] for name in REACHING if kwargs.get(name) is not None}


def find(source: str, kwargs: Mapping[str, Any]) -> list[Path]:
    """Return the files from which transformers reads the weights of a base, downloaded if need be; none without one.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: an index is damaged.
    """
    only_safe = kwargs.get("use_safetensors")
    kinds = ([] if only_safe is False else [_SAFETENSORS]) + ([] if only_safe else [_PICKLED])
    for whole, index in kinds:
        found = find_file(source, _add_variant(whole, kwargs.get("variant")), kwargs)
        if found is not None:
            return [found]
        parts = find_file(source, _add_variant(index, kwargs.get("variant")), kwargs)
        if parts is not None:
            names = sorted(set(json.loads(parts.read_text(encoding="utf-8"))["weight_map"].values()))
            paths = [find_file(source, name, kwargs) for name in names]
            return [path for path in paths if path is not None]
    return []


def names_of_weights(source: str, kwargs: Mapping[str, Any]) -> list[str]:
    """Return the names of the weights in the files of a base, as they are spelt there; none if they cannot be read."""
    with contextlib.suppress(Exception):
        return sorted(name for path in find(source, kwargs) for name in _names_in(path))
    return []


def _names_in(path: Path) -> list[str]:
    if path.suffix == ".safetensors":
        return [entry.name for entry in read_header(path)]
    return list(load_state_dict(str(path), map_location="meta"))


class Entry(NamedTuple):
    """What the header of a safetensors file says of one tensor; its dtype in the words of the format: ``"BF16"``."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numbers(self) -> int:
        """How many numbers are in the tensor."""
        return math.prod(self.shape)

    @property
    def itemsize(self) -> float:
        """How many bytes a number takes, which can be less than one."""
        bits = re.search(r"\d+", self.dtype)
        return int(bits.group()) / 8 if bits else 1  # BOOL


def read_header(path: Path) -> Iterator[Entry]:
    """Yield what the header of a safetensors file says of each tensor; no tensor is read.

    Raises:
        OSError, SafetensorError: it cannot be read.
    """
    with safe_open(path, framework="np") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            part = file.get_slice(name)
            yield Entry(name, part.get_dtype(), tuple(part.get_shape()))
