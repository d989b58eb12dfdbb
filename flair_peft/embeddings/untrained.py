"""Parameters of an adapter that were never updated since they were made, though a gradient can reach them."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping

import torch

from flair_peft.adapter import methods, trainable
from flair_peft.base import transformer
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.errors import name_some
from flair_peft.primitives import fingerprint

log = logging.getLogger("flair_peft")


def trained_digests(model: torch.nn.Module) -> dict[str, str]:
    """Return name → digest of each parameter that is trained."""
    trained = trainable.parameters(model)
    return {name: fingerprint.of_tensor(parameter) for name, parameter in trained.items()}


def never_updated(model: torch.nn.Module, start: Mapping[str, str]) -> list[str]:
    """Return the names of the parameters that have the digest they started with."""
    parameters = dict(model.named_parameters())
    return [n for n, digest in start.items() if n in parameters and fingerprint.of_tensor(parameters[n]) == digest]


def reached_by_gradients(model: torch.nn.Module, names: Iterable[str], outputs: Iterable[torch.Tensor]) -> list[str]:
    """Return those of the named parameters that a gradient can reach: the graph of the outputs leads to them."""
    parameters, reached = dict(model.named_parameters()), transformer.reached_parameters(outputs)
    return [name for name in names if id(parameters[name]) in reached]


def zero_as_before(embeddings: AdaptedEmbeddings) -> list[str]:
    """Return the names of the matrices that are zero and make every product of the adapter zero, if it is."""
    found: dict[str, list[str]] = {}
    for part in methods.method_traits(embeddings.adapter_config).deciding:
        for name, parameter in embeddings.model.named_parameters():
            module, mark, _ = name.partition(f".{part}.")
            if mark:
                is_zero = not (parameter.is_meta or parameter.any())
                found.setdefault(module, []).extend([name] if is_zero else [])
    return list(itertools.chain(*found.values())) if all(found.values()) else []


def report_never_updated(embeddings: AdaptedEmbeddings, names: list[str]) -> None:
    """Say which parameters of the adapter are as they were before training."""
    if names:
        log.warning(
            "%s of %s parameters of the adapter of '%s' were never updated: %s. It was saved before it was trained, "
            "or they learned nothing.",
            len(names),
            len(trainable.parameters(embeddings.model)),
            embeddings.name,
            name_some(names, limit=3),
        )
