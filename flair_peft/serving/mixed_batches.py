"""Mixed batches: one forward pass for the sentences of several models.

From the sentences of several models to their vectors:

1. ``SharedBase.predict`` lets each model's own ``predict`` run in a thread of its own, see
   :mod:`flair_peft.embeddings.cooperative_threads`.
   Where its embeddings need a forward pass, the thread asks for it and stops.
2. When all threads ask, :class:`MixedBatches` gets their passes. Those that share lower layers on the same text are run
   by ``frozen_trunk.py``. Of the rest, it groups those whose adapters can be mixed, by base
   and method, and cuts the groups to the size of a mini-batch. Every other pass is run by its own model.
3. For each group, a :class:`MixingModel` pads the inputs to one length. There are two kinds:

   - LoRA on linear layers, of any ranks, scales and layers: a :class:`GatheringModel` computes with the matrices of all
     rows at once (``gathered_lora.py``).
   - What else PEFT can mix, such as LoRA on embeddings or with a bias: a :class:`MixingModel` itself puts the tensors
     of each adapter into a slot (``adapter_slots.py``) and tells PEFT, for each row, the slot whose adapter it takes.
     PEFT loops over the adapters.

4. The hidden states are cut to the rows and the length of each pass, which is the reply to its thread. No tensor of an
   adapter is kept between passes: training, moving or converting a model shows at once, and no model has an active
   adapter to switch.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel

from flair_peft.adapter import config as configs
from flair_peft.adapter import keys, methods, model_call, refusals
from flair_peft.base import transformer
from flair_peft.base.changed_modules import is_changed
from flair_peft.base.frozen_base import FrozenBase
from flair_peft.embeddings import batch_division, division_trial, pass_cost, vector_probe
from flair_peft.embeddings.adapted import ForwardPass, may_be_divided
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError
from flair_peft.primitives import building, rounding
from flair_peft.primitives.full_precision import exact_products
from flair_peft.serving.adapter_slots import AdapterSlot
from flair_peft.serving.frozen_trunk import FrozenTrunks
from flair_peft.serving.gathered_lora import GatheredLora, PlainLora

log = logging.getLogger("flair_peft")

# Inputs that can be padded without a change of what the others give.
_PADDABLE = frozenset({"input_ids", "attention_mask"})
_SETTINGS = frozenset({"output_hidden_states", "return_dict", "use_cache", "use_mems"})

# What a trial may raise where PEFT cannot mix an adapter, or where it could not be tried.
_TRIAL_ERRORS = (AdapterConfigError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, MemoryError)

Output = Mapping[str, Any]
Adapter = AdapterSlot | PlainLora
Mixable = dict[int, "tuple[MixingModel, Adapter] | None"]
"""Identity of embeddings → the model that can mix their adapter, and the adapter; ``None`` where none can."""


class MixedBatches:
    """Answers the forward passes of several models, with one pass for all whose adapters can be mixed.

    It has a :class:`MixingModel` of each kind for each method and base. A base with added rows goes with the last model
    that is on it, and its mixing models go with it.
    """

    def __init__(self) -> None:
        self._models: weakref.WeakKeyDictionary[FrozenBase, dict[Any, MixingModel]] = weakref.WeakKeyDictionary()
        self._reported: set[tuple[str, str]] = set()
        self._lock = threading.Lock()

    def for_prediction(self, trunks: FrozenTrunks, *, rows: int) -> Callable[[Sequence[ForwardPass]], list[Output]]:
        """Return what answers the forward passes of one prediction, during which models stay what they are.

        Passes, none of which needs a gradient, become outputs in their order: (batch, subtokens, hidden) for each
        layer, as the model of the pass would give it. ``rows`` are the most sentences, or windows of long ones, in one
        forward pass.
        """
        return functools.partial(self._run, trunks=trunks, mixable={}, rows=rows)

    @torch.no_grad()
    def _run(self, passes: Sequence[ForwardPass], *, trunks: FrozenTrunks, mixable: Mixable, rows: int) -> list[Output]:
        if len(passes) == 1 or any(transformer.is_sparse(each.embeddings.base_model) for each in passes):
            return [each.run() for each in passes]
        outputs: dict[int, Output] = {}
        for numbers in trunks.groups(passes):
            of_group = {number: passes[number] for number in numbers}
            otherwise = functools.partial(self._count, of_group, mixable, rows)
            if trunks.are_cheaper([*of_group.values()], otherwise):
                outputs.update(zip(numbers, trunks.run([*of_group.values()]), strict=True))
        left = {number: each for number, each in enumerate(passes) if number not in outputs}
        for mixing, numbers in self._groups(left, mixable, rows):
            group = [passes[number] for number in numbers]
            if mixing is None or len(group) == 1:
                outputs.update({number: passes[number].run() for number in numbers})
            else:
                adapters = [entry[1] for each in group if (entry := mixable[id(each.embeddings)]) is not None]
                outputs.update(zip(numbers, self._mix(mixing, group, adapters), strict=True))
        return [outputs[number] for number in range(len(passes))]

    def _count(self, passes: Mapping[int, ForwardPass], mixable: Mixable, rows: int) -> int:
        """Return how often a transformer is called for these passes."""
        groups = self._groups(passes, mixable, rows)
        return sum(len(numbers) if mixing is None else 1 for mixing, numbers in groups)

    def _groups(
        self, passes: Mapping[int, ForwardPass], mixable: Mixable, rows: int
    ) -> Iterator[tuple[MixingModel | None, list[int]]]:
        """Yield the numbers of passes that are run together, and by which model; ``None``: each by its own."""
        by_model: dict[MixingModel | None, list[int]] = {}
        for number, forward_pass in passes.items():
            embeddings = forward_pass.embeddings
            if id(embeddings) not in mixable:
                mixable[id(embeddings)] = self._find_mixing_model(embeddings)
            entry = mixable[id(embeddings)]
            can_join = len(passes) > 1 and forward_pass.inputs.keys() - _SETTINGS == _PADDABLE
            by_model.setdefault(entry[0] if entry is not None and can_join else None, []).append(number)
        for mixing, numbers in by_model.items():
            chunks = [numbers] if mixing is None else _chunks(numbers, passes, rows)
            yield from ((mixing, chunk) for chunk in chunks)

    def _find_mixing_model(self, embeddings: PeftTransformerEmbeddings) -> tuple[MixingModel, Adapter] | None:
        """Return the model that can mix the adapter, and the adapter; ``None`` if it needs passes of its own."""
        if embeddings.training or not isinstance(embeddings.model, PeftModel):
            return None
        plain = PlainLora.of(embeddings.model, methods.ADAPTER_NAME)
        if plain is None and any(is_changed(module) or module.training for module in embeddings.model.modules()):
            return None  # a hook sees the passes of its own model, and dropout may be wanted
        adapter = plain or AdapterSlot(embeddings.model, methods.ADAPTER_NAME)
        try:
            if isinstance(adapter, AdapterSlot):
                refusals.refuse_unstorable(embeddings.model, adapter.layers)
        except AdapterConfigError:
            return None  # merged or switched off, which its own pass follows
        method, base = methods.method_name(embeddings.adapter_config), embeddings.base_source.frozen
        reason = methods.why_not_mixed(embeddings.adapter_config)
        if reason is None and base is None:
            reason = "it has a base of its own"
        if reason is None and base is not None:
            with self._lock:
                kind = MixingModel if plain is None else GatheringModel
                mixing = self._models.setdefault(base, {}).setdefault((method, kind), kind(base))
                reason = mixing.why_not(embeddings, adapter)
            if reason is None:
                return mixing, adapter
        if (method, str(reason)) not in self._reported:
            self._reported.add((method, str(reason)))
            log.info("%s adapters get forward passes of their own: %s. The results are the same.", method, reason)
        return None

    def _mix(self, mixing: MixingModel, passes: Sequence[ForwardPass], adapters: Sequence[Adapter]) -> Sequence[Output]:
        with self._lock, contextlib.ExitStack() as stack:
            for forward_pass in passes:
                stack.enter_context(forward_pass.embeddings.in_use())
            return mixing.run(passes, adapters)


class MixingModel:
    """A PEFT model around a frozen base, with slots for as many adapters of one method as one forward pass needs.

    It is built when the first adapter is tried, and anew after a pass that failed. Adapters whose configs are alike
    take the same slots in turn; between passes all slots are empty.
    """

    def __init__(self, base: FrozenBase) -> None:
        self._base: FrozenBase = weakref.proxy(base)
        self._model: PeftModel | None = None
        self._slots: dict[Hashable, list[AdapterSlot]] = {}
        self._tried: set[object] = set()
        self._refused: dict[object, str] = {}

    def why_not(self, embeddings: PeftTransformerEmbeddings, adapter: Any) -> str | None:
        """Return why the adapter cannot be mixed, or ``None`` if it can; tried once for adapters that are alike."""
        if not self._base.weights.have_memory_of(adapter.others):
            return "the base below is not in memory together with the others', or was changed"
        if vars(embeddings.base_model.config) != vars(self._base.config):
            return "its config is not that of the base any more"
        if not self._base.computes_as(adapter.modules):
            return "its modules are not those of the base any more, or have other settings"
        kind = (adapter.kind, pass_cost.compute_dtype(embeddings.base_model))
        if kind not in self._tried and kind not in self._refused:
            try:
                self._try_out(embeddings, adapter)
                self._tried.add(kind)
            except _TRIAL_ERRORS as error:
                self._slots, self._model = {}, None
                if division_trial.is_for_want_of_memory(error):
                    return "there was no memory to try whether it can be mixed"  # there may be the next time
                self._refused[kind] = f"PEFT cannot mix it ({type(error).__name__}: {str(error)[:200]})"
        return self._refused.get(kind)

    def run(self, passes: Sequence[ForwardPass], adapters: Sequence[Any]) -> list[Output]:
        """Return the outputs of passes that are padded to one length, each cut to the length that it has itself."""
        slots: dict[AdapterSlot, AdapterSlot] = {}
        taken: collections.Counter[Hashable] = collections.Counter()
        try:
            for adapter in dict.fromkeys(adapters):
                slots[adapter] = self._slot(adapter, taken[adapter.kind])
                taken[adapter.kind] += 1
                slots[adapter].fill_(adapter)
            names = [slots[adapter].name for adapter in adapters]
            return self._forward(passes, names)
        except BaseException:
            # PEFT leaves its hooks in place when a pass fails (huggingface/peft#3475): the model is built anew.
            self._slots, self._model = {}, None
            raise
        finally:
            for slot in slots.values():
                slot.empty_()

    def _forward(self, passes: Sequence[ForwardPass], adapters: Sequence[Any]) -> list[Output]:
        model, inputs = self._module, [each.inputs for each in passes]
        is_grouped = all(may_be_divided(each.embeddings) for each in passes)
        padding = getattr(model.config, "pad_token_id", None) or 0
        length = max(given["input_ids"].shape[1] for given in inputs)
        counts = [len(given["input_ids"]) for given in inputs]
        fill = {"input_ids": padding, "attention_mask": 0}
        batch = {n: torch.cat([_padded(given[n], length, value) for given in inputs]) for n, value in fill.items()}
        batch.update({name: value for name, value in inputs[0].items() if name in _SETTINGS})
        by_row = [adapter for adapter, count in zip(adapters, counts, strict=True) for _ in range(count)]

        def run(given: Mapping[str, Any], rows: Sequence[int]) -> Output:
            return self._call([by_row[row] for row in rows], given)

        division = division_trial.find_division(run, batch, model=model) if is_grouped else None
        output = batch_division.run_divided(run, batch, division)
        states, last = transformer.states_of(output)
        outputs, first = list[Output](), 0
        for given, count in zip(inputs, counts, strict=True):
            part = (slice(first, first + count), slice(given["input_ids"].shape[1]))
            outputs.append({"hidden_states": _part_of(states, part), "last_hidden_state": last[part]})
            first += count
        return outputs

    def _call(self, rows: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
        """Return the output for the inputs, for each row with the adapter of its slot."""
        assert self._model is not None
        return self._model(**inputs, adapter_names=[*rows])

    @property
    def _module(self) -> torch.nn.Module:
        """What computes; its config is that of the transformer."""
        assert self._model is not None
        return self._model

    def _slot(self, adapter: AdapterSlot, number: int) -> AdapterSlot:
        """Return the slot of this number for adapters like this one, made if there is none yet."""
        slots = self._slots.setdefault(adapter.kind, [])
        if number == len(slots):
            name = f"slot{sum(map(len, self._slots.values()))}"
            config = methods.without_costly_init(configs.own_config(adapter.model.peft_config[adapter.name]))
            with building.anew(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT said it when the model was loaded
                if self._model is None:
                    self._model = PeftModel(
                        self._base.copy(), config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=False
                    )
                else:
                    self._model.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
            self._model.eval().requires_grad_(False)
            slots.append(AdapterSlot(self._model, name))
        return slots[number]

    def _has_place(self, adapter: Any, count: int) -> bool:
        """Whether each of so many tensors of the adapter has a place in the slots of its kind."""
        return self._slot(adapter, 0).fits(adapter) and count == len(adapter.parameters)

    def _try_out(self, embeddings: PeftTransformerEmbeddings, adapter: Adapter) -> None:
        """Return if two sentences of different length give in one batch what each gives alone.

        Raises:
            AdapterConfigError: they do not, or not every tensor of the adapter has a place.
        """
        added = [key for key, _ in embeddings.model.named_parameters() if keys.base_key(key) is None]
        if not self._has_place(adapter, len(added)):
            raise AdapterConfigError("its tensors have no place beside those of others")
        ids = vector_probe.probe_ids(embeddings)
        sentences = [_as_pass(embeddings, ids), _as_pass(embeddings, ids[: max(1, len(ids) // 2)])]
        with transformer.keeping_attention(embeddings), exact_products():
            with embeddings.in_use():
                mixed = self.run(sentences, [adapter, adapter])
            alone = [torch.stack([*transformer.states_of(sentence.run())[0]]).float() for sentence in sentences]
        for expected, output in zip(alone, mixed, strict=True):
            apart = rounding.distance(torch.stack([*output["hidden_states"]]).float(), expected)
            if not apart <= division_trial.TOLERANCE.get(pass_cost.compute_dtype(embeddings.base_model), 0.0):
                raise AdapterConfigError(f"in one batch its vectors are {apart:.2g} of their norm away")


class GatheringModel(MixingModel):
    """The model in which rows take LoRA matrices of their own; between passes it holds none of them.

    Adapters of all ranks, scales and layers share a pass. Those of other layers than the ones before are tried first.
    """

    def run(self, passes: Sequence[ForwardPass], adapters: Sequence[Any]) -> list[Output]:
        """Return the outputs of passes that are padded to one length, each cut to the length that it has itself."""
        return self._forward(passes, adapters)

    def _call(self, rows: Sequence[Any], inputs: Mapping[str, Any]) -> Any:
        return self._gathered(rows, **inputs)

    @functools.cached_property
    def _gathered(self) -> GatheredLora:
        return GatheredLora(self._base.copy())

    @property
    def _module(self) -> torch.nn.Module:
        return self._gathered.model

    def _has_place(self, adapter: Any, count: int) -> bool:
        return count == 2 * len(adapter.matrices)


def _part_of(states: Sequence[torch.Tensor], part: tuple[slice, slice]) -> Sequence[torch.Tensor]:
    """Return rows and columns of the hidden states of each layer."""
    return batch_division.LazyStates(len(states), lambda index: states[index][part])


def _as_pass(embeddings: PeftTransformerEmbeddings, ids: Sequence[int]) -> ForwardPass:
    batch = torch.tensor([list(ids)], device=embeddings.base_model.device)
    inputs = {
        "input_ids": batch,
        "attention_mask": torch.ones_like(batch),
        **model_call.without_cache(embeddings.base_model),
    }
    return ForwardPass(embeddings, {**inputs, "output_hidden_states": True, "return_dict": True})


def _padded(tensor: torch.Tensor, length: int, value: int) -> torch.Tensor:
    """Return a tensor of shape (batch, subtokens) with the value behind each row, which the mask hides."""
    return torch.nn.functional.pad(tensor, (0, length - tensor.shape[1]), value=value)


def _chunks(numbers: Sequence[int], passes: Mapping[int, ForwardPass], rows: int) -> Iterator[list[int]]:
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
