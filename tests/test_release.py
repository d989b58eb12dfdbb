"""What a release says of itself: its version, its citation, the files in its wheel, the forms for reports."""

from __future__ import annotations

import configparser
import re
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import flair_peft
from tests.support import pages

ROOT = Path(__file__).parents[1]
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*_*.yml"))


def read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def settings() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(ROOT / "setup.cfg", encoding="utf-8")
    return found


def test_citation_names_this_version_and_the_authors_of_the_licence() -> None:
    """Whoever cites cites what is installed; the four fields that version 1.2.0 of the format wants are there."""
    citation = read_yaml(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["version"] == flair_peft.__version__
    authors = [author["name"] for author in citation["authors"]]
    assert authors == [settings()["metadata"]["author"]]
    assert authors[0] in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert citation["license"] == settings()["metadata"]["license"]


def test_changelog_has_a_section_for_each_version_that_has_regression_files() -> None:
    """A version is written down before it is released."""
    sections = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    older = {folder.name for folder in (ROOT / "tests" / "regression" / "files").iterdir()} - {flair_peft.__version__}
    assert older <= set(sections)
    assert sections[0] in ("Unreleased", flair_peft.__version__)


def test_wheel_holds_every_file_of_the_package() -> None:
    """What is no module has to be named: without it, an installed server has no page, though all tests here pass."""
    patterns = [each.strip() for each in settings()["options.package_data"]["flair_peft"].split(",")]
    package = Path(flair_peft.__file__).parent
    others = [path.relative_to(package) for path in package.rglob("*") if path.is_file()]
    others = [path for path in others if path.suffix != ".py" and "__pycache__" not in path.parts]
    assert others
    left_out = [str(path) for path in others if not any(fnmatch(str(path), pattern) for pattern in patterns)]
    assert not left_out


def test_classifiers_are_the_versions_of_python_that_install() -> None:
    """Each version that the requirement admits is said, and tried by a session of nox."""
    said = re.findall(r"Python :: (3\.\d+)$", settings()["metadata"]["classifiers"], flags=re.MULTILINE)
    low, high = re.fullmatch(r">=3\.(\d+),<3\.(\d+)", settings()["options"]["python_requires"]).groups()  # type: ignore[union-attr]
    assert said == [f"3.{minor}" for minor in range(int(low), int(high))]
    assert pages.constant("noxfile.py", "PYTHONS") == said


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_form_asks_for_something(path: Path) -> None:
    """A form has a name, a description and fields with labels, of which one at least has to be filled in."""
    form = read_yaml(path)
    assert form["name"]
    assert form["description"]
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert all(field["attributes"]["label"] for field in fields)
    assert len({field["id"] for field in fields}) == len(fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_form_for_bugs_asks_for_versions_and_for_what_inspect_prints() -> None:
    """Both are commands that there are; ``tests/cli`` says what they print."""
    labels = [
        field["attributes"].get("label", "")
        for field in read_yaml(ROOT / ".github/ISSUE_TEMPLATE/bug_report.yml")["body"]
    ]
    assert any("`flair-peft --version`" in label for label in labels)
    assert any("`flair-peft inspect MODEL`" in label for label in labels)


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_form_leads_to_pages_that_exist(path: Path) -> None:
    """Links are those of a repository's page for new issues."""
    links = re.findall(r"\]\(\.\./blob/HEAD/([^)#]+)", path.read_text(encoding="utf-8"))
    assert links
    assert all((ROOT / link).is_file() for link in links)
