"""Flair models behind an address: requests of many clients become mixed batches, and answers JSON.

May import what ``serving`` may. FastAPI and what comes with it is imported where a service starts.
"""
