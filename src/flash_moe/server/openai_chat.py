"""The endpoints `/v1/chat/completions` and `/v1/completions` of OpenAI's API."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from ..generation.sampling import TokenLogprobs
from ..text import Tokenizer
from . import sse
from .failures import Refusal
from .openai_bodies import ChatBody, CompletionBody
from .service import Reply, Service


def error_body(refusal: Refusal) -> dict[str, Any]:
    """Returns an error in the form of OpenAI's API."""
    kind = {401: "authentication_error", 404: "invalid_request_error", 429: "rate_limit_error"}.get(
        refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error"
    )
    return {"error": {"message": refusal.message, "type": kind, "param": refusal.param, "code": refusal.code}}


def usage(reply: Reply) -> dict[str, Any]:
    """Returns the token counts of a reply."""
    stats = reply.usage
    return {
        "prompt_tokens": stats.prompt_tokens,
        "completion_tokens": stats.generated_tokens,
        "total_tokens": stats.prompt_tokens + stats.generated_tokens,
        "prompt_tokens_details": {"cached_tokens": stats.reused_tokens},
        "completion_tokens_details": {"reasoning_tokens": reply.reasoning_tokens},
    }


def call_of(call: Any, index: int | None = None) -> dict[str, Any]:
    """Converts a tool call of the library to the form of OpenAI's API; in a stream, with its index."""
    function = {"name": call.name, "arguments": json.dumps(call.arguments, ensure_ascii=False)}
    return ({} if index is None else {"index": index}) | {"id": call.id, "type": "function", "function": function}


class _Envelope:
    """The fields that all responses to one request have in common."""

    def __init__(self, kind: str, model: str, prefix: str) -> None:
        self._fields = {"id": f"{prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._kind = kind

    def __call__(self, choices: list[Any], suffix: str = "", **more: Any) -> dict[str, Any]:
        return {**self._fields, "object": self._kind + suffix, "choices": choices, **more}


async def chat(service: Service, body: ChatBody) -> Response:
    """Answers a chat request with a complete reply or with a stream."""
    service.check_name(body.model)
    messages = [message.for_library() for message in body.messages]
    envelope = _Envelope("chat.completion", body.model, "chatcmpl")
    options = body.options()
    if body.stream:
        return await sse.started(_chat_events(service, body, messages, options, envelope), _error_event)
    async with service.generation(messages, options, one_call=body.parallel_tool_calls is False) as reply:
        await reply.complete()
    message: dict[str, Any] = {"role": "assistant", "content": reply.text or None if reply.calls else reply.text}
    if reply.reasoning:
        message["reasoning_content"] = reply.reasoning
    if reply.calls:
        message["tool_calls"] = [call_of(call) for call in reply.calls]
    choice = {
        "index": 0,
        "message": message,
        "finish_reason": reply.reason,
        "logprobs": {"content": [_Logprobs(service.model.tokenizer).chat(entry) for entry in reply.logprobs]}
        if body.logprobs
        else None,
    }
    return JSONResponse(envelope([choice], usage=usage(reply)))


async def _chat_events(
    service: Service, body: ChatBody, messages: list[Any], options: dict[str, Any], envelope: _Envelope
) -> AsyncGenerator[str, None]:
    def choice(delta: dict[str, Any], reason: str | None = None, found: Any = None) -> str:
        entry = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": found}
        return sse.event(envelope([entry], ".chunk", **({"usage": None} if body.include_usage else {})))

    async with service.generation(messages, options, one_call=body.parallel_tool_calls is False) as reply:
        yield choice({"role": "assistant", "content": ""})
        async for chunk in reply:
            if chunk is None:
                yield sse.KEEP_ALIVE
                continue
            delta: dict[str, Any] = {}
            if chunk.reasoning:
                delta["reasoning_content"] = chunk.reasoning
            if chunk.text:
                delta["content"] = chunk.text
            if chunk.tool_calls:
                before = len(reply.calls) - len(chunk.tool_calls)
                delta["tool_calls"] = [call_of(call, before + i) for i, call in enumerate(chunk.tool_calls)]
            found = None
            if body.logprobs and chunk.logprobs is not None:
                found = {"content": [_Logprobs(service.model.tokenizer).chat(chunk.logprobs)]}
            if delta or found:
                yield choice(delta, found=found)
    yield choice({}, reply.reason)
    if body.include_usage:
        yield sse.event(envelope([], ".chunk", usage=usage(reply)))
    yield sse.DONE


def _error_event(refusal: Refusal) -> str:
    return sse.event(error_body(refusal))


async def completion(service: Service, body: CompletionBody) -> Response:
    """Continues a text, with a complete reply or with a stream."""
    service.check_name(body.model)
    envelope = _Envelope("text_completion", body.model, "cmpl")
    if body.stream:
        return await sse.started(_completion_events(service, body, envelope), _error_event)
    async with service.generation(body.text, body.options()) as reply:
        await reply.complete()
    choice = {
        "index": 0,
        "text": reply.text,
        "finish_reason": reply.reason,
        "logprobs": _Logprobs(service.model.tokenizer).completion(reply.logprobs)
        if body.logprobs is not None
        else None,
    }
    return JSONResponse(envelope([choice], usage=usage(reply)))


async def _completion_events(service: Service, body: CompletionBody, envelope: _Envelope) -> AsyncGenerator[str, None]:
    async with service.generation(body.text, body.options()) as reply:
        yield sse.KEEP_ALIVE
        async for chunk in reply:
            if chunk is None:
                yield sse.KEEP_ALIVE
                continue
            found = None
            if body.logprobs is not None and chunk.logprobs is not None:
                found = _Logprobs(service.model.tokenizer).completion([chunk.logprobs])
            if chunk.text or found or chunk.finish_reason:
                entry = {"index": 0, "text": chunk.text, "finish_reason": chunk.finish_reason, "logprobs": found}
                yield sse.event(envelope([entry]))
    if body.include_usage:
        yield sse.event(envelope([], usage=usage(reply)))
    yield sse.DONE


class _Logprobs:
    """Converts log probabilities of tokens to the forms of OpenAI's API."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.bytes_of

    def chat(self, entry: TokenLogprobs) -> dict[str, Any]:
        """Returns the log probabilities of one token in the form of `/v1/chat/completions`."""

        def one(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._text(token), "logprob": logprob, "bytes": list(self._bytes(token))}

        return {**one(entry.token, entry.logprob), "top_logprobs": [one(*top) for top in entry.top]}

    def completion(self, entries: list[TokenLogprobs]) -> dict[str, Any]:
        """Returns the log probabilities of several tokens in the form of `/v1/completions`."""
        return {
            "tokens": [self._text(entry.token) for entry in entries],
            "token_logprobs": [entry.logprob for entry in entries],
            "top_logprobs": [{self._text(token): logprob for token, logprob in entry.top} for entry in entries],
        }

    def _text(self, token: int) -> str:
        return self._bytes(token).decode(errors="replace")
