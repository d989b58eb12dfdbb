"""Reaches into what other libraries keep to themselves or for the whole process, where they have no public way.

Each names the version that it was written for, and has a test that fails when a release makes it needless. Writing into
Flair is not among them: ``patch.py`` does that.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
import threading
import weakref
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import torch

PARALLELISM = "TOKENIZERS_PARALLELISM"

_lock = threading.Lock()


# Model → what its passes wait for.
_passes: weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def one_pass_at_a_time(model: torch.nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Inside, no other thread runs a model that puts methods into its own layers to record their states.

    Two threads would record each other's.

    Written for transformers 4.57.
    """
    if not getattr(model, "_can_record_outputs", None):
        return contextlib.nullcontext()
    with _lock:
        return _passes.setdefault(model, threading.RLock())


def compiled_in_place(module: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped, compiled as ``module.compile()`` does; others as they are.

    Written for torch 2.13.
    """
    if not isinstance(module, torch.nn.Module) or "dynamo_ctx" not in vars(module):
        return module
    inner: Any = module._orig_mod
    context: Any = module.dynamo_ctx
    inner._compiled_call_impl = context(inner._call_impl)
    return inner


def storage_address(tensor: torch.Tensor) -> int:
    """Return where the memory of a tensor's storage starts; ``data_ptr`` would first copy what is copied on write.

    Written for torch 2.13.
    """
    return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]


def storage_identity(tensor: torch.Tensor) -> int:
    """Return what tells a tensor's storage from all others that are alive, wherever its memory is by now.

    Written for torch 2.13.
    """
    return int(tensor.untyped_storage()._cdata)


def is_copied_on_write(tensor: torch.Tensor) -> bool:
    """Whether torch copies the tensor's memory before it is written to, or read by what might write.

    Written for torch 2.13.
    """
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def lazy_clone(tensor: torch.Tensor) -> torch.Tensor:
    """Return a clone that gets memory of its own when one of the two is written to.

    Written for torch 2.13.

    Raises:
        RuntimeError: torch cannot copy this memory on write, as it cannot copy mapped files.
    """
    return tensor._lazy_clone()


def leave_out_of_synchronisation_(module: torch.nn.Module, names: Iterable[str]) -> None:
    """Let DistributedDataParallel neither send nor compare these parameters and buffers of a module that it will wrap.

    Written for torch 2.13.
    """
    module.__dict__["_ddp_params_and_buffers_to_ignore"] = set(names)


def variable_of_caller(method: str, owner: object, name: str) -> Any:
    """Return a local variable of a method of ``owner`` that is being called in this thread, or ``None`` if it is not.

    Written for Flair 0.15.1, whose ``ModelTrainer.train_custom`` keeps the gradient scaler, and what is evaluated after
    an epoch, in variables.
    """
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == method and frame.f_locals.get("self") is owner:
            return frame.f_locals.get(name)
        frame = frame.f_back
    return None


@contextlib.contextmanager
def without_advice_on_quantising() -> Iterator[None]:
    """Inside, onnxruntime does not advise to prepare the graph in another program; what others log comes through.

    Written for onnxruntime 1.31, which calls ``logging.warning``: that writes to the root logger, and gives it a
    handler if it has none.
    """
    root, placeholder = logging.getLogger(), logging.NullHandler()

    def is_no_advice(record: logging.LogRecord) -> bool:
        return "pre-processing before quantization" not in record.getMessage()

    root.addHandler(placeholder)
    root.addFilter(is_no_advice)
    try:
        yield
    finally:
        root.removeFilter(is_no_advice)
        root.removeHandler(placeholder)


_transformers = logging.getLogger("transformers")
_threads_that_want_errors_alone = 0
_level_before = logging.NOTSET


@contextlib.contextmanager
def errors_of_transformers_alone() -> Iterator[None]:
    """Inside, transformers logs errors alone; afterwards, once no thread is inside any more, what it logged before.

    Written for transformers 4.57, which has one level for the whole process.
    """
    global _threads_that_want_errors_alone, _level_before
    with _lock:
        if not _threads_that_want_errors_alone:
            _level_before = _transformers.level
            _transformers.setLevel(logging.ERROR)
        _threads_that_want_errors_alone += 1
    try:
        yield
    finally:
        with _lock:
            _threads_that_want_errors_alone -= 1
            if not _threads_that_want_errors_alone and _transformers.level == logging.ERROR:
                _transformers.setLevel(_level_before)


_has_set_parallelism = False


def tokenize_in_one_thread() -> None:
    """Keep tokenizers from threads of their own, and from warning of these in forked processes, as stock Flair does.

    What the user has set in the environment stays. :func:`tokenize_as_before` takes it back.

    Written for tokenizers 0.22, which read the environment alone.
    """
    global _has_set_parallelism
    with _lock:
        if PARALLELISM not in os.environ:
            os.environ[PARALLELISM] = "false"
            _has_set_parallelism = True


def tokenize_as_before() -> None:
    """Take back what :func:`tokenize_in_one_thread` set, unless it was set to something else since."""
    global _has_set_parallelism
    with _lock:
        if _has_set_parallelism and os.environ.get(PARALLELISM) == "false":
            del os.environ[PARALLELISM]
        _has_set_parallelism = False
