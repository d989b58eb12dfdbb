"""A save plans what it leaves out; nobody else's state dict or parameters change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.models import TextClassifier
from peft import LoraConfig, PeftConfig, PrefixTuningConfig

from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.embeddings import untrained, vector_probe
from flair_peft.models.save_plan import encode, plan_save
from tests.support.configs import lora
from tests.support.methods import perturb_
from tests.support.round_trip import Factories
from tests.support.zoo import ZOO

Base = Callable[[str], str]


def classifier(base: str) -> TextClassifier:
    factories = Factories(base, LoraConfig(r=4, lora_alpha=12, init_lora_weights=False, target_modules=["query"]))
    model = ZOO["text-classifier"].build(factories.words, factories.documents)
    perturb_(model.embeddings.model, seed=1)
    return model


def test_save_leaves_state_dict_and_parameters_to_others_as_they_are(base: Base, tmp_path: Path) -> None:
    """Whoever asks in the middle of a save, a hook of the head here, gets all weights and no word of the file."""
    model, seen = classifier(base("bert")), list[tuple[set[str], set[str]]]()
    expected = set(model.state_dict()), set(model.embeddings.to_params())

    def ask(*_: Any) -> None:
        seen.append((set(model.state_dict()), set(model.embeddings.to_params())))

    model.decoder.register_forward_hook(ask)
    model.save(tmp_path / "model.pt")
    assert seen
    assert all(found == expected for found in seen)


def test_plan_leaves_out_weights_wherever_a_state_holds_them(base: Base) -> None:
    """A second state dict, of code around the embeddings, lacks the base too, under whatever names it has there."""
    model = classifier(base("bert"))
    original = model._get_state_dict

    def with_another() -> dict[str, Any]:
        renamed = {f"other.{name}": tensor for name, tensor in model.embeddings.state_dict().items()}
        return {**original(), "extra": [{"weights": renamed}]}

    vars(model)["_get_state_dict"] = with_another
    plan = plan_save(model)
    description = encode(plan)
    (part,) = plan.parts
    assert part.stored.left_out
    held = {name.rpartition("other.model.")[2] for name in description.tensors if "other.model." in name}
    assert held == set(part.weights)
    assert not held & part.stored.left_out


def test_plan_completes_the_parameters_of_each_module_that_a_state_holds(base: Base) -> None:
    """Parameters that code around the embeddings copied are known again, and get the module's number and probe."""
    model = classifier(base("bert"))
    original = model._get_state_dict
    vars(model)["_get_state_dict"] = lambda: {**original(), "extra": {**model.embeddings.to_params()}}
    document = encode(plan_save(model)).document
    assert document["extra"]["part"] == document["document_embeddings"]["part"] == 0
    assert document["extra"]["stored_base"]["left_out"]


@pytest.mark.parametrize("is_trained", [True, False], ids=["trained", "as it was made"])
def test_save_runs_the_transformer_once(is_trained: bool, base: Base, tmp_path: Path) -> None:
    """One pass gives the vectors, what the head gives, and what a gradient reaches; nothing runs backwards."""
    model, passes, backwards = classifier(base("bert")), list[str](), list[str]()
    if not is_trained:
        model.embeddings._start = untrained.trained_digests(model.embeddings.model)
    model.embeddings.base_model.register_forward_hook(lambda *_: passes.append("forward"))
    layer = model.embeddings.base_model.encoder.layer[0].output.LayerNorm
    layer.register_full_backward_hook(lambda *_: backwards.append("backward"))
    model.save(tmp_path / "model.pt")
    assert len(passes) == 1
    assert not backwards
    with torch.inference_mode():
        model.save(tmp_path / "again.pt")
    assert len(passes) == 2
    states = [torch.load(tmp_path / name, weights_only=False) for name in ("model.pt", "again.pt")]
    assert states[0]["document_embeddings"]["untrained"] == states[1]["document_embeddings"]["untrained"]
    assert bool(states[0]["document_embeddings"]["untrained"]) is not is_trained


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        *((name, lora(target_modules="all-linear")) for name in ("bert", "t5", "xlnet", "llama")),
        ("bert", PrefixTuningConfig(num_virtual_tokens=2)),
    ],
)
def test_parameters_that_gradients_reach_are_those_that_get_one(
    architecture: str, config: PeftConfig, base: Base
) -> None:
    """The graph leads to the very parameters that torch computes a gradient for; a pooler that nobody reads is none."""
    embeddings = PeftTransformerDocumentEmbeddings(base(architecture), peft_config=config, layers="0,1")
    parameters = {name: p for name, p in embeddings.model.named_parameters() if p.requires_grad}
    states = vector_probe.probe_states(embeddings, vector_probe.probe_ids(embeddings), has_graph=True)
    found = untrained.reached_by_gradients(embeddings.model, parameters, states)
    loss = torch.stack([state.sum() for state in states]).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    assert found == [n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    assert found
