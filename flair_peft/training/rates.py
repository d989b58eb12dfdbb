"""Learning rates of adapter and head: those that a training gets where none was given, and which are far from good."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from flair.distributed_utils import is_main_process
from flair.embeddings import FlairEmbeddings, TransformerEmbeddings
from flair.nn import Model
from peft import PeftModel
from torch.optim import Optimizer

from flair_peft.adapter import keys, methods, trainable
from flair_peft.embeddings import untrained
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings, modules_around
from flair_peft.embeddings.word_and_document import counterpart

log = logging.getLogger("flair_peft")

NAMES = ("learning_rate", "decoder_learning_rate")
"""What Flair's trainer calls the rate of all parameters, and that of those outside of the embeddings."""

_OF_ADAM = ("torch", "bitsandbytes")


def choose(
    model: Model,
    settings: Mapping[str, Any],
    *,
    optimizer: Any,
    is_given: bool,
    past: Mapping[str, float | None] | None,
) -> dict[str, float]:
    """Return the learning rates that nobody gave and that are to be others than Flair's, by Flair's names.

    Args:
        model: the one that is trained.
        settings: of ``ModelTrainer.train_custom``.
        optimizer: the class of the training's.
        is_given: whether the ``learning_rate`` among them was asked for.
        past: those of the training that goes on, empty where they were Flair's; ``None`` where one starts anew.
    """
    wanted = suited_rates(model, optimizer) if past is None else past
    is_free = {"learning_rate": not is_given, "decoder_learning_rate": settings.get("decoder_learning_rate") is None}
    return {name: rate for name, rate in wanted.items() if rate is not None and is_free[name]}


def suited_rates(model: Model, optimizer: Any) -> dict[str, float]:
    """Return the rates that suit adapter and head, by Flair's names, as far as Flair can train them with these.

    None is for optimisers that mean something else by a rate, and that of the head alone for a model whose adapter does
    not learn. Of several adapters, all have the lowest, as Flair has one rate for all embeddings.
    """
    learning = _learning(model)
    if not adapted_embeddings(model) or not is_like_adam(optimizer):
        return {}
    suited = None if _is_transformer_trained(model) else _suited(learning)
    found = {} if suited is None else {"learning_rate": suited}
    return {**found, "decoder_learning_rate": methods.HEAD_RATE} if head_parameters(model) else found


def _learning(model: Model) -> list[PeftTransformerEmbeddings]:
    """Return the embeddings whose adapters learn."""
    return [each for each in adapted_embeddings(model) if each.fine_tune and trainable.parameters(each.model)]


def _suited(learning: Iterable[PeftTransformerEmbeddings]) -> float | None:
    """Return the rate that suits all of these adapters, which is the lowest; ``None`` where one of them has none."""
    suited = [methods.suited_rate(embeddings.adapter_config) for embeddings in learning]
    return min(filter(None, suited)) if suited and None not in suited else None


def class_of(optimizer: Any) -> Any:
    """Return the class of an optimiser that is given with settings, as a partial, or without."""
    while isinstance(optimizer, functools.partial):
        optimizer = optimizer.func
    return optimizer


def is_like_adam(optimizer: Any) -> bool:
    """Whether this is an Adam of torch or bitsandbytes, which the rates were found with, or a class made of one."""
    kinds = getattr(class_of(optimizer), "__mro__", ())
    return any(kind.__module__.partition(".")[0] in _OF_ADAM and "Adam" in kind.__name__ for kind in kinds)


def _is_known(optimizer: type) -> bool:
    """Whether a learning rate means what it does to torch; optimisers of other libraries may mean another thing."""
    of_torch = (kind.__module__.startswith("torch.optim") for kind in optimizer.__mro__ if kind is not Optimizer)
    return is_like_adam(optimizer) or any(of_torch)


def head_parameters(model: Model) -> list[torch.nn.Parameter]:
    """Return what ``decoder_learning_rate`` trains; nothing where there is a transformer among it.

    Flair goes by the names of parameters: those without "embeddings". That may be what encodes labels, too.
    """
    head = [p for name, p in model.named_parameters() if "embeddings" not in name and p.requires_grad]
    pretrained = {id(p) for module in _learning_language_models(model) for p in module.parameters()}
    return [] if any(id(parameter) in pretrained for parameter in head) else head


def _is_transformer_trained(model: Model) -> bool:
    """Whether weights of a whole language model are trained, beside an adapter or beneath it."""
    return any(
        parameter.requires_grad and parameter.ndim > 1 and not keys.is_adapter_key(name)
        for module in _learning_language_models(model)
        for name, parameter in module.named_parameters()
    )


def _learning_language_models(model: Model) -> list[Any]:
    kinds = (TransformerEmbeddings, FlairEmbeddings)
    return [module for _, module in modules_around(model) if isinstance(module, kinds) and module.fine_tune]


def rates_of(optimizer: torch.optim.Optimizer, parameters: Iterable[torch.nn.Parameter]) -> list[float]:
    """Return the learning rates of these parameters, before schedules change them, in ascending order."""
    wanted = set(map(id, parameters))
    groups = [group for group in optimizer.param_groups if not wanted.isdisjoint(map(id, group["params"]))]
    return sorted({float(group.get("initial_lr", group["lr"])) for group in groups})


def report_far_ones(model: Model, optimizer: torch.optim.Optimizer, *, is_head_rate_zero: bool = False) -> None:
    """Say at which rates adapter or head will hardly learn, or will not settle.

    Not where they are too low and the adapter has learned already: it may be meant to change little. Nor where a whole
    transformer learns with the adapter's rate, and no higher one would do. Flair takes a rate of the head of zero, if
    that was asked for, for nothing.
    """
    head = rates_of(optimizer, head_parameters(model))
    if is_head_rate_zero and head and head[-1] > 0:
        log.warning(
            "Flair takes decoder_learning_rate=0 for none given: the head learns with %s, as all else does. To leave "
            "it as it is, call requires_grad_(False) on its modules.",
            as_written(head[-1]),
        )
    if not _is_known(type(optimizer)):
        return
    every, learning = adapted_embeddings(model), _learning(model)
    new = [embeddings for embeddings in every if untrained.never_updated(embeddings.model, embeddings._start)]
    suited = None if _is_transformer_trained(model) else _suited(learning)
    for embeddings in learning:
        found = rates_of(optimizer, trainable.parameters(embeddings.model).values())
        if suited is not None and found:
            method = methods.method_name(embeddings.adapter_config)
            whose = method if len(learning) == 1 else "the adapters of this model"
            _report_adapter(embeddings, found, suited, type(optimizer), is_new=embeddings in new, whose=whose)
    if not is_head_rate_zero:
        _report_head(head, type(optimizer), is_new=bool(new))


def report_flairs_own(model: Model, rate: float) -> None:
    """Say which adapters are in Flair's own embeddings, which this package does not train, and will hardly learn."""
    for _, module in modules_around(model) if is_main_process() else ():
        is_flairs_own = isinstance(module, TransformerEmbeddings) and not isinstance(module, PeftTransformerEmbeddings)
        if not is_flairs_own or not module.fine_tune or not isinstance(module.model, PeftModel):
            continue
        suited = methods.suited_rate(module.model.active_peft_config)
        if suited is not None and methods.is_too_low(rate, suited):
            log.warning(
                "The adapter of '%s' hardly learns with Flair's learning_rate=%s, which is taken as none is given: "
                "these are Flair's own embeddings. Use %s, which chooses the rates, or pass learning_rate=%s and "
                "decoder_learning_rate=%s.",
                module.model.get_base_model().name_or_path,
                as_written(rate),
                counterpart(type(module)).__name__,
                *map(as_written, (suited, methods.HEAD_RATE)),
            )


def _report_adapter(
    embeddings: PeftTransformerEmbeddings,
    rates: list[float],
    suited: float,
    optimizer: type,
    *,
    is_new: bool,
    whose: str,
) -> None:
    if is_new and rates[-1] > 0 and methods.is_too_low(rates[-1], suited):
        log.warning(
            "The adapter of '%s' hardly learns with learning_rate=%s: that is made for the weights of a whole "
            "transformer. Try learning_rate=%s%s.",
            embeddings.name,
            *map(as_written, (rates[-1], suited)),
            _with_adam(optimizer),
        )
    elif is_like_adam(optimizer) and methods.is_too_high(rates[0], suited):
        log.warning(
            "The adapter of '%s' may come to nothing with learning_rate=%s: that is %.0f times what suits %s. Try "
            "learning_rate=%s.",
            embeddings.name,
            as_written(rates[0]),
            rates[0] / suited,
            whose,
            as_written(suited),
        )


def _report_head(rates: list[float], optimizer: type, *, is_new: bool) -> None:
    suited = methods.HEAD_RATE
    if rates and is_new and rates[-1] > 0 and methods.is_too_low(rates[-1], suited, methods.TOO_LOW_FOR_HEADS):
        log.warning(
            "The head hardly learns with a learning rate of %s: it starts at random. Try decoder_learning_rate=%s%s.",
            *map(as_written, (rates[-1], suited)),
            _with_adam(optimizer),
        )
    elif rates and is_like_adam(optimizer) and methods.is_too_high(rates[0], suited):
        log.warning(
            "The head may not settle with a learning rate of %s: that is %.0f times what suits one. Try "
            "decoder_learning_rate=%s.",
            as_written(rates[0]),
            rates[0] / suited,
            as_written(suited),
        )


def _with_adam(optimizer: type) -> str:
    """Return what has to be said beside a rate, where the optimiser is none for which it was found."""
    return "" if is_like_adam(optimizer) else f" with AdamW, or a far higher one with {optimizer.__name__}"


def as_written(rate: float) -> str:
    """Return a rate as one writes it, such as ``5e-5``."""
    if not 0 < rate < 0.1 or not math.isfinite(rate):
        return f"{rate:.3g}"
    digits, exponent = f"{rate:.2e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"
