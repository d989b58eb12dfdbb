"""PEFT adapters for Flair: train, save, load and predict with LoRA and its relatives.

Importing the package registers its embeddings with Flair and installs the loading hook; :func:`uninstall` takes the
hook back.
"""

from flair_peft import first_imports as _first_imports  # noqa: F401, before anything else imports PEFT
from flair_peft._version import __version__
from flair_peft.embeddings import (
    PeftTransformerDocumentEmbeddings,
    PeftTransformerEmbeddings,
    PeftTransformerWordEmbeddings,
)
from flair_peft.errors import FlairPeftError
from flair_peft.export.int8 import quantize_onnx
from flair_peft.export.merge import merge
from flair_peft.export.onnx import export_onnx
from flair_peft.models.convert import convert_legacy
from flair_peft.models.foreign_head import take_over_head
from flair_peft.models.load import from_pretrained, load_legacy, verify
from flair_peft.models.save import push_to_hub, save_pretrained
from flair_peft.patch import install, is_installed, uninstall
from flair_peft.serving.shared_base import SharedBase
from flair_peft.serving.stream import predict_stream
from flair_peft.training.plugins import LoraPlusPlugin, RankAllocationPlugin
from flair_peft.training.process_group import join_processes
from flair_peft.training.resume import ResumePlugin

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
