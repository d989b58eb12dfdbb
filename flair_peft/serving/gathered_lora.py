"""LoRA adapters of many models in one forward pass: two batched products in each layer, whatever their ranks.

PEFT's mixed batches loop over the adapters in each layer. Here a copy of the base has hooks, each of which adds to the
output of a layer what the adapters of the rows add to it: their matrices are gathered, those of smaller ranks are
filled up with zeros, and the scale of each adapter is applied between its two products.

Matrices are gathered in each pass, and from the tensors that the models have at that time: gathering costs a few
per cent of a pass, and nothing has to be proven unchanged since the last one.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PreTrainedModel

from flair_peft.base.changed_modules import is_changed
from flair_peft.errors import AdapterConfigError

# Bytes that are gathered in the time that one more product takes: 5 to 10 µs on a core, which copies some 10 GB a
# second; on a GPU, whose memory is a hundred times as fast, the time in which a few kernels are launched.
_BYTES_PER_PRODUCT = {"cpu": 96 * 2**10}
_BYTES_PER_PRODUCT_ELSEWHERE = 16 * 2**20


class LowRank(NamedTuple):
    """What an adapter adds to a linear layer: ``b @ a * scaling``; ``a`` is (rank, inputs), ``b`` (outputs, rank)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    @property
    def nbytes(self) -> int:
        """Bytes of both matrices."""
        return self.a.nbytes + self.b.nbytes


@dataclass(eq=False)
class PlainLora:
    """An adapter that adds products of two matrices to outputs of linear layers, and does nothing else.

    Attributes:
        matrices: path of the linear layer in the base → what is added to its output.
        others: parameters that are not of the adapter.
        classes: of the modules that are not of the adapter, in the order in which they were found.
        modules: these, by their path in the base.
    """

    matrices: dict[str, LowRank] = field(default_factory=dict)
    others: list[torch.nn.Parameter] = field(default_factory=list)
    classes: list[type[torch.nn.Module]] = field(default_factory=list)
    modules: dict[str, torch.nn.Module] = field(default_factory=dict)

    @classmethod
    def of(cls, model: PeftModel, name: str) -> PlainLora | None:
        """Return the adapter of this name, or ``None`` if there is more to it than that, or it is not in effect alone.

        It is looked up for each model in each prediction: ``named_modules`` would take as long as a small forward pass.
        """
        if not isinstance(model.base_model, LoraModel) or set(model.peft_config) != {name} or model._adapters_disabled:
            return None
        if is_changed(model) or is_changed(model.base_model):
            return None
        found, seen, stack = cls(), set[int](), [("", model.base_model.model)]
        while stack:
            path, module = stack.pop()
            if id(module) in seen:
                continue
            seen.add(id(module))
            if is_changed(module) or module.training:
                return None
            if type(module) is Linear and (matrices := _matrices_of(module, name)) is not None:
                found.matrices[path] = matrices
                stack.append((path, module._modules["base_layer"]))
            elif _belongs_to_adapters(module.__class__):
                return None
            else:
                found.classes.append(module.__class__)
                found.modules[path] = module
                found.others += [weight for weight in module._parameters.values() if weight is not None]
                for key, child in module._modules.items():
                    if child is not None:
                        stack.append((f"{path}.{key}" if path else key, child))
        return found if found.matrices else None

    @property
    def kind(self) -> object:
        """What adapters have in common of which one pass shows whether the others can be gathered: layers, dtypes."""
        dtypes = frozenset(matrix.a.dtype for matrix in self.matrices.values())
        return (frozenset(self.matrices), dtypes, tuple(self.classes))


@functools.cache
def _belongs_to_adapters(kind: Any) -> bool:
    return issubclass(kind, (BaseTunerLayer, AuxiliaryTrainingWrapper))


def _matrices_of(layer: Linear, name: str) -> LowRank | None:
    """Return the matrices of an adapter; ``None`` if the layer adds more than them or less: a bias, DoRA, a variant."""
    if layer.merged_adapters or layer.disable_adapters or name in layer.lora_variant or layer.active_adapters != [name]:
        return None
    # From the dictionaries: to find an attribute of a module takes longer than all the rest.
    dropout = layer._modules["lora_dropout"]._modules.get(name)
    if dropout is not None and dropout.training:
        return None
    a, b = (_only_weight(layer._modules[key]._modules.get(name)) for key in ("lora_A", "lora_B"))
    return None if a is None or b is None else LowRank(a, b, float(layer.scaling[name]))


def _only_weight(layer: torch.nn.Module | None) -> torch.Tensor | None:
    """Return the weight of a plain linear layer that has nothing else."""
    if type(layer) is not torch.nn.Linear or layer._parameters.get("bias") is not None or is_changed(layer):
        return None
    return layer._parameters.get("weight")


class GatheredLora:
    """A copy of a frozen base that computes with the adapters that each call names, one for each row.

    It holds no tensor of an adapter between two calls. Calls must not overlap.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Take a model that nobody else calls; its layers get hooks when an adapter needs them."""
        self.model = model.eval().requires_grad_(False)
        self._runs: list[tuple[PlainLora, int]] = []  # adapters, each with the number of successive rows that are its
        self._hooked: set[str] = set()

    def __call__(self, adapters: Sequence[PlainLora], **inputs: Any) -> Any:
        """Return the output of the model; the adapters are one for each row of the inputs.

        Raises:
            AdapterConfigError: a layer of an adapter gets something else than rows of sentences.
        """
        for path in {path: None for adapter in dict.fromkeys(adapters) for path in adapter.matrices}:
            if path not in self._hooked:
                # The hook must not hold the model, which could only be freed together with it.
                hook = functools.partial(_add_, self._runs, path)
                self.model.get_submodule(path).register_forward_hook(hook)
                self._hooked.add(path)
        self._runs[:] = [(adapter, len([*rows])) for adapter, rows in itertools.groupby(adapters)]
        try:
            return self.model(**inputs)
        finally:
            self._runs.clear()


def _add_(
    adapters: Sequence[tuple[PlainLora, int]],
    path: str,
    _: torch.nn.Module,
    args: tuple[torch.Tensor, ...],
    output: torch.Tensor,
) -> torch.Tensor:
    """Return the output of the layer with what the adapters add to it, which is done in place where it can be."""
    runs = [(adapter.matrices.get(path), count) for adapter, count in adapters]
    present = [matrix for matrix, _ in runs if matrix is not None]
    if not present:
        return output
    rows = sum(count for _, count in runs)
    if len(args[0]) != rows:
        raise AdapterConfigError(
            f"Cannot mix adapters of '{path}': it gets {len(args[0])} rows in a batch of {rows} sentences. What "
            "each row takes from its adapter is unknown then. Predict with one model at a time."
        )
    x, result = args[0].reshape(rows, -1, args[0].shape[-1]), output.reshape(rows, -1, output.shape[-1])
    are_even = len({count for _, count in runs}) == 1
    gathered = len(runs) if are_even else rows
    limit = _BYTES_PER_PRODUCT.get(x.device.type, _BYTES_PER_PRODUCT_ELSEWHERE)
    if limit * len(present) <= max(matrix.nbytes for matrix in present) * gathered:
        _add_in_turn_(result, x, runs)
    else:
        matrices = [matrix for matrix, count in runs for _ in range(1 if are_even else count)]
        shape = (gathered, -1)
        _add_products_(result.view(*shape, result.shape[-1]), x.view(*shape, x.shape[-1]), *_gather(matrices))
    return result.view(output.shape)


def _add_in_turn_(result: torch.Tensor, x: torch.Tensor, runs: Sequence[tuple[LowRank | None, int]]) -> None:
    """Add the products of each adapter to its rows, in place."""
    first = 0
    for matrix, count in runs:
        if matrix is not None:
            mine, theirs = (each[first : first + count].view(1, -1, each.shape[-1]) for each in (result, x))
            _add_products_(mine, theirs, matrix.a[None], matrix.b[None], matrix.scaling)
        first += count


def _gather(matrices: Sequence[LowRank | None]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
    """Return (n, rank, inputs), (n, outputs, rank) and scales; zeros fill what smaller ranks and ``None`` leave."""
    present = [matrix for matrix in matrices if matrix is not None]
    ranks = {len(matrix.a) for matrix in present}
    scalings = {matrix.scaling for matrix in present}
    if len(present) < len(matrices) or len(ranks) > 1:
        first, rank = present[0], max(ranks)
        nothing = LowRank(first.a[:0], first.b[:, :0], first.scaling)
        present = [_filled_up(matrix or nothing, rank) for matrix in matrices]
    a, b = torch.stack([matrix.a for matrix in present]), torch.stack([matrix.b for matrix in present])
    if len(scalings) == 1:
        return a, b, present[0].scaling
    exact = torch.promote_types(a.dtype, torch.float32)
    return a, b, torch.tensor([matrix.scaling for matrix in present], device=a.device, dtype=exact)[:, None, None]


def _filled_up(matrix: LowRank, rank: int) -> LowRank:
    missing = rank - len(matrix.a)
    a = torch.nn.functional.pad(matrix.a, (0, 0, 0, missing))
    return LowRank(a, torch.nn.functional.pad(matrix.b, (0, missing)), matrix.scaling)


def _add_products_(
    result: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor | float
) -> None:
    """Add ``x @ aᵀ * scaling @ bᵀ`` to the result, (n, positions, outputs); dtypes are those that PEFT computes in."""
    inner = torch.bmm(x.to(a.dtype), a.mT).mul_(scaling)
    if inner.dtype == b.dtype == result.dtype:
        result.baddbmm_(inner, b.mT)
    else:
        result += torch.bmm(inner, b.mT).to(result.dtype)
