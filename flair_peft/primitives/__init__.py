"""What every folder stands on: dtypes, devices, digests, open files, mapped memory, progress, the record of a base.

Imports nothing of the package but its errors.
"""
