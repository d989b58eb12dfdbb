"""The same app on Ray Serve: replicas that hold the models that are asked of them.

1. The app is the one of ``app.py``, over a :class:`RoutedService`: it knows the names of the models and holds none.
2. Ray sends what is asked of a model to a replica that has it, or else to one that loads it, and Ray says which model a
   replica drops for that (``serve.multiplexed``).
3. Ray collects what a replica is asked at one time, for whichever models (``serve.batch``). A :class:`Replica` predicts
   that with the :class:`Service` of an app, in mixed batches.
4. A request whose replica dies is asked of another one: to predict again changes nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import logging
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from flair_peft.errors import AdapterConfigError, RequestError, name_some
from flair_peft.serving.http.access import Access
from flair_peft.serving.http.app import app_of, refuse_no_origin, unexpected
from flair_peft.serving.http.batch_queue import Limits
from flair_peft.serving.http.model_forms import ModelForm
from flair_peft.serving.http.requests import LoadRequest, PredictionRequest
from flair_peft.serving.http.served_models import ServedModel, ServedModels
from flair_peft.serving.http.service import Answered, Service

log = logging.getLogger("flair_peft")

MODELS = "flair_peft_models"
"""Name of the deployment whose replicas hold models."""

# A replica that dies is noticed at once; the next one that is asked may have died as well.
_ATTEMPTS, _PAUSE = 5, 0.2


def ray_app(
    models: Mapping[str, str | Path],
    *,
    models_per_replica: int = 8,
    replicas: int | str = 1,
    autoscaling_config: Mapping[str, Any] | None = None,
    ray_actor_options: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    adapter_memory: int | str | None = None,
    max_wait: float = 0.005,
    batch: int = 32,
    batch_tokens: int | None = None,
    queue: int = 1024,
    max_texts: int = 256,
    max_length: int = 20_000,
    max_body: int = 1 << 20,
    token: str | None = None,
    cors: Sequence[str] = (),
    **options: Any,
) -> serve.Application:
    """Return a Serve application that answers as :func:`create_app` does: ``serve.run(ray_app(…))``.

    Args:
        models: name → checkpoint directory, ``.pt`` file or Hub id, which every machine of the cluster can reach.
        models_per_replica: that one replica holds at a time.
        replicas: that hold models; "auto" leaves it to Ray.
        autoscaling_config: as for ``serve.deployment``; instead of ``replicas``.
        ray_actor_options: of each replica, such as ``{"num_cpus": 4}`` or ``{"num_gpus": 1}``.
        dtype: as for :func:`create_app`.
        adapter_memory: of one replica.
        max_wait: seconds that a replica waits for more requests to share a batch.
        batch: sentences in one forward pass.
        batch_tokens: words in one forward pass.
        queue: requests that may wait for a replica; beyond that they are refused.
        max_texts: in one request.
        max_length: characters of a text.
        max_body: bytes of a body.
        token: that whoever asks has to send; None lets everyone ask.
        cors: origins of pages elsewhere that may ask.
        **options: of each load, as for :func:`flair_peft.from_pretrained`.

    Raises:
        AdapterConfigError: a model is none that can be sent to another machine, or an origin is none.
    """
    refuse_no_origin(cors)
    sources = _sources(models)
    sizes = {"queue": queue, "max_texts": max_texts, "max_length": max_length, "max_body": max_body}
    limits = Limits(max_wait=max_wait, batch=batch, batch_tokens=batch_tokens, **sizes)
    loading = {"options": options, "dtype": dtype, "adapter_memory": adapter_memory}

    def build() -> FastAPI:
        """Return the app, in the process that Ray starts for it."""
        service = RoutedService(sources, serve.get_deployment_handle(MODELS), limits)
        return app_of(service, Access(token, None), cors)

    scale = {"num_replicas": replicas} if autoscaling_config is None else {"autoscaling_config": autoscaling_config}
    holding = _holding(models_per_replica, limits, ray_actor_options=dict(ray_actor_options or {}), **scale)
    routing = serve.deployment(name="flair_peft", ray_actor_options={"num_cpus": 0}, max_ongoing_requests=2 * queue)
    return routing(serve.ingress(build)()).bind(holding.bind(sources, loading, limits))


def _holding(models_per_replica: int, limits: Limits, **options: Any) -> serve.Deployment:
    """Return the deployment of the replicas that hold models."""
    decorate = serve.deployment(
        name=MODELS,
        # One batch that is predicted, one that waits to be: Ray scales and refuses by what is beyond that.
        max_ongoing_requests=2 * limits.batch,
        max_queued_requests=limits.queue,
        **options,
    )
    return decorate(_replica_class(models_per_replica, limits.batch, limits.max_wait))


def _sources(models: Mapping[str, Any]) -> dict[str, str]:
    live = [name for name, source in models.items() if not isinstance(source, (str, Path))]
    if live or not models:
        raise AdapterConfigError(
            f"Cannot deploy {name_some(live) or 'no models'}: "
            f"{'that is no path and no Hub id' if live else 'there is none'}. Replicas load models by themselves, on "
            "whatever machine they are. Pass names with paths or Hub ids."
        )
    # What processes of Ray start in is another folder.
    return {name: str(Path(source).resolve() if Path(source).exists() else source) for name, source in models.items()}


class _Reply(NamedTuple):
    """What a replica says: an answer with its proofs, or why there is none."""

    content: Any = None
    proofs: Sequence[Mapping[str, Any]] = ()
    error: Mapping[str, Any] | None = None


def _refusal(error: RequestError) -> _Reply:
    # As plain values: Ray wraps what is raised elsewhere, and adds the place where that was.
    return _Reply(error={"message": str(error), **vars(error)})


class RoutedService(Service):
    """Answers requests with the replicas that Ray finds for them."""

    def __init__(self, sources: Mapping[str, str], replicas: Any, limits: Limits) -> None:
        """Know the names of the models; ``replicas`` is a handle of Ray's to those that hold them."""
        known = ServedModels()
        for name in sources:
            known.put(ServedModel(name=name, model=None, form=ModelForm(kind="")))
        super().__init__(known, limits)
        self._replicas = replicas
        self._infos: dict[str, Any] = {}

    async def info(self) -> dict[str, Any]:
        """Return what users are told; each model is loaded, once, by a replica that says what it is."""
        for name in sorted(model.name for model in self.models.all):
            if name not in self._infos:
                self._infos[name] = (await self._ask_replica("describe", name, name)).content
        return {**await super().info(), "models": list(self._infos.values())}

    async def predict(self, request: PredictionRequest, models: Sequence[ServedModel] | None = None) -> Answered:
        """Return what the models say, on a replica that holds the first of them."""
        asked = self.find_models(request) if models is None else models
        names = [model.name for model in asked]
        reply = await self._ask_replica("answer", names[0], names, request)
        proven = [dataclasses.replace(model, **proof) for model, proof in zip(asked, reply.proofs, strict=True)]
        return Answered(reply.content, proven, request.parameters.adapter)

    async def _ask_replica(self, method: str, model: str, *arguments: Any) -> _Reply:
        """Return what a replica replies, another one if it dies.

        Raises:
            RequestError: it refuses, or none can be asked.
        """
        chosen = getattr(self._replicas.options(multiplexed_model_id=model), method)
        for _ in range(_ATTEMPTS):
            try:
                reply: _Reply = await chosen.remote(*arguments)
            except BackPressureError as error:
                raise RequestError(
                    f"Cannot take the request now: {self.limits.queue} wait already. Waiting longer would help "
                    "nobody. Send it again when Retry-After has passed.",
                    status=503,
                    code="queue_full",
                    retry_after=1,
                ) from error
            except RayActorError as error:
                log.warning("A replica died with a request (%s); another one is asked.", type(error).__name__)
                await asyncio.sleep(_PAUSE)
                continue
            if reply.error is not None:
                raise RequestError(reply.error["message"], **{k: v for k, v in reply.error.items() if k != "message"})
            return reply
        raise RequestError(
            f"Cannot answer now: {_ATTEMPTS} replicas died with this request. Others are started. Send it again when "
            "Retry-After has passed.",
            status=503,
            code="no_replica",
            retry_after=5,
        )

    async def load(self, request: LoadRequest) -> ServedModel:
        """Refuse: replicas load what they are asked for.

        Raises:
            RequestError: always.
        """
        self._refuse_change(request.name)

    def unload(self, name: str) -> ServedModel:
        """Refuse: replicas drop what is not asked for.

        Raises:
            RequestError: always.
        """
        self._refuse_change(name)

    def _refuse_change(self, name: str) -> NoReturn:
        raise RequestError(
            f"Cannot load or unload '{name}': on Ray, the models are those that the app was made with. Replicas load "
            "and drop them as they are asked. Deploy the app again with other models.",
            status=403,
            code="not_here",
        )


class _Lease:
    """A model in use: it is freed when Ray has dropped it and nobody waits for its answer any more."""

    def __init__(self, served: ServedModel) -> None:
        self.served = served


class _Job(NamedTuple):
    """What one request asks of a replica."""

    leases: Sequence[_Lease]
    request: PredictionRequest


class Replica:
    """Loads models, and predicts with several of them at a time; what is asked when, Ray decides."""

    def __init__(self, sources: Mapping[str, str], loading: Mapping[str, Any], limits: Limits) -> None:
        """Hold no model yet."""
        self._sources = sources
        # Ray bounds what waits here, by requests: see max_ongoing_requests.
        room = 2 * limits.batch * limits.max_texts
        self._service = Service(ServedModels(**loading), dataclasses.replace(limits, queue=room))
        self._leases: weakref.WeakValueDictionary[str, _Lease] = weakref.WeakValueDictionary()

    async def lease(self, name: str) -> _Lease:
        """Return a model that is held as long as what is returned.

        Raises:
            RequestError: it cannot be loaded.
        """
        held = self._leases.get(name)  # dropped by Ray, but still in use
        if held is None:
            request = LoadRequest.model_construct(name=name, source=self._sources[name], revision=None)
            try:
                served = await self._service.load(request)
            except RequestError as error:  # no fault of whoever asks
                raise RequestError(str(error), status=500, code=error.code) from error
            held = self._leases[name] = _Lease(served)
            weakref.finalize(held, self._drop, served, asyncio.get_running_loop()).atexit = False
        return held

    def _drop(self, served: ServedModel, loop: asyncio.AbstractEventLoop) -> None:
        """Have a model freed by the loop: whoever held it last may be another thread, or hold it to the end."""
        if not loop.is_closed():
            loop.call_soon_threadsafe(self._free, served)

    def _free(self, served: ServedModel) -> None:
        if any(served is model for model in self._service.models.all):
            self._service.unload(served.name)

    async def predict_all(self, jobs: Sequence[_Job]) -> list[_Reply]:
        """Return a reply for each job; one that fails costs no other its own."""
        asked = [self._service.predict(job.request, [lease.served for lease in job.leases]) for job in jobs]
        return [_reply(found) for found in await asyncio.gather(*asked, return_exceptions=True)]


def _reply(found: Answered | BaseException) -> _Reply:
    if isinstance(found, RequestError):
        return _refusal(found)
    if isinstance(found, BaseException):
        return _refusal(unexpected(found))
    proven = ("name", "digest", "base_fingerprint")
    proofs = [{key: getattr(model, key) for key in proven} for model in found.models]
    return _Reply(found.content, proofs)


def _replica_class(models_per_replica: int, batch: int, max_wait: float) -> type:
    """Return the class of replicas with these bounds, which Ray's decorators take when a class is made."""

    class Models(Replica):
        @serve.multiplexed(max_num_models_per_replica=models_per_replica)
        async def hold(self, name: str) -> _Lease:
            return await self.lease(name)

        @serve.batch(max_batch_size=batch, batch_wait_timeout_s=max_wait)
        async def predict_together(self, jobs: list[_Job]) -> list[_Reply]:
            return await self.predict_all(jobs)

        async def answer(self, names: list[str], request: PredictionRequest) -> _Reply:
            try:
                leases = [await self.hold(name) for name in names]
            except RequestError as error:
                return _refusal(error)
            # Ray cuts batches by the model that a request was routed by, which it keeps in a context variable. These
            # models share a forward pass: each job goes there from a context that says nothing.
            create = asyncio.get_running_loop().create_task
            return await contextvars.Context().run(create, self.predict_together(_Job(leases, request)))

        async def describe(self, name: str) -> _Reply:
            try:
                return _Reply((await self.hold(name)).served.to_info())
            except RequestError as error:
                return _refusal(error)

    return Models
