"""Tokens added to a transformer that has an adapter already, such as the markers of Flair's ``RelationClassifier``."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper

from flair_peft.base import added_rows
from flair_peft.errors import AdapterConfigError


def override_(model: torch.nn.Module) -> None:
    """Let the ``resize_token_embeddings`` of a transformer with an adapter, in place, add rows that differ."""
    if isinstance(model, PeftModel):
        model.resize_token_embeddings = _Resize(model)


class _Resize:
    """``resize_token_embeddings`` of one PEFT model.

    transformers draws new rows that are one and the same but for a thousandth, for a training to part them. An adapter
    leaves them as they are: the head and the tail of a relation would have one marker.
    """

    def __init__(self, model: PeftModel) -> None:
        self._model = model

    def __call__(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, **_: Any) -> Any:
        """Return the input embeddings; where they have fewer rows than that, new ones stand behind their own.

        Where they have more, they keep them: rows that pad a vocabulary are the base's, and no file has to hold them.

        Raises:
            AdapterConfigError: what the adapter trains has the size of the vocabulary, or the matrix is offloaded.
        """
        base = self._model.get_base_model()
        module: Any = base.get_input_embeddings()
        own, multiple = len(module.weight), pad_to_multiple_of or 1
        rows = -(-(own if new_num_tokens is None else new_num_tokens) // multiple) * multiple
        if rows <= own:
            return module
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise AdapterConfigError(
                f"Cannot add {rows - own} tokens to '{base.name_or_path}': its adapter trains the input embeddings, "
                "and was made for as many rows as there were. Give the tokens to the embeddings when these are made: "
                'transformers_tokenizer_kwargs={"additional_special_tokens": […]}.'
            )
        with torch.inference_mode(False), torch.no_grad():
            added_rows.append_rows_(base, added_rows.drawn_rows(added_rows.matrix_of(base), range(own, rows)))
        return base.get_input_embeddings()
