"""The endpoint `/v1/responses` of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from . import sse
from .failures import Refusal
from .openai_chat import error_body
from .responses_bodies import ResponsesBody
from .service import Reply, Service


def _usage(reply: Reply) -> dict[str, Any]:
    stats = reply.usage
    return {
        "input_tokens": stats.prompt_tokens,
        "input_tokens_details": {"cached_tokens": stats.reused_tokens},
        "output_tokens": stats.generated_tokens,
        "output_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
    }


class _Response:
    """A growing response: its items, and the events that report them.

    Attributes:
        final: the complete response; set at the end.
    """

    def __init__(self, body: ResponsesBody) -> None:
        self._body = body
        self._id, self._created = f"resp_{uuid.uuid4().hex}", int(time.time())
        self.items: list[dict[str, Any]] = []
        self.final: dict[str, Any] = {}
        self._sequence = -1
        self._open: dict[str, Any] | None = None

    def json(self, status: str, reply: Reply | None = None) -> dict[str, Any]:
        """Returns the response as a JSON object."""
        body = self._body
        wanted = None if body.text is None else body.text.format
        text = {"type": "text"} if wanted is None else wanted.model_dump(by_alias=True, exclude_none=True)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id, "object": "response", "created_at": self._created, "status": status, "model": body.model,
            "output": self.items, "error": None, "incomplete_details": cut, "instructions": body.instructions,
            "metadata": body.metadata or {}, "parallel_tool_calls": body.parallel_tool_calls is not False,
            "temperature": body.temperature, "top_p": body.top_p, "max_output_tokens": body.max_output_tokens,
            "tool_choice": "auto" if body.tool_choice is None else body.model_dump(include={"tool_choice"})["tool_choice"],
            "tools": [tool.model_dump() for tool in body.tools or []], "previous_response_id": None, "store": False,
            "text": {"format": text}, "truncation": "disabled",
            "usage": None if reply is None else _usage(reply),
        }  # fmt: skip

    def event(self, kind: str, **fields: Any) -> str:
        """Returns an event with the next sequence number."""
        self._sequence += 1
        return sse.event({"type": kind, "sequence_number": self._sequence, **fields}, kind)

    def _item_event(self, kind: str, **fields: Any) -> str:
        item = self.items[-1]
        return self.event(kind, item_id=item["id"], output_index=len(self.items) - 1, **fields)

    def _begin(self, kind: str, prefix: str, **fields: Any) -> str:
        self._open = {"id": f"{prefix}_{uuid.uuid4().hex}", "type": kind, "status": "in_progress", **fields}
        self.items.append(self._open)
        return self.event("response.output_item.added", output_index=len(self.items) - 1, item=self._open)

    def text(self, piece: str) -> str:
        """Returns the events for a piece of the answer."""
        events = ""
        if self._open is None or self._open["type"] != "message":
            events = self.close() + self._begin("message", "msg", role="assistant", content=[])
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            self.items[-1]["content"].append(part)
            events += self._item_event("response.content_part.added", content_index=0, part=part)
        self.items[-1]["content"][0]["text"] += piece
        return events + self._item_event("response.output_text.delta", content_index=0, delta=piece, logprobs=[])

    def reasoning(self, piece: str) -> str:
        """Returns the events for a piece of the reasoning."""
        events = ""
        if self._open is None or self._open["type"] != "reasoning":
            events = self.close() + self._begin("reasoning", "rs", summary=[], content=[])
            self.items[-1]["content"].append({"type": "reasoning_text", "text": ""})
        self.items[-1]["content"][0]["text"] += piece
        return events + self._item_event("response.reasoning_text.delta", content_index=0, delta=piece)

    def call(self, call: Any) -> str:
        """Returns the events for a tool call."""
        arguments = json.dumps(call.arguments, ensure_ascii=False)
        events = self.close() + self._begin("function_call", "fc", call_id=call.id, name=call.name, arguments="")
        events += self._item_event("response.function_call_arguments.delta", delta=arguments)
        self.items[-1]["arguments"] = arguments
        return events + self._item_event("response.function_call_arguments.done", arguments=arguments, name=call.name)

    def close(self, status: str = "completed") -> str:
        """Returns the events that end the open item, or an empty string without an open item."""
        if (item := self._open) is None:
            return ""
        self._open, events = None, ""
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            events += self._item_event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            events += self._item_event("response.content_part.done", content_index=0, part=part)
        elif item["type"] == "reasoning":
            text = item["content"][0]["text"]
            events += self._item_event("response.reasoning_text.done", content_index=0, text=text)
        return events + self.event("response.output_item.done", output_index=len(self.items) - 1, item=item)


async def responses(service: Service, body: ResponsesBody) -> Response:
    """Answers a request with a complete response or with a stream."""
    service.check_name(body.model)
    response = _Response(body)
    if body.stream:
        events = _events(service, body, response)
        return await sse.started(events, lambda refusal: response.event("error", **_error(refusal)))
    async for _ in _events(service, body, response):
        pass
    return JSONResponse(response.final)


def _error(refusal: Refusal) -> dict[str, Any]:
    return {name: value for name, value in error_body(refusal)["error"].items() if name != "type"}


async def _events(service: Service, body: ResponsesBody, response: _Response) -> AsyncGenerator[str, None]:
    one_call = body.parallel_tool_calls is False
    async with service.generation(body.prompt(), body.options(), one_call=one_call) as reply:
        yield response.event("response.created", response=response.json("in_progress"))
        yield response.event("response.in_progress", response=response.json("in_progress"))
        async for chunk in reply:
            if chunk is None:
                yield sse.KEEP_ALIVE
                continue
            if chunk.reasoning:
                yield response.reasoning(chunk.reasoning)
            if chunk.text:
                yield response.text(chunk.text)
            for call in chunk.tool_calls:
                yield response.call(call)
    status = "incomplete" if reply.reason == "length" else "completed"
    yield response.close(status)
    response.final = response.json(status, reply)
    yield response.event(f"response.{status}", response=response.final)
