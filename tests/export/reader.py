"""Scores words with exported models, and needs torch, transformers and PEFT alone: neither Flair nor flair_peft.

Reads a list of requests as JSON from standard input, and prints the scores, with the version of transformers.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import peft
import torch
import transformers
from transformers import AutoConfig, AutoTokenizer


def read(folder: str, *, reads_words: bool, is_merged: bool) -> Any:
    """Return the model of a folder, as its card says that it is loaded."""
    task = "TokenClassification" if reads_words else "SequenceClassification"
    if is_merged:
        return getattr(transformers, f"AutoModelFor{task}").from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    names = ("id2label", "label2id", "problem_type", "pad_token_id", "return_dict", "is_encoder_decoder")
    settings = {name: getattr(config, name) for name in names}
    return getattr(peft, f"AutoPeftModelFor{task}").from_pretrained(folder, dtype="float32", **settings)


def scores(folder: str, words: list[list[str]], *, reads_words: bool, is_merged: bool) -> list[list[float]]:
    """Return the scores of the first subtokens of words, or of texts: (rows, labels)."""
    model = read(folder, reads_words=reads_words, is_merged=is_merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    encoding = tokenizer(words, is_split_into_words=True, padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**encoding).logits
    if not reads_words:
        return logits.tolist()
    found = []
    for row, text in enumerate(words):
        numbers = encoding.word_ids(row)
        found += [logits[row, numbers.index(number)].tolist() for number in range(len(text))]
    return found


if __name__ == "__main__":
    found = [scores(**request) for request in json.load(sys.stdin)]
    print(json.dumps({"transformers": transformers.__version__, "scores": found}))
