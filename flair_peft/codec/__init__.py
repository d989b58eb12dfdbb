"""Flair's constructor state as JSON and tensors, and what a file may have Flair build.

May import ``base``, ``torchfile``, ``adapter`` and ``primitives``.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here

from flair_peft.codec.state_json import restore_state

# Files name the function so, and go on doing it.
restore_state.__module__ = __name__

__all__ = ["restore_state"]
