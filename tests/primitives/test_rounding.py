"""Products that are off by a last place: by how much, where, and for whom."""

from __future__ import annotations

import threading

import pytest
import torch

from flair_peft.primitives.rounding import rounded_otherwise


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_are_off_by_at_most_a_last_place(dtype: str) -> None:
    """In the precision of the one asked for, also where the product itself is finer; each draw is another."""
    linear, features = torch.nn.Linear(8, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    linear.requires_grad_(False)
    exact = linear(features)
    others = [*rounded_otherwise(lambda: linear(features), dtype)]
    off = [float((other / exact - 1).abs().max()) for other in others]
    last_place = torch.finfo(getattr(torch, dtype)).eps
    assert all(last_place / 2 < each <= last_place for each in off)
    assert len(set(off)) == len(off)


def test_random_numbers_of_the_process_are_left_alone() -> None:
    """What a user's seed gives does not depend on what was measured."""
    linear, features = torch.nn.Linear(8, 8), torch.randn(4, 8)
    before = torch.random.get_rng_state()
    assert len([*rounded_otherwise(lambda: linear(features), "bfloat16")]) > 1
    assert torch.equal(torch.random.get_rng_state(), before)


def test_only_products_of_this_thread_are_others() -> None:
    """Another thread may predict with the same base meanwhile, and between two draws this one does, too."""
    linear, features = torch.nn.Linear(8, 8), torch.randn(4, 8)
    exact = linear(features)
    elsewhere: list[torch.Tensor] = []

    def give() -> torch.Tensor:
        thread = threading.Thread(target=lambda: elsewhere.append(linear(features)))
        thread.start()
        thread.join()
        return linear(features)

    for other in rounded_otherwise(give, "bfloat16"):
        assert not torch.equal(other, exact)
        assert torch.equal(linear(features), exact)
    assert elsewhere
    assert all(torch.equal(each, exact) for each in elsewhere)
