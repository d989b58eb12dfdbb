"""Flair's trainer with adapters: plugins, resuming, several processes.

May import ``models`` and what lies below it.
"""
