"""What every folder stands on: dtypes, devices, digests, files, mapped memory, progress, precision, a base's record.

Imports nothing of the package but its errors.
"""
