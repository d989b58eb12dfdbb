"""The examples, as their first lines say that they are run."""

from __future__ import annotations

import difflib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
import torch
from flair.data import Sentence
from flair.models import TextClassifier

from tests.support import parallel_training

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
SECONDS = 600
# What is in a batch beside a sentence changes its scores by rounding.
TOLERANCE = 1e-5

Base = Callable[[str], str]


def environment() -> dict[str, str]:
    settings = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "FLAIR_DEVICE": "cpu"}
    return {**os.environ, **settings}


def run(command: list[Any], folder: Path) -> str:
    """Run a command to its end and return what it printed."""
    done = subprocess.run(
        list(map(str, command)), cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def prediction() -> ModuleType:
    """Return the example as a module."""
    spec = importlib.util.spec_from_file_location("distributed_prediction", EXAMPLES / "distributed_prediction.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(base: Base) -> TextClassifier:
    """Return a classifier whose adapter changes what it predicts."""
    torch.manual_seed(0)
    return parallel_training.classifier(base("bert"))


def good_text(number: int) -> str:
    return f"Ann number {number} {'really ' * (number % 5)}{'loves' if number % 2 else 'hates'} Berlin ."


BAD_TEXTS: dict[int, bytes] = {
    3: b"",
    40: b"  \t ",
    77: b"word " * 10_000,
    101: b"\xff\xfe not UTF-8",
    102: b"half of a pair \xed\xa0\x80",
    150: "\u2028\ufeff\u200b".encode(),
}


def write_shards(folder: Path, *, shards: int, size: int) -> list[bytes]:
    """Write shards of numbered texts, bad ones among them, and return all texts."""
    folder.mkdir()
    texts = [BAD_TEXTS.get(number, good_text(number).encode()) for number in range(shards * size)]
    for shard in range(shards):
        (folder / f"{shard:03}.txt").write_bytes(b"".join(t + b"\n" for t in texts[shard * size : (shard + 1) * size]))
    return texts


def read_records(folder: Path) -> list[dict[str, Any]]:
    paths = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for path in paths for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def assert_right(records: list[dict[str, Any]], texts: list[bytes], model: TextClassifier) -> None:
    """Each text has one record, in order: what one plain call predicts, or why nothing can be predicted."""
    assert len(records) == len(texts)
    readable = {n: t.decode() for n, t in enumerate(texts) if n not in (101, 102)}
    sentences = {number: Sentence(text) for number, text in readable.items()}
    model.predict(list(sentences.values()), label_name="plain", mini_batch_size=32)
    for number, sentence in sentences.items():
        expected = sentence.get_labels("plain")
        found = records[number]["labels"]
        assert [label[:2] for label in found] == [[label.data_point.text, label.value] for label in expected]
        assert [label[2] for label in found] == pytest.approx([label.score for label in expected], abs=TOLERANCE)
    assert all(records[number]["error"].startswith("UnicodeDecodeError") for number in (101, 102))


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    return [child for child in psutil.Process(launcher.pid).children() if "python" in child.name()]


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that a test starts, and that end with it."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        if process.poll() is None:
            process.terminate()
            process.communicate(timeout=60)


@pytest.mark.matrix
def test_prediction_whose_worker_was_killed_is_finished_by_the_same_command(
    prediction: ModuleType, model: TextClassifier, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """What was complete stays, untouched; what was not is done; nothing twice, nothing missing, each text right."""
    texts = write_shards(tmp_path / "texts", shards=24, size=150)
    model.save(tmp_path / "model.pt")
    labels = tmp_path / "labels"
    command = [*TORCHRUN, EXAMPLES / "distributed_prediction.py", tmp_path / "model.pt", tmp_path / "texts", labels]
    launcher = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started.append(launcher)
    deadline = time.monotonic() + SECONDS
    while len(list(labels.glob("*.jsonl"))) < 2 and time.monotonic() < deadline and launcher.poll() is None:
        time.sleep(0.005)
    workers_of(launcher)[-1].send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    done = {path.name: path.stat().st_mtime_ns for path in labels.glob("*.jsonl")}
    assert 2 <= len(done) < 24
    run(command, tmp_path)
    assert {name: (labels / name).stat().st_mtime_ns for name in done} == done
    assert sorted(path.name for path in labels.iterdir()) == [*(f"{n:03}.jsonl" for n in range(24)), "job.json"]
    assert_right(read_records(labels), texts, model)
    assert not prediction.missing_shards(tmp_path / "texts", labels)


@pytest.mark.matrix
def test_prediction_in_one_process_gives_the_same(model: TextClassifier, tmp_path: Path) -> None:
    """Without a launcher the same command does all shards, whether they end with a line break or not."""
    texts = write_shards(tmp_path / "texts", shards=2, size=90)
    last = tmp_path / "texts" / "001.txt"
    last.write_bytes(last.read_bytes()[:-1])
    model.save(tmp_path / "model.pt")
    command = [sys.executable, EXAMPLES / "distributed_prediction.py", tmp_path / "model.pt", tmp_path / "texts"]
    run([*command, tmp_path / "labels"], tmp_path)
    assert_right(read_records(tmp_path / "labels"), texts, model)


def test_prediction_with_another_model_is_refused(prediction: ModuleType, tmp_path: Path) -> None:
    """A folder never holds labels of two models."""
    for name in ("first.pt", "second.pt"):
        (tmp_path / name).touch()
    prediction.open_job(tmp_path / "labels", tmp_path / "first.pt")
    prediction.open_job(tmp_path / "labels", tmp_path / "first.pt")
    with pytest.raises(SystemExit, match="labels of another model"):
        prediction.open_job(tmp_path / "labels", tmp_path / "second.pt")


def test_text_that_fails_in_the_model_costs_no_other_its_labels(
    prediction: ModuleType, model: TextClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flair fails with the whole batch; here the text is named, and the others are predicted one by one."""
    plain = model.predict

    def predict(sentences: Any, **options: Any) -> Any:
        given = [sentences] if isinstance(sentences, Sentence) else sentences
        if any("number 5 " in sentence.text for sentence in given):
            raise RuntimeError("too much")
        return plain(sentences, **options)

    texts = [good_text(number).encode() for number in range(10)]
    expected = list(prediction.predict_texts(model, texts, mini_batch_size=4))
    monkeypatch.setattr(model, "predict", predict)
    records = list(prediction.predict_texts(model, texts, mini_batch_size=4))
    assert "RuntimeError: too much" in records.pop(5)["error"]
    expected.pop(5)
    assert [r["labels"][0][:2] for r in records] == [r["labels"][0][:2] for r in expected]


def test_model_that_cannot_predict_at_all_ends_the_job(
    prediction: ModuleType, model: TextClassifier, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A file full of errors would pass for done; one of texts that are no texts is."""
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\n\xfe\n")
    prediction.predict_shard(model, tmp_path / "bytes.txt", tmp_path / "bytes.jsonl", mini_batch_size=4)
    assert (tmp_path / "bytes.jsonl").read_text().count("UnicodeDecodeError") == 2

    def predict(*_: Any, **__: Any) -> None:
        raise RuntimeError("no device")

    monkeypatch.setattr(model, "predict", predict)
    with pytest.raises(RuntimeError, match="no device"):
        prediction.predict_shard(model, tmp_path / "texts.txt", tmp_path / "texts.jsonl", mini_batch_size=4)
    assert not (tmp_path / "texts.jsonl").exists()


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")
def test_prediction_with_ray_survives_the_death_of_a_worker(
    model: TextClassifier, started: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    """Ray gives the shard to another worker; the result is that of one plain call."""
    texts = write_shards(tmp_path / "texts", shards=24, size=150)
    model.save(tmp_path / "model.pt")
    labels = tmp_path / "labels"
    command = [sys.executable, EXAMPLES / "ray_prediction.py", tmp_path / "model.pt", tmp_path / "texts", labels]
    job = subprocess.Popen(
        list(map(str, command)), cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started.append(job)
    deadline = time.monotonic() + SECONDS
    while len(list(labels.glob("*.jsonl"))) < 2 and time.monotonic() < deadline and job.poll() is None:
        time.sleep(0.005)
    workers = [child for child in psutil.Process(job.pid).children(recursive=True) if _is_worker(child)]
    workers[0].send_signal(signal.SIGKILL)
    assert job.wait(timeout=SECONDS) == 0
    assert sorted(path.name for path in labels.glob("*.jsonl")) == [f"{n:03}.jsonl" for n in range(24)]
    assert_right(read_records(labels), texts, model)


def _is_worker(process: psutil.Process) -> bool:
    try:
        return "ShardPredictor" in "".join(process.cmdline())
    except psutil.Error:
        return False


@pytest.mark.matrix
def test_training_in_two_processes_reaches_what_one_reaches(tmp_path: Path) -> None:
    """The example of the README learns, and prints one score, near that of a single process."""
    script = EXAMPLES / "distributed_training.py"
    one = run([sys.executable, script, "--output", tmp_path / "one", "--epochs", "3"], tmp_path)
    two = run([*TORCHRUN, script, "--output", tmp_path / "two", "--epochs", "3"], tmp_path)
    scores = [float(printed.rsplit(": ", 1)[1]) for printed in (one, two)]
    assert min(scores) > 0.8
    assert scores[0] == pytest.approx(scores[1], abs=0.05)
    assert (tmp_path / "two" / "best-model.pt").is_file()


TEXTS = ("The soup was cold and the waiter was rude.", "Not a dull moment: the show made us smile.")


def test_sentiment_example_differs_from_stock_flair_in_two_lines() -> None:
    """A script for Flair becomes one for LoRA by another import and another name, and by nothing else."""
    stock, ours = ((EXAMPLES / name).read_text().splitlines() for name in ("sentiment_stock_flair.py", "sentiment.py"))
    found = [line for line in difflib.ndiff(stock, ours) if line[0] in "+-" and line[2:].strip()]
    assert found == [
        "- from flair.embeddings import TransformerDocumentEmbeddings",
        "+ from flair_peft import PeftTransformerDocumentEmbeddings",
        "-     embeddings = TransformerDocumentEmbeddings(arguments.model)",
        "+     embeddings = PeftTransformerDocumentEmbeddings(arguments.model)",
    ]


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["sentiment.py", "sentiment_stock_flair.py"])
def test_sentiment_example_predicts_what_a_reader_would(name: str, tmp_path: Path) -> None:
    """Both scripts learn, save, load and label two sentences; the one with LoRA leaves a file a tenth as large."""
    printed = run([sys.executable, EXAMPLES / name, "--output", tmp_path / "model"], tmp_path)
    labels = re.findall(r"^(\w+) \(\d\.\d+\): (.*)$", printed, re.MULTILINE)
    assert labels == [("negative", TEXTS[0]), ("positive", TEXTS[1])]
    size = (tmp_path / "model" / "final-model.pt").stat().st_size
    assert (size < 1_000_000) == (name == "sentiment.py")


@pytest.mark.matrix
def test_ner_example_tags_the_lines_of_a_file(tmp_path: Path) -> None:
    """The tagger of the directory that it saved prints each line with its names."""
    (tmp_path / "text.txt").write_text("Many students live in Egypt.\nNobody came.\n")
    options = ["--output", tmp_path / "tagger", "--text", tmp_path / "text.txt", "--epochs", "3", "--dtype", "bfloat16"]
    printed = run([sys.executable, EXAMPLES / "ner.py", *options], tmp_path).splitlines()
    assert printed[-2:] == ["Many students live in Egypt.  →  Egypt (LOC)", "Nobody came.  →  no names"]
    assert (tmp_path / "tagger" / "adapter_model.safetensors").is_file()


@pytest.mark.matrix
def test_decoder_example_trains_and_loads_a_decoder(tmp_path: Path) -> None:
    """The script finds its random decoder when it loads what it trained, and labels both sentences."""
    printed = run([sys.executable, EXAMPLES / "decoder.py", "--output", tmp_path / "model", "--epochs", "1"], tmp_path)
    labels = re.findall(r"^(?:negative|positive) \(\d\.\d+\): (.*)$", printed, re.MULTILINE)
    assert labels == list(TEXTS)


@pytest.mark.matrix
def test_few_shot_example_learns_a_task_that_it_was_not_trained_on(tmp_path: Path) -> None:
    """The new topics are those of the test reviews alone, and the saved model has them."""
    options = ["--output", tmp_path / "model.pt", "--epochs", "1", "--shots", "2"]
    printed = run([sys.executable, EXAMPLES / "few_shot.py", *options], tmp_path)
    assert "trained on: airline, campsite, concert, dentist, laptop, museum" in printed
    scores = [float(score) for score in re.findall(r"accuracy .*: (\d\.\d{3})$", printed, re.MULTILINE)]
    assert len(scores) == 2
    assert (tmp_path / "model.pt").stat().st_size < 1_000_000
