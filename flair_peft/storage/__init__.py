"""Checkpoints as files: directories put in place whole, manifests with checksums, checkpoints on the Hub.

Files of a base model are fetched in ``base``. May import ``adapter`` and ``primitives``.
"""
