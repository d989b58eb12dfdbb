"""Hidden states → vectors of words and sentences, by Flair's own pooling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flair
import torch
from flair.embeddings import TransformerEmbeddings


def pool(embeddings: Any, input_ids: torch.Tensor, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return what stock ``forward`` makes of the hidden states: the same bits, in fp32 or wider where it computes.

    The ids are (batch, length); ``tensors`` are the other results of ``prepare_tensors``.
    """
    view = _PoolingView(embeddings)
    windows = tensors.get("overflow_to_sample_mapping")
    is_traced = torch.jit.is_tracing()  # type: ignore[attr-defined]
    if not is_traced and windows is not None and int(windows[-1]) + 1 == len(windows):
        view.allow_long_sentences = False  # each sentence is one window: Flair would copy it into a longest one
    if is_traced or not _only_selects(embeddings):
        return TransformerEmbeddings.forward(view, input_ids, **tensors)
    return _select(view, input_ids, tensors)


def _only_selects(embeddings: Any) -> bool:
    """Whether each vector is the hidden state of a subtoken, or those of two."""
    has_cls = not embeddings.document_embedding or embeddings.cls_pooling == "cls"
    return has_cls and (not embeddings.token_embedding or embeddings.subtoken_pooling != "mean")


def _select(view: _PoolingView, input_ids: torch.Tensor, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Return the hidden states that Flair selects, which it is asked for by their numbers.

    It writes them into a tensor of all, one row after the other, and in the backward pass torch copies all of its
    gradient for each: half of a step in MiniLM's shape.
    """
    given = {name: value for name, value in tensors.items() if name in _MODEL_INPUTS}
    states = _of_layers(view, view.hidden_states(input_ids, **given))[:, : input_ids.shape[1]]
    with torch.no_grad():
        numbers = TransformerEmbeddings.forward(_NumberView(view), input_ids, **tensors)
    # Number 0 is a word without subtokens.
    rows = torch.cat([states.new_zeros(1, states.shape[2]), states.flatten(0, 1)])
    found = {}
    for name, each in numbers.items():
        wanted = each.to(device=rows.device, dtype=torch.long)
        width = wanted.shape[-1] * rows.shape[1]
        found[name] = rows.index_select(0, wanted.flatten()).view(*wanted.shape[:-1], width)
    return found


# What stock forward hands on to its model.
_MODEL_INPUTS = ("langs", "attention_mask", "bbox", "pixel_values")


def _of_layers(view: _PoolingView, states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Return one hidden state for each subtoken, (batch, length, hidden), as stock ``forward`` makes it of several."""
    if len(states) == 1:
        return states[0]
    return torch.stack([_wide(state) for state in states]).mean(dim=0) if view.layer_mean else torch.cat(states, -1)


def _wide(states: torch.Tensor) -> torch.Tensor:
    return states.to(torch.promote_types(states.dtype, torch.float32))


class _PoolingView:
    """The embeddings as stock ``forward`` should see them: a model that returns the wanted layers and nothing else.

    Flair's pooling reads ``self.model(...)[-1]``, stacks it and takes ``self.layer_indexes`` of the stack.
    """

    def __init__(self, embeddings: Any) -> None:
        self._embeddings = embeddings
        self.allow_long_sentences = embeddings.allow_long_sentences
        self.layer_indexes = list(range(len(embeddings.layer_indexes)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._embeddings, name)

    def _can_document_embedding_shortcut(self) -> bool:
        """Whether each row is a sentence; Flair 0.15.1 takes windows of long ones for the sentences behind them."""
        return not self.allow_long_sentences and bool(self._embeddings._can_document_embedding_shortcut())

    def model(self, input_ids: torch.Tensor, **tensors: Any) -> tuple[tuple[torch.Tensor, ...]]:
        """Return hidden states where Flair expects them, wide enough for its pooling, which mixes fp32 into sums."""
        states = self._embeddings.hidden_states(input_ids, **tensors)
        return (tuple(_wide(state).to(flair.device) for state in states),)


class _NumberView(_PoolingView):
    """The embeddings as if their model gave each subtoken its number in the batch, from 1, as its only hidden state."""

    def __init__(self, view: _PoolingView) -> None:
        super().__init__(view)
        self.layer_indexes = [0]
        self.embedding_length_internal = 2 if getattr(view, "subtoken_pooling", None) == "first_last" else 1

    def model(self, input_ids: torch.Tensor, **_: Any) -> tuple[tuple[torch.Tensor, ...]]:
        """Return the numbers as (batch, length, 1), in a dtype that holds them exactly."""
        count = input_ids.numel()
        numbers = torch.arange(1, count + 1, dtype=torch.float64, device=flair.device)
        return ((numbers.view(*input_ids.shape, 1),),)
