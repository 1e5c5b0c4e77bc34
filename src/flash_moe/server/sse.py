"""Formats and sends server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import Any

import anyio
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from .failures import Refusal, refusal_of

KEEP_ALIVE = ": waiting\n\n"
DONE = "data: [DONE]\n\n"


def event(data: Any, name: str | None = None) -> str:
    """Returns one event with JSON data."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return (f"event: {name}\n" if name else "") + f"data: {text}\n\n"


class EventStream(StreamingResponse):
    """A stream of server-sent events.

    It closes its source at the end, even if the client disconnects before the first event.
    """

    def __init__(self, events: AsyncGenerator[str, None], source: AsyncGenerator[str, None]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


async def started(source: AsyncGenerator[str, None], failure: Callable[[Refusal], str]) -> EventStream:
    """Waits for the first event of a source, so that an earlier error becomes an ordinary response with a status.

    Args:
        failure: function that formats a later error as an event.
    """
    first = await anext(source)

    async def events() -> AsyncIterator[str]:
        yield first
        try:
            async for text in source:
                yield text
        except Exception as error:
            yield failure(refusal_of(error))

    return EventStream(events(), source)  # type: ignore[arg-type]
