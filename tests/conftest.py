"""What every test needs: one process-wide set of tiny base models, quiet hosts, and a hook that is as it was."""

from __future__ import annotations

import gc
import logging
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

# Tiny matrices are slower on several threads than on one, and tests may run side by side.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

# Nothing here imports Flair on its own: it takes ten seconds, and the process that hands tests out runs none.


def pytest_addoption(parser: pytest.Parser) -> None:
    """Let a part of the tests be run: ``--part 1/2`` and ``--part 2/2`` are all of them."""
    parser.addoption("--part", help="run one of so many parts of the tests, such as 1/2", metavar="N/M")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests of the part that is asked for: by their names, so that others do not move when one is added."""
    if asked := config.getoption("--part"):
        number, parts = map(int, asked.split("/"))
        if not 1 <= number <= parts:
            raise pytest.UsageError(f"--part {asked}: there is no such part. Pass 1/2 or 2/2, for example.")
        kept = [item for item in items if zlib.crc32(item.nodeid.encode()) % parts == number - 1]
        chosen = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = kept


def pytest_collection_finish() -> None:
    """Let garbage collections pass over what is there before the first test: all of torch, transformers and pytest."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread_on_the_cpu() -> None:
    """Compute as all machines can."""
    import flair
    import torch

    torch.set_num_threads(1)
    flair.device = torch.device("cpu")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return a function from an architecture to the directory of its tiny base model."""
    from tests.support import tiny

    built: dict[str, str] = {}
    root = tmp_path_factory.mktemp("bases")

    def find(architecture: str) -> str:
        if architecture not in built:
            built[architecture] = str(tiny.build(architecture, root / architecture))
        return built[architecture]

    return find


@pytest.fixture(autouse=True)
def _quiet_flair() -> Iterator[None]:
    """Keep Flair's training log out of the report."""
    logger = logging.getLogger("flair")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


@pytest.fixture(autouse=True)
def _same_start() -> Iterator[None]:
    """Seed torch, and leave Flair's device and the hook as they were found."""
    import flair
    import torch

    import flair_peft

    torch.manual_seed(0)
    device, was_installed = flair.device, flair_peft.is_installed()
    yield
    flair.device = device
    if flair_peft.is_installed() != was_installed:
        (flair_peft.install if was_installed else flair_peft.uninstall)()


@pytest.fixture
def shared_data() -> Path:
    """Return the folder of real text beside the project, or skip where there is none."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no real text beside the project")
    return folder
