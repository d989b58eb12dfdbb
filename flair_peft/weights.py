"""Stored weights ⇄ embeddings: every tensor of a file is used exactly once, or an error says which and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from flair.embeddings.transformer import TransformerBaseEmbeddings
from peft import PeftConfig
from transformers import PreTrainedModel

from flair_peft import adapters, keys
from flair_peft.errors import StateMismatchError, name_some


class StoredWeights(TransformerBaseEmbeddings):
    """The part of embeddings that fills them from a state dict.

    Embeddings are built from stored parameters first and get their weights later, when Flair loads the whole model.
    """

    name: str
    model: Any
    base_model: PreTrainedModel
    adapter_config: PeftConfig

    _awaits_weights = False
    _is_strict = True
    # An adapter that is computed from the base's weights waits until these are there.
    _pending_config: PeftConfig | None = None
    _pending_state: Mapping[str, torch.Tensor] = {}

    def _await_weights(self, base: PreTrainedModel, config: PeftConfig) -> None:
        """Take a base whose weights are not initialised, and an adapter of the shape that the config gives."""
        self._awaits_weights = True
        if adapters.is_derived_from_base(config):
            self.model, self._pending_config = base, config
        else:
            self.model = adapters.inject_skeleton(base, config)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights as torch does; nothing is changed if they do not fit.

        Raises:
            StateMismatchError: ``strict``, and a tensor is missing, left over, ambiguous or of another shape.
        """
        # torch does not tell its modules: they are always asked to be strict.
        self._is_strict = strict
        try:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        finally:
            self._is_strict = True

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Bring the keys of a file to those of this model, then load; see :mod:`flair_peft.keys`.

        Raises:
            StateMismatchError: ``strict``, and a tensor is missing, left over, ambiguous or of another shape.
        """
        state_dict.pop(f"{prefix}model.embeddings.position_ids", None)  # written by transformers before 4.31
        mine = f"{prefix}model."
        stored = {key.removeprefix(mine): key for key in state_dict if key.startswith(mine)}
        if self._pending_config is not None:
            self._inject_into_stored_base({key: state_dict[stored[key]] for key in stored})
        own = self.model.state_dict()
        match = keys.match_keys(stored, own)
        # A module around the embeddings may load its own tensors alone; torch reports ours as missing if it minds.
        is_left_out = bool(prefix) and not stored and not self._awaits_weights
        if self._is_strict and not is_left_out:
            self._check_match(match, own, {key: state_dict[stored[key]] for key in stored})
        tensors = {key: state_dict.pop(stored[theirs]) for key, theirs in match.renamed.items()}
        state_dict.update({mine + key: tensor for key, tensor in tensors.items()})
        if self._awaits_weights:
            self._take_dtypes_of(tensors)
            self._awaits_weights = bool(match.missing or match.ambiguous)
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _inject_into_stored_base(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the base, then add the adapter that is computed from its weights."""
        own = self.base_model.state_dict()
        named = ((keys.base_key(key), tensor) for key, tensor in tensors.items())
        base_tensors = {name: tensor for name, tensor in named if name is not None and name in own}
        self._check_match(keys.match_keys(base_tensors, own), own, base_tensors)
        self._take_dtypes_of(base_tensors)
        self.base_model.load_state_dict(base_tensors)
        assert self._pending_config is not None
        self.model = adapters.inject(self.base_model, self._pending_config)
        adapters.set_derived_state_(self.model, self._pending_state)
        self._pending_config, self._pending_state = None, {}

    def _check_match(
        self, match: keys.KeyMatch, own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
    ) -> None:
        shapes = [
            f"{key} ({_shape(stored[theirs])} instead of {_shape(own[key])})"
            for key, theirs in match.renamed.items()
            if _shape(stored[theirs]) != _shape(own[key])
        ]
        problems = {
            "missing in the file": match.missing,
            "not known to the model": match.unexpected,
            "meaning the same tensor": match.ambiguous,
            "of another shape": shapes,
        }
        found = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items() if names)
        if found:
            raise StateMismatchError(
                f"Cannot load the weights of '{self.name}': {found}. The adapter is "
                f"{adapters.describe(self.adapter_config)} on {type(self.base_model).__name__}. Load the "
                "file with the PEFT config and the base model that it was trained with."
            )

    def _take_dtypes_of(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give each weight the dtype that it was stored in: a base can hold several, as T5 does in fp16."""
        for name, parameter in [*self.model.named_parameters(), *self.model.named_buffers()]:
            stored = tensors.get(name)
            if stored is not None and parameter.is_floating_point() and parameter.dtype != stored.dtype:
                parameter.data = parameter.data.to(stored.dtype)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
