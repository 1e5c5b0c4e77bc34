"""What the server adds to the library: first token and tokens per second of one client, in turns.

    python benchmarks/server.py [MODEL]

The server runs as `flash-moe serve` in a process of its own, as a user runs it. Every turn asks something new.
"""

from __future__ import annotations

import json
import socket
import statistics
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from flash_moe import Model

TURNS, TOKENS = 16, 96
Message = dict[str, Any]


def library(model: Model, messages: list[Message]) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second behind it."""
    start, times = time.perf_counter(), []
    for _ in model.stream(messages, max_tokens=TOKENS, temperature=0, progress=False):
        times.append(time.perf_counter())
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def server(client: httpx.Client, messages: list[Message]) -> tuple[float, float]:
    """The same for a client of the server, whose first event with text is the first token."""
    body = {"model": "default", "messages": messages, "max_tokens": TOKENS, "temperature": 0, "stream": True}
    start, times = time.perf_counter(), []
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def serve(name: str) -> tuple[subprocess.Popen[bytes], httpx.Client]:
    """Starts the server on a free port, and waits until it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = Path(sys.executable).with_name("flash-moe")
    command = [program, "serve", name, "--port", str(port), "--name", "default"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)
    while process.poll() is None:
        try:
            client.get("/health")
            return process, client
        except httpx.ConnectError:
            time.sleep(0.1)
    raise SystemExit("the server ended")


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    process, client = serve(name)
    rows = []
    with Model.load(name) as model, closing(client):
        for turn in range(TURNS + 1):
            asked = [{"role": "user", "content": f"{turn}: What is the page cache, and why does the library use it?"}]
            if turn % 2:
                served = server(client, asked)
                alone = library(model, asked)
            else:
                alone = library(model, asked)
                served = server(client, asked)
            rows.append((alone, served))
    process.terminate()
    process.wait()
    rows = rows[1:]  # the first one warms up
    first, speed = (statistics.median(alone[i] for alone, _ in rows) for i in (0, 1))
    of_first, of_speed = (statistics.median(served[i] / alone[i] for alone, served in rows) for i in (0, 1))
    print(f"{name}: first token {1e3 * first:.0f} ms alone, through the server {of_first:.3f} times that")
    print(f"{name}: {speed:.1f} tok/s alone, through the server {of_speed:.3f} times that (medians of {TURNS} turns)")


if __name__ == "__main__":
    main()
