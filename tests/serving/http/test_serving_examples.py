"""The files in ``examples/serving`` run what the command line and systemd understand."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from flair_peft.cli import main
from tests.support.direct_answers import assert_same, direct
from tests.support.http_server import client_of
from tests.support.models import save_random

EXAMPLES = Path(__file__).parents[3] / "examples" / "serving"
TEXTS = ["a fine film .", "a dull one ."]


def _logical_lines(name: str) -> list[str]:
    """Return the lines of a file without comments, those that end with a backslash put together."""
    lines = (EXAMPLES / name).read_text(encoding="utf-8").splitlines()
    return re.sub(r"\\\n\s*", "", "\n".join(line for line in lines if not line.startswith("#"))).splitlines()


def _parsed(arguments: list[str]) -> Any:
    """Return what the command line reads of arguments, without running anything."""
    assert Path(arguments[0]).name == "flair-peft"
    return main._make_parser().parse_args(arguments[1:])


def _container(instruction: str) -> Any:
    (found,) = (line for line in _logical_lines("Containerfile") if line.startswith(f"{instruction} "))
    return json.loads(found.split(" ", 1)[1].split("CMD ")[-1])


def test_container_runs_a_command_that_the_command_line_reads() -> None:
    """It listens where the container can be reached, with the token of a secret, on the port that is checked."""
    chosen = _parsed([*_container("ENTRYPOINT"), *_container("CMD")])
    assert chosen.host == "0.0.0.0"
    assert str(chosen.token_file).startswith("/run/secrets/")
    assert f":{chosen.port}/ready" in _container("HEALTHCHECK")[-1]
    lines = _logical_lines("Containerfile")
    assert f"EXPOSE {chosen.port}" in lines
    assert lines.index("USER serve") < next(n for n, line in enumerate(lines) if line.startswith("ENTRYPOINT"))


def test_container_has_the_torch_of_the_constraints() -> None:
    """The build for CPUs is the version that everything else is tested with."""
    constraints = (EXAMPLES.parents[1] / "resources" / "constraints.txt").read_text(encoding="utf-8")
    (version,) = re.findall(r"^torch==(\S+)$", constraints, flags=re.MULTILINE)
    assert f" torch=={version}" in "\n".join(_logical_lines("Containerfile"))


def test_unit_runs_a_command_that_the_command_line_reads() -> None:
    """The token is the credential that systemd loads, and the address is loopback."""
    settings = [line.split("=", 1) for line in _logical_lines("flair-peft.service") if "=" in line]
    (command,) = (value for key, value in settings if key == "ExecStart")
    chosen = _parsed(shlex.split(command))
    (credential,) = (value for key, value in settings if key == "LoadCredential")
    assert str(chosen.token_file) == f"${{CREDENTIALS_DIRECTORY}}/{credential.split(':')[0]}"
    assert chosen.host == "127.0.0.1"
    assert ["KillSignal", "SIGTERM"] in settings


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd here")
def test_unit_is_one_that_systemd_knows(tmp_path: Path) -> None:
    """No directive is unknown or wrong; the executable alone is another one here."""
    unit = (EXAMPLES / "flair-peft.service").read_text(encoding="utf-8")
    path = tmp_path / "flair-peft.service"
    path.write_text(unit.replace("/opt/flair-peft/bin/flair-peft", "/bin/true"), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", path], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


def test_mounted_app_answers_under_its_path_and_in_its_own_route(
    base: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app of one's own has the models below a path, and asks them itself."""
    models = {}
    for name, kind in {"sentiment": "text-classifier", "ner": "sequence-tagger"}.items():
        _, models[name] = save_random(kind, base("bert"), tmp_path / f"{name}.pt.d")
        models[name].save(tmp_path / f"{name}.pt")
    monkeypatch.setenv("MODELS", str(tmp_path))
    spec = importlib.util.spec_from_file_location("mounted_app", EXAMPLES / "mounted_app.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with client_of(module.app) as client:
        _check(client, models)


def _check(client: httpx.Client, models: dict[str, Any]) -> None:
    found = client.post("/nlp/predict", json={"model": "ner", "inputs": TEXTS}).json()
    assert_same(found, direct(models["ner"], TEXTS, "spans", label_type="ner"), "spans")
    labels = [answer[0][0] for answer in direct(models["sentiment"], TEXTS, "labels", label_type="sentiment")]
    counted = client.post("/reviews", json=TEXTS).json()
    assert counted == {label: labels.count(label) for label in labels}
    assert client.get("/nlp/ready").status_code == 200
    assert client.post("/predict", json={"model": "ner", "inputs": "a"}).status_code == 404
