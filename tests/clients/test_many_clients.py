"""Many clients at once, who cancel and leave at random; and requests that no client would send."""

from __future__ import annotations

import gc
import random
import socket
import statistics
import threading
import time
from typing import Any

import httpx
import mlx.core as mx
import pytest
from browser import serving

from flash_moe import Model
from flash_moe.server.app import Limits, build
from flash_moe.server.service import Service
from flash_moe.server.turns import Turns

pytestmark = pytest.mark.clients
SECONDS = 60
CHAT = "/v1/chat/completions"


def body(question: int, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": f"What is {question}?"}]
    return {"model": "demo", "messages": messages, "max_tokens": 6, "temperature": 0} | fields


def test_64_clients_for_a_minute() -> None:
    with Model.load("demo") as model:
        expected = {q: model.generate(body(q)["messages"], max_tokens=6, temperature=0).text for q in range(8)}
        threads_before = threading.active_count()
        with serving(build(Service(model, ["demo"], Turns(4, 16)))) as address:
            wrong, refused, complete, health = [], 0, 0, []
            lock, end = threading.Lock(), time.monotonic() + SECONDS

            def client(number: int) -> None:
                nonlocal refused, complete
                draw = random.Random(number)
                with httpx.Client(base_url=address, timeout=60) as http:
                    while time.monotonic() < end:
                        question = draw.randrange(8)
                        if draw.random() < 0.4:  # leaves at a random moment
                            with http.stream("POST", CHAT, json=body(question, stream=True, max_tokens=200)) as stream:
                                for _, _ in zip(range(draw.randrange(6)), stream.iter_lines(), strict=False):
                                    pass
                            continue
                        response = http.post(CHAT, json=body(question))
                        with lock:
                            if response.status_code == 429:
                                refused += 1
                            elif response.status_code == 200:
                                complete += 1
                                text = response.json()["choices"][0]["message"]["content"]
                                if text != expected[question]:
                                    wrong.append((question, text))
                            else:
                                wrong.append((question, response.text))
                        if response.status_code == 429:
                            time.sleep(0.05)

            clients = [threading.Thread(target=client, args=(number,)) for number in range(64)]
            for thread in clients:
                thread.start()
            with httpx.Client(base_url=address, timeout=60) as http:
                while time.monotonic() < end:
                    start = time.monotonic()
                    assert http.get("/health").status_code == 200
                    health.append(time.monotonic() - start)
                    time.sleep(0.05)
                for thread in clients:
                    thread.join()
                moment = time.monotonic() + 5
                while http.get("/health").json()["active"] and time.monotonic() < moment:
                    time.sleep(0.02)
                assert http.get("/health").json() == {"status": "ok", "active": 0, "waiting": 0}
        assert wrong == [] and complete > 64 and refused > 0
        p99 = statistics.quantiles(health, n=100)[98]
        assert p99 < 0.1 * slowness(), f"/health took {p99:.3f} s"
        assert threading.active_count() <= threads_before + 1
        model.forget()
        gc.collect()
        assert mx.get_active_memory() < 200 << 20


def slowness() -> float:
    """How much longer than usual (1 and more) a thread that sleeps 10 ms sleeps on this machine now."""
    start = time.monotonic()
    for _ in range(50):
        time.sleep(0.01)
    return max(1.0, (time.monotonic() - start) / 0.55)


@pytest.fixture(scope="module")
def port() -> Any:
    with Model.load("demo") as model:
        limits = Limits(body_bytes=1 << 20, body_seconds=1.0)
        with serving(build(Service(model, ["demo"], Turns(2, 2)), limits=limits)) as address:
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


def test_the_document_of_the_api_holds(port: int) -> None:
    """What is generated from the OpenAPI document never makes the server fail."""
    import schemathesis
    from hypothesis import HealthCheck, settings
    from schemathesis.checks import not_a_server_error

    address = f"http://127.0.0.1:{port}"
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json").exclude(path="/experts")

    @schema.parametrize()
    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    def fuzz(case: Any) -> None:
        if isinstance(case.body, dict):
            case.body |= {"model": "demo"} | {name: 2 for name in _LIMITS if name in case.body}
        case.call_and_validate(base_url=address, checks=[not_a_server_error])

    for operation in schema.get_all_operations():
        operation.ok().as_strategy()
    run(schema, fuzz)


_LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def run(schema: Any, test: Any) -> None:
    """Runs a parametrised test of schemathesis for every operation."""
    import hypothesis

    for result in schema.get_all_operations():
        strategy = result.ok().as_strategy()
        hypothesis.given(case=strategy)(test.__wrapped__ if hasattr(test, "__wrapped__") else test)()
