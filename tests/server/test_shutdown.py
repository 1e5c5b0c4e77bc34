"""A server that gets SIGTERM: no new connections, replies end by themselves or with their protocol's error, exit code 0."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

SERVER = """
import sys
from scripted import ScriptedModel, chunk
from flash_moe.server import listening as serving
serving.GRACE_SECONDS = 2
services = []
class Service(serving.Service):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        services.append(self)
serving.Service = Service
def until_shutdown():
    yield chunk("a ")
    services[0].shutting_down.wait(60)
    yield chunk("z ")
    yield chunk(reason="stop")
class Model(ScriptedModel):
    def stream(self, prompt, **options):
        if "short" in str(prompt):
            return until_shutdown()
        return ScriptedModel([chunk("word ") for _ in range(100_000)], 0.02).stream(prompt, **options)
with serving.listener("127.0.0.1", 0, None) as listening:
    print(listening.getsockname()[1], flush=True)
    serving.serve(Model([]), listening, parallel=3)
print("served", flush=True)
"""


def test_sigterm_ends_replies_in_the_words_of_their_protocol() -> None:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=-1, stderr=-1, text=True, cwd=Path(__file__).parent) as server:
        try:
            check(server)
        finally:
            server.kill()


def check(server: subprocess.Popen[str]) -> None:
    assert server.stdout is not None
    address = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    lines: dict[str, list[str]] = {"short": [], "long": [], "anthropic": [], "waiting": [], "page": []}

    def read(name: str, path: str, **body: Any) -> None:
        method = {"method": "GET"} if name == "page" else {"method": "POST", "json": {"model": "scripted", **body}}
        with httpx.stream(url=address + path, timeout=60, **method) as response:
            lines[name] += [f"status {response.status_code}", *response.iter_lines()]

    chat, stream = "/v1/chat/completions", {"max_tokens": 10, "stream": True}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("page", "/experts", {}),
        ("short", chat, {"messages": [{"role": "user", "content": "short"}], **stream}),
        ("long", chat, {"messages": [{"role": "user", "content": "long"}], **stream}),
        ("anthropic", "/v1/messages", {"messages": [{"role": "user", "content": "long"}], **stream}),
        ("waiting", chat, {"messages": [{"role": "user", "content": "long"}]}),
    ]
    threads, deadline = [], time.monotonic() + 60
    for count, (name, path, body) in enumerate(requests):
        threads.append(threading.Thread(target=read, args=(name, path), kwargs=body))
        threads[-1].start()
        health: dict[str, Any] = {}
        while health.get("active", 0) + health.get("waiting", 0) < count:
            health = httpx.get(f"{address}/health", timeout=60).json()
            assert time.monotonic() < deadline
    assert (health["active"], health["waiting"]) == (3, 1)
    start = time.monotonic()
    server.send_signal(signal.SIGTERM)
    with pytest.raises(httpx.TransportError):
        while time.monotonic() < start + 1.5:
            httpx.get(f"{address}/health", timeout=60)
            time.sleep(0.1)
    out, err = server.communicate(timeout=60)
    seconds = time.monotonic() - start
    for thread in threads:
        thread.join(60)
    assert (server.returncode, out, err) == (0, "served\n", "")
    assert seconds >= 2, "replies may end by themselves"
    assert lines["short"][-2:] == ["data: [DONE]", ""] and any("z " in line for line in lines["short"])
    for name, kind in (("long", "server_error"), ("anthropic", "api_error")):
        error = json.loads([line for line in lines[name] if line.startswith("data: ")][-1][6:])["error"]
        assert error["type"] == kind and "shutting down" in error["message"], name
    assert lines["waiting"][0] == "status 503" and "shutting down" in lines["waiting"][1]
    assert lines["page"][0] == "status 200"
