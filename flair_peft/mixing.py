"""One forward pass for sentences of several models: PEFT's mixed batches, over the tensors that these models have."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from flair_peft import adapters, keys, proof
from flair_peft import config as configs
from flair_peft.embeddings import ForwardPass, PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError
from flair_peft.frozen import FrozenBase

log = logging.getLogger("flair_peft")

# Largest distance of a mixed from a separate pass, as a share of the norm: sums in another order.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

# Inputs that can be padded without a change of what the others give.
_PADDABLE = frozenset({"input_ids", "attention_mask"})
_SETTINGS = frozenset({"output_hidden_states", "return_dict", "use_cache", "use_mems"})

Output = Mapping[str, Any]


class MixedBatches:
    """Forward passes of several models on one base, one for all of them where PEFT can mix their adapters.

    Named adapters stand side by side in module trees of their own, one for each method, around the very tensors of the
    models: these are looked up before each pass, so that training, moving or converting a model shows at once. No
    model has an active adapter to switch.
    """

    def __init__(self) -> None:
        self._trees: dict[tuple[int, str], _Tree] = {}
        self._said: set[str] = set()
        self._lock = threading.Lock()

    def run(self, passes: Sequence[ForwardPass], *, rows: int) -> list[Output]:
        """Return the output of each pass, (batch, subtokens, hidden) for each layer, as its own model would give it.

        Args:
            passes: none of them needs a gradient.
            rows: most sentences, or windows of long ones, in one forward pass.
        """
        outputs: dict[int, Output] = {}
        with torch.no_grad(), self._lock:
            for tree, numbers in self._sorted_into_trees(passes).items():
                for group in _chunks(numbers, passes, rows) if tree is not None else ([number] for number in numbers):
                    if tree is None or len(group) == 1:
                        outputs.update({number: passes[number].run() for number in group})
                    else:
                        found = self._mixed(tree, [passes[number] for number in group])
                        outputs.update(zip(group, found, strict=True))
        return [outputs[number] for number in range(len(passes))]

    def forget(self, embeddings: PeftTransformerEmbeddings) -> None:
        """Let go of the adapter, which keeps its place in the model."""
        with self._lock:
            for tree in self._trees.values():
                tree.drop(embeddings)

    def _sorted_into_trees(self, passes: Sequence[ForwardPass]) -> dict[_Tree | None, list[int]]:
        found: dict[_Tree | None, list[int]] = {}
        for number, forward_pass in enumerate(passes):
            tree = self._tree_of(forward_pass) if len(passes) > 1 else None
            found.setdefault(tree, []).append(number)
        return found

    def _tree_of(self, forward_pass: ForwardPass) -> _Tree | None:
        """Return the tree that holds the adapter of a pass, or ``None`` if that has to run on its own."""
        embeddings, names = forward_pass.embeddings, set(forward_pass.inputs)
        if names - _SETTINGS != _PADDABLE or not _is_as_trained(embeddings):
            return None
        method = adapters.method_name(embeddings.adapter_config)
        frozen, reason = embeddings._frozen, adapters.why_not_mixed(embeddings.adapter_config)
        if reason is None and frozen is not None and _stands_on(frozen, embeddings):
            tree = self._trees.setdefault((id(frozen), method), _Tree(frozen))
            reason = tree.add(embeddings)
            if reason is None:
                return tree
        self._say(method, reason or "its base was changed, so that it is not the others' any more")
        return None

    def _mixed(self, tree: _Tree, passes: Sequence[ForwardPass]) -> list[Output]:
        try:
            return tree.run(passes)
        except BaseException:
            # PEFT leaves its hooks in place when a pass fails (huggingface/peft#3475): the tree is built anew.
            self._trees = {key: kept for key, kept in self._trees.items() if kept is not tree}
            raise

    def _say(self, method: str, reason: str) -> None:
        if (method + reason) not in self._said:
            self._said.add(method + reason)
            log.info("%s adapters get forward passes of their own: %s. The results are the same.", method, reason)


class _Tree:
    """A module tree with the adapters of one method that stand on the same base."""

    def __init__(self, frozen: FrozenBase) -> None:
        self._frozen = frozen
        self._model: PeftModel | None = None
        self._links: dict[str, list[_Link | _SettingLink]] = {}
        self._names: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._refused: weakref.WeakKeyDictionary[torch.nn.Module, str] = weakref.WeakKeyDictionary()
        self._count = 0

    def add(self, embeddings: PeftTransformerEmbeddings) -> str | None:
        """Take the adapter in; return why it cannot be mixed, or ``None`` if it can."""
        self._drop_dead()
        if embeddings in self._names or embeddings in self._refused:
            return self._refused.get(embeddings)
        name = f"model{self._count}"
        self._count += 1
        try:
            self._insert(name, embeddings)
            self._try_out(name, embeddings)
        except (AdapterConfigError, ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            self._remove(name)
            self._refused[embeddings] = f"PEFT cannot mix it ({type(error).__name__}: {str(error)[:200]})"
            return self._refused[embeddings]
        self._names[embeddings] = name
        return None

    def drop(self, embeddings: PeftTransformerEmbeddings) -> None:
        name = self._names.pop(embeddings, None)
        if name is not None:
            self._remove(name)

    def run(self, passes: Sequence[ForwardPass]) -> list[Output]:
        """Return the outputs of passes that are padded to one length, each cut to the length that it has itself."""
        names = [self._names[forward_pass.embeddings] for forward_pass in passes]
        with contextlib.ExitStack() as stack:
            for forward_pass in passes:
                stack.enter_context(forward_pass.embeddings.in_use())
            return self._forward([forward_pass.inputs for forward_pass in passes], names)

    def _forward(self, inputs: Sequence[Mapping[str, Any]], names: Sequence[str]) -> list[Output]:
        assert self._model is not None
        padding = getattr(self._model.get_base_model().config, "pad_token_id", None) or 0
        for name in set(names):
            for link in self._links[name]:
                link.renew()
        length = max(given["input_ids"].shape[1] for given in inputs)
        counts = [len(given["input_ids"]) for given in inputs]
        fill = {"input_ids": padding, "attention_mask": 0}
        batch = {n: torch.cat([_padded(given[n], length, value) for given in inputs]) for n, value in fill.items()}
        settings = {name: value for name, value in inputs[0].items() if name in _SETTINGS}
        row_names = [name for name, count in zip(names, counts, strict=True) for _ in range(count)]
        output = self._model(**batch, **settings, adapter_names=row_names)
        states = output.get("hidden_states")
        states = output["encoder_hidden_states"] if states is None else states
        outputs, first = list[Output](), 0
        for given, count in zip(inputs, counts, strict=True):
            rows, columns = slice(first, first + count), slice(given["input_ids"].shape[1])
            outputs.append({"hidden_states": tuple(state[rows, columns] for state in states)})
            first += count
        return outputs

    def _insert(self, name: str, embeddings: PeftTransformerEmbeddings) -> None:
        config = adapters.without_costly_init(configs.own_config(embeddings.adapter_config))
        with adapters.building, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT said it when the model was loaded
            if self._model is None:
                self._model = PeftModel(
                    self._frozen.copy(), config, name, low_cpu_mem_usage=True, autocast_adapter_dtype=False
                )
            else:
                self._model.add_adapter(name, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False)
        self._model.eval().requires_grad_(False)
        self._links[name] = list(_link(self._model, name, embeddings.model))
        linked = {link.source_name for link in self._links[name] if isinstance(link, _Link)}
        own = {key for key, _ in embeddings.model.named_parameters() if keys.base_key(key) is None}
        if own != linked:
            raise AdapterConfigError("its tensors have no place beside those of others")

    def _try_out(self, name: str, embeddings: PeftTransformerEmbeddings) -> None:
        """Return if two sentences of different length give in one batch what each gives alone.

        Raises:
            AdapterConfigError: they do not.
        """
        ids = proof.probe_ids(embeddings)
        sentences = [_as_pass(embeddings, ids), _as_pass(embeddings, ids[: max(1, len(ids) // 2)])]
        with embeddings.in_use():
            mixed = self._forward([sentence.inputs for sentence in sentences], [name, name])
        for sentence, found in zip(sentences, mixed, strict=True):
            alone = sentence.run()
            states = alone.get("hidden_states")
            expected = torch.stack(tuple(alone["encoder_hidden_states"] if states is None else states)).float()
            apart = proof.distance(torch.stack(found["hidden_states"]).float(), expected)
            if not apart <= _TOLERANCE.get(embeddings.base_dtype, 0.0):
                raise AdapterConfigError(f"in one batch its vectors are {apart:.2g} of their norm away")

    def _drop_dead(self) -> None:
        for name in set(self._links) - set(self._names.values()):
            self._remove(name)

    def _remove(self, name: str) -> None:
        self._links.pop(name, None)
        if self._model is not None and len(self._model.peft_config) <= 1:
            self._model = None  # PEFT keeps the last adapter
        elif self._model is not None and name in self._model.peft_config:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the active adapter changes, which nothing here reads
                self._model.delete_adapter(name)


class _Link:
    """A parameter or setting of an adapter in a tree, and the one of the model that it stands for."""

    def __init__(self, target: Any, name: str, source: Any, source_key: str, source_name: str) -> None:
        self._target, self._name, self.source_name = target, name, source_name
        self._source, self._source_key = weakref.ref(source), source_key

    def renew(self) -> None:
        """Let the tree have the tensor that the model has now."""
        source = self._source()
        assert source is not None
        tensor, own = source._parameters[self._source_key], self._target._parameters[self._name]
        if own.device == tensor.device:
            own.data = tensor.data
        else:
            self._target._parameters[self._name] = torch.nn.Parameter(tensor.data, requires_grad=False)


class _SettingLink:
    """A setting of an adapter's layer in a tree, such as its scaling, and the one of the model."""

    def __init__(self, target: dict[str, Any], name: str, source: dict[str, Any]) -> None:
        self._target, self._name, self._source = target, name, source

    def renew(self) -> None:
        """Let the tree have the value that the model has now."""
        self._target[self._name] = self._source[adapters.ADAPTER_NAME]


def _link(tree: PeftModel, name: str, model: PeftModel) -> Iterator[_Link | _SettingLink]:
    """Yield the links of each parameter of an adapter of the tree, and of its settings."""
    for path, module in list(tree.named_modules()):
        segments = path.split(".")
        for own in [key for key, value in module._parameters.items() if value is not None]:
            if name in (*segments, own):
                *holder, key = (adapters.ADAPTER_NAME if part == name else part for part in (*segments, own))
                yield _Link(module, own, model.get_submodule(".".join(holder)), key, ".".join((*holder, key)))
        if isinstance(module, BaseTunerLayer):
            source = model.get_submodule(path)
            for setting in module.other_param_names:
                ours, theirs = getattr(module, setting, None), getattr(source, setting, None)
                if isinstance(ours, dict) and isinstance(theirs, dict) and adapters.ADAPTER_NAME in theirs:
                    yield _SettingLink(ours, name, theirs)


def _is_as_trained(embeddings: PeftTransformerEmbeddings) -> bool:
    """Whether the model of the embeddings has its one adapter, switched on, in evaluation mode."""
    if embeddings.training or not isinstance(embeddings.model, PeftModel):
        return False
    try:
        adapters.refuse_unstorable(embeddings.model)
    except AdapterConfigError:
        return False
    return True


def _stands_on(frozen: FrozenBase, embeddings: PeftTransformerEmbeddings) -> bool:
    """Whether every weight of the base is the shared one still."""
    named = embeddings.model.named_parameters()
    return all(frozen.is_shared(parameter) for name, parameter in named if keys.base_key(name) is not None)


def _as_pass(embeddings: PeftTransformerEmbeddings, ids: Sequence[int]) -> ForwardPass:
    batch = torch.tensor([list(ids)], device=embeddings.base_model.device)
    inputs = {"input_ids": batch, "attention_mask": torch.ones_like(batch), **adapters.without_cache(embeddings.model)}
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
