"""Runs the application under uvicorn."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from ..errors import ArgumentError
from ..model import Model
from .admission import Admission
from .app import LOCAL_HOSTS, Limits, build
from .service import Service

GRACE_SECONDS = 5  # after SIGTERM or Ctrl-C, in which replies may end by themselves; then they end with an error
_LAST_SECONDS = 5  # for writing those errors


class _Server(uvicorn.Server):
    """Ends replies in the words of their protocol where they take too long to end by themselves."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuses new connections, and waits for those that are open."""
        self._service.shutting_down.set()
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._service.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def is_local(host: str) -> bool:
    """Returns whether only programs on this machine can reach an address to listen on."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def listener(host: str, port: int, api_key: str | None) -> Iterator[socket.socket]:
    """Opens the socket to listen on, before a model is loaded for it.

    Raises:
        ArgumentError: other machines can reach the address and there is no API key, or it cannot be listened on.
    """
    if not is_local(host) and not api_key:
        raise ArgumentError(f"other machines can reach {host}; give --api-key, or listen on 127.0.0.1")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
        # asyncio sends small writes at once only where a socket names its protocol; else each reply waits 40 ms
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())
    except OSError as error:
        raise ArgumentError(f"cannot listen on {host}, port {port} ({error.strerror}); try --port 0") from error
    with found:
        yield found


def serve(
    model: Model,
    listening: socket.socket,
    *,
    host: str = "127.0.0.1",
    api_key: str | None = None,
    names: list[str] | None = None,
    parallel: int = 4,
    queue: int = 64,
    limits: Limits | None = None,
    prompt_limit: int | None = None,
    allowed_origins: list[str] | None = None,
) -> None:
    """Serves a model until SIGTERM, at which this returns, or SIGINT, at which it raises KeyboardInterrupt.

    New connections are refused from then on. Replies that have not ended after 5 seconds end with an error.

    Args:
        listening: of :func:`listener`. host: the address it has.
        names: names that requests may give the model; by default that of its folder.
        parallel: generations that take turns. queue: requests that may wait behind them.
        prompt_limit: the most tokens of a prompt.
        allowed_origins: sites whose pages may use the server.
    """
    service = Service(model, names or [model.path.name], Admission(parallel, queue), prompt_limit)
    app = build(
        service,
        api_key=api_key,
        limits=limits or Limits(),
        allowed_hosts=LOCAL_HOSTS if is_local(host) and not api_key else None,
        allowed_origins=allowed_origins,
    )
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS + _LAST_SECONDS,
    )  # fmt: skip
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again when it has ended
    try:
        _Server(config, service).run([listening])
    finally:
        signal.signal(signal.SIGTERM, before)
