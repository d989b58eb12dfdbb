"""An app before the app: it answers some texts by itself, as no model would, or late."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class StandIn:
    """What is answered instead of what the models say.

    Attributes:
        content: the answer, made JSON; ``None`` lets the models answer.
        seconds: before it is answered.
        status: of HTTP.
        headers: of the answer.
    """

    content: Any = None
    seconds: float = 0.0
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


class StandInAnswers:
    """Hands requests on to an app, apart from predictions for texts that ``answers`` has.

    Attributes:
        answers: text → what is answered.
        bodies: of all requests for predictions, as they came.
    """

    def __init__(self, app: Any) -> None:
        self._app = app
        self.answers: dict[str, StandIn] = {}
        self.bodies: list[dict[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer, or let the app do so."""
        if scope["type"] != "http" or not scope["path"].endswith("/predict"):
            await self._app(scope, receive, send)
            return
        body = await _read(receive)
        self.bodies.append(json.loads(body))
        text = self.bodies[-1]["inputs"]
        answer = self.answers.get(text if isinstance(text, str) else text.get("text", "")) or StandIn()
        await asyncio.sleep(answer.seconds)
        if answer.content is None:
            await self._app(scope, _again(body, receive), send)
            return
        headers = {"content-type": "application/json", **answer.headers}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        await send({"type": "http.response.body", "body": json.dumps(answer.content).encode()})


async def _read(receive: Any) -> bytes:
    pieces, more = [], True
    while more:
        message = await receive()
        pieces.append(message.get("body", b""))
        more = message.get("more_body", False)
    return b"".join(pieces)


def _again(body: bytes, receive: Any) -> Any:
    """Return a ``receive`` that gives a body that was read, then what comes after it."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Any:
        return first.pop() if first else await receive()

    return give
