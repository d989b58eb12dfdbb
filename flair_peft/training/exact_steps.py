"""Steps of an optimiser in fp32 for what trains in half precision, which most updates are too small for."""

from __future__ import annotations

import contextlib
import functools
import types
import weakref
from collections.abc import Iterator
from typing import Any

import torch

_sums: weakref.WeakKeyDictionary[Any, dict[torch.nn.Parameter, torch.Tensor]] = weakref.WeakKeyDictionary()


def sums_of(optimizer: Any) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Return what an optimiser added up in fp32, of shape and place of each parameter; it may be changed."""
    return _sums.setdefault(optimizer, {})


@contextlib.contextmanager
def exact_steps(optimizer: Any) -> Iterator[None]:
    """Inside, the optimiser adds up in fp32 what it does to parameters in half precision; they compute as before.

    PEFT gives fp32 to what a method adds, and to nothing else that is trained: norms, biases and copies of modules keep
    the dtype of the base. An optimiser of any class that has ``param_groups`` and ``step`` can be given; with a closure
    it steps as it would, since that computes with the parameters in between.
    """
    if not any(map(_is_narrow, _parameters_of(optimizer))):
        yield
        return
    step, is_over = optimizer.step, False

    @functools.wraps(getattr(step, "__func__", step))
    def step_exactly(_: Any, *args: Any, **kwargs: Any) -> Any:
        if is_over or args or kwargs.get("closure") is not None:
            return step(*args, **kwargs)
        with _widened(optimizer):
            return step(*args, **kwargs)

    # A method, since schedulers wrap it once more; of this one object, so that what it calls of its class is inside.
    optimizer.step = types.MethodType(step_exactly, optimizer)
    try:
        yield
    finally:
        is_over = True


@contextlib.contextmanager
def _widened(optimizer: Any) -> Iterator[None]:
    """Inside, parameters in half precision that have a gradient are in fp32, as are their gradients and states."""
    sums = sums_of(optimizer)
    narrow: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []
    try:
        for parameter in filter(_is_narrow, _parameters_of(optimizer)):
            if parameter.grad is not None:
                narrow.append((parameter, parameter.data, parameter.grad))
                _set_(parameter, _exact(parameter.data, sums.get(parameter)), parameter.grad.float())
                _widen_state_(optimizer, parameter, narrow[-1][1].dtype)
        yield
    finally:
        for parameter, value, gradient in narrow:
            if parameter.dtype == torch.float32:
                sums[parameter] = parameter.data
                value.copy_(parameter.data)
            _set_(parameter, value, None if parameter.grad is None else gradient)


def _parameters_of(optimizer: Any) -> list[torch.nn.Parameter]:
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _is_narrow(parameter: torch.nn.Parameter) -> bool:
    return parameter.dtype in (torch.bfloat16, torch.float16)


def _exact(value: torch.Tensor, exact: torch.Tensor | None) -> torch.Tensor:
    """Return the sums where ``value`` still is what they round to, and itself where something else changed it."""
    if exact is None or exact.shape != value.shape:
        return value.float()
    exact = exact.to(value.device)
    return torch.where(exact.to(value.dtype) == value, exact, value.float())


def _widen_state_(optimizer: Any, parameter: torch.nn.Parameter, dtype: torch.dtype) -> None:
    """Give fp32 to what an optimiser made beside a narrow parameter, or what was read for one."""
    state = getattr(optimizer, "state", {}).get(parameter, {})
    state.update({k: t.float() for k, t in state.items() if isinstance(t, torch.Tensor) and t.dtype == dtype})


def _set_(parameter: torch.nn.Parameter, value: torch.Tensor, gradient: torch.Tensor | None) -> None:
    parameter.grad = None  # which has to have the dtype of the parameter
    parameter.data, parameter.grad = value, gradient
