"""What goes out as server-sent events."""

from __future__ import annotations

import asyncio
import json

import pytest

pytest.importorskip("fastapi")

from dsv3.serve.server.sse import EventStream


def test_an_event_is_one_line_to_every_client():
    """Whatever the text holds: `splitlines`, and clients built on it, know more ends of lines than the format."""
    text = "a\n\r\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029 \u4f60\u597d \U0001f600 b"
    sent: list[bytes] = []

    async def events():
        yield {"text": text}

    async def close() -> None:
        sent.append(b"")

    async def send(message) -> None:
        sent.append(message.get("body", b""))

    async def receive():
        await asyncio.Event().wait()

    asyncio.run(EventStream(events(), close)({"type": "http"}, receive, send))
    lines = [line for line in b"".join(sent).decode().splitlines() if line]
    assert len(lines) == 2 and lines[1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: ")) == {"text": text}
