"""Reaches into other libraries: what they change is undone, and each fails here when it is needed no more."""

from __future__ import annotations

import inspect
import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from flair.embeddings.transformer import TransformerOnnxEmbeddings
from flair.trainers import ModelTrainer
from onnxruntime.quantization import quantize_dynamic
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModel
from transformers import logging as transformers_logging

import flair_peft
from flair_peft import PeftTransformerDocumentEmbeddings
from flair_peft.primitives import host_internals

FUNCTIONS = [
    function
    for name, function in vars(host_internals).items()
    if inspect.isfunction(function) and function.__module__ == host_internals.__name__ and not name.startswith("_")
]


@pytest.mark.parametrize("function", [each for each in FUNCTIONS if each is not host_internals.tokenize_as_before])
def test_host_internals_name_the_version_that_they_were_written_for(function: Any) -> None:
    """Whoever raises a version can look each of them up."""
    assert re.search(r"Written for (torch|Flair|transformers|tokenizers|onnxruntime) \d+\.\d+", function.__doc__)


def test_one_pass_at_a_time_is_needed_while_a_pass_puts_methods_into_layers(base: Callable[[str], str]) -> None:
    """Without them, threads could run a model side by side."""
    model = AutoModel.from_pretrained(base("llama"))
    layer = model.layers[0]
    seen = list[bool]()
    layer.register_forward_hook(lambda *_: seen.append(getattr(layer.forward, "__func__", None) is type(layer).forward))
    ids = torch.tensor([[1, 2]])
    with torch.no_grad():
        model(ids, output_hidden_states=True)
    assert seen == [False]
    with host_internals.one_pass_at_a_time(model) as is_entered:
        assert is_entered


def test_storage_address_is_needed_while_data_ptr_copies_what_is_copied_on_write() -> None:
    """A public read that leaves shared memory shared would do."""
    tensor = torch.arange(4.0)
    clone = host_internals.lazy_clone(tensor)
    assert host_internals.storage_address(clone) == host_internals.storage_address(tensor)
    assert host_internals.is_copied_on_write(clone)
    clone.data_ptr()
    assert not host_internals.is_copied_on_write(clone)


def test_storage_identity_is_needed_while_addresses_of_storages_move() -> None:
    """It stays where the memory is another, and no public attribute does."""
    tensor = torch.arange(4.0)
    clone = host_internals.lazy_clone(tensor)
    before = host_internals.storage_identity(clone), host_internals.storage_address(clone)
    clone.add_(1)
    assert host_internals.storage_identity(clone) == before[0]
    assert host_internals.storage_address(clone) != before[1]
    assert not hasattr(torch.UntypedStorage, "identity")


def test_compiled_in_place_is_needed_while_torch_compile_wraps_a_module() -> None:
    """What is assigned is another class, which holds the model under another name."""
    layer = torch.nn.Linear(2, 2)
    wrapped = torch.compile(layer, backend="eager")
    assert list(wrapped.state_dict()) == ["_orig_mod.weight", "_orig_mod.bias"]
    assert host_internals.compiled_in_place(wrapped) is layer
    assert host_internals.compiled_in_place(layer) is layer
    assert host_internals.compiled_in_place(None) is None


def test_lazy_clone_is_needed_while_torch_has_no_public_one() -> None:
    """Each of the two keeps its values when the other is written to."""
    tensor = torch.arange(4.0)
    clone = host_internals.lazy_clone(tensor)
    clone.add_(1)
    assert tensor.tolist() == [0, 1, 2, 3]
    assert not {"lazy_clone", "cow_clone", "clone_lazily", "is_cow"} & {*dir(torch.Tensor), *dir(torch)}


def test_leave_out_of_synchronisation_is_needed_while_ddp_takes_no_names() -> None:
    """What is left out is an attribute that DistributedDataParallel reads, and no argument of it."""
    module = torch.nn.Linear(1, 1)
    host_internals.leave_out_of_synchronisation_(module, ["weight"])
    (name,) = set(vars(module)) - set(vars(torch.nn.Linear(1, 1)))
    assert f'"{name}"' in inspect.getsource(DistributedDataParallel.__init__)
    assert not [each for each in inspect.signature(DistributedDataParallel).parameters if "ignore" in each]


def test_variable_of_caller_is_that_of_the_method_of_this_object() -> None:
    """Another object's method of this name is another one, and so is a method that has ended."""

    class Trainer:
        def train(self, inner: Any) -> Any:
            scaler = id(self)
            return inner(), scaler

    first, second = Trainer(), Trainer()
    found = first.train(lambda: second.train(lambda: host_internals.variable_of_caller("train", first, "scaler")))
    assert found[0][0] == id(first)
    assert host_internals.variable_of_caller("train", first, "scaler") is None


def test_variable_of_caller_is_needed_while_the_trainer_keeps_its_scaler_to_itself() -> None:
    """A scaler that plugins can ask the trainer for would do."""
    assert "scaler" in inspect.unwrap(ModelTrainer.train_custom).__code__.co_varnames
    assert "self.scaler" not in inspect.getsource(ModelTrainer)


def test_without_advice_on_quantising_hides_the_advice_alone_until_the_last_is_done() -> None:
    """Nested, as in two threads, and with nothing left behind."""
    root = logging.getLogger()
    before = list(root.handlers), list(root.filters)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    advice = "Please consider pre-processing before quantization."
    root.addHandler(handler)
    try:
        one, other = (host_internals.without_advice_on_quantising() for _ in range(2))
        one.__enter__()
        other.__enter__()
        one.__exit__(None, None, None)
        logging.warning(advice)
        logging.warning("something else")
        other.__exit__(None, None, None)
        logging.warning(advice)
    finally:
        root.removeHandler(handler)
    assert records == ["something else", advice]
    assert (list(root.handlers), list(root.filters)) == before


def test_without_advice_on_quantising_is_needed_while_the_root_logger_gives_it() -> None:
    """A logger of onnxruntime's own, or an argument, would do."""
    source = inspect.getsource(sys.modules[quantize_dynamic.__module__])
    assert re.search(r"logging\.warning\(\s*\"Please consider pre-processing before quantization", source)


def test_errors_of_transformers_alone_ends_with_the_last_thread_inside() -> None:
    """The level is the one before again, whichever thread was first; what somebody sets meanwhile stays."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_warning()
    inside, leave = threading.Event(), threading.Event()

    def work() -> None:
        with host_internals.errors_of_transformers_alone():
            inside.set()
            leave.wait()

    thread = threading.Thread(target=work)
    try:
        with host_internals.errors_of_transformers_alone():
            assert transformers_logging.get_verbosity() == logging.ERROR
            thread.start()
            inside.wait()
        assert transformers_logging.get_verbosity() == logging.ERROR
        leave.set()
        thread.join()
        assert transformers_logging.get_verbosity() == logging.WARNING
        with host_internals.errors_of_transformers_alone():
            transformers_logging.set_verbosity_info()
        assert transformers_logging.get_verbosity() == logging.INFO
    finally:
        leave.set()
        transformers_logging.set_verbosity(before)


def test_errors_of_transformers_alone_is_needed_while_there_is_one_level_for_all() -> None:
    """A public way to hold messages back for a while would do."""
    assert not [name for name in dir(transformers_logging) if "context" in name or "temporar" in name]


@pytest.mark.parametrize(
    ("at_first", "meanwhile", "in_between", "at_last"),
    [(None, None, "false", None), ("true", None, "true", "true"), (None, "true", "false", "true")],
    ids=["unset", "set by the user", "set by the user meanwhile"],
)
def test_tokenize_in_one_thread_is_taken_back_and_leaves_the_users_choice(
    at_first: str | None,
    meanwhile: str | None,
    in_between: str,
    at_last: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The environment is as it was found, or as somebody else has set it."""
    host_internals.tokenize_as_before()
    monkeypatch.delenv(host_internals.PARALLELISM, raising=False)
    if at_first is not None:
        monkeypatch.setenv(host_internals.PARALLELISM, at_first)
    host_internals.tokenize_in_one_thread()
    assert os.environ[host_internals.PARALLELISM] == in_between
    if meanwhile is not None:
        monkeypatch.setenv(host_internals.PARALLELISM, meanwhile)
    host_internals.tokenize_as_before()
    assert os.environ.get(host_internals.PARALLELISM) == at_last


def test_tokenize_in_one_thread_is_needed_while_tokenizers_take_no_setting() -> None:
    """A function or an argument of tokenizers would do."""
    public = {*dir(tokenizers), *dir(tokenizers.Tokenizer)}
    assert not [name for name in public if "parallel" in name.lower()]


def test_export_of_flair_still_hands_no_exporter_on() -> None:
    """``export_onnx`` calls torch's exporter itself; a Flair that takes ``dynamo=False`` could do it."""
    function = TransformerOnnxEmbeddings.export_from_embedding
    assert "dynamo" not in inspect.getsource(function)
    assert not [each for each in inspect.signature(function).parameters.values() if each.kind is each.VAR_KEYWORD]


def test_embeddings_leave_verbosity_and_environment_as_they_were(
    base: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stock Flair sets both for the whole process; here the one is back at once, the other with ``uninstall``."""
    host_internals.tokenize_as_before()
    monkeypatch.delenv(host_internals.PARALLELISM, raising=False)
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()
    try:
        PeftTransformerDocumentEmbeddings(base("bert"))
        assert transformers_logging.get_verbosity() == logging.INFO
        assert os.environ[host_internals.PARALLELISM] == "false"
        flair_peft.uninstall()
        assert host_internals.PARALLELISM not in os.environ
    finally:
        transformers_logging.set_verbosity(before)
        flair_peft.install()
