"""Groups of rows of similar length within a batch, each of which has a forward pass without the others' padding."""

from __future__ import annotations

import abc
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft.adapter import keys

Inputs = Mapping[str, Any]
Run = Callable[[Inputs, Sequence[int]], Mapping[str, Any]]
"""Inputs and the numbers of their rows in the batch → output."""

# Inputs of shape (batch, length, …), and those that a row has one of.
BY_POSITION = frozenset(
    {"input_ids", "attention_mask", "token_type_ids", "position_ids", "bbox", "langs", "special_tokens_mask"}
)
_BY_ROW = frozenset({"pixel_values", "image"})

# Tokens of the sentence that is padded in a trial: the fewer, the more of them stand beside the padding.
_TOKENS = 4

_STATES = ("hidden_states", "encoder_hidden_states")
_LAST = ("last_hidden_state", "encoder_last_hidden_state")


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


@dataclass(frozen=True, kw_only=True)
class Division(abc.ABC):
    """A way to run a batch without the padding of its sentences.

    Attributes:
        width: to which the batch is padded.
        first: how many rows of the outputs stand in front of the inputs'.
    """

    width: int
    first: int = 0

    @property
    @abc.abstractmethod
    def tried_length(self) -> int:
        """How long rows are; what a trial finds for some length holds for less."""

    @property
    @abc.abstractmethod
    def kind(self) -> Hashable:
        """What is tried out once for all divisions that have it in common."""

    @abc.abstractmethod
    def cost(self, price: Cost) -> float:
        """Return what the passes cost."""

    @abc.abstractmethod
    def run(self, run: Run, inputs: Inputs) -> Mapping[str, Any]:
        """Return the output for the inputs of the batch, as one pass for all gives it."""

    @abc.abstractmethod
    def join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return one tensor of shape (batch, width, hidden), zero for padding, from the states of each pass."""

    @abc.abstractmethod
    def sample(self, inputs: Inputs) -> tuple[Inputs, Division | None, Sequence[int]]:
        """Return a small batch on which this can be tried out, how it is divided, and the lengths to compare."""


@dataclass(frozen=True)
class LengthGroups(Division):
    """Groups of rows of similar length, each of which has a pass of its own.

    Attributes:
        rows: the numbers of the rows of each group, the longest rows first.
        lengths: to which the rows of each group are padded.
        before: positions in front of each row that are no inputs, such as those of a prefix, with these rows.
    """

    rows: tuple[tuple[int, ...], ...]
    lengths: tuple[int, ...]
    before: int = 0

    @property
    def tried_length(self) -> int:
        """To which rows are padded without groups."""
        return self.width

    @property
    def kind(self) -> Hashable:
        """That padding makes no difference."""
        return "padding"

    def cost(self, price: Cost) -> float:
        """Return what the passes cost."""
        return sum(
            price.of(len(rows), self.before + length) for rows, length in zip(self.rows, self.lengths, strict=True)
        )

    def run(self, run: Run, inputs: Inputs) -> Mapping[str, Any]:
        """Return the output for the inputs, computed group by group."""
        parts = zip(self.rows, self.lengths, strict=True)
        return JoinedOutput([run(cut(inputs, rows, length), rows) for rows, length in parts], self)

    def join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return one tensor of shape (batch, width, hidden), zero beyond each group, from one of each group."""
        order = [*sum(self.rows, ())]
        places = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=states[0].device)
        padded = [self._pad(each, length) for each, length in zip(states, self.lengths, strict=True)]
        return torch.cat(padded).index_select(0, places)

    def _pad(self, states: torch.Tensor, length: int) -> torch.Tensor:
        gap = states.new_zeros(len(states), self.width - length, *states.shape[2:])
        at = self.first + length
        return torch.cat([states[:, :at], gap, states[:, at:]], dim=1)

    def sample(self, inputs: Inputs) -> tuple[Inputs, Division | None, Sequence[int]]:
        """Return the first tokens of a short sentence beside the longest one, undivided."""
        tokens = min(_TOKENS, self.lengths[-1])
        pair = cut(inputs, (self.rows[-1][-1], self.rows[0][0]), self.width)
        pair["attention_mask"][0, tokens:] = 0
        return pair, None, [tokens]


def find_lengths(inputs: Inputs, cost: Callable[[], Cost]) -> list[int] | None:
    """Return the lengths of the sentences, ``None`` where the batch cannot be divided or is too small for it.

    Args:
        inputs: of the transformer. Padding stands behind each row: tokenizers of embeddings put it there.
        cost: of a forward pass; only asked for where there is anything to divide.
    """
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None or len(ids) < 2 or not all(_can_be_cut(name, given, ids) for name, given in inputs.items()):
        return None
    # A group saves less than the whole batch costs. Beneath that, lengths need not be fetched from a GPU.
    if ids.numel() <= cost().fixed or mask.shape != ids.shape:
        return None
    counts = mask.sum(dim=1)
    if not torch.equal(mask, (torch.arange(ids.shape[1], device=mask.device) < counts[:, None]).to(mask.dtype)):
        return None
    return [max(1, count) for count in counts.tolist()]


def _can_be_cut(name: str, given: Any, ids: torch.Tensor) -> bool:
    if not isinstance(given, torch.Tensor):
        return given is None or isinstance(given, bool)
    shape = ids.shape if name in BY_POSITION else ids.shape[:1]
    return name in BY_POSITION | _BY_ROW and given.shape[: len(shape)] == shape


def divide(lengths: Sequence[int], cost: Cost) -> list[list[int]]:
    """Return the numbers of the rows in the groups that cost least together, found by dynamic programming.

    The longest rows come first, rows of one length in their order.
    """
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    ends = [end for end in range(1, len(order)) if lengths[order[end]] != lengths[order[end - 1]]] + [len(order)]
    best = {0: (0.0, 0)}
    for end in ends:
        best[end] = min(
            (known + cost.of(end - start, lengths[order[start]]), start) for start, (known, _) in best.items()
        )
    groups, end = list[list[int]](), len(order)
    while end:
        start = best[end][1]
        groups.insert(0, order[start:end])
        end = start
    return groups


def group(lengths: Sequence[int], price: Cost, *, width: int, first: int = 0, before: int = 0) -> LengthGroups:
    """Return the groups that cost least, of which there may be but one."""
    groups = divide([before + length for length in lengths], price)
    padded_to = tuple(lengths[rows[0]] for rows in groups)
    return LengthGroups(tuple(map(tuple, groups)), padded_to, before, width=width, first=first)


def run_in_groups(run: Run, inputs: Inputs, groups: Division | None) -> Mapping[str, Any]:
    """Return the output for the inputs, computed so divided, or as they are."""
    return run(inputs, range(len(inputs["input_ids"]))) if groups is None else groups.run(run, inputs)


def cut(inputs: Inputs, rows: Sequence[int], length: int) -> dict[str, Any]:
    """Return the inputs of these rows, cut to a length; tensors are new ones."""
    found = {}
    for name, given in inputs.items():
        if isinstance(given, torch.Tensor):
            given = given[torch.tensor(rows, device=given.device)]
            given = given[:, :length] if name in BY_POSITION else given
        found[name] = given
    return found


class JoinedOutput(Mapping[str, Any]):
    """The hidden states of a divided batch, as one pass for all would return them, with zeros for the padding.

    They are put together when they are asked for: most layers never are.
    """

    def __init__(self, outputs: Sequence[Mapping[str, Any]], division: Division) -> None:
        self._division = division
        names = [name for name in (*_STATES, *_LAST) if outputs[0].get(name) is not None]
        self._parts = {name: [output[name] for output in outputs] for name in names}
        self._joined: dict[int, torch.Tensor] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, name: str) -> Any:
        parts = self._parts[name]
        if name not in _STATES:
            return self._join(parts)
        layers = list(zip(*parts, strict=True))
        return LazyStates(len(layers), lambda index: self._join(layers[index]))

    def _join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        # Models return one tensor under several names.
        if id(states[0]) not in self._joined:
            self._joined[id(states[0])] = self._division.join(states)
        return self._joined[id(states[0])]


class LazyStates(Sequence[torch.Tensor]):
    """The hidden states of all layers, each of which is put together when it is asked for: most never are."""

    def __init__(self, count: int, find: Callable[[int], torch.Tensor]) -> None:
        self._count, self._find = count, find

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[each] for each in range(*index.indices(self._count)))
        return self._find(index)
