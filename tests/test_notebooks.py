"""The notebooks of the examples: they run in new kernels, and the pages that are committed show what they print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("nbclient", reason="the notebooks need the extra 'examples'")
pytest.importorskip("jupytext", reason="the notebooks need the extra 'examples'")

import jupytext
import nbformat
from nbformat import NotebookNode

from tests.support import notebooks

PAGES = [source.with_suffix(".ipynb") for source in notebooks.SOURCES]
LARGEST_PICTURE = 60_000  # bytes, before they are written in base64
# The one message that belongs on a page: it tells of the head that came with an adapter.
TOLD = re.compile(r"2 tensors of 'out/adapter' belong to no embeddings: [^\n]*\n")

# These read the scores of their trainings from files behind whose end Flair writes: all cells are run twice.
READ_BACK = {"1_text_classification", "2_ner_with_document_context"}

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def read(page: Path) -> NotebookNode:
    return nbformat.read(page, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@each_page
def test_notebook_is_its_source_executed_from_top_to_bottom(page: Path) -> None:
    """The cells are those of the source, run once, in order, in one kernel."""
    notebook, source = read(page), jupytext.read(page.with_suffix(".py"))
    nbformat.validate(notebook)
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in source.cells]
    counts = [cell.execution_count for cell in code_cells(notebook)]
    assert counts == list(range(1, len(counts) + 1))


@each_page
def test_notebook_shows_no_errors_no_warnings_and_no_paths_of_a_machine(page: Path) -> None:
    """A page is for readers: results alone, small pictures, nothing that can only be shown where it was made."""
    notebook = read(page)
    shown = "".join(notebooks.texts(notebook))
    assert shown
    assert "error: " not in shown
    assert not TOLD.sub("", notebooks.warned(notebook))
    assert not re.findall(r"(?<![\w.…/])/[\w.-]+/[\w./-]*", shown)
    for cell in code_cells(notebook):
        for output in cell.outputs:
            assert not [kind for kind in output.get("data", {}) if "widget" in kind]
            assert len(output.get("data", {}).get("image/png", "")) * 3 / 4 < LARGEST_PICTURE


@pytest.mark.matrix
@each_page
def test_notebook_prints_what_its_page_shows(page: Path) -> None:
    """Run anew, every cell prints the same but for figures that vary, and scores are near those of the page."""
    expected = notebooks.texts(read(page))
    for notebook in notebooks.execute_repeatedly(page.with_suffix(".py"), times=2 if page.stem in READ_BACK else 1):
        found = notebooks.texts(notebook)
        assert list(map(notebooks.masked, found)) == list(map(notebooks.masked, expected))
        assert [notebooks.scores(text) for text in found] == [
            pytest.approx(notebooks.scores(text), abs=notebooks.SCORE_TOLERANCE) for text in expected
        ]


def test_notebooks_are_compared_by_all_but_their_figures() -> None:
    """The comparison sees another word and another score, and no other number."""
    assert notebooks.masked("3.63 MB before,  0.31 MB") == notebooks.masked("12.4 MB before, 0.3 MB")
    assert notebooks.masked("3.63 MB before") != notebooks.masked("3.63 MB after")
    assert notebooks.scores("accuracy 0.937, 12.345 MB, 1.000, 0.9") == [0.937, 1.0]


def test_notebooks_have_a_page_each() -> None:
    """No page lacks its source, and no source its page."""
    assert PAGES
    assert sorted(notebooks.FOLDER.glob("*.ipynb")) == PAGES
    assert {page.stem for page in PAGES if "loss.tsv" in page.with_suffix(".py").read_text()} == READ_BACK
