"""Rows added to the input embeddings of a base, without copying the matrix where it is mapped from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from flair_peft.base import transformer, unusable
from flair_peft.errors import AdapterConfigError
from flair_peft.primitives import devices, mapped_memory

_ROWS_AT_ONCE = 4096


def matrix_of(model: PreTrainedModel) -> torch.nn.Parameter:
    """Return the matrix of the input embeddings, of shape (rows, length), if rows can be added to it.

    Raises:
        AdapterConfigError: it is offloaded.
    """
    matrix = model.get_input_embeddings().weight
    if matrix.is_meta:
        raise AdapterConfigError(
            f"Cannot add a row to the input embeddings of '{model.name_or_path}': they are offloaded, and Flair's "
            "context separator, or a token that was added, needs one. Keep the embeddings on a device in device_map, "
            "or pass use_context_separator=False and add no tokens."
        )
    return matrix


def mean_row(matrix: torch.Tensor) -> torch.Tensor:
    """Return a new row, of shape (1, length), for a matrix of shape (rows, length): the mean of all rows.

    transformers draws new rows from a normal distribution around that mean whose covariance, over all rows, takes
    seconds to compute and is scaled to nearly nothing.
    """
    return _mean(matrix, torch.Tensor.float).to(matrix.dtype).unsqueeze(0)


def drawn_rows(matrix: torch.Tensor, places: Iterable[int]) -> torch.Tensor:
    """Return new rows, of shape (places, length), for a matrix of shape (rows, length).

    They are as far apart as rows of the matrix are, for under an adapter they stay as they are, and what is alike there
    no training tells apart. Each has the mean and the variance of every column, and is the same for one place in each
    process, so that models have them in common.
    """
    mean = _mean(matrix, torch.Tensor.float)
    deviation = (_mean(matrix, lambda rows: rows.float().square()) - mean.square()).clamp(min=0).sqrt()
    drawn = [torch.randn(len(mean), generator=torch.Generator().manual_seed(place)) for place in places]
    return (mean + deviation * torch.stack(drawn).to(mean.device)).to(matrix.dtype)


def _mean(matrix: torch.Tensor, value: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Return the mean of a value over all rows, in float32; of a mapped matrix, a piece at a time is in memory."""
    is_mapped, total = mapped_memory.is_mapped(matrix), torch.zeros((), device=matrix.device)
    for start in range(0, len(matrix), _ROWS_AT_ONCE):
        end = start + _ROWS_AT_ONCE
        total = total + value(matrix[start:end].detach()).sum(dim=0)
        if is_mapped:
            mapped_memory.page_out(matrix[:end])  # from the start: pages can be reclaimed in large groups only
    return total / len(matrix)


def append_rows_(model: PreTrainedModel, rows: torch.Tensor) -> None:
    """Append rows, of shape (count, length), to the input embeddings, in place.

    Args:
        model: its other parameters keep their storage.
        rows: for the tokens beyond the vocabulary of the source.

    Raises:
        AdapterConfigError: nothing can be appended.
    """
    old = matrix_of(model)
    holders = [module for module in model.modules() if module._parameters.get("weight") is old]
    if any(type(module) is not torch.nn.Embedding for module in holders):
        start = len(old)  # resizing makes this very parameter longer
        try:
            with devices.same_random_numbers():  # it draws the rows, which are not these
                model.resize_token_embeddings(start + len(rows), mean_resizing=False)
        except (TypeError, NotImplementedError) as error:
            raise AdapterConfigError(
                f"Cannot add a row to the input embeddings of {type(model).__name__}: {unusable.first_line(error)}. "
                "Flair's context separator, or a token that was added, needs one. Pass use_context_separator=False and "
                "add no tokens."
            ) from error
        model.get_input_embeddings().weight.data[start:] = rows
        return
    new = torch.nn.Parameter(_with_rows(old.detach(), rows), requires_grad=old.requires_grad)
    for module in holders:
        module.weight, module.num_embeddings = new, len(new)
    transformer.text_config(model.config).vocab_size = len(new)
    if hasattr(model, "vocab_size"):
        model.vocab_size = len(new)


def _with_rows(matrix: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Return the matrix with the rows behind its own, which stay in the file that they are mapped from."""
    [mapped] = mapped_memory.map_again([matrix], more_rows=len(rows))
    if mapped is None:
        return torch.cat([matrix, rows.to(matrix.device, matrix.dtype)])
    mapped[len(matrix) :] = rows
    return mapped
