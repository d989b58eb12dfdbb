"""Groups of rows of similar length within a batch, each of which has a forward pass without the others' padding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flair_peft.embeddings.batch_division import Division, Inputs, JoinedOutput, Run, cut
from flair_peft.embeddings.pass_cost import Cost

# Tokens of the sentence that is padded in a trial: the fewer, the more of them stand beside the padding.
_TOKENS = 4


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
