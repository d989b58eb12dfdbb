"""Flair models behind an address: requests of many clients become mixed batches, and answers JSON.

May import what ``serving`` may. FastAPI and what comes with it is imported by ``app.py`` and what that needs alone.
"""
