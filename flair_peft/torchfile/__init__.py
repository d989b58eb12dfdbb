"""Flair's and torch's ``.pt`` files: scanned without loading them, and unpickled under an allow-list.

Nothing else unpickles; ``foreign`` reads PEFT's ``.bin`` files by torch's reader of tensors alone.

May import ``adapter`` and ``primitives``.
"""
