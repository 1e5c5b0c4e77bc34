"""The OpenAPI document of the server, generated from the models that check requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from .anthropic_bodies import MessagesBody, PromptBody
from .openai_bodies import ChatBody, CompletionBody
from .responses_bodies import ResponsesBody

_POSTS: dict[str, tuple[type[BaseModel], str]] = {
    "/v1/chat/completions": (ChatBody, "Answers a conversation (OpenAI)."),
    "/v1/completions": (CompletionBody, "Continues a text (OpenAI)."),
    "/v1/responses": (ResponsesBody, "Answers a conversation (OpenAI Responses)."),
    "/v1/messages": (MessagesBody, "Answers a conversation (Anthropic)."),
    "/v1/messages/count_tokens": (PromptBody, "Counts the tokens of a prompt (Anthropic)."),
}
_GETS = {
    "/v1/models": ("Lists the names of the model.", "application/json"),
    "/health": ("Says that the server runs.", "application/json"),
    "/metrics": ("Counters in Prometheus' text format.", "text/plain"),
    "/experts": ("Which experts are read, as server-sent events.", "text/event-stream"),
}


def document(with_key: bool) -> dict[str, Any]:
    """Returns the document in version 3.1 of OpenAPI.

    Args:
        with_key: whether requests need an API key.
    """
    from .. import __version__

    kinds = [(kind, "validation") for kind, _ in _POSTS.values()]
    names, definitions = models_json_schema(kinds, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    failure = {"description": "An error in the form of the protocol.", "content": {"application/json": {}}}
    failures = {str(status): failure for status in (400, 401, 404, 408, 413, 415, 429, 500)}
    paths: dict[str, Any] = {}
    for path, (kind, text) in _POSTS.items():
        schema = names[kind, "validation"]
        answers = {"200": {"description": "The reply.", "content": {"application/json": {}, "text/event-stream": {}}}}
        paths[path] = {
            "post": {
                "summary": text,
                "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}},
                "responses": answers | failures,
            }
        }
    for path, (text, media) in _GETS.items():
        answer = {"200": {"description": text, "content": {media: {}}}, "401": failure}
        paths[path] = {"get": {"summary": text, "responses": answer}}
    components: dict[str, Any] = {"schemas": definitions.get("$defs", {})}
    found: dict[str, Any] = {
        "openapi": "3.1.0", "info": {"title": "flash_moe", "version": __version__}, "paths": paths,
        "components": components,
    }  # fmt: skip
    if with_key:
        components["securitySchemes"] = {
            "bearer": {"type": "http", "scheme": "bearer"},
            "header": {"type": "apiKey", "in": "header", "name": "x-api-key"},
        }
        found["security"] = [{"bearer": []}, {"header": []}]
    return found
