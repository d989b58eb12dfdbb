"""The first command of the README, as a newcomer runs it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.matrix
def test_quickstart_shows_that_adapting_beats_freezing_and_that_loading_changes_nothing(tmp_path: Path) -> None:
    """Both tasks score clearly higher with LoRA, every prediction agrees in a new process, and the files are kept."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "quickstart.py"), "--output", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    scores = re.findall(r"(\d\.\d+) before \(head only\), (\d\.\d+) with LoRA", run.stdout)
    assert len(scores) == 2
    assert all(float(adapted) > float(frozen) + 0.05 for frozen, adapted in scores)
    assert run.stdout.count("300 of 300 sentences with the same labels, scores the same") == 2
    assert {path.name for path in tmp_path.glob("*.pt")} == {"sentiment.pt", "ner.pt"}
