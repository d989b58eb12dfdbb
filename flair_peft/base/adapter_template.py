"""The adapter that models on a base had last, kept to be copied for the next one that has the same.

PEFT walks through the modules of a base again and again to add an adapter. A copy of what came of it takes less time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel

from flair_peft.adapter import config as configs
from flair_peft.adapter import mending, methods, traits
from flair_peft.base import module_copy
from flair_peft.primitives import building

# Numbers in an adapter that may be kept beside any base, however small.
_FEW_NUMBERS = 1 << 20


class AdapterTemplate:
    """Adds adapters to copies of one base, those with the config of the one before by copying.

    What is kept holds no weights of the base, and is nobody's model: its values are those with which the adapter
    starts. It is made when a second model has the config, since a single one needs none.
    """

    def __init__(self) -> None:
        self._settings: str | None = None
        self._model: PeftModel | None = None
        # Its parameters that stand for those of the base, in their order.
        self._of_base: list[torch.nn.Parameter] = []

    def add(self, base: PreTrainedModel, config: PeftConfig, make: Callable[[], PeftModel]) -> PeftModel:
        """Return the model with an adapter whose tensors a state dict will fill; ``make`` adds it to the base.

        The base's parameters are those of the result; what else there is of it may be used up.
        """
        if not _can_be_copied(config):
            return make()
        described = [type(config).__name__, str(torch.get_default_dtype()), configs.encode_config(config)]
        settings = json.dumps(described, sort_keys=True)
        of_base = list(base.parameters())
        with building.lock:
            if settings == self._settings and self._model is not None:
                return _copy_around(self._model, self._of_base, of_base)
            model, is_second = make(), settings == self._settings
            self._settings, self._model, self._of_base = settings, None, []
            if is_second and _is_worth_keeping(model, of_base):
                self._of_base = [torch.nn.Parameter(p.detach().to("meta"), requires_grad=False) for p in of_base]
                self._model = _copy_around(model, of_base, self._of_base)
            return model


def _can_be_copied(config: PeftConfig) -> bool:
    """Whether all that an adapter of this config starts with is in modules, and the same on every copy of a base."""
    is_in_layers = methods.method_traits(config).kind == traits.LAYERS
    return is_in_layers and not (methods.reads_base(config) or methods.keeps_graph(config))


def _is_worth_keeping(model: PeftModel, of_base: Sequence[torch.nn.Parameter]) -> bool:
    """Whether a model with an adapter still has the parameters of its base, and few beside them: they take memory."""
    held = {id(parameter): parameter.numel() for parameter in model.parameters()}
    base = sum(held.pop(id(parameter), 0) for parameter in of_base)
    is_whole = base == sum(parameter.numel() for parameter in of_base)
    return is_whole and sum(held.values()) <= max(_FEW_NUMBERS, base // 16)


def _copy_around(
    model: PeftModel, replaced: Sequence[torch.nn.Parameter], new: Sequence[torch.nn.Parameter]
) -> PeftModel:
    """Return a copy of a model that has other parameters in the place of some, trained where these are."""
    for old, parameter in zip(replaced, new, strict=True):
        parameter.requires_grad_(old.requires_grad)
    memo = {id(old): parameter for old, parameter in zip(replaced, new, strict=True)}
    copied: PeftModel = module_copy.copy_modules(model, dict(memo))
    mending.repair_(copied)
    return copied
