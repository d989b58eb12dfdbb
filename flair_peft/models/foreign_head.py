"""The head of a classifier of transformers → the starting weights of a Flair model's head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from flair.embeddings import StackedEmbeddings
from flair.models import SequenceTagger, TextClassifier, TokenClassifier
from flair.nn import Model

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings
from flair_peft.errors import HeadMismatchError, name_some
from flair_peft.foreign.transfer_plan import ForeignHead

log = logging.getLogger("flair_peft")

# What transformers applies a head to → Flair models whose head is applied to the same.
_READERS = {"tokens": (SequenceTagger, TokenClassifier), "last token": (TextClassifier,)}


def take_over_head(model: Model, *, labels: Sequence[str] | None = None) -> list[str]:
    """Let the head of a Flair model start from the one that was trained together with its adapter, in place.

    Labels are matched by name. Heads of one linear layer on the same vectors can be taken over: those of token
    classification, for a ``SequenceTagger`` without RNN, CRF and reprojection or a ``TokenClassifier``; and those of
    sequence classification with decoders such as GPT-2 or Llama, which read the last token, for a ``TextClassifier``
    (``cls_pooling="cls"`` reads the same token). Where the labels match, logits are those of the source model. The
    model predicts without dropout afterwards, as a loaded one does; Flair's new models are in training mode.

    Args:
        model: whose embeddings come from ``from_adapter``; its dictionary names the labels.
        labels: of the rows of the foreign head, in order; None for those that the adapter's files name.

    Returns:
        The labels of the model that the foreign head does not have. They keep their random start.

    Raises:
        HeadMismatchError: there is no such head, or it computes something that this model's head does not.
    """
    embeddings = _embeddings_of(model)
    head = embeddings.foreign_head
    assert head is not None
    weight, bias = _linear_of(head)
    own = _own_linear(model)
    _check_reading(model, embeddings, head)
    names = _check_labels(labels or head.labels, len(weight))
    if weight.shape[1] != own.in_features:
        raise _refused(model, f"it reads vectors of length {weight.shape[1]}, and this one {own.in_features}")
    if own.bias is None and bool(bias.any()):
        raise _refused(model, "it adds a bias, and the head of this one has none")
    items = model.label_dictionary.get_items()
    rows = {items.index(name): row for row, name in enumerate(names) if name in items}
    if not rows:
        raise _refused(model, f"it knows the labels {name_some(names)}, and this one {name_some(items)}")
    with torch.no_grad():
        for mine, theirs in rows.items():
            own.weight[mine] = weight[theirs].to(own.weight)
            if own.bias is not None:
                own.bias[mine] = bias[theirs].to(own.bias)
    model.eval()  # Flair does so in its load and its trainer, never in predict
    lacking, unused = [name for name in items if name not in names], [name for name in names if name not in items]
    if lacking or unused:
        log.warning(
            "The head starts from that of '%s' for %s of %s labels. Labels that keep a random start: %s. Rows of the "
            "other head that were not used: %s.",
            embeddings.name,
            len(rows),
            len(items),
            name_some(lacking) or "none",
            name_some(unused) or "none",
        )
    return lacking


def _embeddings_of(model: Model) -> PeftTransformerEmbeddings:
    found = adapted_embeddings(model)
    with_head = [embeddings for embeddings in found if embeddings.foreign_head is not None]
    if len(with_head) != 1:
        raise _refused(model, f"{len(with_head)} of its {len(found)} transformer embeddings have a head from elsewhere")
    return with_head[0]


def _linear_of(head: ForeignHead) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weight, (labels, length), and the bias, (labels,), of a head; transformers leaves out some biases."""
    if head.reads is None:
        raise HeadMismatchError(
            f"Cannot take over the head of {head.source_class or 'an unknown class'}: {name_some(head.tensors)}. It is "
            "not one linear layer on a hidden state: a pooled vector or layers in between come first, a decoder "
            "follows, or the adapter's config does not tell the class. Train the head anew on these embeddings."
        )
    # With bias="all", PEFT stores the bias that the trained copy of the head stands for, too.
    used = {name: tensor for name, tensor in head.tensors.items() if ".original_module." not in name}
    parts = {name.rpartition(".")[2]: tensor for name, tensor in used.items()}
    owners = {name.rpartition(".")[0] for name in used}
    weight = parts.get("weight")
    if len(owners) != 1 or weight is None or weight.dim() != 2 or not set(parts) <= {"weight", "bias"}:
        raise HeadMismatchError(
            f"Cannot take over the head of {head.source_class}: {name_some(head.tensors)}. Its file does not hold one "
            "whole linear layer: the layer itself was not saved, only what an adapter adds to it, or there are "
            "several. Save it with modules_to_save, or train the head anew on these embeddings."
        )
    bias = parts.get("bias")
    return weight, torch.zeros(len(weight), dtype=weight.dtype) if bias is None else bias


def _own_linear(model: Model) -> torch.nn.Linear:
    """Return the one linear layer that is the model's head."""
    if isinstance(model, SequenceTagger):
        between = [name for name in ("use_crf", "use_rnn", "reproject_embeddings") if getattr(model, name)]
        if between:
            raise _refused(model, f"that is one linear layer on the embeddings, and this one has {name_some(between)}")
        return model.linear
    decoder = getattr(model, "decoder", None)
    if not isinstance(model, TextClassifier | TokenClassifier) or type(decoder) is not torch.nn.Linear:
        raise _refused(model, "its head is not one linear layer that Flair made")
    return decoder


def _check_reading(model: Model, embeddings: PeftTransformerEmbeddings, head: ForeignHead) -> None:
    assert head.reads is not None
    parts = getattr(model.embeddings, "embeddings", None) if isinstance(model.embeddings, StackedEmbeddings) else None
    (*others, reader) = parts or [model.embeddings]
    if others or reader is not embeddings:
        between = type(model.embeddings).__name__
        raise _refused(model, f"it reads the vectors of the transformer, and this one what {between} makes of them")
    if not isinstance(model, _READERS[head.reads]):
        wanted = " or ".join(reader.__name__ for reader in _READERS[head.reads])
        raise _refused(model, f"{head.source_class} reads {head.reads}, as a {wanted} does")
    if len(embeddings.layer_indexes) != 1 or not embeddings.reads_last_layer:
        raise _refused(model, "it reads the last layer; make the embeddings with layers='-1'")
    if not embeddings.after_final_norm and embeddings.stops_before_final_norm():
        raise _refused(model, "it reads what comes after a final norm; make the embeddings with after_final_norm=True")
    pooling = head.subtoken_pooling
    if head.reads == "tokens" and pooling not in (None, embeddings.subtoken_pooling):
        raise _refused(model, f"it was one of Flair with subtoken_pooling='{pooling}'; make the embeddings with that")
    if head.reads == "last token" and (embeddings.cls_pooling != "cls" or embeddings.initial_cls_token):
        raise _refused(model, "it reads the last token; make the embeddings with cls_pooling='cls'")


def _check_labels(labels: Sequence[str] | None, rows: int) -> Sequence[str]:
    if labels is None:
        raise HeadMismatchError(
            f"Cannot tell the labels of the {rows} rows of the head: PEFT does not store them, and no config.json with "
            "them lies beside the adapter. A wrong order would swap labels silently. Pass labels=[…] in the order of "
            "the rows."
        )
    if len(labels) != rows or len(set(labels)) != rows:
        raise HeadMismatchError(
            f"Cannot give {len(set(labels))} different labels to {rows} rows: {name_some(labels)}. Each row of the "
            "head scores one label. Pass labels=[…] in the order of the rows."
        )
    return labels


def _refused(model: Any, reason: str) -> HeadMismatchError:
    return HeadMismatchError(
        f"Cannot start the head of this {type(model).__name__} from another one: {reason}. Both must compute the same "
        "from the same vectors. Train the head anew, or change the Flair model accordingly."
    )
