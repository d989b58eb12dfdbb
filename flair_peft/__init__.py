"""PEFT adapters for Flair: train, save, load and predict with LoRA and its relatives.

Importing the package registers its embeddings with Flair and installs the loading hook: at once where Flair is
imported already, else as soon as it is. :func:`uninstall` takes the hook back. Neither Flair nor torch is imported for
what needs none of them, such as ``flair-peft inspect``: they take seconds.
"""

from __future__ import annotations

import importlib as _importlib
import typing as _typing

import wrapt as _wrapt

from flair_peft import first_imports as _first_imports  # noqa: F401, before anything else imports PEFT
from flair_peft._version import __version__ as __version__
from flair_peft.errors import FlairPeftError as FlairPeftError

if _typing.TYPE_CHECKING:
    from flair_peft.embeddings import PeftTransformerDocumentEmbeddings as PeftTransformerDocumentEmbeddings
    from flair_peft.embeddings import PeftTransformerEmbeddings as PeftTransformerEmbeddings
    from flair_peft.embeddings import PeftTransformerWordEmbeddings as PeftTransformerWordEmbeddings
    from flair_peft.export.int8 import quantize_onnx as quantize_onnx
    from flair_peft.export.merge import merge as merge
    from flair_peft.export.onnx import export_onnx as export_onnx
    from flair_peft.export.transformers_model import to_transformers as to_transformers
    from flair_peft.models.convert import convert_legacy as convert_legacy
    from flair_peft.models.foreign_head import take_over_head as take_over_head
    from flair_peft.models.load import from_pretrained as from_pretrained
    from flair_peft.models.load import load_legacy as load_legacy
    from flair_peft.models.load import verify as verify
    from flair_peft.models.save import push_to_hub as push_to_hub
    from flair_peft.models.save import save_pretrained as save_pretrained
    from flair_peft.patch import install as install
    from flair_peft.patch import is_installed as is_installed
    from flair_peft.patch import uninstall as uninstall
    from flair_peft.serving.shared_base import SharedBase as SharedBase
    from flair_peft.serving.stream import predict_stream as predict_stream
    from flair_peft.training.plugins import AuxiliaryLossPlugin as AuxiliaryLossPlugin
    from flair_peft.training.plugins import LoraPlusPlugin as LoraPlusPlugin
    from flair_peft.training.plugins import RankAllocationPlugin as RankAllocationPlugin
    from flair_peft.training.process_group import join_processes as join_processes
    from flair_peft.training.resume import ResumePlugin as ResumePlugin

_NAMES_IN = {
    # Where they are made: whoever imports their folder first imports Flair, and has none of them yet when that ends.
    "embeddings.peft_transformer": ["PeftTransformerEmbeddings"],
    "embeddings.word_and_document": ["PeftTransformerDocumentEmbeddings", "PeftTransformerWordEmbeddings"],
    "export.int8": ["quantize_onnx"],
    "export.merge": ["merge"],
    "export.onnx": ["export_onnx"],
    "export.transformers_model": ["to_transformers"],
    "models.convert": ["convert_legacy"],
    "models.foreign_head": ["take_over_head"],
    "models.load": ["from_pretrained", "load_legacy", "verify"],
    "models.save": ["push_to_hub", "save_pretrained"],
    "patch": ["install", "is_installed", "uninstall"],
    "serving.shared_base": ["SharedBase"],
    "serving.stream": ["predict_stream"],
    "training.process_group": ["join_processes"],
    "training.plugins": ["AuxiliaryLossPlugin", "LoraPlusPlugin", "RankAllocationPlugin"],
    "training.resume": ["ResumePlugin"],
}
__all__ = sorted(["FlairPeftError", "__version__", *(name for names in _NAMES_IN.values() for name in names)])
_MODULES = (
    *("adapter", "base", "codec", "compat", "embeddings", "export", "foreign", "inspection", "models", "patch"),
    *("primitives", "serving", "storage", "torchfile", "training"),
)


def _import_patch(_: object) -> None:
    _importlib.import_module("flair_peft.patch")


def _install(_: object = None) -> None:
    """Give Flair its hook, and the package its public names."""
    modules = {module: _importlib.import_module(f"flair_peft.{module}") for module in _NAMES_IN}
    modules["patch"].install()
    globals().update({name: getattr(modules[module], name) for module, names in _NAMES_IN.items() for name in names})


if not _typing.TYPE_CHECKING:  # for a type checker, a module with this function has every attribute

    def __getattr__(name: str) -> object:
        """Import Flair, which installs the hook, and return a public name or a module of the package."""
        if name not in __all__ and name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        # First: modules that need Flair must not be under way when its import ends and that of patch.py starts.
        _importlib.import_module("flair")
        if name in _MODULES:
            return _importlib.import_module(f"flair_peft.{name}")
        if name not in globals():  # the hook could not be installed, and says why once more
            _install()
        return globals()[name]


def __dir__() -> list[str]:
    """Return the public names and the modules too that are not imported yet."""
    return sorted({*globals(), *__all__, *_MODULES})


# In two steps, so that importing patch.py before Flair ends in the same way.
_wrapt.register_post_import_hook(_install, "flair_peft.patch")
_wrapt.register_post_import_hook(_import_patch, "flair")
