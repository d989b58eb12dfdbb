"""What the user says when loading, and what one load knows while Flair stands between its parts.

Flair's ``load`` builds embeddings and fills modules with no argument of ours: they ask here what load they belong to.
"""

from __future__ import annotations

import contextvars
import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from flair_peft.errors import AdapterConfigError
from flair_peft.primitives.base_record import BaseRecord


@dataclass(frozen=True)
class LoadOptions:
    """What the user says when loading; see :func:`flair_peft.from_pretrained`.

    Attributes:
        placement: arguments of transformers and accelerate that spread a base over devices.
        source: the file or directory; beside the one, or in the other, its base may lie too.
        owns_state: the state dict was read for this load and belongs to nobody else.
        trust_file: the user knows who wrote the file and lets it do what it likes.
        offer: of a :class:`flair_peft.SharedBase`, see :class:`flair_peft.base.resolve.Offer`.
        is_sparing: gigabytes are read once, tensor by tensor, and their memory is given back at once.
    """

    base_model: str | Mapping[str, str] | None = None
    verify: bool | Literal["full"] = True
    trust_remote_code: bool = False
    token: str | bool | None = None
    cache_dir: str | None = None
    local_files_only: bool = False
    placement: Mapping[str, Any] = field(default_factory=dict)
    source: Path | None = None
    owns_state: bool = False
    trust_file: bool = False
    offer: Any = None
    is_sparing: bool = False

    def source_of(self, record: BaseRecord) -> tuple[str, str | None]:
        """Return name and revision of the base model to load: the one asked for, else the one recorded.

        Raises:
            AdapterConfigError: several bases are given and none is meant for this one.
        """
        given = self.base_model
        if isinstance(given, Mapping):
            if record.name not in given:
                raise AdapterConfigError(
                    f"Cannot tell which base model stands for '{record.name}': base_model names {sorted(given)}. Files "
                    "with several bases take a dictionary from each recorded name to a directory or Hub id. Add it."
                )
            given = given[record.name]
        if given is not None:
            return os.fspath(given), record.revision if given == record.name else None
        if self.source is not None and not Path(record.name).is_dir():
            beside = (self.source.parent if self.source.is_file() else self.source) / record.name
            if beside.is_dir():
                return str(beside), None
        return record.name, record.revision

    def arguments(self) -> dict[str, Any]:
        """Return arguments for ``from_pretrained`` of transformers."""
        asked = {
            "cache_dir": self.cache_dir,
            "local_files_only": self.local_files_only,
            "trust_remote_code": self.trust_remote_code,
        }
        given = {name: value for name, value in asked.items() if value not in (None, False)}
        return given if self.token is None else {**given, "token": self.token}  # False: send none, though there is one


@dataclass(frozen=True)
class LoadContext:
    """What one load hands on to its parts.

    Attributes:
        options: of its user.
        is_building: Flair builds the model: loads that it calls in turn are its own.
        left_to_flair: name of a model of Flair's own that Flair is looking for, once.
        inner: module prefix → parameters of embeddings that code around them makes; each is taken out once.
        bounds: of what may be built, see :func:`flair_peft.base.memory_check.bounded`.
        probes: embeddings that were filled, each with the probe that it has to replay when the model is complete.
    """

    options: LoadOptions = field(default_factory=LoadOptions)
    is_building: bool = False
    left_to_flair: str | None = None
    inner: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    bounds: Any = None
    probes: list[tuple[Any, Mapping[str, Any]]] | None = None


_NO_LOAD = LoadContext()
_current: contextvars.ContextVar[LoadContext] = contextvars.ContextVar("flair_peft_load", default=_NO_LOAD)


def current() -> LoadContext:
    """Return what is known of the load that is going on in this thread, or of none."""
    return _current.get()


def load_options() -> LoadOptions:
    """Return what the user of the load that is going on said."""
    return current().options


@contextmanager
def within_load(**changes: Any) -> Iterator[None]:
    """Inside, the load that is going on is known with these attributes, and what else it has."""
    token = _current.set(dataclasses.replace(current(), **changes))
    try:
        yield
    finally:
        _current.reset(token)
