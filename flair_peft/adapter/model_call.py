"""Run a transformer, with its adapter if it has one: what it takes, and which rows it adds."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from flair_peft.adapter import methods
from flair_peft.adapter.methods import ADAPTER_NAME

_ALWAYS_GIVEN = frozenset({"attention_mask", "inputs_embeds", "output_attentions"})


def forward(model: PreTrainedModel | PeftModel, inputs: Mapping[str, Any]) -> Any:
    """Return the output of the model, with its adapter if it has one.

    PEFT's model for feature extraction gives every base some arguments that not all take, such as FNet and CLIP: these
    get what they take, and what PEFT's plain model gives them. Rows of a prompt need the former.
    """
    has_adapter = isinstance(model, PeftModel)
    parameters = _parameters_of(model.get_base_model() if has_adapter else model)
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    is_prompt = has_adapter and model.peft_config[ADAPTER_NAME].is_prompt_learning
    if takes_any or parameters.keys() >= _ALWAYS_GIVEN or is_prompt:
        return model(**inputs)
    known = {name: value for name, value in inputs.items() if name in parameters}
    return PeftModel.forward(model, **known) if has_adapter else model(**known)


def virtual_rows(model: PeftModel) -> int:
    """Return how many rows of the hidden states stand in front of the sentence's own."""
    config = model.peft_config[ADAPTER_NAME]
    is_in_front = methods.prepends_rows(config) and not model._adapters_disabled
    return methods.virtual_tokens(config) if is_in_front else 0


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Return the keyword arguments that keep the base from building a cache for generation."""
    return {name: False for name in ("use_cache", "use_mems") if name in _parameters_of(model)}


def _parameters_of(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """Return what the forward method takes; that of a class is read once: it takes as long as 20 modules."""
    is_own = "forward" in vars(model)
    return inspect.signature(model.forward).parameters if is_own else _parameters_of_method(type(model).forward)


@functools.lru_cache(maxsize=64)
def _parameters_of_method(method: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(method).parameters
