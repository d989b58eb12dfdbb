"""sentence-transformers with an adapter: first-token pooling, and its Dense module as the head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.bert.modeling_bert  # noqa: F401 - imported before a clock starts
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Pooling, Transformer
from sentence_transformers.util import batch_to_device

from tests.benchmarks.workers.peer import Peer, Texts


class BySentenceTransformers(Peer):
    """What the documentation of sentence-transformers shows; it has no classifier, so that the loss is torch's."""

    def build(self, number: int) -> SentenceTransformer:
        model = self._bare()
        model.load_adapter(str(self.material(number)), is_trainable=True)
        head = {f"linear.{name}": torch.tensor(values) for name, values in self.head(number).items()}
        labels, hidden = head["linear.weight"].shape
        dense = Dense(hidden, labels, activation_function=torch.nn.Identity())
        dense.load_state_dict(head)
        model.append(dense)
        return model.to(self.device)

    def _bare(self) -> SentenceTransformer:
        transformer = Transformer(self.base)
        pooling = Pooling(transformer.get_embedding_dimension(), pooling_mode="cls")
        return SentenceTransformer(modules=[transformer, pooling], device=self.device)

    def save(self, model: SentenceTransformer, path: Path) -> None:
        model.save_pretrained(str(path))

    def load(self, path: Path, *, prove: bool) -> SentenceTransformer:
        return SentenceTransformer(str(path), device=self.device)

    def scores(self, model: SentenceTransformer, texts: Texts) -> torch.Tensor:
        found = model.encode(list(texts), batch_size=len(texts), convert_to_tensor=True, show_progress_bar=False)
        return found.softmax(dim=1).cpu()

    def batch(self, texts: Texts, targets: Sequence[int]) -> Any:
        return list(texts), torch.tensor(targets, device=self.device)

    def loss(self, model: SentenceTransformer, batch: Any) -> torch.Tensor:
        features = batch_to_device(model.preprocess(batch[0]), torch.device(self.device))
        return torch.nn.functional.cross_entropy(model(features)["sentence_embedding"], batch[1])

    def modules(self, model: SentenceTransformer) -> list[torch.nn.Module]:
        return [model]

    def open(self) -> dict[str, Any]:
        return {"model": self._bare().eval(), "heads": {}}

    def add(self, many: dict[str, Any], path: Path, *, prove: bool) -> str:
        name = f"model{len(many['heads'])}"
        many["model"].load_adapter(str(path), adapter_name=name)
        many["heads"][name] = Dense.load(str(path / "2_Dense")).to(self.device)
        return name

    @torch.no_grad()
    def scores_of(self, many: dict[str, Any], key: str, texts: Texts) -> torch.Tensor:
        many["model"].set_adapter(key)
        options = {"batch_size": len(texts), "convert_to_tensor": True, "show_progress_bar": False}
        vectors = many["model"].encode(list(texts), **options)
        return many["heads"][key]({"sentence_embedding": vectors})["sentence_embedding"].softmax(dim=1).cpu()


PEER = BySentenceTransformers
