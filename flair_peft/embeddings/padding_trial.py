"""Whether a model gives a sentence the same vectors however far it is padded: tried out, once for models alike.

Convolutions, chunks, positions that count padding, and methods that look at a whole batch give it others.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.base import transformer
from flair_peft.embeddings import length_groups
from flair_peft.embeddings.length_groups import Inputs, LengthGroups, Run

log = logging.getLogger("flair_peft")

# Largest distance, as a share of the norm: sums in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Tokens of the sentence that is padded: the fewer, the more of them stand beside the padding.
_TOKENS = 4


@dataclass
class _Verdict:
    """Up to which width padding was tried out and made no difference, and from which width it made one."""

    same: int = 0
    other: float = float("inf")


# What makes models alike → what was found of them, for as long as the process runs.
_verdicts: dict[tuple[Any, ...], _Verdict] = {}
_lock = threading.Lock()
_descriptions: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, ...]] = weakref.WeakKeyDictionary()


def find_groups(
    run: Run,
    inputs: Inputs,
    *,
    model: torch.nn.Module,
    first: int = 0,
    before: int = 0,
) -> LengthGroups | None:
    """Return the groups of rows that cost least, ``None`` where one pass does or where padding makes a difference.

    Rows have the same hidden states in the groups as in the whole batch then, up to rounding. Where that is not known
    of models alike with as much padding, the model runs for two rows, padded and alone. It is in evaluation mode and
    without gradient then, and left as it was found, random numbers included. Some models go another way beyond a
    length: what held for less padding is tried out again.

    Args:
        run: computes with the model.
        inputs: of the batch.
        model: the transformer, with its adapter if it has one.
        first: as for :func:`length_groups.find`.
        before: as there.
    """
    base = _base_of(model)
    cost = functools.partial(length_groups.cost_of, base, inputs["input_ids"].device)
    groups = length_groups.find(inputs, cost, first=first, before=before)
    if groups is None:
        return None
    dtype = length_groups.compute_dtype(base)
    kinds = (dtype, inputs["input_ids"].device.type, frozenset(inputs), groups.first)
    with _lock:
        verdict = _verdicts.setdefault((*_describe(model, base), *kinds), _Verdict())
    if verdict.same < groups.width < verdict.other:
        if _try_out(run, inputs, groups, model=model, tolerance=_TOLERANCE.get(dtype, 0.0)):
            verdict.same = max(verdict.same, groups.width)
        else:
            verdict.other = min(verdict.other, groups.width)
            log.info("%s: padding to %s tokens makes a difference; such batches run whole.", type(base), groups.width)
    return groups if groups.width <= verdict.same else None


def _base_of(model: torch.nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _describe(model: torch.nn.Module, base: torch.nn.Module) -> tuple[Any, ...]:
    """Return what models have in common that give the same verdict."""
    if model not in _descriptions:
        adapters = [str(config.to_dict()) for config in getattr(model, "peft_config", {}).values()]
        shape = getattr(base, "config", None)
        _descriptions[model] = (type(base), None if shape is None else shape.to_json_string(), *adapters[:1])
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    is_off = getattr(model, "_adapters_disabled", False) or (layer is not None and layer.disable_adapters)
    return (*_descriptions[model], getattr(getattr(base, "config", None), "_attn_implementation", None), bool(is_off))


def _try_out(run: Run, inputs: Inputs, groups: LengthGroups, *, model: torch.nn.Module, tolerance: float) -> bool:
    """Return whether the first tokens of a sentence have beside the longest one the states that they have alone."""
    tokens = min(_TOKENS, groups.lengths[-1])
    padding = groups.width - tokens
    rows = (groups.rows[-1][-1], groups.rows[0][0])
    pair = length_groups.cut(inputs, rows, groups.width)
    pair["attention_mask"][0, tokens:] = 0
    alone = length_groups.cut(pair, (0,), tokens)
    try:
        with _undisturbed(model, inputs["input_ids"].device):
            padded, expected = _states(run(pair, rows)), _states(run(alone, rows[:1]))
    except Exception as error:  # for want of memory, or since the model takes no single row
        log.info("%s could not be tried out: %s: %.200s", type(model).__name__, type(error).__name__, error)
        return False
    at = groups.first + tokens
    found = [torch.cat([states[:1, :at], states[:1, at + padding :]], dim=1) for states in padded]
    return len(found) == len(expected) and all(map(lambda a, b: _is_close(a, b, tolerance), found, expected))


def _states(output: Mapping[str, Any]) -> list[torch.Tensor]:
    states, last = transformer.states_of(output)
    return [*states, last]


def _is_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    if found.shape != expected.shape:
        return False
    found, expected = found.double(), expected.double()
    return bool((found - expected).norm() <= tolerance * expected.norm())


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model evaluates without gradient; outside, its modules and random numbers are as they were.

    Modules may count, note the longest input, or put others in their place. Tensors are not copied.
    """
    spaces = [
        space
        for module in model.modules()
        for space in (vars(module), module._parameters, module._buffers, module._modules)
    ]
    before = [(space, dict(space)) for space in spaces]
    # Autocast keeps what it casts without a gradient, and a training step would find that.
    kind = device.type
    precision = torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), enabled=torch.is_autocast_enabled(kind), cache_enabled=False
    )
    try:
        with torch.no_grad(), precision, torch.random.fork_rng(devices=[device] if kind == "cuda" else []):
            if any(module.training for module in model.modules()):
                model.eval()
            yield
    finally:
        for space, entries in before:
            space.update({name: value for name, value in entries.items() if space.get(name) is not value})
            for name in space.keys() - entries.keys():
                del space[name]
