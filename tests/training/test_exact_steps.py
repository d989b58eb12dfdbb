"""What trains in half precision learns as much as it would in fp32."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from flair.models import TextClassifier
from peft import LNTuningConfig, PeftConfig

import flair_peft
from flair_peft.training.exact_steps import exact_steps
from tests.support.configs import lora
from tests.support.opinions import classifier, train

Base = Callable[[str], str]

OPTIMISERS: dict[str, Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]] = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
    "AdamW, foreach": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
    "SGD with momentum": lambda parameters: torch.optim.SGD(parameters, lr=1e-4, momentum=0.9),
    "Adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=1e-3),
    "with a state from the start": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3),
    "with a state from the start, fused": lambda parameters: torch.optim.Adagrad(parameters, lr=1e-3, fused=True),
    "that skips its first step": lambda parameters: Skipping(parameters, lr=1e-3),
    "made of another": lambda parameters: WithMore(parameters, lr=1e-3),
    "around another": lambda parameters: Around(torch.optim.AdamW(parameters, lr=1e-3)),
    "of bitsandbytes": lambda parameters: bitsandbytes.optim.AdamW32bit(parameters, lr=1e-3),
}


class Skipping(torch.optim.AdamW):
    """Does nothing in its first step, as optimisers do that see infinite gradients."""

    steps = 0

    def step(self, closure: Any = None) -> None:
        self.steps += 1
        if self.steps > 1:
            super().step(closure)


class WithMore(torch.optim.AdamW):
    """Does more after the step of its class, whose own hooks run in between."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            [parameter.mul_(1 - 1e-5) for parameter in group["params"]]


class Around(torch.optim.Optimizer):
    """Is made as many published wrappers are: without the initialisation of its class."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups, self.state = inner, inner.param_groups, inner.state
        self.defaults = inner.defaults

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


# Name → method whose parameters have the base's dtype, and what of these is asked.
NARROW: dict[str, tuple[Callable[[], PeftConfig], str]] = {
    "norms": (lambda: LNTuningConfig(target_modules=["LayerNorm"]), "ln_tuning_layers"),
    "copies of modules": (lambda: lora(modules_to_save=["LayerNorm"]), "modules_to_save"),
    "biases": (lambda: lora(bias="all"), "bias"),
}


def take_step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    """Take a step with gradients that half precision can hold, and so the same in fp32."""
    torch.manual_seed(seed)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            gradient = torch.randn(parameter.shape).add_(1).bfloat16()
            parameter.grad = gradient.to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPTIMISERS)
def test_parameter_in_half_precision_is_the_one_in_fp32_rounded(name: str, dtype: torch.dtype) -> None:
    """After each step; where the values were changed in between, these go on."""
    narrow = [torch.nn.Parameter(torch.ones(4, 64, dtype=dtype)), torch.nn.Parameter(torch.ones(64, dtype=dtype))]
    wide = [torch.nn.Parameter(parameter.detach().float()) for parameter in narrow]
    ours, plain = OPTIMISERS[name](narrow), OPTIMISERS[name](wide)
    places = [parameter.data_ptr() for parameter in narrow]
    with exact_steps(ours):
        for seed in range(2):
            for step in range(20):
                take_step(ours, 100 * seed + step)
                take_step(plain, 100 * seed + step)
                assert all(torch.equal(p, q.to(dtype)) for p, q in zip(narrow, wide, strict=True))
            assert not torch.equal(narrow[0], torch.full_like(narrow[0], 1 + seed))
            with torch.no_grad():
                [parameter.fill_(2) for parameter in (*narrow, *wide)]
    assert [parameter.data_ptr() for parameter in narrow] == places
    assert {parameter.dtype for parameter in narrow} == {dtype}


def test_what_an_optimiser_cannot_hold_is_lost_without_exact_steps() -> None:
    """As torch leaves it: shows once it does not."""
    parameter = torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    for seed in range(40):
        take_step(optimizer, seed)
    assert torch.equal(parameter, torch.ones_like(parameter))


def test_entry_that_is_masked_leaves_the_others_their_sums() -> None:
    """Each entry goes on from its own value: who prunes a weight after each step learns the rest as in fp32."""
    narrow, wide = (torch.nn.Parameter(torch.ones(64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    ours, plain = torch.optim.AdamW([narrow], lr=1e-4), torch.optim.AdamW([wide], lr=1e-4)
    with exact_steps(ours):
        for seed in range(60):
            for optimizer, parameter in ((ours, narrow), (plain, wide)):
                take_step(optimizer, seed)
                with torch.no_grad():
                    parameter[0] = 0
    assert torch.equal(narrow, wide.bfloat16())
    assert narrow[0] == 0
    assert (narrow[1:] != 1).any()


def test_optimiser_that_is_set_back_goes_on_from_there() -> None:
    """torch casts what it reads to the dtype of the parameter."""
    narrow, wide = (torch.nn.Parameter(torch.ones(64, dtype=dtype)) for dtype in (torch.bfloat16, torch.float32))
    found = []
    for parameter in (narrow, wide):
        optimizer = torch.optim.AdamW([parameter], lr=1e-2)
        with exact_steps(optimizer):
            take_step(optimizer, 0)
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            take_step(optimizer, 1)
        found.append(parameter.detach().float())
    assert torch.allclose(*found, atol=4e-3)


def test_step_with_a_closure_computes_with_the_parameters_as_they_are() -> None:
    """Losses are of a model in its own dtype."""
    parameter = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer, seen = torch.optim.SGD([parameter], lr=0.5), []

    def loss() -> torch.Tensor:
        seen.append(parameter.dtype)
        return parameter.sum()

    parameter.grad = torch.ones_like(parameter)
    with exact_steps(optimizer):
        optimizer.step(loss)
    assert seen == [torch.bfloat16]
    assert (parameter == 0.5).all()


def test_optimiser_without_narrow_parameters_is_left_alone() -> None:
    """Whatever it is: it may have no hooks, or no step that can be set."""

    class Plain:
        __slots__ = ("param_groups",)

    optimizer = Plain()
    optimizer.param_groups = [{"params": [torch.nn.Parameter(torch.ones(4))]}]
    with exact_steps(optimizer):
        assert not hasattr(optimizer, "step")


class Interrupted(torch.optim.SGD):
    """Is stopped by its user in the middle of a step."""

    def step(self, closure: Any = None) -> None:
        assert {parameter.dtype for parameter in self.param_groups[0]["params"]} == {torch.float32}
        super().step(closure)
        raise KeyboardInterrupt


def test_step_that_is_interrupted_leaves_parameters_in_their_dtype() -> None:
    """Flair saves a model whose training was interrupted."""
    parameter = torch.nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    optimizer = Interrupted([parameter], lr=0.5)
    with pytest.raises(KeyboardInterrupt), exact_steps(optimizer):
        take_step(optimizer, 0)
    assert parameter.dtype == parameter.grad.dtype == torch.bfloat16
    assert (parameter != 1).all()


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
@pytest.mark.parametrize("name", NARROW)
def test_what_has_the_dtype_of_the_base_learns_as_in_fp32(name: str, base: Base, tmp_path: Path) -> None:
    """Steps far below the spacing of bf16 add up: each parameter is where fp32 has it, to that spacing."""
    config, part = NARROW[name]
    moved: dict[str, dict[str, torch.Tensor]] = {}
    for dtype in ("float32", "bfloat16"):
        model = classifier(base("bert"), peft_config=config(), dtype=dtype)
        learning = {n: p for n, p in model.named_parameters() if p.requires_grad and part in n and "embeddings" in n}
        with torch.no_grad():
            [parameter.fill_(1) for parameter in learning.values()]  # where biases hide the spacing near 0
        before = {name: parameter.detach().float().clone() for name, parameter in learning.items()}
        train(model, tmp_path / dtype, learning_rate=1e-3, max_epochs=10)
        moved[dtype] = {name: parameter.detach().float() - before[name] for name, parameter in learning.items()}
    assert sum(map(torch.Tensor.numel, moved["bfloat16"].values())) > 100
    wide, narrow = (torch.cat([d.flatten() for _, d in sorted(moved[t].items())]) for t in ("float32", "bfloat16"))
    far = wide.abs() > 6e-3  # more than one and a half spacings next to one
    assert far.sum() > 10
    assert (narrow[far].sign() == wide[far].sign()).float().mean() > 0.9
    assert (narrow != 0)[far].float().mean() > 0.9


def test_model_in_half_precision_comes_back_as_it_was_trained(base: Base, tmp_path: Path) -> None:
    """Files hold what the live model computes with; a copy of it, too."""
    config, _ = NARROW["copies of modules"]
    model = classifier(base("bert"), peft_config=config(), dtype="bfloat16")
    train(model, tmp_path / "training")
    flair_peft.save_pretrained(model, tmp_path / "model")
    expected = {n: p.detach().clone() for n, p in model.state_dict().items()}
    files = [flair_peft.from_pretrained(tmp_path / "model"), TextClassifier.load(tmp_path / "training/final-model.pt")]
    for again in (*files, copy.deepcopy(model)):
        found = again.state_dict()
        assert not [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


def test_training_that_is_interrupted_in_a_step_is_saved_in_its_dtype(base: Base, tmp_path: Path) -> None:
    """Flair saves it while its trainer's contexts are open."""
    config, part = NARROW["copies of modules"]
    model = classifier(base("bert"), peft_config=config(), dtype="bfloat16")
    narrow = {name for name, p in model.named_parameters() if part in name}

    class Stopped(torch.optim.AdamW):
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            raise KeyboardInterrupt

    train(model, tmp_path, optimizer=Stopped)
    assert {p.dtype for name, p in model.named_parameters() if name in narrow} == {torch.bfloat16}
    found = TextClassifier.load(tmp_path / "final-model.pt").state_dict()
    assert {found[name].dtype for name in narrow} == {torch.bfloat16}
