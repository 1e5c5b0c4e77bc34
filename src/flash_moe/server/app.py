"""The ASGI application: routes, access control, limits, and errors in the form of each protocol."""

from __future__ import annotations

import hmac
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import anyio
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import Message

from . import anthropic_messages, openai_chat, openai_responses
from .anthropic_bodies import MessagesBody, PromptBody
from .experts_feed import ExpertsFeed
from .failures import Refusal, invalid, refusal_of
from .openai_bodies import ChatBody, CompletionBody
from .openapi import document
from .responses_bodies import ResponsesBody
from .service import Service

B = TypeVar("B", bound=BaseModel)
LOCAL_HOSTS = ["localhost", "127.0.0.1", "[::1]", "::1"]
PAGE = Path(__file__).parent / "page"
_FILES = {
    "": "index.html",
    "page.css": "page.css",
    "page.js": "page.js",
    "experts.js": "experts.js",
    "icon.svg": "icon.svg",
}
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True)
class Limits:
    """The limits of a request body.

    Attributes:
        body_bytes: maximum size of a body in bytes.
        body_seconds: seconds within which a body must arrive.
    """

    body_bytes: int = 16 << 20
    body_seconds: float = 30.0


def build(
    service: Service,
    *,
    api_key: str | None = None,
    limits: Limits = Limits(),
    allowed_hosts: list[str] | None = None,
    allowed_origins: list[str] | None = None,
) -> Starlette:
    """Builds the application.

    Args:
        api_key: key that requests must send as ``Authorization: Bearer KEY`` or ``x-api-key: KEY``; None requires no
            key.
        allowed_hosts: values that requests may send in ``Host``; None allows all. Without a key, this prevents DNS
            rebinding: web pages of other sites cannot reach the server under a domain of their own.
        allowed_origins: origins whose web pages may use the server (CORS); none by default.
    """
    feed = ExpertsFeed(service.model, service.names[0], lambda: service.generated, service.shutting_down.is_set)

    def guarded(
        handle: Callable[[Request], Awaitable[Response]], anthropic: bool = False
    ) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            try:
                _check_key(request, api_key)
                response = await _unless_gone(request, handle)
            except Exception as error:
                refusal = refusal_of(error)
                body = anthropic_messages.error_body(refusal) if anthropic else openai_chat.error_body(refusal)
                response = JSONResponse(body, refusal.status, refusal.headers)
            service.metrics.request(request.scope["route"].path, response.status_code)
            return response

        return endpoint

    def post(
        path: str, kind: type[B], answer: Callable[[Service, B], Awaitable[Response]], anthropic: bool = False
    ) -> Route:
        async def handle(request: Request) -> Response:
            return await answer(service, await _body(request, kind, limits))

        return Route(path, guarded(handle, anthropic), methods=["POST"])

    def get(path: str, handle: Callable[[Request], Awaitable[Response]]) -> Route:
        return Route(path, guarded(handle), methods=["GET"])

    async def models(request: Request) -> Response:
        entries = [{"id": name, "object": "model", "created": 0, "owned_by": "flash_moe"} for name in service.names]
        if (name := request.path_params.get("name")) is None:
            return JSONResponse({"object": "list", "data": entries})
        service.check_name(name)
        return JSONResponse(entries[service.names.index(name)])

    async def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "active": service.admission.active, "waiting": service.admission.waiting})

    async def metrics(request: Request) -> Response:
        return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4")

    async def experts(request: Request) -> Response:
        return Response(media_type="text/event-stream") if request.method == "HEAD" else feed.response()

    async def openapi(request: Request) -> Response:
        return JSONResponse(document(api_key is not None))

    async def file(request: Request) -> Response:
        name = _FILES[request.url.path[1:]]
        content = await anyio.Path(PAGE / name).read_bytes()
        return Response(content, media_type=_TYPES[Path(name).suffix], headers=_PAGE_HEADERS)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        with feed.watching():
            yield

    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=allowed_hosts)] if allowed_hosts is not None else []
    if allowed_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=allowed_origins,
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # SDKs for browsers send many of their own
            )
        )
    return Starlette(
        routes=[
            post("/v1/chat/completions", ChatBody, openai_chat.chat),
            post("/v1/completions", CompletionBody, openai_chat.completion),
            post("/v1/responses", ResponsesBody, openai_responses.responses),
            post("/v1/messages", MessagesBody, anthropic_messages.messages, anthropic=True),
            post("/v1/messages/count_tokens", PromptBody, anthropic_messages.count_tokens, anthropic=True),
            get("/v1/models", models),
            get("/v1/models/{name:path}", models),
            get("/metrics", metrics),
            get("/experts", experts),
            get("/openapi.json", openapi),
            Route("/health", health, methods=["GET"]),
            *(Route(f"/{name}", file, methods=["GET"]) for name in _FILES),
        ],
        middleware=middleware,
        exception_handlers={HTTPException: _not_found},
        lifespan=lifespan,
    )


def _check_key(request: Request, key: str | None) -> None:
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    offered = given.strip() if scheme.lower() == "bearer" else request.headers.get("x-api-key", "")
    if not hmac.compare_digest(offered.encode("latin-1"), key.encode()):
        raise Refusal(
            401, "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'",
            code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip


async def _body(request: Request, kind: type[B], limits: Limits) -> B:
    """Reads and checks a JSON body. It requires the content type JSON, which web pages of other origins cannot send."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise Refusal(415, f"the content type is {content_type[:100]!r}, expected 'application/json'")
    content = bytearray()
    with anyio.move_on_after(limits.body_seconds) as scope:
        async for piece in request.stream():
            content += piece
            if len(content) > limits.body_bytes:
                raise Refusal(413, f"the body has more than {limits.body_bytes} bytes; send less, or raise --max-body")
    if scope.cancelled_caught:
        raise Refusal(408, f"the body did not arrive within {limits.body_seconds:g} seconds")
    try:
        return kind.model_validate_json(bytes(content))
    except ValidationError as error:
        raise invalid(error, bytes(content)) from None


async def _unless_gone(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> Response:
    """Runs a handler, and cancels it if the client disconnects."""
    response: Response = Response(status_code=499)
    failure: Exception | None = None
    arrived = anyio.Event()  # the whole body has arrived, so the next message can only be the end of the connection

    async def receive() -> Message:
        message = await request.receive()
        if not message.get("more_body", False):
            arrived.set()
        return message

    async def watch() -> None:
        await arrived.wait()
        while (await request.receive())["type"] != "http.disconnect":
            pass
        group.cancel_scope.cancel()

    async with anyio.create_task_group() as group:
        group.start_soon(watch)
        try:
            response = await handle(Request(request.scope, receive))
        except ClientDisconnect:
            pass
        except Exception as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return response


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    refusal = Refusal(error.status_code, f"{error.detail}: {request.method} {request.url.path[:200]}")
    return JSONResponse(openai_chat.error_body(refusal), refusal.status, error.headers)
