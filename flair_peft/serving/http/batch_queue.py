"""A bounded queue of what is to be predicted, and the one thread that predicts it, in batches of several requests.

1. A request becomes a :class:`Work` for each group of models that can share a call, and waits its turn.
2. The thread takes what is first, and whatever else goes with it in one call, up to a batch. What is longer than a
   batch is predicted in parts, and goes to the end of the queue after each.
3. If nobody else can be expected, it does not wait. Else it waits a moment, from when the last answer went out, for
   those who were just answered: clients ask again one by one, and a batch that starts with the first of them would
   leave the others for the next.
4. A batch that fails is tried again one work at a time, with new data points: one alone gets the error.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import logging
import math
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flair_peft.errors import AdapterConfigError, RequestError
from flair_peft.serving.http import works
from flair_peft.serving.http.served_models import ServedModel
from flair_peft.serving.http.works import Part, Work

if TYPE_CHECKING:
    from flair_peft.serving.http.metrics import Metrics

log = logging.getLogger("flair_peft")

# Seconds after the last answer in which the first of those who got one may be followed by the others.
_EXPECTED_SECONDS = 0.05

_LONGEST_WAIT = 60


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much at once, and how long to wait for more; see ``create_app``.

    Raises:
        AdapterConfigError: a number makes no sense.
    """

    max_wait: float
    batch: int
    batch_tokens: int | None
    queue: int
    max_texts: int
    max_length: int
    max_body: int

    def __post_init__(self) -> None:
        wait = self.max_wait
        if isinstance(wait, bool) or not isinstance(wait, (int, float)) or not 0 <= wait <= _LONGEST_WAIT:
            raise AdapterConfigError(
                f"Cannot serve with max_wait={wait!r}. It is the time that a request waits for others. Pass seconds, "
                f"from 0 to {_LONGEST_WAIT}; --max-wait takes milliseconds."
            )
        for name, value in dataclasses.asdict(self).items():
            is_left_out = name == "max_wait" or (name == "batch_tokens" and value is None)
            if not is_left_out and (type(value) is not int or value < 1):
                raise AdapterConfigError(
                    f"Cannot serve with {name}={value!r}. It counts sentences, words, characters or bytes. Pass an "
                    "integer from 1 on."
                )


@dataclass
class _Room:
    """What of a batch is not taken yet: sentences and, if they are bounded, words."""

    rows: int
    words: int | None
    is_taken: bool = False
    is_empty: bool = True

    def take(self, work: Work) -> int:
        """Take as many items of a work as there is room for, the first in any case, and return where to stop."""
        stop = work.done
        while stop < len(work.items) and not self.is_taken:
            words = 0 if self.words is None else sum(works.words_of(points[stop]) for points in work.points)
            has_room = len(work.models) <= self.rows and (self.words is None or words <= self.words)
            if not has_room and not self.is_empty:
                self.is_taken = True
                break
            self.rows, self.is_empty, stop = self.rows - len(work.models), False, stop + 1
            self.words = None if self.words is None else self.words - words
        return len(work.items) if work.models[0].form.is_alone and stop > work.done else stop


class BatchQueue:
    """Predicts in one thread what is given to it from any other; the thread starts with the first that is given.

    Attributes:
        waiting: sentences that are not predicted yet, those of the batch that is predicted apart.
        is_draining: whether nothing more is taken.
    """

    def __init__(self, limits: Limits, watcher: Metrics) -> None:
        """Make an empty queue; ``watcher`` is told of each batch."""
        self.limits = limits
        self._watcher = watcher
        self._works: deque[Work] = deque()
        self._calls: deque[tuple[Callable[[], Any], concurrent.futures.Future[Any]]] = deque()
        self._retired: list[tuple[ServedModel, Callable[[ServedModel], None]]] = []
        self._users: Counter[ServedModel] = Counter()
        self._changed = threading.Condition()
        self._company: tuple[Any, int] = None, 0  # a group, and how many works of it can be expected
        self._free_since, self._first_at, self._seconds_each = 0.0, 0.0, 0.01
        self._wanted = 1  # works for which the thread is to be woken
        self._is_closed = self.is_draining = False
        self._thread: threading.Thread | None = None
        self.waiting = 0

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs, or will when it is needed."""
        return self._thread is None or self._thread.is_alive()

    @contextlib.contextmanager
    def using(self, models: Sequence[ServedModel]) -> Iterator[None]:
        """Inside, the models are not released."""
        with self._changed:
            self._users.update(models)
        try:
            yield
        finally:
            with self._changed:
                self._users.subtract(models)
                self._users += Counter()  # without those that nobody uses
                self._wake(is_urgent=bool(self._retired))

    def submit(self, given: Sequence[Work]) -> None:
        """Let the works of a request wait their turn.

        Raises:
            RequestError: there is no room for them, or it closes.
        """
        with self._changed:
            rows = sum(work.left for work in given)
            self._refuse_if_full(rows)
            if not self._works:
                self._first_at = time.monotonic()
            self._works.extend(given)
            self.waiting += rows
            self._wake(is_urgent=len(self._works) >= self._wanted or self.waiting >= self.limits.batch)

    async def delivered(self) -> None:
        """Take note that an answer is out: whoever got it may ask again, and is waited for, from now on."""
        self._free_since = time.monotonic()

    def withdraw(self, given: Sequence[Work]) -> None:
        """Forget the works that are not answered yet: their sender is gone."""
        gone = [work for work in given if work.future.cancel() or work.future.cancelled()]
        if gone:
            with self._changed:
                self._drop_cancelled()

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Let the thread call a function between two batches; return what gets the result."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        with self._changed:
            if self._is_closed:
                raise _closing()
            self._calls.append((function, future))
            self._wake()
        return future

    def retire(self, model: ServedModel, release: Callable[[ServedModel], None]) -> None:
        """Let ``release`` have a model, in the thread, once nobody is :meth:`using` it."""
        with self._changed:
            self._retired.append((model, release))
            self._wake()

    def drain(self) -> None:
        """Take nothing more; what waits is predicted."""
        with self._changed:
            self.is_draining = True
            self._changed.notify()

    def close(self) -> None:
        """Predict what waits, and end the thread."""
        with self._changed:
            self.is_draining = self._is_closed = True
            self._changed.notify()
        if self._thread is not None:
            self._thread.join()

    def _wake(self, *, is_urgent: bool = True) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="flair_peft predictions", daemon=True)
            self._thread.start()
        elif is_urgent:
            self._changed.notify()

    def _refuse_if_full(self, rows: int) -> None:
        if self.is_draining:
            raise _closing()
        waiting = self.waiting
        if rows > self.limits.queue:
            raise RequestError(
                f"Cannot take {rows} sentences in one request: {self.limits.queue} may wait at most, those of several "
                "models counted for each. Send fewer at once.",
                status=413,
                code="too_many_texts",
            )
        if waiting + rows > self.limits.queue:
            raise RequestError(
                f"Cannot take the request now: {waiting} sentences wait already, and there is room for "
                f"{self.limits.queue}. Waiting longer would help nobody. Send it again when Retry-After has passed.",
                status=503,
                code="queue_full",
                retry_after=max(1, math.ceil(waiting * self._seconds_each)),
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._wait()
                call = self._calls.popleft() if self._calls else None
                parts = [] if call else self._take()
                if self._is_closed and not call and not parts:
                    return
            if call:
                _call(*call)
            if parts:
                self._predict_safely(parts)
            self._release_retired()

    def _predict_safely(self, parts: Sequence[Part]) -> None:
        """Predict; whatever happens, the thread goes on, and nobody waits for ever."""
        try:
            self._predict(parts)
        except Exception as error:  # such as of what counts: a thread that ended would answer nobody
            log.error("The predictions of a batch failed with a %s.", type(error).__name__)
            for part in parts:
                self._fail(part.work, works.failure(part.work, error))

    def _wait(self) -> None:
        """Return when there is something to do, and no reason to wait for more."""
        self._drop_cancelled()
        while not (self._works or self._calls or self._is_closed or self._can_release()):
            self._wanted = 1
            self._changed.wait()
            self._drop_cancelled()
        group, company = self._company
        while not (self._calls or self.is_draining) and self._works and self._works[0].group == group:
            start = max(self._free_since, self._first_at)
            is_expected = start - self._free_since <= _EXPECTED_SECONDS
            left = start + self.limits.max_wait - time.monotonic() if is_expected else 0.0
            here = sum(work.group == group for work in self._works)
            if left <= 0 or here >= company or self.waiting >= self.limits.batch:
                return
            self._wanted = len(self._works) + company - here
            self._changed.wait(left)
            self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        if any(work.future.cancelled() for work in self._works):
            self._keep(work for work in self._works if not work.future.cancelled())

    def _keep(self, works: Iterable[Work]) -> None:
        self._works = deque(works)
        self.waiting = sum(work.left for work in self._works)

    def _take(self) -> list[Part]:
        """Take the next batch off the queue; what is longer goes to its end."""
        self._drop_cancelled()
        parts, kept = list[Part](), list[Work]()
        room = _Room(self.limits.batch, self.limits.batch_tokens)
        for work in self._works:
            fits = not parts or (work.group == parts[0].work.group and not room.is_taken)
            stop = room.take(work) if fits else work.done
            if stop > work.done:
                parts.append(Part(work, work.done, stop))
            else:
                kept.append(work)
        cut = [part.work for part in parts if part.stop < len(part.work.items)]
        self._keep([*kept, *cut])
        self.waiting -= sum((part.stop - part.start) * len(part.work.models) for part in parts if part.work in cut)
        return parts

    def _predict(self, parts: Sequence[Part]) -> None:
        start = time.monotonic()
        try:
            works.predict_together(parts, self.limits.batch)
            for part in parts:
                works.answer(part)
        except Exception as error:  # a text or a model may fail in any way, which costs the others nothing
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the batch
            if len(parts) > 1:
                log.info("A batch of %d failed (%s); trying its requests one by one.", len(parts), type(error).__name__)
            for part in parts:
                self._predict_alone(part)
        self._note(parts, time.monotonic() - start)
        for part in parts:
            if part.work.done == len(part.work.items):
                _settle(part.work)

    def _predict_alone(self, part: Part) -> None:
        """Predict, once more, what one work asks."""
        try:
            part.work.points = part.work.new_points()
            works.predict_together([part], self.limits.batch)
            works.answer(part)
        except Exception as error:  # whoever asked is told
            traceback.clear_frames(error.__traceback__)  # they hold the tensors of the batch
            self._fail(part.work, error)

    def _fail(self, work: Work, cause: Exception) -> None:
        with self._changed:
            self._keep(each for each in self._works if each is not work)
        error = cause if isinstance(cause, RequestError) else works.explain(work, cause)
        with contextlib.suppress(concurrent.futures.InvalidStateError):
            work.future.set_exception(error)

    def _note(self, parts: Sequence[Part], seconds: float) -> None:
        rows = sum((part.stop - part.start) * len(part.work.models) for part in parts)
        names = [model.name for part in parts for model in part.work.models for _ in range(part.start, part.stop)]
        self._watcher.saw_batch(models=names, sentences=rows, requests=len(parts), seconds=seconds)
        with self._changed:
            # Those who wait for the same already, and those who are answered now and may ask it again.
            group = parts[0].work.group
            same = [work for work in self._works if work.group == group]
            self._company = group, len({id(work) for work in (*same, *(part.work for part in parts))})
            self._free_since = time.monotonic()
            if rows:
                self._seconds_each += 0.2 * (seconds / rows - self._seconds_each)

    def _can_release(self) -> bool:
        return any(model not in self._users for model, _ in self._retired)

    def _release_retired(self) -> None:
        with self._changed:
            free = [entry for entry in self._retired if entry[0] not in self._users]
            self._retired = [entry for entry in self._retired if entry[0] in self._users]
        for model, release in free:
            try:
                release(model)
            except Exception as error:  # those that are served go on
                log.warning("The model '%s' was not released whole: %s", model.name, type(error).__name__)


def _settle(work: Work) -> None:
    with contextlib.suppress(concurrent.futures.InvalidStateError):  # its sender is gone
        work.future.set_result(work.answers)


def _call(function: Callable[[], Any], future: concurrent.futures.Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # whoever waits for it gets it
        future.set_exception(error)


def _closing() -> RequestError:
    return RequestError(
        "Cannot take the request: the server is shutting down. It answers what it has taken, and nothing more. Send it "
        "to another, or again in a moment.",
        status=503,
        code="closing",
        retry_after=1,
    )
