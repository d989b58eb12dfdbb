"""Trains, saves and predicts as stock Flair does: run by :mod:`tests.regression.make_stock` in a stock environment.

Neither flair_peft nor a newer PEFT is there. Of the model classes in :mod:`tests.support.zoo`, those that this Flair
lacks, or cannot train, are written down with the reason.
"""

from __future__ import annotations

import importlib
import json
import logging
import re
import sys
import tempfile
import types
import warnings
from pathlib import Path
from typing import Any

import flair
import peft
import torch
import transformers
from flair.embeddings import TransformerDocumentEmbeddings, TransformerWordEmbeddings

_TARGETS = ["query", "value"]
_LORA = {"r": 4, "lora_alpha": 12, "target_modules": _TARGETS, "init_lora_weights": False}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", _LORA),
    "dora": ("LoraConfig", {**_LORA, "use_dora": True}),
    "rslora": ("LoraConfig", {**_LORA, "use_rslora": True}),
    "bias-all": ("LoraConfig", {**_LORA, "bias": "all"}),
    "modules-to-save": ("LoraConfig", {**_LORA, "modules_to_save": ["intermediate.dense"]}),
    "ia3": ("IA3Config", {"target_modules": ["query", "output.dense"], "feedforward_modules": ["output.dense"]}),
}

# Of one model class only.
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "rank-pattern": ("LoraConfig", {**_LORA, "rank_pattern": {"query": 2}, "alpha_pattern": {"value": 5}}),
    "bias-lora-only": ("LoraConfig", {**_LORA, "bias": "lora_only"}),
    "loha": ("LoHaConfig", {"r": 4, "alpha": 6, "target_modules": _TARGETS, "init_weights": False}),
    "lokr": ("LoKrConfig", {"r": 4, "alpha": 6, "target_modules": _TARGETS, "init_weights": False}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "lora_alpha": 12, "target_modules": _TARGETS, "total_step": 20}),
    "vera": ("VeraConfig", {"r": 4, "target_modules": _TARGETS, "init_weights": False}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "FEATURE_EXTRACTION"}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "task_type": "FEATURE_EXTRACTION"}),
}
MORE_OF = "text-classifier"


def _import_zoo() -> Any:
    """Return the table of model classes; what this Flair lacks becomes a class that cannot be made."""
    while True:
        try:
            return importlib.import_module("tests.support.zoo").ZOO
        except ModuleNotFoundError as error:
            sys.modules[error.name or ""] = _Lacking(str(error.name))
        except ImportError as error:
            name, module = re.findall(r"'([\w.]+)'", str(error))[:2]
            setattr(sys.modules[module], name, _lacking(name))


class _Lacking(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _lacking(name)


def _lacking(name: str) -> type:
    def refuse(*_: Any, **__: Any) -> None:
        raise NotImplementedError(f"this Flair has no {name}")

    return type(name, (), {"__init__": refuse})


def _perturb(model: torch.nn.Module) -> None:
    """Add noise to all that PEFT trains: no adapter is a no-op, however short the training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad and ".pooler." not in name:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def make(entry: Any, method: tuple[str, dict[str, Any]], encoder: str, path: Path) -> Any:
    """Train a model and save it as Flair does; return what the live model predicts."""
    kind, settings = method

    def embeddings(embeddings_class: Any, **options: Any) -> Any:
        made = embeddings_class(encoder, peft_config=getattr(peft, kind)(**settings), **options)
        _perturb(made.model)
        return made

    torch.manual_seed(3)
    model = entry.build(
        lambda **options: embeddings(TransformerWordEmbeddings, **options),
        lambda **options: embeddings(TransformerDocumentEmbeddings, **options),
    )
    corpus = entry.corpus()
    with tempfile.TemporaryDirectory() as directory:
        # The best model cannot be loaded, with an adapter, by any of these versions.
        entry.train(model, corpus, Path(directory), use_final_model_for_eval=True)
    model.eval()
    predicted = entry.predict(model, entry.corpus())  # training may have left something in the other one
    model.save(path)
    return predicted


def main(encoder: str, folder: Path) -> None:
    """Write a file for each model class and method, and what was predicted or why there is none."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    flair.device = torch.device("cpu")
    torch.set_num_threads(1)
    models: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name, entry in _import_zoo().items():
        for method, config in {**METHODS, **(MORE if name == MORE_OF else {})}.items():
            path = folder / f"{name}.{method}.pt"
            try:
                predicted = make(entry, config, encoder, path)
                models[path.name] = {"model": name, "config": config, "predicted": predicted}
            except Exception as error:  # whatever it is, it is the reason why there is no file
                path.unlink(missing_ok=True)
                failures[path.name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    versions = {"flair": flair.__version__, "peft": peft.__version__, "torch": torch.__version__}
    versions["transformers"] = transformers.__version__
    record = {"versions": versions, "models": models, "failures": failures}
    (folder / "record.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    sys.stderr.write(f"{versions['flair']}: {len(models)} files, {len(failures)} that this version cannot make\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
