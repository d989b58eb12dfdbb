"""Whether a transformer still has the layers that its config says: a load builds it by that."""

from __future__ import annotations

import logging
import weakref

import torch
from transformers import PreTrainedModel

from flair_peft.adapter import keys
from flair_peft.base import placement, transformer
from flair_peft.errors import UnsupportedStateError, name_some

log = logging.getLogger("flair_peft")

_ADVICE = (
    "Its config says otherwise, and a load builds the transformer by its config: nothing would load the file. For "
    "fewer layers, make the embeddings with transformers_config_kwargs={'num_hidden_layers': …}; or save a base that "
    "was changed with its own save_pretrained, and make them on that."
)

# Model → its layers when they were those that its config says.
_like_config: weakref.WeakKeyDictionary[PreTrainedModel, set[str]] = weakref.WeakKeyDictionary()


def refuse_unlike_config(model: PreTrainedModel) -> None:
    """Return if the model, with or without an adapter in it, has the layers that its config says: a load builds those.

    Raises:
        UnsupportedStateError: somebody cut some off, or put others in.
    """
    if unlike := _unlike_config(model):
        raise UnsupportedStateError(f"Cannot train this {type(model).__name__} {unlike}. {_ADVICE}")


def report_unlike_config(model: PreTrainedModel) -> None:
    """Say if it has not; what was trained is saved all the same."""
    if unlike := _unlike_config(model):
        log.warning("This %s is saved %s. %s", type(model).__name__, unlike, _ADVICE)


def _unlike_config(model: PreTrainedModel) -> str:
    """Return what the model lacks and what it has besides; "" if it is what its config says, or that is not known."""
    found, pruned = _layers(model), getattr(model.config, "pruned_heads", None) or {}
    if (_like_config.get(model) == found and not pruned) or _is_elsewhere(model):
        return ""
    lost, added = {f"{len(heads)} heads of layer {layer}" for layer, heads in pruned.items()}, set[str]()
    if not lost:
        try:
            with torch.device("meta"):
                bare = transformer.build_model(model.config, dtype=None, model_kwargs={})
        except Exception as error:  # some classes compute with values when they are made, and there are none
            log.debug("Not compared with its config: %s: %s", type(error).__name__, error)
            return ""
        if type(bare) is type(model):
            lost, added = _layers(bare) - found, found - _layers(bare)
    if not lost and not added:
        _like_config[model] = found
    without, beside = (name_some(names, 3) if names else "" for names in (lost, added))
    return " and ".join(filter(None, [without and f"without {without}", beside and f"with {beside}"]))


def _is_elsewhere(model: PreTrainedModel) -> bool:
    """Whether code of its own builds the model, or its weights are not those of its layers."""
    is_flattened = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_flattened or placement.is_placed(model) or not type(model).__module__.startswith("transformers.")


def _layers(model: torch.nn.Module) -> set[str]:
    """Return the names, in the bare base, of the modules that have weights themselves, poolers aside."""
    named = (keys.base_key(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return {name.rpartition(".")[0] for name in named if name is not None and not keys.is_unread(name)}
