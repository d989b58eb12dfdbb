"""Stored weights ⇄ embeddings: every tensor of a file is used exactly once, or an error says which and why."""

from __future__ import annotations

import dataclasses
import logging
from abc import abstractmethod
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch
from flair.embeddings.transformer import TransformerBaseEmbeddings
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, keys, methods
from flair_peft.base import learned, memory_check, quantisation
from flair_peft.base.frozen import FrozenBase
from flair_peft.embeddings import vector_probe
from flair_peft.errors import StateMismatchError, name_some
from flair_peft.primitives import fingerprint, load_context, mapped_memory
from flair_peft.primitives.fingerprint import are_same_bits

log = logging.getLogger("flair_peft")


def _taken_from(inner: dict[str, Mapping[str, Any]], prefix: str) -> Mapping[str, Any] | None:
    """Return, once, the parameters for a prefix; models inside a model load their parts one after the other."""
    ending = (path for path in inner if prefix and f".{path}".endswith(f".{prefix}"))
    found = prefix if prefix in inner else next(ending, None)
    return None if found is None else inner.pop(found)


class StoredWeights(TransformerBaseEmbeddings):
    """The part of embeddings that fills them from a state dict.

    Embeddings are built from stored parameters first and get their weights later, when Flair loads the whole model.
    Tensors that a file leaves out are those of the base model, which is in place by then.
    """

    name: str
    model: Any
    base_model: PreTrainedModel
    adapter_config: PeftConfig

    _awaits_weights = False
    _is_first_load = False
    _is_strict = True
    # An adapter that is computed from the base's weights waits until these are there.
    _pending_config: PeftConfig | None = None
    _pending_state: Mapping[str, torch.Tensor] = {}
    _pending_probe: Mapping[str, Any] | None = None
    _pending_untrained: Sequence[str] = ()
    _pending_trained: Sequence[str] = ()
    # Digests of the parameters that were not seen to change since they were made.
    _start: dict[str, str] = {}  # noqa: RUF012 - replaced, never written to
    # The base whose storage this model shares with others, if it does.
    _frozen: FrozenBase | None = None
    # State-dict keys, in canonical form, that the state to be loaded need not hold.
    _left_out: frozenset[str] = frozenset()
    _settled: frozenset[str] = frozenset()

    def _await_weights(self, base: PreTrainedModel, config: PeftConfig, *, has_weights: bool) -> None:
        """Take a base and add an adapter of the shape that the config gives, for a state dict to fill.

        Args:
            base: with its weights, or with memory that was never initialised.
            config: of the adapter.
            has_weights: which of the two.
        """
        self._awaits_weights = True
        configs.refuse_endless_patterns(config.to_dict(), [name for name, _ in base.named_modules()], source=self.name)
        bounds = memory_check.bounds()
        if bounds is not None:
            bounds.know_model(base)
        if methods.is_derived_from_base(config):
            self.model, self._pending_config = base, config
        else:
            self.model = injection.inject_skeleton(base, config, has_weights=has_weights)

    def share_with(self, base: FrozenBase) -> bool:
        """Let the frozen weights that are the base's, bit by bit, have its storage; return whether there are any.

        They are compared where they came from a file as a whole, or were copied to be rewritten as PiSSA does.
        """
        if self._frozen is not None:
            return self._frozen.root is base.root
        if not isinstance(self.model, PeftModel) or self.base_model.config.model_type != base.config.model_type:
            return False
        matrix = self.base_model.get_input_embeddings().weight
        rows = matrix[base.own_rows :].detach().clone()
        found = (base.with_rows(rows) if len(rows) else base).variant(self.base_model.config)
        named = self.model.named_parameters(remove_duplicate=False)
        weights = {keys.base_key(name): parameter for name, parameter in named}
        if not found.share_({name: parameter for name, parameter in weights.items() if name is not None}):
            return False
        self._frozen = found
        return True

    def own_trained_(self) -> None:
        """Give each parameter that requires a gradient memory of its own, in place.

        Optimisers on a GPU write to many tensors at once, and read their addresses as of tensors that they only read:
        memory that is copied on write would not be copied.
        """
        for parameter in self.model.parameters():
            if parameter.requires_grad and mapped_memory.is_copied_on_write(parameter):
                parameter.data = parameter.data.clone()

    def read_from_source(self) -> list[torch.nn.Parameter]:
        """Return the frozen parameters that hold what every process reads from the base's source, bit by bit."""
        own = {} if self._frozen is None else self._frozen.own_weights()
        named = self.model.named_parameters(remove_duplicate=False) if own else ()
        weights = ((keys.base_key(name) or "", parameter) for name, parameter in named if not parameter.requires_grad)
        return [parameter for name, parameter in weights if name in own and are_same_bits(parameter, own[name])]

    @property
    def source_fingerprint(self) -> str | None:
        """Digest of a sample of the base's weights, if these are as the source has them."""
        return None if self._frozen is None else self._frozen.fingerprint

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
        """Bring the keys of a file to those of this model, then load; see :mod:`flair_peft.adapter.keys`.

        Raises:
            StateMismatchError: ``strict``, and a tensor is missing, left over, ambiguous or of another shape.
        """
        state_dict.pop(f"{prefix}model.embeddings.position_ids", None)  # written by transformers before 4.31
        inner = _taken_from(load_context.current().inner, prefix)
        if inner is not None and not self._awaits_weights:
            self._take_over(inner)
        mine = f"{prefix}model."
        stored = {key.removeprefix(mine): key for key in state_dict if key.startswith(mine)}
        self._is_first_load = self._awaits_weights
        if self._pending_config is not None:
            self._inject_into_stored_base({key: state_dict[stored[key]] for key in stored})
        own = self.model.state_dict()
        match = keys.match_keys(stored, own)
        for key in injection.derived_again(self.model, {key: state_dict[stored[key]] for key in match.unexpected}):
            match.unexpected.remove(key)
            del state_dict[stored.pop(key)]
        match, settled = self._without_left_out(match)
        # A module around the embeddings may load its own tensors alone; torch reports ours as missing if it minds.
        is_left_out = bool(prefix) and not stored and not self._awaits_weights
        if self._is_strict and not is_left_out:
            self._check_match(match, own, {key: state_dict[stored[key]] for key in stored})
        self._refuse_offloaded({key for key in match.renamed if own[key].is_meta})
        tensors = {key: state_dict.pop(stored[theirs]) for key, theirs in match.renamed.items()}
        if self._awaits_weights:
            self._take_dtypes_of(tensors)
            self._awaits_weights = bool(match.missing or match.ambiguous)
        settled |= self._settle_base_(tensors)
        self._settled = frozenset(mine + key for key in settled)
        state_dict.update({mine + key: tensor for key, tensor in tensors.items() if key not in settled})
        torch.nn.Module._load_from_state_dict(
            self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    @abstractmethod
    def _take_over(self, params: Mapping[str, Any]) -> None:
        """Let the next state dict be that of a file whose embeddings had these parameters."""

    def _refuse_offloaded(self, names: Set[str]) -> None:
        """Return if the file holds no weights that accelerate offloads here: torch would drop them with a warning."""
        if names:
            raise StateMismatchError(
                f"Cannot load the weights of '{self.name}': the file holds {name_some(names)}, and the device_map "
                "offloads them. Nothing can be written there. Keep their modules on a device."
            )

    def _without_left_out(self, match: keys.KeyMatch) -> tuple[keys.KeyMatch, set[str]]:
        """Return the match without the keys that the file leaves out on purpose, and these."""
        settled = {key for key in match.missing if keys.canonical_key(key) in self._left_out}
        if self._left_out and quantisation.engine(self.base_model) is not None:
            # Engines keep other statistics beside the weights on other devices.
            settled |= learned.quantised_keys(self.model).intersection(match.missing)
        return dataclasses.replace(match, missing=[key for key in match.missing if key not in settled]), settled

    def _settle_base_(self, tensors: Mapping[str, torch.Tensor]) -> set[str]:
        """Put base weights in place that torch should not copy, and return their keys.

        What is equal to a shared weight already leaves it alone, so that it stays shared. A file that is being loaded
        is nobody else's, so that its tensors can be taken as they are.
        """
        settled, is_ours = set(), load_context.load_options().owns_state and not self._frozen
        of_base = {key: tensor for key, tensor in tensors.items() if keys.base_key(key) is not None}
        for key, parameter in self.model.named_parameters(remove_duplicate=False) if of_base else ():
            tensor = of_base.get(key)
            if tensor is None:
                continue
            if self._frozen is not None:
                if are_same_bits(parameter, tensor):
                    settled.add(key)
            elif is_ours and not parameter.requires_grad and tensor.dtype == parameter.dtype:
                parameter.data = tensor.to(parameter.device)
                settled.add(key)
        return settled

    def _inject_into_stored_base(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill the base, then add the adapter that is computed from its weights."""
        own = self.base_model.state_dict()
        named = ((keys.base_key(key), tensor) for key, tensor in tensors.items())
        base_tensors = {name: tensor for name, tensor in named if name is not None and name in own}
        left_out = {keys.base_key(key) for key in self._left_out}
        match = keys.match_keys(base_tensors, own)
        match = dataclasses.replace(match, missing=[name for name in match.missing if name not in left_out])
        self._check_match(match, own, base_tensors)
        self._take_dtypes_of(base_tensors)
        self.base_model.load_state_dict(base_tensors, strict=False)  # both lists were read above
        assert self._pending_config is not None
        self.model = injection.inject(self.base_model, self._pending_config)
        injection.set_derived_state_(self.model, self._pending_state)
        self._pending_config, self._pending_state = None, {}

    def _after_loading(self, incompatible: Any) -> None:
        """Say of the keys that are in place without torch that they are, then prove what was loaded."""
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in self._settled]
        self._settled = frozenset()
        if self._awaits_weights or self._pending_config is not None:
            return
        self._left_out = frozenset()
        if not self._is_first_load:
            return
        self._train_base_again()
        probe, self._pending_probe = self._pending_probe, None
        if probe is not None and load_context.load_options().verify:
            vector_probe.replay_probe(self, probe)
        elif probe is not None:
            log.warning("Not checked for '%s': whether it gives the vectors that it gave when it was saved.", self.name)
        untrained, self._pending_untrained = self._pending_untrained, ()
        vector_probe.report_untrained(self, list(untrained))
        started = dict(self.model.named_parameters()) if untrained else {}
        self._start = {name: fingerprint.of_tensor(started[name]) for name in untrained if name in started}

    def _train_base_again(self) -> None:
        """Let those weights of the base require a gradient that did so when the file was written."""
        parameters = dict(self.model.named_parameters()) if self._pending_trained else {}
        for parameter in (parameters[name] for name in self._pending_trained if name in parameters):
            parameter.requires_grad_(parameter.is_floating_point())

    def _check_match(
        self, match: keys.KeyMatch, own: Mapping[str, torch.Tensor], stored: Mapping[str, torch.Tensor]
    ) -> None:
        shapes = [
            f"{key} ({_shape(stored[theirs])} instead of {_shape(own[key])})"
            for key, theirs in match.renamed.items()
            if _shape(stored[theirs]) != _shape(own[key]) and _shape(stored[theirs]) != (0,)
        ]
        empty = [key for key, theirs in match.renamed.items() if _shape(stored[theirs]) == (0,) != _shape(own[key])]
        problems = {
            "missing in the file": match.missing,
            "not known to the model": match.unexpected,
            "meaning the same tensor": match.ambiguous,
            "of another shape": shapes,
            "empty, as ZeRO-3 leaves weights that nobody gathered before saving": empty,
            "of another kind of number": [
                key for key, theirs in match.renamed.items() if _are_other_numbers(stored[theirs], own[key])
            ],
        }
        problems = {what: names for what, names in problems.items() if names}
        if problems:
            found = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items())
            raise StateMismatchError(
                f"Cannot load the weights of '{self.name}': {found}. The adapter is "
                f"{methods.describe(self.adapter_config)} on {type(self.base_model).__name__}. Load the "
                "file with the PEFT config and the base model that it was trained with.",
                problems=problems,
            )

    def _take_dtypes_of(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give each weight the dtype that it was stored in: a base can hold several, as T5 does in fp16."""
        for name, parameter in [*self.model.named_parameters(), *self.model.named_buffers()]:
            stored = tensors.get(name)
            if stored is not None and parameter.is_floating_point() and parameter.dtype != stored.dtype:
                parameter.data = parameter.data.to(stored.dtype)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _are_other_numbers(value: Any, own: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() != own.is_floating_point()
