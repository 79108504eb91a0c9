"""Server-sent events: an answer that is sent while it is made, and given up as soon as nobody reads it."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsv3.serve.server.errors import from_exception
from dsv3.serve.server.generation import while_connected

logger = logging.getLogger(__name__)


class EventStream(Response):
    """Sends each of `events` as `data: {...}`, then `data: [DONE]`; instead of it, an error if one comes.

    close: called at the end, however it comes.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[dict[str, Any]], close: Callable[[], Awaitable[None]]) -> None:
        super().__init__()
        self._events, self._close = events, close
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-store"
        self.headers["x-accel-buffering"] = "no"  # proxies: pass each event on at once

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send))
        finally:
            await self._close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for event in self._events:
                await send(_body(json.dumps(event, allow_nan=False)))
            await send(_body("[DONE]"))
        except Exception as error:
            answer = from_exception(error)
            if answer.code == "defect":
                logger.exception("an answer broke off")
            await send(_body(json.dumps(answer.to_json())))
        await send({"type": "http.response.body", "body": b""})


def _body(data: str) -> dict[str, Any]:
    # ASCII, everything else escaped: many a client takes U+0085 or U+2028 in a text for the end of the line.
    return {"type": "http.response.body", "body": f"data: {data}\n\n".encode("ascii"), "more_body": True}
