"""What stands for PEFT configs and paths in pickles: values that do nothing, whatever the pickle does with them."""

from __future__ import annotations

import io
import pickle
from typing import Any

import pytest
from peft import LoraConfig, PromptTuningConfig, TaskType

from flair_peft.adapter import config as configs
from flair_peft.torchfile import unpickle

CONFIG = b"cpeft.tuners.lora.config\nLoraConfig\n"
TYPE = b"cpeft.utils.peft_types\nPeftType\n"
PATH = b"cpathlib\nPosixPath\n"
TEXT = b"X\x04\x00\x00\x00LORA"


def read(body: bytes) -> Any:
    return unpickle._AllowedUnpickler(io.BytesIO(b"\x80\x02" + body + b".")).load()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=3, lora_alpha=7, target_modules=["query"], task_type=TaskType.FEATURE_EXTRACTION, use_dora=True),
        PromptTuningConfig(num_virtual_tokens=4, task_type="FEATURE_EXTRACTION"),
    ],
    ids=["lora", "prompt"],
)
def test_pickled_config_comes_back_as_the_config_that_it_was(config: Any, protocol: int) -> None:
    """No class of PEFT is made by the unpickler: it gives settings, which are checked like those of any file."""
    settings = unpickle._AllowedUnpickler(io.BytesIO(pickle.dumps(config, protocol))).load()
    assert isinstance(settings, dict)
    assert configs.decode_config(settings).to_dict() == configs.own_config(config).to_dict()


def test_values_are_plain() -> None:
    assert read(TYPE + TEXT + b"\x85R") == "LORA"
    assert read(PATH + b"(X\x01\x00\x00\x00aX\x01\x00\x00\x00btR") == "a/b"


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(CONFIG + b")R", id="config called"),
        pytest.param(CONFIG + TEXT + b"\x85R", id="config called with an argument"),
        pytest.param(CONFIG + TEXT + b"\x85\x81", id="config made with an argument"),
        pytest.param(CONFIG + b")\x81" + TEXT + b"b", id="config given a text for its settings"),
        pytest.param(CONFIG + b")\x81}K\x01K\x02sb", id="config with a number for a name"),
        pytest.param(CONFIG + b")\x81}}\x86b", id="config with slots"),
        pytest.param(TYPE + b"K\x01\x85R", id="member that is a number"),
        pytest.param(TYPE + b")\x81", id="member made as an object"),
        pytest.param(PATH + b"(K\x01tR", id="path of a number"),
        pytest.param(PATH + b")\x81}b", id="path made as an object"),
        pytest.param(b"cpeft.peft_model\nPeftModel\n)\x81", id="another class of PEFT"),
        pytest.param(b"cpeft.tuners.lora.config\nos\n)\x81", id="another name in a module of configs"),
    ],
)
def test_other_uses_are_refused(body: bytes) -> None:
    """Names are looked up for nothing but what Flair's files do with them."""
    with pytest.raises((pickle.UnpicklingError, TypeError)):
        read(body)
