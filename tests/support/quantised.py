"""Models on bases that bitsandbytes quantises, with adapters of several methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from flair.data import Sentence
from flair.models import TextClassifier
from peft import IA3Config, LNTuningConfig, PeftConfig, PrefixTuningConfig, PromptTuningConfig
from transformers import BitsAndBytesConfig

from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.opinions import classifier

SETTINGS: dict[str, Callable[[], BitsAndBytesConfig]] = {
    "nf4": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    ),
    "nf4-double": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
    "fp4": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "int8": lambda: BitsAndBytesConfig(load_in_8bit=True),
}

METHODS: dict[str, Callable[[], PeftConfig]] = {
    "lora": lora,
    "lora-bias": lambda: lora(bias="all"),
    "dora": lambda: lora(use_dora=True),
    "trained-tokens": lambda: lora(trainable_token_indices={"word_embeddings": [5, 6]}),
    "ia3": lambda: IA3Config(target_modules=["query", "value", "output.dense"], feedforward_modules=["output.dense"]),
    "layer-norms": lambda: LNTuningConfig(target_modules=["LayerNorm"]),
    "prompt": lambda: PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
    "prefix": lambda: PrefixTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=3),
}


def quantised_classifier(base: str, settings: str, method: str = "lora", **options: Any) -> TextClassifier:
    model = classifier(
        base,
        peft_config=METHODS[method](),
        transformers_model_kwargs={"quantization_config": SETTINGS[settings]()},
        **{"dtype": "bfloat16", **options},
    )
    perturb_(model.embeddings.model, 0)
    return model


def vectors(model: TextClassifier) -> list[torch.Tensor]:
    found = []
    for text in ("Berlin is large", "a wonderful film , really a wonderful film", "bad"):
        sentence = Sentence(text)
        model.embeddings.embed(sentence)
        found.append(sentence.embedding.clone())
    return found
