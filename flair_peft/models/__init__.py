"""Whole Flair models: saved, loaded, built, their cards; models of stock Flair.

May import ``embeddings`` and what lies below it.
"""

import flair  # noqa: F401, first: when it is imported, the hook imports what is here
