"""Flair's ``.pt`` files: the only place that unpickles."""

from __future__ import annotations

import functools
import importlib
import io
import os
import pickle
import re
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Set
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from flair.file_utils import load_big_file, load_torch_state

from flair_peft.errors import (
    FlairPeftError,
    ModelFileError,
    UnsafeFileError,
    name_some,
)
from flair_peft.primitives.held_file import AnyFile, HeldFile, reading
from flair_peft.torchfile import checksums, outline, scan, state_tree
from flair_peft.torchfile.allowed_names import (
    BUILTINS,
    CONSTANTS,
    EMBEDDINGS_STATE,
    FUNCTIONS,
    KEPT_ALIVE,
    MODULES,
    READ_AT_ONCE,
    RECORDS,
    WITHHELD,
)

State = dict[str, Any]


def read_state(path: AnyFile, *, expects_adapters: bool = True, trust_pickle: bool = False) -> State:
    """Return the state of a Flair model; no code of the file is run, unless that is asked for.

    Every name in its pickles has to be one that Flair writes of its models before anything is unpickled, and the
    checksums are right. Tensors may be views of the file, so it should not be written
    into as long as the state is held.

    Args:
        path: of the file.
        expects_adapters: False where files without adapters are Flair's own business: its own function reads these,
            and they can run any code.
        trust_pickle: read every file as Flair does: it can run any code.

    Raises:
        ModelFileError: the file is truncated, empty, or not a Flair model, or a checksum is wrong.
        UnsafeFileError: it names what hardly any Flair model needs; nothing of it was run.
    """

    def read(file: HeldFile) -> State:
        state = _read(file, expects_adapters=expects_adapters, trust_pickle=trust_pickle)
        if not isinstance(state, dict) or not state_tree.holds_tensors(state):
            raise ModelFileError(
                f"Cannot load '{path}': it holds a {type(state).__name__} without a 'state_dict'. A Flair model file "
                "has one beside its settings. Pass a file that model.save() or Flair's trainer wrote."
            )
        if (expects_adapters and not trust_pickle) or state_tree.has_adapters(state):
            checksums.check_sums(file)
        return state

    return reading(path, read)


def holds_adapters(path: AnyFile) -> bool:
    """Whether a file holds a model with an adapter, by what its state would be; nothing of it is loaded.

    Where that cannot be followed to its end, words that files with adapters hold are enough.

    Raises:
        ModelFileError: the file is a zip file that cannot be read.
    """
    return _holds_adapters(path, scan.read_contents(path))


def _holds_adapters(path: AnyFile, contents: scan.PickleContents | None) -> bool:
    if contents is None or not contents.marks:
        return False
    if not contents.is_whole or any(n == scan.UNRESOLVED or n.startswith("flair_peft.") for n in contents.globals):
        return True
    try:
        state = outline.read_outline(path).value
    except ModelFileError:
        return True
    return not isinstance(state, dict) or not state_tree.holds_tensors(state) or state_tree.has_adapters(state)


def _read(path: HeldFile, *, expects_adapters: bool, trust_pickle: bool) -> Any:
    try:
        contents = None if trust_pickle else scan.read_contents(path)
        is_checked = not trust_pickle and (expects_adapters or _holds_adapters(path, contents))
        return _read_allowed(path, contents) if is_checked else load_torch_state(os.fspath(path))
    except FlairPeftError:
        raise
    except Exception as error:  # a damaged pickle can call anything with anything
        raise ModelFileError(
            f"Cannot read '{path}' ({path.stat().st_size} bytes): {type(error).__name__}: {error}. It is truncated, "
            "it was never written by Flair, or Flair pickled what it cannot unpickle, such as a label encoder. Copy or "
            "save it again, with flair_peft.save_pretrained in the last case."
        ) from error


def _read_allowed(path: AnyFile, contents: scan.PickleContents | None) -> Any:
    names = frozenset[str]() if contents is None else contents.globals
    refused = {name for name in names if not _is_allowed(name)}
    if refused:
        raise UnsafeFileError(
            f"Cannot load '{path}': it names {name_some(refused)}, which hardly any model of Flair needs. Loading a "
            "pickle runs what it names, so such a file can do anything; nothing of it was run. If you know "
            f"who wrote it and trust them: flair_peft.load_legacy('{path}', trust_pickle=True)."
        )
    if contents is None or not contents.is_whole:
        raise pickle.UnpicklingError("the pickle in it has no end")
    load = functools.partial(torch.load, map_location="cpu", pickle_module=_AllowedPickle, weights_only=False)
    if not scan.is_zip(path):
        if not names.isdisjoint(READ_AT_ONCE):
            raise pickle.UnpicklingError("its objects stand in front of the tensors that they are made of")
        return load(load_big_file(os.fspath(path)))
    _refuse_scripts(path)
    # A module that is pickled whole becomes part of the model, and would break when the file is written again.
    return load(path, mmap=names.isdisjoint(KEPT_ALIVE))


def _refuse_scripts(path: AnyFile) -> None:
    """Refuse an archive that torch would hand on to TorchScript, which has a language and files of its own."""
    if any(member.name.endswith("/constants.pkl") for member in scan.stored_members(path)):
        raise UnsafeFileError(
            f"Cannot load '{path}': it is a TorchScript archive. Flair's models are not, and a script can do more than "
            "a model has to; nothing of it was run. Pass a file that model.save() or Flair's trainer wrote."
        )


def _encode(text: str, encoding: str) -> bytes:
    """Return bytes as protocol 2 stores them; other encodings would import modules and take quadratic time."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it holds bytes in {encoding!r:.80}")
    return text.encode("latin1")


def _default_dictionary(factory: str | None = None) -> defaultdict[Any, Any]:
    """Return a dictionary that makes its values with one of Python's own classes, as Flair's counters do."""
    return defaultdict(None if factory is None else _FACTORIES[factory])


class _NumpyType:
    """The type of a number: loss weights and other settings may have been computed with numpy."""

    def __init__(self, code: str, *_: bool) -> None:
        if not re.fullmatch(r"[biuf][1248]", code):
            raise pickle.UnpicklingError(f"it holds numbers of type {code!r:.80}")
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"it holds numbers in the byte order {state[1]!r:.80}")
        self.code = state[1] + self.code


def _number(kind: _NumpyType, content: bytes) -> Any:
    """Return the number that the bytes are."""
    if type(kind) is not _NumpyType:
        raise pickle.UnpicklingError("it holds a number without a type")
    (number,) = np.frombuffer(content, kind.code)
    return number


def _path(*parts: str) -> str:
    """Return a path as text: Flair's model card holds the folder of the training."""
    if not all(isinstance(part, str) for part in parts):
        raise pickle.UnpicklingError("it holds a path of something else than text")
    return str(Path(*parts))


def _member(value: str) -> str:
    """Return the value of a member of one of PEFT's enumerations."""
    if not isinstance(value, str):
        raise pickle.UnpicklingError("it holds a member of an enumeration that is no text")
    return value


class _StoredConfig(dict[str, Any]):
    """Stands for a PEFT config, which Flair's development version pickles: its settings, by which it is made anew."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        # What is chosen anew in each process is no setting; other configs do not store it.
        self.update({name: value for name, value in state.items() if name != "runtime_config"})


def _is_config(name: str) -> bool:
    """Whether a name is that of a PEFT config or a part of one: nothing of these is imported or called."""
    return re.fullmatch(r"peft\.tuners\.[\w.]+\.\w+Config", name) is not None


# Instead of what these names mean elsewhere, which does more with some arguments than a Flair model needs.
_REPLACED: dict[str, Callable[..., Any]] = {
    "_codecs.encode": _encode,
    "__builtin__.bytes": lambda: b"",  # as protocol 2 stores no bytes; with a number, they would fill the memory
    "collections.defaultdict": _default_dictionary,
    "numpy.dtype": _NumpyType,
    "numpy.core.multiarray.scalar": _number,
    "numpy._core.multiarray.scalar": _number,
    **{f"{module}.{kind}Path": _path for module in ("pathlib", "pathlib._local") for kind in ("Posix", "Windows")},
    **{f"peft.utils.peft_types.{kind}": _member for kind in ("PeftType", "TaskType")},
    "peft.tuners.p_tuning.config.PromptEncoderReparameterizationType": _member,
    "peft.tuners.prompt_tuning.config.PromptTuningInit": _member,
}
_FACTORIES = {f"{module}.{kind.__name__}": kind for module in BUILTINS for kind in (int, float, list, dict)}
_FACTORIES["__builtin__.long"] = int

_ALLOWED = FUNCTIONS | RECORDS | MODULES | CONSTANTS | _REPLACED.keys() | _FACTORIES.keys()


def _is_allowed(name: str) -> bool:
    return name in _ALLOWED or name.startswith(WITHHELD) or _is_config(name)


class _Name(str):
    """The name of a function or class, on the unpickler's stack in the place of the thing itself.

    Only the opcodes that call look the thing up. So nothing that can be called ever becomes a value of the state,
    where a hook or a default might call it later.
    """

    def look_up(self) -> Any:
        """Import and return what has this name."""
        module, _, name = self.rpartition(".")
        return getattr(importlib.import_module("builtins" if module in BUILTINS else module), name)


class _AllowedUnpickler(pickle._Unpickler):
    """Unpickles what the lists above allow, and only in the way in which Flair's files use it.

    It is Python's unpickler in Python: the one in C cannot be asked what it calls. It is as fast as the one that torch
    uses for ``weights_only``, which would call every class that it may name and stops at the frames of protocol 4.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._withheld: dict[int, str] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return a constant, or the name of what may be called; torch asks here too, for all but storages."""
        found = _Name(f"{module}.{name}")
        if not _is_allowed(found):
            raise pickle.UnpicklingError(f"it names '{found}'")
        if found.startswith(WITHHELD):
            stand_in = str(found)
            return self._withheld.setdefault(id(stand_in), stand_in)
        return found.look_up() if found in CONSTANTS else found

    def _call(self) -> None:
        arguments, name = self.stack.pop(), self.stack[-1]
        if not self._is_withheld(name):
            function = _REPLACED.get(_expect(name, FUNCTIONS | _REPLACED.keys())) or name.look_up()
            self.stack[-1] = function(*arguments)

    def _create(self) -> None:
        arguments, name = self.stack.pop(), self.stack[-1]
        if type(name) is _Name and _is_config(name) and arguments == ():
            self.stack[-1] = _StoredConfig()
        elif not self._is_withheld(name):
            created = _expect(name, RECORDS | MODULES).look_up()
            self.stack[-1] = created.__new__(created, *arguments)

    def _set_state(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if not self._is_withheld(target):
            _set_state_(target, state)

    def _load_persistent(self) -> None:
        reference = self.stack[-1]
        kind = reference[0] if type(reference) is tuple and reference else None
        if kind == "module":
            # Old-style files hold the source code of modules beside their names. torch would compare it with that of
            # the installed ones, and may write a patch.
            self.stack[-1] = _expect(reference[1], MODULES)
        elif kind == "storage":
            self.stack[-1] = self.persistent_load(reference)
        else:
            raise pickle.UnpicklingError("it refers to something that is not a tensor's storage")

    def _refuse(self) -> None:
        raise pickle.UnpicklingError("it holds an opcode that torch does not write")

    def _is_withheld(self, value: Any) -> bool:
        return self._withheld.get(id(value)) is value

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _create
    dispatch[pickle.BUILD[0]] = _set_state
    dispatch[pickle.BINPERSID[0]] = _load_persistent
    for _code in (pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.EXT1, pickle.EXT2, pickle.EXT4):
        dispatch[_code[0]] = _refuse


def _expect(name: Any, expected: Set[str]) -> _Name:
    if type(name) is not _Name or name not in expected:
        found = f"'{name}'" if isinstance(name, str) else f"an object of type {type(name).__name__}"
        raise pickle.UnpicklingError(f"it calls {found:.200}")
    return name


def _set_state_(target: Any, state: Any) -> None:
    """Give an object of the lists its attributes, in the one form in which Flair's files hold those of its class."""
    kind = type(target)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if kind is OrderedDict:
        is_usual = type(state) is dict and state.keys() <= {"_metadata"}  # what Module.state_dict() adds
    elif kind is io.BytesIO:
        is_usual = type(state) is tuple and state[2:] == (None,)
    elif kind is _StoredConfig:
        is_usual = type(state) is dict and all(type(key) is str for key in state)
    elif kind is _NumpyType:
        is_usual = type(state) is tuple and len(state) > 1
    else:
        # Without their own key, embeddings would read a state of Flair's, and with it any model of the Hub.
        is_usual = type(state) is dict and ("Embeddings" not in name or EMBEDDINGS_STATE in state)
        is_usual = is_usual and name in RECORDS | MODULES
    if not is_usual:
        raise pickle.UnpicklingError(f"it sets attributes of an object of type {name} in an unusual way")
    # Asked of the class: an attribute of that name, set before, is data.
    if hasattr(kind, "__setstate__"):
        kind.__setstate__(target, state)
    else:
        target.__dict__.update(state)


class _AllowedPickle:
    """What ``torch.load`` takes for the module ``pickle``."""

    Unpickler = _AllowedUnpickler

    @staticmethod
    def load(file: Any, **options: Any) -> Any:
        """Return the object in the next pickle of an old-style file."""
        return _AllowedUnpickler(file, **options).load()
