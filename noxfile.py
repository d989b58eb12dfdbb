"""Checks in virtual environments of their own: ``nox -s lint tests docs``; what follows ``--`` goes to pytest.

Interpreters that are not installed are skipped. torch keeps the version of the constraints in every session: on a
machine without a GPU, another one may come with gigabytes for CUDA.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import nox

CONSTRAINTS = Path("resources/constraints.txt")
LOWEST = Path("resources/constraints-lowest.txt")

# What depends most on the versions of the libraries; one list for this file and for continuous integration.
CLOSE_TO_LIBRARIES = Path("resources/tests-close-to-libraries.txt")

PYTHONS = ["3.10", "3.11", "3.12", "3.13"]

nox.options.sessions = ["lint", "tests", "docs"]
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = False


@nox.session(python=PYTHONS)
def tests(session: nox.Session) -> None:
    """Run the tests with the exact versions of the constraints."""
    session.install("-c", str(CONSTRAINTS), "-e", ".[test]")
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run what depends most on the libraries with the lowest versions that setup.cfg allows."""
    session.install("-c", str(LOWEST), "-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or _close_to_libraries()))


@nox.session(python="3.11")
def newest(session: nox.Session) -> None:
    """Run the same with the newest versions that setup.cfg allows, torch apart."""
    torch = re.search(r"^torch==.+$", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    constraints = Path(session.create_tmp()) / "constraints.txt"
    constraints.write_text(torch[0] if torch else "", encoding="utf-8")
    session.install("--upgrade", "-c", str(constraints.resolve()), "-e", ".[test]")
    session.run("python", "-m", "pytest", *(session.posargs or _close_to_libraries()))


@nox.session(python="3.11")
def transformers5(session: nox.Session) -> None:
    """Have transformers 5, in an environment without Flair, score what is exported for it here."""
    session.install("-c", str(CONSTRAINTS), "-e", ".[test]")
    torch = re.search(r"^torch==.+$", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.MULTILINE)
    other = Path(session.create_tmp()).resolve() / "transformers5"
    session.run("python", "-m", "venv", str(other))
    python = str(other / "bin" / "python")
    session.run(
        python, "-m", "pip", "install", "transformers>=5", "peft", torch[0] if torch else "torch", external=True
    )
    session.run("python", "-m", "tests.export.newer_transformers", python)


@nox.session(python=PYTHONS)
def wheel(session: nox.Session) -> None:
    """Build both distributions, and have the tests of the one try the package of the other."""
    session.install("-c", str(CONSTRAINTS), "build")
    place = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(place, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(place))
    [built], [source] = place.glob("*.whl"), place.glob("*.tar.gz")
    session.install("--force-reinstall", "--no-deps", str(built))
    session.install("-c", str(CONSTRAINTS), f"{built}[test]")
    shutil.unpack_archive(source, place)
    session.chdir(place / source.name.removesuffix(".tar.gz"))
    shutil.rmtree("flair_peft")
    session.run("python", "examples/quickstart.py")
    session.run("flair-peft", "--version")
    session.run("python", "-m", "pytest", *(session.posargs or _close_to_libraries()))


def _close_to_libraries() -> list[str]:
    return [f"@{CLOSE_TO_LIBRARIES}"]


@nox.session(python="3.11")
def docs(session: nox.Session) -> None:
    """Build the site into build/docs; every warning is an error."""
    session.install("-c", str(CONSTRAINTS), "-e", ".[docs]")
    session.run("python", "-m", "sphinx", "-W", "--keep-going", "-E", "-q", "docs", "build/docs")


@nox.session(python="3.11")
def lint(session: nox.Session) -> None:
    """Run ruff and mypy, which reads torch's types."""
    session.install("-c", str(CONSTRAINTS), "-e", ".[dev]")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session(python="3.11")
def coverage(session: nox.Session) -> None:
    """Print which lines and branches the tests do not reach, those of processes that tests start included."""
    session.install("-c", str(CONSTRAINTS), "-e", ".[test,dev]")
    session.run("python", "-m", "pytest", "--cov", "--cov-report=term-missing:skip-covered", *session.posargs)
