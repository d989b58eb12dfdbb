"""Adapters as other libraries write them: trained on the classes of transformers, stored by PEFT."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, get_peft_model
from transformers import AutoTokenizer, PreTrainedModel

from tests.support import tiny
from tests.support.methods import perturb_

TEXT = "Berlin and Paris are large cities"

# Name → class of transformers and task of PEFT.
SOURCES: dict[str, tuple[str, str | None]] = {
    "causal-lm": ("AutoModelForCausalLM", "CAUSAL_LM"),
    "masked-lm": ("AutoModelForMaskedLM", None),
    "sequence": ("AutoModelForSequenceClassification", "SEQ_CLS"),
    "tokens": ("AutoModelForTokenClassification", "TOKEN_CLS"),
    "questions": ("AutoModelForQuestionAnswering", "QUESTION_ANS"),
    "choice": ("AutoModelForMultipleChoice", None),
    "seq2seq": ("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM"),
    "pretraining": ("AutoModelForPreTraining", None),
    "bare": ("AutoModel", "FEATURE_EXTRACTION"),
    "sentence-transformers": ("AutoModel", None),
}

ARCHITECTURES = (
    *("bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "xlnet", "modernbert"),
    *("gpt2", "llama", "qwen2", "mistral", "gemma", "t5"),
)


@dataclass(frozen=True)
class Source:
    """A model that an adapter was trained on, alive, and the directory that PEFT stored the adapter in.

    Attributes:
        model: with the adapter in its layers.
        folder: of the adapter.
        input_ids: of ``TEXT``, (1, subtokens).
        hidden_states: of all layers, with the adapter; of the encoder where there is a decoder, too.
        without: the same without the adapter.
    """

    model: PreTrainedModel
    folder: Path
    input_ids: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...]
    without: tuple[torch.Tensor, ...]


def offered() -> Iterator[tuple[str, str]]:
    """Yield each pair of architecture and source for which transformers has a class."""
    for architecture in ARCHITECTURES:
        config = type(tiny._MODELS[architecture](10)[0])
        for source, (auto, _) in SOURCES.items():
            if config in getattr(transformers, auto)._model_mapping:
                yield architecture, source


def write_base(kind: str, folder: Path, bert: str, **options: Any) -> str:
    """Write a small random model of a class that ``tiny`` does without, beside the tokenizer of its BERT."""
    tokenizer = AutoTokenizer.from_pretrained(bert)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    places = {"vocab_size": len(tokenizer), "max_position_embeddings": tiny.MAX_LENGTH + 2, "pad_token_id": 0}
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**sizes, **places, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def train(base: str, folder: Path, source: str, config: PeftConfig, **kwargs: Any) -> Source:
    """Return the source class with an adapter, which is stored in the folder."""
    auto, task = SOURCES[source]
    torch.manual_seed(1)
    model = getattr(transformers, auto).from_pretrained(base, **kwargs).eval()
    input_ids = AutoTokenizer.from_pretrained(base)(TEXT, return_tensors="pt")["input_ids"]
    without = hidden_states(model, input_ids)
    config.task_type = task
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what PEFT finds remarkable
        if source == "sentence-transformers":
            # Its models pass add_adapter and save_pretrained on to the transformer that they hold.
            model.add_adapter(config)
            perturb_(model, 3, scale=0.2)
            model.save_pretrained(folder)
            around: Any = model
        else:
            around = get_peft_model(model, config).eval()
            perturb_(around, 3, scale=0.2)
            around.save_pretrained(folder)
    around.eval()
    run = around if config.is_prompt_learning else model
    return Source(model, folder, input_ids, hidden_states(run, input_ids), without)


def hidden_states(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the hidden states of all layers, each (1, rows, hidden)."""
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__
    inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if name.endswith("ForMultipleChoice"):
        inputs = {key: value[None] for key, value in inputs.items()}
    if name in ("T5Model", "T5ForConditionalGeneration"):
        inputs["decoder_input_ids"] = input_ids
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    states = output.get("hidden_states")
    return tuple(output["encoder_hidden_states"] if states is None else states)


def largest_difference(before: tuple[torch.Tensor, ...], after: tuple[torch.Tensor, ...]) -> float:
    """Return the largest difference of the last rows, as many as ``after`` has: virtual tokens come first."""
    pairs = zip(before, after, strict=True)
    return max(float((theirs[:, -ours.shape[1] :].float() - ours.float()).abs().max()) for theirs, ours in pairs)
