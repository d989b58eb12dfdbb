"""A save that is killed, starved of space or raced leaves the old checkpoint or the new one, whole.

What needs processes to kill is done by this file run as a program: it loads only the file layer and forks that.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest

ROOT = Path(__file__).parents[2]
if __name__ == "__main__":
    # Without __init__.py, which loads Flair.
    sys.modules["flair_peft"] = types.ModuleType("flair_peft")
    sys.modules["flair_peft"].__path__ = [str(ROOT / "flair_peft")]

import torch  # noqa: E402

from flair_peft.errors import ModelFileError, SaveError  # noqa: E402
from flair_peft.storage import atomic, checkpoint_directory, held_directory, manifest, other_files, temporaries  # noqa: E402

POINTS = 100
LAYER = {module.__file__ for module in (other_files, checkpoint_directory, manifest, atomic, temporaries)}
STALE = {"A": "adapter_a/x.txt", "B": "adapter_b/x.txt", "C": "adapter_c/x.txt"}

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals, limits and users of POSIX")


def save(place: Path, label: str, size: int = 50) -> None:
    """Write a checkpoint of which every file tells which one it is."""
    value = float(ord(label))
    files = {
        "adapter_config.json": label.encode(),
        "adapter_model.safetensors": {"t": torch.full((size,), value)},
        "tokenizer/vocab.txt": label.encode() * size,
        STALE[label]: label.encode(),
    }
    checkpoint_directory.write(place, {"label": label}, files, f"# {label}")


def label_of(place: Path) -> str:
    """Return which checkpoint is read; a mix of two is an error."""
    found = checkpoint_directory.read(place)
    label = found.document["label"]
    assert found.files["adapter_config.json"] == label.encode()
    assert found.files["tokenizer/vocab.txt"] == label.encode() * 50
    assert torch.equal(found.tensors["adapter_model.safetensors"]["t"], torch.full((50,), float(ord(label))))
    assert found.files.keys() == {"adapter_config.json", "tokenizer/vocab.txt", STALE[label]}
    return label


def label_or_nothing(place: Path) -> str | None:
    return label_of(place) if held_directory.is_checkpoint(place) else None


def with_log(place: Path) -> tuple[int, int]:
    """Add files of somebody else, and return the identity of one."""
    (place / "runs").mkdir()
    (place / "runs" / "log").write_text("mine")
    (place / "notes").write_text("mine")
    return other_files._identity(place / "runs" / "log")


def assert_whole(place: Path, label: str, log: tuple[int, int] | None) -> None:
    """Assert that the checkpoint, the other files and nothing else are there."""
    assert label_of(place) == label
    assert [path.name for path in place.parent.iterdir()] == [place.name]
    found = {path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file()}
    own = {"flair_peft.json", "README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer/vocab.txt"}
    assert found == own | {STALE[label]} | ({"runs/log", "notes"} if log else set())
    assert (place / "README.md").read_text() == f"# {label}"
    if log:
        assert other_files._identity(place / "runs" / "log") == log
        assert (place / "notes").read_text() == "mine"


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Yield an empty folder, in memory if there is such a place: thousands of flushes to a disk take minutes."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


# The program: each of these functions is a scenario


def in_child(action: Callable[[], Any]) -> int:
    """Return how a forked process ended that did this."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_at(line: int, action: Callable[[], None]) -> Callable[[], None]:
    """Return the action, which dies before it runs the given line, counted over all lines of the file layer."""
    seen = 0

    def trace(frame: types.FrameType, event: str, argument: Any) -> Any:
        nonlocal seen
        if frame.f_code.co_filename not in LAYER:
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    def run() -> None:
        sys.settrace(trace)
        action()
        sys.settrace(None)
        Path(os.environ["COUNT"]).write_text(str(seen))

    return run


def kill_everywhere(prepare: Callable[[Path], Any], action: Callable[[Path], None], check: Callable[..., str]) -> None:
    """Kill the action at many points, each time from the same start, and check what is left."""
    outcomes = set()
    with scratch() as folder, scratch() as outside:
        os.environ["COUNT"] = str(outside / "count")
        place = folder / "start" / "model"
        place.parent.mkdir()
        prepare(place)
        assert in_child(killed_at(-1, lambda: action(place))) == 0
        lines = int((outside / "count").read_text())
        points = min(POINTS, lines)
        for number in range(points):
            place = folder / str(number) / "model"
            place.parent.mkdir()
            log = prepare(place)
            line = 1 + number * (lines - 1) // (points - 1)
            status = in_child(killed_at(line, lambda place=place: action(place)))
            # The random names of temporary files may make a run a few lines shorter.
            assert os.WIFSIGNALED(status) or line > lines - 10, (line, lines, status)
            outcomes.add(check(place, log))
    assert len(outcomes) == 2, f"only {outcomes} was seen"


def kill_first_save() -> None:
    def check(place: Path, log: None) -> str:
        found = label_or_nothing(place)
        assert found in (None, "A")
        save(place, "B")
        assert_whole(place, "B", None)
        return str(found)

    kill_everywhere(lambda place: None, lambda place: save(place, "A"), check)


def kill_overwrite() -> None:
    def prepare(place: Path) -> tuple[int, int]:
        save(place, "A")
        return with_log(place)

    def check(place: Path, log: tuple[int, int]) -> str:
        found = label_of(place)
        assert found in ("A", "B")
        assert label_of(place) == found
        assert other_files._identity(place / "runs" / "log") == log
        save(place, "C")
        assert_whole(place, "C", log)
        return found

    kill_everywhere(prepare, lambda place: save(place, "B"), check)


def kill_renamings() -> None:
    atomic._exchange = lambda one, other: False
    kill_overwrite()


def kill_file() -> None:
    def writes(content: bytes) -> Callable[[BinaryIO], Any]:
        return lambda file: [file.write(content[:1000]), file.write(content[1000:])]

    def check(place: Path, log: None) -> str:
        found = place.read_bytes()
        assert found in (b"A" * 2000, b"B" * 2000)
        atomic.write_file(place, writes(b"C" * 2000))
        assert place.read_bytes() == b"C" * 2000
        assert [path.name for path in place.parent.iterdir()] == ["model"]
        return found[:1].decode()

    kill_everywhere(
        lambda place: place.write_bytes(b"A" * 2000) and None,
        lambda place: atomic.write_file(place, writes(b"B" * 2000)),
        check,
    )


def full_disk() -> None:
    """A limit on the size of files stands for a full disk: writing fails at any byte."""
    import resource

    def starve(limit: int, action: Callable[[], None]) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(SaveError, match="Make room") as raised:
            action()
        assert raised.value.errno == errno.EFBIG

    with scratch() as folder:
        place, file = folder / "a" / "model", folder / "b" / "model.pt"
        file.parent.mkdir()
        save(place, "A")
        log = with_log(place)
        file.write_bytes(b"old")
        for limit in (0, 1, 10, 200, 700):
            assert in_child(lambda: starve(limit, lambda: save(place, "B"))) == 0  # noqa: B023 - done before the next
            assert_whole(place, "A", log)

            def torch_save(file: BinaryIO) -> None:
                torch.save({"t": torch.ones(100_000)}, file)

            def plain_save(file: BinaryIO) -> None:
                file.write(b"1" * 1000)

            for write in (torch_save, plain_save):
                assert in_child(lambda: starve(limit, lambda: atomic.write_file(file, write))) == 0  # noqa: B023
                assert [path.name for path in file.parent.iterdir()] == ["model.pt"]
                assert file.read_bytes() == b"old"


def read_only() -> None:
    """A user who may not write to the parent folder, or to the checkpoint, is told so."""

    def refused(action: Callable[[], None]) -> None:
        if not os.geteuid():
            os.setuid(65534)
        with pytest.raises(SaveError, match=r"permissions|that you may write to") as raised:
            action()
        assert raised.value.errno in (None, errno.EACCES)

    with scratch() as folder:
        place = folder / "parent" / "model"
        save(place, "A")
        log = with_log(place)
        (folder / "parent" / "x.pt").write_bytes(b"old")
        (folder / "parent").chmod(0o555)
        for writable in (False, True):
            place.chmod(0o777 if writable else 0o555)
            (folder / "parent" / "x.pt").chmod(0o666 if writable else 0o444)
            assert in_child(lambda: refused(lambda: save(place, "B"))) == 0
            assert in_child(lambda: refused(lambda: save(folder / "parent" / "new", "B"))) == 0
            assert in_child(lambda: refused(lambda: atomic.write_file(folder / "parent" / "x.pt", len))) == 0
            assert (folder / "parent" / "x.pt").read_bytes() == b"old"
        # Reading needs no permission to write, also when there is something to put back.
        place.rename(temporaries.backup_of(place))
        (folder / "parent").chmod(0o555)

        def reads() -> None:
            if not os.geteuid():
                os.setuid(65534)
            assert label_of(place) == "A"
            assert temporaries.backup_of(place).exists()

        assert in_child(reads) == 0
        (folder / "parent").chmod(0o755)
        (folder / "parent" / "x.pt").unlink()
        place.mkdir()
        place.chmod(0o755)
        assert label_of(place) == "A"
        assert_whole(place, "A", log)


def _start(action: Callable[[], Any]) -> int:
    child = os.fork()
    if not child:
        os._exit(os.waitstatus_to_exitcode(in_child(action)))
    return child


def _reads_until(finished: Path, place: Path) -> None:
    seen = []
    while not finished.exists():
        seen.append(label_of(place))
    assert len(seen) > 10, f"read only {len(seen)} times"


def _race(*writers: list[str]) -> None:
    with scratch() as folder, scratch() as outside:
        place = folder / "model"
        save(place, "A")
        log = with_log(place)
        reading = [_start(lambda: _reads_until(outside / "finished", place)) for _ in range(2)]
        writing = [_start(lambda labels=labels: [save(place, label) for label in labels]) for labels in writers]
        ended = [os.waitpid(child, 0)[1] for child in writing]
        (outside / "finished").touch()
        ended += [os.waitpid(child, 0)[1] for child in reading]
        assert not any(ended), ended
        assert_whole(place, label_of(place), log)


def race_readers() -> None:
    _race(["B", "A"] * 30)


def race_readers_renamings() -> None:
    atomic._exchange = lambda one, other: False
    _race(["B", "A"] * 30)


def race_writers() -> None:
    _race(["A"] * 25, ["B"] * 25)


def race_writers_renamings() -> None:
    atomic._exchange = lambda one, other: False
    _race(["A"] * 25, ["B"] * 25)


def race_files() -> None:
    """Four processes write one file, two read it, and one dies in each of its saves."""

    def writes(label: str) -> Callable[[BinaryIO], Any]:
        return lambda file: torch.save({"t": torch.full((500,), float(ord(label)))}, file)

    def dies(file: BinaryIO) -> None:
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def reads_until(finished: Path, place: Path) -> None:
        seen = 0
        while not finished.exists():
            found = torch.load(place, weights_only=True)["t"]
            assert found.unique().numel() == 1, "a mix of two"
            seen += 1
        assert seen > 10, f"read only {seen} times"

    with scratch() as folder, scratch() as outside:
        place = folder / "model.pt"
        atomic.write_file(place, writes("A"))
        reading = [_start(lambda: reads_until(outside / "finished", place)) for _ in range(2)]
        writing = [
            _start(lambda label=label: [atomic.write_file(place, writes(label)) for _ in range(100)])
            for label in "ABCD"
        ]
        killed = [in_child(lambda: atomic.write_file(place, dies)) for _ in range(10)]
        ended = [os.waitpid(child, 0)[1] for child in writing]
        (outside / "finished").touch()
        ended += [os.waitpid(child, 0)[1] for child in reading]
        assert not any(ended), ended
        assert all(map(os.WIFSIGNALED, killed))
        atomic.write_file(place, writes("E"))
        assert [path.name for path in folder.iterdir()] == ["model.pt"]


SCENARIOS = {
    scenario.__name__: scenario
    for scenario in (
        *(kill_first_save, kill_overwrite, kill_renamings, kill_file, full_disk, read_only),
        *(race_readers, race_readers_renamings, race_writers, race_writers_renamings, race_files),
    )
}


@pytest.mark.parametrize(
    "scenarios",
    [
        ["kill_overwrite", "kill_file", "full_disk", "read_only", "race_readers", "race_writers", "race_files"],
        pytest.param(
            ["kill_first_save", "kill_renamings", "race_readers_renamings", "race_writers_renamings"],
            marks=pytest.mark.matrix,
        ),
    ],
    ids="-".join,
)
def test_save_interrupted_leaves_the_old_or_the_new_checkpoint_whole(scenarios: list[str]) -> None:
    """Killed at a hundred points, starved, refused or raced: what is read is whole, and the next save clears up."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning", __file__, *scenarios],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == scenarios


CALLS = [(os, name) for name in ("fsync", "mkdir", "rename", "replace", "link", "chmod", "unlink", "rmdir")]


class Failing:
    """Calls to the operating system, of which one fails as on a full disk."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, code: int) -> None:
        self.left, self.code = number, code
        for owner, name in CALLS:
            patch.setattr(owner, name, self._failing(getattr(owner, name)))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def fail_once(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError(self.code, os.strerror(self.code))
            return call(*args, **kwargs)

        return fail_once


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("means", ["exchange", "two renamings"])
def test_save_whose_calls_fail_one_by_one_leaves_the_old_or_the_new_checkpoint(
    means: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever call fails: an error means the old checkpoint, no error means the new one; nothing else is lost."""
    if means == "two renamings":
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    refused = 0
    with scratch() as folder:
        for number in range(1, 200):
            place = folder / str(number) / "model"
            save(place, "A")
            log = with_log(place)
            with pytest.MonkeyPatch.context() as patch:
                failing = Failing(patch, number, code)
                expected = "B"
                try:
                    save(place, "B")
                except SaveError:
                    expected, refused = "A", refused + 1
            assert label_of(place) == expected, number
            assert other_files._identity(place / "runs" / "log") == log
            save(place, "C")
            assert_whole(place, "C", log)
            if failing.left > 0:
                break
    assert failing.left > 0, "some calls were not tried"
    assert refused > 10


def test_file_whose_calls_fail_one_by_one_is_the_old_or_the_new_one() -> None:
    """The same for single files."""
    with scratch() as folder:
        place = folder / "x.pt"
        for number in range(1, 50):
            place.write_bytes(b"A")
            with pytest.MonkeyPatch.context() as patch:
                failing = Failing(patch, number, errno.ENOSPC)
                expected = b"B"
                try:
                    atomic.write_file(place, lambda file: file.write(b"B") and None)
                except SaveError:
                    expected = b"A"
            assert place.read_bytes() == expected
            assert [path.name for path in folder.iterdir()] == ["x.pt"]
            if failing.left > 0:
                return
    raise AssertionError("some calls were not tried")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a disk of 256 KiB."""
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(tmp_path / "disk")]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("mounting is not allowed here")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_save_on_a_full_disk_leaves_the_old_checkpoint_and_the_next_smaller_one_works(small_disk: Path) -> None:
    """The error says so; what was there is read; there is room again afterwards."""
    place = small_disk / "model"
    save(place, "A")
    log = with_log(place)
    with pytest.raises(SaveError, match=r"No space left.*Make room") as raised:
        save(place, "B", size=100_000)
    assert raised.value.errno == errno.ENOSPC
    assert_whole(place, "A", log)
    save(place, "C")
    assert_whole(place, "C", log)


def test_save_to_a_mount_point_is_an_error(small_disk: Path) -> None:
    """It cannot be replaced as a whole, nor can a folder that holds one; a folder inside it can."""
    with pytest.raises(SaveError, match="mount point"):
        save(small_disk, "A")
    assert not list(small_disk.iterdir())
    (small_disk / "mine").write_text("1")
    with pytest.raises(SaveError, match="mount point"):
        save(small_disk.parent, "A")
    assert (small_disk / "mine").read_text() == "1"
    (small_disk / "mine").unlink()
    save(small_disk / "model", "A")
    assert_whole(small_disk / "model", "A", None)


def test_save_that_is_cancelled_leaves_the_old_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control-C while files are written changes nothing; just after the exchange, nothing is lost either."""

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    for name, expected in (("carry", "A"), ("_swap", "A"), ("settle", "B"), ("discard", "B")):
        with scratch() as folder:
            save(folder / "model", "A")
            log = with_log(folder / "model")
            with monkeypatch.context() as patch:
                patch.setattr(atomic, name, interrupt)
                # The handler that clears up is interrupted too, for it uses the same.
                with pytest.raises(KeyboardInterrupt):
                    save(folder / "model", "B")
            assert label_of(folder / "model") == expected
            save(folder / "model", "C")
            assert_whole(folder / "model", "C", log)


def test_reader_of_a_checkpoint_that_is_gone_is_told_so_at_once(tmp_path: Path) -> None:
    """A folder that is missing is no folder that is being replaced."""
    with pytest.raises(ModelFileError, match="No such file"):
        label_of(tmp_path / "absent")


if __name__ == "__main__":
    for chosen in sys.argv[1:]:
        SCENARIOS[chosen]()
        print(chosen, flush=True)
