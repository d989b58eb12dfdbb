"""What the head of a model gives for one sentence: a load proves that labels come out as they did.

The vectors of embeddings have a probe of their own, see :mod:`flair_peft.embeddings.vector_probe`. Here the whole model
predicts, with all that lies between a sentence and its labels: tokenizer, context, pooling, and each part of the head.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import threading
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any

import flair
import torch
from flair.data import DataPair, DataPoint, DataTriple, Dictionary, Sentence
from flair.embeddings import PooledFlairEmbeddings
from flair.embeddings.base import Embeddings
from flair.models import (
    MultitaskModel,
    SpanClassifier,
    TextPairClassifier,
    TextPairRegressor,
    TextRegressor,
    TextTripleClassifier,
)
from flair.nn import Model

from flair_peft.base import tokenizers
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.adapted import AdaptedEmbeddings
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.embeddings.vector_probe import Reading
from flair_peft.errors import ModelFileError, StateMismatchError, name_some
from flair_peft.primitives import rounding
from flair_peft.primitives.dtypes import dtype_name
from flair_peft.primitives.full_precision import full_precision
from flair_peft.primitives.load_context import load_options
from flair_peft.torchfile import state_tree

log = logging.getLogger("flair_peft")

Tensors = dict[str, torch.Tensor]

KEY = "head_probe"
"""Where the state of a model holds what its head gave."""

_BEFORE, _WORDS, _AFTER = (
    ["Nobody", "asked", "before", "."],
    ["Angela", "Merkel", "lives", "in", "Berlin", ",", "isn't", "she", "unbelievably", "19", "?"],
    ["So", "they", "say", ",", "at", "least", "."],
)
_LABEL = "flair_peft_probe"

# Of a part that gives more numbers, the mean over all but their last dimension is kept.
_LARGEST = 1 << 14

# Scores of what a CRF rules out, beside which the others would be nothing.
_RULED_OUT = 1e3

# A head adds its rounding to that of the embeddings.
_WIDER = 2

# An answer near zero is one whose parts cancel out: rounding is as large as it would be for such numbers.
_SMALLEST = 0.1

# How embeddings read a sentence: some of it shows in long sentences only.
_READING = frozenset(
    {
        *("layers", "layer_mean", "subtoken_pooling", "cls_pooling", "pooling", "context_length", "use_context"),
        *("respect_document_boundaries", "use_context_separator", "allow_long_sentences", "force_max_length"),
        *("truncate", "stride", "keep_virtual_rows"),
    }
)

# Where Flair's embeddings keep what they saw. Two probes of one model take turns: each puts back what it found.
_MEMORIES, _one_memory = ("word_embeddings", "word_count"), threading.RLock()

# What a state holds beside the settings of the model.
_BESIDE = frozenset({KEY, state_tree.INNER, "state_dict", "versions", "model_card", "training_state", "flair_version"})


def take(model: Model, readings: Sequence[Reading]) -> dict[str, Any]:
    """Return what loads compare: what the parts of the head give, and the vectors that embeddings gave for that.

    Args:
        model: is in evaluation mode for a moment.
        readings: of its embeddings with an adapter, in their order; they have read afterwards, if they could.
    """
    try:
        outputs = _outputs(model, readings)
    except Exception as error:  # what a user's own class wants, or a lack of memory, must not cost a trained model
        log.info("No probe of the head of this %s: %s: %s", type(model).__name__, type(error).__name__, error)
        outputs = {}
    vectors = [reading.describe() for reading in readings]
    return {"outputs": outputs, "dtype": _coarsest(model), **({"vectors": vectors} if any(vectors) else {})}


def check_settings(state: Mapping[str, Any], *, source: str, verify: bool) -> None:
    """Return if settings and labels of a model are those that it was saved with, as far as its state tells.

    Raises:
        StateMismatchError: they are others.
        ModelFileError: what is to be compared is damaged.
    """
    stored = state.get(KEY)
    if stored is None or not verify:
        return
    if not _is_sound(stored):
        raise ModelFileError(
            f"Cannot read the probe of the head in '{source}': it is damaged. It holds what the parts of the head "
            "gave, which a load must give again. Copy or save the file again."
        )
    if stored.get("settings") != digest(state):
        raise StateMismatchError(
            f"Cannot trust '{source}': its settings, labels or vocabulary, or their order, are not those that it was "
            "saved with. It would predict something else. Copy or save it again, or load it with verify=False."
        )


def replay(
    model: Model,
    stored: Mapping[str, Any] | None,
    *,
    source: str,
    probes: Sequence[tuple[AdaptedEmbeddings, Mapping[str, Any]]] = (),
) -> None:
    """Return if the embeddings and the parts of the head give what they gave when the model was saved.

    Args:
        model: loaded.
        stored: what :func:`take` returned; ``None`` for files that do not say it, as those before version 0.3.
        source: named in errors.
        probes: embeddings of the model with the probes that they have to replay.

    Raises:
        StateMismatchError: they give something else.
        ModelFileError: the probe of embeddings is damaged.
    """
    verify = load_options().verify
    if not verify and not _is_sound(stored):
        stored = None
    probes = [*probes, *_probes_in(stored or {}, model)]
    # On a base that was converted, vectors are others, and what a head makes of that no tolerance says.
    is_comparable = stored is not None and bool(stored["outputs"]) and stored.get("dtype") == _coarsest(model)
    if verify == "full" and not is_comparable:
        log.warning("Not checked for '%s': what its head gives. The file does not say what it gave here.", source)
    if not verify:
        for embeddings, _ in probes:
            vector_probe.report_unchecked(embeddings)
        return
    for embeddings, probe in probes:
        vector_probe.check_ids(embeddings, probe)
    readings = [Reading(embeddings) for embeddings, _ in probes]
    found = _outputs_here(model, readings, source) if is_comparable else None
    for reading, (embeddings, probe) in zip(readings, probes, strict=True):
        if not reading.gives(probe):
            vector_probe.replay_probe(embeddings, probe)
    if stored is None or found is None:
        return
    dtypes = [stored["dtype"], *(dtype_name(e.output_dtype) for e in adapted_embeddings(model))]
    allowed = _WIDER * rounding.tolerance(coarsest := max(dtypes, key=rounding.tolerance))
    apart = {name: _distance(found.get(name), answer) for name, answer in stored["outputs"].items()}
    others = rounding.rounded_otherwise(lambda: _outputs(model, []), coarsest)
    measured = (_distance(other.get(name), found[name]) for other in others for name in apart)
    allowed = rounding.explained(max(apart.values()), allowed, lambda: measured)
    if wrong := [name for name, distance in apart.items() if not distance <= allowed]:
        raise StateMismatchError(
            f"Cannot trust '{source}': {name_some(wrong)} of its head give something else for a probe sentence than "
            f"when it was saved, up to {max(apart.values()):.2g} of the norm, where rounding explains {allowed:.2g}. "
            "It would predict something else. Copy or save it again, or load it with verify=False."
        )


def _outputs_here(model: Model, readings: Sequence[Reading], source: str) -> Tensors | None:
    """Return what the parts of the head give, or ``None`` where they cannot predict, which a warning says."""
    try:
        return _outputs(model, readings)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a device may lack what another one computes
        log.warning("Not checked for '%s': what its head gives. It cannot predict here: %s", source, error)
        return None


def _probes_in(stored: Mapping[str, Any], model: Model) -> Iterator[tuple[AdaptedEmbeddings, Mapping[str, Any]]]:
    """Yield the embeddings whose vectors were taken from what they gave the head, with their probe."""
    vectors = dict(enumerate(stored.get("vectors") or []))
    for embeddings in adapted_embeddings(model):
        probe = None if embeddings.origin is None else vectors.get(embeddings.origin[0])
        if probe is not None:
            yield embeddings, probe


def _is_sound(stored: Any) -> bool:
    """Whether this is a probe as :func:`take` returns it."""
    if not isinstance(stored, Mapping):
        return False
    outputs, vectors = stored.get("outputs"), stored.get("vectors", [])
    are_probes = isinstance(vectors, list) and all(each is None or isinstance(each, Mapping) for each in vectors)
    tensors = outputs.values() if isinstance(outputs, Mapping) else (None,)
    return are_probes and all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in tensors)


def _distance(found: torch.Tensor | None, expected: torch.Tensor) -> float:
    """Return how far apart two answers are, as a share of the norm of the expected one."""
    if found is None or found.shape != expected.shape or not torch.equal(found.isnan(), expected.isnan()):
        return float("inf")
    is_possible = expected.abs() < _RULED_OUT
    found, expected = found.where(is_possible, 0.0), expected.where(is_possible, 0.0)
    return float((found - expected).norm() / max(float(expected.norm()), _SMALLEST * expected.numel() ** 0.5))


def _coarsest(model: Model) -> str:
    """Return the name of the dtype that rounds most, of those in which the embeddings compute."""
    adapted = adapted_embeddings(model)
    # In a plain model, anything may have been converted.
    plain = {str(dtype_name(p.dtype)) for p in model.parameters() if p.is_floating_point()} if not adapted else ()
    return max([*map(vector_probe.rounding_of, adapted), *plain], key=rounding.tolerance, default="float32")


def _outputs(model: Model, readings: Sequence[Reading]) -> Tensors:
    """Return name → what each part of the head with weights gives for the probe, when it is called first."""
    found: Tensors = {}
    note = functools.partial(_note, found, threading.get_ident())
    with contextlib.ExitStack() as stack:
        for name, part in _parts(model):
            stack.enter_context(part.register_forward_hook(functools.partial(note, name)))
        for each in readings:
            stack.enter_context(each.going_on())
        _predict(model)
    return found


def answers(model: Model) -> list[tuple[str, float]]:
    """Return place, value and score of each label that a model gives the probe; of a number, the number as score."""
    found = [label for point in _predict(model) for label in point.get_labels(_LABEL)]
    if isinstance(model, TextRegressor | TextPairRegressor):
        return [(label.unlabeled_identifier, float(label.value)) for label in found]
    return [(label.labeled_identifier, label.score) for label in found]


def _predict(model: Model) -> list[DataPoint]:
    """Return the probe for each task of a model, with the labels that it gives them; it stays as it is."""
    tasks = [*model.tasks.values()] if isinstance(model, MultitaskModel) else [model]
    points = [_make_point(task) for task in tasks]
    # Flair's batches are drawn by torch, and another precision would give other numbers than a load outside of it.
    with (
        vector_probe.trying_out(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        full_precision(torch.device(flair.device).type),
        _without_memories(model),
    ):
        for task, point in zip(tasks, points, strict=True):
            task.predict([point], label_name=_LABEL)
    return points


class _Memory(dict[str, Any]):
    """A memory that is empty for the thread that made it; others read and write the one that was there."""

    def __init__(self, usual: dict[str, Any]) -> None:
        super().__init__()
        self.usual, self._own, self._thread = usual, dict[str, Any](), threading.get_ident()

    def _here(self) -> dict[str, Any]:
        return self._own if threading.get_ident() == self._thread else self.usual

    def __contains__(self, word: object) -> bool:
        return word in self._here()

    def __getitem__(self, word: str) -> Any:
        return self._here()[word]

    def __setitem__(self, word: str, value: Any) -> None:
        self._here()[word] = value


@contextlib.contextmanager
def _without_memories(model: Model) -> Iterator[None]:
    """Inside, embeddings that remember the words that they saw, which no file holds, know none in this thread."""
    remembering = [part for part in model.modules() if isinstance(part, PooledFlairEmbeddings)]
    with _one_memory if remembering else contextlib.nullcontext():
        memories = [(part, name, _Memory(getattr(part, name))) for part in remembering for name in _MEMORIES]
        for part, name, memory in memories:
            setattr(part, name, memory)
        try:
            yield
        finally:
            for part, name, memory in memories:
                if getattr(part, name) is memory:  # a training in another thread begins with a new one
                    setattr(part, name, memory.usual)


def _parts(module: torch.nn.Module, name: str = "") -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the modules with weights, outside of embeddings."""
    for child_name, child in module.named_children():
        if not isinstance(child, Embeddings) and any(True for _ in child.parameters()):
            yield f"{name}{child_name}", child
            yield from _parts(child, f"{name}{child_name}.")


def _note(found: Tensors, thread: int, name: str, _: torch.nn.Module, __: Any, output: Any) -> None:
    """Keep what a part of the head gave first: later calls depend on what was decided after the first.

    Other threads may predict with the model meanwhile.
    """
    if threading.get_ident() != thread:
        return
    while isinstance(output, tuple | list) and output:
        output = output[0]
    if isinstance(output, torch.Tensor) and output.is_floating_point() and name not in found:
        given = output.detach().float()
        is_large = given.numel() > _LARGEST and given.dim() > 1
        found[name] = (given.flatten(0, -2).mean(dim=0) if is_large else given.flatten())[:_LARGEST].cpu()


def _make_point(model: Model) -> DataPoint:
    """Return a data point of the kind that the model reads, with neighbours and with the entities that it looks for."""
    before, sentence, after = (Sentence(words, use_tokenizer=False) for words in (_BEFORE, _WORDS, _AFTER))
    for place, token in enumerate(sentence):
        token.add_metadata("bbox", (40 * place, 10, 40 * place + 35, 35))
    if isinstance(model, TextPairClassifier | TextPairRegressor):
        return DataPair(sentence, after)
    if isinstance(model, TextTripleClassifier):
        return DataTriple(before, sentence, after)
    sentence._previous_sentence, sentence._next_sentence = before, after
    head, tail = min(_first_of(model, "entity_pair_filters", "entity_pair_labels") or [(None, None)])
    for kind, allowed in _entity_types(model).items():
        usual = min(allowed or ["PER"])
        sentence[0:2].add_label(kind, usual if head is None else head)
        sentence[4:5].add_label(kind, usual if tail is None else tail)
    return sentence


def _entity_types(model: Model) -> Mapping[str, Any]:
    """Return the types of labels that a model looks for in sentences → their values, if these are limited."""
    if isinstance(model, SpanClassifier):
        return {model._span_label_type or model.label_type: None}
    found = _first_of(model, "entity_label_types", "entity_label_type") or {}
    return {found: None} if isinstance(found, str) else found


def _first_of(model: Model, *names: str) -> Any:
    return next((value for name in names if (value := getattr(model, name, None))), None)


def digest(state: Mapping[str, Any]) -> str:
    """Return a digest of the settings of a model, its labels among them, without those of embeddings."""
    # Flair takes the class out of a state before it hands that on.
    settings = {name: value for name, value in state.items() if name != "__cls__"}
    return hashlib.sha256(_spelled(settings).encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        is_embeddings = "__cls__" in value and "state_dict" not in value
        names = [
            name for name in value if name not in _BESIDE and not (is_embeddings and _is_unread(name, value[name]))
        ]
        return {name if isinstance(name, str) else _spelled(name): _plain(value[name]) for name in names}
    if isinstance(value, Dictionary):
        return [item.decode("utf-8", "backslashreplace") for item in value.idx2item]
    if isinstance(value, BytesIO):
        return tokenizers.digest_of_vocabulary(value)
    if isinstance(value, list | tuple):
        return list(map(_plain, value))
    if isinstance(value, set | frozenset):
        return sorted(map(_plain, value), key=_spelled)
    return value if isinstance(value, bool | int | float | str) else None


def _spelled(value: Any) -> str:
    return json.dumps(_plain(value), sort_keys=True)


def _is_unread(name: str, value: Any) -> bool:
    """Whether a setting of embeddings shows in what the head gives, or says something else than how they read."""
    is_embeddings = isinstance(value, Mapping) and "__cls__" in value
    return name not in _READING and not isinstance(value, BytesIO | list) and not is_embeddings
