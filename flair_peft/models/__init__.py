"""Whole Flair models: saved, loaded, built, their cards; models of stock Flair.

May import ``embeddings`` and what lies below it.
"""
