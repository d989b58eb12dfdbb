"""PEFT and transformers alone: a PeftModel on a bare AutoModel, and a linear layer of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers.models.bert.modeling_bert
import transformers.models.bert.tokenization_bert_fast  # noqa: F401 - imported before a clock starts
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from tests.benchmarks.workers.peer import Peer, Texts


class Model(NamedTuple):
    """An encoder and its heads by the names of its adapters."""

    tokenizer: PreTrainedTokenizerBase
    encoder: PeftModel
    heads: dict[str, torch.nn.Linear]


class ByPeft(Peer):
    """What the README of PEFT shows."""

    def build(self, number: int) -> Model:
        encoder = AutoModel.from_pretrained(self.base)
        encoder = PeftModel.from_pretrained(encoder, self.material(number), is_trainable=True)
        head = {name: torch.tensor(values) for name, values in self.head(number).items()}
        return self._placed(AutoTokenizer.from_pretrained(self.base), encoder, head)

    def save(self, model: Model, path: Path) -> None:
        model.encoder.save_pretrained(path)
        model.tokenizer.save_pretrained(path / "tokenizer")
        save_file(model.heads["default"].state_dict(), path / "head.safetensors")

    def load(self, path: Path, *, prove: bool) -> Model:
        tokenizer = AutoTokenizer.from_pretrained(path / "tokenizer")
        encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(self.base), path)
        return self._placed(tokenizer, encoder.eval(), load_file(path / "head.safetensors"))

    def _placed(self, tokenizer: Any, encoder: PeftModel, head: dict[str, torch.Tensor]) -> Model:
        return Model(tokenizer, encoder.to(self.device), {"default": self._linear(head)})

    def _linear(self, head: dict[str, torch.Tensor]) -> torch.nn.Linear:
        labels, hidden = head["weight"].shape
        linear = torch.nn.utils.skip_init(torch.nn.Linear, hidden, labels)
        linear.load_state_dict(head)
        return linear.to(self.device)

    def _encoded(self, model: Model, texts: Texts) -> Any:
        encoded = model.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        return encoded.to(self.device)

    @torch.no_grad()
    def scores(self, model: Model, texts: Texts, *, name: str = "default") -> torch.Tensor:
        vectors = model.encoder(**self._encoded(model, texts)).last_hidden_state[:, 0]
        return model.heads[name](vectors).softmax(dim=1).cpu()

    @torch.no_grad()
    def scores_without_adapter(self, number: int, texts: Texts) -> torch.Tensor:
        """Return what the base and the head give: what a full model without an adapter has to give."""
        model = self.build(number)
        model.encoder.eval()
        with model.encoder.disable_adapter():
            return self.scores(model, texts)

    def batch(self, texts: Texts, targets: Sequence[int]) -> Any:
        return list(texts), torch.tensor(targets, device=self.device)

    def loss(self, model: Model, batch: Any) -> torch.Tensor:
        vectors = model.encoder(**self._encoded(model, batch[0])).last_hidden_state[:, 0]
        return torch.nn.functional.cross_entropy(model.heads["default"](vectors), batch[1])

    def modules(self, model: Model) -> list[torch.nn.Module]:
        return [model.encoder, *model.heads.values()]

    def open(self) -> dict[str, Any]:
        return {"model": AutoModel.from_pretrained(self.base), "tokenizer": AutoTokenizer.from_pretrained(self.base)}

    def add(self, many: dict[str, Any], path: Path, *, prove: bool) -> str:
        model = many["model"]
        if isinstance(model, Model):
            name = str(len(model.heads))
            model.encoder.load_adapter(path, adapter_name=name)
        else:
            name = "0"
            encoder = PeftModel.from_pretrained(model, path, adapter_name=name).to(self.device)
            many["model"] = model = Model(many["tokenizer"], encoder.eval(), {})
        model.heads[name] = self._linear(load_file(path / "head.safetensors"))
        return name

    def scores_of(self, many: dict[str, Any], key: str, texts: Texts) -> torch.Tensor:
        many["model"].encoder.set_adapter(key)
        return self.scores(many["model"], texts, name=key)

    @torch.no_grad()
    def scores_of_mixed(self, many: dict[str, Any], parts: Mapping[str, Texts]) -> list[torch.Tensor]:
        model = many["model"]
        texts = [text for part in parts.values() for text in part]
        names = [key for key, part in parts.items() for _ in part]
        vectors = model.encoder(**self._encoded(model, texts), adapter_names=names).last_hidden_state[:, 0]
        shares = vectors.split([len(part) for part in parts.values()])
        return [model.heads[key](share).softmax(dim=1).cpu() for key, share in zip(parts, shares, strict=True)]


PEER = ByPeft
