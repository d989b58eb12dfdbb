"""The picture of where an adapter learned, layer by layer and module by module."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from flair_peft.errors import ModelFileError
from flair_peft.inspection.moves import Map, Move
from flair_peft.storage import atomic

_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_MOST_WRITTEN = 200  # numbers in cells; more cannot be read


def draw(measured: Map, path: str | Path, *, title: str) -> None:
    """The file holds two panels, layer × module: how far the matrices moved, and the effective ranks of the moves.

    Raises:
        ModelFileError: matplotlib cannot write a file of this ending.
        SaveError: the file cannot be written.
    """
    layers = sorted({layer for layer, _ in map(_position, measured.moves)})
    modules = list(dict.fromkeys(module for _, module in map(_position, measured.moves)))
    size = (max(7.0, 2.2 * (2 + 0.32 * len(layers))), max(3.0, 1.6 + 0.34 * len(modules)))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    first, second = figure.subplots(1, 2, sharey=True)
    name = "‖ΔW‖ / ‖W‖" if measured.is_relative else "‖ΔW‖"
    norms = {_position(move): move.relative if measured.is_relative else move.norm for move in measured.moves}
    ranks = {_position(move): move.effective_rank for move in measured.moves}
    _draw_panel(figure, first, norms, layers, modules, name)
    _draw_panel(figure, second, ranks, layers, modules, f"effective rank of ΔW (of {_ranks(measured)})")
    figure.suptitle(title.replace("$", r"\$"))
    if measured.notes:
        figure.supxlabel("\n".join(measured.notes).replace("$", r"\$"), fontsize="small")
    if Path(path).is_dir() or not Path(path).suffix:
        raise ModelFileError(
            f"Cannot write '{path}': it is a directory, or its name has no ending. The ending says in which format. "
            "Use .png, .svg or .pdf."
        )
    try:
        form = Path(path).suffix[1:]
        atomic.write_file(Path(path), lambda file: figure.savefig(file, dpi=150, format=form))
    except ValueError as error:
        raise ModelFileError(
            f"Cannot write '{path}': {error}. The ending says in which format. Use .png, .svg or .pdf."
        ) from error


def _draw_panel(
    figure: Figure,
    axes: Axes,
    values: Mapping[tuple[int, str], float | None],
    layers: list[int],
    modules: list[str],
    name: str,
) -> None:
    grid = np.full((len(modules), len(layers)), np.nan)
    for (layer, module), value in values.items():
        grid[modules.index(module), layers.index(layer)] = np.nan if value is None else value
    image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0.0)
    figure.colorbar(image, ax=axes)
    axes.set_title(name)
    axes.set_xlabel("layer")
    axes.set_xticks(range(len(layers)), ["–" if layer < 0 else str(layer) for layer in layers])
    axes.set_yticks(range(len(modules)), [module.replace("$", r"\$") for module in modules])
    if grid.size <= _MOST_WRITTEN:
        _write_numbers(axes, grid)


def _write_numbers(axes: Axes, grid: np.ndarray) -> None:
    brightest = np.nanmax(grid)
    for row, column in np.argwhere(np.isfinite(grid)):
        color = "black" if grid[row, column] > 0.6 * brightest else "white"
        axes.text(column, row, f"{grid[row, column]:.2g}", ha="center", va="center", color=color, fontsize="x-small")


def _ranks(measured: Map) -> str:
    ranks = sorted({move.rank for move in measured.moves})
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _position(move: Move) -> tuple[int, str]:
    """Return the layer of a module, the first number in its name or -1, and what stands behind it."""
    found = _LAYER.search(move.module)
    around = re.match(r"\[\d+\] ", move.module)
    if found is None:
        return -1, move.module
    return int(found.group(1)), (around.group() if around else "") + (move.module[found.end() :] or move.module)
