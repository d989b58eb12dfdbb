"""The version of this package, readable without importing what it stands on."""

__version__ = "0.3.0"
