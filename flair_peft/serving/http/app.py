"""The app: routes over a service, for a server of its own or inside another app."""

from __future__ import annotations

import asyncio
import contextlib
import html
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from flair_peft._version import __version__
from flair_peft.errors import AdapterConfigError, RequestError
from flair_peft.primitives.dtypes import DtypeLike
from flair_peft.serving.http import requests
from flair_peft.serving.http.access import Access, SafeHeaders, read_json
from flair_peft.serving.http.batch_queue import Limits
from flair_peft.serving.http.requests import LoadRequest, PredictionRequest
from flair_peft.serving.http.served_models import ServedModels
from flair_peft.serving.http.service import Answered, Service

log = logging.getLogger("flair_peft")

PAGE = Path(__file__).parent / "page"

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+")
_PROOF_HEADERS = ["X-Model", "X-Adapter-Digest", "X-Base-Fingerprint", "X-Adapter", "Retry-After"]


def create_app(
    models: Mapping[str, Any],
    *,
    dtype: DtypeLike | None = None,
    adapter_memory: int | str | None = None,
    merge: bool = False,
    max_wait: float = 0.02,
    batch: int = 32,
    batch_tokens: int | None = None,
    queue: int = 1024,
    max_texts: int = 256,
    max_length: int = 20_000,
    max_body: int = 1 << 20,
    token: str | None = None,
    admin_token: str | None = None,
    cors: Sequence[str] = (),
    **options: Any,
) -> FastAPI:
    """Return an app that answers requests with Flair models, which are loaded by now.

    It runs in any ASGI server, or inside another app: ``other.mount("/nlp", create_app(…))``. Its thread starts with
    the first request. ``app.state.service`` has ``drain`` and ``close``, which a server of its own calls at its end.

    Args:
        models: name → checkpoint directory, ``.pt`` file, Hub id, or a Flair model.
        dtype: of all bases, such as "bfloat16"; None leaves each model the one that it was trained on.
        adapter_memory: as for :class:`flair_peft.SharedBase`.
        merge: merge adapters into their base: one model is faster so, and several share nothing.
        max_wait: seconds that a request waits at most for others to share its batch; where none is expected, none.
        batch: sentences in one forward pass.
        batch_tokens: words in one forward pass; None means no limit.
        queue: sentences that may wait; beyond that requests are refused.
        max_texts: in one request.
        max_length: characters of a text: some models read it as a whole, whatever memory that takes.
        max_body: bytes of a body.
        token: that whoever asks has to send; None lets everyone ask.
        admin_token: of those who may load and unload models; None lets nobody.
        cors: origins of pages elsewhere that may ask, such as "https://example.org".
        **options: of each load, as for :func:`flair_peft.from_pretrained`: ``base_model``, ``trust_remote_code``, …

    Raises:
        AdapterConfigError: a model cannot be served, or a number or an origin makes no sense.
        FlairPeftError: a model cannot be loaded.
    """
    refuse_no_origin(cors)
    sizes = {"queue": queue, "max_texts": max_texts, "max_length": max_length, "max_body": max_body}
    limits = Limits(max_wait=max_wait, batch=batch, batch_tokens=batch_tokens, **sizes)
    served = ServedModels(options=options, dtype=dtype, adapter_memory=adapter_memory, is_merged=merge)
    for name, source in models.items():
        served.put(served.load(name, served.find(source)))
    return app_of(Service(served, limits), Access(token, admin_token), cors)


def refuse_no_origin(cors: Sequence[str]) -> None:
    """Return if each of these is what a browser sends as the origin of a page, or "*".

    Raises:
        AdapterConfigError: one is not; its pages would be refused without a word.
    """
    for text in cors:
        if text not in ("*", "null") and not _ORIGIN.fullmatch(text):
            raise AdapterConfigError(
                f"Cannot answer pages of {text!r:.100}: no browser sends that as an origin. It is compared letter by "
                "letter. Pass scheme, host and port alone, such as https://example.org, or *."
            )


class _Page(StaticFiles):
    """The files of the page."""

    async def get_response(self, path: str, scope: Any) -> Response:
        """Return a file; there is none of a name that the system cannot have, nor of one that another method has."""
        try:
            return await super().get_response(path, scope)
        except ValueError:
            raise HTTPException(404) from None
        except HTTPException as error:
            methods = {method for route in scope["app"].routes for method in _methods_at(route, f"/{path}")}
            if error.status_code != 404 or not methods:
                raise
            raise HTTPException(405, headers={"Allow": ", ".join(sorted(methods))}) from None


def _methods_at(route: object, path: str) -> set[str]:
    return getattr(route, "methods", None) or set() if getattr(route, "path", None) == path else set()


def app_of(service: Service, access: Access, cors: Sequence[str]) -> FastAPI:
    """Return the app over a service."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="flair_peft", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(SafeHeaders)
    if cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
            expose_headers=_PROOF_HEADERS,
        )
    _add_errors(app, service)
    _add_predict(app, service, access)
    _add_state(app, service, access)
    _add_admin(app, service, access)
    app.mount("/", _Page(directory=PAGE, html=True), name="page")
    return app


def _add_predict(app: FastAPI, service: Service, access: Access) -> None:
    body = _body_of(PredictionRequest)

    @app.post("/predict", dependencies=[Depends(access.check_user)], openapi_extra=body, summary="Predict")
    async def predict(request: Request) -> Response:
        """What one model or several say of one text or several."""
        start = time.monotonic()
        asked = requests.parse(await read_json(request, service.limits.max_body), PredictionRequest)
        try:
            answered = await _unless_gone(request, service.predict(asked))
        except RequestError:
            raise
        except Exception as error:  # what the server logs of it would quote its message, and that may quote a text
            log.error("A request failed with a %s.", type(error).__name__)
            raise unexpected(error) from None
        if answered is None:
            return Response(status_code=499)  # nobody reads it
        service.metrics.saw_request([model.name for model in answered.models], time.monotonic() - start)
        told = BackgroundTask(service.queue.delivered)
        return JSONResponse(answered.content, headers=answered.headers, background=told)


async def _unless_gone(request: Request, answering: Any) -> Answered | None:
    """Return the answers, or nothing if the sender goes away before they are there."""
    answers = asyncio.ensure_future(answering)
    gone = asyncio.ensure_future(_until_gone(request))
    try:
        await asyncio.wait((answers, gone), return_when=asyncio.FIRST_COMPLETED)
        if answers.done():
            found: Answered = answers.result()
            return found
        return None
    finally:
        gone.cancel()
        answers.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_state(app: FastAPI, service: Service, access: Access) -> None:
    user = [Depends(access.check_user)]

    @app.get("/health", summary="Whether the process lives")
    async def health() -> Response:
        return JSONResponse({"status": "alive"})

    @app.get("/ready", summary="Whether requests are answered")
    async def ready() -> Response:
        if service.is_ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "draining"}, status_code=503, headers={"Retry-After": "1"})

    @app.get("/info", dependencies=user, summary="Models, versions and limits")
    async def info() -> Response:
        return JSONResponse(await service.info())

    @app.get("/metrics", dependencies=user, summary="Figures for Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.to_text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        shown = html.escape(json.dumps(app.openapi(), indent=2, ensure_ascii=False))
        return HTMLResponse(
            '<!doctype html><html lang="en"><meta charset="utf-8"><title>flair_peft: requests and answers</title>'
            '<link rel="stylesheet" href="page.css"><h1>Requests and answers</h1>'
            f'<p>As OpenAPI, for other programs: <a href="openapi.json">openapi.json</a></p><pre>{shown}</pre></html>'
        )


def _add_admin(app: FastAPI, service: Service, access: Access) -> None:
    admin = [Depends(access.check_admin)]

    @app.post("/models", dependencies=admin, openapi_extra=_body_of(LoadRequest), summary="Load a model")
    async def load(request: Request) -> Response:
        """A model is loaded and proves itself, then it has the name; answers under way come from the one before."""
        asked = requests.parse(await read_json(request, service.limits.max_body), LoadRequest)
        return JSONResponse((await service.load(asked)).to_info())

    @app.delete("/models/{name:path}", dependencies=admin, summary="Unload a model")
    async def unload(name: str) -> Response:
        """The name is gone at once; answers under way come from the model that had it."""
        return JSONResponse(service.unload(name).to_info())


def _add_errors(app: FastAPI, service: Service) -> None:
    def answer(error: RequestError) -> Response:
        service.metrics.saw_error(error.code)
        headers = {} if error.retry_after is None else {"Retry-After": str(error.retry_after)}
        if error.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse({"error": str(error), "code": error.code}, status_code=error.status, headers=headers)

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return answer(error)

    @app.exception_handler(HTTPException)
    async def not_there(_: Request, error: HTTPException) -> Response:
        message = (
            f"Cannot answer this request: {error.detail}. There is no such address here, or it is asked in another "
            "way. /docs says which there are."
        )
        if error.status_code == 405:
            allowed = (error.headers or {}).get("Allow", "another method")
            message = f"Cannot answer this request: this address is not asked in this way. Send it as {allowed}."
        code = {404: "unknown_address", 405: "unknown_method"}.get(error.status_code, "malformed")
        return answer(RequestError(message, status=error.status_code, code=code))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(unexpected(error))


def unexpected(error: BaseException) -> RequestError:
    """Return what is answered where something failed that nobody foresaw."""
    return RequestError(
        f"Cannot answer this request: {type(error).__name__}. This was not expected. Tell whoever runs the server.",
        status=500,
        code="failed",
    )


def _body_of(kind: Any) -> dict[str, Any]:
    """Return what OpenAPI says of a body that a route reads by itself, so that nothing of a bad one is repeated."""
    schema = kind.model_json_schema()
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
