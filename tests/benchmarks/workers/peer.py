"""What a library has to do for the comparison: a classifier of two labels, on the vector of the first token."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Texts = Sequence[str]
LABELS = ("bad", "good")


class Peer(ABC):
    """One library's way to do it, as its documentation says.

    Args:
        folder: holds ``base``, the base model, and ``material/NUMBER``: an adapter as PEFT writes it and a head.
        device: where the models are to be.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder = folder
        self.base = str(folder / "base")
        self.device = device

    def material(self, number: int) -> Path:
        """Return the folder of an adapter and a head that all peers start from."""
        return self.folder / "material" / str(number)

    def head(self, number: int) -> dict[str, Any]:
        """Return the weight, (labels, hidden size), and the bias, (labels), of a head, as nested lists."""
        return json.loads((self.material(number) / "head.json").read_text(encoding="utf-8"))

    @abstractmethod
    def build(self, number: int) -> Any:
        """Return a model with this adapter and head, ready to be trained."""

    @abstractmethod
    def save(self, model: Any, path: Path) -> None:
        """Write what is needed, beside the base, to load the model again."""

    @abstractmethod
    def load(self, path: Path, *, prove: bool) -> Any:
        """Return a model that predicts what the saved one did; ``prove=False`` leaves checks out that can be."""

    @abstractmethod
    def scores(self, model: Any, texts: Texts) -> Any:
        """Return the probability of each label, (texts, labels), in the order of ``LABELS``."""

    @abstractmethod
    def batch(self, texts: Texts, targets: Sequence[int]) -> Any:
        """Return a training batch as the library's own loop has it before a step."""

    @abstractmethod
    def loss(self, model: Any, batch: Any) -> Any:
        """Return the mean cross entropy of a batch, with its graph."""

    def forget(self, batch: Any) -> None:
        """Let go of what a step left in the batch; nothing in most libraries."""
        return

    @abstractmethod
    def modules(self, model: Any) -> Sequence[Any]:
        """Return the torch modules that hold all parameters of a model."""

    @abstractmethod
    def open(self) -> Any:
        """Return a base for many adapters."""

    @abstractmethod
    def add(self, many: Any, path: Path, *, prove: bool) -> Any:
        """Return the key of one more model on this base."""

    @abstractmethod
    def scores_of(self, many: Any, key: Any, texts: Texts) -> Any:
        """Return the probabilities that one of many models gives."""

    def scores_of_mixed(self, many: Any, parts: Mapping[Any, Texts]) -> list[Any]:
        """Return the probabilities of each part by its own model, from one batch for all."""
        raise NotImplementedError
