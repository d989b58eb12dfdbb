"""One forward pass for sentences of several models: PEFT's mixed batches, over the tensors that these models have."""

from __future__ import annotations

import contextlib
import json
import logging
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft.adapter import config as configs
from flair_peft.adapter import injection, keys, methods, refusals
from flair_peft.base import transformer
from flair_peft.base.frozen import FrozenBase
from flair_peft.embeddings import vector_probe
from flair_peft.embeddings.adapted import ForwardPass
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError

log = logging.getLogger("flair_peft")

# Largest distance of a mixed from a separate pass, as a share of the norm: sums in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Inputs that can be padded without a change of what the others give.
_PADDABLE = frozenset({"input_ids", "attention_mask"})
_SETTINGS = frozenset({"output_hidden_states", "return_dict", "use_cache", "use_mems"})

# What a trial may raise where PEFT cannot mix an adapter, or where it could not be tried.
_TRIAL_ERRORS = (AdapterConfigError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, MemoryError)

Output = Mapping[str, Any]


class MixedBatches:
    """Forward passes of several models on one base, one for all of them where PEFT can mix their adapters.

    A module tree of its own, one for each method, has places for as many adapters as one pass needs. The tensors of the
    models are put there for a pass and taken away after it: training, moving or converting a model shows at once, and
    no model has an active adapter to switch.
    """

    def __init__(self) -> None:
        self._trees: dict[tuple[int, str], _Tree] = {}
        self._said: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def start(self) -> Session:
        """Return what runs the passes of one prediction, in which models stay what they are."""
        return Session(self)

    def run(self, passes: Sequence[ForwardPass], found: Mapping[int, _Guest | None], *, rows: int) -> list[Output]:
        """Return the output of each pass, in the order of the passes; see :meth:`Session.run`."""
        numbers: dict[_Tree | None, list[int]] = {}
        for number, forward_pass in enumerate(passes):
            guest = found[id(forward_pass.embeddings)]
            is_mixed = guest is not None and len(passes) > 1 and set(forward_pass.inputs) - _SETTINGS == _PADDABLE
            numbers.setdefault(guest.tree if guest is not None and is_mixed else None, []).append(number)
        outputs: dict[int, Output] = {}
        for tree, same in numbers.items():
            for group in [[number] for number in same] if tree is None else _chunks(same, passes, rows):
                if tree is None or len(group) == 1:
                    outputs.update({number: passes[number].run() for number in group})
                else:
                    outputs.update(zip(group, self._mixed(tree, [passes[n] for n in group], found), strict=True))
        return [outputs[number] for number in range(len(passes))]

    def admit(self, embeddings: PeftTransformerEmbeddings) -> _Guest | None:
        """Return the adapter as a tree takes it in, or ``None`` if it has to run on its own."""
        if embeddings.training or not isinstance(embeddings.model, PeftModel):
            return None
        places = _Places.of(embeddings.model, methods.ADAPTER_NAME)
        try:
            refusals.refuse_unstorable(embeddings.model, places.layers)
        except AdapterConfigError:
            return None  # merged or switched off, which its own pass follows
        method, frozen = methods.method_name(embeddings.adapter_config), embeddings.base_source.frozen
        reason = methods.why_not_mixed(embeddings.adapter_config)
        if reason is None and frozen is None:
            reason = "it has a base of its own"
        if reason is None and frozen is not None:
            with self._lock:
                guest = _Guest.of(embeddings, self._trees.setdefault((id(frozen), method), _Tree(frozen)), places)
                reason = guest.tree.why_not(guest)
            if reason is None:
                return guest
        if (method, str(reason)) not in self._said:
            self._said.add((method, str(reason)))
            log.info("%s adapters get forward passes of their own: %s. The results are the same.", method, reason)
        return None

    def _mixed(self, tree: _Tree, passes: Sequence[ForwardPass], found: Mapping[int, _Guest | None]) -> list[Output]:
        guests = [guest for forward_pass in passes if (guest := found[id(forward_pass.embeddings)]) is not None]
        with self._lock, contextlib.ExitStack() as stack:
            for forward_pass in passes:
                stack.enter_context(forward_pass.embeddings.in_use())
            try:
                return tree.run(passes, guests)
            except BaseException:
                # PEFT leaves its hooks in place when a pass fails (huggingface/peft#3475): the tree is built anew.
                self._trees = {key: kept for key, kept in self._trees.items() if kept is not tree}
                raise


class Session:
    """The forward passes of one prediction."""

    def __init__(self, batches: MixedBatches) -> None:
        self._batches = batches
        self._guests: dict[int, _Guest | None] = {}

    def run(self, passes: Sequence[ForwardPass], *, rows: int) -> list[Output]:
        """Return the output of each pass, (batch, subtokens, hidden) for each layer, as its own model would give it.

        Args:
            passes: none of them needs a gradient.
            rows: most sentences, or windows of long ones, in one forward pass.
        """
        with torch.no_grad():
            for embeddings in (forward_pass.embeddings for forward_pass in passes):
                if id(embeddings) not in self._guests:
                    self._guests[id(embeddings)] = self._batches.admit(embeddings)
            return self._batches.run(passes, self._guests, rows=rows)


@dataclass
class _Places:
    """Where the parameters and settings of one adapter are in a model.

    Attributes:
        parameters: name, without that of the adapter → module and name in it.
        settings: name → dictionary of a layer that has the setting of each adapter, such as its scaling.
        layers: those of adapters.
        entries: dictionary of modules that has one for each adapter, and the module of this one.
        others: parameters that are not of this adapter.
    """

    parameters: dict[str, tuple[torch.nn.Module, str]]
    settings: dict[str, dict[str, Any]]
    layers: list[BaseTunerLayer]
    entries: list[tuple[torch.nn.ModuleDict, torch.nn.Module]]
    others: list[torch.nn.Parameter]

    @classmethod
    def of(cls, model: torch.nn.Module, adapter_name: str) -> _Places:
        """Return the places of the adapter of this name."""
        found = cls({}, {}, [], [], [])
        for path, module in model.named_modules():
            segments = path.split(".")
            for key, value in module._parameters.items():
                if value is not None and adapter_name in (*segments, key):
                    parts = ("" if part == adapter_name else part for part in (*segments, key))
                    found.parameters[".".join(parts)] = (module, key)
                elif value is not None:
                    found.others.append(value)
            if isinstance(module, torch.nn.ModuleDict) and adapter_name in module:
                found.entries.append((module, module[adapter_name]))
            if isinstance(module, BaseTunerLayer):
                found.layers.append(module)
                held = ((name, getattr(module, name, None)) for name in module.other_param_names)
                settings = {f"{path}:{name}": value for name, value in held if isinstance(value, dict)}
                found.settings.update({key: value for key, value in settings.items() if adapter_name in value})
        return found

    def fits(self, other: _Places) -> bool:
        return self.parameters.keys() == other.parameters.keys() and self.settings.keys() == other.settings.keys()


@dataclass(frozen=True)
class _Guest:
    """An adapter that takes part in a prediction.

    Attributes:
        embeddings: it belongs to.
        tree: that has slots for it.
        kind: what adapters have in common that fit into the same slots: shapes, targets and settings.
        places: of its own tensors.
    """

    embeddings: PeftTransformerEmbeddings
    tree: _Tree
    kind: str
    places: _Places

    @classmethod
    def of(cls, embeddings: PeftTransformerEmbeddings, tree: _Tree, places: _Places) -> _Guest:
        config = configs.encode_config(embeddings.adapter_config)
        apart = {"base_model_name_or_path": None, "revision": None, "inference_mode": None}
        kind = json.dumps({**config, **apart}, sort_keys=True, default=str)
        return cls(embeddings, tree, kind, places)


class _Tree:
    """A module tree with places for adapters of one method, around the base that they stand on."""

    def __init__(self, frozen: FrozenBase) -> None:
        self._frozen = frozen
        self._model: PeftModel | None = None
        # Adapters whose configs are alike fit into the same slots, which are numbered.
        self._slots: dict[str, list[tuple[str, _Places]]] = {}
        self._refused: dict[str, str] = {}

    def why_not(self, guest: _Guest) -> str | None:
        """Return why the adapter cannot be mixed, or ``None`` if it can; tried once for adapters that are alike."""
        if not self._frozen.weights.have_memory_of(guest.places.others):
            return "the base below is not in memory together with the others', or was changed"
        if guest.kind not in self._slots and guest.kind not in self._refused:
            try:
                self._try_out(guest)
            except _TRIAL_ERRORS as error:
                self._slots, self._model = {}, None
                if _is_for_want_of_memory(error):
                    return "there was no memory to try whether it can be mixed"  # there may be the next time
                self._refused[guest.kind] = f"PEFT cannot mix it ({type(error).__name__}: {str(error)[:200]})"
        return self._refused.get(guest.kind)

    def run(self, passes: Sequence[ForwardPass], guests: Sequence[_Guest]) -> list[Output]:
        """Return the outputs of passes that are padded to one length, each cut to the length that it has itself.

        Args:
            passes: of models on this base.
            guests: the adapter of each.
        """
        names: dict[int, str] = {}
        filled: dict[str, _Places] = {}
        taken: dict[str, int] = {}
        try:
            for guest in {id(guest.embeddings): guest for guest in guests}.values():
                name, target = self._slot(guest, taken.get(guest.kind, 0))
                names[id(guest.embeddings)], taken[guest.kind] = name, taken.get(guest.kind, 0) + 1
                filled[name] = target
                _fill_(target, name, guest.places)
            return self._forward([p.inputs for p in passes], [names[id(p.embeddings)] for p in passes])
        finally:
            for name, target in filled.items():
                _empty_(target, name)

    def _forward(self, inputs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Output]:
        assert self._model is not None
        padding = getattr(self._model.get_base_model().config, "pad_token_id", None) or 0
        length = max(given["input_ids"].shape[1] for given in inputs)
        counts = [len(given["input_ids"]) for given in inputs]
        fill = {"input_ids": padding, "attention_mask": 0}
        batch = {n: torch.cat([_padded(given[n], length, value) for given in inputs]) for n, value in fill.items()}
        settings = {name: value for name, value in inputs[0].items() if name in _SETTINGS}
        row_names = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        output = self._model(**batch, **settings, adapter_names=row_names)
        states, last = transformer.states_of(output)
        outputs, first = list[Output](), 0
        for given, count in zip(inputs, counts, strict=True):
            rows, columns = slice(first, first + count), slice(given["input_ids"].shape[1])
            cut = tuple(state[rows, columns] for state in (*states, last))
            outputs.append({"hidden_states": cut[:-1], "last_hidden_state": cut[-1]})
            first += count
        return outputs

    def _slot(self, guest: _Guest, number: int) -> tuple[str, _Places]:
        """Return name and places of the slot of this number for adapters like this one, made if there is none yet."""
        slots = self._slots.setdefault(guest.kind, [])
        if number == len(slots):
            name = f"slot{sum(map(len, self._slots.values()))}"
            config = methods.without_costly_init(configs.own_config(guest.embeddings.adapter_config))
            with injection.building_anew(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT said it when the model was loaded
                if self._model is None:
                    self._model = PeftModel(
                        self._frozen.copy(), config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=False
                    )
                else:
                    self._model.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            self._model.eval().requires_grad_(False)
            slots.append((name, _Places.of(self._model, name)))
        return slots[number]

    def _try_out(self, guest: _Guest) -> None:
        """Return if two sentences of different length give in one batch what each gives alone.

        Raises:
            AdapterConfigError: they do not, or not every tensor of the adapter has a place.
        """
        embeddings = guest.embeddings
        added = [key for key, _ in embeddings.model.named_parameters() if keys.base_key(key) is None]
        _, target = self._slot(guest, 0)
        if not target.fits(guest.places) or len(added) != len(guest.places.parameters):
            raise AdapterConfigError("its tensors have no place beside those of others")
        ids = vector_probe.probe_ids(embeddings)
        sentences = [_as_pass(embeddings, ids), _as_pass(embeddings, ids[: max(1, len(ids) // 2)])]
        with embeddings.in_use():
            mixed = self.run(sentences, [guest, guest])
        for sentence, found in zip(sentences, mixed, strict=True):
            expected = torch.stack(transformer.states_of(sentence.run())[0]).float()
            apart = vector_probe.distance(torch.stack(found["hidden_states"]).float(), expected)
            if not apart <= _TOLERANCE.get(embeddings.base_dtype, 0.0):
                raise AdapterConfigError(f"in one batch its vectors are {apart:.2g} of their norm away")


def _is_for_want_of_memory(error: BaseException) -> bool:
    """Whether memory was short: CPUs and the libraries of GPUs say so in a plain RuntimeError."""
    is_said = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in ("memory", "alloc"))
    return is_said or isinstance(error, MemoryError | torch.OutOfMemoryError)


def _fill_(target: _Places, name: str, source: _Places) -> None:
    """Let a slot have the tensors and settings that a model's adapter has now, and be a part of its tree."""
    for holder, entry in target.entries:
        holder[name] = entry
    for key, (module, own) in target.parameters.items():
        source_module, theirs = source.parameters[key]
        parameter, tensor = module._parameters[own], source_module._parameters[theirs]
        assert parameter is not None
        assert tensor is not None
        if parameter.device == tensor.device:
            parameter.data = tensor.data
        else:
            module._parameters[own] = torch.nn.Parameter(tensor.data, requires_grad=False)
    for key, setting in target.settings.items():
        setting[name] = source.settings[key][methods.ADAPTER_NAME]


def _empty_(target: _Places, name: str) -> None:
    """Let a slot hold no tensor of any model, and be no part of its tree, which PEFT walks through in each pass."""
    for holder, _ in target.entries:
        if name in holder:
            del holder[name]
    for module, key in target.parameters.values():
        parameter = module._parameters[key]
        if parameter is not None and not parameter.is_meta:
            parameter.data = parameter.data.new_empty(0)


def _as_pass(embeddings: PeftTransformerEmbeddings, ids: Sequence[int]) -> ForwardPass:
    batch = torch.tensor([list(ids)], device=embeddings.base_model.device)
    inputs = {
        "input_ids": batch,
        "attention_mask": torch.ones_like(batch),
        **injection.without_cache(embeddings.base_model),
    }
    return ForwardPass(embeddings, {**inputs, "output_hidden_states": True, "return_dict": True})


def _padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """Return a tensor of shape (batch, subtokens) with the value behind each row, which the mask hides."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)


def _chunks(numbers: Sequence[int], passes: Sequence[ForwardPass], rows: int) -> Iterator[list[int]]:
    """Yield groups of passes with at most so many rows together, those of similar length together."""
    chunk, count = list[int](), 0
    for number in sorted(numbers, key=lambda number: passes[number].inputs["input_ids"].shape[1], reverse=True):
        size = len(passes[number].inputs["input_ids"])
        if chunk and count + size > rows:
            yield chunk
            chunk, count = [], 0
        chunk.append(number)
        count += size
    if chunk:
        yield chunk
