"""A save plans what it leaves out; nobody else's state dict or parameters change meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flair.models import TextClassifier
from peft import LoraConfig

from flair_peft.models.save_plan import encode, plan_save
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
