"""A load proves itself: the base is the one, the embeddings are the ones, and what never learned is said."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flair_peft.adapter import injection
from flair_peft.base import tokenizers
from flair_peft.errors import ModelFileError, StateMismatchError, name_some
from flair_peft.primitives import fingerprint
from flair_peft.primitives.dtypes import dtype_name

log = logging.getLogger("flair_peft")

_TEXT = "Berlin is large, isn't it? 3 of 4 say so."
_IDS_WITHOUT_TEXT = [1, 2, 3, 4]

# Largest distance from the stored vectors, as a share of their norm: other machines sum in another order.
_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


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
    trained = injection.trainable_parameters(model)
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
            len(injection.trainable_parameters(embeddings.model)),
            embeddings.name,
            name_some(names, limit=3),
        )


def probe_ids(embeddings: Any) -> list[int]:
    """Return the input ids of a short sentence."""
    if embeddings.tokenizer_needs_ocr_boxes:
        return _IDS_WITHOUT_TEXT
    with tokenizers.exclusively(embeddings.tokenizer):
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
