"""Parameters of an adapter that were never updated since they were made, though a gradient can reach them."""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch

from flair_peft.adapter import injection
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.errors import name_some
from flair_peft.primitives import fingerprint

log = logging.getLogger("flair_peft")


def trained_digests(model: torch.nn.Module) -> dict[str, str]:
    """Return name → digest of each parameter that is trained."""
    trained = injection.trainable_parameters(model)
    return {name: fingerprint.of_tensor(parameter) for name, parameter in trained.items()}


def never_updated(model: torch.nn.Module, start: Mapping[str, str]) -> list[str]:
    """Return the names of the parameters that have the digest they started with."""
    parameters = dict(model.named_parameters())
    return [n for n, digest in start.items() if n in parameters and fingerprint.of_tensor(parameters[n]) == digest]


def reached_by_gradients(embeddings: AdaptedEmbeddings, names: list[str]) -> list[str]:
    """Return those of the named parameters that a gradient can reach."""
    parameters = dict(embeddings.model.named_parameters())
    wanted = [name for name in names if parameters[name].requires_grad]
    if not wanted:
        return []
    with torch.inference_mode(False), vector_probe.evaluating(embeddings), torch.enable_grad():
        states = vector_probe.probe_states(embeddings, vector_probe.probe_ids(embeddings))
        loss = torch.stack([state.float().sum() for state in states]).sum()
        if not loss.requires_grad:
            return []
        gradients = torch.autograd.grad(loss, [parameters[name] for name in wanted], allow_unused=True)
    return [name for name, gradient in zip(wanted, gradients, strict=True) if gradient is not None]


def report_never_updated(embeddings: AdaptedEmbeddings, names: list[str]) -> None:
    """Say which parameters of the adapter are as they were before training."""
    if names:
        log.warning(
            "%s of %s parameters of the adapter of '%s' were never updated: %s. It was saved before it was trained, "
            "or they learned nothing.",
            len(names),
            len(injection.trainable_parameters(embeddings.model)),
            embeddings.name,
            name_some(names, limit=3),
        )
