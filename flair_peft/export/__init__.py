"""Models with an adapter merged into plain Flair models, and exported to ONNX.

May import ``models`` and what lies below it.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
