"""A load proves itself: the base is the one, the embeddings are the ones, and what never learned is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flair_peft import adapters, backbone, fingerprint, keys, tokenizer_files
from flair_peft.dtypes import dtype_name
from flair_peft.errors import BaseMismatchError, BaseModelNotFoundError, ModelFileError, StateMismatchError, name_some
from flair_peft.frozen import FrozenBase
from flair_peft.sources import BaseRecord, load_options

log = logging.getLogger("flair_peft")

_TEXT = "Berlin is large, isn't it? 3 of 4 say so."
_IDS_WITHOUT_TEXT = [1, 2, 3, 4]

# Largest distance from the stored vectors, as a share of their norm: other machines sum in another order.
_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def check_base(base: FrozenBase, expected: BaseRecord, *, name: str) -> None:
    """Return if the base found is the one that the adapter was trained on, as far as the user wants it checked.

    Raises:
        BaseMismatchError: it is not.
    """
    verify = load_options().verify
    if not verify:
        log.warning("Not checked for '%s': whether the base model is the one it was trained on.", name)
        return
    if not base.is_as(expected):
        raise _mismatch(base, expected, "its weights differ")
    if verify == "full" and expected.full_fingerprint is None:
        raise ModelFileError(
            f"Cannot verify the base model of '{name}': the file holds no digest of all its weights. Files have one "
            "if their base was found when they were saved. Save the model again beside its base."
        )
    if verify == "full" and not base.is_fully_as(expected):
        raise _mismatch(base, expected, "some of its weights differ")


def check_complete(base: FrozenBase, kwargs: Mapping[str, Any]) -> None:
    """Return if the files of a new base hold every weight that hidden states depend on; the others are random.

    Raises:
        BaseModelNotFoundError: they do not; the message names weights that are missing, and what is there instead.
    """
    lacking = {name for name in base.random_names & base.names_of_parameters() if not keys.is_unread(name)}
    read = backbone.read_parts(base.copy()) if lacking and not base.is_placed else None
    if read is not None:
        lacking = {name for name in lacking if name.partition(".")[0] in read}
    if not lacking:
        return
    unused = set(backbone.names_in_file(base.record.name, kwargs)) - base.names_of_parameters()
    instead = f", and hold others that it does not have: {name_some(unused, limit=3)}" if unused else ""
    raise BaseModelNotFoundError(
        f"Cannot use '{base.record.name}' as a base model: its files lack weights of the model that its config "
        f"describes, {name_some(lacking, limit=3)}{instead}. They would be random, and others in each process. Save "
        "the whole model there with save_pretrained of its own class, or pass another base."
    )


def take_probe(embeddings: Any) -> dict[str, Any]:
    """Return what :func:`replay_probe` compares: input ids and the mean of each wanted layer, (layers, hidden)."""
    ids = probe_ids(embeddings)
    return {"input_ids": ids, "vectors": _vectors(embeddings, ids), "dtype": rounding_of(embeddings)}


def replay_probe(embeddings: Any, stored: Mapping[str, Any]) -> None:
    """Return if the embeddings of the probe are those that were stored.

    Raises:
        StateMismatchError: the tokenizer or the transformer gives something else.
        ModelFileError: the stored probe is damaged.
    """
    ids, expected = stored.get("input_ids"), stored.get("vectors")
    if not isinstance(ids, list) or not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        raise ModelFileError(
            f"Cannot read the probe of '{embeddings.name}': it is damaged. It holds input ids and vectors that a load "
            "must give again. Copy or save the file again."
        )
    found_ids = probe_ids(embeddings)
    if found_ids != ids:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its tokenizer gives {found_ids} for a sentence that gave "
            f"{ids} when it was saved. Another version of transformers or tokenizers may read its files in another "
            "way. Install the versions that the file names, or load with verify=False."
        )
    found = _vectors(embeddings, ids)
    apart = distance(found, expected)
    allowed = max(tolerance(stored.get("dtype")), tolerance(dtype_name(embeddings.base_dtype)))
    if not apart <= allowed:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its vectors of a probe sentence are {apart:.2g} of their "
            f"norm away from those stored when it was saved, and rounding explains {allowed:g}. It would predict "
            "something else. Load it with the versions of PEFT and transformers that the file names, or with "
            "verify=False."
        )


def start_of(model: torch.nn.Module) -> dict[str, str]:
    """Return name → digest of each parameter that is trained."""
    trained = adapters.trainable_parameters(model)
    return {name: fingerprint.of_tensor(parameter) for name, parameter in trained.items()}


def never_left(model: torch.nn.Module, start: Mapping[str, str]) -> list[str]:
    """Return the names of the parameters that have the digest they started with."""
    parameters = dict(model.named_parameters())
    return [n for n, digest in start.items() if n in parameters and fingerprint.of_tensor(parameters[n]) == digest]


def reachable(embeddings: Any, names: list[str]) -> list[str]:
    """Return those of the named parameters that a gradient can reach."""
    parameters = dict(embeddings.model.named_parameters())
    wanted = [name for name in names if parameters[name].requires_grad]
    if not wanted:
        return []
    with torch.inference_mode(False), evaluating(embeddings), torch.enable_grad():
        loss = torch.stack([state.float().sum() for state in _states(embeddings, probe_ids(embeddings))]).sum()
        if not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, [parameters[name] for name in wanted], allow_unused=True)
    return [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None]


def report_untrained(embeddings: Any, names: list[str]) -> None:
    """Say which parameters of the adapter are as they were before training."""
    if names:
        log.warning(
            "%s of %s parameters of the adapter of '%s' never left their start: %s. It was saved before it was "
            "trained, or they learned nothing.",
            len(names),
            len(adapters.trainable_parameters(embeddings.model)),
            embeddings.name,
            name_some(names, limit=3),
        )


def _mismatch(base: FrozenBase, expected: BaseRecord, what: str) -> BaseMismatchError:
    sizes = f"{base.own_rows} rows of vocabulary, {expected.vocabulary_size} expected"
    revision = f" at revision {expected.revision}" if expected.revision else ""
    return BaseMismatchError(
        f"Cannot use '{base.record.name}' as base model: {what} from those that the adapter was trained on ({sizes}). "
        "Another revision, another precision or a re-trained copy would predict something else. Pass base_model= with "
        f"the model that was '{expected.name}'{revision}, or verify=False to use this one all the same."
    )


def probe_ids(embeddings: Any) -> list[int]:
    """Return the input ids of a short sentence."""
    if embeddings.tokenizer_needs_ocr_boxes:
        return _IDS_WITHOUT_TEXT
    with tokenizer_files.exclusively(embeddings.tokenizer):
        return embeddings.tokenizer(_TEXT)["input_ids"] or _IDS_WITHOUT_TEXT


def _states(embeddings: Any, ids: list[int]) -> tuple[torch.Tensor, ...]:
    batch = torch.tensor([ids])
    # In mixed precision the vectors would be others than those of a load outside of it.
    with torch.autocast(embeddings.base_model.device.type, enabled=False):
        return embeddings.hidden_states(batch, attention_mask=torch.ones_like(batch))


def _vectors(embeddings: Any, ids: list[int]) -> torch.Tensor:
    with evaluating(embeddings), torch.no_grad():
        return torch.stack([state[0].float().mean(dim=0) for state in _states(embeddings, ids)]).cpu()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far apart two tensors are, as a share of the norm of the expected one."""
    if found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    found, expected = found.nan_to_num(), expected.float().nan_to_num()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-12))


def rounding_of(embeddings: Any) -> str:
    """Return the name of the dtype whose rounding is about that of the embeddings."""
    # Products of quantised weights are rounded in about that way on another device.
    return "bfloat16" if embeddings.is_quantised else str(dtype_name(embeddings.base_dtype))


def tolerance(dtype: Any) -> float:
    """Return how far from what was stored vectors may be, as a share of their norm, by the name of their dtype."""
    return _TOLERANCE.get(dtype, 0.0) if isinstance(dtype, str) else 0.0


@contextmanager
def evaluating(embeddings: torch.nn.Module) -> Iterator[None]:
    """Switch the module to evaluation and afterwards each of its parts back to what it was."""
    were_training = [module for module in embeddings.modules() if module.training]
    embeddings.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
