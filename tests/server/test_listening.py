"""The socket that the server listens on."""

from __future__ import annotations

import asyncio
import socket

import pytest

pytest.importorskip("uvicorn")

from flash_moe import ArgumentError
from flash_moe.server.listening import listener


def test_small_writes_are_sent_at_once() -> None:
    """Headers and body are two writes: with Nagle's algorithm, the second one waits 40 ms for the client's system."""
    options: list[int] = []

    async def serve(listening: socket.socket) -> None:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            options.append(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        async with await asyncio.start_server(connected, sock=listening):
            reader, writer = await asyncio.open_connection(*listening.getsockname()[:2])
            await reader.read()
            writer.close()

    with listener("127.0.0.1", 0, None) as listening:
        asyncio.run(serve(listening))
    assert options and options[0] != 0


def test_other_machines_need_a_key() -> None:
    with pytest.raises(ArgumentError, match="api-key"), listener("0.0.0.0", 0, None):
        pass
    with (
        listener("127.0.0.1", 0, None) as first,
        pytest.raises(ArgumentError, match=r"try another --port, such as \d+$"),
    ):
        listener("127.0.0.1", first.getsockname()[1], None).__enter__()


@pytest.mark.parametrize("key", ["", " ", "key\n"])
def test_keys_that_no_request_can_send(key: str) -> None:
    with pytest.raises(ArgumentError, match="API key"), listener("127.0.0.1", 0, key):
        pass
