"""AdapterHub's adapters: a BERT with its own LoRA and a classification head of one layer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers.models.bert.tokenization_bert_fast  # noqa: F401 - imported before a clock starts
from adapters import AutoAdapterModel, BertAdapterModel, LoRAConfig
from adapters.composition import BatchSplit
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from tests.benchmarks.workers.peer import LABELS, Peer, Texts

_NAME = "sentiment"


class Model(NamedTuple):
    """A transformer with adapters and heads in it."""

    tokenizer: PreTrainedTokenizerBase
    transformer: BertAdapterModel


class ByAdapters(Peer):
    """What the documentation of AdapterHub shows."""

    def build(self, number: int) -> Model:
        model = Model(AutoTokenizer.from_pretrained(self.base), AutoAdapterModel.from_pretrained(self.base))
        given = json.loads((self.material(number) / "adapter_config.json").read_text(encoding="utf-8"))
        matrices = [name[0] for name in sorted(given["target_modules"])]  # "query" is "q" here
        config = LoRAConfig(r=given["r"], alpha=given["lora_alpha"], dropout=0.0, attn_matrices=matrices)
        model.transformer.add_adapter(_NAME, config=config)
        model.transformer.add_classification_head(_NAME, num_labels=len(LABELS), layers=1)
        model.transformer.train_adapter(_NAME)
        self._fill_(model.transformer, number)
        model.transformer.to(self.device)
        return model

    def _fill_(self, transformer: BertAdapterModel, number: int) -> None:
        """Give the adapter and the head the weights that all peers start from, in place."""
        parameters = dict(transformer.named_parameters())
        filled = {name for name in parameters if ".loras." in name}
        tensors = load_file(self.material(number) / "adapter_model.safetensors")
        assert len(filled) == len(tensors)
        with torch.no_grad():
            for name, tensor in tensors.items():
                module, matrix = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
                matrix = matrix.removesuffix(".weight")
                parameters[f"bert.{module}.loras.{_NAME}.lora_{matrix}"].copy_(tensor)
            for name, values in self.head(number).items():
                parameters[f"heads.{_NAME}.1.{name}"].copy_(torch.tensor(values))

    def save(self, model: Model, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        model.transformer.save_adapter(str(path), _NAME)
        model.tokenizer.save_pretrained(path / "tokenizer")

    def load(self, path: Path, *, prove: bool) -> Model:
        model = Model(AutoTokenizer.from_pretrained(path / "tokenizer"), AutoAdapterModel.from_pretrained(self.base))
        model.transformer.load_adapter(str(path), set_active=True)
        model.transformer.to(self.device).eval()
        return model

    def _encoded(self, model: Model, texts: Texts) -> Any:
        encoded = model.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return encoded.to(self.device)

    @torch.no_grad()
    def scores(self, model: Model, texts: Texts) -> torch.Tensor:
        return model.transformer(**self._encoded(model, texts)).logits.softmax(dim=1).cpu()

    def batch(self, texts: Texts, targets: Sequence[int]) -> Any:
        return list(texts), torch.tensor(targets, device=self.device)

    def loss(self, model: Model, batch: Any) -> torch.Tensor:
        return model.transformer(**self._encoded(model, batch[0]), labels=batch[1]).loss

    def modules(self, model: Model) -> list[torch.nn.Module]:
        return [model.transformer]

    def open(self) -> Model:
        transformer = AutoAdapterModel.from_pretrained(self.base).to(self.device)
        return Model(AutoTokenizer.from_pretrained(self.base), transformer.eval())

    def add(self, many: Model, path: Path, *, prove: bool) -> str:
        name = many.transformer.load_adapter(str(path), load_as=f"model{len(many.transformer.heads)}")
        many.transformer.to(self.device).eval()
        return name

    def scores_of(self, many: Model, key: str, texts: Texts) -> torch.Tensor:
        many.transformer.set_active_adapters(key)
        return self.scores(many, texts)

    @torch.no_grad()
    def scores_of_mixed(self, many: Model, parts: Mapping[str, Texts]) -> list[torch.Tensor]:
        sizes = [len(part) for part in parts.values()]
        many.transformer.set_active_adapters(BatchSplit(*parts, batch_sizes=sizes))
        texts = [text for part in parts.values() for text in part]
        found = many.transformer(**self._encoded(many, texts)).head_outputs
        return [output.logits.softmax(dim=1).cpu() for output in found]


PEER = ByAdapters
