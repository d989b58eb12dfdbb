"""One set of weights for many models: memory is copied once it is written to, whoever writes and however.

By the system, page by page, where a model maps the weights from their file; else by torch, tensor by tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from flair_peft.primitives import building, host_internals, mapped_memory


class SharedWeights:
    """The weights of a base, of which each model gets tensors of its own that take memory where they are written to.

    Args:
        weights: of the base; nobody writes to them.
        parent: the weights of a base that has some of the same: these are shared with its models, too.
    """

    def __init__(self, weights: Iterable[torch.Tensor], *, parent: SharedWeights | None = None) -> None:
        self._parent = parent
        self._places = {_place(tensor) for tensor in weights}
        # Place of a weight → what torch clones of it share until one of them is written to.
        self._cloned: dict[tuple[int, int], torch.Tensor] = {}
        self._is_in_memory = False

    def copies_of(self, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return tensors with the values of some of the weights, which can be written to."""
        tensors = [weight.detach() for weight in weights]
        with building.lock, torch.inference_mode(False):
            mapped = [None] * len(tensors) if self._root._is_in_memory else mapped_memory.map_again(tensors)
            return [self._clone(t) if again is None else again for t, again in zip(tensors, mapped, strict=True)]

    def hold_in_memory(self) -> None:
        """From now on copies are clones of one set of weights in memory, instead of mappings of the file.

        The system counts mapped pages for each mapping, as if each took memory.
        """
        self._root._is_in_memory = True

    def have_memory_of(self, tensors: Iterable[torch.Tensor]) -> bool:
        """Whether all these are clones that share their memory still: nobody has written to one of them."""
        shared = {mapped_memory.address(tensor) for tensor in self._all_cloned()}
        return all(mapped_memory.address(tensor) in shared for tensor in tensors)

    @property
    def _root(self) -> SharedWeights:
        return self if self._parent is None else self._parent._root

    def _clone(self, tensor: torch.Tensor) -> torch.Tensor:
        place = _place(tensor)
        if self._parent is not None and place in self._parent._places:
            return self._parent._clone(tensor)
        shared = self._cloned.get(place, tensor)
        clone = _lazy_clone(shared)
        if clone is None and shared is tensor:
            shared = tensor.clone()  # mapped memory is nothing that torch copies on write
            mapped_memory.page_out(tensor)
            clone = _lazy_clone(shared)
        self._cloned[place] = shared
        return shared.clone() if clone is None else clone

    def _all_cloned(self) -> Iterator[torch.Tensor]:
        yield from self._cloned.values()
        if self._parent is not None:
            yield from self._parent._all_cloned()


def _lazy_clone(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a clone that torch gives memory of its own when one of the two is written to, if it can do that."""
    if tensor.device.type not in ("cpu", "cuda"):
        return None  # elsewhere torch does not promise that every write is seen (pytorch#150569)
    try:
        return host_internals.lazy_clone(tensor)
    except RuntimeError:
        return None


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    """Return what tells a base's tensors apart as long as it lives: the memory of a storage can move."""
    return host_internals.storage_identity(tensor), int(tensor.storage_offset())
