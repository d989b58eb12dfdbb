"""One load in a process of its own: how long until the first prediction, how much memory, and what it gives.

``python -m tests.benchmarks.loads WAY FOLDER`` prints JSON. What is imported is imported before the clock starts.
"""

from __future__ import annotations

import json
import logging
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import flair
import torch
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert_fast
import transformers.models.xlm_roberta.modeling_xlm_roberta
import transformers.models.xlm_roberta.tokenization_xlm_roberta_fast  # noqa: F401
from flair.data import Sentence
from flair.models import TextClassifier
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

import flair_peft
from tests.benchmarks.memory import peak, reset_peak

TEXT = "a bb ab ba the aaab , aba ?"
"""Words that the made vocabularies hold or spell."""


def load_with_peft(folder: Path) -> torch.Tensor:
    """Return the vector that PEFT and transformers alone give: the least that any load must do."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint" / "tokenizer")
    model = AutoModel.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / "checkpoint").eval()
    encoded = tokenizer(TEXT.split(), is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        return model(**encoded).last_hidden_state[0, 0]


def predict_with_peft(folder: Path) -> torch.Tensor:
    """Return the vector that PEFT and transformers alone give, after they have predicted a label with the same head."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoint" / "tokenizer")
    model = AutoModel.from_pretrained(folder / "base")
    model = PeftModel.from_pretrained(model, folder / "checkpoint").eval()
    tensors = load_file(folder / "checkpoint" / "head.safetensors")
    weight, bias = (tensors[f"state_dict/decoder.{name}"] for name in ("weight", "bias"))
    head = torch.nn.Linear(weight.shape[1], weight.shape[0])
    head.load_state_dict({"weight": weight, "bias": bias})
    encoded = tokenizer(TEXT.split(), is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        vector = model(**encoded).last_hidden_state[0, 0]
        head(vector).softmax(dim=-1).argmax()
    return vector


def load_directory(folder: Path) -> torch.Tensor:
    """Return the vector of a checkpoint directory, without its probe."""
    return predict(flair_peft.from_pretrained(folder / "checkpoint", verify=False))


def load_directory_and_prove(folder: Path) -> torch.Tensor:
    """Return the vector of a checkpoint directory whose load proves itself, as by default."""
    return predict(flair_peft.from_pretrained(folder / "checkpoint"))


def load_slim_file(folder: Path) -> torch.Tensor:
    """Return the vector of a slim ``.pt`` file, without its probe."""
    return predict(TextClassifier.load(folder / "slim.pt", verify=False))


def load_whole_file(folder: Path) -> torch.Tensor:
    """Return the vector of a self-contained ``.pt`` file, without its probe."""
    return predict(TextClassifier.load(folder / "whole.pt", verify=False))


def only_load_whole_file(folder: Path) -> torch.Tensor:
    """Load a self-contained ``.pt`` file and predict nothing."""
    TextClassifier.load(folder / "whole.pt", verify=False)
    return torch.zeros(0)


def read_whole_file(folder: Path) -> torch.Tensor:
    """Read a self-contained ``.pt`` file once."""
    (folder / "whole.pt").read_bytes()
    return torch.zeros(0)


def load_stock_file(folder: Path) -> torch.Tensor:
    """Return the vector of the same base in a file of stock Flair, without an adapter: the full-file way."""
    return predict(TextClassifier.load(folder / "stock.pt"))


def predict(model: TextClassifier) -> torch.Tensor:
    sentence = Sentence(TEXT.split(), use_tokenizer=False)
    model.predict(sentence, embedding_storage_mode="cpu")
    return sentence.get_embedding().float()


WAYS: dict[str, Callable[[Path], torch.Tensor]] = {
    function.__name__: function
    for function in (
        load_with_peft,
        predict_with_peft,
        load_directory,
        load_directory_and_prove,
        load_slim_file,
        load_whole_file,
        only_load_whole_file,
        read_whole_file,
        load_stock_file,
    )
}


def main(way: str, folder: Path) -> None:
    """Print seconds, bytes beyond those of the imports, and the vector."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    flair.device = torch.device("cpu")
    before = reset_peak()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
    start = time.perf_counter()
    vector = WAYS[way](folder)
    seconds = time.perf_counter() - start
    major = resource.getrusage(resource.RUSAGE_SELF).ru_majflt - faults
    print(json.dumps({"seconds": seconds, "bytes": peak() - before, "faults": major, "vector": vector.tolist()}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
