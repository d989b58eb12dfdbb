"""The vectors of a short sentence, stored when a model is saved and compared when it is loaded."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from flair_peft.base import tokenizers, transformer
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.errors import ModelFileError, StateMismatchError
from flair_peft.primitives.dtypes import dtype_name
from flair_peft.primitives.full_precision import full_precision
from flair_peft.primitives.rounding import distance, explained, rounded_otherwise, tolerance

log = logging.getLogger("flair_peft")

_TEXT = "Berlin is large, isn't it? 3 of 4 say so."
_IDS_WITHOUT_TEXT = [1, 2, 3, 4]

# Of the sentence of a probe, by its neighbours and by letters if need be.
_MOST_IDS = 4096


def describe_probe(embeddings: AdaptedEmbeddings, ids: list[int], states: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return what :func:`replay_probe` compares: input ids and the mean of each wanted layer, (layers, hidden)."""
    return {"input_ids": ids, "vectors": _means(states), "dtype": rounding_of(embeddings)}


class Reading:
    """What embeddings give for a sentence that they read anyway, so that a probe needs no forward pass of its own.

    A pass over few tokens takes about as long as reading the weights.

    Attributes:
        embeddings: that read.
        has_graph: whether the states know what a gradient of them reaches.
        ids: of the first sentence that they read alone, or ``None``.
        states: of the wanted layers for it, each (1, subtokens, hidden).
    """

    def __init__(self, embeddings: AdaptedEmbeddings, *, has_graph: bool = False) -> None:
        self.embeddings, self.has_graph = embeddings, has_graph
        self.ids: list[int] | None = None
        self.states: tuple[torch.Tensor, ...] = ()

    @contextlib.contextmanager
    def going_on(self) -> Iterator[None]:
        """Inside, the first sentence that they read alone in this thread, by its tokens and nothing else, is taken."""
        alone, thread = self.embeddings.hidden_states, threading.get_ident()

        def hidden_states(input_ids: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
            is_plain = len(input_ids) == 1 and tensors.keys() == {"attention_mask"}
            is_ours = self.ids is None and threading.get_ident() == thread
            if not is_ours or not is_plain or not tensors["attention_mask"].all():
                return alone(input_ids, **tensors)
            self.ids = input_ids[0].tolist()
            self.states = probe_states(self.embeddings, self.ids, has_graph=self.has_graph)
            return tuple(state.detach() for state in self.states)

        # An attribute of this one object, in front of the method of its class.
        self.embeddings.__dict__["hidden_states"] = hidden_states
        try:
            yield
        finally:
            self.embeddings.__dict__.pop("hidden_states", None)

    def describe(self) -> dict[str, Any] | None:
        """Return a probe as :func:`describe_probe` does, and the ids of a text; ``None`` if nothing was read."""
        if not self.states:
            return None
        # Not all that a tokenizer does shows in a sentence that comes in words.
        of_text = {"text_ids": probe_ids(self.embeddings)}
        return {**describe_probe(self.embeddings, self.ids or [], self.states), **of_text}

    def gives(self, stored: Mapping[str, Any]) -> bool:
        """Whether the sentence is that of a stored probe, and its vectors are those."""
        is_same = bool(self.states) and self.ids == stored["input_ids"]
        return is_same and distance(_means(self.states), stored["vectors"]) <= _allowed(self.embeddings, stored)


def replay_probe(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> None:
    """Return if the embeddings of the probe are those that were stored.

    Raises:
        StateMismatchError: the tokenizer or the transformer gives something else.
        ModelFileError: the stored probe is damaged.
    """
    check_ids(embeddings, stored)

    def vectors() -> torch.Tensor:
        return _means(probe_states(embeddings, stored["input_ids"]))

    def rounded() -> Iterable[float]:
        return (distance(other, here) for other in rounded_otherwise(vectors, _coarser(embeddings, stored)))

    apart = distance(here := vectors(), stored["vectors"])
    allowed = explained(apart, _allowed(embeddings, stored), rounded)
    if not apart <= allowed:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its vectors of a probe sentence are {apart:.2g} of their "
            f"norm away from those stored when it was saved, and rounding explains {allowed:.2g}. It would predict "
            "something else. Load it with the versions of PEFT and transformers that the file names, or with "
            "verify=False."
        )


def check_ids(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> None:
    """Return if the tokenizer gives the ids that it gave when the probe was stored; see :func:`replay_probe`."""
    ids, expected = stored.get("input_ids"), stored.get("vectors")
    are_ids = isinstance(ids, list) and len(ids) <= _MOST_IDS and all(type(each) is int for each in ids)
    if not are_ids or not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        raise ModelFileError(
            f"Cannot read the probe of '{embeddings.name}': it is damaged. It holds input ids and vectors that a load "
            "must give again. Copy or save the file again."
        )
    of_text, ids_here = stored.get("text_ids", ids), probe_ids(embeddings)
    if ids_here != of_text:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its tokenizer gives {ids_here} for a sentence that gave "
            f"{of_text} when it was saved. Another version of transformers or tokenizers may read its files in another "
            "way. Install the versions that the file names, or load with verify=False."
        )


def report_unchecked(embeddings: AdaptedEmbeddings) -> None:
    """Say that nobody compared the vectors of embeddings with those that were stored."""
    log.warning("Not checked for '%s': whether it gives the vectors that it gave when it was saved.", embeddings.name)


def _allowed(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> float:
    return tolerance(_coarser(embeddings, stored))


def _coarser(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> str:
    return str(max(stored.get("dtype"), dtype_name(embeddings.base_dtype), key=tolerance))


def probe_ids(embeddings: AdaptedEmbeddings) -> list[int]:
    """Return the input ids of a short sentence."""
    if embeddings.tokenizer_needs_ocr_boxes:
        return _IDS_WITHOUT_TEXT
    with tokenizers.exclusively(embeddings.tokenizer):
        return embeddings.tokenizer(_TEXT)["input_ids"] or _IDS_WITHOUT_TEXT


def probe_states(embeddings: AdaptedEmbeddings, ids: list[int], *, has_graph: bool = False) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of the wanted layers for input ids, each (1, subtokens, hidden), in evaluation.

    Args:
        embeddings: are in evaluation mode for a moment.
        ids: of one text.
        has_graph: whether the states know what a gradient of them reaches.
    """
    # In another precision the vectors would be others than those of a load outside of it.
    exact = full_precision(embeddings.base_model.device.type)
    ready = torch.inference_mode(False) if has_graph else contextlib.nullcontext()
    with ready, torch.set_grad_enabled(has_graph), trying_out(embeddings), exact:
        batch = torch.tensor([ids])
        return embeddings.hidden_states(batch, attention_mask=torch.ones_like(batch))


def _means(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([state.detach()[0].float().mean(dim=0) for state in states]).cpu()


def rounding_of(embeddings: AdaptedEmbeddings) -> str:
    """Return the name of the dtype whose rounding is about that of the embeddings."""
    # Products of quantised weights are rounded in about that way on another device.
    return "bfloat16" if embeddings.is_quantised else str(dtype_name(embeddings.base_dtype))


@contextlib.contextmanager
def evaluating(embeddings: torch.nn.Module) -> Iterator[None]:
    """Switch the module to evaluation and afterwards each of its parts back to what it was."""
    were_training = [module for module in embeddings.modules() if module.training]
    if were_training:
        embeddings.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True


@contextlib.contextmanager
def trying_out(embeddings: torch.nn.Module) -> Iterator[None]:
    """Let the package's own small passes evaluate, and leave the module as it was: its modes, and its attention."""
    with transformer.keeping_attention(embeddings), evaluating(embeddings):
        yield
