"""PEFT adapters that were trained on other classes: their files, their config in our names, what goes where.

May import ``base``, ``storage``, ``adapter`` and ``primitives``.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
