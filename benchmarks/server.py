"""What the server adds to the library: first token and tokens per second of one client, in turns.

python benchmarks/server.py [MODEL]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "clients"))

from browser import serving

from flash_moe import Model
from flash_moe.server.app import build
from flash_moe.server.service import Service
from flash_moe.server.turns import Turns

ROUNDS, TOKENS = 9, 96
ASK = [{"role": "user", "content": "What is the page cache, and why does the library use it? Answer at length."}]
BODY = {"model": "x", "messages": ASK, "max_tokens": TOKENS, "temperature": 0, "stream": True}


def library(model: Model) -> tuple[float, float]:
    """Seconds to the first token, and tokens per second behind it."""
    start, times = time.perf_counter(), []
    for _ in model.stream(ASK, max_tokens=TOKENS, temperature=0, progress=False):
        times.append(time.perf_counter())
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def server(client: httpx.Client) -> tuple[float, float]:
    """The same for a client of the server, whose first event with text is the first token."""
    start, times = time.perf_counter(), []
    with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        for line in response.iter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["delta"].get("content"):
                times.append(time.perf_counter())
    return times[0] - start, (len(times) - 1) / (times[-1] - times[0])


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else "demo"
    with (
        Model.load(name) as model,
        serving(build(Service(model, ["x"], Turns(4, 8)))) as address,
        httpx.Client(base_url=address, timeout=600) as client,
    ):
        library(model), server(client)
        rows = []
        for _ in range(ROUNDS):
            model.forget()
            alone = library(model)
            model.forget()
            rows.append((alone, server(client)))
    first = statistics.median(served[0] / alone[0] for alone, served in rows)
    speed = statistics.median(served[1] / alone[1] for alone, served in rows)
    print(f"{name}: first token {rows[0][0][0]:.3f} s alone, through the server {first:.3f} times that")
    print(
        f"{name}: {rows[0][0][1]:.1f} tok/s alone, through the server {speed:.3f} times that (median of {ROUNDS} turns)"
    )


if __name__ == "__main__":
    main()
