"""Predictions of many models: one shared base, mixed batches, endless streams.

May import ``models`` and what lies below it.
"""
