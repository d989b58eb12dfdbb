"""Run the notebooks of ``examples/notebooks`` in new kernels, and write what they print beside their code.

``python -m tests.support.notebooks`` writes all of them, ``python -m tests.support.notebooks 2 5`` those whose names
begin so; with ``--text``, only the text between the cells is copied, where no code has changed. Their sources are the
``.py`` files in that folder, in jupytext's percent format; the ``.ipynb`` files are what comes of them.
``tests/test_notebooks.py`` runs them in the same way and compares.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import re
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jupytext
import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "notebooks"
SOURCES = sorted(FOLDER.glob("*.py"))
SECONDS = 600  # of one cell, on a machine that others use too

# What no reader of the page needs: bars are for those who wait, and what is said here comes from other packages.
_NOISE = re.compile(r"(?:it|B)/s\]|s/it\]|^Failed to load CPU gemm_4bit_forward from kernels-community")
_WARNINGS = "ignore:`torch.cuda.amp.GradScaler:FutureWarning,ignore:IProgress not found"

# A score, such as 0.937, may differ by this much on another machine; any other number may be another one.
SCORE_TOLERANCE = 0.1
_SCORE = re.compile(r"(?<![\d.])[01]\.\d{3}(?!\d)")
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?")


def execute(source: Path) -> nbformat.NotebookNode:
    """Return the notebook of a source with what it prints in a new kernel."""
    (notebook,) = execute_repeatedly(source, times=1)
    return notebook


def execute_repeatedly(source: Path, *, times: int) -> list[nbformat.NotebookNode]:
    """Return the notebook of a source with what it prints when all its cells are run so many times in one new kernel.

    The kernel works in a folder that lies beside a link to ``resources`` as the notebooks do, and has no settings or
    history of the user's.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    notebooks = [_unrun(source) for _ in range(times)]
    everything = notebooks[0].copy()
    everything.cells = [cell for notebook in notebooks for cell in notebook.cells]
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = root / "examples" / "notebooks"
        folder.mkdir(parents=True)
        (root / "home").mkdir()
        (root / "resources").symlink_to(ROOT / "resources", target_is_directory=True)
        client = NotebookClient(
            everything,
            timeout=SECONDS,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": str(folder)}},
        )
        client.execute(env=_environment(root / "home"))
    for cell in everything.cells:
        if cell.cell_type == "code":
            cell.outputs = list(_quiet(cell.outputs, folder=temporary))
    return notebooks


def _unrun(source: Path) -> nbformat.NotebookNode:
    notebook = jupytext.read(source)
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells, start=1):
        cell.id, cell.metadata = f"cell-{number}", {}
    return notebook


def _environment(home: Path) -> dict[str, str]:
    scripts = sysconfig.get_path("scripts")
    return {
        **os.environ,
        "FLAIR_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
        "IPYTHONDIR": str(home / "ipython"),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([scripts, os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": _WARNINGS,
    }


def _quiet(outputs: list[Any], *, folder: str) -> Iterator[Any]:
    """Yield the outputs without noise and without the name of the temporary folder; pictures are made smaller."""
    for output in _joined(outputs):
        if output.output_type == "stream":
            lines = re.split(r"(?<=[\n\r])", output.text.replace("\r\n", "\n"))
            # What ends in a carriage return is overwritten on a terminal: bars, and the blanks that erase them.
            kept = (line for line in lines if not line.endswith("\r") and not _NOISE.search(line))
            output.text = "".join(kept).replace(folder, "/…")
            if not output.text.strip():
                continue
        elif "image/png" in output.get("data", {}):
            output.data["image/png"] = _small(output.data["image/png"])
        yield output


def _joined(outputs: list[Any]) -> list[Any]:
    """Return the outputs; what one stream gives in several pieces, whose number is up to chance, is one of them."""
    joined: list[Any] = []
    for output in outputs:
        is_next = bool(joined) and output.output_type == "stream" and joined[-1].get("name") == output.name
        if is_next:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _small(picture: str) -> str:
    """Return the picture with a palette of 64 colours, which is a third of its size; both are PNG in base64."""
    with Image.open(io.BytesIO(base64.b64decode(picture))) as opened, io.BytesIO() as written:
        opened.convert("RGB").quantize(64).save(written, "PNG", optimize=True)
        return base64.b64encode(written.getvalue()).decode()


def warned(notebook: nbformat.NotebookNode) -> str:
    """Return what the notebook wrote to the standard error."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return "".join(output.text for output in outputs if output.get("name") == "stderr")


def texts(notebook: nbformat.NotebookNode) -> list[str]:
    """Return what each code cell printed; a picture is only named."""
    return ["".join(map(_text, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"]


def _text(output: Any) -> str:
    if output.output_type == "stream":
        return output.text
    if output.output_type == "error":
        return f"error: {output.ename}: {output.evalue}"
    return f"shown: {sorted(output.data)} " + ("" if "image/png" in output.data else output.data.get("text/plain", ""))


def masked(text: str) -> str:
    """Return the text with each number replaced, and runs of blanks, which depend on the width of numbers, as one."""
    return re.sub(r"[ \t]+", " ", _NUMBER.sub("#", text))


def scores(text: str) -> list[float]:
    """Return the numbers in the text that are written as scores are: 0.937."""
    return [float(found) for found in _SCORE.findall(text)]


def with_text_of(page: Path, source: Path) -> nbformat.NotebookNode:
    """Return the page with the text of the source, and what its code printed.

    Raises:
        SystemExit: the code is another one than on the page.
    """
    notebook, new = nbformat.read(page, as_version=4), jupytext.read(source)
    code = [[cell.source for cell in one.cells if cell.cell_type == "code"] for one in (notebook, new)]
    if code[0] != code[1] or len(notebook.cells) != len(new.cells):
        raise SystemExit(f"{page.name}: its code has changed, so it has to run anew. Leave out --text.")
    for cell, found in zip(notebook.cells, new.cells, strict=True):
        cell.source = found.source
    return notebook


def main() -> None:
    """Write the notebooks that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="beginnings of names; none for all")
    parser.add_argument("--text", action="store_true", help="run nothing: only the text has changed")
    arguments = parser.parse_args()
    names = tuple(arguments.names) or ("",)
    for source in (source for source in SOURCES if source.name.startswith(names)):
        start, path = time.perf_counter(), source.with_suffix(".ipynb")
        notebook = with_text_of(path, source) if arguments.text else execute(source)
        nbformat.write(notebook, path)
        sys.stderr.write(f"{path.name}: {time.perf_counter() - start:.0f} s, {path.stat().st_size / 1e3:.0f} kB\n")


if __name__ == "__main__":
    main()
