"""Making modules is for one thread at a time."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

# transformers and PEFT build models on the meta device, without initialising them or in another default dtype, by
# switches for the whole process: one thread at a time makes modules, or those of another would be empty. It is the
# lock of all that leads there too, so that no two threads wait for each other.
lock = threading.RLock()


@contextlib.contextmanager
def anew() -> Iterator[None]:
    """Inside, one thread at a time makes ordinary tensors; outside, it is as if no random number had been drawn.

    Weights that a source lacks are the same each time, as if they had been read: whether a base is read, or is alive
    already, shows neither in them nor in what is drawn afterwards.
    """
    with lock, torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        yield
