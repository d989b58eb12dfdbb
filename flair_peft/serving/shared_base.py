"""SharedBase: one frozen transformer under many Flair models."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import Any, cast

from accelerate.utils import convert_file_size_to_int
from flair.data import DataPoint, Sentence
from flair.embeddings.base import Embeddings
from flair.models import PrefixedSequenceTagger, SequenceTagger, TextClassifier, TextRegressor, TokenClassifier
from flair.nn import Model
from peft import PeftConfig
from torch.utils.data import Dataset
from tqdm import tqdm

from flair_peft.base import resolve
from flair_peft.embeddings.cooperative_threads import CooperativeThreads
from flair_peft.embeddings.offload import AdapterMemory
from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import AdapterConfigError, BaseMismatchError, PredictionSetupError
from flair_peft.models import inputs, load
from flair_peft.primitives import dtypes
from flair_peft.primitives.dtypes import DtypeLike
from flair_peft.serving.frozen_trunk import FrozenTrunks
from flair_peft.serving.mixed_batches import MixedBatches
from flair_peft.storage import file_names, hub

# Models that read words and no labels, and embed each sentence once: they may predict for one sentence in turns.
READ_WORDS_ONLY = frozenset((SequenceTagger, TextClassifier, TextRegressor, TokenClassifier))

# Mini-batches that one call of Flair's predict gets: its SequenceTagger is quadratic in their number.
_BATCHES_AT_ONCE = 16


class SharedBase:
    """A frozen transformer in memory once, under any number of Flair models with adapters of their own.

    What :meth:`load` returns are ordinary Flair models. They hold the weights of the base by storage: nothing is
    switched between them, and whatever one of them writes goes to a copy of its own.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: DtypeLike | None = None,
        adapter_memory: int | str | None = None,
        transformers_config_kwargs: Mapping[str, Any] | None = None,
        transformers_model_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Load the transformer onto ``flair.device``.

        Args:
            model: name or directory of the base model.
            dtype: of its weights, such as "bfloat16". Models that were trained on weights of another dtype are put on
                these all the same if it is given, and refused if it is not.
            adapter_memory: bytes, or a text such as "500MB", that the adapters of all models may take. Those that were
                not used for longest are left on disk until they are needed: adapters of checkpoint directories and of
                the Hub, which hold what they held when they were loaded. None means no limit.
            transformers_config_kwargs: for ``AutoConfig.from_pretrained``.
            transformers_model_kwargs: for ``AutoModel.from_pretrained``.
            **kwargs: for both.

        Raises:
            BaseModelNotFoundError: there is no such model.
            AdapterConfigError: its weights are quantised or spread over devices, which cannot be shared.
        """
        model_kwargs = {**(transformers_model_kwargs or {}), **kwargs}
        asked = dtypes.requested_dtype(dtype, model_kwargs)
        model_kwargs = {key: value for key, value in model_kwargs.items() if key not in dtypes.SPELLINGS}
        config_kwargs = {**(transformers_config_kwargs or {}), **kwargs}
        base = resolve.find_new(model, dtype=asked, config_kwargs=config_kwargs, model_kwargs=model_kwargs)
        if base.is_placed:
            raise AdapterConfigError(
                f"Cannot share '{model}': its weights are quantised or spread over devices, and such weights cannot be "
                "held by several models. Share a base in bfloat16, or load each model on its own."
            )
        base.weights.hold_in_memory()
        self._base = base
        self._offer = resolve.Offer(base, is_converted=asked is not None)
        self._models: weakref.WeakSet[Model] = weakref.WeakSet()
        self._mixed_batches = MixedBatches()
        self._threads = CooperativeThreads()
        self._memory = None if adapter_memory is None else AdapterMemory(_bytes(adapter_memory))

    def __repr__(self) -> str:
        return (
            f"SharedBase({self._base.record.name!r}, dtype={self._base.known_record.dtype}, models={len(self.models)})"
        )

    @property
    def models(self) -> list[Model]:
        """The models that were loaded and are still in use."""
        return list(self._models)

    def load(self, source: str | Path, *, peft_config: PeftConfig | None = None, **options: Any) -> Model:
        """Return the Flair model of a checkpoint, on this base.

        On a base in half precision, LoRA adapters compute in the base's dtype: in fp32, as PEFT leaves them, they cost
        more than the base saves. Files and training get their exact values.

        Args:
            source: as for :func:`flair_peft.from_pretrained`. Files that hold a base of their own can be loaded, too:
                the weights that are this base's, bit by bit, are shared.
            peft_config: for files of stock Flair, as for :func:`flair_peft.load_legacy`.
            **options: as for :func:`flair_peft.from_pretrained`.

        Raises:
            BaseMismatchError: the model was trained on another base, or in another dtype, and none was asked for.
            FlairPeftError: as for :func:`flair_peft.from_pretrained`.
        """
        model, directory = self._load(source, peft_config, **options)
        embedded = adapted_embeddings(model)
        are_shared = [each.base_source.share_(each.model, each.base_model, self._base) for each in embedded]
        if not embedded:
            raise BaseMismatchError(
                f"Cannot load '{source}' on the shared base '{self._base.record.name}': it has no adapter, so its "
                "weights are its own. It would share nothing. Load it with its class's load."
            )
        if not any(are_shared):
            names, own = sorted({embeddings.base_model_name for embeddings in embedded}), self._base.record.name
            reason, other = f"it was trained on {' and '.join(map(repr, names))}", "make a SharedBase of its base"
            if names == [own]:
                reason = "it holds weights of its base, which are not bit by bit these"
                other = "make a SharedBase in the dtype that they have"
            raise BaseMismatchError(
                f"Cannot load '{source}' on the shared base '{own}': {reason}, and shares no weights with this base. "
                f"It would need a base of its own. Load it with its class's load, or {other}."
            )
        for embeddings in embedded:
            embeddings.narrow_adapter_()
            if self._memory is not None and directory is not None and embeddings.origin is not None:
                embeddings.adapter_memory = self._memory
                folder = file_names.folder_of(embeddings.origin[0])
                self._memory.admit(embeddings, directory / folder / file_names.ADAPTER_WEIGHTS)
        self._models.add(model)
        return model

    def _load(
        self, source: str | Path, peft_config: PeftConfig | None, *, revision: str | None = None, **options: Any
    ) -> tuple[Model, Path | None]:
        """Return the model, and the directory of its checkpoint if it comes from one."""
        is_trusted = peft_config is not None and bool(options.pop("trust_pickle", False))
        chosen = dataclasses.replace(load.choose(**options), offer=self._offer, trust_file=is_trusted)
        if peft_config is not None:
            hub.refuse_revision(str(source), revision)
            return load.load_any_file(Path(source), chosen, peft_config), None
        place = hub.find_checkpoint(str(source), revision=revision, options=chosen)
        return load.load_stored(load.open_stored(place, chosen)), None if place.is_file() else place

    def unload(self, model: Model) -> None:
        """Unload a model: what it holds is freed once nobody else refers to it.

        Raises:
            AdapterConfigError: it was not loaded here, or was unloaded before.
        """
        if model not in self._models:
            raise self._stranger("unload", model)
        self._models.discard(model)
        for embeddings in adapted_embeddings(model):
            if self._memory is not None:
                self._memory.forget(embeddings)

    def predict(
        self,
        sentences: Mapping[Model, DataPoint | list[Any]],
        *,
        mini_batch_size: int = 32,
        verbose: bool = False,
        model_options: Mapping[Model, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> None:
        """The sentences have the labels that ``model.predict(sentences)`` gives them, for each model in its order.

        Sentences of different models share forward passes where PEFT can mix their adapters; those of DoRA, prompts
        and other methods get passes of their own. Models that read the same sentences, and whose adapters are on upper
        layers only, run the layers below once. Scores are those of separate predictions up to rounding. Mini-batches of
        a model may be smaller than ``mini_batch_size``, on which what Flair's ``Lemmatizer`` gives depends.

        Args:
            sentences: model → sentences, or what else the model predicts for. A sentence may have several models.
            mini_batch_size: sentences in one forward pass, of all models together; what several read is counted once
                where they run lower layers once.
            verbose: show a progress bar.
            model_options: model → what its ``predict`` gets beside ``options``, or instead of them; it need not have
                every model.
            **options: for the ``predict`` of each model.

        Raises:
            AdapterConfigError: a key is no Flair model, or has an adapter and is not one of :attr:`models`.
            PredictionSetupError: a value is no data point, nor a list of them; or ``mini_batch_size`` is no size, or
                one model's own; or ``model_options`` are of other models.
        """
        if not isinstance(sentences, Mapping):
            raise _no_model(sentences)
        inputs.check_sizes(mini_batch_size=mini_batch_size)
        for model, points in sentences.items():
            self._check(model, points)
        own = model_options or {}
        if not isinstance(own, Mapping) or not all(
            model in sentences and isinstance(given, Mapping) for model, given in own.items()
        ):
            raise PredictionSetupError(
                "Cannot predict with these model_options: they are a dictionary from models to options, and each of "
                "the models has to predict something here. Pass {model: {option: value}} with models of the sentences."
            )
        if any("mini_batch_size" in given for given in own.values()):
            raise PredictionSetupError(
                "Cannot predict with a mini_batch_size in model_options: the models share their forward passes. Pass "
                "mini_batch_size to predict."
            )
        jobs = [_Job(model, _as_list(points), {**options, **own.get(model, {})}) for model, points in sentences.items()]
        total = sum(len(job.data_points) for job in jobs)
        trunks = FrozenTrunks()
        answer = self._mixed_batches.for_prediction(trunks, rows=mini_batch_size)
        with tqdm(total=total, desc="Batch inference", disable=not verbose) as bar:
            for wave in _waves(jobs, limit=mini_batch_size):
                count = trunks.count_rows((adapted_embeddings(job.model), job.data_points) for job in wave)
                rounds = max(1, -(-count // mini_batch_size))
                self._threads.run([functools.partial(job.run, rounds, bar.update) for job in wave], answer)

    def _check(self, model: Any, points: Any) -> None:
        if not isinstance(model, Model):
            raise _no_model(model)
        if model not in self._models and adapted_embeddings(model):
            raise self._stranger("predict with", model)
        inputs.check_points(model, _as_list(points))

    def _stranger(self, action: str, model: Any) -> AdapterConfigError:
        return AdapterConfigError(
            f"Cannot {action} this {type(model).__name__}: it is not one of the {len(self._models)} models of this "
            "SharedBase. It was loaded elsewhere, or unloaded before. Pass what load returned."
        )


def _no_model(given: Any) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot predict with a {type(given).__name__}: it is no Flair model. predict takes a dictionary from models "
        "to their sentences. Pass {model: sentences}."
    )


class _Job:
    """What one model has to predict, and the options of its ``predict``."""

    def __init__(self, model: Model, data_points: list[Any], options: Mapping[str, Any]) -> None:
        self.model, self.data_points, self._options = model, data_points, options

    def run(self, rounds: int, advance: Callable[[int], object]) -> None:
        """Predict in so many rounds, so that all models of a wave end with the same one."""
        if self.data_points and isinstance(self.data_points[0], Sentence):
            Sentence.set_context_for_sentences(self.data_points)
        size = -(-len(self.data_points) // rounds)
        # It reads copies, which have the context that is in the same call.
        is_whole = any(isinstance(module, PrefixedSequenceTagger) for module in self.model.modules())
        window = max(1, len(self.data_points) if is_whole else size * _BATCHES_AT_ONCE)
        for start in range(0, len(self.data_points), window):
            part = self.data_points[start : start + window]
            self.model.predict(part, mini_batch_size=size, **self._options)
            advance(len(part))

    def held(self) -> Iterator[int]:
        """Yield what tells data points apart, also those that are parts of pairs."""
        for data_point in self.data_points:
            yield id(data_point)
            if not isinstance(data_point, Sentence):
                yield from (id(part) for part in vars(data_point).values() if isinstance(part, Sentence))

    def may_take_turns_with(self, other: _Job) -> bool:
        """Whether both models may predict for the same sentence in turns, as if one had come after the other."""
        # What one is to keep of a sentence, the other would clear.
        are_apart = self._label != other._label and self._kept == other._kept
        return are_apart and self._reads_words_once and other._reads_words_once

    @property
    def _label(self) -> str:
        """The type of the labels that it gives."""
        return self._options.get("label_name") or self.model.label_type

    @property
    def _kept(self) -> str:
        """Where the vectors are to be after it, "none" if nowhere."""
        return str(self._options.get("embedding_storage_mode", "none"))

    @functools.cached_property
    def _reads_words_once(self) -> bool:
        # What other embeddings store of a sentence, another model would clear while the forward pass is waited for.
        every = [part for part in self.model.modules() if isinstance(part, Embeddings)]
        around = {id(outer) for outer in every for inner in outer.modules() if inner in every and inner is not outer}
        reading = [part for part in every if id(part) not in around]
        return type(self.model) in READ_WORDS_ONLY and reading == adapted_embeddings(self.model) and len(reading) == 1


def _waves(jobs: Sequence[_Job], *, limit: int) -> Iterator[list[_Job]]:
    """Yield jobs that can go on side by side: a model may read the labels that an earlier one gives."""
    wave, held = list[_Job](), list[set[int]]()
    for job in jobs:
        points = set(job.held())
        others = (other for other, theirs in zip(wave, held, strict=True) if not points.isdisjoint(theirs))
        if len(wave) >= limit or not all(map(job.may_take_turns_with, others)):
            yield wave
            wave, held = [], []
        wave.append(job)
        held.append(points)
    if wave:
        yield wave


def _bytes(limit: int | str) -> int:
    try:
        return int(convert_file_size_to_int(limit))
    except (ValueError, AttributeError) as error:
        raise AdapterConfigError(
            f"Cannot keep adapters within {limit!r}: that is no size. A size is a number of bytes or a text such as "
            "'500MB' or '2GiB'. Pass one, or None for no limit."
        ) from error


def _as_list(data_points: Any) -> list[Any]:
    if isinstance(data_points, Dataset):
        return [data_points[place] for place in range(len(cast(Sized, data_points)))]
    return data_points if isinstance(data_points, list) else [data_points]
