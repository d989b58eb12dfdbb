"""Training in two processes on a CPU, under each launcher, against one process with the same global batches."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flair
import pytest
import torch
import torch.distributed as dist
from flair.trainers import ModelTrainer
from peft import LoraConfig

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.errors import TrainingSetupError
from flair_peft.training import ddp, process_group
from tests.support import parallel_training
from tests.support.parallel_training import TRAININGS, Result
from tests.support.places import places_of
from tests.support.zoo import ZOO

ROOT = Path(__file__).parents[2]
SECONDS = 240  # far more than it takes; nothing here may wait for ever

# The largest difference of a weight, beside the rounding of sums in another order: Adam divides gradients by their
# own size, so that those which are zero but for rounding move weights too. bf16 has 8 bits.
TOLERANCE = {"sgd": 2e-6, "in-groups": 2e-6, "annealed": 2e-6, "biases": 2e-6, "bf16": 2e-3}
ADAM_TOLERANCE = 2e-4

Base = Callable[[str], str]


def launch(command: list[str], folder: Path, names: list[str], bases: Path) -> None:
    """Run the trainings under a launcher, or fail with what it wrote."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *command, str(bases), str(folder), *names],
        cwd=folder,
        env={**environment, "FLAIR_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def results(folder: Path, name: str) -> list[Result]:
    """Return what each process got."""
    return [torch.load(folder / f"{name}-{rank}.pt", weights_only=True) for rank in (0, 1)]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def torchrun() -> list[str]:
    return ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "tests.support.parallel_training"]


def accelerate_launch() -> list[str]:
    # With --cpu, accelerate starts one process unless mpirun starts the others; --multi_gpu takes CPUs where no GPU is.
    arguments = ["--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--main_process_port", free_port()]
    return [
        "accelerate.commands.launch",
        *arguments,
        *port,
        "--num_processes",
        "2",
        "-m",
        "tests.support.parallel_training",
    ]


def flair_launch() -> list[str]:
    return ["tests.support.parallel_by_flair", free_port()]


@pytest.fixture(scope="module")
def bases(base: Base) -> Path:
    """Return the folder of the base models that the trainings need."""
    return Path([base("bert"), base("bert-mlm")][0]).parent


@pytest.fixture(scope="module")
def launched(bases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with what two processes got under torchrun, in all trainings."""
    folder = tmp_path_factory.mktemp("torchrun")
    launch(torchrun(), folder, list(TRAININGS), bases)
    return folder


def assert_same(name: str, two: Result, one: Result) -> None:
    tolerance = TOLERANCE.get(name, ADAM_TOLERANCE)
    assert two["trained"].keys() == one["trained"].keys()
    for key, value in one["trained"].items():
        torch.testing.assert_close(two["trained"][key], value, atol=tolerance, rtol=tolerance, msg=key)
    assert two["score"] == one["score"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-2 if name == "bf16" else 1e-4)


@pytest.mark.parametrize("name", [name for name in TRAININGS if name != "uneven"])
def test_two_processes_learn_what_one_learns_with_the_batch_of_both(
    name: str, launched: Path, bases: Path, tmp_path: Path
) -> None:
    """Weights, score and loss are those of one process, though each process started from random weights of its own."""
    one = TRAININGS[name](str(bases), tmp_path)
    for two in results(launched, name):
        assert_same(name, two, one)


@pytest.mark.parametrize("name", list(TRAININGS))
def test_processes_end_with_the_same_weights(name: str, launched: Path) -> None:
    """No bit differs, with sentences left over as well: torch's sampler repeats some, so that all have as many."""
    first, second = results(launched, name)
    assert all(torch.equal(second["trained"][key], value) for key, value in first["trained"].items())
    assert first["files"] == second["files"]


def test_groups_of_each_process_are_its_own(launched: Path, bases: Path, tmp_path: Path) -> None:
    """Batches that are divided by length, in another number of passes in each process, teach what whole ones teach."""
    whole = TRAININGS["sgd"](str(bases), tmp_path)
    first, second = results(launched, "in-groups")
    assert max(first["passes"]) > 1
    assert first["passes"] != second["passes"]
    for two in (first, second):
        assert_same("in-groups", two, whole)


@pytest.mark.parametrize("name", ["sgd", "chunks", "in-groups"])
def test_step_sends_the_bytes_of_the_trained_gradients(name: str, launched: Path) -> None:
    """Once per step, however many chunks: gradients in one call, in another which parameters were used, no weights."""
    for result in results(launched, name):
        trained = sum(value.nbytes for value in result["trained"].values())
        assert set(result["bytes"]) == {trained}
        assert len(result["bytes"]) == 6
        assert all(step == {"gloo:all_reduce": 2} for step in result["collectives"])


def test_resumed_training_in_two_processes_is_one_that_never_stopped(launched: Path) -> None:
    """Bit by bit, as long as nothing random happens in a step: the other processes keep random numbers of their own."""
    stopped, whole = (results(launched, name)[0]["trained"] for name in ("in-two-parts", "in-one-part"))
    assert all(torch.equal(stopped[key], value) for key, value in whole.items())


def test_processes_begin_with_the_same_random_numbers(launched: Path) -> None:
    """Python's, numpy's and torch's: corpora that are split at random come out alike without a seed."""
    first, second = results(launched, "drawn")
    assert first == second


def test_base_stays_as_its_source_has_it(launched: Path) -> None:
    """In no process does training write to the base; what the source lacks is the same in all of them."""
    for name in ("sgd", "biases", "bf16", "mlm-only"):
        assert all(all(result["frozen"].values()) for result in results(launched, name))


@pytest.mark.matrix
@pytest.mark.parametrize("launcher", [accelerate_launch, flair_launch])
def test_other_launchers_give_the_same(launcher: Callable[[], list[str]], bases: Path, tmp_path: Path) -> None:
    """accelerate launch, and Flair's own, whose process group join_processes leaves alone."""
    launch(launcher(), tmp_path, ["adamw"], bases)
    one = TRAININGS["adamw"](str(bases), tmp_path / "one")
    for two in results(tmp_path, "adamw"):
        assert_same("adamw", two, one)


def test_without_a_launcher_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same script runs in one process: ``multi_gpu`` gets False, and the device stays."""
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    device = flair.device
    with flair_peft.join_processes() as is_distributed:
        assert is_distributed is False
        assert flair.device is device
    assert not dist.is_initialized()


def test_one_process_where_accelerate_was_asked_for_several_is_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """``accelerate launch --cpu --num_processes 2`` starts one; the others never come."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with caplog.at_level(logging.WARNING, "flair_peft"), flair_peft.join_processes() as is_distributed:
        assert not is_distributed
    assert "torchrun" in caplog.text


def test_processes_that_accelerate_set_up_to_work_alone_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would train a model of its own and write it to the same file."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(process_group, "PartialState", lambda **_: SimpleNamespace(device=torch.device("cpu")))
    with pytest.raises(TrainingSetupError, match="Cannot join the 2 processes"), flair_peft.join_processes():
        pass


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def build(base: str, **options: Any) -> Any:
    return parallel_training.classifier(base, **options)


@pytest.mark.usefixtures("group")
def test_stock_flair_cannot_train_in_processes_on_a_cpu(base: Base, tmp_path: Path) -> None:
    """What the hook makes right is still wrong in Flair: it names the device of a CPU to torch."""
    model = build(base("bert"))
    flair_peft.uninstall()
    with pytest.raises(ValueError, match=r"got device_ids \[None\]"):
        ModelTrainer(model, parallel_training.corpus()).fine_tune(tmp_path, max_epochs=1, multi_gpu=True)


@pytest.mark.usefixtures("group")
def test_wrapped_model_shares_what_it_shared_and_owns_what_is_written(base: Base) -> None:
    """Torch writes the first process's values over all that it is told of: never where other models read."""
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["query"])
    model, other = (PeftTransformerDocumentEmbeddings(base("bert-mlm"), peft_config=config) for _ in range(2))
    wrapped = ddp.wrap(ZOO["text-classifier"].build(lambda: None, lambda: model), find_unused_parameters=True)
    theirs = places_of(dict(other.named_parameters()))
    shared = {name for name, place in places_of(dict(model.named_parameters())).items() if place == theirs[name]}
    assert shared == {name for name, p in model.named_parameters() if not p.requires_grad and "pooler" not in name}
    ignored = {name.removeprefix("model.embeddings.") for name in wrapped.parameters_to_ignore}
    assert ignored == shared
    assert not wrapped.broadcast_buffers


@pytest.mark.usefixtures("group")
def test_buffers_of_a_head_travel_as_torch_has_it(base: Base) -> None:
    """Statistics that a head gathers by itself are the first process's everywhere; those of the base never change."""
    model = build(base("bert"))
    model.decoder = torch.nn.Sequential(torch.nn.BatchNorm1d(32), torch.nn.Linear(32, 2))
    assert ddp.wrap(model).broadcast_buffers


@pytest.mark.usefixtures("group")
def test_processes_with_different_bases_are_refused(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter would be trained on several bases at once; the message says in which processes."""
    model = build(base("bert"))
    monkeypatch.setattr(ddp, "aggregate", lambda found, _: [found, found, ["another"]])
    with pytest.raises(TrainingSetupError, match="processes 2 read another base model than process 0"):
        ddp.wrap(model)


@pytest.mark.usefixtures("group")
def test_prototypes_without_gradients_are_refused(base: Base, tmp_path: Path) -> None:
    """DeepNCM moves its prototypes by the sentences of one process."""
    entry = ZOO["text-classifier-deep-ncm"]
    model = entry.build(lambda **_: None, lambda **options: PeftTransformerDocumentEmbeddings(base("bert"), **options))
    with pytest.raises(TrainingSetupError, match="DeepNCMDecoder"):
        entry.train(model, entry.corpus(), tmp_path, multi_gpu=True)


@pytest.mark.usefixtures("group")
def test_sampler_that_flair_would_ignore_is_named(base: Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Flair puts torch's sampler in its place without a word."""
    from flair.samplers import ImbalancedClassificationDatasetSampler

    with caplog.at_level(logging.WARNING, "flair_peft"):
        ddp.prepare(
            build(base("bert")),
            {"base_path": tmp_path, "multi_gpu": True, "sampler": ImbalancedClassificationDatasetSampler},
        )
    assert "ignores the sampler" in caplog.text


@pytest.mark.usefixtures("group")
def test_head_that_was_cast_is_trained_in_fp32(base: Base, tmp_path: Path) -> None:
    """A loaded bf16 classifier goes on in a group of processes: its head is fp32 before torch takes note of dtypes."""
    model = build(base("bert"), dtype="bfloat16")
    model.save(tmp_path / "model.pt")
    loaded = type(model).load(tmp_path / "model.pt")
    assert loaded.decoder.weight.dtype == torch.bfloat16
    trainer = ModelTrainer(loaded, parallel_training.corpus())
    trainer.fine_tune(tmp_path / "out", max_epochs=1, mini_batch_size=8, multi_gpu=True)
    assert loaded.decoder.weight.dtype == torch.float32
