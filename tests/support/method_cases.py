"""Which method works on which kind of base, as parameters of tests, and embeddings with each of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from flair_peft import PeftTransformerDocumentEmbeddings
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, REFUSED_METHODS, Method, perturb_
from tests.support.predictions import TEXTS

KINDS = {"encoder": "bert", "decoder": "llama"}
ALL = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}

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


def make_embeddings(
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
