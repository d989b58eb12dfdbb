"""The dtype in which the head of a model computes, and in which its embeddings leave: one rule for both.

The base keeps the dtype it was asked for. Embeddings leave in the dtype of the head that consumes them. A head trains
in fp32. After loading, the head of a default classifier that consists of linear layers is cast to the base's dtype.
Heads with a CRF, an RNN or prototypes stay in fp32, because their arithmetic needs it, and so do taggers and few-shot
models, which hand scores and vectors to numpy.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch
from flair.embeddings import Embeddings, StackedEmbeddings
from flair.models import MultitaskModel, SequenceTagger
from flair.nn import Model
from flair.nn.model import DefaultClassifier

from flair_peft.embeddings import exact_values
from flair_peft.embeddings.peft_transformer import PeftTransformerEmbeddings, adapted_embeddings, modules_around
from flair_peft.errors import DtypeMismatchError
from flair_peft.primitives.dtypes import dtype_name

log = logging.getLogger("flair_peft")


def align_head_(model: Model) -> None:
    """Bring the head of a loaded model, and the output of its embeddings, to one dtype, in place.

    The exact values that were loaded are kept beside cast parameters: ``state_dict`` gives them back, and so does
    :func:`restore_head_` before training. Aligning twice does the same as aligning once.
    """
    adapted = adapted_embeddings(model)
    if not adapted:
        return
    restore_head_(model)
    dtype = choose_head_dtype(model, adapted)
    if dtype != made_head_dtype(model):
        for owner in _flair_models(model):
            exact_values.cast_(owner, _head_tensors_of(owner), dtype)
    for embeddings in adapted:
        embeddings.output_dtype = dtype


def choose_head_dtype(model: Model, adapted: list[PeftTransformerEmbeddings]) -> torch.dtype:
    """Return the dtype in which the head of a loaded model computes, by the rule at the top of this module."""
    asked = {embeddings.head_dtype for embeddings in adapted if embeddings.head_dtype is not None}
    if asked == {torch.bfloat16} and any(isinstance(each, SequenceTagger) for each in _flair_models(model)):
        made = made_head_dtype(model)
        log.warning(
            "head_dtype='bfloat16' is not used: taggers hand scores to numpy, which lacks it. The head stays in %s. "
            "Leave out head_dtype.",
            dtype_name(made),
        )
        return made
    if len(asked) == 1:
        return asked.pop()
    base_dtypes = {embeddings.base_dtype for embeddings in adapted}
    if asked or len(base_dtypes) > 1 or not has_castable_head(model):
        return made_head_dtype(model)
    return base_dtypes.pop()


def made_head_dtype(model: Model) -> torch.dtype:
    """Return the dtype in which the head was made, if it is not cast: fp32, unless torch's default is another one."""
    of_head = (tensor.dtype for _, tensor in _all_head_tensors(model) if tensor.is_floating_point())
    return next(of_head, torch.get_default_dtype())


def has_castable_head(model: Model) -> bool:
    """Whether the head consists of linear layers of Flair's default classifiers, fed by adapted embeddings only."""
    if isinstance(model, MultitaskModel):
        return all(has_castable_head(task) for task in model.tasks.values())
    if not isinstance(model, DefaultClassifier) or type(model)._mask_scores is not DefaultClassifier._mask_scores:
        return False  # a class that masks scores does so in a tensor of fp32
    around = (each for _, each in modules_around(model) if each is not model)
    of_head = (each for each in around if not isinstance(each, PeftTransformerEmbeddings))
    return all(isinstance(module, torch.nn.Linear) or _holds_no_weights(module) for module in of_head)


def restore_head_(model: Model) -> None:
    """Give cast head parameters the exact values back that they were loaded with, in place, and embeddings fp32 output.

    Parameters keep their identity, so an optimiser built before or after sees the same objects. Values that changed
    since the cast win over the ones kept.
    """
    owners = _flair_models(model)
    restored = [exact_values.restore_(owner, functools.partial(_head_tensors_of, owner)) for owner in owners]
    if any(restored):
        for embeddings in adapted_embeddings(model):
            embeddings.output_dtype = made_head_dtype(model)


@contextlib.contextmanager
def in_one(model: Model) -> Iterator[None]:
    """Inside, a model predicts: with what was written into its exact values, and with an error that names its dtypes.

    Raises:
        DtypeMismatchError: embeddings and head have two.
    """
    for owner in (*_flair_models(model), *(embeddings.model for embeddings in adapted_embeddings(model))):
        exact_values.settle_(owner)
    try:
        yield
    except RuntimeError as error:
        if "dtype" in str(error):
            check_head(model)
        raise


def train_in_fp32_(model: Model) -> None:
    """Let the head train in fp32, in place: with its exact values if it was cast, with those it has if not.

    Where torch's default is a half precision, heads are made and trained in that, as in Flair.
    """
    restore_head_(model)
    wanted = min(torch.float32, torch.get_default_dtype(), key=lambda dtype: dtype.itemsize)
    narrow = [each for each in adapted_embeddings(model) if each.output_dtype.itemsize < wanted.itemsize]
    for _, tensor in _all_head_tensors(model) if narrow else ():
        if tensor.is_floating_point() and tensor.itemsize < wanted.itemsize:
            tensor.data = tensor.data.to(wanted)
    for embeddings in narrow:
        embeddings.output_dtype = wanted


def convert_(model: Model, convert: Callable[[], Model]) -> Model:
    """Convert a model to another dtype or device, in place, but leave a head that needs fp32 in it.

    Args:
        model: with adapted embeddings.
        convert: what ``model.half()``, ``model.to(…)`` and the like do.
    """
    exact = {} if has_castable_head(model) else _in_fp32(model)
    with contextlib.ExitStack() as stack:
        for owner in _flair_models(model):
            stack.enter_context(exact_values.converted(owner, functools.partial(_head_tensors_of, owner)))
        convert()
    is_narrowed = False
    for name, tensor in _all_head_tensors(model):
        if name in exact and tensor.dtype.itemsize < torch.float32.itemsize:
            is_narrowed = True
            tensor.data = exact[name].to(tensor.device)
    if is_narrowed:
        for embeddings in adapted_embeddings(model):
            embeddings.output_dtype = torch.float32
    return model


def _in_fp32(model: Model) -> dict[str, torch.Tensor]:
    return {name: tensor.data for name, tensor in _all_head_tensors(model) if tensor.dtype == torch.float32}


def check_head(model: Model) -> None:
    """Return if every linear layer of the head has the dtype in which the embeddings leave.

    Raises:
        DtypeMismatchError: one has not; both are named.
    """
    outputs = {embeddings.output_dtype: embeddings.name for embeddings in adapted_embeddings(model)}
    for name, tensor in _all_head_tensors(model):
        if outputs and tensor.is_floating_point() and tensor.dtype not in outputs:
            dtype, embeddings = next(iter(outputs.items()))
            raise DtypeMismatchError(
                f"The embeddings '{embeddings}' give {dtype_name(dtype)}, but '{name}' of the head computes in "
                f"{dtype_name(tensor.dtype)}. The first matrix product would fail. Convert the whole model, for "
                f"example model.to(torch.{dtype_name(dtype)}), not one of its parts."
            )


def _flair_models(model: torch.nn.Module) -> list[Model]:
    return [module for _, module in modules_around(model) if isinstance(module, Model)]


def _head_tensors_of(module: torch.nn.Module, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return name → parameter or buffer of a Flair model, without nested Flair models and adapted embeddings."""
    direct = {**module._parameters, **module._buffers}
    found = {prefix + name: tensor for name, tensor in direct.items() if tensor is not None}
    for name, child in module._modules.items():
        if child is not None and not isinstance(child, (Model, PeftTransformerEmbeddings)):
            found |= _head_tensors_of(child, f"{prefix}{name}.")
    return found


def _all_head_tensors(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    for path, owner in modules_around(model):
        if isinstance(owner, Model):
            yield from _head_tensors_of(owner, f"{path}." if path else "").items()


def _holds_no_weights(module: torch.nn.Module) -> bool:
    if isinstance(module, Embeddings) and not isinstance(module, StackedEmbeddings):
        return False  # its output is fp32, whether its weights are parameters or live in a table of its own
    is_container = isinstance(module, (StackedEmbeddings, torch.nn.Sequential, torch.nn.ModuleList))
    is_loss = isinstance(module, torch.nn.modules.loss._Loss)
    return is_container or is_loss or not [*module.parameters(), *module.buffers()]
