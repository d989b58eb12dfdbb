"""The frozen trunk: the layers below all adapters, run once for models on one base that read the same text.

Nothing is configured. What models have in common is seen from their module trees, and proven in each pass:

1. :meth:`FrozenTrunks.groups` finds passes with equal inputs. It describes the layers of their models from below, up
   to the first that has an adapter, a hook or trained weights; layers with equal descriptions compute the same.
2. :meth:`FrozenTrunks.run` lets the model run first that has most in common with the others, and records what enters
   and leaves these layers. In the other passes a layer returns what was recorded if the same enters it, bit by bit and
   masks included; otherwise it computes.

A pass runs in shallow copies of these layers and of the modules above them. The models themselves are left alone: other
threads may use them meanwhile, and there is nothing to take back.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from transformers import PretrainedConfig

from flair_peft.base import frozen_base, transformer
from flair_peft.base.changed_modules import OF_TORCH, is_changed, is_of_libraries
from flair_peft.embeddings.adapted import AdaptedEmbeddings, ForwardPass
from flair_peft.primitives import fingerprint, mapped_memory

Output = Mapping[str, Any]
Forward = Callable[..., Any]

# What it takes to start a layer, in tokens that could be computed meanwhile. On a CPU its weights come from memory,
# which was measured; on a GPU kernels are launched from Python, for which this is an estimate.
_LAYER_START = {"cpu": 48}
_LAYER_START_ELSEWHERE = 4096

_VALUES = frozenset({bool, int, float, str, type(None), torch.dtype, torch.device, torch.Size})
_FUNCTIONS = frozenset({FunctionType, BuiltinFunctionType})


class _Part(NamedTuple):
    """A layer of a transformer, or a module beside its layers such as the embeddings below them.

    Attributes:
        path: in its model.
        number: of what it computes.
        is_layer: whether it stands in a list.
    """

    path: str
    number: int
    is_layer: bool


class FrozenTrunks:
    """Finds and runs passes with a trunk in common, during one prediction, in which models stay what they are."""

    def __init__(self) -> None:
        # Description of a layer → tensors that it holds beside its parameters, and the number of both.
        self._numbers: dict[Hashable, list[tuple[list[torch.Tensor], int]]] = {}
        self._parts: dict[int, tuple[AdaptedEmbeddings, list[_Part]]] = {}

    def groups(self, passes: Sequence[ForwardPass]) -> Iterator[list[int]]:
        """Yield the numbers of passes that share lower layers, that of the one to run first in front."""
        for left in _with_equal_inputs(passes):
            while len(left) > 1:
                shared = {n: {o: self._depth(passes[n], passes[o]) for o in left if o != n} for n in left}
                first = max(left, key=lambda number: sum(shared[number].values()))
                if others := [number for number, depth in shared[first].items() if depth]:
                    yield [first, *others]
                left = [number for number in left if number not in (first, *others)]

    def count_rows(self, asking: Iterable[tuple[Sequence[AdaptedEmbeddings], Sequence[Any]]]) -> int:
        """Return the number of data points of all models, once each where models with a trunk in common read it."""
        count, known = 0, list[tuple[list[int], AdaptedEmbeddings]]()
        for embeddings, points in asking:
            ids = [*map(id, points)]
            only = list(embeddings) if len(embeddings) == 1 else []
            if not any(self._common(mine, other) for mine in only for theirs, other in known if theirs == ids):
                count += len(points)
            known.extend((ids, mine) for mine in only)
        return count

    def are_cheaper(self, passes: Sequence[ForwardPass], otherwise: Callable[[], int]) -> bool:
        """Whether a group takes less time with its lower layers run once than in some passes through all layers.

        Args:
            passes: of a group.
            otherwise: how many passes there would be if models are mixed in them; asked where one would be too few.
        """
        ids = passes[0].inputs["input_ids"]
        start, tokens = _LAYER_START.get(ids.device.type, _LAYER_START_ELSEWHERE), ids.numel()
        layers = sum(is_layer for _, _, is_layer in _parts_of(passes[0].embeddings.model))
        computed = len(passes) * layers - sum(self._depth(passes[0], other) for other in passes[1:])
        with_trunk = computed * (start + tokens)

        def mixed(count: int) -> int:
            return layers * (count * start + len(passes) * tokens)

        return with_trunk <= mixed(1) or with_trunk <= mixed(otherwise())

    def run(self, passes: Sequence[ForwardPass]) -> list[Output]:
        """Return the outputs of the passes of a group: of the hidden states, those that the embeddings read."""
        shared = [self._common(passes[0].embeddings, other.embeddings) for other in passes[1:]]
        recordings = [_Recording() for _ in max(shared, key=len)]
        outputs = [self._run(passes[0], [recording.recorder for recording in recordings])]
        for recording in recordings:
            recording.forget_written()
        for forward_pass, parts in zip(passes[1:], shared, strict=True):
            equal = _Equality()
            replays = [functools.partial(recording.replayer, equal=equal) for recording in recordings[: len(parts)]]
            outputs.append(self._run(forward_pass, replays))
        is_intact = all(recording.is_intact() for recording in recordings)  # else one wrote to what others were given
        return outputs if is_intact else [forward_pass.run() for forward_pass in passes]

    def _run(self, forward_pass: ForwardPass, replaced: Sequence[Callable[[Forward], Forward]]) -> Output:
        """Return the output of a pass whose parts do, from below, what is made of their forward methods."""
        embeddings, parts = forward_pass.embeddings, dict[str, torch.nn.Module]()
        for (path, _, _), replace in zip(self._parts_of(embeddings), replaced, strict=False):
            part = embeddings.model.get_submodule(path)
            parts[path] = _shallow_copy(part)
            # Of the class: transformers, called in another thread, may have its own in the layer for a while.
            parts[path].forward = replace(type(part).forward.__get__(part))
        view = _shallow_copy(embeddings)
        view._modules["model"] = _with_modules(embeddings.model, parts)
        with embeddings.in_use():
            seen = dataclasses.replace(forward_pass, embeddings=view)
            vars(seen)["division"] = forward_pass.division  # to find them may take passes, which are not to be recorded
            return _what_is_read(embeddings, seen.run())

    def _depth(self, one: ForwardPass, other: ForwardPass) -> int:
        """Return how many layers two passes have in common."""
        return sum(part.is_layer for part in self._common(one.embeddings, other.embeddings))

    def _common(self, one: AdaptedEmbeddings, other: AdaptedEmbeddings) -> list[_Part]:
        """Return parts of the one, from below, that compute the same as those of the other; none if no layer does."""
        pairs = zip(self._parts_of(one), self._parts_of(other), strict=False)
        common = [mine for mine, _ in itertools.takewhile(lambda pair: pair[0].number == pair[1].number, pairs)]
        return common if any(part.is_layer for part in common) else []

    def _parts_of(self, embeddings: AdaptedEmbeddings) -> list[_Part]:
        """Return the parts from below up to the first that no other model can have in common with this one."""
        if id(embeddings) not in self._parts:
            found, configs = list[_Part](), dict[int, str]()
            # Rows of a prompt are read by every layer.
            has_prompt = embeddings.has_adapter and embeddings.adapter_config.is_prompt_learning
            parts = [] if has_prompt else [*_parts_of(embeddings.model)]
            lowest = next((part for _, part, is_layer in parts if is_layer), None)
            is_alone = lowest is None or any(map(_is_of_others, lowest.modules()))  # what is below is no trunk
            for path, part, is_layer in () if is_alone else parts:
                described = _describe(part, configs)
                if described is None:
                    break
                found.append(_Part(path, self._number(*described), is_layer))
            self._parts[id(embeddings)] = embeddings, found
        return self._parts[id(embeddings)][1]

    def _number(self, description: Hashable, tensors: list[torch.Tensor]) -> int:
        alike = self._numbers.setdefault(description, [])
        for others, number in alike:
            if all(map(fingerprint.are_same_bits, others, tensors)):
                return number
        alike.append((tensors, sum(map(len, self._numbers.values()))))
        return alike[-1][1]


@dataclass(frozen=True)
class _Call:
    """A call of a layer, and its tensors, each with its version, which whoever writes to it raises."""

    inputs: Any
    output: Any
    versions: list[tuple[torch.Tensor, int]]

    def is_intact(self) -> bool:
        """Whether nobody has written to a tensor since."""
        return all(tensor._version == version for tensor, version in self.versions)


class _Recording:
    """What entered and what left a layer in each of its calls; ``None`` where that cannot be told."""

    def __init__(self) -> None:
        self._calls: list[_Call | None] = []

    def is_intact(self) -> bool:
        """Whether nobody has written to what was recorded."""
        return all(call is None or call.is_intact() for call in self._calls)

    def forget_written(self) -> None:
        """Forget calls with a tensor that was written to since, such as an embedding that is scaled in place."""
        self._calls = [call if call is not None and call.is_intact() else None for call in self._calls]

    def recorder(self, compute: Forward) -> Forward:
        """Return a forward method that computes, and records."""

        @functools.wraps(compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            inputs = _comparable(args, kwargs)
            before = _versions(inputs)
            output = compute(*args, **kwargs)
            after = _versions(output)
            self._calls.append(None if before is None or after is None else _Call(inputs, output, [*before, *after]))
            return output

        return forward

    def replayer(self, compute: Forward, equal: _Equality) -> Forward:
        """Return a forward method that returns what was recorded where the same enters, and computes elsewhere."""
        calls = iter(self._calls)

        @functools.wraps(compute)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = next(calls, None)
            is_same = call is not None and equal.are_equal(call.inputs, _comparable(args, kwargs)) and call.is_intact()
            return call.output if call is not None and is_same else compute(*args, **kwargs)

        return forward


class _Equality:
    """Compares what layers are given in one pass; a mask that all of them get is compared once."""

    def __init__(self) -> None:
        # Identities and version of two tensors that are equal → the second: while it is held, its identity is its own.
        self._equal: dict[tuple[int, int, int], torch.Tensor] = {}

    def are_equal(self, known: Any, given: Any) -> bool:
        """Whether two arguments are the same for a layer: of tensors, every bit and the layout."""
        if known is given:
            return True
        if type(known) is not type(given):
            return False
        if isinstance(known, torch.Tensor):
            return self._are_equal_tensors(known, given)
        if type(known) is tuple:
            return len(known) == len(given) and all(map(self.are_equal, known, given))
        return type(known) in _VALUES and bool(known == given)

    def _are_equal_tensors(self, known: torch.Tensor, given: torch.Tensor) -> bool:
        if given.is_inference() or known.device != given.device or known.stride() != given.stride():
            return False
        key = id(known), id(given), given._version
        if key not in self._equal and fingerprint.are_same_bits(known, given):
            self._equal[key] = given
        return key in self._equal


def _versions(value: Any) -> list[tuple[torch.Tensor, int]] | None:
    """Return the tensors in arguments or in an output, with their versions; ``None`` if they hold anything else.

    What is no tensor, tuple or plain value might be changed unseen by the layer or by others, such as a cache.
    """
    if isinstance(value, torch.Tensor):
        return None if value.is_inference() else [(value, value._version)]
    if type(value) is not tuple:
        return [] if type(value) in _VALUES else None
    found = [_versions(each) for each in value]
    return None if None in found else [each for versions in found for each in versions or ()]


def _comparable(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return arguments as tuples, and so lists of plain values, such as masks of heads that are not there."""

    def frozen(value: Any) -> Any:
        is_plain = type(value) is list and all(type(each) in _VALUES for each in value)
        return tuple(value) if is_plain else value

    return tuple(map(frozen, args)), tuple((name, frozen(kwargs[name])) for name in sorted(kwargs))


def _with_equal_inputs(passes: Sequence[ForwardPass]) -> list[list[int]]:
    """Return groups of at least two passes with equal inputs, by their numbers."""
    ids: dict[int, Hashable] = {}
    for forward_pass in passes if len(passes) > 1 else ():
        tensor = forward_pass.inputs["input_ids"]
        if id(tensor) not in ids:
            ids[id(tensor)] = tensor.shape, tuple(tensor.flatten().tolist())
    alike: dict[Hashable, list[list[int]]] = {}
    for number, forward_pass in enumerate(passes if ids else ()):
        groups = alike.setdefault(ids[id(forward_pass.inputs["input_ids"])], [])
        for group in groups:
            if _Equality().are_equal(_comparable((), passes[group[0]].inputs), _comparable((), forward_pass.inputs)):
                group.append(number)
                break
        else:
            groups.append([number])
    return [group for groups in alike.values() for group in groups if len(group) > 1]


def _parts_of(module: torch.nn.Module, path: str = "") -> Iterator[tuple[str, torch.nn.Module, bool]]:
    """Yield the parts of a model from below: path, module, and whether it is a layer, which stands in a list.

    A part is the outermost module that stands in a list, or that has no list in it.
    """
    for name, child in module.named_children():
        place = f"{path}.{name}" if path else name
        is_layer = isinstance(module, torch.nn.ModuleList) and not isinstance(child, torch.nn.ModuleList)
        if is_layer or not any(isinstance(each, torch.nn.ModuleList) for each in child.modules()):
            yield place, child, is_layer
        else:
            yield from _parts_of(child, place)


def _describe(layer: torch.nn.Module, configs: dict[int, str]) -> tuple[Hashable, list[torch.Tensor]] | None:
    """Return what two layers that compute the same have in common, and tensors that must be equal beside it.

    Args:
        layer: of a transformer.
        configs: ``id`` of a config of this transformer → its description; those that are met are added.

    Returns:
        ``None`` if there is an adapter, a hook, a weight that is trained, a method or a module with other attributes of
        somebody else's in the layer, or if it is in training mode.
    """
    parts, tensors = list[Hashable](), list[torch.Tensor]()
    for name, module in layer.named_modules():
        if module.training or _is_of_others(module):
            return None
        parts.append((name, type(module)))
        for key, value in vars(module).items():
            if type(value) in _VALUES or type(value) in _FUNCTIONS:
                parts.append((key, type(value), value))
            elif isinstance(value, PretrainedConfig):
                if id(value) not in configs:
                    configs[id(value)] = _description_of_config(value)
                parts.append((key, configs[id(value)]))
            elif isinstance(value, torch.Tensor):
                tensors.append(value)
            elif key not in OF_TORCH and not is_of_libraries(type(module)):
                return None  # what else it computes with cannot be compared
        for key, parameter in module._parameters.items():
            if parameter is not None and (type(parameter) is not torch.nn.Parameter or parameter.requires_grad):
                return None
            place = id if parameter is None or parameter.is_meta else mapped_memory.place_of
            parts.append((key, parameter if parameter is None else place(parameter)))
        tensors += [buffer for buffer in module._buffers.values() if buffer is not None]
    return tuple(parts), tensors


def _is_of_others(module: torch.nn.Module) -> bool:
    """Whether the module does something else than its class: by PEFT, by a hook, or by a method put into it."""
    return is_changed(module) or isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)


def _description_of_config(config: PretrainedConfig) -> str:
    settings = {**frozen_base.described(config), "attention": config._attn_implementation}
    return json.dumps(settings, sort_keys=True, default=str)


def _shallow_copy(module: Any) -> Any:
    """Return a module with the same attributes and children, of which others can be put into it."""
    copied = object.__new__(type(module))
    copied.__dict__.update(vars(module), _modules={**module._modules})
    return copied


def _with_modules(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> torch.nn.Module:
    """Return the model with some of its modules replaced, by path: a copy down to these, around the same modules."""
    copies: dict[tuple[str, ...], torch.nn.Module] = {(): _shallow_copy(model)}
    for path, module in modules.items():
        *above, name = path.split(".")
        for length in range(1, len(above) + 1):
            parent, place = copies[tuple(above[: length - 1])], tuple(above[:length])
            if place not in copies:
                copies[place] = parent._modules[place[-1]] = _shallow_copy(parent._modules[place[-1]])
        copies[tuple(above)]._modules[name] = module
    return copies[()]


def _what_is_read(embeddings: AdaptedEmbeddings, output: Mapping[str, Any]) -> Output:
    """Return the output without the hidden states that the embeddings do not read, which would take memory."""
    states, last = transformer.states_of(output)
    read = {index % len(states) for index in embeddings.layer_indexes}
    kept = tuple(states[index] if index in read else None for index in range(len(states)))
    return {"hidden_states": kept, "last_hidden_state": last}
