"""Write ``flair_peft/adapter/peft_registry.json``: the methods and settings of the installed PEFT.

    python resources/list_peft_methods.py

Where the file already says the same of other versions, the installed one is added to them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft

from flair_peft.adapter import peft_registry

TABLE = Path(peft_registry.__file__).with_suffix(".json")


def describe() -> dict[str, Any]:
    """What the installed PEFT says, as the file has it."""
    found = peft_registry.ask_peft()
    return {"shared_settings": sorted(found.shared_settings), "defaults": dict(sorted(found.defaults.items()))}


def main() -> None:
    found = json.loads(json.dumps(describe()))
    earlier = json.loads(TABLE.read_text(encoding="utf-8")) if TABLE.exists() else {"versions": []}
    versions = earlier.pop("versions") if {**earlier, "versions": 0} == {**found, "versions": 0} else []
    table = {"versions": sorted({*versions, peft.__version__}), **found}
    # A line for each method.
    rows = ",\n".join(
        f"{json.dumps(name)}: {json.dumps(of_method)}" for name, of_method in table.pop("defaults").items()
    )
    others = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in table.items())
    TABLE.write_text(f'{{{others}"defaults": {{\n{rows}\n}}}}\n', encoding="utf-8")


if __name__ == "__main__":
    main()
