"""What a method computes from the base's weights and no state dict holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import PeftModel
from peft.tuners._buffer_dict import BufferDict

from flair_peft.adapter import keys, mending
from flair_peft.adapter.methods import ADAPTER_NAME


def read(model: PeftModel) -> dict[str, torch.Tensor]:
    """Return name → tensor of what the method computed from the base's weights and no state dict holds.

    A decomposition computed again on another machine may have other signs or another order.
    """
    stored = model.state_dict().keys()
    state = {}
    for name, module in model.named_modules():
        if isinstance(module, BufferDict):
            state.update({f"{name}.{key}": tensor for key, tensor in module.items() if f"{name}.{key}" not in stored})
        index = getattr(module, "scatter_index", None)
        if isinstance(index, dict) and ADAPTER_NAME in index:
            state[f"{name}.scatter_index.{ADAPTER_NAME}"] = index[ADAPTER_NAME]
    return state


def put_back_(model: PeftModel, state: Mapping[str, torch.Tensor]) -> None:
    """Put back, in place, what :func:`read` returned."""
    for name, tensor in state.items():
        path, _, key = name.rpartition(".")
        if path.endswith(".scatter_index"):
            module = model.get_submodule(path.removesuffix(".scatter_index"))
            module.scatter_index[key] = tensor.to(model.device)
        else:
            buffers = model.get_submodule(path)
            buffers[key] = tensor.to(buffers[key].device)
    mending.repair_(model)


def computed_again(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor]) -> set[str]:
    """Return the keys of those tensors that no file need hold, since the model computes the same itself.

    PEFT 0.11 and 0.12 stored the permutations of BOFT, which follow from its settings.
    """
    own = {keys.canonical_key(name): buffer for name, buffer in model.named_buffers() if keys.base_key(name) is None}
    namesakes = {key: own.get(keys.canonical_key(key)) for key in tensors if isinstance(tensors[key], torch.Tensor)}
    return {
        key
        for key, buffer in namesakes.items()
        if buffer is not None and torch.equal(buffer.cpu(), tensors[key].to("cpu", buffer.dtype))
    }
