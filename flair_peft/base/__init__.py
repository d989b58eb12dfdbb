"""The frozen transformer: found, checked against its record and the free memory, read once, shared, quantised.

May import ``adapter`` and ``primitives``.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
