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

GRACE_SECONDS = 5  # seconds after SIGTERM or Ctrl-C for running replies to finish; then they end with an error
_LAST_SECONDS = 5  # seconds for sending these errors


class _Server(uvicorn.Server):
    """A server that ends unfinished replies with an error of their protocol at shutdown."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Rejects new connections, and waits for open ones to end."""
        self._service.shutting_down.set()
        timer = asyncio.get_running_loop().call_later(GRACE_SECONDS, self._service.end)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


def is_local(host: str) -> bool:
    """Returns whether only programs on this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def listener(host: str, port: int, api_key: str | None) -> Iterator[socket.socket]:
    """Opens the socket to listen on, so that errors appear before the model is loaded.

    Raises:
        ArgumentError: other machines can reach the address and there is no API key, no request could send the key, or
            the address cannot be used.
    """
    if api_key is not None and (not api_key or api_key != api_key.strip()):
        raise ArgumentError("the API key is empty or has spaces at its ends, so no request can send it; give another")
    if not is_local(host) and not api_key:
        raise ArgumentError(f"other machines can reach {host}; give --api-key, or listen on 127.0.0.1")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        found = socket.create_server((host, port), family=family)
        # asyncio sends small writes immediately only if the socket names its protocol; otherwise each reply waits 40 ms
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, fileno=found.detach())
    except OSError as error:
        free = port + 1 if 0 < port < 65535 else 8081
        raise ArgumentError(
            f"cannot listen on {host}, port {port} ({error.strerror}); try another --port, such as {free}"
        ) from error
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
    """Serves a model. Returns after SIGTERM, and raises KeyboardInterrupt after SIGINT.

    After the signal, new connections are rejected. Replies that do not finish within 5 seconds end with an error.

    Args:
        listening: socket from :func:`listener`. host: its address.
        names: names of the model in requests; None takes the name of its folder.
        parallel: maximum number of generations that take turns. queue: maximum number of waiting requests.
        prompt_limit: maximum number of tokens of a prompt.
        allowed_origins: origins whose web pages may use the server.
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
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises the signal again after it has ended
    try:
        _Server(config, service).run([listening])
    finally:
        signal.signal(signal.SIGTERM, before)
