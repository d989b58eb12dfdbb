"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import platform
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from flair.data import Sentence
from flair.nn import Model
from packaging.version import Version
from peft import GraloraConfig, HRAConfig, IA3Config, LoraConfig, PeftConfig, UniLoraConfig

import flair_peft
from flair_peft.cli import command, main
from flair_peft.embeddings import untrained
from flair_peft.export.linear_head import live_scores
from flair_peft.inspection import report
from tests.export import reader
from tests.support.configs import lora
from tests.support.files import Payload, resign, save_as, save_stock
from tests.support.hub_stand_in import HubStandIn, online
from tests.support.models import CLASSIFIER, ZOO, make
from tests.support.round_trip import largest_difference

Base = Callable[[str], str]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function: arguments → exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main([str(argument) for argument in arguments])
        found = capsys.readouterr()
        return code, found.out, found.err

    return call


@pytest.fixture(scope="module")
def model(base: Base) -> Model:
    return make(CLASSIFIER, base("bert"), lora())


@pytest.fixture(scope="module")
def directory(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as("directory", model, tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="module")
def file(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_as("file", model, tmp_path_factory.mktemp("saved"))


@pytest.fixture
def stock(base: Base, tmp_path: Path) -> Path:
    flair_peft.uninstall()
    made = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    return save_stock(made, tmp_path / "stock.pt")


def scores(model: Model) -> list[Any]:
    sentences = [Sentence(text) for text in ("Berlin is large .", "I hated it .")]
    model.predict(sentences, return_probabilities_for_all_classes=True)
    return [[(label.value, label.score) for label in sentence.labels] for sentence in sentences]


def is_paragraph(text: str) -> bool:
    """Whether errors are one paragraph in the words of this package: no traceback, no lines without end."""
    lines = text.strip().splitlines()
    return lines[0].startswith("flair-peft: ") and "Traceback" not in text and all(len(x) < 200 for x in lines)


def test_inspect_prints_what_the_json_says(run: Run, directory: Path) -> None:
    """Both forms name method, rank, alpha, labels and base."""
    code, text, errors = run("inspect", directory)
    assert (code, errors) == (0, "")
    found = json.loads(run("inspect", directory, "--json")[1])
    assert re.search(r"^method +LORA, rank 4, alpha 12$", text, re.M)
    assert re.search(r"^Flair class +TextClassifier$", text, re.M)
    assert ", ".join(found["labels"]["label_dictionary"]["items"]) in text
    assert found["adapters"][0]["base"]["name"] in text
    assert all(line in text for line in found["missing"])


def test_inspect_names_the_revision_and_the_quantisation_of_the_base(run: Run, directory: Path, tmp_path: Path) -> None:
    """Both decide which base a reader has to have."""
    place = shutil.copytree(directory, tmp_path / "model")

    def change(document: dict[str, Any]) -> None:
        base = document["model"]["document_embeddings"]["stored_base"]["record"]
        base.update(revision="1a2b3c", quantization={"load_in_4bit": True, "load_in_8bit": False})

    resign(place, change)
    code, text, errors = run("inspect", place)
    assert (code, errors) == (0, "")
    assert re.search(r"^base +.*, revision 1a2b3c, float32, quantised \(load_in_4bit\)$", text, re.M)


def test_inspect_of_a_stock_file_prints_the_call_that_is_open(run: Run, stock: Path) -> None:
    """A user sees which config to look for."""
    code, text, _ = run("inspect", stock)
    assert code == 0
    assert re.search(
        r"^config, implied LoraConfig\(r=4, lora_alpha=…, target_modules=\['query', 'value'\]\)$", text, re.M
    )
    assert "alpha unknown" in text


def test_inspect_with_a_plot_writes_the_image(run: Run, directory: Path, tmp_path: Path) -> None:
    """The image is where it was asked for, and what it lacks is said."""
    code, _, errors = run("inspect", directory, "--plot", tmp_path / "x.png")
    assert (code, errors) == (0, "")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved)
    code, _, errors = run("inspect", moved, "--plot", tmp_path / "y.png", "--base-model", tmp_path / "nowhere")
    assert code == 2
    assert "nowhere" in errors
    assert is_paragraph(errors)


def test_inspect_with_a_base_and_no_plot_is_refused(run: Run, directory: Path) -> None:
    """It would not be read."""
    code, text, errors = run("inspect", directory, "--base-model", "elsewhere")
    assert (code, text) == (2, "")
    assert "Add --plot" in " ".join(errors.split())


def test_inspect_prints_no_character_that_moves_the_cursor(run: Run, tmp_path: Path) -> None:
    """Labels come from files, and a screen obeys what it is sent."""
    evil = {"state_dict": {"a": torch.ones(1)}, "__cls__": "\x1b[31mX\r\n\x07\u202e", "label_type": "\x1b"}
    torch.save(evil, tmp_path / "x.pt")
    code, text, _ = run("inspect", tmp_path / "x.pt")
    assert code == 0
    assert not set("\x1b\r\x07\u202e") & set(text)


def test_warning_prints_no_character_that_moves_the_cursor(
    run: Run, model: Model, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Names of embeddings come from files, too; logging is as it was after the command."""
    parameters = [p for p in model.embeddings.model.parameters() if p.requires_grad]
    name, model.embeddings.name = model.embeddings.name, "evil\x1b[31m\r"
    start, model.embeddings._start = model.embeddings._start, untrained.trained_digests(model.embeddings.model)
    try:
        path = save_as("file", model, tmp_path)
    finally:
        model.embeddings.name, model.embeddings._start = name, start
    assert parameters
    caplog.clear()
    assert run("verify", path)[0] == 0
    said = [record.getMessage() for record in caplog.records if "never updated" in record.getMessage()]
    assert len(said) == 1
    assert not set("\x1b\r") & set(said[0])
    assert r"\x1b" in said[0]
    logging.getLogger("flair_peft").warning("a\x1b")
    assert caplog.records[-1].getMessage() == "a\x1b"


def test_verify_of_a_whole_model_says_that_it_is(run: Run, directory: Path, file: Path) -> None:
    """What was saved is proved, by directory and by file."""
    for path in (directory, file):
        code, text, _ = run("verify", path)
        assert code == 0
        assert "every weight" in text


def test_verify_of_another_base_exits_with_one(run: Run, base: Base, file: Path, tmp_path: Path) -> None:
    """A single changed weight of the base is found, and told from trouble."""
    other = tmp_path / "base"
    shutil.copytree(base("bert"), other)
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    weights["encoder.layer.1.output.dense.weight"][3, 5] += 1e-3
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    code, text, errors = run("verify", file, "--base-model", other)
    assert (code, text) == (1, "")
    assert is_paragraph(errors)


def test_verify_of_a_damaged_directory_exits_with_two(run: Run, directory: Path, tmp_path: Path) -> None:
    """A flipped bit is named with its file."""
    shutil.copytree(directory, tmp_path / "x")
    content = bytearray((tmp_path / "x" / "head.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "x" / "head.safetensors").write_bytes(content)
    code, text, errors = run("verify", tmp_path / "x")
    assert (code, text) == (2, "")
    assert "head.safetensors" in errors


def test_diff_exits_like_diff(run: Run, directory: Path, file: Path, model: Model, tmp_path: Path) -> None:
    """0 if nothing differs, 1 if something does, 2 for trouble."""
    code, text, errors = run("diff", directory, file)
    assert (code, errors) == (0, "")
    assert "all else" in text
    bias = model.decoder.bias
    with torch.no_grad():
        bias[0] += 0.5
        other = save_as("file", model, tmp_path)
        bias[0] -= 0.5
    code, text, errors = run("diff", directory, other)
    assert (code, errors) == (1, "")
    assert re.search(r"decoder\.bias: at most 0\.5, relative \d", text)
    code, text, _ = run("diff", directory, other, "--json")
    assert code == 1
    assert [row["name"] for row in json.loads(text)["values"]] == ["decoder.bias"]
    code, text, errors = run("diff", directory, tmp_path / "nothing")
    assert (code, text) == (2, "")
    assert is_paragraph(errors)


def test_diff_as_json_is_json_where_a_tensor_was_zero(run: Run, model: Model, tmp_path: Path) -> None:
    """JSON has no number for a change relative to nothing."""
    bias = model.decoder.bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
        first = save_as("file", model, tmp_path)
        bias.fill_(0.5)
        second = save_as("directory", model, tmp_path)
        bias.copy_(kept)
    code, text, _ = run("diff", first, second, "--json")
    assert code == 1
    (row,) = json.loads(text, parse_constant=lambda name: pytest.fail(name))["values"]
    assert (row["largest"], row["relative"]) == (0.5, None)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[HubStandIn]:
    with HubStandIn() as stand_in, online(stand_in, None, tmp_path / "cache", token=stand_in.token):
        yield stand_in


def test_push_of_a_directory_uploads_it_as_it_is(
    run: Run,
    server: HubStandIn,
    directory: Path,
    model: Model,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The card that somebody edited goes along, other files do not, and what is loaded predicts the same."""
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    card = (directory / "README.md").read_text() + "My own words.\n"
    (copy / "README.md").write_text(card)
    (copy / "notes.txt").write_text("private\n")
    code, text, errors = run("push", copy, "me/model", "--private")
    assert code == 0, errors
    assert "me/model" in text
    assert "which others do not have; its path is published" in caplog.text
    files = server.files("me/model")
    assert files["README.md"].decode() == card
    assert "notes.txt" not in files
    for name in ("flair_peft.json", "head.safetensors", "adapter_model.safetensors"):
        assert files[name] == (directory / name).read_bytes()
    assert scores(flair_peft.from_pretrained("me/model")) == scores(model)


def test_push_of_a_file_uploads_a_checkpoint(run: Run, server: HubStandIn, file: Path, model: Model) -> None:
    """A ``.pt`` file becomes a directory on the Hub, on the branch that was asked for."""
    code, text, _ = run("push", file, "me/model", "--revision", "v1")
    assert code == 0
    assert "me/model" in text
    assert scores(flair_peft.from_pretrained("me/model", revision="v1")) == scores(model)


def test_push_of_a_damaged_directory_uploads_nothing(
    run: Run, server: HubStandIn, directory: Path, tmp_path: Path
) -> None:
    """What is published was verified."""
    shutil.copytree(directory, tmp_path / "x")
    (tmp_path / "x" / "head.safetensors").write_bytes(b"x" * (directory / "head.safetensors").stat().st_size)
    code, _, errors = run("push", tmp_path / "x", "me/model")
    assert code == 2
    assert "head.safetensors" in errors
    assert not server.requests


@pytest.mark.parametrize("option", [["--base-model", "elsewhere"], ["--trust-remote-code"]], ids=" ".join)
def test_push_of_a_directory_with_options_of_a_load_is_refused(
    option: list[str], run: Run, server: HubStandIn, directory: Path
) -> None:
    """An option that would change nothing is not taken."""
    code, _, errors = run("push", directory, "me/model", *option)
    assert code == 2
    assert "its base is not loaded" in " ".join(errors.split())
    assert not server.requests


class Converter:
    """Stands in for ``convert_legacy`` and remembers how it was called."""

    def __init__(self) -> None:
        self.calls: list[tuple[Path, Path, LoraConfig, dict[str, Any]]] = []

    def __call__(self, path: Path, directory: Path, *, peft_config: LoraConfig, **options: Any) -> None:
        assert options.keys() == {"base_model", "trust_pickle"}
        self.calls.append((path, directory, peft_config, options))


@pytest.fixture
def converter(monkeypatch: pytest.MonkeyPatch) -> Converter:
    made = Converter()
    monkeypatch.setattr(flair_peft, "convert_legacy", made)
    return made


def test_convert_completes_what_the_tensors_say(run: Run, stock: Path, converter: Converter, tmp_path: Path) -> None:
    """Rank and targets come from the file, alpha and the like from the user."""
    options = ("--lora-alpha", "12", "--use-rslora", "--lora-dropout", "0.1", "--base-model", "b", "--trust-pickle")
    code, text, errors = run("convert", stock, tmp_path / "out", *options)
    assert (code, errors) == (0, "")
    ((path, directory, config, given),) = converter.calls
    assert (path, directory) == (stock, tmp_path / "out")
    assert given == {"base_model": "b", "trust_pickle": True}
    assert (config.r, config.lora_alpha, config.use_rslora, config.lora_dropout) == (4, 12, True, 0.1)
    assert type(config.lora_alpha) is int
    assert set(config.target_modules) == {"query", "value"}
    assert "lora_alpha=12" in text
    assert "use_rslora=True" in text


def test_convert_without_an_alpha_is_refused_with_the_call(run: Run, stock: Path, converter: Converter) -> None:
    """Nothing that changes predictions is guessed."""
    code, text, errors = run("convert", stock, "out")
    assert (code, text, converter.calls) == (2, "", [])
    assert "LoraConfig(r=4, lora_alpha=…" in " ".join(errors.split())
    assert is_paragraph(errors)


@pytest.mark.parametrize(
    ("config", "options", "text"),
    [
        (GraloraConfig(target_modules=["query"], alpha=6), (), "alpha=…, gralora_k=…"),
        (UniLoraConfig(target_modules=["query"], proj_seed=7), (), "proj_seed=…, theta_d_length=…"),
        (HRAConfig(target_modules=["query"], apply_GS=True), (), "apply_GS=…"),
        (IA3Config(target_modules=["query"], feedforward_modules=[]), ("--lora-alpha", "6"), "Cannot use --lora-alpha"),
    ],
)
def test_convert_of_a_method_whose_tensors_do_not_say_everything_needs_a_config(
    config: PeftConfig, options: tuple[str, ...], text: str, run: Run, converter: Converter, base: Base, tmp_path: Path
) -> None:
    """No scale and no seed is taken from PEFT's defaults, and no setting that the method lacks is taken at all."""
    flair_peft.uninstall()
    made = make(CLASSIFIER, base("bert"), config, is_stock=True)
    flair_peft.install()
    code, output, errors = run("convert", save_stock(made, tmp_path / "stock.pt"), "out", *options)
    assert (code, output, converter.calls) == (2, "", [])
    assert text in " ".join(errors.split())
    assert is_paragraph(errors)


@pytest.mark.parametrize("alpha", ["nan", "inf", "0", "-3"])
def test_convert_with_an_alpha_that_is_no_scale_is_refused(
    alpha: str, run: Run, stock: Path, converter: Converter
) -> None:
    """Before anything is written that could not be loaded."""
    code, text, errors = run("convert", stock, "out", f"--lora-alpha={alpha}")
    assert (code, text, converter.calls) == (2, "", [])
    assert "--lora-alpha" in errors
    assert is_paragraph(errors)


def test_convert_takes_the_config_of_the_training(run: Run, stock: Path, converter: Converter, tmp_path: Path) -> None:
    """PEFT's own file is taken as it is, and nothing beside it."""
    lora(lora_dropout=0.3).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    assert run("convert", stock, tmp_path / "out", "--config", config)[0] == 0
    assert converter.calls[0][2].lora_dropout == 0.3
    code, _, errors = run("convert", stock, tmp_path / "out", "--config", config, "--lora-alpha", "3")
    assert code == 2
    assert "Cannot use --lora-alpha" in errors
    config.write_text("{")
    code, _, errors = run("convert", stock, tmp_path / "out", "--config", config)
    assert code == 2
    assert is_paragraph(errors)


@pytest.mark.parametrize(
    "settings",
    [{}, {"use_dora": True, "bias": "all"}, {"trainable_token_indices": [3, 5]}, {"modules_to_save": ["pooler"]}],
    ids=str,
)
@pytest.mark.parametrize("kind", ["file", "whole-file"])
def test_convert_makes_a_directory_of_a_file_that_holds_its_config(
    settings: dict[str, Any], kind: str, run: Run, base: Base, tmp_path: Path
) -> None:
    """The one that save_pretrained writes."""
    model = make(CLASSIFIER, base("bert"), lora(**settings)).eval()
    directory = save_as("directory", model, tmp_path)
    code, text, errors = run("convert", save_as(kind, model, tmp_path), tmp_path / "made")
    assert code == 0, errors
    assert text == f"{tmp_path / 'made'} holds the model.\n"
    assert run("diff", directory, tmp_path / "made")[0] == 0
    assert scores(flair_peft.from_pretrained(tmp_path / "made")) == scores(model)


@pytest.mark.parametrize(("kind", "words"), [("file", "holds the config"), ("directory", "what this command makes")])
def test_convert_of_a_model_that_knows_its_config_takes_no_other(
    kind: str, words: str, run: Run, converter: Converter, request: pytest.FixtureRequest
) -> None:
    """There is nothing to complete."""
    code, _, errors = run("convert", request.getfixturevalue(kind), "out", "--lora-alpha", "3")
    assert (code, converter.calls) == (2, [])
    assert is_paragraph(errors)
    assert words in " ".join(errors.split())


def test_convert_makes_a_checkpoint_that_predicts_what_the_old_model_did(run: Run, base: Base, tmp_path: Path) -> None:
    """From the file to the directory in one command, with nothing standing in for anything."""
    flair_peft.uninstall()
    old = make(CLASSIFIER, base("bert"), lora(), is_stock=True)
    flair_peft.install()
    path = save_stock(old, tmp_path / "old.pt")
    code, text, errors = run("convert", path, tmp_path / "new", "--lora-alpha", str(lora().lora_alpha))
    assert code == 0, errors
    assert "LORA (r=4, lora_alpha=12" in text
    assert scores(flair_peft.from_pretrained(tmp_path / "new")) == scores(old)
    assert run("verify", tmp_path / "new")[0] == 0


def test_merge_writes_a_file_that_stock_flair_loads(run: Run, file: Path, model: Model, tmp_path: Path) -> None:
    """The model is loaded, merged and saved in the one dtype in which stock Flair predicts."""
    code, text, errors = run("merge", file, tmp_path / "out.pt")
    assert code == 0, errors
    stored = torch.load(tmp_path / "out.pt", weights_only=False)["state_dict"]
    found = {str(t.dtype) for name, t in stored.items() if name.startswith("embeddings.") and t.is_floating_point()}
    assert found == {"torch.float32"}
    assert "out.pt" in text
    flair_peft.uninstall()
    merged = scores(type(model).load(tmp_path / "out.pt"))
    flair_peft.install()
    assert largest_difference(scores(model), merged) < 1e-4
    code, _, errors = run("merge", file, tmp_path / "nowhere" / "out.pt")
    assert code == 2
    assert is_paragraph(errors)


def test_merge_refuses_to_write_what_flair_cannot_read(run: Run, base: Callable[[str], str], tmp_path: Path) -> None:
    """A label encoder is pickled with the decoder around it, and no file of it would load."""
    flair_peft.save_pretrained(make(ZOO["text-classifier-label-verbalizer"], base("bert"), lora()), tmp_path / "model")
    code, _, errors = run("merge", tmp_path / "model", tmp_path / "out.pt")
    assert code == 2
    assert "Flair pickles 'decoder' of this TextClassifier" in " ".join(errors.split())
    assert not (tmp_path / "out.pt").exists()


def test_convert_says_what_a_language_model_is(run: Run, tmp_path: Path) -> None:
    """Flair's own files of it name no class, so that no import would help."""
    torch.save({"state_dict": {}, "is_forward_lm": True, "nlayers": 1}, tmp_path / "lm.pt")
    code, _, errors = run("convert", tmp_path / "lm.pt", tmp_path / "out")
    assert code == 2
    assert "it names no model class, as a character language model does not" in " ".join(errors.split())


def test_export_writes_a_graph_and_the_model_that_runs_it(run: Run, file: Path, model: Model, tmp_path: Path) -> None:
    code, text, errors = run("export", file, tmp_path / "encoder.onnx", tmp_path / "out.pt")
    assert code == 0, errors
    assert "encoder.onnx" in text
    assert largest_difference(scores(model), scores(type(model).load(tmp_path / "out.pt"))) < 1e-4


@pytest.mark.parametrize("option", [[], ["--adapter"]], ids=["merged", "adapter"])
def test_export_to_transformers_writes_a_directory_that_scores_the_same(
    option: list[str], run: Run, file: Path, model: Model, tmp_path: Path
) -> None:
    code, text, errors = run("export", file, tmp_path / "out", "--to", "transformers", *option)
    assert (code, errors) == (0, "")
    assert "for transformers" in text
    words = [["Berlin", "is", "large", "."]]
    found = torch.tensor(reader.scores(str(tmp_path / "out"), words, reads_words=False, is_merged=not option))
    assert (found - live_scores(model, words)).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["x.onnx"], "Only the first is named"),
        (["x.onnx", "x.pt", "--adapter"], "pass --to transformers"),
        (["out", "x.pt", "--to", "transformers"], "a .pt file"),
        (["out", "--to", "transformers", "--int8", "x"], "--int8"),
    ],
)
def test_export_with_arguments_of_the_other_form_is_refused(
    arguments: list[str], reason: str, run: Run, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that was asked for is left aside."""
    monkeypatch.chdir(tmp_path)
    code, text, errors = run("export", file, *arguments)
    assert (code, text) == (2, "")
    assert reason in " ".join(errors.split())
    assert not list(tmp_path.iterdir())


def test_export_to_transformers_does_not_write_over_what_it_reads(run: Run, directory: Path, tmp_path: Path) -> None:
    """A checkpoint and a model of transformers are two directories."""
    shutil.copytree(directory, tmp_path / "model")
    before = sorted(path.name for path in (tmp_path / "model").iterdir())
    code, _, errors = run("export", tmp_path / "model", tmp_path / "model", "--to", "transformers")
    assert code == 2
    assert "the model that is read" in " ".join(errors.split())
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == before


@pytest.mark.parametrize("form", ["file", "link", "directory"])
@pytest.mark.parametrize("command", ["merge", "export"])
def test_model_that_is_read_is_not_written_over(
    command: str, form: str, run: Run, file: Path, directory: Path, tmp_path: Path
) -> None:
    """The only copy of an adapter is not replaced by a model without it."""
    source, target = tmp_path / "model", tmp_path / "model"
    if form == "directory":
        shutil.copytree(directory, source)
        target = source / "adapter_model.safetensors"
    else:
        shutil.copyfile(file, source)
    if form == "link":
        target = tmp_path / "link"
        target.symlink_to(source)
    before = target.read_bytes()
    code, _, errors = run(command, source, *([tmp_path / "x.onnx"] if command == "export" else []), target)
    assert code == 2
    assert "the model that is read" in " ".join(errors.split())
    assert target.read_bytes() == before
    assert not (tmp_path / "x.onnx").exists()


COMMANDS = tuple(main._COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """What the help shows can be typed."""
    with pytest.raises(SystemExit) as stop:
        main.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    example = text.rpartition("example:")[2].split()
    assert example[:2] == ["flair-peft", command]
    assert main._make_parser().parse_args(example[1:]).command == command


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["inspect"], ["diff", "a"], ["merge", "a", "b", "--dtype", "float16"]]
)
def test_wrong_arguments_exit_with_two(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """argparse explains on stderr."""
    with pytest.raises(SystemExit) as stop:
        main.main(arguments)
    assert stop.value.code == 2
    assert "usage:" in capsys.readouterr().err


def _hostile(folder: Path) -> Iterator[Path]:
    draw = random.Random(0)
    contents = {
        "empty.pt": b"",
        "noise.pt": draw.randbytes(5_000),
        "zip.pt": b"PK\x03\x04" + draw.randbytes(500),
        "pickle.pt": b"\x80\x02" + draw.randbytes(500),
        "deep.pt": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        yield folder / name
    torch.save({"state_dict": {"a": Payload(folder / "executed")}, "x": 1}, folder / "payload.pt")
    yield folder / "payload.pt"
    for name, text in (("json", "{"), ("deep", '{"a":' * 100_000), ("huge", "1" * 1_000_000)):
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(text)
        yield folder / name
        (folder / f"own-{name}").mkdir()
        (folder / f"own-{name}" / "flair_peft.json").write_text(text)
        yield folder / f"own-{name}"


def test_export_in_int8_prints_what_it_costs(run: Run, file: Path, tmp_path: Path) -> None:
    (tmp_path / "texts.txt").write_text("Berlin is large .\n\nI love this movie .\n", encoding="utf-8")
    targets = (tmp_path / "encoder.onnx", tmp_path / "out.pt")
    code, text, errors = run("export", file, *targets, "--int8", tmp_path / "texts.txt")
    assert (code, errors) == (0, "")
    assert re.search(r"int8: \d of 2 data points keep their labels, scores change by up to 0\.\d+, files", text)
    (tmp_path / "texts.txt").write_text("\n", encoding="utf-8")
    code, _, errors = run("export", file, *targets, "--int8", tmp_path / "texts.txt")
    assert code == 2
    assert "it holds no sentence" in " ".join(errors.split())
    code, _, errors = run("export", file, *targets, "--int8", tmp_path / "missing.txt")
    assert code == 2
    assert "Cannot read the sentences" in " ".join(errors.split())


@pytest.mark.parametrize("command", ["inspect", "diff", "convert", "verify", "push", "merge", "export"])
def test_hostile_input_is_a_paragraph_and_exit_code_two(
    command: str, run: Run, tmp_path: Path, directory: Path
) -> None:
    """No traceback, nothing on the output, and no payload runs."""
    more = {
        "diff": [directory],
        "convert": [tmp_path / "out"],
        "push": ["me/x"],
        "merge": [tmp_path / "out.pt"],
        "export": [tmp_path / "x.onnx", tmp_path / "out.pt"],
    }
    for path in _hostile(tmp_path):
        if path.name == "payload.pt" and command in ("inspect", "diff"):
            assert run(command, path, *more.get(command, []))[0] in (0, 1)
            continue
        if path.name == "payload.pt" and command != "convert":
            continue  # without an adapter, it is a pickle of Flair's own, which Flair loads
        code, text, errors = run(command, path, *more.get(command, []))
        assert (code, text) == (2, ""), path
        assert is_paragraph(errors), path
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("command", ["verify", "merge", "export", "push"])
def test_directory_that_is_no_checkpoint_is_called_that(command: str, run: Run, tmp_path: Path) -> None:
    """Nobody is told that what never was a checkpoint was changed."""
    (tmp_path / "folder").mkdir()
    more = {"merge": ["x.pt"], "export": ["x.onnx", "x.pt"], "push": ["me/x"]}
    code, text, errors = run(command, tmp_path / "folder", *more.get(command, []))
    assert (code, text) == (2, "")
    assert "no checkpoint of flair_peft" in " ".join(errors.split())


def test_device_is_called_neither_file_nor_directory(run: Run) -> None:
    """It is there, but holds no model."""
    code, _, errors = run("inspect", os.devnull)
    assert code == 2
    assert "neither a file nor a directory" in " ".join(errors.split())


@pytest.mark.parametrize("targets", [("x.pt", "x.pt"), ("x.onnx", "missing/x.pt"), ("missing/x.onnx", "x.pt")])
def test_export_finds_out_first_where_it_cannot_write(
    targets: tuple[str, str], run: Run, directory: Path, tmp_path: Path
) -> None:
    """Neither of the two files is written, nor a folder made, before both can be."""
    code, text, errors = run("export", directory, *(tmp_path / name for name in targets))
    assert (code, text) == (2, "")
    assert is_paragraph(errors)
    assert "not expected" not in errors
    assert not list(tmp_path.iterdir())


def test_traceback_is_shown_to_who_asks(run: Run, tmp_path: Path) -> None:
    """Developers see where."""
    code, _, errors = run("--traceback", "inspect", tmp_path / "nothing")
    assert code == 2
    assert "Traceback" in errors


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("odd"), 2), (OSError(28, "full"), 2)]
)
def test_exit_codes_of_what_is_raised(
    raised: BaseException, code: int, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C is 130 without a word; whatever else happens is a paragraph."""

    def fail(_: Path) -> None:
        raise raised

    monkeypatch.setattr(report, "inspect", fail)
    found, text, errors = run("inspect", "x")
    assert (found, text) == (code, "")
    assert errors == "" if code == 130 else is_paragraph(errors)


def _start(*arguments: object, **options: Any) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(Path(flair_peft.__file__).parents[1]), **options.pop("env", {})}
    command = [sys.executable, "-m", "flair_peft", *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)


@pytest.mark.matrix
def test_module_runs_as_a_program(file: Path) -> None:
    """``python -m flair_peft`` prints in any encoding."""
    process = _start("inspect", file, env={"PYTHONIOENCODING": "ascii"})
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert b"TextClassifier" in output


def test_output_that_nobody_reads_ends_the_command_quietly(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in ``flair-peft inspect … | head -1``."""

    class Closed(io.StringIO):
        def write(self, _: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert main.main(["inspect", str(file)]) == command.CLOSED
    assert capsys.readouterr().err == ""


@pytest.mark.matrix
def test_module_survives_a_closed_pipe(file: Path) -> None:
    """It ends quietly when nobody reads."""
    process = _start("inspect", file)
    process.stdout.close()  # type: ignore[union-attr]
    errors = process.stderr.read()  # type: ignore[union-attr]
    process.wait(timeout=120)
    process.stderr.close()  # type: ignore[union-attr]
    assert process.returncode == 141
    assert b"Traceback" not in errors
    assert b"BrokenPipe" not in errors


def test_version_is_that_of_the_package_and_of_what_it_stands_on(capsys: pytest.CaptureFixture[str]) -> None:
    """What a report of a bug asks for, a line for each, and nothing of what is not installed."""
    with pytest.raises(SystemExit) as ended:
        main.main(["--version"])
    first, second, *libraries = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    assert first == f"flair_peft {flair_peft.__version__}"
    assert second.startswith(f"Python {platform.python_version()} on ")
    found = dict(line.split(" ") for line in libraries)
    required = {"flair", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "huggingface_hub"}
    assert required <= set(found) <= required | {"bitsandbytes", "torchao"}
    assert Version(found["torch"]).public == Version(torch.__version__).public  # the name of a build may be missing
    assert ("torchao" in found) == (importlib.util.find_spec("torchao") is not None)


def test_plain_model_is_inspected_converted_and_verified_without_a_word_of_adapters(
    run: Run, base: Base, tmp_path: Path
) -> None:
    """A pickle of stock Flair becomes a directory, and what is said of both is what users know of their model."""
    made = make(CLASSIFIER, base("bert"), None, is_stock=True)
    path, directory = save_stock(made, tmp_path / "plain.pt"), tmp_path / "out"
    expected = CLASSIFIER.predict(made, CLASSIFIER.corpus())
    said = [run("inspect", path), run("convert", path, directory), run("inspect", directory), run("verify", directory)]
    assert [(code, errors) for code, _, errors in said] == [(0, "")] * 4
    assert not any("adapter" in text.lower() for _, text, _ in said)
    for text in (said[0][1], said[2][1]):
        assert f"base            {base('bert')}, float32" in text
        assert "embeddings      TransformerDocumentEmbeddings (document_embeddings)" in text
        assert "labels          label_dictionary (sentiment, 3): neutral, positive, negative" in text
    assert re.search(r"size .*: head \d+ bytes, transformer [\d.]+ kB", said[2][1])
    assert CLASSIFIER.predict(Model.load(directory), CLASSIFIER.corpus()) == expected
    code, _, errors = run("convert", path, tmp_path / "more", "--lora-alpha", "8")
    assert (code, "Cannot use --lora-alpha" in errors) == (2, True)
    assert is_paragraph(errors)


@pytest.mark.parametrize("command", ["verify", "merge", "convert"])
def test_message_calls_options_as_the_command_does(command: str, run: Run, base: Base, tmp_path: Path) -> None:
    """Python's functions, which the commands call, have arguments."""
    folder = shutil.copytree(base("bert"), tmp_path / "base")
    model = make(CLASSIFIER, str(folder), lora()).eval()
    path = save_as("file", model, tmp_path)
    shutil.rmtree(folder)
    _, _, errors = run(command, path, *([] if command == "verify" else [tmp_path / "out.pt"]))
    assert "Pass --base-model with the directory or Hub id" in " ".join(errors.split())
    assert "base_model=" not in errors
