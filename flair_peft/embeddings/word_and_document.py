"""The embeddings with an adapter in Flair's two forms: for words, as taggers take them, and for sentences."""

from __future__ import annotations

from typing import Any

from flair.embeddings import TransformerDocumentEmbeddings, TransformerEmbeddings, TransformerWordEmbeddings
from flair.embeddings.base import register_embeddings

from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings
from flair_peft.errors import AdapterConfigError


@register_embeddings
class PeftTransformerWordEmbeddings(PeftTransformerEmbeddings, TransformerWordEmbeddings):
    """Word embeddings from a transformer with an adapter; see :class:`PeftTransformerEmbeddings`."""

    def __init__(
        self,
        model: str = "bert-base-uncased",
        is_document_embedding: bool = False,
        allow_long_sentences: bool = True,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it.

        Args:
            model: name or directory of the base model.
            is_document_embedding: embed sentences too.
            allow_long_sentences: split sentences beyond the model's length into overlapping windows.
            **kwargs: as for :class:`PeftTransformerEmbeddings`.
        """
        PeftTransformerEmbeddings.__init__(
            self,
            model=model,
            is_token_embedding=True,
            is_document_embedding=is_document_embedding,
            allow_long_sentences=allow_long_sentences,
            **kwargs,
        )


@register_embeddings
class PeftTransformerDocumentEmbeddings(PeftTransformerEmbeddings, TransformerDocumentEmbeddings):
    """Document embeddings from a transformer with an adapter; see :class:`PeftTransformerEmbeddings`."""

    def __init__(
        self,
        model: str = "bert-base-uncased",
        layers: str = "-1",
        layer_mean: bool = False,
        is_token_embedding: bool = False,
        **kwargs: Any,
    ) -> None:
        """Load a transformer and add an adapter to it.

        Args:
            model: name or directory of the base model.
            layers: hidden states to use.
            layer_mean: average the layers; otherwise concatenate them.
            is_token_embedding: embed words too.
            **kwargs: as for :class:`PeftTransformerEmbeddings`.
        """
        PeftTransformerEmbeddings.__init__(
            self,
            model=model,
            layers=layers,
            layer_mean=layer_mean,
            is_token_embedding=is_token_embedding,
            is_document_embedding=True,
            **kwargs,
        )


def counterpart(stock_class: type[TransformerEmbeddings]) -> type[PeftTransformerEmbeddings]:
    """Return the class with an adapter that stands for a stock class.

    Raises:
        AdapterConfigError: there is none.
    """
    pairs: list[tuple[type, type[PeftTransformerEmbeddings]]] = [
        (TransformerWordEmbeddings, PeftTransformerWordEmbeddings),
        (TransformerDocumentEmbeddings, PeftTransformerDocumentEmbeddings),
        (TransformerEmbeddings, PeftTransformerEmbeddings),
    ]
    for stock, ours in pairs:
        if issubclass(stock_class, stock):
            return ours
    raise AdapterConfigError(
        f"Cannot add an adapter to {stock_class.__name__}. Only Flair's transformer embeddings can carry one. Use "
        "TransformerWordEmbeddings, TransformerDocumentEmbeddings or TransformerEmbeddings."
    )
