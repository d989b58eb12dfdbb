"""The table of methods, against PEFT itself and against what the tests measured of each method."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING
from transformers import AutoModel

import flair_peft
from flair_peft.adapter import keys, methods, traits
from tests.support.methods import LORA_VARIANTS, METHODS, OTHER_VARIANTS, Method, attach

PACKAGE = Path(flair_peft.__file__).parent
ALL = {**METHODS, **LORA_VARIANTS, **OTHER_VARIANTS}
ON_AN_ENCODER = [method for method in ALL.values() if "encoder" in method.works]


def test_traits_list_every_method_that_peft_registers() -> None:
    """A method that a new PEFT brings is missing here until somebody writes its entry."""
    assert traits.METHODS.keys() == {method.value for method in PeftType}


@pytest.mark.parametrize("method", PEFT_TYPE_TO_CONFIG_MAPPING, ids=lambda method: method.value)
def test_traits_spell_a_config_class_and_a_prefix_as_peft_does(method: PeftType) -> None:
    """The names that the table holds, so that nobody has to import PEFT for them, are PEFT's."""
    entry = traits.of_method(method.value)
    assert entry.config_class == PEFT_TYPE_TO_CONFIG_MAPPING[method].__name__
    assert entry.prefixes[0] == PEFT_TYPE_TO_PREFIX_MAPPING[method]


@pytest.mark.parametrize("method", PEFT_TYPE_TO_CONFIG_MAPPING, ids=lambda method: method.value)
def test_traits_name_the_setting_that_scales_a_method(method: PeftType) -> None:
    """A config that lacks it is refused: the default of PEFT would change predictions silently."""
    settings = [field.name for field in dataclasses.fields(PEFT_TYPE_TO_CONFIG_MAPPING[method])]
    scales = [name for name in settings if name == "scaling" or re.fullmatch(r"(\w+_)?alpha", name)]
    # FRoD's weighs a penalty while it trains.
    assert traits.of_method(method.value).scale == next((n for n in scales if n != "regularization_alpha"), "")


def _inits_of_peft() -> set[str]:
    hint = typing.get_type_hints(LoraConfig)["init_lora_weights"]
    literals = [choice for each in typing.get_args(hint) for choice in typing.get_args(each)]
    return {literal.partition("_[")[0] for literal in literals}


@pytest.mark.parametrize("init", sorted(_inits_of_peft()))
def test_traits_list_every_initialisation_of_lora(init: str) -> None:
    """One that a new PEFT brings is missing here until it is measured what it does to the base."""
    assert init in traits.INITS


def test_traits_of_an_initialisation_leave_out_its_number_of_iterations() -> None:
    """PEFT takes any number after ``pissa_niter_``, and names of initialisations in capitals."""
    assert traits.of_init("pissa_niter_16") is traits.INITS["pissa_niter"]
    assert traits.of_init("OLoRA") is traits.INITS["olora"]
    assert traits.of_init("one of a newer PEFT").rewrites_base


@pytest.mark.parametrize("method", ON_AN_ENCODER, ids=lambda method: method.name)
def test_traits_say_whether_adding_an_adapter_changes_weights_of_the_base(method: Method, base: Any) -> None:
    """Measured for each method and each initialisation: EVA and MiCA leave the base as it is, PiSSA does not."""
    model = AutoModel.from_pretrained(base("bert"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_model = attach(method, model, "encoder")
    after = {keys.base_key(name): tensor for name, tensor in peft_model.state_dict().items()}
    assert before.keys() <= after.keys()
    is_changed = any(not torch.equal(tensor, after[name]) for name, tensor in before.items())
    config = peft_model.peft_config[methods.ADAPTER_NAME]
    is_tied = any(option.ties_layers for option, _ in methods.options(config))
    assert is_changed == (not is_tied and any(each.rewrites_base for each in methods.all_traits(config)))


@pytest.mark.parametrize("method", ON_AN_ENCODER, ids=lambda method: method.name)
def test_traits_say_what_was_measured_of_a_method(method: Method) -> None:
    """The package and its tests do not contradict each other on what a method needs and does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = method.config("encoder")
    assert methods.needs_step_hook(config) == method.needs_step
    assert methods.depends_on_batch(config) == method.mixes_batch
    assert methods.prepends_rows(config) == method.prepends_rows
    assert methods.virtual_tokens(config) == method.takes_positions
    assert any(each.rewrites_base for each in methods.all_traits(config)) == method.rewrites_base


def test_method_that_the_table_lacks_is_read_by_its_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PEFT that is newer than this package works with it: its methods have the traits of most methods."""
    monkeypatch.setattr(traits, "METHODS", dict(traits.METHODS))
    assert not keys.is_adapter_key("layer.0.query.newtuning_A.default")
    traits.add_unlisted_({"NEWTUNING": "newtuning_", "LORA": "other_"}, {"NEWTUNING": "NewTuningConfig"})
    try:
        assert keys.is_adapter_key("layer.0.query.newtuning_A.default")
        assert traits.of_method("NEWTUNING").config_class == "NewTuningConfig"
        assert traits.of_method("LORA").prefixes == ("lora_",)
    finally:
        traits.is_container.cache_clear()


WITHOUT_LIBRARIES = """
import sys, types
package = types.ModuleType("flair_peft")
package.__path__ = [sys.argv[1]]
sys.modules["flair_peft"] = package
import flair_peft.adapter.implied, flair_peft.adapter.keys, flair_peft.adapter.methods, flair_peft.adapter.traits
shapes = {"embeddings.model.base_model.model.layer.0.query.lora_A.default.weight": (4, 32)}
assert flair_peft.adapter.implied.read_config(shapes).text == "LoraConfig(r=4, lora_alpha=…, target_modules=['query'])"
print(*sorted({"torch", "peft", "transformers", "flair", "numpy"} & sys.modules.keys()))
"""


def test_keys_and_what_they_imply_are_read_without_other_libraries() -> None:
    """A command line that only reads names and shapes need not wait for torch, PEFT, transformers and Flair."""
    command = [sys.executable, "-c", WITHOUT_LIBRARIES, str(PACKAGE)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert ran.stdout.split() == []


NAMED_ELSEWHERE = {
    "adapter/config": {"LoraConfig"},  # what embeddings get that were given no config
    "foreign/older_peft": {"ADAMSS", "LOKR", "MISS", "OFT"},  # names that are in files of older versions
}
"""Module → methods that it names beside the table, each with the reason."""


def _names_of_methods() -> set[str]:
    classes = {config_class.__name__ for config_class in PEFT_TYPE_TO_CONFIG_MAPPING.values()}
    return {*(method.value for method in PeftType), *classes, *_inits_of_peft(), "lora_ga"}


def _named_in(path: Path) -> Iterator[str]:
    """Yield what a module's code names and what strings in it are, documentation apart."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition("_niter")[0]
        elif isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)


MODULES = sorted(path.relative_to(PACKAGE).with_suffix("").as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", [module for module in MODULES if module != "adapter/traits"])
def test_modules_but_the_table_name_no_method(module: str) -> None:
    """Whoever adds a method writes one entry, and need not look for others who know methods by name."""
    named = _names_of_methods() & set(_named_in(PACKAGE / f"{module}.py"))
    assert named == NAMED_ELSEWHERE.get(module, set())


def test_contributing_names_tables_that_exist() -> None:
    """Whoever follows the page finds every table under the name and in the file that it gives."""
    root = PACKAGE.parent
    page = (root / "CONTRIBUTING.md").read_text(encoding="utf-8")
    sections = page.partition("## A new method of PEFT")[2].partition("## Examples")[0]
    tables = re.findall(r"`(\w+)` in\s+`([\w/]+\.py)`", sections)
    assert len(tables) > 8
    for name, path in tables:
        text = (root / path if path.startswith("tests/") else PACKAGE / path).read_text(encoding="utf-8")
        assert re.search(rf"^{name}\b", text, flags=re.MULTILINE), (name, path)


def test_the_table_is_what_names_methods() -> None:
    """The rule has an object: the search finds all names of methods in the table."""
    assert {method.value for method in PeftType} <= set(_named_in(PACKAGE / "adapter" / "traits.py"))
