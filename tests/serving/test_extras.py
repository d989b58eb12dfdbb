"""What serves models is imported when it is asked for, and says which extra it wants."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from flair_peft import serving
from flair_peft.errors import AdapterConfigError


@pytest.mark.parametrize(("name", "library", "extra"), [("create_app", "fastapi", "serve"), ("ray_app", "ray", "ray")])
def test_name_of_an_extra_that_is_not_installed_says_which_it_is(
    name: str, library: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three sentences, and the command that helps, instead of a ModuleNotFoundError."""
    plain = importlib.util.find_spec

    def find_spec(wanted: str, package: str | None = None) -> Any:
        return None if wanted == library else plain(wanted, package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(AdapterConfigError) as error:
        getattr(serving, name)
    assert str(error.value).startswith(f"Cannot serve models: '{library}' cannot be imported here.")
    assert str(error.value).endswith(f'Install its extra: pip install -e ".[{extra}]" in its folder.')


def test_package_of_what_serves_has_no_other_names() -> None:
    """A name that is misspelled is an AttributeError, as in any module."""
    with pytest.raises(AttributeError, match="crate_app"):
        serving.crate_app  # noqa: B018
