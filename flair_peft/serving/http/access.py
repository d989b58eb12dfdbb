"""Who may ask, and how much: tokens, the size of bodies, and headers that every answer has."""

from __future__ import annotations

import asyncio
import hmac
from typing import Any

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.requests import ClientDisconnect

from flair_peft.errors import RequestError

_BODY_SECONDS = 30.0
# What is read, and thrown away, of a body that is too long, so that its sender comes to read the answer.
_READ_IN_VAIN = 64 << 20

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Access:
    """Compares tokens; FastAPI would run what is not ``async`` in another thread.

    Attributes:
        token: that whoever asks has to have; ``None`` lets everyone ask.
        admin_token: of those who may load and unload; ``None`` lets nobody.
    """

    def __init__(self, token: str | None, admin_token: str | None) -> None:
        self.token, self.admin_token = token, admin_token

    async def check_user(self, request: Request) -> None:
        """Return if the sender may ask.

        Raises:
            RequestError: the token is missing or wrong.
        """
        if self.token is None or _has(request, self.token) or _has(request, self.admin_token):
            return
        raise RequestError(
            "Cannot answer without a token: the request has none, or a wrong one. This server answers those who know "
            "it. Send it as 'Authorization: Bearer …'.",
            status=401,
            code="no_token",
        )

    async def check_admin(self, request: Request) -> None:
        """Return if the sender may load and unload models.

        Raises:
            RequestError: it may not.
        """
        if _has(request, self.admin_token):
            return
        if self.admin_token is not None and not request.headers.get("authorization"):
            raise RequestError(
                "Cannot change models without a token: the request has none. Loading and unloading are for those who "
                "know the admin token. Send it as 'Authorization: Bearer …'.",
                status=401,
                code="no_token",
            )
        raise RequestError(
            "Cannot change models with this request: it has no admin token that this server knows. Loading and "
            "unloading are for those who have it. Start the server with an admin token, and send that.",
            status=403,
            code="not_admin",
        )


def _has(request: Request, token: str | None) -> bool:
    """Whether a request has the token; how long this takes says nothing of it."""
    if token is None:
        return False
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    # Headers are in Latin-1: what else a token has comes as the bytes of its UTF-8.
    is_same = hmac.compare_digest(given.strip(" \t").encode("latin-1"), token.encode("utf-8"))
    return is_same and scheme.lower() == "bearer"


async def read_json(request: Request, limit: int) -> bytes:
    """Return the body of a request, which says that it is JSON, as far as it is no longer than the limit.

    Raises:
        RequestError: it is longer, or does not come, or is something else.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = await asyncio.wait_for(_read(request, limit), _BODY_SECONDS)
    except (asyncio.TimeoutError, TimeoutError):
        raise RequestError(
            f"Cannot wait any longer for the body: it did not come within {_BODY_SECONDS:.0f} seconds. Others want "
            "to be answered, too. Send it again, faster.",
            status=408,
            code="slow_body",
        ) from None
    except ClientDisconnect as error:
        raise RequestError(
            "Cannot read the body: its sender went away before all of it was there. Nobody reads this. Send it again.",
            status=499,
            code="gone",
        ) from error
    if kind != "application/json":
        # Pages elsewhere may make a browser send other kinds without asking first.
        raise RequestError(
            "Cannot read the body: its Content-Type is not application/json. Bodies are JSON. Send it with the header "
            "'Content-Type: application/json'.",
            status=415,
            code="not_json",
        )
    return body


async def _read(request: Request, limit: int) -> bytes:
    pieces, size = list[bytes](), 0
    async for piece in request.stream():
        size += len(piece)
        if size <= limit:
            pieces.append(piece)
        elif size > _READ_IN_VAIN:
            break
    if size > limit:
        raise RequestError(
            f"Cannot read the body: it has more than {limit} bytes. Longer ones would keep others waiting. Send the "
            "texts in several requests.",
            status=413,
            code="body_too_long",
        )
    return b"".join(pieces)


class SafeHeaders:
    """Gives every answer of an app headers that keep browsers from doing with it what nobody asked for."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer as the app does."""

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, send_with_headers if scope["type"] == "http" else send)
