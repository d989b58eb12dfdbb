"""Steps of an optimiser in fp32 for what trains in half precision, which most updates are too small for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from flair_peft.embeddings.exact_values import exact_value

_EXACT = "flair_peft_exact"


@contextlib.contextmanager
def exact_steps(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Inside, the optimiser adds up in fp32 what it does to parameters in half precision; they compute as before.

    PEFT gives fp32 to what a method adds, and to nothing else that is trained: norms, biases and copies of modules keep
    the dtype of the base. The sums stand in the state of the optimiser, with which a training goes on.
    """
    widened: list[tuple[torch.nn.Parameter, torch.Tensor, torch.Tensor]] = []

    def widen_(*_: Any) -> None:
        for parameter in [parameter for group in optimizer.param_groups for parameter in group["params"]]:
            if parameter.grad is not None and parameter.dtype in (torch.bfloat16, torch.float16):
                narrow, gradient = parameter.data, parameter.grad
                exact = optimizer.state.get(parameter, {}).get(_EXACT)
                _set_(parameter, narrow.float() if exact is None else exact_value(narrow, exact), gradient.float())
                widened.append((parameter, narrow, gradient))

    def narrow_(*_: Any) -> None:
        for parameter, narrow, gradient in widened:
            exact = optimizer.state[parameter][_EXACT] = parameter.data
            _set_(parameter, narrow.copy_(exact), gradient)
        widened.clear()

    hooks = [optimizer.register_step_pre_hook(widen_), optimizer.register_step_post_hook(narrow_)]
    try:
        yield
    finally:
        narrow_()  # where a step was interrupted
        for hook in hooks:
            hook.remove()


def _set_(parameter: torch.nn.Parameter, value: torch.Tensor, gradient: torch.Tensor) -> None:
    parameter.grad = None  # which has to have the dtype of the parameter
    parameter.data, parameter.grad = value, gradient
