"""The frozen transformer: found, checked against its record and the free memory, read once, shared, quantised.

May import ``adapter`` and ``primitives``.
"""
