"""What a base is called with: what its forward method takes, whoever put it there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flair_peft.adapter import model_call


class Base(torch.nn.Module):
    """Returns what it was called with."""

    def forward(self, input_ids: Any, attention_mask: Any, use_cache: Any = None) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def test_forward_after_the_method_was_replaced_gives_it_what_it_takes_by_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the class or of one model: what was read of the method before does not stay."""
    base: Any = Base()
    inputs = {"input_ids": 1, "attention_mask": 2}
    assert model_call.forward(base, inputs) == inputs
    assert model_call.without_cache(base) == {"use_cache": False}

    def of_class(self: Any, input_ids: Any) -> dict[str, Any]:
        return {"class": input_ids}

    def of_model(attention_mask: Any, use_mems: Any = None) -> dict[str, Any]:
        return {"model": attention_mask}

    with monkeypatch.context() as patch:
        patch.setattr(Base, "forward", of_class)
        assert model_call.forward(base, inputs) == {"class": 1}
        assert model_call.without_cache(base) == {}
        patch.setattr(base, "forward", of_model)
        assert model_call.forward(base, inputs) == {"model": 2}
        assert model_call.without_cache(base) == {"use_mems": False}
        assert model_call.forward(Base(), inputs) == {"class": 1}
    assert model_call.forward(base, inputs) == inputs
