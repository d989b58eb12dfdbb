"""Flair's and torch's ``.pt`` files: scanned without loading them, and unpickled under an allow-list.

Nothing is unpickled anywhere else. May import ``adapter`` and ``primitives``.
"""
