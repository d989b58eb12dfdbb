"""What is known of embeddings between their building from stored parameters and their filling from a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig

from flair_peft.adapter import keys
from flair_peft.primitives.base_record import StoredBase


@dataclass
class PendingLoad:
    """What the next state dict has to fill, and what its file says of the result; gone once that is checked.

    Attributes:
        left_out: state-dict keys, in canonical form, that the state dict need not hold: those weights are in place.
        is_first: whether the embeddings have no weights yet, and cannot embed; False for those whose weights are read
            again.
        is_complete: whether a first load brought all weights.
        adapter_config: of an adapter that is computed from the base's weights, and is added once these are there.
        derived_state: tensors of such an adapter that are no weights.
        probe: what the embeddings have to give for a short sentence.
        untrained: names of parameters that were never updated before the file was written; ``None`` if it does not say.
        trained_base: names of the base's own weights that were trained.
        in_place: state-dict keys of what the load put in place without torch, which reports them as missing.
    """

    left_out: frozenset[str] = frozenset()
    is_first: bool = True
    is_complete: bool = False
    adapter_config: PeftConfig | None = None
    derived_state: Mapping[str, torch.Tensor] = field(default_factory=dict)
    probe: Mapping[str, Any] | None = None
    untrained: Sequence[str] | None = None
    trained_base: Sequence[str] = ()
    in_place: frozenset[str] = frozenset()

    @classmethod
    def from_params(cls, params: Mapping[str, Any]) -> PendingLoad:
        """Return what the parameters of stored embeddings say.

        Raises:
            ModelFileError: what they say of the base is damaged.
        """
        return cls(
            left_out=canonical(StoredBase.from_dict(params.get("stored_base"))),
            derived_state=params.get("derived_state", {}),
            probe=params.get("probe"),
            untrained=params.get("untrained"),
            trained_base=params.get("trained_base", []),
        )


def canonical(stored: StoredBase) -> frozenset[str]:
    """Return the state-dict keys that a file leaves out, in canonical form."""
    return frozenset(map(keys.canonical_key, stored.left_out))
