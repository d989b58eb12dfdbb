"""PEFT adapters for Flair: train, save, load and predict with LoRA and its relatives.

Importing the package registers its embeddings with Flair and installs the loading hook; :func:`uninstall` takes the
hook back.
"""

from flair_peft import first_imports as _first_imports  # noqa: F401, before anything else imports PEFT
from flair_peft._version import __version__
from flair_peft.distributed import join_processes
from flair_peft.embeddings import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.errors import FlairPeftError
from flair_peft.exporting import export_onnx
from flair_peft.heads import take_over_head
from flair_peft.int8 import quantize_onnx
from flair_peft.merging import merge
from flair_peft.models import from_pretrained, push_to_hub, save_pretrained, verify
from flair_peft.patch import install, is_installed, uninstall
from flair_peft.resume import ResumePlugin
from flair_peft.shared import SharedBase
from flair_peft.stock import convert_legacy, load_legacy
from flair_peft.streaming import predict_stream
from flair_peft.training import LoraPlusPlugin, RankAllocationPlugin

__all__ = [
    "FlairPeftError",
    "LoraPlusPlugin",
    "PeftTransformerDocumentEmbeddings",
    "PeftTransformerEmbeddings",
    "PeftTransformerWordEmbeddings",
    "RankAllocationPlugin",
    "ResumePlugin",
    "SharedBase",
    "__version__",
    "convert_legacy",
    "export_onnx",
    "from_pretrained",
    "install",
    "is_installed",
    "join_processes",
    "load_legacy",
    "merge",
    "predict_stream",
    "push_to_hub",
    "quantize_onnx",
    "save_pretrained",
    "take_over_head",
    "uninstall",
    "verify",
]

install()
