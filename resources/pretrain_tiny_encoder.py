"""Train the tokenizer and the weights of ``resources/tiny-encoder`` from ``resources/corpora/pretraining.txt``.

    python resources/pretrain_tiny_encoder.py            # about a quarter of an hour on two CPU cores

The model is a BERT of under a million parameters with a masked-language-model head, so that tests, examples and
benchmarks have a pre-trained transformer without a network. The same seed gives the same weights on the same machine
with the same number of threads.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import BertConfig, BertForMaskedLM, BertTokenizerFast, get_cosine_schedule_with_warmup, set_seed

RESOURCES = Path(__file__).parent
MAX_LENGTH = 128
DROPOUT = 0.1
EMBEDDING_SCALE = 0.05
IGNORED = -100  # the label that torch's cross entropy leaves out

Batch = dict[str, torch.Tensor]


def train_tokenizer(corpus: Path, *, vocabulary_size: int) -> BertTokenizerFast:
    """A cased WordPiece tokenizer with BERT's special tokens."""
    tokenizer = BertWordPieceTokenizer(lowercase=False, strip_accents=False)
    tokenizer.train(str(corpus), vocab_size=vocabulary_size, min_frequency=2, limit_alphabet=200, show_progress=False)
    return BertTokenizerFast(
        tokenizer_object=tokenizer._tokenizer, do_lower_case=False, strip_accents=False, model_max_length=MAX_LENGTH
    )


def build_model(tokenizer: BertTokenizerFast) -> BertForMaskedLM:
    """A BERT with random weights and without dropout: so small a model has nothing to spare while it is pre-trained."""
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=MAX_LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    return BertForMaskedLM(config)


def place_by_company_(model: BertForMaskedLM, documents: list[list[int]]) -> None:
    """Start each token's embedding near those of the tokens that occur in the same documents.

    The embeddings become the leading singular vectors of the positive pointwise mutual information (Levy and Goldberg
    2014, "Neural Word Embedding as Implicit Matrix Factorization"). From random ones, so small a model on so little
    text takes many times longer to find which words are of one kind.
    """
    weight = model.get_input_embeddings().weight
    occurs = torch.zeros(len(documents), len(weight))
    for row, document in zip(occurs, documents, strict=True):
        row[document] = 1.0
    joint = occurs.T @ occurs / len(documents)
    alone = joint.diagonal().clamp_min(1 / len(documents))
    information = (joint / alone[:, None] / alone).clamp_min(1.0).log().fill_diagonal_(0.0)
    left, values, _ = torch.linalg.svd(information)
    vectors = (left * values.sqrt())[:, : weight.shape[1]]
    noise = torch.randn_like(weight) * model.config.initializer_range / 2
    with torch.no_grad():
        weight.copy_(vectors / vectors.std() * EMBEDDING_SCALE + noise)


def batches(documents: list[list[int]], *, size: int, tokenizer: BertTokenizerFast) -> Iterator[torch.Tensor]:
    """One epoch in random order, each batch (size, length) of documents of about one length."""
    by_length = sorted(documents, key=lambda document: (len(document), random.random()))
    chunks = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.shuffle(chunks)
    for chunk in chunks:
        rows = [torch.tensor(document) for document in chunk]
        yield pad_sequence(rows, batch_first=True, padding_value=tokenizer.pad_token_id)


def mask_tokens(input_ids: torch.Tensor, *, tokenizer: BertTokenizerFast, rate: float) -> Batch:
    """Hide tokens as BERT does: of those chosen, 80 % become [MASK], 10 % another token, 10 % stay.

    Args:
        input_ids: (batch, length); not changed.
        tokenizer: tells the special tokens, which are never chosen.
        rate: share of the other tokens that is chosen.

    Returns:
        The model's inputs; ``labels`` is ``IGNORED`` where there is nothing to predict.
    """
    is_special = torch.isin(input_ids, torch.tensor(tokenizer.all_special_ids))
    is_chosen = (torch.rand(input_ids.shape) < rate) & ~is_special
    dice = torch.rand(input_ids.shape)
    masked = input_ids.masked_fill(is_chosen & (dice < 0.8), tokenizer.mask_token_id)
    random_ids = torch.randint(len(tokenizer), input_ids.shape)
    masked = torch.where(is_chosen & (dice > 0.9), random_ids, masked)
    return {
        "input_ids": masked,
        "attention_mask": (input_ids != tokenizer.pad_token_id).long(),
        "labels": input_ids.masked_fill(~is_chosen, IGNORED),
    }


def masked_language_model_loss(model: BertForMaskedLM, batch: Batch) -> torch.Tensor:
    """Mean cross entropy; scores are computed for the hidden tokens only."""
    hidden = model.bert(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    is_hidden = batch["labels"] != IGNORED
    return torch.nn.functional.cross_entropy(model.cls(hidden[is_hidden]), batch["labels"][is_hidden])


def pretrain(
    model: BertForMaskedLM,
    documents: list[list[int]],
    *,
    tokenizer: BertTokenizerFast,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    mask_rate: float,
) -> None:
    """Train ``model`` in place."""
    steps = epochs * -(-len(documents) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=steps // 20, num_training_steps=steps)
    model.train()
    running = None
    with tqdm(total=steps, unit="step") as progress:
        for epoch in range(epochs):
            for input_ids in batches(documents, size=batch_size, tokenizer=tokenizer):
                loss = masked_language_model_loss(model, mask_tokens(input_ids, tokenizer=tokenizer, rate=mask_rate))
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
                progress.set_postfix(epoch=epoch + 1, loss=f"{running:.3f}", refresh=False)
                progress.update()


def save(model: BertForMaskedLM, tokenizer: BertTokenizerFast, folder: Path) -> None:
    """Write both so that ``AutoModel`` and ``AutoTokenizer`` find them, with BERT's usual dropout for fine-tuning."""
    model.config.hidden_dropout_prob = model.config.attention_probs_dropout_prob = DROPOUT
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Train the tiny encoder.", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--corpus", type=Path, default=RESOURCES / "corpora" / "pretraining.txt", help="one text a line"
    )
    parser.add_argument("--output", type=Path, default=RESOURCES / "tiny-encoder", help="folder to write to")
    parser.add_argument("--vocabulary-size", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--mask-rate", type=float, default=0.2, help="share of tokens to predict")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    set_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.corpus, vocabulary_size=arguments.vocabulary_size)
    lines = arguments.corpus.read_text(encoding="utf-8").splitlines()
    documents = tokenizer(lines, truncation=True)["input_ids"]
    model = build_model(tokenizer)
    place_by_company_(model, documents)
    pretrain(
        model,
        documents,
        tokenizer=tokenizer,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        mask_rate=arguments.mask_rate,
    )
    save(model, tokenizer, arguments.output)


if __name__ == "__main__":
    main()
