"""A base model whose weights are frozen: what proves which one it is, and the models that stand on it."""

from __future__ import annotations

import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from flair_peft.adapter import keys
from flair_peft.base import added_rows, module_copy, placement, quantisation, transformer
from flair_peft.base.adapter_template import AdapterTemplate
from flair_peft.base.changed_modules import Computation
from flair_peft.base.copy_on_write import SharedWeights
from flair_peft.errors import BaseMismatchError, name_some
from flair_peft.primitives import building, fingerprint, mapped_memory
from flair_peft.primitives.base_record import BaseRecord
from flair_peft.primitives.dtypes import dtype_name

# State of a source and sample of its weights → digests of all its weights, and of those that are read.
_full_fingerprints: dict[tuple[Any, str], tuple[str, str]] = {}

# What a config says of its origin, which does not change the model.
_NO_SETTINGS = frozenset({"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version"})


class FrozenBase:
    """A base model whose weights nobody changes. Its copies are models of their own that hold the same memory.

    Memory is copied on write, so that no copy sees what is written to another; see
    :mod:`flair_peft.base.copy_on_write`.

    Attributes:
        record: what files say of it.
        random_names: weights that the source lacks, and that are random therefore: other copies of it have others.
        weights: that its copies share.
        adapter_template: adds adapters to its copies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: BaseRecord,
        random_names: frozenset[str],
        *,
        parent: FrozenBase | None = None,
    ) -> None:
        self._model, self.record, self.random_names, self._parent = model, record, random_names, parent
        of_parent: SharedWeights | None = None if parent is None else parent.weights
        self.weights: SharedWeights = SharedWeights(model.parameters(), parent=of_parent)
        self.adapter_template = AdapterTemplate()
        self._by_attention: dict[str, FrozenBase] = {}
        # By the digest of the rows added; weak, since each of these holds this one.
        self._with_rows: weakref.WeakValueDictionary[str, FrozenBase] = weakref.WeakValueDictionary()

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenBase:
        return self

    @property
    def config(self) -> PretrainedConfig:
        """The config of the model."""
        return self._model.config

    @functools.cached_property
    def sampled_digests(self) -> tuple[str, str]:
        """Digests of a sample of the weights that the source has: of all, and without those that nobody reads.

        transformers writes random poolers into copies of a base.
        """
        if self._parent is not None:
            return self._parent.sampled_digests
        own = self.own_weights()
        read = dict(zip(own, mapped_memory.to_read_once(list(own.values())), strict=True))
        return fingerprint.sampled_and_part(read, self._names_read())

    @functools.cached_property
    def full_digests(self) -> tuple[str, str]:
        """The same of all their elements; read once for each state of the source and dtype."""
        if self._parent is not None:
            return self._parent.full_digests
        key = (state_of_source(self.record), self.sampled_digests[0])
        found = _full_fingerprints.get(key) or fingerprint.full_and_part(self.own_weights(), self._names_read())
        if key[0] is not None:
            _full_fingerprints[key] = found
        return found

    def _names_read(self) -> frozenset[str]:
        return frozenset(name for name in self.own_weights() if not keys.is_unread(name))

    def is_as(self, record: BaseRecord) -> bool:
        """Whether the weights that are read are those of a record, by a sample, or it says nothing of them.

        One of the two may lack weights that the other has, and that nobody reads.
        """
        own, read = self.sampled_digests
        return record.fingerprint in (None, own) or read in (record.fingerprint, record.read_fingerprint)

    def is_fully_as(self, record: BaseRecord) -> bool:
        """Whether all weights that are read are those of a record."""
        own, read = self.full_digests
        return record.full_fingerprint == own or read in (record.full_fingerprint, record.read_full_fingerprint)

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record with all that shows from the base itself."""
        if self._parent is not None:
            return self._parent.known_record
        return dataclasses.replace(
            self.record,
            fingerprint=self.sampled_digests[0],
            read_fingerprint=self.sampled_digests[1],
            vocabulary_size=self.own_rows,
            dtype=dtype_name(self._model.get_input_embeddings().weight.dtype),
            attention=str(self.config._attn_implementation),
            quantization=quantisation.settings_of(self.config),
        )

    @property
    def expected_record(self) -> BaseRecord:
        """The record of a base that was found for a file: with the fingerprint if it was compared with that."""
        if self._parent is not None:
            return self._parent.expected_record
        is_known = "sampled_digests" in vars(self)
        return self.known_record if is_known else dataclasses.replace(self.record, fingerprint=None)

    @property
    def root(self) -> FrozenBase:
        """The base as its source has it, without rows added and with the attention of its config."""
        return self if self._parent is None else self._parent.root

    @property
    def own_rows(self) -> int:
        """Rows of the input embeddings."""
        return len(self._model.get_input_embeddings().weight)

    @property
    def is_placed(self) -> bool:
        """Whether the weights may not be moved; see :func:`flair_peft.base.placement.is_placed`."""
        return placement.is_placed(self._model)

    @functools.cached_property
    def _computations(self) -> dict[str, Computation]:
        return {path: Computation.of(module) for path, module in self._model.named_modules()}

    def computes_as(self, modules: Mapping[str, torch.nn.Module]) -> bool:
        """Whether modules, by their paths, do what those of the base do, beside what weights and the config say."""
        known = self._computations
        return all(path not in known or known[path].is_of(module) for path, module in modules.items())

    def own_weights(self) -> Mapping[str, torch.Tensor]:
        """Return name → tensor of all weights that the source has; they must not be written to."""
        return {name: t for name, t in self._model.state_dict().items() if name not in self.random_names}

    def names_of_parameters(self) -> frozenset[str]:
        """Return the names of all weights but buffers, which a model computes when it is made."""
        return frozenset(name for name, _ in self._model.named_parameters(remove_duplicate=False))

    def names_of_input_embeddings(self) -> frozenset[str]:
        """Return the names under which state dicts hold the input embeddings: several where weights are tied."""
        return transformer.names_of_input_embeddings(self._model)

    def copy(self) -> PreTrainedModel:
        """Return a model with parameters and buffers of its own; the parameters take memory where they are written to.

        A base that is quantised or spread over devices is not shared: it is returned itself.
        """
        if self.is_placed:
            return self._model
        parameters = list(self._model.parameters())
        return self._around(dict(zip(map(id, parameters), self.weights.copies_of(parameters), strict=True)))

    def _around(self, tensors: Mapping[int, torch.Tensor]) -> PreTrainedModel:
        """Return the model with parameters of its own around tensors, by the identity of the base's parameters."""
        memo: dict[int, Any] = {}
        for parameter in self._model.parameters():
            tensor = tensors.get(id(parameter), parameter.data)
            memo[id(parameter)] = torch.nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        return module_copy.copy_modules(self._model, memo)

    def private_copy(self) -> PreTrainedModel:
        """Return a model with storage of its own."""
        return copy.deepcopy(self._model)

    def variant(self, config: PretrainedConfig) -> FrozenBase:
        """Return the base with the same storage for a model of this config, whose attention may be another.

        Raises:
            BaseMismatchError: the config differs in more than the attention and the size of the vocabulary.
        """
        own, other = described(self.config), described(config)
        named = sorted(name for name in {*own, *other} - {"vocab_size"} if own.get(name) != other.get(name))
        if named:
            raise BaseMismatchError(
                f"Cannot put the model on the shared base '{self.record.name}': its config has another "
                f"{name_some(named)}. It may compute something else than in its training. Load it on its own, or "
                "make a SharedBase with these settings."
            )
        attention = config._attn_implementation
        if attention in (None, self.config._attn_implementation):
            return self
        with building.lock, torch.inference_mode(False):
            if attention not in self._by_attention:
                self._by_attention[attention] = self._with_attention(attention)
            return self._by_attention[attention]

    def _with_attention(self, attention: str) -> FrozenBase:
        """Return a base of the same storage; models choose the classes of their attention when they are built."""
        if self.record.needs_remote_code:
            raise BaseMismatchError(
                f"Cannot put the model on the shared base '{self.record.name}': it was trained with {attention} "
                "attention, and a base with code of its own is not built anew for that. Load the model on its own, or "
                "make a SharedBase with that attn_implementation."
            )
        config = copy.deepcopy(self.config)
        config._attn_implementation = attention
        model = transformer.build_model(config, dtype=self._model.dtype, model_kwargs={})
        own = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.data = own[name].data if isinstance(tensor, torch.nn.Parameter) else own[name].clone()
        model.name_or_path = self._model.name_or_path
        return FrozenBase(model, self.record, self.random_names, parent=self)

    def share_(self, parameters: Mapping[str, torch.nn.Parameter]) -> bool:
        """Let each frozen weight that is this base's, bit by bit, have its memory, in place; return whether one is.

        Args:
            parameters: name in the base model → parameter.
        """
        own = dict(self._model.named_parameters(remove_duplicate=False))
        frozen = {name: parameter for name, parameter in parameters.items() if not parameter.requires_grad}
        same = [name for name in frozen if name in own and fingerprint.are_same_bits(frozen[name], own[name])]
        for name, tensor in zip(same, self.weights.copies_of([own[name] for name in same]), strict=True):
            frozen[name].data = tensor
        return bool(same)

    def reaching(self, rows: int, *, separator: int | None) -> FrozenBase:
        """Return this base with so many rows at least: a vocabulary padded beyond its tokenizer may have them already.

        Args:
            rows: of the input embeddings.
            separator: id of the token whose row, if it is new, is the mean of all.
        """
        own = self.own_rows
        if rows <= own:
            return self
        drawn = [place for place in range(own, rows) if place != separator]
        with torch.inference_mode(False):
            new = self._mean_row.repeat(rows - own, 1)
            if drawn:
                [matrix] = mapped_memory.to_read_once([added_rows.matrix_of(self._model)])
                new[[place - own for place in drawn]] = added_rows.drawn_rows(matrix, drawn)
        return self.with_rows(new)

    def with_rows(self, new: torch.Tensor) -> FrozenBase:
        """Return this base with these rows, of shape (count, length), appended to its input embeddings."""
        with building.lock, torch.inference_mode(False):
            if self.is_placed:
                _ = self.known_record  # as it is without the rows: the very model gets them
                added_rows.append_rows_(self._model, new)
                return FrozenBase(self._model, self.record, self.random_names, parent=self)
            digest = fingerprint.of_tensor(new)
            longer = self._with_rows.get(digest)
            if longer is None:
                model = self._around({})
                added_rows.append_rows_(model, new)
                longer = FrozenBase(model, self.record, self.random_names, parent=self)
                self._with_rows[digest] = longer
            return longer

    @functools.cached_property
    def _mean_row(self) -> torch.Tensor:
        [matrix] = mapped_memory.to_read_once([added_rows.matrix_of(self._model)])
        return added_rows.mean_row(matrix)


class PlacedBase(FrozenBase):
    """A base that is quantised when it is read, or spread over devices. What proves it is its source.

    Devices quantise in different ways, and weights that are offloaded are not there to be read.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        record: BaseRecord,
        random_names: frozenset[str],
        *,
        source: Callable[[], FrozenBase],
    ) -> None:
        super().__init__(model, record, random_names)
        self._source = source

    @functools.cached_property
    def known_record(self) -> BaseRecord:
        """The record of the source, with the settings by which it is quantised."""
        attention, settings = str(self.config._attn_implementation), quantisation.settings_of(self.config)
        record = dataclasses.replace(self._source().known_record, attention=attention, quantization=settings)
        mapped_memory.give_back_freed()
        return record

    @functools.cached_property
    def sampled_digests(self) -> tuple[str, str]:
        """Those of the source."""
        return str(self.known_record.fingerprint), str(self.known_record.read_fingerprint)

    @functools.cached_property
    def full_digests(self) -> tuple[str, str]:
        """Those of the source."""
        return self._source().full_digests


def described(config: PretrainedConfig) -> dict[str, Any]:
    """Return the settings of a model: not where it comes from, nor its attention, which no dictionary holds."""
    return {name: value for name, value in config.to_dict().items() if name not in _NO_SETTINGS}


def state_of_source(record: BaseRecord) -> tuple[Any, ...] | None:
    """Return what changes whenever the files of a base may have changed; ``None`` if that cannot be told."""
    if Path(record.name).is_dir():
        folder = Path(record.name, record.arguments.get("subfolder", ""))
        stats = ((path.name, path.stat()) for path in sorted(folder.iterdir()) if path.is_file())
        # Copies can keep the time of what they are copied from, which the time of the change of an inode does not.
        states = ((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino) for name, stat in stats)
        return (str(folder.resolve()), *states)
    return None if record.revision is None else (record.name, record.revision)
