"""Flair's trainer with adapters: plugins, resuming, several processes.

May import ``models`` and what lies below it.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
