"""Any number of sentences through a Flair model: an iterator in, an iterator out, a window of them in memory.

Flair's own ``predict`` does the work, on a mini-batch at a time. What it does to a whole list is done to a stream:
sentences are sorted by length, within the window, and sentences without neighbours are each other's context.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, get_args

import flair.nn
import torch
from flair.data import DataPoint, Sentence
from flair.models import (
    EntityMentionLinker,
    Lemmatizer,
    MultitaskModel,
    PrefixedSequenceTagger,
    RegexpTagger,
    RelationClassifier,
)
from flair.tokenization import Tokenizer
from tqdm import tqdm

from flair_peft.embeddings import vector_probe
from flair_peft.errors import PredictionSetupError, name_some
from flair_peft.models import inputs
from flair_peft.serving.failed_items import Item, attempt, forget_frames_, prediction_error
from flair_peft.serving.sentence_context import last_words, linked, readable

log = logging.getLogger("flair_peft")

ERROR_KEY = "prediction_error"
"""Where an item that could not be predicted has its :class:`PredictionError`, in its metadata."""

Errors = Literal["warn", "raise"]

_OURS = ("return_loss", "verbose")
# Their predict makes batches of something other than sentences, or looks at every word that it is given.
_TAKE_WINDOWS = (RelationClassifier, EntityMentionLinker, Lemmatizer)


def predict_stream(
    model: Any,
    texts_or_sentences: Iterable[Any],
    *,
    mini_batch_size: int = 32,
    window: int = 32,
    use_tokenizer: bool | Tokenizer = True,
    errors: Errors = "warn",
    verbose: bool = False,
    **options: Any,
) -> Iterator[Any]:
    """Yield every item with the labels that ``model.predict`` gives it, in the order of the input.

    Time is linear in the number of items; in memory are at most two windows of them, beside what the caller keeps.
    Labels are those that Flair gives when the whole input is one list. Scores differ by rounding where a sentence
    shares its mini-batch with others than there. Context (``use_context=True``) reaches from window to window, to the
    right by one at most. Sentences come out without the neighbours that Flair's ``predict`` leaves in them.

    Args:
        model: any Flair model. One in training mode predicts as in evaluation mode, and is in training mode again
            whenever it is the caller's turn.
        texts_or_sentences: texts or lists of words, which become sentences; or Flair's data points, which are labelled
            in place. It is read as far as needed; if reading fails, what was read before comes out first.
        mini_batch_size: items in one forward pass.
        window: mini-batches whose sentences are read, and sorted by length, together.
        use_tokenizer: how texts become words, as in Flair's ``Sentence``.
        errors: what becomes of an item that cannot be predicted. "warn": it comes out as it was (an empty sentence
            in place of what is no text), with the :class:`~flair_peft.errors.PredictionError` in its metadata as
            "prediction_error", and a warning is logged. "raise": the error is raised once all items before are out.
        verbose: show a progress bar.
        **options: further arguments of the model's own ``predict``: ``label_name``, ``embedding_storage_mode``, …

    Returns:
        An iterator over data points. Nothing is read before its first step; it may be closed at any time.

    Raises:
        PredictionSetupError: at once, if this is not a Flair model that predicts data points, not an iterable of
            items, or an argument that the model or the stream cannot use.
    """
    _check_model(model)
    _check_items(texts_or_sentences)
    inputs.check_sizes(mini_batch_size=mini_batch_size, window=window)
    _check_choices(use_tokenizer=use_tokenizer, errors=errors)
    _check_options(model, options)
    if _takes(model, "mini_batch_size"):
        options["mini_batch_size"] = mini_batch_size
    parts = [*model.modules()] if isinstance(model, torch.nn.Module) else [model]
    size, reach = window * mini_batch_size, max((getattr(part, "context_length", 0) for part in parts), default=0)
    if reach and any(isinstance(part, PrefixedSequenceTagger) for part in parts):
        raise _reads_copies(model)
    stream = _Stream(
        model=model,
        options=options,
        window=size,
        call=size if any(isinstance(part, _TAKE_WINDOWS) for part in parts) else mini_batch_size,
        reach=reach,
    )
    total = len(texts_or_sentences) if isinstance(texts_or_sentences, Sized) else None
    bar = {"desc": "Prediction", "unit": " items", "total": total, "disable": not verbose}
    return stream.run(_Items(texts_or_sentences, use_tokenizer), errors=errors, bar=bar)


class _Items:
    """The items of a source, made data points; ends where the source fails, and keeps its error."""

    def __init__(self, source: Iterable[Any], use_tokenizer: bool | Tokenizer) -> None:
        self.source, self.use_tokenizer = source, use_tokenizer
        self.failure: Exception | None = None

    def __iter__(self) -> Iterator[Item]:
        try:
            for index, given in enumerate(self.source):
                yield _make_item(index, given, self.use_tokenizer)
        except Exception as failure:
            self.failure = failure


@dataclass(frozen=True, kw_only=True)
class _Stream:
    """Predicts items in windows.

    Attributes:
        window: items that are read and sorted together.
        call: items in one call of the model's ``predict``.
        reach: words of other sentences that the model reads on each side of a sentence.
    """

    model: Any
    options: dict[str, Any]
    window: int
    call: int
    reach: int

    def run(self, source: _Items, *, errors: Errors, bar: dict[str, Any]) -> Iterator[Any]:
        """Yield the data points of ``source``, predicted; none is held once the next is asked for."""
        items = iter(source)
        before: list[Sentence] = []
        ahead: deque[Item] = deque()
        with tqdm(**bar) as shown:
            while True:
                now, ahead = ahead, deque()
                now.extend(itertools.islice(items, self.window - len(now)))
                if not now:
                    break
                ahead.extend(self._context_of_last(items))
                before = self._predict_window(now, before, ahead, shown)
                while now:
                    _report(now[0], errors)
                    yield now.popleft().point
        if source.failure is not None:
            raise source.failure

    def _context_of_last(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items as far as the last sentence of a window sees, and no further than a window."""
        missing = self.reach
        for item in itertools.islice(items, self.window if self.reach else 0):
            yield item
            missing -= sum(map(len, readable([item.point])))
            if missing <= 0:
                return

    def _predict_window(
        self, now: Sequence[Item], before: list[Sentence], after: Iterable[Item], shown: tqdm
    ) -> list[Sentence]:
        """Label the points of ``now``, and return the sentences whose words those of the next window see."""
        todo = [item for item in now if item.error is None]
        shown.update(len(now) - len(todo))
        if self.call < len(todo) and all(isinstance(item.point, Sentence) for item in todo):
            todo.sort(key=lambda item: len(item.point), reverse=True)  # as Flair does in one call
        document, following = self._document(before, now), self._document([], after)
        with linked([*document, *following], alone=[item.point for item in now]), _evaluating(self.model):
            for start in range(0, len(todo), self.call):
                attempt(self._predict, todo[start : start + self.call])
                shown.update(min(self.call, len(todo) - start))
        return last_words(document, self.reach)

    def _predict(self, points: list[Any]) -> None:
        self.model.predict(points, **self.options)

    def _document(self, before: Sequence[Sentence], items: Iterable[Item]) -> list[Sentence]:
        return [*before, *readable(item.point for item in items)] if self.reach else []


def _make_item(index: int, given: Any, use_tokenizer: bool | Tokenizer) -> Item:
    if isinstance(given, DataPoint):
        return Item(index, given)
    try:
        if not isinstance(given, str) and not (isinstance(given, list) and all(isinstance(w, str) for w in given)):
            raise PredictionSetupError("It is neither a text nor a list of words nor a data point")
        return Item(index, Sentence(given, use_tokenizer=use_tokenizer))
    except Exception as cause:
        return Item(index, Sentence([]), prediction_error(index, given, cause))


def _report(item: Item, errors: Errors) -> None:
    """Say that an item could not be predicted, if so."""
    if item.error is None:
        item.point._metadata.pop(ERROR_KEY, None)  # of an earlier stream
        return
    if errors == "raise":
        raise item.error
    forget_frames_(item.error)
    item.point.add_metadata(ERROR_KEY, item.error)
    log.warning("%s", item.error)


def _evaluating(model: Any) -> AbstractContextManager[None]:
    """Inside, the model is in evaluation mode; afterwards each of its modules is in its own again."""
    return vector_probe.evaluating(model) if isinstance(model, torch.nn.Module) else nullcontext()


def _takes(model: Any, name: str) -> bool:
    """Tell whether the model's ``predict`` takes an argument of this name besides the data points."""
    if isinstance(model, MultitaskModel):
        return all(_takes(task, name) for task in model.tasks.values())
    _, *others = inspect.signature(model.predict).parameters.values()
    return any(other.name == name or other.kind is inspect.Parameter.VAR_KEYWORD for other in others)


def _check_model(model: Any) -> None:
    if isinstance(model, (flair.nn.Model, RegexpTagger)) and callable(getattr(model, "predict", None)):
        return
    raise PredictionSetupError(
        f"Cannot predict a stream with a {type(model).__name__}. It is not one of Flair's models that label sentences "
        "or other data points. Pass a model such as SequenceTagger.load(…) returns."
    )


def _reads_copies(model: Any) -> PredictionSetupError:
    return PredictionSetupError(
        f"Cannot predict a stream with this {type(model).__name__}: a PrefixedSequenceTagger reads copies of its "
        "sentences, and with use_context it takes the copies of the same call for their context. Pass each document as "
        "a list to model.predict."
    )


def _check_items(items: Any) -> None:
    try:
        iter(items)
    except TypeError:
        is_stream = False
    else:
        is_stream = not isinstance(items, (str, bytes, DataPoint))
    if not is_stream:
        raise PredictionSetupError(
            f"Cannot predict a {type(items).__name__} as a stream. A stream is an iterable of texts or data points, "
            "and this is one item, or none. Put it into a list: predict_stream(model, [item])."
        )


def _check_choices(*, use_tokenizer: Any, errors: Any) -> None:
    if not isinstance(use_tokenizer, (bool, Tokenizer)):
        raise PredictionSetupError(
            f"Cannot predict with use_tokenizer={use_tokenizer!r}. Flair's Sentence takes True, False or a tokenizer "
            "of Flair's. Pass one of these, such as flair.tokenization.SpacyTokenizer('en_core_web_sm')."
        )
    if errors not in get_args(Errors):
        raise PredictionSetupError(
            f"Cannot predict with errors={errors!r}. It says what becomes of items that cannot be predicted. "
            f"Pass one of {name_some(get_args(Errors))}."
        )


def _check_options(model: Any, options: dict[str, Any]) -> None:
    unknown = [name for name in options if name in _OURS or not _takes(model, name)]
    if not unknown:
        return
    models = model.tasks.values() if isinstance(model, MultitaskModel) else [model]
    names = {name for each in models for name in list(inspect.signature(each.predict).parameters)[1:]}
    taken = [name for name in names if _takes(model, name) and name not in (*_OURS, "mini_batch_size", "kwargs")]
    raise PredictionSetupError(
        f"Cannot predict a stream with {name_some(unknown)}. {type(model).__name__}.predict takes "
        f"{name_some(taken, limit=len(taken)) or 'nothing more'}; a stream has no loss, and a progress bar of its own "
        "(verbose=True). Leave out what it does not take."
    )
