"""Offloading of adapters: beyond a budget of memory, the least recently used are left on disk until they are needed."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flair_peft.adapter import keys
from flair_peft.embeddings.exact_values import exact_value, exact_values, settle_
from flair_peft.primitives import mapped_memory
from flair_peft.primitives.fingerprint import are_same_bits

log = logging.getLogger("flair_peft")


@dataclass
class _Adapter:
    """The adapter of one embeddings module, and its tensors as its file holds them.

    Attributes:
        files: name of a parameter → the same values, mapped from the file.
        places: name of a parameter that was left on disk → device and dtype that it has in use.
        users: forward passes that are going on.
        is_changed: whether none of its tensors was found to be as the file has it.
    """

    embeddings: weakref.ref[torch.nn.Module]
    files: dict[str, torch.Tensor]
    places: dict[str, tuple[torch.device, torch.dtype]] = field(default_factory=dict)
    users: int = 0
    is_changed: bool = False


class AdapterMemory:
    """Keeps the adapters of many models within a number of bytes.

    An adapter that is left on disk has its tensors mapped from its file: whoever reads them gets the right values, and
    the operating system reads them. What differs from the file, bit by bit, is never offloaded. Adapters in use or in
    training stay, and so does the last one that was used, whatever the budget.
    """

    def __init__(self, budget: int) -> None:
        """Keep adapters within so many bytes."""
        self._budget = budget
        self._adapters: OrderedDict[int, _Adapter] = OrderedDict()
        self._lock = threading.RLock()

    def __deepcopy__(self, memo: dict[int, Any]) -> AdapterMemory:
        return self  # a copied model is none of those that are kept

    def admit(self, embeddings: Any, path: Path) -> None:
        """Take in embeddings that were just loaded from a checkpoint.

        Args:
            embeddings: whose ``model`` is a PEFT model.
            path: of the adapter's file, in PEFT's format.
        """
        stored = {}
        # A model that was replaced since it was loaded stays in memory: nothing of it is as the file has it.
        with contextlib.suppress(FileNotFoundError), safe_open(path, framework="pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        match = keys.match_keys(stored, embeddings.model.state_dict())
        files = {name: stored[theirs] for name, theirs in match.renamed.items()}
        with self._lock:
            self._adapters[id(embeddings)] = _Adapter(weakref.ref(embeddings), files)
            self._make_room()

    def forget(self, embeddings: torch.nn.Module) -> None:
        """Reload the adapter, and leave it in memory from now on."""
        with self._lock:
            adapter = self._adapters.pop(id(embeddings), None)
            if adapter is not None:
                _reload_(adapter, embeddings)

    @contextlib.contextmanager
    def using(self, embeddings: torch.nn.Module) -> Iterator[None]:
        """Inside, the adapter is in memory; others may have to make room for it."""
        adapter = self._take(embeddings)
        try:
            yield
        finally:
            if adapter is not None:
                with self._lock:
                    adapter.users -= 1

    def _take(self, embeddings: torch.nn.Module) -> _Adapter | None:
        with self._lock:
            adapter = self._adapters.get(id(embeddings))
            if adapter is None or adapter.embeddings() is not embeddings:
                return None
            self._adapters.move_to_end(id(embeddings))
            adapter.users += 1
            _reload_(adapter, embeddings)
            self._make_room()
            return adapter

    def _make_room(self) -> None:
        alive = self._alive()
        excess = sum(_size(adapter, embeddings) for adapter, embeddings in alive if not adapter.places) - self._budget
        for adapter, embeddings in alive[:-1]:
            is_busy = adapter.users or adapter.is_changed or embeddings.training
            if excess > 0 and not adapter.places and not is_busy:
                size = _size(adapter, embeddings)
                _offload_(adapter, embeddings)
                excess -= size if adapter.places else 0

    def _alive(self) -> list[tuple[_Adapter, Any]]:
        """Return the adapters of models that are in use, with the embeddings, the one that was used last at the end."""
        found = [(key, adapter, adapter.embeddings()) for key, adapter in self._adapters.items()]
        for key, _, embeddings in found:
            if embeddings is None:
                del self._adapters[key]
        return [(adapter, embeddings) for _, adapter, embeddings in found if embeddings is not None]


def _offload_(adapter: _Adapter, embeddings: Any) -> None:
    """Replace every tensor that is as the file has it by that of the file, which takes no memory until it is read."""
    model = embeddings.model
    settle_(model)
    exact = exact_values(model)
    for name, parameter in model.named_parameters():
        stored = adapter.files.get(name)
        value = exact_value(parameter, exact[name]) if name in exact else parameter
        if stored is not None and are_same_bits(value.cpu(), stored):
            adapter.places[name] = parameter.device, parameter.dtype
            parameter.data = stored
            if name in exact:
                exact[name] = stored
    for tensor in adapter.files.values():
        mapped_memory.page_out(tensor)
    if not adapter.places:
        adapter.is_changed = True
        log.info("An adapter stays in memory: its tensors are not those of its file any more.")


def _reload_(adapter: _Adapter, embeddings: Any) -> None:
    """Give every tensor that was offloaded, and was not replaced since, the device and the dtype that it had."""
    places, adapter.places = adapter.places, {}
    if places:
        parameters = dict(embeddings.model.named_parameters())
        for name, place in places.items():
            if name in parameters and parameters[name].data_ptr() == adapter.files[name].data_ptr():
                parameters[name].data = adapter.files[name].to(*place)


def _size(adapter: _Adapter, embeddings: Any) -> int:
    """Return the bytes that the adapter takes in memory, with the exact values of what was narrowed."""
    sizes = (p.nbytes for name, p in embeddings.model.named_parameters() if name in adapter.files)
    return sum(sizes) + sum(tensor.nbytes for tensor in exact_values(embeddings.model).values())
