"""Checkpoints as files: directories put in place whole, manifests with checksums, the Hub. The only callers of the Hub.

May import ``adapter`` and ``primitives``.
"""
