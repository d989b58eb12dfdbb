"""One line in Flair's log before a training: what learns at which rate, how much of the model it is, what is frozen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flair.embeddings.base import Embeddings
from flair.nn import Model
from peft import PeftConfig

from flair_peft.adapter import methods, trainable
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings, modules_around
from flair_peft.training import rates

# Flair's own: what it logs of a training is shown, and stands in training.log.
log = logging.getLogger("flair")

_Named = tuple[str, set[torch.nn.Parameter]]


def say(model: Model, optimizer: torch.optim.Optimizer, chosen: Mapping[str, float]) -> None:
    """Log the line.

    Parameters are counted as PEFT counts them: those of quantised weights as they were before.
    """
    adapted = adapted_embeddings(model)
    sizes = {embeddings: embeddings.model.get_nb_trainable_parameters() for embeddings in adapted}
    inside = {id(parameter) for embeddings in adapted for parameter in embeddings.model.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    others, still = _other_embeddings(model)
    head = [p for p in rest if not any(p in parameters for _, parameters in (*others, *still))]
    outside = _size(p for p in rest if p.requires_grad and not any(p in parameters for _, parameters in still))
    trained = outside + sum(size for embeddings, (size, _) in sizes.items() if embeddings.fine_tune)
    every = _size(rest) + sum(size for _, size in sizes.values())
    frozen = [f"{size - (e.fine_tune and learned):,} of '{e.base_model_name}'" for e, (learned, size) in sizes.items()]
    resting = _size(p for p in head if not p.requires_grad)
    log.info(
        "Training %s. Trained: %s of %s parameters (%s), %s of them outside of the adapter. Frozen: %s.",
        "; ".join(
            [
                *(_of_adapter(embeddings, optimizer, chosen) for embeddings in adapted),
                *(_of_other(name, parameters, optimizer) for name, parameters in others),
                _of_head(head, optimizer, chosen),
            ]
        ),
        f"{trained:,}",
        f"{every:,}",
        f"{trained / every:.2%}",
        f"{outside:,}",
        ", ".join([*frozen, *(f"'{name}'" for name, _ in still), *([f"{resting:,} of the head"] if resting else [])]),
    )


def _of_adapter(
    embeddings: PeftTransformerEmbeddings, optimizer: torch.optim.Optimizer, chosen: Mapping[str, float]
) -> str:
    what = f"{_method(embeddings.adapter_config)} on '{embeddings.base_model_name}'"
    if not embeddings.fine_tune:
        return f"{what}, frozen by fine_tune=False"
    found = rates.rates_of(optimizer, trainable.parameters(embeddings.model).values())
    if not found:
        return f"{what}, frozen"
    return f"{what} at learning rate {_written(found)}{_why('learning_rate', chosen)}"


def _method(config: PeftConfig) -> str:
    names = (*methods.shaping(config), methods.method_traits(config).scale)
    settings = {name: getattr(config, name, None) for name in names}
    shown = [f"{name}={value}" for name, value in settings.items() if isinstance(value, int | float)]
    return methods.method_name(config) + (f" ({', '.join(shown)})" if shown else "")


def _of_head(head: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, chosen: Mapping[str, float]) -> str:
    if not head:
        return "a head without parameters"
    found = rates.rates_of(optimizer, (parameter for parameter in head if parameter.requires_grad))
    return f"the head at {_written(found)}{_why('decoder_learning_rate', chosen)}" if found else "a head that is frozen"


def _of_other(name: str, parameters: set[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> str:
    return f"'{name}' at {_written(rates.rates_of(optimizer, (p for p in parameters if p.requires_grad)))}"


def _why(name: str, chosen: Mapping[str, float]) -> str:
    return f" (no {name} was given)" if name in chosen else ""


def _written(found: list[float]) -> str:
    ends = dict.fromkeys((*found[:1], *found[-1:]))
    return " to ".join(map(rates.as_written, ends)) or "no rate"


def _other_embeddings(model: Model) -> tuple[list[_Named], list[_Named]]:
    """Return name and parameters of each of Flair's own embeddings: of those that learn, and of those that do not."""
    learning: list[_Named] = []
    still: list[_Named] = []
    for _, module in modules_around(model):
        parts = [part for _, part in modules_around(module) if isinstance(part, Embeddings)]
        is_one = parts == [module] and not isinstance(module, PeftTransformerEmbeddings)
        if is_one and any(True for _ in module.parameters()):
            (learning if _learns(module) else still).append((str(module.name), set(module.parameters())))
    return learning, still


def _learns(module: Any) -> bool:
    # Language models of Flair are read without gradient there, but their parameters may ask for one.
    return getattr(module, "fine_tune", True) and any(parameter.requires_grad for parameter in module.parameters())


def _size(parameters: Iterable[torch.nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
