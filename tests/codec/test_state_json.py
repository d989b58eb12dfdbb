"""Flair constructor state ⇄ JSON + tensors: whatever Flair stores comes back the same, and nothing else is built."""

from __future__ import annotations

import copy
import enum
import json
import math
import random
import string
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import flair
import numpy as np
import pytest
import sentencepiece
import torch
from flair.data import Dictionary, Sentence
from flair.embeddings import (
    BytePairEmbeddings,
    CharacterEmbeddings,
    DocumentCNNEmbeddings,
    DocumentTFIDFEmbeddings,
    FlairEmbeddings,
    HashEmbeddings,
    OneHotEmbeddings,
    PooledFlairEmbeddings,
    StackedEmbeddings,
    TokenEmbeddings,
    WordEmbeddings,
)
from flair.embeddings.base import EMBEDDING_CLASSES, load_embeddings
from flair.models import LanguageModel, SequenceTagger, TextClassifier, TextPairRegressor
from flair.models.entity_linker_model import CandidateGenerator
from flair.models.prefixed_tagger import EntityTypeTaskPromptAugmentationStrategy
from flair.models.relation_classifier_model import (
    EntityMarker,
    EntityMarkerPunct,
    EntityMask,
    TypedEntityMarker,
    TypedEntityMarkerPunct,
    TypedEntityMask,
)
from flair.nn import DeepNCMDecoder, LabelVerbalizerDecoder, PrototypicalDecoder
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import nn
from torch.torch_version import TorchVersion

from flair_peft.codec import objects
from flair_peft.codec.state_json import KINDS, MAX_DEPTH, decode, encode, restore_state
from flair_peft.compat import FormatVersion
from flair_peft.errors import ModelFileError, UnsupportedStateError
from tests.support.configs import lora
from tests.support.round_trip import Factories, largest_difference
from tests.support.selection import ONE_OF_A_KIND, few
from tests.support.zoo import ZOO, pair_corpus, sentence_corpus

Base = Callable[[str], str]

CONFIG = lora(r=2, lora_alpha=3)


def round_trip(value: Any) -> Any:
    """Return what comes back from JSON text and a safetensors file, neither of which keeps anything but its format."""
    document, tensors = encode(value)
    text = json.dumps(document, allow_nan=False)
    contiguous = {name: _dense(tensor) for name, tensor in tensors.items()}
    return restore_state(text, load_safetensors(save_safetensors(contiguous)) if contiguous else {})


def is_same(first: Any, second: Any) -> bool:
    """Whether two values are of the same type and equal in every part and bit, in the same order."""
    if type(first) is not type(second):
        # The one liberty: dictionaries of tensors are plain ones.
        return _is_tensors(first) and _is_tensors(second) and is_same(dict(first), dict(second))
    if isinstance(first, nn.Module):
        return _is_same_module(first, second)
    if isinstance(first, float):
        return struct.pack("d", first) == struct.pack("d", second)
    if isinstance(first, torch.Tensor):
        return _is_same_tensor(first, second)
    if isinstance(first, (np.ndarray, np.generic)):
        return (first.dtype, first.shape, first.tobytes()) == (second.dtype, second.shape, second.tobytes())
    if isinstance(first, BytesIO):
        return (first.getvalue(), first.tell()) == (second.getvalue(), second.tell())
    if isinstance(first, Mapping):
        return _is_same_mapping(first, second)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(is_same, first, second))
    if isinstance(first, Sentence):
        return [t.to_dict() for t in first] == [t.to_dict() for t in second]
    if type(first).__module__.startswith("flair."):
        return is_same(_attributes(first), _attributes(second))
    return bool(first == second)


def _is_tensors(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(type(item) is torch.Tensor for item in value.values())


def _is_same_tensor(first: torch.Tensor, second: torch.Tensor) -> bool:
    same_form = (first.dtype, first.shape) == (second.dtype, second.shape)
    bits = [_dense(tensor).view(-1).view(torch.uint8) for tensor in (first, second)]
    return same_form and first.requires_grad == second.requires_grad and torch.equal(*bits)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _is_same_mapping(first: Mapping[Any, Any], second: Mapping[Any, Any]) -> bool:
    if getattr(first, "default_factory", None) is not getattr(second, "default_factory", None):
        return False
    if _is_tensors(first):
        return first.keys() == second.keys() and all(is_same(first[key], second[key]) for key in first)
    return is_same(list(first), list(second)) and is_same(list(first.values()), list(second.values()))


def _attributes(value: Any) -> dict[str, Any]:
    return {name: item for name, item in vars(value).items() if name != "item2idx_not_encoded"}


_INSIDE_MODULES = frozenset(vars(nn.Module()))


def _is_same_module(first: nn.Module, second: nn.Module) -> bool:
    """Whether two modules differ in nothing but the values of what a state dict holds."""
    if isinstance(first, flair.embeddings.Embeddings):
        return _settings(first) == _settings(second) and first.training == second.training
    own = [{k: v for k, v in vars(module).items() if k not in _INSIDE_MODULES} for module in (first, second)]
    own[0], own[1] = ({k: own[i][k] for k in sorted(own[i])} for i in (0, 1))
    forms = [
        [(name, p.shape, p.dtype, p.requires_grad, p.device) for name, p in module.named_parameters(recurse=False)]
        for module in (first, second)
    ]
    children = [dict(module._modules) for module in (first, second)]
    return first.training == second.training and forms[0] == forms[1] and is_same(*own) and is_same(*children)


def _settings(embeddings: Any) -> dict[str, Any]:
    # A zip of the tokenizer's files holds the time at which it was made.
    return {name: value for name, value in embeddings.to_params().items() if name != "tokenizer_data"}


def factories(base: Base, **options: Any) -> Factories:
    return Factories(base("bert"), CONFIG, **options)


@pytest.mark.parametrize("entry_name", few(ZOO, ONE_OF_A_KIND))
def test_codec_state_of_every_model_class_comes_back_and_predicts_the_same(entry_name: str, base: Base) -> None:
    """What Flair stores of each of its models is the same in every bit after it, and so are the predictions."""
    entry, made = ZOO[entry_name], factories(base)
    model, corpus = entry.build(made.words, made.documents), entry.corpus()
    expected = entry.predict(model, corpus)
    state = model._get_state_dict()

    decoded = round_trip(state)

    assert is_same(state, decoded)
    loaded = type(model)._init_model_with_state_dict(decoded)
    assert largest_difference(expected, entry.predict(loaded, corpus)) == 0.0


def test_codec_model_card_of_a_trained_model_comes_back(base: Base, tmp_path: Path) -> None:
    """What Flair's trainer notes about the training is stored too, torch's version as plain text."""
    entry, made = ZOO["text-classifier"], factories(base)
    model = entry.build(made.words, made.documents)
    entry.train(model, entry.corpus(), tmp_path)
    card = model.model_card
    assert type(card["pytorch_version"]) is TorchVersion

    decoded = round_trip({"model_card": card})["model_card"]

    assert is_same({**card, "pytorch_version": str.__str__(card["pytorch_version"])}, decoded)


def test_codec_state_of_an_optimiser_continues_its_steps() -> None:
    """The next step of AdamW from a decoded state is the step of the original, bit for bit."""

    def step(optimiser: torch.optim.Optimizer, weight: nn.Parameter) -> None:
        weight.grad = torch.ones_like(weight) * 0.3
        optimiser.step()

    weights = [nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2)]
    first, second = (torch.optim.AdamW([weight], lr=0.1) for weight in weights)
    step(first, weights[0])
    weights[1].data.copy_(weights[0].data)
    state = first.state_dict()

    decoded = round_trip(state)
    assert is_same(state, decoded)
    second.load_state_dict(decoded)

    step(first, weights[0])
    step(second, weights[1])
    assert torch.equal(weights[0], weights[1])


NAN_WITH_OTHERS = [math.nan, math.inf, -math.inf, -0.0, 0.0, 5e-324, 0.1]

VALUES: dict[str, Any] = {
    "none": None,
    "flags": [True, False],
    "numbers": [0, -1, 2**63, -(10**30), 1, True],
    "floats": NAN_WITH_OTHERS,
    "text": ["", "ü \u2028 \x00 \U0001f600", "\ud800", "$type"],
    "bytes": [b"", b"\x00\xff", b"same", b"same"],
    "stream": [BytesIO(b"abc"), BytesIO()],
    "tuple": ((), (1, (2, [3]))),
    "set": {("PER", "LOC"), ("LOC", "PER")},
    "frozenset": {frozenset({1, 2}), frozenset()},
    "dict": {"a": {}, "": {"b/c": 1, ".": 2}},
    "dict with dollars": {"$type": "tuple", "items": [1]},
    "dict with any keys": {1: "a", None: "b", (1, "x"): "c", b"k": "d", 1.5: {"z": 1}, frozenset({1}): 2},
    "ordered dict": OrderedDict([("b", 1), ("a", 2)]),
    "empty ordered dict": OrderedDict(),
    "default dict": [defaultdict(list, {"a": [1]}), defaultdict(None, {1: 2})],
    "counter": Counter("abca"),
    "tensor": torch.arange(6).reshape(2, 3),
    "scalar tensor": torch.tensor(1.5),
    "empty tensors": [torch.empty(0), torch.empty(3, 0, 2, dtype=torch.int64)],
    "tensors": {"weight": torch.eye(2), "a/b": torch.tensor(True), "$": torch.ones(1)},
    "ordered tensors": OrderedDict(b=torch.ones(1), a=torch.zeros(1)),
    "mixed tensors": {"weight": torch.eye(2), "name": "x", "": torch.ones(1), "value": torch.ones(2)},
    "tensors with odd names": {"ü": torch.ones(1), "\ud800": torch.zeros(1)},
    "nested tensors": {"a": {"b": torch.ones(1)}, "a/b": torch.zeros(1), "a.b": [torch.ones(2)]},
    "equal tensors": [torch.ones(2), torch.ones(2)],
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "expanded": torch.ones(1).expand(4),
    "conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(),
    "negative": torch.tensor([1 + 2j]).conj().imag,
    "parameter": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)],
    "dtype": [torch.float32, torch.bfloat16, torch.complex64, torch.int8],
    "device": [torch.device("cpu"), torch.device("cuda", 1), torch.device("meta")],
    "size": torch.Size([1, 2]),
    "array": [np.arange(4, dtype=np.int16).reshape(2, 2), np.array(2.5), np.empty((0, 2)), np.eye(2, dtype=complex)],
    "numpy scalars": [np.float64(0.1), np.float32(0.1), np.int64(3), np.bool_(True), np.uint8(7)],
    "path": Path("a/../b"),
    "format version": FormatVersion(1),
    "big endian": np.arange(3, dtype="<i4"),
}


@pytest.mark.parametrize("name", VALUES)
def test_codec_value_comes_back_the_same(name: str) -> None:
    """Every plain type that a state can hold survives JSON and safetensors: type, order, bits."""
    assert is_same(VALUES[name], round_trip(VALUES[name]))
    assert is_same({"a": [VALUES[name]]}, round_trip({"a": [VALUES[name]]}))


@pytest.mark.parametrize(
    "dtype",
    [
        *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32),
        *(torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128),
        *(torch.float8_e4m3fn, torch.float8_e5m2),
    ],
)
def test_codec_tensor_of_every_dtype_comes_back_the_same(dtype: torch.dtype) -> None:
    """No dtype that models have is converted on the way, alone or among others."""
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    assert is_same([tensor, {"a": tensor}], round_trip([tensor, {"a": tensor}]))


@pytest.mark.parametrize(
    ("value", "plain"), [(np.str_("a"), "a"), (np.bytes_(b"a"), b"a"), (TorchVersion("2.1"), "2.1")]
)
def test_codec_string_by_another_name_becomes_plain(value: Any, plain: Any) -> None:
    """Strings of numpy and torch, which equal plain ones, come back as these."""
    assert value == plain
    assert is_same(plain, round_trip(value))


def test_codec_big_endian_array_comes_back_with_the_same_numbers() -> None:
    """Numbers survive where torch has no such order of bytes."""
    assert round_trip(np.arange(3, dtype=">i4")).tolist() == [0, 1, 2]


def test_codec_state_dict_takes_one_line_of_json() -> None:
    """The names of a state dict stand in the file of tensors only, under a prefix that says where they belong."""
    state = {"state_dict": OrderedDict((f"layer.{index}.weight", torch.ones(1)) for index in range(300))}
    document, tensors = encode(state)
    assert document == {"state_dict": {"$type": "tensors", "prefix": "state_dict/", "count": 300}}
    assert list(tensors) == [f"state_dict/layer.{index}.weight" for index in range(300)]
    assert next(iter(encode(state, where="first")[1])) == "first/state_dict/layer.0.weight"


def test_codec_encode_leaves_its_argument_alone_and_shares_the_memory_of_tensors() -> None:
    """Encoding copies no weights, changes no container, keeps no graph and draws no random numbers."""
    weight = nn.Linear(2, 2).weight * 2
    state = {"decoder": nn.Sequential(nn.Linear(2, 3)), "state_dict": {"weight": weight}, "data": BytesIO(b"x")}
    before, generator = list(state.items()), torch.get_rng_state()

    _, tensors = encode(state)

    assert [(name, id(value)) for name, value in before] == [(name, id(value)) for name, value in state.items()]
    assert tensors["state_dict/weight"].data_ptr() == weight.data_ptr()
    assert weight.requires_grad
    assert not tensors["state_dict/weight"].requires_grad
    assert torch.equal(generator, torch.get_rng_state())


def test_codec_decode_shares_nothing_with_the_document_and_draws_no_random_numbers() -> None:
    """The document stays as it was, whatever is done to what came out of it."""
    document, tensors = encode({"a": [1, {"b": [2]}], "map": CandidateGenerator({"x": ["y"]}), "head": nn.Linear(2, 2)})
    before, generator = copy.deepcopy(document), torch.get_rng_state()
    # The weights of the layer are in no state dict here: there must be a tensor to make room for them.
    value = decode(
        {"state": document, "room": {"$type": "tensor", "tensor": "t", "is_complex": False}},
        {**tensors, "t": torch.ones(9)},
    )
    value["state"]["a"][1]["b"].append(3)
    value["state"]["map"].mention_to_candidates_map["x"].append("z")
    assert document == before
    assert torch.equal(generator, torch.get_rng_state())


def test_codec_equal_bytes_are_stored_once_and_tensors_are_not_merged() -> None:
    """A tokenizer that two tasks share takes the room of one."""
    data = b"zip" * 100
    _, tensors = encode({"a": BytesIO(data), "b": data, "c": torch.ones(2), "d": torch.ones(2)})
    assert set(tensors) == {"a", "c", "d"}
    many = [{"$type": "bytes", "tensor": "b"}] * 3
    assert len({id(value) for value in decode(many, {"b": torch.zeros(9, dtype=torch.uint8)})}) == 1


def test_codec_set_is_written_in_the_same_order_whatever_its_own() -> None:
    """Equal models give equal files, although Python orders a set of strings differently in each process."""
    first, second = encode({"b", "a", "c"}), encode({"c", "b", "a"})
    assert first == second == ({"$type": "set", "items": ["a", "b", "c"]}, {})


def words(*items: str, add_unk: bool = False) -> Dictionary:
    dictionary = Dictionary(add_unk=add_unk)
    for item in items:
        dictionary.add_item(item)
    return dictionary


def _span_dictionary() -> Dictionary:
    dictionary = words("O", "B-PER", "ü", add_unk=True)
    dictionary.span_labels = dictionary.multi_label = True
    dictionary.get_idx_for_items(["O"])
    return dictionary


def _shrunk_dictionary() -> Dictionary:
    dictionary = words("a", "b", "c")
    dictionary.remove_item("b")
    return dictionary


def _odd_dictionary() -> Dictionary:
    dictionary = words()
    dictionary.idx2item, dictionary.item2idx = [b"\xff\x00", b"$"], {b"\xff\x00": 0, b"$": 1}
    return dictionary


def _reworded_strategy() -> EntityTypeTaskPromptAugmentationStrategy:
    strategy = EntityTypeTaskPromptAugmentationStrategy(["persons", "cities"])
    strategy.task_prompt = ["Find", "persons", ":"]
    return strategy


OBJECTS: dict[str, Callable[[], Any]] = {
    "dictionary": lambda: words("a", "b"),
    "dictionary empty": words,
    "dictionary of spans": _span_dictionary,
    "dictionary after removal": _shrunk_dictionary,
    "dictionary of other bytes": _odd_dictionary,
    "task prompt": lambda: EntityTypeTaskPromptAugmentationStrategy(["persons"]),
    "task prompt reworded": _reworded_strategy,
    "candidates": lambda: CandidateGenerator({"New York!": ["NYC", "NY"], "new york": ["NY"], "$": []}),
    "candidates exact": lambda: CandidateGenerator({"A.": ["a"]}, backoff=False),
    **{
        f"{cls.__name__} {special}": lambda cls=cls, special=special: cls(add_special_tokens=special)
        for cls in (
            *(EntityMask, TypedEntityMask, EntityMarker, TypedEntityMarker, EntityMarkerPunct),
            TypedEntityMarkerPunct,
        )
        for special in (False, True)
    },
}


@pytest.mark.parametrize("name", OBJECTS)
def test_codec_object_of_flair_comes_back_the_same(name: str) -> None:
    """Flair's own objects keep every attribute, but for caches."""
    value = OBJECTS[name]()
    assert is_same(value, round_trip(value))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 3),
    "linear without bias": lambda: nn.Linear(4, 3, bias=False),
    "linear bf16": lambda: nn.Linear(4, 3, dtype=torch.bfloat16),
    "linear frozen": lambda: nn.Linear(4, 3).requires_grad_(False),
    "layer norm": lambda: nn.LayerNorm(4, eps=1e-3),
    "layer norm without bias": lambda: nn.LayerNorm((4,), bias=False),
    "layer norm without weights": lambda: nn.LayerNorm(4, elementwise_affine=False),
    "identity": nn.Identity,
    "activations": lambda: nn.Sequential(
        nn.ReLU(), nn.GELU(approximate="tanh"), nn.Tanh(), nn.Sigmoid(), nn.SiLU(), nn.LeakyReLU(0.3), nn.Dropout(0.25)
    ),
    "named layers": lambda: nn.Sequential(OrderedDict(first=nn.Linear(4, 8), act=nn.ReLU(), last=nn.Linear(8, 2))),
    "nested": lambda: nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Sequential()), nn.Dropout(0.1).eval()),
    "same activation twice": lambda: nn.Sequential(nn.Linear(4, 4), act := nn.ReLU(), nn.Linear(4, 4), act),
    "prototypes": lambda: PrototypicalDecoder(3, 4),
    "prototypes mapped": lambda: PrototypicalDecoder(
        3,
        4,
        prototype_size=2,
        distance_function="Cosine",
        use_radius=True,
        min_radius=1,
        unlabeled_distance=0.5,
        unlabeled_idx=1,
        learning_mode="learn_only_prototypes",
        normal_distributed_initial_prototypes=True,
    ),
    "prototypes hyperbolic": lambda: PrototypicalDecoder(3, 4, distance_function="hyperbolic"),
    "prototypes logit cosine": lambda: PrototypicalDecoder(3, 4, distance_function="logit_cosine"),
    "prototypes dot product": lambda: PrototypicalDecoder(3, 4, distance_function="dot_product").double(),
    "means": lambda: DeepNCMDecoder(words("a", "b"), 4),
    "means encoded": lambda: DeepNCMDecoder(
        words("a", "b"), 4, encoding_dim=3, alpha=0.5, mean_update_method="decay", multi_label=True
    ),
    "means without encoder": lambda: DeepNCMDecoder(words("a", "b"), 4, use_encoder=False),
}


@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("name", MODULES)
def test_codec_module_computes_the_same_once_its_weights_are_loaded(name: str, is_training: bool) -> None:
    """Settings come from the codec, weights from the state dict; forward, gradients and modes are the original's."""
    original = MODULES[name]()
    original = original.train() if is_training else original
    state = {"decoder": original, "state_dict": original.state_dict()}

    decoded = round_trip(state)
    rebuilt = decoded["decoder"]
    assert is_same(original, rebuilt)
    rebuilt.load_state_dict(decoded["state_dict"])

    inputs = torch.randn(5, 4).to(next((p.dtype for p in original.parameters()), torch.float32))
    results = []
    for module in (original, rebuilt):
        torch.manual_seed(7)
        outputs = module(inputs)
        if outputs.requires_grad:
            outputs.float().sum().backward()
        results.append([outputs, *(p.grad for p in module.parameters() if p.grad is not None)])
    assert is_same(*[[tensor.detach() for tensor in result] for result in results])


@pytest.mark.parametrize("name", MODULES)
def test_codec_module_is_known_to_need_as_much_memory_as_it_does(name: str) -> None:
    """What bounds the memory that a file can ask for is exact, so that no true file is refused."""
    for module in MODULES[name]().modules():
        kind = next((kind for kind in KINDS if kind.cls is type(module)), None)
        if kind is not None:
            own = sum(parameter.numel() for _, parameter in objects.own_parameters(kind, module))
            assert kind.size(kind.read(module)) == own


def test_codec_embedding_layer_keeps_its_settings() -> None:
    """An embedding layer, which takes indices, comes back with its padding and norms."""
    original = nn.Embedding(7, 3, padding_idx=2, max_norm=1.5, norm_type=1.0, scale_grad_by_freq=True)
    rebuilt = round_trip([original, original.state_dict()])[0]
    assert is_same(original, rebuilt)
    assert rebuilt.padding_idx == 2


def test_codec_module_list_keeps_its_layers() -> None:
    """A list of layers, which cannot be called, comes back as one."""
    original = nn.ModuleList([nn.Linear(2, 3), nn.Tanh()])
    assert is_same(original, round_trip([original, original.state_dict()])[0])


def test_codec_class_means_keep_what_they_have_summed_up() -> None:
    """An update of prototypes that is due, which no state dict holds, gives the prototypes of the original."""
    original = DeepNCMDecoder(words("a", "b"), 4, encoding_dim=3)
    original(torch.randn(3, 4), torch.tensor([0, 1, 0]))
    original.prototype_updates = original.prototype_updates.detach()

    rebuilt, weights = round_trip([original, original.state_dict()])
    rebuilt.load_state_dict(weights)
    for decoder in (original, rebuilt):
        decoder.update_prototypes()

    assert torch.equal(original.class_prototypes, rebuilt.class_prototypes)
    assert torch.equal(original.class_counts, rebuilt.class_counts)


@pytest.mark.parametrize(
    "entry_name", ["text-classifier-deep-ncm", "text-classifier-prototypes", "text-pair-regressor"]
)
def test_codec_decoder_of_a_model_trains_on_as_the_original(entry_name: str, base: Base, tmp_path: Path) -> None:
    """The loss of a model that was decoded has the gradient of the original's, for every weight."""
    entry, made = ZOO[entry_name], factories(base)
    model = entry.build(made.words, made.documents)
    loaded = type(model)._init_model_with_state_dict(round_trip(model._get_state_dict()))

    gradients = []
    for candidate in (model, loaded):
        candidate.train()
        torch.manual_seed(3)
        points = list(entry.corpus().train)
        candidate.forward_loss(points)[0].backward()
        gradients.append({name: p.grad for name, p in candidate.named_parameters() if p.grad is not None})

    assert gradients[0]
    assert is_same(*gradients)


@pytest.mark.parametrize("label", ["B-PER", "new  york", "can't stop"])
def test_codec_label_verbalizer_reads_the_same_words(label: str, base: Base) -> None:
    """Labels in words come back token by token, and so does the class of what embeds them."""
    dictionary = words("O", label)
    dictionary.span_labels = True
    original = LabelVerbalizerDecoder(factories(base).documents(), dictionary)

    rebuilt, weights = round_trip([original, original.state_dict()])
    rebuilt.load_state_dict(weights)

    assert is_same(original, rebuilt)
    inputs = torch.randn(2, 32)
    assert torch.equal(original.eval()(inputs), rebuilt.eval()(inputs))


def _custom_model(base: Base, decoder: nn.Module) -> TextClassifier:
    labels = sentence_corpus().make_label_dictionary("sentiment", add_unk=False)
    return TextClassifier(factories(base).documents(), "sentiment", label_dictionary=labels, decoder=decoder)


def test_codec_classifier_with_layers_of_the_user_predicts_the_same(base: Base) -> None:
    """A decoder of several layers is a part of the model like any other."""
    entry = ZOO["text-classifier"]
    model = _custom_model(base, nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 3)))
    loaded = TextClassifier._init_model_with_state_dict(round_trip(model._get_state_dict()))
    corpus = entry.corpus()
    assert entry.predict(model, corpus) == entry.predict(loaded, corpus)


def _character_model() -> LanguageModel:
    return LanguageModel(words(*string.printable, add_unk=True), True, hidden_size=8, nlayers=1, embedding_size=4)


def _byte_pairs() -> BytePairEmbeddings:
    model = BytesIO()
    text = iter(["George Washington went to Washington .", "Angela Merkel lives in Berlin , Germany ."])
    sentencepiece.SentencePieceTrainer.Train(
        sentence_iterator=text, model_writer=model, vocab_size=40, minloglevel=2, hard_vocab_limit=False
    )
    return BytePairEmbeddings.from_params({"name": "pairs", "dim": 6, "spm_model_binary": model.getvalue()})


OTHER_EMBEDDINGS: dict[str, Callable[[], TokenEmbeddings]] = {
    "words": lambda: WordEmbeddings(
        None, vocab={"$": 0, "Berlin": 1, "<unk>": 2}, embedding_length=5, name="glove", fine_tune=True, stable=True
    ),
    "characters": lambda: CharacterEmbeddings(words(*string.printable), char_embedding_dim=3, hidden_size_char=4),
    "flair": lambda: FlairEmbeddings(_character_model(), name="news"),
    "one hot": lambda: OneHotEmbeddings(words("Berlin", "Apple", add_unk=True), embedding_length=4),
    "hash": lambda: HashEmbeddings(num_embeddings=11, embedding_length=4),
    "byte pairs": _byte_pairs,
}


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", OTHER_EMBEDDINGS)
def test_codec_embeddings_stacked_beside_ours_come_back(name: str, base: Base) -> None:
    """Whatever Flair can stack beside the transformer is stored with it, and the tags are the same."""
    entry = ZOO["sequence-tagger"]
    stack = StackedEmbeddings([factories(base).words(), OTHER_EMBEDDINGS[name]()])
    labels = sentence_corpus().make_label_dictionary("ner", add_unk=False)
    model = SequenceTagger(stack, labels, "ner", use_rnn=False, use_crf=False, reproject_embeddings=False)
    state = model._get_state_dict()

    decoded = round_trip(state)

    assert is_same(state, decoded)
    loaded = SequenceTagger._init_model_with_state_dict(decoded)
    corpus = entry.corpus()
    assert largest_difference(entry.predict(model, corpus), entry.predict(loaded, corpus)) == 0.0


def test_codec_embeddings_with_a_memory_come_back() -> None:
    """Pooled embeddings come back as Flair stores them, without what they remember of the words that they have seen."""
    embeddings = PooledFlairEmbeddings(FlairEmbeddings(_character_model(), name="news"), pooling="max")
    params = embeddings.save_embeddings(use_state_dict=True)
    assert is_same(params, round_trip(params))


def test_codec_document_embeddings_of_words_come_back(base: Base) -> None:
    """Tuples within the settings of document embeddings stay tuples."""
    embeddings = DocumentCNNEmbeddings([factories(base).words()], kernels=((4, 2), (4, 3)))
    params = embeddings.save_embeddings(use_state_dict=True)
    assert is_same(params, round_trip(params))
    assert load_embeddings(round_trip(params)).embedding_length == embeddings.embedding_length


class Subclass:
    """Classes of a user's own, made of those that files can hold."""

    class Labels(Dictionary):
        pass

    class Layer(nn.Linear):
        pass

    class Prototypes(PrototypicalDecoder):
        pass

    class Marker(EntityMarker):
        pass

    class Number(int):
        pass

    class Map(dict):
        pass

    class Colour(enum.Enum):
        RED = "red"

    class Level(str, enum.Enum):
        HIGH = "high"

    class Weight(torch.Tensor):
        pass


def _holds_itself() -> list[Any]:
    value: list[Any] = []
    value.append({"a": (value,)})
    return value


def _cyclic_module() -> nn.Module:
    outer = nn.Sequential(nn.Sequential())
    outer[0].add_module("again", outer)
    return outer


def _layer_with_hook() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.register_forward_hook(lambda module, inputs, output: output * 2)
    return layer


def _layer_with_attribute() -> nn.Module:
    layer = nn.Linear(2, 2)
    layer.forward = lambda inputs: inputs
    return layer


def _tied_layers() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, second)


def _own_distance() -> nn.Module:
    decoder = PrototypicalDecoder(2, 2)
    decoder.distance = nn.PairwiseDistance()
    return decoder


def _marker_with_tokens() -> EntityMarker:
    marker = EntityMarker()
    marker.special_tokens = {"[X]"}
    return marker


def _text_dictionary() -> Dictionary:
    dictionary = words("a")
    dictionary.idx2item = ["a"]
    return dictionary


REFUSED: dict[str, Callable[[], Any]] = {
    "function": lambda: print,
    "class": lambda: Dictionary,
    "module of python": lambda: json,
    "object": object,
    "complex number": lambda: 1j,
    "huge number": lambda: 10**5000,
    "generator": lambda: (i for i in ()),
    "own labels": lambda: Subclass.Labels(),
    "own layer": lambda: Subclass.Layer(2, 2),
    "own prototypes": lambda: Subclass.Prototypes(2, 2),
    "own marker": Subclass.Marker,
    "own number": lambda: Subclass.Number(1),
    "own map": Subclass.Map,
    "own tensor": lambda: torch.ones(2).as_subclass(Subclass.Weight),
    "enum": lambda: Subclass.Colour.RED,
    "text enum": lambda: Subclass.Level.HIGH,
    "pure path": lambda: PurePosixPath("a"),
    "recurrent decoder": lambda: nn.LSTM(2, 2),
    "layer with hook": _layer_with_hook,
    "layer with attribute": _layer_with_attribute,
    "layer with weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)),
    "layer with spectral norm": lambda: nn.utils.spectral_norm(nn.Linear(2, 2)),
    "tied layers": _tied_layers,
    "other distance": _own_distance,
    "marker with attribute": _marker_with_tokens,
    "dictionary of text": _text_dictionary,
    "own factory": lambda: defaultdict(lambda: 1),
    "sparse tensor": lambda: torch.eye(2).to_sparse(),
    "quantised tensor": lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
    "meta tensor": lambda: torch.empty(2, device="meta"),
    "array of objects": lambda: np.array([object()]),
    "array of text": lambda: np.array(["a"]),
    "date": lambda: np.datetime64("2020-01-01"),
    "itself": _holds_itself,
    "module in itself": _cyclic_module,
    "pickle of gensim": lambda: {"__cls__": "FastTextEmbeddings", "fasttext_binary": b""},
    "script": lambda: {"__cls__": "TransformerJitWordEmbeddings", "jit_model": b""},
    "trusted code": lambda: {"__cls__": "TransformerEmbeddings", "trust_remote_code": True},
}


@pytest.mark.parametrize("place", ["decoder", "state_dict"])
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor", "ignore:.*spectral_norm")
def test_codec_object_that_json_cannot_hold_is_refused_by_its_place(name: str, place: str) -> None:
    """The error names where the object stands, what it is, why it cannot be stored, and what to do."""
    state = {"a": 1, place: {"b": [REFUSED[name](), torch.ones(1)]}}
    with pytest.raises(UnsupportedStateError, match=rf"'model\.{place}\.b\.0.* Files hold .*\. (Replace|Use) "):
        encode(state, where="model")


def test_codec_tfidf_embeddings_are_refused() -> None:
    """A vectoriser of scikit-learn is code and arrays, and no file takes it."""
    pytest.importorskip("sklearn")
    params = DocumentTFIDFEmbeddings([Sentence("a car"), Sentence("a fox")]).to_params()
    with pytest.raises(UnsupportedStateError, match="'vectorizer': it is a sklearn"):
        encode(params)


def test_codec_encode_refuses_a_value_that_decode_could_not_read() -> None:
    """The deepest value that is stored can be read; one level more is refused when it is stored."""

    def nest(levels: int, wrap: Callable[[Any], Any]) -> Any:
        value: Any = "end"
        for _ in range(levels):
            value = wrap(value)
        return value

    for wrap in (lambda value: [value], lambda value: (value,), lambda value: {1: value}):
        deepest = nest(MAX_DEPTH, wrap)
        assert repr(round_trip(deepest)) == repr(deepest)
        with pytest.raises(UnsupportedStateError, match="levels"):
            encode(nest(MAX_DEPTH + 2, wrap))
        with pytest.raises(UnsupportedStateError, match="levels"):
            encode(nest(50_000, wrap))


LINEAR = {"$type": "linear", "in_features": 2, "out_features": 2, "bias": True, "training": [], "frozen": []}
FLOAT32 = {"$type": "dtype", "value": "float32"}
EMBEDDINGS = {"__cls__": "HashEmbeddings", "num_embeddings": 3, "embedding_length": 2, "hash_method": "md5"}
VERBALIZER = {"$type": "label_verbalizer", "embeds_in_training": False, "labels": [], "training": [], "frozen": []}
MEANS = {
    **{"$type": "class_means", "use_encoder": True, "alpha": 0.5, "mean_update_method": "online", "multi_label": False},
    **{"dtype": FLOAT32, "pending": [], "training": [], "frozen": []},
    "label_dictionary": encode(words("a", "b"))[0],
}
PROTOTYPES = {
    **{"$type": "prototypes", "min_radius": 0, "unlabeled_distance": None, "unlabeled_idx": None},
    **{"learning_mode": "joint", "distance_function": "euclidean", "use_radius": False},
    **{"dtype": FLOAT32, "training": [], "frozen": []},
}
HUGE = 10**12

HOSTILE: dict[str, Any] = {
    "unknown type": {"$type": "os.system", "value": "ls"},
    "type of another type": {"$type": ["tuple"], "items": []},
    "type none": {"$type": None},
    "missing field": {"$type": "tuple"},
    "extra field": {"$type": "tuple", "items": [], "more": 1},
    "field that is no name": {"$type": "tuple", 1: 2},
    "key with dollar": {"$other": 1},
    "items of another type": {"$type": "tuple", "items": "ab"},
    "item twice": {"$type": "set", "items": [1, 1]},
    "item that cannot be hashed": {"$type": "set", "items": [[]]},
    "pair of three": {"$type": "dict", "items": [[1, 2, 3]]},
    "pair of text": {"$type": "dict", "items": ["ab", 1]},
    "pair of text alone": {"$type": "dict", "items": ["ab"]},
    "key twice": {"$type": "dict", "items": [[1, 2], [1, 3]]},
    "key that cannot be hashed": {"$type": "dict", "items": [[[], 1]]},
    "factory": {"$type": "default_dict", "factory": "eval", "items": []},
    "float": {"$type": "float", "value": "1e5"},
    "infinite number": math.inf,
    "not a number": math.nan,
    "tuple in the document": (1, 2),
    "set in the document": {1},
    "object in the document": object(),
    "missing tensor": {"$type": "tensor", "tensor": "absent", "is_complex": False},
    "tensor of no name": {"$type": "tensor", "tensor": ["t"], "is_complex": False},
    "tensor twice": [{"$type": "tensor", "tensor": "t", "is_complex": False}] * 2,
    "bytes and tensor": [{"$type": "bytes", "tensor": "b"}, {"$type": "tensor", "tensor": "b", "is_complex": False}],
    "bytes of floats": {"$type": "bytes", "tensor": "t"},
    "complex of odd parts": {"$type": "tensor", "tensor": "b", "is_complex": True},
    "parameter of whole numbers": {"$type": "parameter", "tensor": "b", "is_complex": False, "requires_grad": True},
    "no such prefix": {"$type": "tensors", "prefix": "absent/", "count": 0},
    "prefix of another type": {"$type": "tensors", "prefix": 1, "count": 1},
    "prefix without end": {"$type": "tensors", "prefix": "t", "count": 1},
    "fewer tensors": {"$type": "tensors", "prefix": "group/", "count": 3},
    "stream before its start": {"$type": "bytes_io", "tensor": "b", "position": -1},
    "stream of text": {"$type": "bytes_io", "tensor": "b", "position": "x"},
    "dtype": {"$type": "dtype", "value": "nn"},
    "dtype of numbers": {"$type": "dtype", "value": 1},
    "device": {"$type": "device", "value": "moon"},
    "size": {"$type": "size", "items": ["a"]},
    "version": {"$type": "format_version", "value": "1"},
    "path": {"$type": "path", "value": 1},
    "nested too deep": json.loads("[" * 400 + "]" * 400),
    "dictionary of numbers": {**encode(words())[0], "items": [1]},
    "dictionary of floats": {**encode(words())[0], "indices": {"a": 1.5}},
    "strategy of text": {"$type": "entity_mask", "add_special_tokens": "yes"},
    "linear without dtype": LINEAR,
    "linear of whole numbers": {**LINEAR, "dtype": {"$type": "dtype", "value": "int64"}},
    "linear of text": {**LINEAR, "dtype": FLOAT32, "in_features": "2"},
    "linear below zero": {**LINEAR, "dtype": FLOAT32, "in_features": -2},
    "linear too large": {**LINEAR, "dtype": FLOAT32, "in_features": HUGE},
    "linear too many": [{**LINEAR, "dtype": FLOAT32, "in_features": 20}] * 50,
    "linear of unknown mode": {**LINEAR, "dtype": FLOAT32, "training": True},
    "dropout": {"$type": "dropout", "p": 2.0, "inplace": False, "training": [], "frozen": []},
    "gelu": {"$type": "gelu", "approximate": ["tanh"], "training": [], "frozen": []},
    "layers with a dot": {
        **{"$type": "sequential", "training": [], "frozen": []},
        "modules": {"a.b": {"$type": "tanh", "training": [], "frozen": []}},
    },
    "layers that are none": {"$type": "sequential", "modules": {"a": 1}, "training": [], "frozen": []},
    "list of none": {"$type": "module_list", "modules": [None], "training": [], "frozen": []},
    "prototypes too large": {**PROTOTYPES, "num_prototypes": HUGE, "prototype_size": 2, "embeddings_size": 2},
    "prototypes too wide": {**PROTOTYPES, "num_prototypes": 1, "prototype_size": 1, "embeddings_size": HUGE},
    "prototypes of no distance": {
        **PROTOTYPES,
        **{"num_prototypes": 1, "prototype_size": 2, "embeddings_size": 2, "distance_function": "x"},
    },
    "prototypes of half a label": {
        **PROTOTYPES,
        **{"num_prototypes": 1, "prototype_size": 2, "embeddings_size": 2, "unlabeled_idx": 0},
    },
    "means too large": {**MEANS, "embeddings_size": HUGE, "encoding_dim": 2},
    "means encoded too large": {**MEANS, "embeddings_size": 2, "encoding_dim": HUGE},
    "means of no label": {**MEANS, "embeddings_size": 2, "encoding_dim": 2, "label_dictionary": {}},
    "embeddings unknown": {**VERBALIZER, "label_embedding": {"__cls__": "os.system"}},
    "embeddings without class": {**VERBALIZER, "label_embedding": {}},
    "embeddings of other settings": {**VERBALIZER, "label_embedding": {"__cls__": "HashEmbeddings", "odd": 1}},
    "embeddings that unpickle": {"__cls__": "FastTextEmbeddings", "fasttext_binary": ""},
    "embeddings that unpickle in disguise": {
        **{"$type": "ordered_dict"},
        "items": [["__cls__", "FastTextEmbeddings"], ["fasttext_binary", ""]],
    },
    "embeddings that are a script": {"__cls__": "TransformerJitEmbeddings", "jit_model": ""},
    "embeddings of code from the hub": {
        **{"__cls__": "TransformerWordEmbeddings"},
        "transformers_model_kwargs": {"$type": "counter", "items": [["trust_remote_code", True]]},
    },
}


def hostile_tensors() -> dict[str, torch.Tensor]:
    return {
        "t": torch.ones(9),
        "b": torch.zeros(3, dtype=torch.uint8),
        "group/a": torch.ones(1),
        "group/b": torch.ones(1),
    }


USED = [
    {"$type": "tensor", "tensor": "t", "is_complex": False},
    {"$type": "bytes", "tensor": "b"},
    {"$type": "tensors", "prefix": "group/", "count": 2},
]


def test_codec_decode_reads_what_hostile_documents_are_made_from() -> None:
    """The parts of which the hostile documents consist are right before they are made wrong."""
    layer = {**LINEAR, "dtype": FLOAT32}
    sizes = {"num_prototypes": 2, "prototype_size": 2, "embeddings_size": 2}
    means = {**MEANS, "embeddings_size": 2, "encoding_dim": 1}
    verbalizer = {**VERBALIZER, "label_embedding": EMBEDDINGS}
    value = decode([*USED, layer, {**PROTOTYPES, **sizes}, means, verbalizer], hostile_tensors())
    assert [type(item).__name__ for item in value[3:]] == [
        *("Linear", "PrototypicalDecoder", "DeepNCMDecoder", "LabelVerbalizerDecoder")
    ]


@pytest.mark.parametrize("name", HOSTILE)
def test_codec_damaged_document_is_refused_as_a_file_error(name: str) -> None:
    """Whatever a document asks for, the answer is an error of the package, at once, and nothing is called."""
    with pytest.raises(ModelFileError):
        decode({"a": [HOSTILE[name]], "used": USED}, hostile_tensors())


@pytest.mark.parametrize(
    "tensors",
    [
        None,
        [],
        {"t": [1.0]},
        {1: torch.ones(1)},
        {},
        {"t": torch.ones(1), "left": torch.ones(1)},
        {"t": torch.ones(1).expand(HUGE)},
        {"t": torch.eye(2).to_sparse()},
    ],
    ids=["none", "list", "numbers", "number as name", "missing", "left over", "unfolding", "sparse"],
)
def test_codec_tensors_that_do_not_fit_are_refused(tensors: Any) -> None:
    """Every tensor is used, none is missing, and none is larger than the memory that it came with."""
    with pytest.raises(ModelFileError):
        decode({"$type": "tensor", "tensor": "t", "is_complex": False}, tensors)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1,]", "nul", "NaN", "[-Infinity]", '{"a": 1, "a": 2}', '{"a": {"b": 1, "b": 1}}', "1 2"),
        *("1" * 5000, "[" * 100_000, '{"a":' * 100_000, "1e999", '"\\ud8"', None, 5, b"\xff\xfe\x00"),
    ],
)
def test_codec_text_that_is_no_json_is_refused(text: Any) -> None:
    """Truncated text, keys that stand twice and what only Python takes for JSON are errors of the package."""
    with pytest.raises(ModelFileError):
        restore_state(text, {})


def everything() -> dict[str, Any]:
    """Return a state of all types that are cheap to build."""
    modules = [make() for name, make in MODULES.items()]
    weights = {str(index): module.state_dict() for index, module in enumerate(modules)}
    return {
        **VALUES,
        "objects": [make() for make in OBJECTS.values()],
        "modules": modules,
        "weights": weights,
        "embeddings": EMBEDDINGS,
    }


JUNK = [None, True, -1, 0, 3, HUGE, 2**70, 0.5, "", "a", "nan", "float16", "$type", [], [1], {}, {"$type": "tuple"}]


def _parts(document: Any) -> list[tuple[Any, Any]]:
    """Return every container of a document with each of its keys."""
    found: list[tuple[Any, Any]] = []
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        found += [(document, key), *_parts(document[key])]
    return found


def _mutate_(document: Any, tensors: dict[str, torch.Tensor], dice: random.Random) -> None:
    parts = _parts(document)
    container, key = dice.choice(parts)
    other, other_key = dice.choice(parts)
    action = dice.randrange(6)
    if action == 0:
        container[key] = dice.choice(JUNK)
    elif action == 1:
        container[key] = copy.deepcopy(other[other_key])
    elif action == 2:
        del container[key]
    elif action == 3 and isinstance(container, dict):
        container[dice.choice(["$type", "items", "value", "a"])] = container.pop(key)
    elif action == 4:
        tensors.pop(dice.choice(list(tensors)))
    else:
        name = dice.choice(list(tensors))
        tensors[name] = dice.choice([torch.ones(2), torch.zeros(0, dtype=torch.uint8), torch.tensor(1 + 2j)])


@pytest.mark.parametrize("seed", range(10))
def test_codec_document_with_random_damage_is_refused_or_read_as_a_value(seed: int) -> None:
    """A damaged document raises the one error, or is another document that comes back from another round."""
    dice, refused = random.Random(seed), 0
    whole, stored = encode(everything())
    for _ in range(40):
        document, tensors = copy.deepcopy(whole), dict(stored)
        for _ in range(dice.randrange(1, 3)):
            _mutate_(document, tensors, dice)
        try:
            value = decode(document, tensors)
        except ModelFileError:
            refused += 1
            continue
        assert is_same(value, decode(*encode(value)))
    assert refused > 5


@pytest.mark.parametrize("seed", range(3))
def test_codec_text_with_flipped_characters_is_refused_or_read_as_a_value(seed: int) -> None:
    """The same holds of damage to the text itself."""
    dice = random.Random(seed)
    document, tensors = encode(everything())
    whole = json.dumps(document)
    for _ in range(60):
        position = dice.randrange(len(whole))
        text = whole[:position] + dice.choice('{}[]",:0a-\\$') + whole[position + dice.randrange(3) :]
        try:
            value = restore_state(text, dict(tensors))
        except ModelFileError:
            continue
        assert is_same(value, decode(*encode(value)))


class Stored:
    """A state that pickles as a call of ``restore_state`` with text and tensors."""

    def __init__(self, state: Any) -> None:
        document, self.tensors = encode(state)
        self.text = json.dumps(document)

    def __reduce__(self) -> tuple[Any, ...]:
        return restore_state, (self.text, self.tensors)


def test_codec_file_of_torch_needs_one_allowed_name(base: Base, tmp_path: Path) -> None:
    """``torch.load`` without pickle reads the state of a model once ``restore_state`` is allowed, and not before."""
    made = factories(base, dtype="bfloat16")
    model = ZOO["text-classifier-deep-ncm"].build(made.words, made.documents)
    state = model._get_state_dict()
    torch.save(Stored(state), tmp_path / "model.pt", pickle_protocol=2)

    with pytest.raises(Exception, match=r"flair_peft\.codec\.restore_state"):
        torch.load(tmp_path / "model.pt", weights_only=True)
    with torch.serialization.safe_globals([restore_state]):
        loaded = torch.load(tmp_path / "model.pt", weights_only=True)

    assert is_same(state, loaded)
    assert list(state["state_dict"]) == list(loaded["state_dict"])


def test_codec_kinds_are_told_apart_by_name_and_class() -> None:
    """No two kinds of objects share a name or a class, and none is an embeddings class, which Flair itself looks up."""
    names, classes = ([getattr(kind, part) for kind in KINDS] for part in ("name", "cls"))
    assert len(set(names)) == len(names)
    assert len(set(classes)) == len(classes)
    assert not set(classes) & set(EMBEDDING_CLASSES.values())


def test_codec_regressor_of_pairs_with_layers_of_the_user_predicts_the_same(base: Base) -> None:
    """The decoder that this model always stores can be several layers."""
    entry = ZOO["text-pair-regressor"]
    decoder = nn.Sequential(nn.Linear(32, 4), nn.Tanh(), nn.Linear(4, 1))
    model = TextPairRegressor(factories(base).documents(), "similarity", decoder=decoder)
    loaded = TextPairRegressor._init_model_with_state_dict(round_trip(model._get_state_dict()))
    assert entry.predict(model, pair_corpus()) == entry.predict(loaded, pair_corpus())
