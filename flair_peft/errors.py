"""The exceptions of flair_peft, all under one root.

    FlairPeftError
    ├── AdapterConfigError        a PEFT config, another setting or a model that cannot work so
    │   ├── UnsupportedMethodError    the method cannot work on this architecture
    │   └── MissingConfigError        a file holds adapter weights but not the config that scales them
    ├── UnknownArgumentError      an argument that neither a load nor embeddings nor transformers take
    ├── BaseModelNotFoundError    the transformer is neither on disk nor in the cache nor reachable
    ├── InsufficientMemoryError   the transformer is larger than the memory that is free
    ├── ModelFileError            a file that is truncated, not a Flair model, or not readable
    │   ├── MissingFileError          there is no such file or directory
    │   ├── FormatVersionError        written by a newer flair_peft
    │   └── UnsafeFileError           a pickle that names what hardly any model needs; nothing of it was run
    ├── UnsupportedStateError     a model holds an object that files cannot hold without pickling code
    ├── SaveError                 a checkpoint could not be written; the earlier one is as it was
    ├── StateMismatchError        tensors of a file and of the model do not fit each other
    │   ├── ConfigMismatchError       tensors of a file do not fit the PEFT config given for it
    │   ├── BaseMismatchError         the base model found is not the one that the adapter was trained on
    │   ├── AdapterMismatchError      tensors of a PEFT adapter have no place in the transformer, or several
    │   ├── UntrainedAdapterError     a PEFT adapter that changes nothing
    │   └── HeadMismatchError         the head of another library's model cannot start that of a Flair model
    ├── DtypeMismatchError        embeddings and head compute in different dtypes
    ├── TrainingSetupError        a training setting that cannot work with an adapter
    ├── PredictionSetupError      predictions that cannot start
    ├── PredictionError           one item of a stream could not be predicted
    ├── RequestError              a request to a served model that gets no prediction
    └── UnsupportedHostError      this version of Flair cannot be patched

Each also subclasses what callers of Flair, torch or transformers already catch in that place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType


class FlairPeftError(Exception):
    """Root of every error that flair_peft raises on purpose."""

    def __str__(self) -> str:
        # Messages quote what stands in files.
        return "\n".join(map(spell_out, super().__str__().split("\n")))


class AdapterConfigError(FlairPeftError, ValueError):
    """A PEFT config, an argument, or the model that is given, cannot work in this way."""


class UnsupportedMethodError(AdapterConfigError):
    """A PEFT method cannot work on this architecture, and the message says why."""


class MissingConfigError(AdapterConfigError):
    """A file holds adapter weights without the PEFT config they were trained with."""


class UnknownArgumentError(FlairPeftError, TypeError):
    """An argument was passed that nothing takes: it is misspelt, or of something else."""


class BaseModelNotFoundError(FlairPeftError, OSError):
    """The base transformer could not be found by path, in the local cache or on the Hub."""


class InsufficientMemoryError(FlairPeftError, MemoryError):
    """The weights of a base transformer are larger than the memory that is free where they should go."""


class ModelFileError(FlairPeftError, ValueError, RuntimeError):
    """A model file cannot be read: truncated, not a Flair model, or damaged."""


class MissingFileError(ModelFileError, FileNotFoundError):
    """There is no such file or directory."""


class FormatVersionError(ModelFileError):
    """A model file was written by a newer version of flair_peft."""


class UnsafeFileError(ModelFileError):
    """A pickle names something that hardly any Flair model needs; it was not loaded."""


class UnsupportedStateError(FlairPeftError, TypeError):
    """A model holds an object that files cannot hold, since they hold JSON and tensors only."""


class SaveError(FlairPeftError, OSError):
    """A checkpoint could not be written: no space, no permission; what was there before is unchanged."""


class StateMismatchError(FlairPeftError, RuntimeError):
    """Tensors of a file and of the model it should fill do not fit each other.

    Attributes:
        problems: what does not fit → names of tensors, where these are known one by one; else empty.
    """

    def __init__(self, message: str = "", *, problems: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        super().__init__(message)
        self.problems = dict(problems)


class ConfigMismatchError(StateMismatchError, AdapterConfigError):
    """The tensors of a file do not fit the PEFT config that was given for it; the message says what they imply."""


class BaseMismatchError(StateMismatchError):
    """The base model found differs from the one that the adapter was trained on."""


class AdapterMismatchError(StateMismatchError):
    """Tensors of a PEFT adapter have no place in the transformer, or several."""


class UntrainedAdapterError(StateMismatchError):
    """A PEFT adapter changes nothing: it was saved before it was trained, or by a training that lost it."""


class HeadMismatchError(StateMismatchError):
    """The head of another library's model cannot be the start of the head of a Flair model."""


class DtypeMismatchError(FlairPeftError, TypeError):
    """The embeddings and the head that consumes them compute in different dtypes."""


class TrainingSetupError(FlairPeftError, ValueError):
    """A training setting cannot work with an adapter."""


class PredictionSetupError(FlairPeftError, TypeError, ValueError):
    """Predictions cannot start: no Flair model, or an argument that the model does not take."""


class PredictionError(FlairPeftError, RuntimeError):
    """One item of a stream could not be predicted; its cause is what Flair raised for it.

    Attributes:
        index: the place of the item in the stream, from 0.
    """

    def __init__(self, message: str, index: int = -1) -> None:
        super().__init__(message)
        self.index = index


class RequestError(FlairPeftError, ValueError):
    """A request to a served model gets no prediction; the message is what its sender reads.

    Attributes:
        status: of HTTP.
        code: what programs tell such errors by.
        retry_after: seconds after which it may be asked again, or ``None``.
    """

    def __init__(
        self, message: str = "", *, status: int = 422, code: str = "malformed", retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class UnsupportedHostError(FlairPeftError, ImportError):
    """The installed Flair is not one that flair_peft knows how to patch."""


# What other libraries raise for settings and files that make no sense to them.
OF_LIBRARIES = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError),
)


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Return the names sorted and quoted, at most ``limit`` of them, with a count of the rest."""
    ordered = sorted(names)
    shown = ", ".join(f"'{name}'" for name in ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


def spell_out(text: str) -> str:
    """Return a text in which nothing moves the cursor, colours the screen or turns the direction of writing."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in text)
