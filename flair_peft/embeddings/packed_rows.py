"""Packed rows: sentences of a batch one behind the other, with a mask through which each of them sees itself alone."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft.embeddings import batch_division, pass_cost
from flair_peft.embeddings.batch_division import BY_POSITION, Division, Inputs, JoinedOutput, Run
from flair_peft.embeddings.pass_cost import Cost

# To sort a batch into rows and back, as a share of what any pass costs.
_SORTING = 0.1


@dataclass(frozen=True)
class Form:
    """How a model may take packed rows; whether it does is tried out.

    Attributes:
        is_causal: as decoders take a mask that is ready to be added to scores, (rows, 1, length, length) with -∞ where
            a token may not look; otherwise it is 1 where it may, (rows, length, length).
        dtype: of the former.
        has_positions: the model is told the positions, which begin anew with each sentence.
        padding: where RoBERTa and its kin begin to count, passing over the token with this id.
    """

    is_causal: bool
    dtype: torch.dtype
    has_positions: bool
    padding: int | None

    def mask(self, owners: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return a mask for rows whose positions belong to these sentences; padding sees padding.

        Args:
            owners: (rows, length).
            dtype: of a mask of ones.
        """
        may_look = owners[:, :, None] == owners[:, None, :]
        if not self.is_causal:
            return may_look.to(dtype)
        mask = torch.zeros_like(may_look, dtype=self.dtype)
        return mask.masked_fill_(~may_look.tril_(), torch.finfo(self.dtype).min)[:, None]

    def positions(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the positions of a batch that is not packed, (batch, length), as the model counts them by itself."""
        if self.padding is None:
            return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        is_counted = ids != self.padding
        return is_counted.cumsum(dim=1) * is_counted + self.padding


def forms_of(base: Any) -> list[Form]:
    """Return the forms in which a transformer may take packed rows."""
    has_positions = "position_ids" in inspect.signature(base.forward).parameters
    dtype, padding = pass_cost.compute_dtype(base), _counting_from(base)
    return [Form(is_causal, dtype, has_positions, padding) for is_causal in (False, True)]


_known_counting: weakref.WeakKeyDictionary[torch.nn.Module, int | None] = weakref.WeakKeyDictionary()


def _counting_from(base: torch.nn.Module) -> int | None:
    """Return the token that positions pass over: that of padding, where it has a position of its own."""
    if base not in _known_counting:
        named = (module for name, module in base.named_modules() if "position_embeddings" in name)
        found = (getattr(module, "padding_idx", None) for module in named)
        _known_counting[base] = next((padding for padding in found if padding is not None), None)
    return _known_counting[base]


@dataclass(frozen=True)
class PackedRows(Division):
    """How a batch is packed.

    Attributes:
        rows: the numbers of the sentences in each row, in their order.
        length: of the rows.
        limit: to which rows of sentences that are no longer may be long.
        lengths: of the sentences.
        form: in which the model gets them.
    """

    rows: tuple[tuple[int, ...], ...]
    length: int
    limit: int
    lengths: tuple[int, ...]
    form: Form

    @property
    def tried_length(self) -> int:
        """That of the longest sentence; rows are tried out in the greatest length that they may have with it."""
        return max(self.lengths)

    @property
    def kind(self) -> Hashable:
        """What is tried out."""
        return self.form

    def cost(self, price: Cost) -> float:
        """Return what the pass costs."""
        return price.of(len(self.rows), self.length) + _SORTING * price.fixed

    def run(self, run: Run, inputs: Inputs) -> Mapping[str, Any]:
        """Return the output for the inputs of the batch, as one pass for all would."""
        return JoinedOutput([run(self.pack(inputs), [*sum(self.rows, ())])], self)

    def pack(self, inputs: Inputs) -> dict[str, Any]:
        """Return the inputs in rows, with positions and a mask; tensors are new ones."""
        ids, mask, given = inputs["input_ids"], inputs["attention_mask"], dict(inputs)
        if self.form.has_positions and given.get("position_ids") is None:
            given["position_ids"] = self.form.positions(ids)
        places, owners = (each.to(ids.device) for each in self._ways[:2])
        shape = len(self.rows), self.length
        for name, value in given.items():
            if isinstance(value, torch.Tensor):
                given[name] = value.flatten(0, 1).index_select(0, places).unflatten(0, shape)
        return {**given, "attention_mask": self.form.mask(owners.view(shape), mask.dtype)}

    def join(self, states: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return hidden states of shape (batch, width, hidden), zero for padding, from those of the rows."""
        (packed,) = states
        # Not flattened: torch refuses states of other rows than these.
        rows = packed.reshape(len(self.rows) * self.length, packed.shape[-1])
        flat = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        return flat.index_select(0, self._ways[2].to(flat.device)).unflatten(0, (len(self.lengths), self.width))

    @functools.cached_property
    def _ways(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Whence and whither: for each position of the rows, its place in the batch, and the sentence, -1 for none.

        And for each position of the batch its place in the rows, which is behind them for padding.
        """
        size = len(self.rows) * self.length
        shortest = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        places, owners = [(shortest + 1) * self.width - 1] * size, [-1] * size  # which is padding
        back = [size] * (len(self.lengths) * self.width)
        for number, row in enumerate(self.rows):
            at = number * self.length
            for sentence in row:
                start, count = sentence * self.width, self.lengths[sentence]
                places[at : at + count] = range(start, start + count)
                owners[at : at + count] = [sentence] * count
                back[start : start + count] = range(at, at + count)
                at += count
        return torch.tensor(places), torch.tensor(owners), torch.tensor(back)

    def sample(self, inputs: Inputs) -> tuple[Inputs, Division | None, Sequence[int]]:
        """Return a batch on which this can be tried out, how it is packed, and its lengths.

        Parts of the longest sentence of different lengths stand in a row, and all of it in another.
        """
        longest = max(range(len(self.lengths)), key=self.lengths.__getitem__)
        lengths = (*(max(1, self.limit // share) for share in (4, 6, 2)), self.lengths[longest])
        batch = batch_division.cut(inputs, [longest] * len(lengths), self.width)
        ends = torch.tensor(lengths, device=batch["input_ids"].device)[:, None]
        is_token = torch.arange(self.width, device=ends.device) < ends
        batch["attention_mask"] = is_token.to(batch["attention_mask"].dtype)
        packed = PackedRows(((0, 1, 2), (3,)), self.limit, self.limit, lengths, self.form, width=self.width)
        return batch, packed, lengths


def find(inputs: Inputs, lengths: Sequence[int], price: Cost, base: Any) -> list[PackedRows]:
    """Return the rows that cost least, in each form; none for inputs that nobody can pack.

    Nor for sentences longer than a window of attention, which a mask that is ready replaces in transformers. Rows that
    are longer than the longest sentence have less room left, and more positions to look at.
    """
    longest, total = max(lengths), sum(lengths)
    tensors = {name for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    if not tensors <= BY_POSITION or longest < 3 or longest > _window_of(base):
        return []
    takes = getattr(getattr(base, "config", None), "max_position_embeddings", None) or longest
    limit = max(longest, min(takes, 3 * longest // 2))
    found, least, best = list[list[int]](), longest, float("inf")
    for length in range(longest, limit + 1, max(1, longest // 32)):
        if price.of(-(-total // length), length) < best:
            rows = _first_fit(lengths, length)
            if price.of(len(rows), length) < best:
                found, least, best = rows, length, price.of(len(rows), length)
    width = inputs["input_ids"].shape[1]
    return [
        PackedRows(tuple(map(tuple, found)), least, limit, tuple(lengths), form, width=width) for form in forms_of(base)
    ]


def _window_of(base: Any) -> float:
    """Return how long sentences may be in which each token sees all that the model lets it see."""
    config = getattr(base, "config", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not any("sliding" in kind or "chunked" in kind for kind in kinds):
        return float("inf")
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return min((window for window in windows if isinstance(window, int)), default=float("inf"))


def _first_fit(lengths: Sequence[int], length: int) -> list[list[int]]:
    """Return the numbers of the sentences in rows of a length: from the longest, each in the first row with room."""
    rows, room = list[list[int]](), list[int]()
    for sentence in sorted(range(len(lengths)), key=lambda sentence: -lengths[sentence]):
        row = next((row for row, left in enumerate(room) if left >= lengths[sentence]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(length)
        rows[row].append(sentence)
        room[row] -= lengths[sentence]
    return rows
