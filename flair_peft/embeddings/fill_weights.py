"""Fill embeddings from a state dict: every tensor is used exactly once, or an error says which and why."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence, Set
from typing import Any

import torch

from flair_peft.adapter import derived_state, injection, keys, mending, methods
from flair_peft.base import left_out as base_left_out
from flair_peft.base import quantisation
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.embeddings import exact_values, resizing, untrained, vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.pending_load import PendingLoad
from flair_peft.errors import StateMismatchError, name_some
from flair_peft.primitives import fingerprint, load_context
from flair_peft.primitives.fingerprint import are_same_bits

Tensors = Mapping[str, torch.Tensor]


def take_inner(prefix: str) -> Mapping[str, Any] | None:
    """Return, once, the parameters expected for a prefix; models inside a model load their parts one by one."""
    inner = load_context.current().inner
    ending = (path for path in inner if prefix and f".{path}".endswith(f".{prefix}"))
    path = prefix if prefix in inner else next(ending, None)
    return None if path is None else inner.pop(path)


def fill_(
    embeddings: AdaptedEmbeddings,
    state_dict: dict[str, Any],
    prefix: str,
    *,
    pending: PendingLoad,
    is_strict: bool,
) -> None:
    """Bring the keys of a file to those of the model, in place, for torch to load; see :mod:`flair_peft.adapter.keys`.

    What torch should not copy is put in place at once: ``pending.in_place`` names it.

    Args:
        embeddings: whose model is filled.
        state_dict: of a whole model; the keys of the embeddings' own tensors are changed.
        prefix: of the embeddings within it.
        pending: what the file leaves out, and what else it says.
        is_strict: whether a tensor may be missing or left over.

    Raises:
        StateMismatchError: ``is_strict``, and a tensor is missing, left over, ambiguous or of another shape.
    """
    mine = f"{prefix}model."
    stored = {key.removeprefix(mine): key for key in state_dict if key.startswith(mine)}
    if pending.adapter_config is not None:
        _inject_into_stored_base_(embeddings, pending, {key: state_dict[stored[key]] for key in stored})
    expected = embeddings.model.state_dict()
    match = keys.match_keys(stored, expected)
    for key in derived_state.computed_again(
        embeddings.model, {key: state_dict[stored[key]] for key in match.unexpected}
    ):
        match.unexpected.remove(key)
        del state_dict[stored.pop(key)]
    match, in_place = _without_left_out(match, embeddings, pending)
    # A module around the embeddings may load its own tensors alone; torch reports ours as missing if it minds.
    is_for_others = bool(prefix) and not stored and not pending.is_first
    if is_strict and not is_for_others:
        _check_match(embeddings, match, expected, {key: state_dict[stored[key]] for key in stored})
    _refuse_offloaded(embeddings, {key for key in match.renamed if expected[key].is_meta})
    tensors = {key: state_dict.pop(stored[theirs]) for key, theirs in match.renamed.items()}
    if pending.is_first:
        tensors = _as_was_asked(tensors, expected)
        if any(tensor.dtype != expected[key].dtype for key, tensor in tensors.items()):
            take_dtypes_(embeddings.model, tensors)
        pending.is_complete = not (match.missing or match.ambiguous)
    in_place |= _put_base_in_place_(embeddings.model, tensors, embeddings.base_source.frozen)
    pending.in_place = frozenset(mine + key for key in in_place)
    state_dict.update({mine + key: tensor for key, tensor in tensors.items() if key not in in_place})


def finish_(embeddings: AdaptedEmbeddings, pending: PendingLoad) -> dict[str, str]:
    """Verify embeddings that were filled for the first time; return name → digest of what was never updated.

    Their probe is left to a load that collects probes, for when its model is complete.
    """
    mending.keep_projections_(embeddings.model)
    parameters = dict(embeddings.model.named_parameters())
    for parameter in (parameters[name] for name in pending.trained_base if name in parameters):
        parameter.requires_grad_(parameter.is_floating_point())
    context = load_context.current()
    exact_values.cast_copies_(embeddings.model)
    if pending.probe is not None and context.options.verify and context.probes is not None:
        context.probes.append((embeddings, pending.probe))
    elif pending.probe is not None and context.options.verify:
        vector_probe.replay_probe(embeddings, pending.probe)
    elif pending.probe is not None:
        vector_probe.report_unchecked(embeddings)
    unchanged = untrained.zero_as_before(embeddings) if pending.untrained is None else list(pending.untrained)
    untrained.report_never_updated(embeddings, unchanged)
    return {name: fingerprint.of_tensor(parameters[name]) for name in unchanged if name in parameters}


def _refuse_offloaded(embeddings: AdaptedEmbeddings, names: Set[str]) -> None:
    """Return if the file holds no weights that accelerate offloads here: torch would drop them with a warning."""
    if names:
        raise StateMismatchError(
            f"Cannot load the weights of '{embeddings.name}': the file holds {name_some(names)}, and the device_map "
            "offloads them. Nothing can be written there. Keep their modules on a device."
        )


def _without_left_out(
    match: keys.KeyMatch, embeddings: AdaptedEmbeddings, pending: PendingLoad
) -> tuple[keys.KeyMatch, set[str]]:
    """Return the match without the keys that the file leaves out on purpose, and these."""
    left_out = {key for key in match.missing if keys.canonical_key(key) in pending.left_out}
    if pending.left_out and quantisation.engine(embeddings.base_model) is not None:
        # Engines keep other statistics beside the weights on other devices.
        left_out |= base_left_out.quantised_keys(embeddings.model).intersection(match.missing)
    if pending.left_out or (pending.is_first and not any(map(_is_unread, match.renamed))):
        # The base of a model may have been made without what nobody reads.
        left_out |= {key for key in match.missing if _is_unread(key)}
    return dataclasses.replace(match, missing=[key for key in match.missing if key not in left_out]), left_out


def _is_unread(key: str) -> bool:
    name = keys.base_key(key)
    return name is not None and keys.is_unread(name)


def _put_base_in_place_(model: torch.nn.Module, tensors: Tensors, shared: FrozenBase | None) -> set[str]:
    """Put base weights in place that torch should not copy, and return their keys.

    What is equal to a shared weight already leaves it alone, so that it stays shared. A file that is being loaded
    is nobody else's, so that its tensors can be taken as they are.
    """
    in_place, is_ours = set(), load_context.load_options().owns_state and not shared
    of_base = {key: tensor for key, tensor in tensors.items() if keys.base_key(key) is not None}
    for key, parameter in model.named_parameters(remove_duplicate=False) if of_base else ():
        tensor = of_base.get(key)
        if tensor is None:
            continue
        if shared is not None:
            if are_same_bits(parameter, tensor):
                in_place.add(key)
        elif is_ours and not parameter.requires_grad and tensor.dtype == parameter.dtype:
            parameter.data = tensor.to(parameter.device)
            in_place.add(key)
    return in_place


def _inject_into_stored_base_(embeddings: AdaptedEmbeddings, pending: PendingLoad, tensors: Tensors) -> None:
    """Fill the base, then add the adapter that is computed from its weights."""
    base = embeddings.base_model
    expected = base.state_dict()
    named = ((keys.base_key(key), tensor) for key, tensor in tensors.items())
    base_tensors = {name: tensor for name, tensor in named if name is not None and name in expected}
    left_out = {keys.base_key(key) for key in pending.left_out}
    match = keys.match_keys(base_tensors, expected)
    match = dataclasses.replace(match, missing=[name for name in match.missing if name not in left_out])
    _check_match(embeddings, match, expected, base_tensors)
    base_tensors = _as_was_asked(base_tensors, expected)
    take_dtypes_(embeddings.model, base_tensors)
    base.load_state_dict(base_tensors, strict=False)  # both lists were read above
    assert pending.adapter_config is not None
    embeddings.model = injection.inject(base, pending.adapter_config)
    resizing.override_(embeddings.model)
    derived_state.put_back_(embeddings.model, pending.derived_state)
    pending.adapter_config = None


def _check_match(embeddings: AdaptedEmbeddings, match: keys.KeyMatch, expected: Tensors, stored: Tensors) -> None:
    problems = {what: names for what, names in _problems(match, expected, stored).items() if names}
    if problems:
        described = "; ".join(f"{what}: {name_some(names)}" for what, names in problems.items())
        raise StateMismatchError(
            f"Cannot load the weights of '{embeddings.name}': {described}. The adapter is "
            f"{methods.describe(embeddings.adapter_config)} on {type(embeddings.base_model).__name__}. Load the "
            "file with the PEFT config and the base model that it was trained with.",
            problems=problems,
        )


def _problems(match: keys.KeyMatch, expected: Tensors, stored: Tensors) -> dict[str, Sequence[str]]:
    """Return what can be wrong → keys of which it is true."""
    shapes = {key: (_shape(stored[theirs]), _shape(expected[key])) for key, theirs in match.renamed.items()}
    other = {key: (theirs, ours) for key, (theirs, ours) in shapes.items() if theirs != ours}
    return {
        "missing in the file": match.missing,
        "not known to the model": match.unexpected,
        "meaning the same tensor": match.ambiguous,
        "of another shape": [f"{key} ({a} instead of {b})" for key, (a, b) in other.items() if a != (0,)],
        "empty, as ZeRO-3 leaves weights that nobody gathered before saving": [
            key for key, (theirs, _) in other.items() if theirs == (0,)
        ],
        "of another kind of number": [
            key for key, theirs in match.renamed.items() if _are_other_numbers(stored[theirs], expected[key])
        ],
    }


def _as_was_asked(tensors: Tensors, expected: Tensors) -> dict[str, torch.Tensor]:
    """Return tensors of a file with those of the base in its dtype, if it is a shared one in a dtype that was chosen.

    Trained biases and weights that an initialisation rewrote compute together with the others.
    """
    offer = load_context.load_options().offer
    if offer is None or not offer.is_converted:
        return dict(tensors)
    of_base = {key for key in tensors if keys.base_key(key) is not None}
    return {key: tensor.to(expected[key].dtype) if key in of_base else tensor for key, tensor in tensors.items()}


def take_dtypes_(model: torch.nn.Module, tensors: Tensors) -> None:
    """Give each weight the dtype that it was stored in: a base can hold several, as T5 does in fp16."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        stored = tensors.get(name)
        if stored is not None and tensor.is_floating_point() and tensor.dtype != stored.dtype:
            tensor.data = tensor.data.to(stored.dtype)


def _shape(value: Any) -> tuple[int, ...] | str:
    return tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__


def _are_other_numbers(value: Any, expected: torch.Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() != expected.is_floating_point()
