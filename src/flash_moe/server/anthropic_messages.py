"""The endpoints `/v1/messages` and `/v1/messages/count_tokens` of Anthropic's API."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from ..generation.stats import Stats
from . import sse
from .anthropic_bodies import MessagesBody, PromptBody
from .failures import Refusal
from .service import Reply, Service

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error",
}  # fmt: skip


def error_body(refusal: Refusal) -> dict[str, Any]:
    """Returns an error in the form of Anthropic's API."""
    kind = _KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": refusal.message}}


def _usage(stats: Stats) -> dict[str, int]:
    return {
        "input_tokens": stats.prompt_tokens - stats.reused_tokens,
        "cache_read_input_tokens": stats.reused_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": stats.generated_tokens,
    }


def _end(reply: Reply) -> dict[str, Any]:
    if reply.reason == "stop" and reply.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": reply.stop_string}
    return {"stop_reason": _REASONS.get(reply.reason or "", "end_turn"), "stop_sequence": None}


def _message(body: MessagesBody, content: list[Any], end: dict[str, Any], usage: dict[str, int]) -> dict[str, Any]:
    return {
        "id": f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "content": content,
        **end,
        "usage": usage,
    }


async def messages(service: Service, body: MessagesBody) -> Response:
    """Answers a request with a complete message or with a stream."""
    service.check_name(body.model)
    if body.stream:
        return await sse.started(_events(service, body), lambda refusal: sse.event(error_body(refusal), "error"))
    async with service.generation(body.prompt(), body.options(), one_call=body.one_call) as reply:
        await reply.complete()
    content: list[Any] = []
    if reply.reasoning:
        content.append({"type": "thinking", "thinking": reply.reasoning, "signature": ""})
    if reply.text:
        content.append({"type": "text", "text": reply.text})
    content += [{"type": "tool_use", "id": call.id, "name": call.name, "input": call.arguments} for call in reply.calls]
    return JSONResponse(_message(body, content, _end(reply), _usage(reply.usage)))


class _Blocks:
    """The content blocks of a stream. Only one block is open at a time."""

    def __init__(self) -> None:
        self.index, self.kind = -1, ""

    def piece(self, kind: str, start: dict[str, Any], delta: dict[str, Any]) -> str:
        """Returns the events for a piece of content. Opens a block of this kind if necessary."""
        text = ""
        if self.kind != kind or kind == "tool_use":
            text = self.close()
            self.index, self.kind = self.index + 1, kind
            text += self._event("content_block_start", content_block={"type": kind, **start})
        return text + self._event("content_block_delta", delta=delta)

    def close(self) -> str:
        """Returns the event that ends the open block, or an empty string without an open block."""
        kind, self.kind = self.kind, ""
        return self._event("content_block_stop") if kind else ""

    def _event(self, name: str, **fields: Any) -> str:
        return sse.event({"type": name, "index": self.index, **fields}, name)


async def _events(service: Service, body: MessagesBody) -> AsyncGenerator[str, None]:
    blocks = _Blocks()
    async with service.generation(body.prompt(), body.options(), one_call=body.one_call) as reply:
        end: dict[str, Any] = {"stop_reason": None, "stop_sequence": None}
        start = _message(body, [], end, {"input_tokens": 0, "output_tokens": 0})
        yield sse.event({"type": "message_start", "message": start}, "message_start")
        async for chunk in reply:
            if chunk is None:
                yield sse.event({"type": "ping"}, "ping")
                continue
            if chunk.reasoning:
                delta = {"type": "thinking_delta", "thinking": chunk.reasoning}
                yield blocks.piece("thinking", {"thinking": "", "signature": ""}, delta)
            if chunk.text:
                yield blocks.piece("text", {"text": ""}, {"type": "text_delta", "text": chunk.text})
            for call in chunk.tool_calls:
                arguments = json.dumps(call.arguments, ensure_ascii=False)
                begin = {"id": call.id, "name": call.name, "input": {}}
                yield blocks.piece("tool_use", begin, {"type": "input_json_delta", "partial_json": arguments})
    yield blocks.close()
    yield sse.event({"type": "message_delta", "delta": _end(reply), "usage": _usage(reply.usage)}, "message_delta")
    yield sse.event({"type": "message_stop"}, "message_stop")


async def count_tokens(service: Service, body: PromptBody) -> Response:
    """Counts the tokens that a request with this prompt would run."""
    service.check_name(body.model)
    tokens = await asyncio.to_thread(service.count, body.prompt(), body.options())
    return JSONResponse({"input_tokens": len(tokens)})
