"""PEFT adapters for Flair: train, save, load and predict with LoRA and its relatives.

Importing the package registers its embeddings with Flair and installs the loading hook; :func:`uninstall` takes the
hook back.
"""

from flair_peft._version import __version__
from flair_peft.embeddings import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.errors import FlairPeftError
from flair_peft.patch import install, is_installed, uninstall
from flair_peft.training import LoraPlusPlugin, RankAllocationPlugin

__all__ = [
    "FlairPeftError",
    "LoraPlusPlugin",
    "PeftTransformerDocumentEmbeddings",
    "PeftTransformerEmbeddings",
    "PeftTransformerWordEmbeddings",
    "RankAllocationPlugin",
    "__version__",
    "install",
    "is_installed",
    "uninstall",
]

install()
