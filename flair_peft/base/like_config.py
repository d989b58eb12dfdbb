"""Whether a transformer still has the layers that its config says: a load builds it by that."""

from __future__ import annotations

import weakref

import torch
from transformers import PreTrainedModel

from flair_peft.adapter import keys
from flair_peft.base import placement, transformer
from flair_peft.errors import UnsupportedStateError, name_some

# Model → its layers when they were those that its config says.
_like_config: weakref.WeakKeyDictionary[PreTrainedModel, set[str]] = weakref.WeakKeyDictionary()


def refuse_unlike_config(model: PreTrainedModel) -> None:
    """Return if the model, with or without an adapter in it, has the layers that its config says: a load builds those.

    Raises:
        UnsupportedStateError: somebody cut some off, or put others in.
    """
    found, pruned = _layers(model), getattr(model.config, "pruned_heads", None) or {}
    if (_like_config.get(model) == found and not pruned) or _is_elsewhere(model):
        return
    lost, added = {f"{len(heads)} heads of layer {layer}" for layer, heads in pruned.items()}, set[str]()
    if not lost:
        with torch.device("meta"):
            bare = transformer.build_model(model.config, dtype=None, model_kwargs={})
        if type(bare) is type(model):
            lost, added = _layers(bare) - found, found - _layers(bare)
    if lost or added:
        without = [f"without {name_some(lost, 3)}"] if lost else []
        beside = [f"with {name_some(added, 3)}"] if added else []
        raise UnsupportedStateError(
            f"Cannot store this {type(model).__name__} {' and '.join([*without, *beside])}: its config says otherwise, "
            "and a load builds the transformer by its config. Nothing would load the file. For fewer layers, make the "
            "embeddings with transformers_config_kwargs={'num_hidden_layers': …}; or save a base that was changed with "
            "its own save_pretrained, and make them on that."
        )
    _like_config[model] = found


def _is_elsewhere(model: PreTrainedModel) -> bool:
    """Whether code of its own builds the model, or its weights are not those of its layers."""
    is_flattened = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    return is_flattened or placement.is_placed(model) or not type(model).__module__.startswith("transformers.")


def _layers(model: torch.nn.Module) -> set[str]:
    """Return the names, in the bare base, of the modules that have weights themselves, poolers aside."""
    named = (keys.base_key(name) for name, _ in model.named_parameters(remove_duplicate=False))
    return {name.rpartition(".")[0] for name in named if name is not None and not keys.is_unread(name)}
