"""The processes of the comparison, and the environments that they run in."""

from __future__ import annotations

import json
import os
import subprocess
import venv
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.benchmarks.report import ROOT

WORKERS = Path(__file__).parent


def make_environment(name: str, folder: Path) -> Path:
    """Return the Python of a peer's environment, which is made if it is missing or of other versions."""
    wanted, python = WORKERS / f"{name}.txt", folder / name / "bin" / "python"
    installed = folder / name / "installed.txt"
    if not installed.exists() or installed.read_text(encoding="utf-8") != wanted.read_text(encoding="utf-8"):
        venv.create(folder / name, with_pip=True, clear=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-r", wanted], check=True)
        installed.write_text(wanted.read_text(encoding="utf-8"), encoding="utf-8")
    return python


class Worker:
    """A process of a peer, which answers requests."""

    def __init__(self, name: str, python: Path, folder: Path, *, device: str, threads: int) -> None:
        self.name, self.errors = name, folder / f"{name}.err"
        command = [python, "-m", "tests.benchmarks.workers", name, folder, device]
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(threads),
            "TOKENIZERS_PARALLELISM": "false",
            "PYTHONPATH": str(ROOT),
        }
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                list(map(str, command)),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.hello = self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Return the answer to a request.

        Raises:
            RuntimeError: the process ended; the message has the end of what it said.
        """
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.close()
            said = self.errors.read_text(encoding="utf-8", errors="replace")[-4000:]
            raise RuntimeError(f"{self.name} ended with {self.process.returncode}: {said}")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()
