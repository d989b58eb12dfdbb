"""The service behind the routes: from a request that was read to the answers of its models."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flair_peft import compat
from flair_peft.errors import FlairPeftError, RequestError
from flair_peft.serving.http.batch_queue import BatchQueue, Limits
from flair_peft.serving.http.metrics import Metrics
from flair_peft.serving.http.requests import LoadRequest, PredictionRequest
from flair_peft.serving.http.served_models import ServedModel, ServedModels
from flair_peft.serving.http.works import Work

log = logging.getLogger("flair_peft")

# Characters that are split into words in the thread of the event loop: it takes less than going to another.
_SPLIT_AT_ONCE = 4000


@dataclass(frozen=True)
class Answered:
    """Answers, and by which models.

    Attributes:
        content: the body, as plain values.
        models: that answered.
        has_adapter: whether they did with theirs.
    """

    content: Any
    models: Sequence[ServedModel]
    has_adapter: bool

    @property
    def headers(self) -> dict[str, str]:
        """What proves who answered."""
        found = {
            "X-Model": ",".join(model.name for model in self.models)
            .encode("ascii", "backslashreplace")
            .decode("ascii"),
            "X-Adapter-Digest": ",".join(model.digest for model in self.models),
            "X-Base-Fingerprint": ",".join(model.base_fingerprint for model in self.models),
        }
        return found if self.has_adapter else {**found, "X-Adapter": "off"}


class Service:
    """Answers requests with the models that are served.

    Attributes:
        models: by name.
        queue: where requests wait.
        metrics: its figures.
        limits: what users are told of it.
    """

    def __init__(self, models: ServedModels, limits: Limits) -> None:
        self.models, self.limits = models, limits
        self.metrics = Metrics(lambda: self.queue.waiting)
        self.queue = BatchQueue(limits, self.metrics)
        self._loading = asyncio.Lock()

    @property
    def is_ready(self) -> bool:
        """Whether a request would be answered."""
        return self.queue.is_alive and not self.queue.is_draining

    def drain(self) -> None:
        """Take no more requests; those that wait are answered."""
        self.queue.drain()

    def close(self) -> None:
        """Answer what waits, and end."""
        self.queue.close()

    async def info(self) -> dict[str, Any]:
        """Return what users are told of models, versions and limits."""
        return {
            "models": [model.to_info() for model in self.models.all],
            "versions": compat.versions(),
            "limits": dataclasses.asdict(self.limits),
        }

    def find_models(self, request: PredictionRequest) -> list[ServedModel]:
        """Return the models that a request asks.

        Raises:
            RequestError: it asks none, or one that is not there.
        """
        asked = request.asked_models
        if asked is not None:
            return self.models.get([asked] if isinstance(asked, str) else asked)
        served = self.models.all
        if len(served) == 1:
            return served
        raise RequestError(
            f"Cannot tell which model is meant: the request names none, and {len(served)} are served. Only where there "
            "is one may its name be left out. Say 'model'; /info lists them.",
            code="no_model",
        )

    async def predict(self, request: PredictionRequest, models: Sequence[ServedModel] | None = None) -> Answered:
        """Return what the models say; cancelling this takes the request from the queue.

        Raises:
            RequestError: it cannot be answered.
        """
        models = self.find_models(request) if models is None else models
        self._check(request, models)
        with self.queue.using(models):
            by_model = await self._ask(request, models)
        is_list = isinstance(request.inputs, list)
        contents = {model.name: by_model[model] if is_list else by_model[model][0] for model in models}
        content = contents if isinstance(request.asked_models, list) else contents[models[0].name]
        return Answered(content, models, request.parameters.adapter)

    async def _ask(self, request: PredictionRequest, models: Sequence[ServedModel]) -> dict[ServedModel, list[Any]]:
        if not request.items:
            return {model: [] for model in models}
        size = sum(len(part) for item in request.items for part in item.parts) * len(models)
        if size <= _SPLIT_AT_ONCE:
            works = _works(request, models)
        else:
            works = await asyncio.to_thread(_works, request, models)
        self.queue.submit(works)
        try:
            found = await asyncio.gather(*(asyncio.wrap_future(work.future) for work in works))
        finally:
            self.queue.withdraw(works)
        return {
            model: answers
            for work, of_work in zip(works, found, strict=True)
            for model, answers in zip(work.models, of_work, strict=True)
        }

    def _check(self, request: PredictionRequest, models: Sequence[ServedModel]) -> None:
        most = self.limits.max_texts
        if len(request.items) > most:
            raise RequestError(
                f"Cannot take {len(request.items)} texts in one request: {most} are the most. Longer requests would "
                "keep others waiting. Send them in several.",
                status=413,
                code="too_many_texts",
            )
        longest = max((len(part) for item in request.items for part in item.parts), default=0)
        if longest > self.limits.max_length:
            raise RequestError(
                f"Cannot take a text of {longest} characters: {self.limits.max_length} are the most. A model may read "
                "a text as a whole, whatever memory that takes. Send it in parts.",
                status=413,
                code="text_too_long",
            )
        has_adapter = request.parameters.adapter
        without = [] if has_adapter else [model.name for model in models if not model.embeddings]
        if without:
            raise RequestError(
                f"Cannot switch off the adapter of '{without[0]}': it has none, or it is merged into its base. What is "
                "compared would be the same. Leave out 'adapter'.",
                code="no_adapter",
            )
        if request.wants_all_scores and not any(model.form.has_all_scores for model in models):
            raise RequestError(
                f"Cannot give 'top_k' labels with '{models[0].name}': it gives {models[0].form.kind}. Only models that "
                "give labels to whole texts have scores for all of them. Leave out 'top_k'.",
                code="no_top_k",
            )

    async def load(self, request: LoadRequest) -> ServedModel:
        """Return a model that was loaded, has proven itself, and has its name from now on.

        It is looked for, and downloaded, while others are answered. The load itself comes between two batches: what
        loads models changes settings of the whole process.

        Raises:
            RequestError: it cannot be loaded.
        """
        async with self._loading:
            try:
                place = await asyncio.to_thread(self.models.find, request.source, request.revision)
                served = await asyncio.wrap_future(self.queue.call(lambda: self._take_in(request.name, place)))
            except RequestError:
                raise
            except Exception as error:  # what it is has no bearing on those that are served
                log.warning("The model '%s' was not loaded: %s", request.name, error)
                is_said, kind = isinstance(error, FlairPeftError), type(error).__name__
                reason = str(error) if is_said else f"It failed with {kind}, and the server's log says more."
                raise RequestError(
                    f"Cannot load '{request.name}'. {reason} What was served before is served on.", code="not_loaded"
                ) from error
        return served

    def _take_in(self, name: str, place: Any) -> ServedModel:
        served = self.models.load(name, place)
        before = self.models.put(served)
        if before is not None:
            self.queue.retire(before, self.models.release)
        return served

    def unload(self, name: str) -> ServedModel:
        """Take the name from a model, which answers what was asked of it before, and return that.

        Raises:
            RequestError: there is none.
        """
        served = self.models.remove(name)
        self.queue.retire(served, self.models.release)
        return served


def _works(request: PredictionRequest, models: Sequence[ServedModel]) -> list[Work]:
    """Return what a request asks, by groups of models that can go into one call."""
    has_adapter = request.parameters.adapter
    groups: dict[Any, tuple[list[ServedModel], Mapping[str, Any]]] = {}
    for model in models:
        has_all = request.wants_all_scores and model.form.has_all_scores
        options = {"return_probabilities_for_all_classes": True} if has_all else {}
        is_mixed = model.shared is not None and has_adapter and not model.form.is_alone
        key = (id(model.shared), has_all) if is_mixed else id(model)
        groups.setdefault(key, ([], options))[0].append(model)
    return [
        Work(
            models=of_group,
            items=request.items,
            options=options,
            most_labels=request.most_labels,
            has_adapter=has_adapter,
        )
        for of_group, options in groups.values()
    ]
