"""Models merged into plain Flair models, exported to ONNX, and written for transformers.

May import ``models`` and what lies below it.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
