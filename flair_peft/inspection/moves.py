"""Where an adapter learned: how far each matrix of the base moved, and in how many directions.

A LoRA adapter moves a matrix W by ΔW = s·B·A, of rank r at most. Of B = Q₁R₁ and Aᵀ = Q₂R₂, the singular values of ΔW
are those of the r×r matrix s·R₁R₂ᵀ, so that ΔW itself is never made. The effective rank is exp(H(p)) with the entropy H
of p = σ/Σσ (Roy and Vetterli, "The effective rank: a measure of effective dimensionality", EUSIPCO 2007): r if all
directions are equally strong, 1 if one is all there is.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, traits
from flair_peft.base import weight_files
from flair_peft.errors import (
    BaseMismatchError,
    BaseModelNotFoundError,
    MissingConfigError,
    ModelFileError,
    UnsupportedMethodError,
    name_some,
)
from flair_peft.inspection import file_contents
from flair_peft.inspection.adapters import Adapter, own_tensors
from flair_peft.inspection.file_contents import StoredTensor
from flair_peft.inspection.report import Inspection
from flair_peft.primitives import progress

_FLOATING = ("float16", "bfloat16", "float32", "float64")
_FACTORS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


@dataclass(frozen=True)
class Move:
    """How far one matrix of the base moved.

    Attributes:
        module: its name in the base.
        norm: Frobenius norm of ΔW.
        base_norm: of W, if the base is at hand.
        effective_rank: of ΔW; 0 where nothing moved.
        rank: of the adapter's matrices.
    """

    module: str
    norm: float
    base_norm: float | None
    effective_rank: float
    rank: int

    @property
    def relative(self) -> float | None:
        """The norm of ΔW as a share of that of W."""
        return self.norm / self.base_norm if self.base_norm else None


@dataclass(frozen=True)
class Map:
    """The moves of all adapters of a model, and what is to be said of them."""

    moves: tuple[Move, ...]
    notes: tuple[str, ...]

    @property
    def is_relative(self) -> bool:
        """Whether the base was at hand; it can lack a matrix that is random in the model, such as a pooler's."""
        return any(move.base_norm is not None for move in self.moves)


def measure(found: Inspection, *, base_model: str | None = None) -> Map:
    """Return how far each matrix moved that a LoRA adapter stands on.

    Args:
        found: the model.
        base_model: directory of the base, if it is not where it was. Without the base, moves have no relative size.

    Raises:
        UnsupportedMethodError: an adapter is not LoRA.
        MissingConfigError: the config, and with it the scale, is lost.
        BaseModelNotFoundError: there is no base at ``base_model``.
        BaseMismatchError: a matrix of the base has another shape than the adapter's.
        ModelFileError: a tensor cannot be read.
    """
    moves: list[Move] = []
    notes: list[str] = []
    if not found.adapters:
        raise ModelFileError(
            f"Cannot plot '{found.contents.path}': it holds no adapter. The plot shows what adapters learned. Pass a "
            "model that has one."
        )
    for index, adapter in enumerate(found.adapters):
        around = f"[{index + 1}] " if len(found.adapters) > 1 else ""
        _check(found, adapter)
        held = _own_base(found, adapter)
        weights = held or _find_base(adapter, base_model)
        if weights is None:
            notes.append(
                f"{around}the base '{adapter.base['name']}' is not at hand: there is no ‖W‖ to compare ‖ΔW‖ with"
            )
        elif held is None and base_model is not None:
            notes.append(
                f"{around}whether '{base_model}' is the base that it was trained on was not checked: `flair-peft "
                "verify --base-model` does"
            )
        notes.extend(around + note for note in _notes(adapter))
        own = list(_measure(found, adapter, weights, around))
        lacking = [move.module.removeprefix(around) for move in own if weights is not None and move.base_norm is None]
        if lacking:
            notes.append(
                f"{around}no weight of {name_some(lacking, 3)} in floating point is in the base's file: the picture "
                "leaves out how far that moved"
            )
        moves.extend(own)
    if not moves:
        raise ModelFileError(
            f"Cannot plot '{found.contents.path}': its adapter has no pair of LoRA matrices. What it trains are other "
            "weights. `flair-peft inspect` without --plot lists them."
        )
    return Map(tuple(moves), tuple(notes))


def _check(found: Inspection, adapter: Adapter) -> None:
    is_product = traits.of_method(adapter.method).adds_product
    if not is_product or adapter.config.get("target_parameters"):
        method = "LoRA of parameters that no module holds" if is_product else adapter.method
        raise UnsupportedMethodError(
            f"Cannot plot '{found.contents.path}': its method is {method}. How far a matrix moved is read from "
            "the two factors that LoRA adds to it, and other methods move it in other ways. Only LoRA of modules "
            "can be plotted."
        )
    if not adapter.has_config:
        raise MissingConfigError(
            f"Cannot plot '{found.contents.path}': it lacks the PEFT config, and with it lora_alpha, which scales what "
            "was learned. Stock Flair does not store it. Convert the file first: flair-peft convert --lora-alpha …"
        )


def _notes(adapter: Adapter) -> Iterator[str]:
    if adapter.config.get("use_dora"):
        yield "DoRA: ΔW is that of the two factors alone, before the columns are scaled to their learned magnitudes"
    init = adapter.config.get("init_lora_weights")
    if isinstance(init, str) and traits.of_init(init).rewrites_base:
        yield f"'{init}' rewrote the base: ΔW counts from the rewritten weights"


def _measure(
    found: Inspection, adapter: Adapter, weights: Mapping[str, StoredTensor] | None, around: str
) -> Iterator[Move]:
    own = own_tensors(found.contents, adapter.prefixes or ("",))
    for first, second in _pairs(own, found.contents.path):
        module = keys.carrier(first)
        lower, upper = own[first].read(), own[second].read()
        sigmas, rank = singular_values(lower, upper), len(lower)
        base = None if weights is None else _norm_of(weights, f"{module}.weight", _shape(lower, upper, first))
        norm = abs(_scale(adapter.config, module, rank)) * float(sigmas.norm())
        yield Move(around + module, norm, base, effective_rank(sigmas), rank)


def _pairs(own: Collection[str], path: Path) -> Iterator[tuple[str, str]]:
    """Yield the names of A and B of each module, of the adapter that Flair uses."""
    seen = set()
    for name in sorted(own):
        segments = name.split(".")
        factor = next((part for part in _FACTORS if part in segments), None)
        if factor is not None and keys.canonical_key(name) not in seen:
            seen.add(keys.canonical_key(name))
            other = ".".join(_FACTORS[factor] if part == factor else part for part in segments)
            if other not in own:
                raise ModelFileError(
                    f"Cannot plot '{path}': '{other}' is missing beside '{name}'. The file is damaged. "
                    "Copy or save it again."
                )
            yield name, other


def singular_values(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return the singular values of B·A, largest first, in float64.

    Args:
        first: A, (r, in_features); further dimensions are those of a convolution's kernel.
        second: B, (out_features, r).
    """
    lower, upper = first.double().flatten(1), second.double().flatten(1)
    _, left = torch.linalg.qr(upper, mode="r")
    _, right = torch.linalg.qr(lower.T, mode="r")
    return torch.linalg.svdvals(left @ right.T)


def effective_rank(sigmas: torch.Tensor) -> float:
    """Return exp of the entropy of the singular values as shares of their sum; 0 if all are 0."""
    total = float(sigmas.sum())
    if total == 0.0:
        return 0.0
    shares = sigmas / total
    return math.exp(float(torch.special.entr(shares).sum()))


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return what PEFT multiplies B·A with: alpha / r, or alpha / √r with rsLoRA."""
    patterns = config.get("alpha_pattern")
    patterns = patterns if isinstance(patterns, dict) else {}
    alpha = configs.value_for(patterns, module, config.get("lora_alpha"))
    if not isinstance(alpha, (int, float)):
        raise MissingConfigError(
            f"Cannot plot the adapter: its config has no lora_alpha but {alpha!r:.40}, and without it the scale of "
            "what was learned is not known. The config is damaged. Copy or save it again."
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _own_base(found: Inspection, adapter: Adapter) -> Mapping[str, StoredTensor] | None:
    """Return the weights of the base that the file itself holds."""
    if not found.holds_base or not adapter.prefixes:
        return None
    named = ((keys.base_key(name), tensor) for name, tensor in own_tensors(found.contents, adapter.prefixes).items())
    return {name: tensor for name, tensor in named if name is not None}


def _find_base(adapter: Adapter, base_model: str | None) -> Mapping[str, StoredTensor] | None:
    """Return the weights of the base from where the user or the file says that it is, on this machine."""
    name = base_model or adapter.base["name"]
    if name is None:
        return None
    revision = None if base_model else adapter.base["revision"]
    files = _weight_files(name, revision)
    if not files and base_model is not None:
        raise BaseModelNotFoundError(
            f"Cannot find the base model '{base_model}': it is no directory with weights here, and none is in the "
            "local cache. The plot needs its weights. Pass the directory of the model."
        )
    return {name: tensor for path in files for name, tensor in _read_weights(path).items()} or None


def _weight_files(name: str, revision: str | None) -> list[Path]:
    try:
        return weight_files.find(name, {"revision": revision, "local_files_only": True})
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return []


def _read_weights(path: Path) -> dict[str, StoredTensor]:
    return file_contents.read_safetensors(path) if path.suffix == ".safetensors" else file_contents.read_pickled(path)


def _shape(lower: torch.Tensor, upper: torch.Tensor, name: str) -> tuple[int, ...] | None:
    """Return the lengths of a weight's sides; ``None`` for input embeddings, to which rows can have been added."""
    return None if "embedding" in name.rpartition("lora_")[2] else (len(upper), *lower.shape[1:])


def _norm_of(weights: Mapping[str, StoredTensor], name: str, shape: tuple[int, ...] | None) -> float | None:
    """Return the norm of a weight of the base, which a file may keep under the name of a model with a head.

    Of quantised weights, whose scales stand elsewhere, ``None`` is returned.

    Args:
        weights: of the base.
        name: of the weight.
        shape: lengths of its sides, in any order: some layers hold their weight transposed.

    Raises:
        BaseMismatchError: the base has it in another shape.
    """
    name = name if name in weights else next((key for key in weights if key.endswith(f".{name}")), "")
    if name not in weights or weights[name].dtype not in _FLOATING:
        return None
    if shape is not None and sorted(weights[name].shape) != sorted(shape):
        raise BaseMismatchError(
            f"Cannot plot the moves against this base model: its '{name}' has the shape {weights[name].shape}, and the "
            f"adapter was trained on one of {shape}. It is another model. Pass --base-model with the one that was "
            "trained on."
        )
    weight = weights[name].read()
    progress.advance(weight.nbytes)
    return float(torch.linalg.vector_norm(weight, dtype=torch.float64))
