"""The plot shows what the full matrices of the live model show."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flair.nn import Model
from peft import IA3Config
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import flair_peft
from flair_peft.errors import (
    BaseMismatchError,
    BaseModelNotFoundError,
    MissingConfigError,
    ModelFileError,
    SaveError,
    UnsupportedMethodError,
)
from flair_peft.inspection import plot
from flair_peft.inspection.moves import Map, Move, effective_rank, measure, singular_values
from flair_peft.inspection.plot import draw
from flair_peft.inspection.report import inspect
from tests.support.configs import lora
from tests.support.files import save_as, save_stock
from tests.support.models import CLASSIFIER, make

Base = Callable[[str], str]


def full_moves(model: Model, base: str) -> dict[str, tuple[float, float, float]]:
    """Return module → ‖ΔW‖, ‖W‖ and effective rank, from PEFT's own full ΔW and numpy's decomposition of it."""
    embeddings = next(m for m in model.modules() if isinstance(m, flair_peft.PeftTransformerEmbeddings))
    weights = AutoModel.from_pretrained(base).state_dict()
    found = {}
    for name, layer in embeddings.model.named_modules():
        if hasattr(layer, "get_delta_weight"):
            module = name.removeprefix("base_model.model.")
            delta = layer.get_delta_weight("default").detach().double().numpy()
            sigmas = np.linalg.svd(delta, compute_uv=False)
            shares = sigmas[sigmas > 1e-9 * sigmas.max()] / sigmas.sum()
            rank = math.exp(-(shares * np.log(shares)).sum())
            weight = weights[f"{module}.weight"].double().numpy()
            found[module] = (np.linalg.norm(delta), np.linalg.norm(weight), rank)
    return found


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("bert", {}),
    "rsLoRA": ("bert", {"use_rslora": True}),
    "patterns": (
        "bert",
        {"rank_pattern": {"layer.1.attention.self.query": 7}, "alpha_pattern": {r".*layer\.0.*value": 40}},
    ),
    "negative": ("bert", {"lora_alpha": -3}),
    "embedding": ("bert", {"target_modules": ["word_embeddings", "query"]}),
    "rank beyond the matrix": ("bert", {"r": 40}),
    "all linear": ("roberta", {"target_modules": "all-linear"}),
    "Conv1D": ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "DoRA": ("bert", {"use_dora": True}),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kind", ["file", "whole-directory"])
def test_moves_are_those_of_the_full_matrices(name: str, kind: str, base: Base, tmp_path: Path) -> None:
    """Norms and effective ranks from the factors agree with PEFT's ΔW, for every scale and every kind of layer."""
    architecture, settings = CONFIGS[name]
    model = make(CLASSIFIER, base(architecture), lora(**settings))
    measured = measure(inspect(save_as(kind, model, tmp_path)))
    expected = full_moves(model, base(architecture))
    assert {move.module for move in measured.moves} == expected.keys()
    assert measured.is_relative
    for move in measured.moves:
        norm, base_norm, rank = expected[move.module]
        assert move.norm == pytest.approx(norm, rel=1e-5)
        # Where a file holds the base, the embedding matrix has the row for the context separator too.
        assert move.base_norm == pytest.approx(base_norm, rel=1e-4)
        assert move.relative == pytest.approx(norm / base_norm, rel=1e-4)
        assert move.effective_rank == pytest.approx(rank, rel=1e-4)
    assert bool(measured.notes) == (name == "DoRA")


def test_effective_rank_of_known_spectra_is_known() -> None:
    """r equal directions count r, one counts 1, none counts 0."""
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(4)) == 0


@pytest.mark.parametrize("shape", [(3, 20, 30), (30, 20, 10), (1, 1, 1), (4, 4, 4)], ids=str)
def test_singular_values_of_factors_are_those_of_their_product(shape: tuple[int, int, int]) -> None:
    """numpy's decomposition of the whole product is the oracle."""
    rank, inside, outside = shape
    first, second = torch.randn(rank, inside), torch.randn(outside, rank)
    expected = np.linalg.svd((second.double() @ first.double()).numpy(), compute_uv=False)
    found = singular_values(first, second).numpy()
    assert found == pytest.approx(expected[: len(found)], rel=1e-6, abs=1e-9)
    assert expected[len(found) :] == pytest.approx(0.0, abs=1e-6)


def test_moves_without_the_base_are_absolute_and_say_so(base: Base, tmp_path: Path) -> None:
    """Where the base is gone there is no share of it; where it is now can be said."""
    moved = tmp_path / "moved"
    shutil.copytree(base("bert"), tmp_path / "base")
    path = save_as("file", make(CLASSIFIER, str(tmp_path / "base"), lora()), tmp_path)
    with_base = measure(inspect(path))
    (tmp_path / "base").rename(moved)
    without = measure(inspect(path))
    assert not without.is_relative
    assert "not at hand" in without.notes[0]
    assert [move.norm for move in without.moves] == [move.norm for move in with_base.moves]
    assert measure(inspect(path), base_model=str(moved)).moves == with_base.moves
    with pytest.raises(BaseModelNotFoundError, match="nowhere"):
        measure(inspect(path), base_model=str(tmp_path / "nowhere"))


def test_moves_on_a_base_without_a_pooler_leave_only_that_cell_empty(base: Base, tmp_path: Path) -> None:
    """A matrix that is random in the model has nothing to be compared with, and a note says so."""
    config = lora(target_modules=["query", "pooler.dense"])
    measured = measure(inspect(save_as("file", make(CLASSIFIER, base("bert-mlm"), config), tmp_path)))
    assert measured.is_relative
    assert [move.module for move in measured.moves if move.base_norm is None] == ["pooler.dense"]
    (note,) = measured.notes
    assert note.startswith(
        "no weight of 'pooler.dense' in floating point is in the base's file: the picture leaves out"
    )
    draw(measured, tmp_path / "x.png", title="x")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_moves_on_a_quantised_base_have_no_relative_size(dtype: torch.dtype, base: Base, tmp_path: Path) -> None:
    """Without its scales, which stand elsewhere, a weight has no norm; one in four bits has another shape, too."""
    path = save_as("file", make(CLASSIFIER, base("bert"), lora()), tmp_path)
    folder = tmp_path / "base"
    shutil.copytree(base("bert"), folder)
    weights = load_file(folder / "model.safetensors")
    quantised = {name: tensor.clamp(0, 1).to(dtype) for name, tensor in weights.items() if "query.weight" in name}
    if dtype == torch.uint8:
        quantised = {name: tensor.reshape(-1, 2)[:, :1].contiguous() for name, tensor in quantised.items()}
    save_file({**weights, **quantised}, folder / "model.safetensors", {"format": "pt"})
    measured = measure(inspect(path), base_model=str(folder))
    lacking = {f"{move.module}.weight" for move in measured.moves if move.base_norm is None}
    assert {name.removeprefix("bert.") for name in quantised} == lacking
    assert len(lacking) < len(measured.moves)


@pytest.mark.parametrize("shards", ["index", "bin"])
def test_moves_read_bases_in_shards_and_pickles(shards: str, base: Base, tmp_path: Path) -> None:
    """Large bases lie in several files, old ones in pickles; neither is loaded."""
    model = make(CLASSIFIER, base("bert"), lora())
    path = save_as("file", model, tmp_path)
    bare = AutoModel.from_pretrained(base("bert"))
    if shards == "index":
        bare.save_pretrained(tmp_path / "base", max_shard_size="40KB")
        assert (tmp_path / "base" / "model.safetensors.index.json").is_file()
    else:
        (tmp_path / "base").mkdir()
        torch.save({f"bert.{k}": v for k, v in bare.state_dict().items()}, tmp_path / "base" / "pytorch_model.bin")
    assert measure(inspect(path), base_model=str(tmp_path / "base")).moves == measure(inspect(path)).moves


def test_moves_of_several_adapters_are_told_apart(base: Base, tmp_path: Path) -> None:
    """Each adapter of a stack has rows of its own."""
    from flair.embeddings import StackedEmbeddings

    from flair_peft import PeftTransformerWordEmbeddings
    from tests.support.zoo import ZOO

    def words(**options: Any) -> Any:
        made = [PeftTransformerWordEmbeddings(base("bert"), peft_config=lora(r=r), **options) for r in (2, 3)]
        return StackedEmbeddings(made)

    measured = measure(inspect(save_as("file", ZOO["sequence-tagger"].build(words, words), tmp_path)))
    assert {(move.module[:4], move.rank) for move in measured.moves} == {("[1] ", 2), ("[2] ", 3)}


def test_moves_of_other_methods_are_refused_by_name(base: Base, tmp_path: Path) -> None:
    """What is no pair of factors is not plotted as one."""
    config = IA3Config(target_modules=["key"], feedforward_modules=[], init_ia3_weights=False)
    path = save_as("file", make(CLASSIFIER, base("bert"), config), tmp_path)
    with pytest.raises(UnsupportedMethodError, match="IA3"):
        measure(inspect(path))


def test_moves_of_a_stock_file_are_refused(base: Base, tmp_path: Path) -> None:
    """Without the config there is no scale; without an adapter there is nothing."""
    flair_peft.uninstall()
    model = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    with pytest.raises(MissingConfigError, match="lora_alpha"):
        measure(inspect(save_stock(model, tmp_path / "x.pt")))
    plain = save_stock(make(CLASSIFIER, base("bert"), None, is_stock=True), tmp_path / "y.pt")
    with pytest.raises(ModelFileError, match="no adapter"):
        measure(inspect(plain))


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_drawing_is_an_image_of_the_format_that_its_name_asks_for(ending: str, start: bytes, tmp_path: Path) -> None:
    """Names with characters that matplotlib reads as formulas are drawn as they are."""
    moves = [
        Move(f"encoder.layer.{layer}.{module}", 0.1 * layer, 2.0, 1.5, 4)
        for layer in range(3)
        for module in ("attention.query", "odd$x^2$name")
    ]
    notes = ("a note with $ and _",)
    draw(Map((*moves, Move("pooler", 1.0, 2.0, 3.0, 8)), notes), tmp_path / f"x.{ending}", title="my_$model")
    assert (tmp_path / f"x.{ending}").read_bytes().startswith(start)


def test_drawing_of_an_unknown_format_is_refused(tmp_path: Path) -> None:
    """The error names the endings that work."""
    with pytest.raises(ModelFileError, match=r"\.png"):
        draw(Map((Move("a", 1.0, None, 1.0, 2),), ()), tmp_path / "x.doc", title="x")


@pytest.mark.parametrize("name", ["folder", "image"])
def test_drawing_to_a_folder_or_without_an_ending_is_refused(name: str, tmp_path: Path) -> None:
    """Nothing is written beside what was asked for."""
    (tmp_path / "folder").mkdir()
    with pytest.raises(ModelFileError, match=r"Use \.png"):
        draw(Map((Move("layer.0.query", 1.0, None, 1.0, 2),), ()), tmp_path / name, title="x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_plot_into_a_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    """The message names the file, and what to make first."""
    with pytest.raises(SaveError, match=r"absent/x\.png.*Make the folder first"):
        draw(Map((Move("layer.0.query", 1.0, None, 1.0, 2),), ()), tmp_path / "absent" / "x.png", title="x")


def test_moves_against_a_base_that_the_user_names_say_that_it_is_not_checked(base: Base, tmp_path: Path) -> None:
    """Another model of the same shape is drawn with a word, and one of another shape is refused."""
    model = make(CLASSIFIER, base("bert"), lora(target_modules=["query"]))
    found = inspect(save_as("directory", model, tmp_path))
    (note,) = measure(found, base_model=base("roberta")).notes
    assert "was not checked" in note
    assert not measure(found).notes
    weights = load_file(Path(base("bert")) / "model.safetensors")
    (tmp_path / "other").mkdir()
    smaller = {name: weight[:16].clone() for name, weight in weights.items()}
    save_file(smaller, tmp_path / "other" / "model.safetensors")
    with pytest.raises(BaseMismatchError, match="has the shape"):
        measure(found, base_model=str(tmp_path / "other"))


def test_drawing_puts_each_move_in_its_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are modules and columns are layers, in both panels."""
    grids = []
    monkeypatch.setattr(plot, "_write_numbers", lambda axes, grid: grids.append(grid))
    moves = (Move("e.0.q", 1.0, 2.0, 3.0, 4), Move("e.1.v", 3.0, 2.0, 1.0, 4))
    draw(Map(moves, ()), tmp_path / "x.png", title="x")
    assert grids[0] == pytest.approx(np.array([[0.5, np.nan], [np.nan, 1.5]]), nan_ok=True)
    assert grids[1] == pytest.approx(np.array([[3.0, np.nan], [np.nan, 1.0]]), nan_ok=True)
