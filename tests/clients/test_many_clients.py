"""Many clients at once, who cancel and leave at random; and requests that no client would send."""

from __future__ import annotations

import gc
import json
import socket
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import mlx.core as mx
import pytest
from browser import serving

from flash_moe import Model
from flash_moe.server.admission import Admission
from flash_moe.server.app import Limits, build
from flash_moe.server.service import Service

pytestmark = pytest.mark.clients
SECONDS = 60


def test_64_clients_for_a_minute() -> None:
    script = Path(__file__).parent / "many_clients.py"
    questions = [f"What is {number}?" for number in range(8)]
    with Model.load("demo") as model:
        right = {ask: model.generate(ask, max_tokens=6, temperature=0).text for ask in questions}
        threads, memory = threading.active_count(), mx.get_active_memory()
        with serving(build(Service(model, ["demo"], Admission(4, 16)))) as address:
            command = [sys.executable, str(script), address, str(SECONDS)]
            done = subprocess.run(command, input=json.dumps(right), capture_output=True, text=True, check=True)
            seen = json.loads(done.stdout)
            until_idle(address)
        assert seen["wrong"] == []
        assert seen["complete"] > 20 and seen["refused"] > 0 and seen["left"] > 20
        p99, own = (statistics.quantiles(seen[name], n=100)[98] for name in ("health", "slept"))
        print(f"/health: p99 {p99:.3f} s; the client itself was late by {own:.3f} s; {seen['complete']} replies")
        assert p99 < 1.0  # the goal is 0.1 on a machine that does nothing else
        assert threading.active_count() <= threads + 1
        model.forget()
        gc.collect()
        assert mx.get_active_memory() < memory + (8 << 20)


def until_idle(address: str) -> None:
    """Waits until no request runs or waits: five seconds at most."""
    end = time.monotonic() + 5
    while (state := httpx.get(f"{address}/health").json()) != {"status": "ok", "active": 0, "waiting": 0}:
        assert time.monotonic() < end, state
        time.sleep(0.02)


@pytest.fixture(scope="module")
def port() -> Any:
    with Model.load("demo") as model:
        limits = Limits(body_bytes=1 << 20, body_seconds=1.0)
        with serving(build(Service(model, ["demo"], Admission(2, 2)), limits=limits)) as address:
            yield int(address.rpartition(":")[2])


def talk(port: int, *pieces: bytes, pause: float = 0.0) -> bytes:
    """Sends bytes as they are and returns the first line of the answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for piece in pieces:
            try:
                connection.sendall(piece)
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(pause)
        return connection.recv(4096).partition(b"\r\n")[0]


def test_raw_requests(port: int) -> None:
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    assert b"400" in talk(port, head + b"Content-Length: 1\r\n\r\n{")
    assert b"413" in talk(port, head + b"Content-Length: 104857600\r\n\r\n", *[b" " * (1 << 20)] * 3)
    assert b"408" in talk(port, head + b"Content-Length: 100\r\n\r\n{", b"}", pause=1.5)
    assert b"400" in talk(port, b"GARBAGE\r\n\r\n")
    assert b"400" in talk(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: a\x00b\r\n\r\n")
    assert b"404" in talk(port, b"GET /../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200" in talk(port, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")


def test_nothing_that_the_document_allows_makes_the_server_fail(port: int) -> None:
    import schemathesis
    from hypothesis import HealthCheck, given, settings
    from schemathesis.checks import not_a_server_error

    address = f"http://127.0.0.1:{port}"
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path="/experts")  # this one never ends
    statuses: set[int] = set()

    def send(case: Any) -> None:
        if isinstance(case.body, dict):  # a model that exists, and few tokens
            case.body |= {"model": "demo"} | {name: 2 for name in _LIMITS if name in case.body}
        response = case.call(base_url=address)
        case.validate_response(response, checks=[not_a_server_error])
        statuses.add(response.status_code)

    bounded = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    for operation in schema.get_all_operations():
        bounded(given(case=operation.ok().as_strategy())(send))()
    assert {200, 400} <= statuses


_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
