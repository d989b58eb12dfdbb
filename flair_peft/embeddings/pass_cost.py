"""What a forward pass costs, from the sizes of a model and the device, and never from a clock."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft.adapter import keys


@dataclass(frozen=True)
class Speed:
    """What a device can do, from which it follows how many tokens a forward pass of its own has to save.

    Attributes:
        module: seconds that a module with weights takes whatever its input, the adapter's on it included: Python, and
            launches on a GPU.
        operations: floating point operations a second, in full and in half precision.
        bandwidth: bytes of weights that are read in a second, likewise; CPUs put those in half precision in order.
        dropout: seconds that dropout takes for one attention score of one head, with its backward.
    """

    module: float
    operations: tuple[float, float]
    bandwidth: tuple[float, float]
    dropout: float


# Measured with LoRA on all linear layers, one thread, in the shapes of MiniLM and BERT-base: there a pass costs as much
# as 40 tokens in fp32 and 60 to 180 in bf16, forward alone or with its backward.
_CPU = Speed(module=80e-6, operations=(1.3e11, 2.6e11), bandwidth=(8e9, 4e9), dropout=7e-9)

# Not measured. On a GPU Python does not keep up with the launches: PEFT's LoRA takes about ten kernels a module, and
# about 100 µs. A large GPU is assumed, since on a smaller one tokens cost more and a pass of its own pays sooner: for
# BERT-base from about 2,000 tokens in fp32 and 13,000 in half precision.
_ACCELERATOR = Speed(module=100e-6, operations=(5e13, 3e14), bandwidth=(2e12, 2e12), dropout=0.0)

# Each pass writes dequantised weights and reads them again, where others are read once.
_QUANTISED = 4


@dataclass(frozen=True)
class Cost:
    """What a forward pass costs, in tokens: as often as a token in all linear layers.

    Attributes:
        fixed: of any pass, however small.
        attention: what a token costs more for each position of its row.
    """

    fixed: float
    attention: float

    def of(self, rows: int, length: int) -> float:
        """Return the cost of rows that are padded to a length."""
        return self.fixed + rows * length * (1 + self.attention * length)


def compute_dtype(base: Any) -> torch.dtype:
    """Return the dtype of the products of a base: that of its weights, or autocast's."""
    weight: torch.Tensor = base.get_input_embeddings().weight
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def cost_of(base: torch.nn.Module, device: torch.device) -> Cost:
    """Return what a forward pass of a base costs on a device; it depends on nothing that is measured while it runs.

    An adapter counts as what LoRA costs.
    """
    modules, weights, stored = _sizes(base)
    speed, threads = (_CPU, torch.get_num_threads()) if device.type == "cpu" else (_ACCELERATOR, 1)
    is_half = compute_dtype(base).itemsize < torch.float32.itemsize
    a_token = 2 * weights / (speed.operations[is_half] * threads)
    fixed = modules * speed.module + stored / speed.bandwidth[is_half]
    shape = getattr(base, "config", None)
    layers, width, heads = (getattr(shape, name, None) or 0 for name in _SHAPE)
    attention = 2 * layers * width / weights
    if base.training and any(getattr(shape, name, None) for name in _DROPOUTS):
        attention += layers * heads * speed.dropout / (threads * a_token)
    factor = _QUANTISED if getattr(base, "quantization_method", None) else 1
    return Cost(factor * fixed / a_token, attention)


_SHAPE = ("num_hidden_layers", "hidden_size", "num_attention_heads")
_DROPOUTS = ("attention_probs_dropout_prob", "attention_dropout")


_known_sizes: weakref.WeakKeyDictionary[torch.nn.Module, tuple[int, int, int]] = weakref.WeakKeyDictionary()


def _sizes(base: torch.nn.Module) -> tuple[int, int, int]:
    """Return how many modules have weights that each token is multiplied with, and their numbers and bytes."""
    if base not in _known_sizes:
        looked_up = {id(p) for m in base.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
        found = {
            name: p
            for name, p in base.named_parameters()
            if p.dim() > 1 and id(p) not in looked_up and keys.base_key(f"base_model.model.{name}") is not None
        }
        held = sum(p.numel() * p.element_size() for p in found.values())
        _known_sizes[base] = len(found), max(1, sum(p.numel() for p in found.values())), held
    return _known_sizes[base]
