"""Export to ONNX: the transformer, with its adapter merged, runs in onnxruntime; the head stays Flair's."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flair
import torch
from flair.data import Sentence
from flair.embeddings import TransformerEmbeddings
from flair.embeddings.base import Embeddings
from flair.nn import Model

from flair_peft.embeddings.peft_transformer import adapted_embeddings
from flair_peft.errors import AdapterConfigError, StateMismatchError, UnsupportedMethodError
from flair_peft.export import merge
from flair_peft.models import build
from flair_peft.primitives import progress, rounding
from flair_peft.storage import atomic

# Of onnxruntime's vectors from torch's, as a share of their norm.
_TOLERANCE = 1e-3

_EXAMPLES = ("Berlin is large .", "The founder of the company sold a house in New York and bought another one .")
_CHECKED = (
    *_EXAMPLES,
    "Yes",
    "I would not have thought that anybody would write a sentence of this length to test it .",
)


@progress.shown("exporting")
def export_onnx(
    model: Model, path: str | Path, *, examples: Sequence[str] = _EXAMPLES, opset_version: int = 14
) -> Model:
    """Return a plain Flair model whose transformer, with the adapter merged into it, is the ONNX file at ``path``.

    The file is that of Flair's own export; the vectors of onnxruntime are compared with those of the merged model.
    The returned model is saved and loaded by stock Flair, and finds the file by its path.

    Args:
        model: a Flair model whose embeddings have an adapter; it stays as it is.
        path: of the file, which is replaced when the new graph was checked; with several embeddings, a number is
            appended to its name.
        examples: sentences that the graph is traced with.
        opset_version: of ONNX.

    Raises:
        AdapterConfigError: onnx and onnxruntime are not installed, or the model has no adapter, or stock Flair would
            read it as another model.
        UnsupportedMethodError: the adapter cannot be merged, or torch cannot export the transformer.
        StateMismatchError: onnxruntime gives other vectors.
    """
    if not all(importlib.util.find_spec(name) for name in ("onnx", "onnxruntime")):
        raise AdapterConfigError(
            "Cannot export to ONNX: onnx and onnxruntime are not both installed here. The first writes the file, the "
            "second checks and runs it. Run pip install onnx onnxruntime."
        )
    _refuse_separators(model)
    _refuse_windows(model)
    plain = merge.merge(model)
    paths = (_numbered(Path(path), number) for number in itertools.count())
    build.replace_each_(
        plain, TransformerEmbeddings, lambda child: _export(child, next(paths), examples, opset_version)
    )
    return plain


def _export(
    embeddings: TransformerEmbeddings, path: Path, examples: Sequence[str], opset_version: int
) -> Embeddings[Any]:
    """Export to a file, which is as it was if that fails or if the graph gives other vectors."""
    exported: list[Any] = []
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(
        path, lambda file: exported.append(_export_to(Path(file.name), embeddings, examples, opset_version))
    )
    (on_file,) = exported
    on_file.onnx_model = str(path)
    return on_file


def _export_to(path: Path, embeddings: TransformerEmbeddings, examples: Sequence[str], opset_version: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: shapes that it sees as constants are checked below
        try:
            _trace(path, embeddings, [Sentence(text) for text in examples], opset_version)
            exported = embeddings.onnx_cls(onnx_model=str(path), providers=_providers(), **embeddings.to_args())
        except (RuntimeError, ValueError, TypeError, LookupError, torch.onnx.errors.OnnxExporterError) as error:
            raise UnsupportedMethodError(
                f"Cannot export '{embeddings.name}': torch's ONNX exporter fails on {type(embeddings.model).__name__} "
                f"with {type(error).__name__}: {str(error)[:200]}. Flair exports encoders; use flair_peft.merge for "
                "this one."
            ) from error
    _check(embeddings, exported)
    return exported


def _trace(path: Path, embeddings: TransformerEmbeddings, examples: list[Sentence], opset_version: int) -> None:
    """Write the graph that Flair's ONNX embeddings run.

    Flair's own export hands no ``dynamo=False`` on, and torch's other exporter cannot export Flair's embeddings.
    """
    tensors = embeddings.prepare_tensors(examples)
    outputs = {"document_embeddings": embeddings.document_embedding, "token_embeddings": embeddings.token_embedding}
    torch.onnx.export(
        embeddings,
        (tensors,),
        str(path),
        input_names=[name for name in inspect.signature(embeddings.forward).parameters if name in tensors],
        output_names=[name for name, is_given in outputs.items() if is_given],
        dynamic_axes=embeddings.onnx_cls.collect_dynamic_axes(embeddings, tensors),
        opset_version=opset_version,
        dynamo=False,
    )


def _providers() -> list[Any]:
    """Return what onnxruntime computes with: as in Flair, no more than 4 GiB of a GPU."""
    on_gpu = ("CUDAExecutionProvider", {"device_id": 0, "gpu_mem_limit": 4 << 30})
    return [*([on_gpu] if flair.device.type == "cuda" else []), "CPUExecutionProvider"]


def _check(embeddings: TransformerEmbeddings, exported: Embeddings[Any]) -> None:
    """Return if onnxruntime gives the vectors that torch gives."""
    for text in _CHECKED:
        apart = rounding.distance(merge.vectors(exported, (text,)), merge.vectors(embeddings, (text,)))
        if not apart <= _TOLERANCE:
            raise StateMismatchError(
                f"Cannot export '{embeddings.name}': the vectors that onnxruntime computes for '{text}' are "
                f"{apart:.2g} of their norm away from those of the model, and rounding explains {_TOLERANCE:g}. The "
                "tracer took something for a constant, as it does in Flair's subtoken_pooling='mean'. Use 'first', or "
                "pass examples= with sentences like yours."
            )


def _refuse_separators(model: Model) -> None:
    """Return unless a load by stock Flair would join texts by another separator than the model was trained with."""
    for module in model.modules():
        if getattr(module, "sep", " ") != " " and not getattr(module, "embed_separately", False):
            raise AdapterConfigError(
                f"Cannot export this {type(module).__name__}: it joins texts by {module.sep!r}, and Flair joins them "
                "by a space where the embeddings are an ONNX file. Loaded again, it would predict something else. Use "
                "flair_peft.merge, or train with embed_separately=True."
            )


def _refuse_windows(model: Model) -> None:
    """Return unless Flair, of whose code the graph is made, would mix the windows of long texts up."""
    for embeddings in adapted_embeddings(model):
        if merge.mixes_windows(embeddings):
            raise AdapterConfigError(
                f"Cannot export '{embeddings.name}': it splits long texts into windows and reads the first token, and "
                "Flair's graph of that mixes the windows of several texts up. Train with allow_long_sentences=False, "
                "or with cls_pooling='mean'."
            )


def _numbered(path: Path, number: int) -> Path:
    return path if not number else path.with_name(f"{path.stem}-{number}{path.suffix}")
