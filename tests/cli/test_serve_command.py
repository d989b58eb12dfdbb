"""``flair-peft serve``: what it refuses to do, and a server from its first line to its last answer."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from flair_peft.cli import main, serve_command
from flair_peft.serving.http import served_models
from tests.support.files import save_as
from tests.support.models import classifier

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function: arguments → exit code, output and errors on one line."""

    def call(*arguments: object) -> tuple[int, str, str]:
        code = main.main(["serve", *map(str, arguments)])
        found = capsys.readouterr()
        return code, found.out, " ".join(found.err.split())

    return call


@pytest.fixture(scope="module")
def directory(base: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as("directory", classifier(base("bert")), tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.7", "example.org"])
def test_serve_needs_a_token_to_listen_to_others(run: Run, host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is loaded; an empty one in the environment is none."""
    monkeypatch.setenv("FLAIR_PEFT_TOKEN", "")
    code, out, errors = run("nothing", "--host", host)
    assert (code, out) == (2, "")
    assert f"Cannot listen at {host} without a token" in errors


def test_serve_refuses_a_token_file_without_a_token(run: Run, tmp_path: Path) -> None:
    """It would be open to everyone, and whoever started it would not know."""
    (tmp_path / "empty").write_text("\n")
    assert "the file is empty" in run("nothing", "--token-file", tmp_path / "empty")[2]
    assert "Cannot read the token" in run("nothing", "--admin-token-file", tmp_path / "none")[2]


def test_serve_refuses_two_models_of_one_name(run: Run) -> None:
    """It says how to name one of them."""
    assert "Cannot serve two models as 'ner'" in run("ner=one", "two/ner.pt")[2]


def test_serve_refuses_to_merge_several_models(run: Run) -> None:
    """They would share nothing any more."""
    assert "Cannot merge 2 models" in run("one", "two", "--merge")[2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "Cannot compute in 0 threads"),
        (["--batch", "0"], "Cannot serve with batch=0"),
        (["--max-wait", "-1"], "Cannot serve with max_wait=-0.001"),
        (["--max-wait", "90000"], "from 0 to 60; --max-wait takes milliseconds"),
        (["--cors", "nonsense"], "Cannot answer pages of 'nonsense'"),
        (["--cors", "https://*.example.org"], "Cannot answer pages of 'https://*.example.org'"),
        (["--host", "no.such.host.invalid", "--token-file", "setup.cfg"], "Cannot listen at no.such.host.invalid"),
        (["--cors", "https://example.org/"], "Cannot answer pages of 'https://example.org/'"),
        ([], "there is no such file or directory"),
    ],
)
def test_serve_says_what_it_cannot_use(run: Run, arguments: list[Any], words: str, tmp_path: Path) -> None:
    """In a paragraph, with an exit code of trouble."""
    code, out, errors = run(tmp_path / "no.pt", *arguments)
    assert (code, out) == (2, "")
    assert words in errors


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_serve_learns_of_a_taken_port_before_it_loads(run: Run, host: str, tmp_path: Path) -> None:
    """What it is given as a model is not even looked for."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        code, out, errors = run(tmp_path / "no.pt", "--host", host, "--port", port)
    assert (code, out) == (2, "")
    assert f"Cannot listen at {host}, port {port}: Address already in use" in errors


def test_serve_says_that_another_program_was_faster(run: Run, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two may reserve one address, and the first that listens has it."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        port = other.getsockname()[1]
        load = served_models.ServedModels.load

        def load_slowly(*arguments: Any) -> Any:
            other.listen()
            return load(*arguments)

        monkeypatch.setattr(served_models.ServedModels, "load", load_slowly)
        code, out, errors = run(directory, "--port", port)
    assert (code, out) == (2, "")
    assert f"Cannot listen at 127.0.0.1, port {port}: " in errors


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """Inside, a process serves: the process, and its first line."""
    command = [sys.executable, "-m", "flair_peft", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            yield process, process.stdout.readline()
        finally:
            process.kill()


def test_serve_answers_until_it_is_told_to_end(directory: Path, tmp_path: Path) -> None:
    """One line says where and with what; a signal makes it unready, then it ends well with all answers given."""
    (tmp_path / "token").write_text("secret\n")
    arguments = (f"my={directory}", directory, "--threads", 1, "--token-file", tmp_path / "token", "--max-wait", 1)
    with serving(*arguments) as (process, line):
        found = re.fullmatch(r"(http://127\.0\.0\.1:\d+) answers with (.+) on (.+)\.\n", line)
        assert found, line
        assert found[2] == ", ".join(sorted([directory.name, "my"]))
        with httpx.Client(base_url=found[1], headers={"Authorization": "Bearer secret"}, timeout=60) as client:
            assert client.post("/predict", json={"inputs": "Who ?", "model": "my"}).status_code == 200
            assert httpx.post(f"{found[1]}/predict", json={"inputs": "Who ?", "model": "my"}).status_code == 401
            process.send_signal(signal.SIGTERM)
            statuses = set()
            for _ in range(200):
                try:
                    ready = client.get("/ready").status_code
                    statuses.add((ready, client.post("/predict", json={"inputs": "a", "model": "my"}).status_code))
                except httpx.TransportError:
                    break
                time.sleep(0.01)
            assert (503, 503) in statuses
        assert process.wait(60) == 0
        assert process.stdout
        assert process.stdout.read() == ""


def test_serve_reads_a_token_without_the_end_of_its_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Secrets that are made of files often end in one, in the environment, too."""
    (tmp_path / "token").write_text("abc\n")
    monkeypatch.setenv("FLAIR_PEFT_TOKEN", "abc\n")
    assert [serve_command._token(path, "FLAIR_PEFT_TOKEN") for path in (tmp_path / "token", None)] == ["abc", "abc"]


def test_serve_refuses_an_impossible_name(run: Run) -> None:
    """In a paragraph."""
    code, out, errors = run("x" * 5000)
    assert (code, out) == (2, "")
    assert "too long" in errors
