"""PEFT adapters that were trained on other classes: their files, their config and tensors in the names of embeddings.

May import ``base``, ``storage``, ``adapter`` and ``primitives``.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
