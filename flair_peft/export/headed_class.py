"""The class of transformers around a transformer whose own layers compute what one linear layer does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import no_init_weights

from flair_peft.adapter import keys
from flair_peft.errors import AdapterConfigError, name_some
from flair_peft.export.linear_head import LinearHead
from flair_peft.foreign import source_classes
from flair_peft.primitives import building

_Rows = tuple[tuple[float, float], tuple[float, float]]
"""For two rows of each label: the factor of its score in the first layer, and in the second."""

# Two layers compute one if the second adds up what an activation leaves of multiples of each score z that the first
# gives: g(z) - g(-z) is z for ReLU, GELU and SiLU.
_HALVES: _Rows = ((1.0, 1.0), (-1.0, -1.0))
# The largest argument of tanh: its multiples below differ from z by half of the fourth power of that.
_SMALL = 2.0**-5


@dataclass(frozen=True)
class HeadedModel:
    """A model of transformers.

    Attributes:
        model: with the weights of the transformer, in evaluation mode.
        base_name: what it calls its transformer.
        modules: names of all modules that its class has.
        layers: name → its own linear layers, in the order in which they are applied; they are not filled yet.
    """

    model: PreTrainedModel
    base_name: str
    modules: frozenset[str]
    layers: dict[str, torch.nn.Linear]

    @property
    def saved(self) -> list[str]:
        """Names of the modules that hold the layers, as PEFT stores them in full."""
        pooler = f"{self.base_name}.pooler"
        return sorted({pooler if f"{name}.".startswith(f"{pooler}.") else name.split(".")[0] for name in self.layers})

    def cast_(self, dtype: torch.dtype) -> None:
        """Store the weights in another dtype; buffers, such as of rotations, keep theirs, as in loaded models."""
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)
        self.model.config.dtype = dtype


def task_of(head: LinearHead) -> str:
    """Return what PEFT calls the task of the class that the head belongs to."""
    return "TOKEN_CLS" if head.reads_words else "SEQ_CLS"


def build(head: LinearHead, transformer: PreTrainedModel, *, dtype: torch.dtype) -> HeadedModel:
    """Return a model of the class that may compute this head around the weights of a transformer.

    The transformer is copied; one that has adapters in it becomes part of the model.

    Raises:
        AdapterConfigError: transformers has no such class for this architecture, or it computes more.
    """
    cls = source_classes.source_class(transformer.config, {"task_type": task_of(head)})
    if cls is None:
        what = "words" if head.reads_words else "texts"
        raise _refused(type(transformer).__name__, f"transformers has no class for it that scores {what}")
    if more := source_classes.more_inputs(cls):
        raise _refused(cls.__name__, f"it {more}, and Flair's embeddings do not")
    with building.anew(), no_init_weights():
        model = cls._from_config(_config_of(head, transformer.config, dtype), dtype=dtype).eval()
    base_name = next((name for name, part in model.named_children() if type(part) is type(transformer)), None)
    if base_name is None:
        raise _refused(cls.__name__, f"it reads more than the {type(transformer).__name__} that Flair reads")
    modules = dict(model.named_modules())
    holders = {name.rpartition(".")[0] for name, _ in model.named_parameters() if _is_own(name, base_name, head)}
    own = [name for name in modules if name in holders and type(modules[name]) is torch.nn.Linear]
    if len(own) != len(holders) or len(own) not in ((1,) if head.reads_words else (1, 2)):
        raise _refused(cls.__name__, f"its head computes more than one linear layer does: {name_some(holders)}")
    _put_in_(model, base_name, transformer, own)
    layers = {name: model.get_submodule(name) for name in own}
    return HeadedModel(model, base_name, frozenset(modules), layers)


def _put_in_(model: PreTrainedModel, name: str, transformer: PreTrainedModel, own: Sequence[str]) -> None:
    """Give the model the weights of a transformer, in place; one with an adapter becomes part of it, and changes."""
    if any(map(keys.is_adapter_key, transformer.state_dict())):
        if any(f"{layer}.".startswith(f"{name}.pooler.") for layer in own):
            # Flair reads nothing of the pooler, whatever the adapter does to it.
            transformer.add_module("pooler", model.get_submodule(f"{name}.pooler"))
        model.add_module(name, transformer)
        return
    # What only the transformer has, such as a pooler, changes no score: these are compared.
    model.get_submodule(name).load_state_dict(transformer.state_dict(), strict=False)


def _is_own(name: str, base_name: str, head: LinearHead) -> bool:
    """Whether a tensor is of the class's own layers, or of the pooler that the transformer keeps for texts."""
    is_pooler = name.startswith(f"{base_name}.pooler.") and not head.reads_words
    return is_pooler or not name.startswith(f"{base_name}.")


def _refused(name: str, reason: str) -> AdapterConfigError:
    return AdapterConfigError(
        f"Cannot make a model of transformers around {name}: {reason}. What is written would predict something else. "
        "Use flair_peft.merge for a plain Flair model, or train on another base."
    )


def _config_of(head: LinearHead, config: PretrainedConfig, dtype: torch.dtype) -> PretrainedConfig:
    config = copy.deepcopy(config)
    config.dtype = dtype  # from which the classes of decoders make their transformer
    names = head.names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: names.index(name) for name in names}
    config.output_hidden_states, config.return_dict, config.torchscript = False, True, False
    if not head.reads_words:
        config.problem_type = head.problem
        if config.pad_token_id is None:
            config.pad_token_id = head.embeddings.tokenizer.pad_token_id
    return config


def fill_(headed: HeadedModel, head: LinearHead, is_right: Callable[[], bool]) -> bool:
    """Give the layers the weights that compute the head, in place; return whether that is right.

    Raises:
        AdapterConfigError: the layers cannot hold it.
    """
    kind, weights = type(headed.model).__name__, headed.model.get_input_embeddings().weight
    for layer in headed.layers.values():
        layer.to(device=weights.device, dtype=weights.dtype)
    first, *more = headed.layers.values()
    last = more[0] if more else first
    if last.bias is None and head.bias.any():
        raise _refused(
            kind,
            "its last layer has no bias, and this head has one (a TextClassifier takes one without: "
            "decoder=torch.nn.Linear(…, bias=False))",
        )
    if not more:
        _set_(first, head.weight, head.bias)
        if not head.reads_words and not is_right():
            # Decoders look for the token in front of the padding, of which some configs have another idea.
            headed.model.config.pad_token_id = head.embeddings.tokenizer.pad_token_id
        return is_right()
    if 2 * len(head.labels) > first.out_features:
        raise _refused(kind, f"its first layer has no room for {len(head.labels)} labels")
    lengths = list[float]()
    with first.register_forward_pre_hook(lambda _, given: lengths.append(float(given[0].float().norm(dim=-1).max()))):
        _fill_two_(first, last, head, _HALVES)
        if is_right():
            return True
    _fill_two_(first, last, head, _of_tanh(head, longest=max(lengths)))
    return is_right()


def _of_tanh(head: LinearHead, *, longest: float) -> _Rows:
    """Return multiples by which tanh gives scores back, for vectors not much longer than those that were seen.

    (8 tanh(εz) - tanh(2εz)) / 6ε is z up to a term in its fifth power.
    """
    largest = 2 * longest * float(head.weight.norm(dim=1).max())
    small = _SMALL * 2.0 ** -math.ceil(math.log2(max(largest, 1e-6)))
    return (small, 4 / (3 * small)), (2 * small, -1 / (6 * small))


def _fill_two_(first: torch.nn.Linear, last: torch.nn.Linear, head: LinearHead, rows: _Rows) -> None:
    (one, out_of_one), (two, out_of_two) = rows
    weight = head.weight.new_zeros(first.out_features, first.in_features)
    summed = head.weight.new_zeros(last.out_features, last.in_features)
    count = len(head.labels)
    weight[: 2 * count] = torch.cat([one * head.weight, two * head.weight])
    summed[:, : 2 * count] = torch.cat([out_of_one * torch.eye(count), out_of_two * torch.eye(count)], dim=1)
    _set_(first, weight, weight.new_zeros(first.out_features))
    _set_(last, summed, head.bias)


def _set_(layer: torch.nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)
        if layer.bias is not None:
            layer.bias.copy_(bias)
