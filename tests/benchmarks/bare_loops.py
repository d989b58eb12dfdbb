"""Training on real text with transformers and PEFT alone, as their own examples do it: what Flair is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from transformers import AutoModel, AutoTokenizer

from tests.benchmarks.text_tasks import Tagged


class BareModel(torch.nn.Module):
    """An encoder with an adapter and one linear layer; batches are padded to their longest sentence.

    Attributes:
        pool: hidden states, shaped (batch, subtokens, hidden), and their encoding → the vectors that have labels.
    """

    def __init__(
        self,
        base: str,
        config: PeftConfig,
        *,
        labels: Sequence[str],
        pool: Callable[[torch.Tensor, Any], torch.Tensor],
    ) -> None:
        super().__init__()
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.encoder = get_peft_model(AutoModel.from_pretrained(base), config)
        self.head = torch.nn.Linear(self.encoder.config.hidden_size, len(labels))
        self.numbers = {label: number for number, label in enumerate(labels)}
        self.pool = pool

    def loss(self, batch: Sequence[Tagged]) -> torch.Tensor:
        """Return the sum of the losses of all labels."""
        device = self.head.weight.device
        words = [words for words, _ in batch]
        encoded = self.tokenizer(
            words, is_split_into_words=True, padding=True, truncation=True, return_tensors="pt"
        ).to(device)
        vectors = self.pool(self.encoder(**encoded).last_hidden_state, encoded)
        targets = torch.tensor([self.numbers[label] for _, labels in batch for label in labels], device=device)
        return torch.nn.functional.cross_entropy(self.head(vectors), targets, reduction="sum")


def step(model: BareModel, batch: Sequence[Tagged], optimizer: torch.optim.Optimizer) -> None:
    """Do one step of a training."""
    optimizer.zero_grad()
    model.loss(batch).backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 5.0)
    optimizer.step()


def mean(states: torch.Tensor, encoded: Any) -> torch.Tensor:
    """Return the mean of each sentence's subtokens, the special ones among them."""
    mask = encoded["attention_mask"].unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def first_subtokens(states: torch.Tensor, encoded: Any) -> torch.Tensor:
    """Return the first subtoken of each word, the words of all sentences one after another."""
    rows, columns = list[int](), list[int]()
    for row in range(len(states)):
        before = None
        for column, word in enumerate(encoded.word_ids(row)):
            if word is not None and word != before:
                rows.append(row)
                columns.append(column)
            before = word
    return states[rows, columns]


POOLS = {"SST-2": mean, "UD-EWT": first_subtokens}
