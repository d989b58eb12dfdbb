"""Predictions of many models: one shared base, mixed batches, endless streams.

May import ``models`` and what lies below it.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
