"""Every method of PEFT and every option of LoRA trains, comes back and can be copied, or is refused with a reason."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.embeddings.base import load_embeddings
from peft import PeftConfig, PeftType
from transformers import AutoTokenizer

from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.adapter.config import encode_config
from flair_peft.adapter.injection import trainable_parameters
from flair_peft.adapter.refusals import REFUSED_METHODS
from flair_peft.errors import UnsupportedMethodError
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, Method, perturb_

KINDS = {"encoder": "bert", "decoder": "llama"}
ALL = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}
TEXTS = ["Berlin is large .", "I love this wonderful movie , it is great !", "George Washington went to Washington ."]

# Inits that want data before the adapter is added, when Flair's embeddings have not been built yet.
NEEDS_DATA_FIRST = {name for name, method in ALL.items() if method.before is not None}

# Layers without a prefix are spelled out by this package, and biases that are not there need no training.
WORKS_HERE = {"layers_to_transform", "bias_all", "bias_lora_only"}


def cases(*, working: bool) -> list[Any]:
    found = []
    for name, method in ALL.items():
        for kind in KINDS:
            works = kind in method.works and name not in NEEDS_DATA_FIRST and name not in REFUSED_METHODS
            works = works or name in WORKS_HERE
            if works == working:
                found.append(pytest.param(method, kind, id=f"{name}-{kind}"))
    return found


def one_kind_each(*, options: bool = True) -> list[Any]:
    """Return every method on an encoder, or on a decoder if it works there only; the others are for the matrix.

    Args:
        options: whether every option of a method is among those that are not.
    """
    found = [(case.id.rpartition("-")[0], case) for case in cases(working=True)]
    first = dict(reversed(found))
    return [
        case
        if first[name] is case and (options or name in METHODS)
        else pytest.param(*case.values, id=case.id, marks=pytest.mark.matrix)
        for name, case in found
    ]


def embed(embeddings: PeftTransformerDocumentEmbeddings) -> torch.Tensor:
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.eval()
    embeddings.embed(sentences)
    return torch.stack([sentence.get_embedding() for sentence in sentences]).detach()


def make(
    method: Method, kind: str, base: Callable[[str], str], dtype: torch.dtype
) -> PeftTransformerDocumentEmbeddings:
    with warnings.catch_warnings():
        if method.warns:
            warnings.filterwarnings("ignore", method.warns)
        # PEFT's own words on layers of another shape than a method expects.
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        config = method.config(kind)
        tokenizer = AutoTokenizer.from_pretrained(base(KINDS[kind]))
        for setting in ("token_indices", "trainable_token_indices"):
            if getattr(config, setting, None):
                setattr(config, setting, tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"][1:4])
        embeddings = PeftTransformerDocumentEmbeddings(
            base(KINDS[kind]), peft_config=config, dtype=dtype, cls_pooling="mean"
        )
        if method.after is not None:
            method.after(embeddings.model)
    perturb_(embeddings.model, seed=3)
    return embeddings


def reload(embeddings: PeftTransformerDocumentEmbeddings, method: Method) -> PeftTransformerDocumentEmbeddings:
    with warnings.catch_warnings():
        if method.warns:
            warnings.filterwarnings("ignore", method.warns)
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        return load_embeddings(embeddings.save_embeddings())


def check_trains_and_comes_back(method: Method, kind: str, base: Callable[[str], str], dtype: torch.dtype) -> None:
    embeddings = make(method, kind, base, dtype)
    untouched = embed(embeddings)
    assert untouched.isfinite().all()

    embeddings.train()
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.embed(sentences)
    output = torch.stack([sentence.get_embedding() for sentence in sentences])
    (output * torch.randn_like(output)).sum().backward()
    parameters = trainable_parameters(embeddings.model)
    without = {name for name, parameter in parameters.items() if parameter.grad is None}
    expected = re.compile(method.without_gradient or r"(?!)")
    assert parameters
    assert {name for name in without if not expected.search(name)} == set()
    torch.optim.SGD(parameters.values(), lr=1e-2).step()
    trained = embed(embeddings)
    assert not torch.equal(untouched, trained)

    again = reload(embeddings, method)
    assert torch.equal(trained, embed(again))
    assert trainable_parameters(again.model).keys() == parameters.keys()
    assert torch.equal(trained, embed(copy.deepcopy(embeddings)))


@pytest.mark.parametrize(("method", "kind"), one_kind_each())
def test_method_in_fp32_trains_and_comes_back_bit_equal(method: Method, kind: str, base: Callable[[str], str]) -> None:
    """Every parameter of the adapter gets a gradient, a step changes vectors, and stored vectors come back."""
    check_trains_and_comes_back(method, kind, base, torch.float32)


@pytest.mark.matrix
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("method", "kind"), cases(working=True))
def test_method_in_half_precision_trains_and_comes_back_bit_equal(
    method: Method, kind: str, dtype: torch.dtype, base: Callable[[str], str]
) -> None:
    """The same on bf16 and fp16 bases."""
    check_trains_and_comes_back(method, kind, base, dtype)


@pytest.mark.parametrize(("method", "kind"), cases(working=False))
def test_method_that_cannot_work_is_refused_at_construction(
    method: Method, kind: str, base: Callable[[str], str]
) -> None:
    """The error names the method, the architecture and a reason."""
    if torch.cuda.is_available() and method.name == "loftq":
        pytest.skip("LoftQ's quantisation runs on a GPU")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = method.config(kind)
        with pytest.raises(UnsupportedMethodError) as caught:
            PeftTransformerDocumentEmbeddings(base(KINDS[kind]), peft_config=config)
    message = str(caught.value)
    assert {"encoder": "BertModel", "decoder": "LlamaModel"}[kind] in message
    assert config.peft_type.value in message
    assert "reason" in message


# What a config cannot do without, and sizes that fit the tiny models.
LEAST: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 2000},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {"block_size": 8},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 8},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3]},
    "VBLORA": {"num_vectors": 16, "vector_length": 8},
    "WAVEFT": {"n_frequency": 20},
    **{name: {"num_virtual_tokens": 3} for name in ("CARTRIDGE", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING")},
}


def least_configs() -> list[Any]:
    """Return each method with what PEFT would not fill in, with and without targets; most of them for the matrix."""
    found = []
    for name, method in METHODS.items():
        for kind in sorted(method.works if name not in REFUSED_METHODS else ()):
            config = method.config(kind)
            targets = getattr(config, "target_modules", None)
            both = [{"target_modules": list(targets)}, {}] if targets else [{}]
            for settings in both[:1] if (name, kind) == ("LN_TUNING", "encoder") else both:
                values = (type(config), {**LEAST.get(name, {}), **settings}, kind)
                marks = () if name in ("IA3", "OSF") else (pytest.mark.matrix,)
                found.append(pytest.param(*values, id=f"{name}-{kind}-{'named' if settings else 'all'}", marks=marks))
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("config_class", "settings", "kind"), least_configs())
def test_config_that_peft_fills_in_comes_back(
    config_class: type[PeftConfig], settings: dict[str, Any], kind: str, base: Callable[[str], str]
) -> None:
    """What injection adds to a config need not pass the constructor of its class, and is stored all the same."""
    embeddings = PeftTransformerDocumentEmbeddings(
        base(KINDS[kind]), peft_config=config_class(**settings), cls_pooling="mean"
    )
    perturb_(embeddings.model, seed=3)
    expected = embed(embeddings)
    for again in (
        load_embeddings(embeddings.save_embeddings()),
        copy.deepcopy(embeddings),
        pickle.loads(pickle.dumps(embeddings)),
    ):
        assert torch.equal(expected, embed(again))
        assert encode_config(again.adapter_config) == encode_config(embeddings.adapter_config)


def test_every_registered_method_is_tried() -> None:
    """A method that a new PEFT brings shows here until it is decided whether it works."""
    assert set(METHODS) == {peft_type.value for peft_type in PeftType}
    assert set(REFUSED_METHODS) <= set(METHODS)
