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

from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.adapter import trainable
from flair_peft.adapter.config import encode_config
from flair_peft.errors import UnsupportedMethodError
from tests.support.method_cases import KINDS, cases, make_embeddings, one_kind_each
from tests.support.methods import METHODS, REFUSED_METHODS, Method, perturb_
from tests.support.predictions import TEXTS


def embed(embeddings: PeftTransformerDocumentEmbeddings) -> torch.Tensor:
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.eval()
    embeddings.embed(sentences)
    return torch.stack([sentence.get_embedding() for sentence in sentences]).detach()


def reload(embeddings: PeftTransformerDocumentEmbeddings, method: Method) -> PeftTransformerDocumentEmbeddings:
    with warnings.catch_warnings():
        if method.warns:
            warnings.filterwarnings("ignore", method.warns)
        warnings.filterwarnings("ignore", category=UserWarning, module="peft")
        return load_embeddings(embeddings.save_embeddings())


def check_trains_and_comes_back(method: Method, kind: str, base: Callable[[str], str], dtype: torch.dtype) -> None:
    embeddings = make_embeddings(method, kind, base, dtype)
    untouched = embed(embeddings)
    assert untouched.isfinite().all()

    embeddings.train()
    sentences = [Sentence(text) for text in TEXTS]
    embeddings.embed(sentences)
    output = torch.stack([sentence.get_embedding() for sentence in sentences])
    (output * torch.randn_like(output)).sum().backward()
    parameters = trainable.parameters(embeddings.model)
    without = {name for name, parameter in parameters.items() if parameter.grad is None}
    expected = re.compile(method.without_gradient or r"(?!)")
    assert parameters
    assert {name for name in without if not expected.search(name)} == set()
    torch.optim.SGD(parameters.values(), lr=1e-2).step()
    trained = embed(embeddings)
    assert not torch.equal(untouched, trained)

    again = reload(embeddings, method)
    assert torch.equal(trained, embed(again))
    assert trainable.parameters(again.model).keys() == parameters.keys()
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
