"""The vectors of a short sentence, stored when a model is saved and compared when it is loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from flair_peft.adapter import methods
from flair_peft.base import tokenizers, transformer
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.errors import ModelFileError, StateMismatchError
from flair_peft.primitives.dtypes import dtype_name

_TEXT = "Berlin is large, isn't it? 3 of 4 say so."
_IDS_WITHOUT_TEXT = [1, 2, 3, 4]

# Largest distance from the stored vectors, as a share of their norm: other machines sum in another order.
_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}


def describe_probe(embeddings: AdaptedEmbeddings, ids: list[int], states: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """Return what :func:`replay_probe` compares: input ids and the mean of each wanted layer, (layers, hidden)."""
    return {"input_ids": ids, "vectors": _means(states), "dtype": rounding_of(embeddings)}


def replay_probe(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> None:
    """Return if the embeddings of the probe are those that were stored.

    Raises:
        StateMismatchError: the tokenizer or the transformer gives something else.
        ModelFileError: the stored probe is damaged.
    """
    ids = _checked_ids(embeddings, stored)
    apart, allowed = distance(_means(probe_states(embeddings, ids)), stored["vectors"]), _allowed(embeddings, stored)
    if not apart <= allowed:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its vectors of a probe sentence are {apart:.2g} of their "
            f"norm away from those stored when it was saved, and rounding explains {allowed:g}. It would predict "
            "something else. Load it with the versions of PEFT and transformers that the file names, or with "
            "verify=False."
        )


def _checked_ids(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> list[int]:
    """Return the ids of the probe, which the tokenizer gives again."""
    ids, expected = stored.get("input_ids"), stored.get("vectors")
    if not isinstance(ids, list) or not isinstance(expected, torch.Tensor) or not expected.is_floating_point():
        raise ModelFileError(
            f"Cannot read the probe of '{embeddings.name}': it is damaged. It holds input ids and vectors that a load "
            "must give again. Copy or save the file again."
        )
    ids_here = probe_ids(embeddings)
    if ids_here != ids:
        raise StateMismatchError(
            f"Cannot trust the loaded '{embeddings.name}': its tokenizer gives {ids_here} for a sentence that gave "
            f"{ids} when it was saved. Another version of transformers or tokenizers may read its files in another "
            "way. Install the versions that the file names, or load with verify=False."
        )
    return ids


def _allowed(embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> float:
    return max(tolerance(stored.get("dtype")), tolerance(dtype_name(embeddings.base_dtype)))


class ProbeBeside:
    """The probe of embeddings, replayed in the forward pass of a sentence that they read anyway.

    A pass over few tokens takes as long as reading the weights. The shorter of both is padded, which changes the
    rounding, and more where a model minds padding: what comes out right is proven, and what does not has to be
    replayed alone.

    Attributes:
        is_used: whether a sentence had the probe beside it.
        is_right: whether it gave the stored vectors there.
    """

    def __init__(self, embeddings: AdaptedEmbeddings, stored: Mapping[str, Any]) -> None:
        self.embeddings, self.stored = embeddings, stored
        self.ids = _checked_ids(embeddings, stored)
        self.is_used = self.is_right = False

    def prove(self) -> None:
        """Return if the vectors are the stored ones, beside a sentence or else alone; see :func:`replay_probe`."""
        if not self.is_right:
            replay_probe(self.embeddings, self.stored)

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Inside, the first sentence that the embeddings read alone has the probe beside it."""
        embeddings, alone = self.embeddings, self.embeddings.hidden_states
        is_told_apart = transformer.takes_mask(embeddings.base_model) and not embeddings.is_placed
        if not is_told_apart or methods.depends_on_batch(embeddings.adapter_config):
            yield
            return

        def hidden_states(input_ids: torch.Tensor, **tensors: Any) -> tuple[torch.Tensor, ...]:
            if self.is_used or len(input_ids) != 1 or tensors.keys() != {"attention_mask"}:
                return alone(input_ids, **tensors)
            self.is_used = True
            return self._read(alone, input_ids, tensors["attention_mask"])

        # An attribute of this one object, in front of the method of its class.
        embeddings.__dict__["hidden_states"] = hidden_states
        try:
            yield
        finally:
            embeddings.__dict__.pop("hidden_states", None)

    def _read(
        self, alone: Callable[..., tuple[torch.Tensor, ...]], input_ids: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return the hidden states of a sentence, each (1, subtokens, hidden)."""
        length, own = input_ids.shape[1], len(self.ids)
        longest = max(length, own)
        ids = input_ids.new_full((2, longest), self.embeddings.tokenizer.pad_token_id or 0)
        masks = mask.new_zeros((2, longest))
        ids[0, :length], masks[0, :length] = input_ids[0], mask[0]
        ids[1, :own], masks[1, :own] = torch.tensor(self.ids), 1
        try:
            states = alone(ids, attention_mask=masks)
        except Exception:  # what takes no two sentences at once may take them one by one
            return alone(input_ids, attention_mask=mask)
        in_front = states[0].shape[1] - longest  # rows of a prompt, where they are kept
        if in_front < 0:
            return alone(input_ids, attention_mask=mask)
        vectors = torch.stack([state[1, : in_front + own].float().mean(dim=0) for state in states]).cpu()
        self.is_right = distance(vectors, self.stored["vectors"]) <= _allowed(self.embeddings, self.stored)
        return tuple(state[:1, : in_front + length] for state in states)


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
    # In mixed precision the vectors would be others than those of a load outside of it.
    in_full_precision = torch.autocast(embeddings.base_model.device.type, enabled=False)
    ready = torch.inference_mode(False) if has_graph else contextlib.nullcontext()
    with ready, torch.set_grad_enabled(has_graph), evaluating(embeddings), in_full_precision:
        batch = torch.tensor([ids])
        return embeddings.hidden_states(batch, attention_mask=torch.ones_like(batch))


def _means(states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return torch.stack([state.detach()[0].float().mean(dim=0) for state in states]).cpu()


def distance(vectors: torch.Tensor, expected: torch.Tensor) -> float:
    """Return how far apart two tensors are, as a share of the norm of the expected one."""
    if vectors.shape != expected.shape or not torch.equal(vectors.isnan(), expected.isnan()):
        return float("inf")
    vectors, expected = vectors.nan_to_num(), expected.float().nan_to_num()
    return float((vectors - expected).norm() / expected.norm().clamp_min(1e-12))


def rounding_of(embeddings: AdaptedEmbeddings) -> str:
    """Return the name of the dtype whose rounding is about that of the embeddings."""
    # Products of quantised weights are rounded in about that way on another device.
    return "bfloat16" if embeddings.is_quantised else str(dtype_name(embeddings.base_dtype))


def tolerance(dtype: Any) -> float:
    """Return how far from what was stored vectors may be, as a share of their norm, by the name of their dtype."""
    return _TOLERANCE.get(dtype, 0.0) if isinstance(dtype, str) else 0.0


@contextlib.contextmanager
def evaluating(embeddings: torch.nn.Module) -> Iterator[None]:
    """Switch the module to evaluation and afterwards each of its parts back to what it was."""
    were_training = [module for module in embeddings.modules() if module.training]
    embeddings.eval()
    try:
        yield
    finally:
        for module in were_training:
            module.training = True
