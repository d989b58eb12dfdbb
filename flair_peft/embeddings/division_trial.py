"""Whether a sentence has the same vectors in packed rows, or however far it is padded: tried out for models alike.

Convolutions, chunks, positions that count padding, and methods that look at a whole batch give it others. Packed rows
are not for models that take no such mask or no positions, nor for those with windows of attention.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import logging
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter import methods
from flair_peft.base import changed_modules, transformer
from flair_peft.embeddings import batch_division, length_groups, packed_rows, pass_cost
from flair_peft.embeddings.batch_division import Division, Inputs, Run
from flair_peft.primitives.full_precision import exact_products

log = logging.getLogger("flair_peft")

# Largest distance of the states of a sentence, as a share of their norm: sums in another order. That of a single token,
# among which the norms of decoders differ a thousandfold, may be some times as large (all-mpnet-base-v2: four times).
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
_OF_A_TOKEN = 4
# In these, rounding hides what a token sees of others. Quantised modules may round by all that is in a batch.
_ROUGH = (torch.float16, torch.bfloat16)


@dataclass
class _Verdict:
    """Up to which length of rows a way to run them made no difference, and from which length on it made one."""

    same: int = 0
    other: float = float("inf")


# What makes models alike → what was found of them, for as long as the process runs; of the last so many.
_MOST = 256
_verdicts: dict[tuple[Any, ...], _Verdict] = {}
_lock = threading.Lock()
# Model → a copy of its settings and its adapters', and what they tell: to write that takes longer than to compare.
_descriptions: weakref.WeakKeyDictionary[torch.nn.Module, tuple[Any, tuple[Any, ...]]] = weakref.WeakKeyDictionary()
_numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_counter = itertools.count()


def find_division(
    run: Run,
    inputs: Inputs,
    *,
    model: torch.nn.Module,
    first: int = 0,
    before: int = 0,
    is_packable: bool = False,
) -> Division | None:
    """Return the cheapest way to run a batch in which sentences have the hidden states of one pass, up to rounding.

    These are packed rows, groups of similar length, or ``None``: as it is. Where it is not known of models alike
    whether they can run so, the model runs for some short rows, so and alone. It is in evaluation mode and without
    gradient then, and left as it was found, random numbers included. Some models go another way beyond a length: what
    held for shorter rows is tried out again. A user's own modules, and hooks that return something, get batches as they
    are.

    Args:
        run: computes with the model.
        inputs: of the batch.
        model: the transformer, with its adapter if it has one.
        first: rows of the outputs that stand in front of the inputs'.
        before: positions in front of each row that are no inputs, such as those of a prefix, with these rows.
        is_packable: whether ``run`` takes several sentences in one row.
    """
    base, device = _base_of(model), inputs["input_ids"].device
    cost = functools.partial(pass_cost.cost_of, base, device)
    lengths = batch_division.find_lengths(inputs, cost)
    if lengths is None:
        return None
    composition = _composition(model)
    is_quantised = bool(getattr(base, "quantization_method", None))  # by modules of any library
    if not is_quantised and not all(map(changed_modules.is_of_libraries, dict.fromkeys(composition[0]))):
        return None
    price, width = cost(), inputs["input_ids"].shape[1]
    groups = length_groups.group(lengths, price, width=width, first=first, before=before)
    ways: list[Division] = [groups]
    if is_packable and not before:
        ways += packed_rows.find(inputs, lengths, price, base)
    whole = price.of(len(lengths), before + width)
    dtype = pass_cost.compute_dtype(base)
    kinds = (*_describe(model, base), *composition, dtype, device.type, frozenset(inputs), first)
    tolerance, is_rough = TOLERANCE.get(dtype, 0.0), dtype in _ROUGH and not is_quantised
    is_same = functools.partial(_is_same, run, inputs, model=model, kinds=kinds, tolerance=tolerance, is_rough=is_rough)
    for way in sorted(ways, key=lambda way: way.cost(price)):
        # In either way sentences lose their padding, which may make a difference in one pass for all.
        if way.cost(price) >= whole or not is_same(groups):
            return None
        if way is groups or is_same(way):
            return way
    return None


def _is_same(
    run: Run,
    inputs: Inputs,
    way: Division,
    *,
    model: torch.nn.Module,
    kinds: tuple[Any, ...],
    tolerance: float,
    is_rough: bool,
) -> bool:
    """Return whether models alike have the same states so, and try it out where that is not known."""
    with _lock:
        key = (*kinds, way.kind)
        verdict = _verdicts[key] = _verdicts.pop(key, _Verdict())
        while len(_verdicts) > _MOST:
            _verdicts.pop(next(iter(_verdicts)))
    if verdict.same < way.tried_length < verdict.other:
        found = _try_out(run, inputs, way, model=model, tolerance=tolerance, is_rough=is_rough)
        if found:
            verdict.same = max(verdict.same, way.tried_length)
        elif found is not None:
            verdict.other = min(verdict.other, way.tried_length)
            name = type(_base_of(model)).__name__
            log.info("%s gives other states in %s of %s tokens.", name, type(way).__name__, way.tried_length)
    return way.tried_length <= verdict.same


def _base_of(model: torch.nn.Module) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _describe(model: torch.nn.Module, base: Any) -> tuple[Any, ...]:
    """Return what models have in common that give the same verdict; it changes with whatever is put into a model."""
    configs = [each for each in (getattr(base, "config", None),) if each is not None]
    adapters = [*getattr(model, "peft_config", {}).values()]
    settings = [vars(each) for each in (*configs, *adapters)]
    if model not in _descriptions or _descriptions[model][0] != settings:
        # Slots of mixed batches have configs alike: how many there are makes no difference.
        told = frozenset(str(_that_count(config)) for config in adapters)
        shape = tuple(config.to_json_string() for config in configs)
        _descriptions[model] = copy.deepcopy(settings), (type(base), *shape, told)
    layer = next((module for module in model.modules() if isinstance(module, BaseTunerLayer)), None)
    is_off = getattr(model, "_adapters_disabled", False) or (layer is not None and layer.disable_adapters)
    active = tuple(layer.active_adapters) if layer is not None else ()
    attention = getattr(getattr(base, "config", None), "_attn_implementation", None)
    return (*_descriptions[model][1], attention, bool(is_off), active)


def _that_count(config: PeftConfig) -> dict[str, Any]:
    """Return settings of an adapter, without the ranks that a training gives to matrices step by step."""
    changes = {"rank_pattern"} if methods.method_traits(config).masks_ranks else ()
    return {name: value for name, value in config.to_dict().items() if name not in changes}


def _composition(model: torch.nn.Module) -> tuple[tuple[type[torch.nn.Module], ...], tuple[Any, ...], tuple[Any, ...]]:
    """Return the classes of all modules, their methods, and what else computes in them: hooks, and methods put in.

    ``Module.modules`` would take twice as long, for each batch.
    """
    kinds, others, waiting = list[type[torch.nn.Module]](), list[Any](), [model]
    while waiting:
        module = waiting.pop()
        own = module.__dict__
        kinds.append(module.__class__)
        if own["_forward_hooks"] or own["_forward_pre_hooks"]:
            others += [*own["_forward_hooks"], *own["_forward_pre_hooks"]]  # numbers that torch gives once
        if "forward" in own and (forward := changed_modules.method_of_others(module)) is not None:
            others.append(_number_of(forward))
        if own["_modules"]:
            waiting += [child for child in own["_modules"].values() if child is not None]
    methods = tuple(kind.forward for kind in dict.fromkeys(kinds))  # of classes, which can be patched as well
    return tuple(kinds), methods, tuple(others)


@contextlib.contextmanager
def _noting_what_hooks_return(model: torch.nn.Module) -> Iterator[list[Any]]:
    """Yield a list that gets what hooks of others return: they change states, in the next batch maybe otherwise."""
    returned = list[Any]()

    def noting(hook: Any) -> Any:
        def noted(*args: Any, **kwargs: Any) -> Any:
            found = hook(*args, **kwargs)
            returned.extend([] if found is None else [found])
            return found

        return noted

    everywhere = [hooks for module in model.modules() for hooks in (module._forward_hooks, module._forward_pre_hooks)]
    before = [
        (hooks, key, hook)
        for hooks in everywhere
        for key, hook in hooks.items()
        if not changed_modules.is_of_libraries(hook)
    ]
    for hooks, key, hook in before:
        hooks[key] = noting(hook)
    try:
        yield returned
    finally:
        for hooks, key, hook in before:
            if key in hooks:
                hooks[key] = hook


def _number_of(method: Any) -> int:
    """Return a number that no other method has, nor one that takes its place in memory."""
    try:
        return _numbers.setdefault(method, next(_counter))
    except TypeError:  # no hash, or no weak references
        return next(_counter)


def _try_out(
    run: Run, inputs: Inputs, way: Division, *, model: torch.nn.Module, tolerance: float, is_rough: bool
) -> bool | None:
    """Return whether sentences that run so have the states that they have alone, ``None`` for want of memory."""
    batch, division, lengths = way.sample(inputs)
    try:
        with _undisturbed(model, inputs["input_ids"].device), _noting_what_hooks_return(model) as returned:
            together = _states(batch_division.run_divided(run, batch, division))
            if returned or not all(
                _are_close(_of_sentence(together, row, length, way), _states(run(alone, (row,))), tolerance)
                for row, length in enumerate(lengths)
                for alone in [batch_division.cut(batch, (row,), length)]
            ):
                return False
            if not is_rough:
                return True
            elsewhere = _states(batch_division.run_divided(run, _among_others(batch), division))
            return all(
                torch.equal(ours, theirs)
                for row, length in [*enumerate(lengths)][::2]
                for ours, theirs in zip(
                    *(_of_sentence(states, row, length, way) for states in (together, elsewhere)), strict=True
                )
            )
    except Exception as error:  # such as of a model that takes no such mask, or no single row
        log.info("%s could not be tried out: %s: %.200s", type(model).__name__, type(error).__name__, error)
        return None if is_for_want_of_memory(error) else False


def _among_others(batch: Inputs) -> dict[str, Any]:
    """Return the batch with other tokens in every second row, from the second on, and in the padding of all."""
    ids, mask = batch["input_ids"], batch["attention_mask"]
    is_other = mask == 0
    is_other[1::2] = True
    return {**batch, "input_ids": torch.where(is_other, ids.flip(1), ids)}


def is_for_want_of_memory(error: BaseException) -> bool:
    """Whether memory was short: CPUs and the libraries of GPUs say so in a plain RuntimeError."""
    is_said = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("memory", "alloc"))
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _of_sentence(together: Sequence[torch.Tensor], row: int, length: int, way: Division) -> list[torch.Tensor]:
    """Return the states of a sentence of a batch without those of its padding."""
    end, behind = way.first + length, way.first + way.width
    return [torch.cat([states[row : row + 1, :end], states[row : row + 1, behind:]], dim=1) for states in together]


def _states(output: Mapping[str, Any]) -> list[torch.Tensor]:
    states, last = transformer.states_of(output)
    return [*states, last]


def _are_close(found: Sequence[torch.Tensor], expected: Sequence[torch.Tensor], tolerance: float) -> bool:
    return len(found) == len(expected) and all(
        a.shape == b.shape and _is_within(a.double() - b.double(), b.double(), tolerance)
        for a, b in zip(found, expected, strict=True)
    )


def _is_within(difference: torch.Tensor, states: torch.Tensor, tolerance: float) -> bool:
    of_tokens = difference.norm(dim=-1) <= _OF_A_TOKEN * tolerance * states.norm(dim=-1)
    return bool(difference.norm() <= tolerance * states.norm()) and bool(of_tokens.all())


@contextlib.contextmanager
def _undisturbed(model: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model evaluates without gradient; outside, its modules and random numbers are as they were.

    Modules may count, note the longest input, or put others in their place. Tensors are not copied. Methods are left:
    for each pass transformers wraps those of layers and unwraps them itself, in another thread maybe meanwhile.
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
        with (
            exact_products(),
            torch.no_grad(),
            precision,
            torch.random.fork_rng(devices=[device] if kind == "cuda" else []),
        ):
            if any(module.training for module in model.modules()):
                model.eval()
            yield
    finally:
        for space, entries in before:
            changed = {name: value for name, value in entries.items() if space.get(name) is not value}
            space.update({name: value for name, value in changed.items() if name != "forward"})
            for name in space.keys() - entries.keys() - {"forward"}:
                del space[name]
